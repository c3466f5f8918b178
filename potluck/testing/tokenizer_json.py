"""Writes `tokenizer.json` as models publish it: four ways of cutting, and SentencePiece's kind.

The `tokenizers` library loads what is written here, so it is the oracle of what potluck makes of
it. Vocabularies are given; what is published is how text is treated before they are used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from potluck.gguf import read
from potluck.tensor_source import Metadata, Typed
from potluck.testing.writer import write_gguf
from potluck.tokenizer import Tokenizer, load

Json = dict[str, object]


def _split(regex: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _byte_level(*, use_regex: bool, trim_offsets: bool = True) -> Json:
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": trim_offsets}
    return step | {"use_regex": use_regex}


def _sequence(*steps: Json) -> Json:
    return {"type": "Sequence", "pretokenizers": list(steps)}


# By the name that a GGUF has for them. Sources: tokenizer.json of openai-community/gpt2,
# HuggingFaceTB/SmolLM2-135M, meta-llama/Meta-Llama-3-8B, Qwen/Qwen2-0.5B.
PRE_TOKENIZERS: dict[str, Json] = {
    "gpt-2": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
    "smollm": _sequence({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)),
    "llama-bpe": _sequence(
        _split(
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
            " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
        ),
        _byte_level(use_regex=False),
    ),
    "qwen2": _sequence(
        _split(
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|"
            " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
        ),
        _byte_level(use_regex=False, trim_offsets=False),
    ),
}


def added_token(token_id: int, content: str, *, special: bool = True) -> Json:
    """An entry of added_tokens."""
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def byte_level_json(
    pre: str, tokens: Sequence[str], merges: Sequence[str], special: Sequence[str]
) -> Json:
    """Byte-level BPE cut as `pre`; the `special` tokens follow the others."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(len(tokens) + i, text) for i, text in enumerate(special)],
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": _byte_level(use_regex=True),
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": list(merges),
        },
    }


def sentence_piece_json(tokens: Sequence[str], scores: Sequence[float]) -> Json:
    """What transformers makes of a tokenizer.model with these pieces, LLaMA's first three."""
    ids = {token: i for i, token in enumerate(tokens)}
    merges: list[tuple[float, str]] = []
    for piece, score in zip(tokens, scores, strict=True):
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [(ids[a], ids[b], f"{a} {b}") for a, b in cuts if a in ids and b in ids]
        merges += [(score, merge) for _, _, merge in sorted(pairs)]
    merges.sort(key=lambda scored: scored[0], reverse=True)  # stable: equal ones keep their order
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = {"type": "Prepend", "prepend": "▁"}
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    token = {"id": "<s>", "ids": [1], "tokens": ["<s>"]}
    return {
        "version": "1.0",
        "added_tokens": [added_token(i, tokens[i]) for i in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [prefix, space]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, text],
            "pair": [start, text],
            "special_tokens": {"<s>": token},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": [merge for _, merge in merges],
        },
    }


def write_json(path: Path, value: object) -> Path:
    """Writes any value of JSON and returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False))
    return path


def tokenizer_of(pairs: Sequence[tuple[str, Metadata]], path: Path) -> Tokenizer:
    """The tokenizer of a GGUF at `path` that is written for this and holds nothing else."""
    plain = [(key, value) for key, value in pairs if not isinstance(value, Typed)]
    assert len(plain) == len(pairs)
    return load(read(write_gguf(path, plain, [])))

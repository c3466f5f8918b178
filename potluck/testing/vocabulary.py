"""Two small but real vocabularies, as GGUF metadata: byte-level BPE, and LLaMA's kind.

Any text can be encoded with either, a few common words take one token, and both have special tokens
and a chat template, so that the whole program runs end to end on a tiny model. Padded with unused
tokens to the size that is asked for.
"""

from __future__ import annotations

from potluck.testing.writer import Metadata

# What llama.cpp calls the kinds of tokens.
NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6

CHAT_ML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INSTRUCTIONS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == "
    "'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)

# In order of rank; each joins two tokens that are there already. In byte-level BPE a space is Ġ.
_MERGES = (
    "Ġ t|h e|Ġ a|i n|r e|o n|e r|Ġt he|Ġ s|a t|o u|Ġ w|n d|i s|o r|Ġ o|e n|Ġ f|Ġ b|e d|i t|a n|"
    "in g|Ġ p|o f|Ġ of|Ġa nd|Ġt o|a l|Ġ in|Ġ is|l e|e s|a r|l l|Ġ c|o t|c k|u ck|p ot|l uck|"
    "pot luck|Ġp ot|Ġpot luck"
)

# As sentencepiece writes them: a space is U+2581, and a piece is reached by joining two pieces.
_PIECES = (
    "▁t|he|▁a|in|re|on|er|▁the|▁s|at|ou|▁w|nd|is|or|▁o|en|▁f|▁b|ed|it|an|ing|▁p|of|▁of|▁and|▁to|"
    "al|▁in|▁is|le|es|ar|ll|▁c|ot|ck|uck|pot|luck|potluck|▁pot|▁potluck"
)

LEAST_TOKENS = 420  # that both vocabularies fit into


def vocabulary(kind: str, n_tokens: int) -> list[tuple[str, Metadata]]:
    """Metadata of a vocabulary, "bpe" or "spm", of n_tokens tokens. Raises ValueError."""
    if kind not in ("bpe", "spm"):
        raise ValueError(f"vocabulary {kind!r}, expected 'bpe' or 'spm'")
    if n_tokens < LEAST_TOKENS:
        raise ValueError(f"{n_tokens} tokens, the vocabularies need {LEAST_TOKENS}")
    return _bpe(n_tokens) if kind == "bpe" else _spm(n_tokens)


def byte_letters() -> list[str]:
    """The letter that byte-level BPE (GPT-2) writes for each byte, by byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [letters[b] for b in range(256)]


def _bpe(n_tokens: int) -> list[tuple[str, Metadata]]:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = _MERGES.split("|")
    tokens = special + byte_letters() + [merge.replace(" ", "") for merge in merges]
    kinds = [CONTROL] * len(special) + [NORMAL] * (len(tokens) - len(special))
    return [
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
        *_tokens(tokens, kinds, n_tokens),
        ("tokenizer.ggml.merges", merges),
        ("tokenizer.ggml.bos_token_id", 1),
        ("tokenizer.ggml.eos_token_id", 2),
        ("tokenizer.ggml.unknown_token_id", 0),
        ("tokenizer.ggml.add_bos_token", False),
        ("tokenizer.ggml.add_space_prefix", False),
        ("tokenizer.chat_template", CHAT_ML),
    ]


def _spm(n_tokens: int) -> list[tuple[str, Metadata]]:
    special = ["<unk>", "<s>", "</s>"]
    single = ["▁", *map(chr, range(0x21, 0x7F)), "é", "ü", "ß", "ж", "中"]
    tokens = special + [f"<0x{b:02X}>" for b in range(256)] + _PIECES.split("|") + single
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256
    kinds += [NORMAL] * (len(tokens) - len(kinds))
    # As in LLaMA's: specials and bytes score 0, pieces by their rank, single letters last.
    scores = [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]
    scores += [0.0] * (n_tokens - len(tokens))
    return [
        ("tokenizer.ggml.model", "llama"),
        *_tokens(tokens, kinds, n_tokens),
        ("tokenizer.ggml.scores", scores),
        ("tokenizer.ggml.bos_token_id", 1),
        ("tokenizer.ggml.eos_token_id", 2),
        ("tokenizer.ggml.unknown_token_id", 0),
        ("tokenizer.ggml.add_bos_token", True),
        ("tokenizer.ggml.add_eos_token", False),
        ("tokenizer.chat_template", INSTRUCTIONS),
    ]


def _tokens(tokens: list[str], kinds: list[int], n_tokens: int) -> list[tuple[str, Metadata]]:
    n_unused = n_tokens - len(tokens)
    return [
        ("tokenizer.ggml.tokens", tokens + [f"[unused{i}]" for i in range(n_unused)]),
        ("tokenizer.ggml.token_type", kinds + [UNUSED] * n_unused),
    ]

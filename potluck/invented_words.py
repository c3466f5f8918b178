"""A vocabulary of any size that is learnt from nothing: bytes, letters, and words of syllables.

Of LLaMA's kind ("llama" in a GGUF), as metadata. Any text can be encoded and comes back; syllables
and the words that they make take one token each, so that what a model with random weights says
looks like words. Pure: the same size gives the same tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from potluck.tensor_source import Metadata
from potluck.vocabulary import Kind

_SPACE = "\u2581"
_SPECIAL = ("<unk>", "<s>", "</s>")
_LETTERS = (_SPACE, *map(chr, range(0x21, 0x7F)))
_SYLLABLES = tuple(c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou")
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)

LEAST_TOKENS = len(_SPECIAL) + 256 + len(_LETTERS)
# Words of two and three syllables are taken in steps of about the golden section of their number,
# to which these are coprime: each comes once, and the first ones begin with all letters.
_TWO_STEP, _THREE_STEP = 5009, 450_523


def vocabulary(n_tokens: int) -> list[tuple[str, Metadata]]:
    """Metadata of n_tokens tokens, with a simple chat template. Raises ValueError: too few."""
    if n_tokens < LEAST_TOKENS:
        raise ValueError(f"{n_tokens} tokens, bytes and letters alone are {LEAST_TOKENS}")
    words = list(itertools.islice(_words(), n_tokens - LEAST_TOKENS))
    if len(words) + LEAST_TOKENS < n_tokens:
        raise ValueError(f"{n_tokens} tokens, there are {len(words) + LEAST_TOKENS}")
    kinds = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL] + [Kind.BYTE] * 256
    n_special = len(kinds)
    # As in LLaMA's own: specials and bytes score 0, words by their rank, single letters last.
    scores = [0.0] * n_special + [-float(i) for i in range(n_tokens - n_special)]
    return [
        ("tokenizer.ggml.model", "llama"),
        (
            "tokenizer.ggml.tokens",
            [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words, *_LETTERS],
        ),
        ("tokenizer.ggml.scores", scores),
        (
            "tokenizer.ggml.token_type",
            [*map(int, kinds), *[int(Kind.NORMAL)] * (n_tokens - n_special)],
        ),
        ("tokenizer.ggml.bos_token_id", 1),
        ("tokenizer.ggml.eos_token_id", 2),
        ("tokenizer.ggml.unknown_token_id", 0),
        ("tokenizer.ggml.add_bos_token", True),
        ("tokenizer.ggml.add_eos_token", False),
        ("tokenizer.chat_template", _TEMPLATE),
    ]


def _words() -> Iterator[str]:
    """Each once; each is made of two that come before it, or of letters."""
    n = len(_SYLLABLES)
    yield from _SYLLABLES
    yield from (_SPACE + syllable for syllable in _SYLLABLES)
    twos = [divmod(i * _TWO_STEP % n**2, n) for i in range(n**2)]
    for a, b in twos:
        yield _SYLLABLES[a] + _SYLLABLES[b]
    for a, b in twos:
        yield _SPACE + _SYLLABLES[a] + _SYLLABLES[b]
    for i in range(n**3):
        two, c = divmod(i * _THREE_STEP % n**3, n)
        a, b = divmod(two, n)
        yield _SPACE + _SYLLABLES[a] + _SYLLABLES[b] + _SYLLABLES[c]

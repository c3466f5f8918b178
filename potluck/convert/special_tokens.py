"""Which tokens start and end a text, by the JSON files beside a vocabulary, and its chat template.

tokenizer_config.json is asked first, then special_tokens_map.json, then the vocabulary's own file,
then generation_config.json and config.json: early LLaMA folders of Hugging Face's layout name
wrong ids in the last two. Whatever ends a text by any of them becomes an end token of the GGUF.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from potluck.convert.json_file import JsonObject, read_json
from potluck.convert.token_table import AddedToken, TokenTable, looks_special
from potluck.convert.whole_file import read_text
from potluck.tensor_source import Metadata
from potluck.vocabulary import END_TEXTS, Kind

_TEMPLATE_BYTES_LIMIT = 2**20
_ADDED_IDS_LIMIT = 7  # digits of an id that is a key
# Our name -> the key of the JSON files.
_TOKENS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_TEMPLATE_KEY = "tokenizer.chat_template"


@dataclass(frozen=True, slots=True)
class Beside:
    """The JSON files beside a vocabulary; None for one that is not there."""

    folder: Path
    tokenizer_config: JsonObject | None
    special_tokens_map: JsonObject | None
    added_tokens: JsonObject | None
    generation_config: JsonObject | None
    config: JsonObject | None
    special_texts: frozenset[str] = field(default=frozenset())  # that they call special


def read_beside(folder: Path) -> Beside:
    """The JSON files in `folder`. Raises ModelError: one is damaged."""
    names = (
        "added_tokens",
        "config",
        "generation_config",
        "special_tokens_map",
        "tokenizer_config",
    )
    found = {
        name: read_json(path) if (path := folder / f"{name}.json").exists() else None
        for name in names
    }
    maps = [found["tokenizer_config"], found["special_tokens_map"]]
    texts = {text for json in maps if json is not None for text in _special_texts(json)}
    return Beside(folder, **found, special_texts=frozenset(texts))


def added_tokens(beside: Beside) -> list[tuple[str, list[AddedToken]]]:
    """What each file adds to the vocabulary: (its name, tokens)."""
    added = []
    if (json := beside.added_tokens) is not None:
        tokens = [
            AddedToken(_integer(json, text), text, is_special=_is_special(text, beside))
            for text in json.values
        ]
        added.append((json.file, tokens))
    config = beside.tokenizer_config
    decoder = config.inner("added_tokens_decoder") if config is not None else None
    if decoder is not None:
        added.append((decoder.file, [_decoded(decoder, key, beside) for key in decoder.values]))
    return added


def special_pairs(table: TokenTable, beside: Beside) -> list[tuple[str, Metadata]]:
    """The pairs of ids and of what is added to a text. Raises ModelError: a token is missing."""
    ids = {name: _token_id(name, key, table, beside) for name, key in _TOKENS.items()}
    first, last = (ids["bos"], ids["eos"])
    others = [i for i in _ends(table, beside) if i not in (first, last)]
    if last is None and others:
        last, *others = others
    found = {**ids, "eos": last, **_keyed_ends(table, others)}
    config = beside.tokenizer_config
    adds_start = config.flag("add_bos_token") if config is not None else None
    adds_end = config.flag("add_eos_token") if config is not None else None
    adds_start = table.adds_start if adds_start is None else adds_start
    if adds_start and first is None:
        raise table.error("texts begin with a start token, and no file names one (bos_token)")
    adds_end = table.adds_end if adds_end is None else adds_end
    return [
        *((f"tokenizer.ggml.{name}_token_id", i) for name, i in found.items() if i is not None),
        ("tokenizer.ggml.add_bos_token", adds_start),
        ("tokenizer.ggml.add_eos_token", adds_end and last is not None),
        ("tokenizer.ggml.add_space_prefix", _adds_space(table, config)),
    ]


def template_pairs(beside: Beside) -> list[tuple[str, Metadata]]:
    """The model's chat template, and by their names the others it may have. [] if it has none."""
    path = beside.folder / "chat_template.jinja"
    if path.exists():
        return [(_TEMPLATE_KEY, read_text(path, limit_bytes=_TEMPLATE_BYTES_LIMIT))]
    config = beside.tokenizer_config
    if config is None or config.values.get("chat_template") is None:
        return []
    if isinstance(config.values["chat_template"], str):
        return [(_TEMPLATE_KEY, config.text("chat_template") or "")]
    templates: dict[str, str] = {}
    for entry in config.objects("chat_template"):
        name, template = entry.text("name"), entry.text("template")
        if name is None or template is None or name in templates:
            raise config.error("chat_template is an array of something else than named templates")
        templates[name] = template
    default = templates.pop("default", None)
    pairs: list[tuple[str, Metadata]] = []
    if templates:
        pairs.append(("tokenizer.chat_templates", list(templates)))
    pairs += [(f"{_TEMPLATE_KEY}.{name}", template) for name, template in templates.items()]
    return pairs if default is None else [(_TEMPLATE_KEY, default), *pairs]


def _special_texts(json: JsonObject) -> Iterator[str]:
    yield from (text for key in _TOKENS.values() if (text := _content(json, key)))
    extra = json.values.get("additional_special_tokens")
    for i, entry in enumerate(extra if isinstance(extra, list) else ()):
        text = _content(JsonObject(json.file, {"": entry}, f"additional_special_tokens[{i}]"), "")
        if text:
            yield text


def _content(json: JsonObject, key: str) -> str | None:
    """A token's text, which stands there as it is or in an object. Empty: none (early LLaMA)."""
    if isinstance(json.values.get(key), dict):
        inner = json.inner(key)
        return (inner.text("content") if inner is not None else None) or None
    return json.text(key) or None


def _is_special(text: str, beside: Beside) -> bool:
    return text in beside.special_texts or looks_special(text)


def _decoded(decoder: JsonObject, key: str, beside: Beside) -> AddedToken:
    entry = decoder.inner(key)
    text = entry.text("content") if entry is not None else None
    if entry is None or not text:
        raise decoder.error(f"added_tokens_decoder: token {key[:40]!r} has no content")
    if not (key.isascii() and key.isdigit() and len(key) <= _ADDED_IDS_LIMIT):
        raise decoder.error(f"added_tokens_decoder: {key[:40]!r} is no token id")
    is_special = bool(entry.flag("special")) or _is_special(text, beside)
    return AddedToken(int(key), text, is_special=is_special)


def _integer(json: JsonObject, key: str) -> int:
    value = json.integer(key)
    if value is None:
        json.refuse(key, "a token id")
    return value


def _token_id(name: str, key: str, table: TokenTable, beside: Beside) -> int | None:
    """The id of the token called `name`, None if the folder has none."""
    for json in (beside.tokenizer_config, beside.special_tokens_map):
        text = _content(json, key) if json is not None else None
        if json is None or text is None:
            continue
        if text in table.tokens:
            return table.tokens.index(text)
        if name in ("bos", "eos"):
            raise json.error(f"{key} is {text[:80]!r}, which the vocabulary does not have")
    if name in table.ids:
        return table.ids[name]
    for json in (beside.generation_config, beside.config):
        found = _id_list(json, key + "_id", len(table.tokens))
        if found and table.kinds[found[0]] in (Kind.CONTROL, Kind.USER_DEFINED):
            return found[0]
    return None


def _ends(table: TokenTable, beside: Beside) -> list[int]:
    """All ids that end an answer by the configurations of the model, which may name several."""
    found = [
        i
        for json in (beside.generation_config, beside.config)
        for i in _id_list(json, "eos_token_id", len(table.tokens))
        if table.kinds[i] in (Kind.CONTROL, Kind.USER_DEFINED)
    ]
    return list(dict.fromkeys(found))


def _id_list(json: JsonObject | None, key: str, n_tokens: int) -> list[int]:
    """Ids under `key`, one or an array of them; what is no token's (-1 for none) is left out."""
    if json is None:
        return []
    value = json.values.get(key)
    values: Sequence[object] = value if isinstance(value, list) else [value]
    ids = [i for i in values if isinstance(i, int) and not isinstance(i, bool)]
    if len(ids) != len(values) and value is not None:
        json.refuse(key, "a token id, or an array of them")
    return [i for i in ids if 0 <= i < n_tokens]


def _keyed_ends(table: TokenTable, others: Sequence[int]) -> dict[str, int]:
    """A key of its own for each end token but the first. What everyone knows needs none."""
    unknown = [i for i in others if table.tokens[i] not in END_TEXTS]
    known = [i for i in others if table.tokens[i] in END_TEXTS]
    if len(unknown) > 2:
        names = ", ".join(repr(table.tokens[i])[:40] for i in unknown)
        raise table.error(f"more tokens end an answer than a GGUF can name ({names})")
    return dict(zip(("eot", "eom"), [*unknown, *known], strict=False))


def _adds_space(table: TokenTable, config: JsonObject | None) -> bool:
    """add_prefix_space speaks of SentencePiece's vocabularies; byte-level ones add no space."""
    said = config.flag("add_prefix_space") if config is not None else None
    return table.adds_space if said is None or table.model == "gpt2" else said

"""Synthetic models: true shapes, the header that their file would have, and their vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest

from potluck import catalogue, gguf, invented_words, synthetic, tokenizer
from potluck.errors import UnknownModel, UsageError
from potluck.gguf_header import TensorHeading, laid_out
from potluck.gguf_source import gguf_source
from potluck.model import config_of, embedding_bytes, head_bytes, kv_bytes_per_token, layer_bytes
from potluck.plan import Span

# DESIGN section 6, without norms: MB a layer in Q4_0, GB with a Q6_K head, KiB of KV a token.
PUBLISHED = {
    "7b": (113.8, 3.8, 512),
    "13b": (178.4, 7.4, 800),
    "30b": (301.0, 18.4, 1560),
    "65b": (455.3, 36.8, 2560),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_of_the_published_models(name: str) -> None:
    file = catalogue.open_model(f"synthetic:{name}-q4_0")
    config = config_of(file)
    layer_mb, all_gb, kv_kib = PUBLISHED[name]
    matrices = layer_bytes(file, config, 0) - 2 * 4 * config.dim
    assert matrices / 1e6 == pytest.approx(layer_mb, abs=0.06)
    weights = sum(layer_bytes(file, config, i) for i in range(config.n_layers))
    weights += embedding_bytes(file, config) + head_bytes(file, config)
    assert weights / 1e9 == pytest.approx(all_gb, abs=0.05)
    assert kv_bytes_per_token(config, Span(0, config.n_layers)) == kv_kib * 1024
    assert 0 < file.size_bytes - weights < 2e6, "beside weights a file has a vocabulary"
    assert file.tensors["output.weight"].type_name == "q6_k"


# Values of the models as their makers count them.
@pytest.mark.parametrize(
    ("name", "millions"),
    [("1b", 1100), ("7b", 6738), ("8b", 8030), ("13b", 13016), ("65b", 65286), ("70b", 68977)],
)
def test_shapes_have_the_parameters_of_their_models(name: str, millions: int) -> None:
    file = catalogue.open_model(f"synthetic:{name}-f16")
    n = sum(t.rows * t.cols for t in file.tensors.values())
    assert round(n / 1e6) == pytest.approx(millions, abs=1)


def test_every_name_opens_and_no_two_are_the_same_model() -> None:
    hashes: dict[str, str] = {}
    for name in synthetic.names():
        if not name.startswith("synthetic:tiny-"):
            continue
        file = catalogue.open_model(name)
        config_of(file)
        assert str(file.path) == file.text("general.name") == name
        assert file.header_sha256 not in hashes.values(), name
        hashes[name] = file.header_sha256
    assert len(hashes) == 15
    assert catalogue.open_model("synthetic:Tiny-Q4_0").path == Path("synthetic:tiny-q4_0")


def test_the_header_is_that_of_a_file(tmp_path: Path) -> None:
    made = catalogue.open_model("synthetic:tiny-q4_k_m")
    headings = [TensorHeading(t.name, t.type_name, t.shape) for t in made.tensors.values()]
    metadata = gguf_source(made).metadata
    header = laid_out(metadata, headings).header
    path = tmp_path / "tiny.gguf"
    path.write_bytes(header)
    with path.open("r+b") as file:
        file.truncate(made.size_bytes)
    read = gguf.read(path)
    assert read.tensors == made.tensors
    assert dict(read.kinds) == dict(made.kinds)
    assert list(read.metadata) == list(made.metadata)
    for key, value in read.metadata.items():
        other = made.metadata[key]
        assert value == other, key
        assert type(value) is type(other), key
    assert (read.size_bytes, read.version) == (made.size_bytes, made.version)
    assert read.data_offset_bytes == made.data_offset_bytes
    # Equal headers, but a file may hold any weights.
    assert read.header_sha256 != made.header_sha256
    assert read.synthetic is None


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("synthetic:65q-q4_0", "did you mean synthetic:65b-q4_0?"),
        ("synthetic:7b", "did you mean synthetic:7b-q4_0?"),
        ("synthetic:7b-q4_9", "did you mean synthetic:7b-q4"),
        ("synthetic:", "tiny, 1b, 7b, 8b, 13b, 30b, 65b, 70b and f32, f16"),
        ("synthetic:" + "x" * 5000, "synthetic:SHAPE-TYPE of tiny"),
        ("synthetic:\x1b[31m-q4_0", "synthetic:SHAPE-TYPE of tiny"),
    ],
)
def test_unknown_names_are_refused_with_those_there_are(name: str, says: str) -> None:
    with pytest.raises(UnknownModel, match="no synthetic model is called") as refused:
        catalogue.open_model(name)
    assert says in refused.value.remedy
    assert len(refused.value.message) < 150
    assert refused.value.message.isprintable()


@pytest.mark.parametrize("call", [catalogue.pull, catalogue.remove, catalogue.resolve])
def test_there_is_nothing_to_pull_and_no_file(
    call: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path))
    assert callable(call)
    with pytest.raises(UsageError, match="has no file"):
        call("synthetic:tiny-q4_0")
    assert list(tmp_path.iterdir()) == []


def test_packs_of_a_synthetic_model_can_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path))
    sha = catalogue.open_model("synthetic:tiny-q4_0").header_sha256
    for name in (sha, "0" * 64):
        (catalogue.packs_folder() / name).mkdir(parents=True)
        (catalogue.packs_folder() / name / "head.P8k4.pack").write_bytes(bytes(100))
    assert catalogue.remove("synthetic:tiny-q4_0") == 100
    assert [p.name for p in catalogue.packs_folder().iterdir()] == ["0" * 64]


TEXTS = ["", "hello", "  two  spaces ", "naïve 日本 \U0001f600", "a\n\tb\x00c", "<s> </s> <unk>"]


@pytest.mark.parametrize("name", ["tiny", "7b", "8b"])
def test_any_text_can_be_encoded_and_comes_back(name: str) -> None:
    file = catalogue.open_model(f"synthetic:{name}-q4_0")
    words = tokenizer.load(file)
    assert words.n_tokens == config_of(file).vocab
    assert words.chat_template is not None
    for text in TEXTS:
        ids = words.encode(text, add_start=True)
        assert words.decode(ids) == text
        assert ids[0] == words.start_id
        assert not set(ids[1:]) & {0, 1, 2}


def test_words_of_syllables_take_one_token_each() -> None:
    words = tokenizer.load(catalogue.open_model("synthetic:7b-q4_0"))
    for token_id in range(259 + 180, 32_000 - len(TEXTS) - 95, 997):
        text = words.piece(token_id).decode()
        assert len(words.encode(text.removeprefix(" "), add_start=False)) <= 2, text
    starts = {words.piece(i)[:2] for i in range(20_000, 20_400)}
    assert len(starts) > 15, "words that follow each other begin with all letters"


@pytest.mark.parametrize("n_tokens", [invented_words.LEAST_TOKENS, 1000, 50_257])
def test_a_vocabulary_has_the_asked_size_and_each_token_once(n_tokens: int) -> None:
    pairs = dict(invented_words.vocabulary(n_tokens))
    tokens = pairs["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    assert len(tokens) == len(set(tokens)) == n_tokens
    assert pairs == dict(invented_words.vocabulary(n_tokens))


@pytest.mark.parametrize("n_tokens", [0, invented_words.LEAST_TOKENS - 1, 10**6])
def test_vocabularies_that_can_not_be_are_refused(n_tokens: int) -> None:
    with pytest.raises(ValueError, match=str(n_tokens)):
        invented_words.vocabulary(n_tokens)

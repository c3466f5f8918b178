"""bench/write_model.py: files of every type whose weights are ordinary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest

from potluck import gguf as ours

TYPES = "f16 q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k q4_k q5_k q6_k q4_k_m q5_k_m"

Load = Callable[[str], ModuleType]


@pytest.fixture
def writer(script: Load) -> ModuleType:
    return script("write_model")


def write(writer: ModuleType, path: Path, type_name: str, layers: int = 2, seed: int = 1) -> Path:
    shape = writer.Shape(dim=256, n_layers=layers, n_heads=4, n_kv_heads=2, ffn_dim=512, vocab=300)
    writer.write(path, shape, writer.RECIPES[type_name], seed)
    return path


def types_of(path: Path) -> dict[str, str]:
    return {t.name: t.type_name for t in ours.read(path).tensors.values() if t.rows > 1}


@pytest.mark.parametrize("type_name", TYPES.split())
def test_weights_are_finite_centred_and_varied(
    type_name: str, writer: ModuleType, tmp_path: Path
) -> None:
    path = write(writer, tmp_path / "m.gguf", type_name)
    assert len(ours.read(path).tensors) == 3 + 2 * 9
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name.endswith("norm.weight"):
            continue
        values = gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
        wanted = 1.0 if "token_embd" in tensor.name else 1.3 / values.shape[1] ** 0.5
        assert np.isfinite(values).all(), tensor.name
        assert 0.9 * wanted < values.std() < 1.2 * wanted, tensor.name
        # As a mean of so many independent weights would be; five deviations.
        assert abs(values.mean()) < 5 * values.std() / (values.size / 32) ** 0.5, tensor.name
        assert len(np.unique(values)) > values.size / 100, tensor.name
        assert len(np.unique(tensor.data, axis=0)) == len(tensor.data), tensor.name


def test_a_file_is_of_one_type_but_for_its_head(writer: ModuleType, tmp_path: Path) -> None:
    for type_name, head in (("q4_0", "q6_k"), ("q2_k", "q6_k"), ("f16", "f16"), ("q8_0", "q8_0")):
        types = types_of(write(writer, tmp_path / "m.gguf", type_name))
        assert types.pop("output.weight") == head
        assert set(types.values()) == {type_name}


def test_a_mixed_file_spends_more_on_half_of_two_matrices(
    writer: ModuleType, tmp_path: Path
) -> None:
    types = types_of(write(writer, tmp_path / "m.gguf", "q4_k_m", layers=16))
    better = {name for name, kind in types.items() if kind == "q6_k"}
    layers = (0, 1, 4, 7, 10, 13, 14, 15)  # an eighth at each end, and each third between
    expected = {f"blk.{i}.{name}.weight" for i in layers for name in ("attn_v", "ffn_down")}
    assert better == expected | {"output.weight"}


def test_the_same_seed_gives_the_same_bytes(writer: ModuleType, tmp_path: Path) -> None:
    one, two, three = (
        write(writer, tmp_path / "m.gguf", "q4_k", seed=seed).read_bytes() for seed in (1, 1, 2)
    )
    assert one == two
    assert one != three


def test_fewer_layers_are_the_same_layers(writer: ModuleType, tmp_path: Path) -> None:
    files = [write(writer, tmp_path / f"{n}.gguf", "q4_0", layers=n) for n in (1, 2)]
    one, two = ({t.name: t.data.tobytes() for t in gguf.GGUFReader(f).tensors} for f in files)
    assert {name: two[name] for name in one} == one


def test_slabs_make_no_difference_to_the_shape(
    writer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SLAB_VALUES", 1000)  # three rows of 256
    path = write(writer, tmp_path / "m.gguf", "q5_k")
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "output.weight")
    assert len(np.unique(tensor.data, axis=0)) == 300


def test_a_type_that_does_not_fit_the_rows_is_refused(writer: ModuleType, tmp_path: Path) -> None:
    shape = writer.Shape(dim=288, n_layers=1, n_heads=4, n_kv_heads=4, ffn_dim=512, vocab=300)
    with pytest.raises(SystemExit, match="288 values are no whole blocks of Q4_K"):
        writer.write(tmp_path / "m.gguf", shape, writer.RECIPES["q4_k"], 1)
    assert list(tmp_path.iterdir()) == []

"""Which model a worker loads when the coordinator names one."""

from __future__ import annotations

from pathlib import Path

import pytest

from potluck import catalogue
from potluck.errors import ModelError
from potluck.plan import Span
from potluck.testing import TinyShape, write_tiny
from worker.shard import Order, find


def order(name: str, path: str, sha256: str) -> Order:
    return Order(
        name,
        path,
        sha256,
        Span(0, 1),
        embeds=True,
        has_head=False,
        context_tokens=64,
        kv_bytes=0,
        max_sessions=1,
    )


def test_a_synthetic_model_needs_no_file() -> None:
    name = "synthetic:tiny-q4_0"
    sha = catalogue.open_model(name).header_sha256
    file, config = find(order(name, name, sha))
    assert file.synthetic is not None
    assert config.n_layers == 4


@pytest.mark.parametrize("name", ["synthetic:tiny-q4_0", "synthetic:9000b-q4_0"])
def test_a_synthetic_model_of_another_version_is_refused(name: str) -> None:
    with pytest.raises(ModelError) as refused:
        find(order(name, name, "0" * 64))
    assert name in refused.value.message
    assert refused.value.remedy == "run the same version of potluck on both machines"


def test_a_file_is_found_by_its_name_where_the_path_is_another_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path))
    folder = catalogue.models_folder() / "mine"
    folder.mkdir(parents=True)
    path = write_tiny(folder / "mine.gguf", TinyShape(n_layers=2))
    sha = catalogue.open_model(str(path)).header_sha256
    assert find(order("mine", "/elsewhere/mine.gguf", sha))[0].path == path
    with pytest.raises(ModelError, match="is not the coordinator's model") as refused:
        find(order("mine", "/elsewhere/mine.gguf", "0" * 64))
    assert refused.value.remedy == "bring the same file to both machines"
    with pytest.raises(ModelError, match="is not on this worker's machine"):
        find(order("yours", "/elsewhere/yours.gguf", sha))

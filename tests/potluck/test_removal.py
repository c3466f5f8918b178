"""What `potluck rm` takes along."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from potluck import catalogue, cli, gguf
from potluck.packs import PackFolder
from potluck.tensor_store import TensorStore
from potluck.testing import write_tiny


def test_a_removed_model_takes_its_packs_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path))
    models = catalogue.models_folder() / "mine"
    models.mkdir(parents=True)
    path = write_tiny(models / "mine.gguf")
    size = path.stat().st_size
    kept = PackFolder(catalogue.packs_folder())
    for sha, n_bytes in ((gguf.read(path).header_sha256, 1000), ("0" * 64, 7)):
        (kept.root / sha).mkdir(parents=True)
        (kept.root / sha / "layer-0.P8k4.pack").write_bytes(bytes(n_bytes))
    assert catalogue.remove("mine") == size + 1000
    assert [p.name for p in kept.root.iterdir()] == ["0" * 64]


def test_delivered_tensors_are_removed_but_not_those_that_somebody_fetches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path))
    store = TensorStore(catalogue.tensors_folder())
    assert cli.main(["rm", "--tensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"freed_bytes": 0, "left_bytes": 0}
    header = bytes(5000)
    store.put_header(hashlib.sha256(header).hexdigest(), header)
    with store.writer(bytes(32), 3000) as writer:
        writer.write(bytes(2000))
        assert cli.main(["list"]) == 0
        assert "Tensors delivered to workers here take 7.0 kB" in capsys.readouterr().err
        assert cli.main(["rm", "--tensors"]) == 0
        assert "5.0 kB are free again; 2.0 kB are in use and stay" in capsys.readouterr().err
    assert cli.main(["rm", "--tensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"freed_bytes": 2000, "left_bytes": 0}
    for wrong in (["rm"], ["rm", "smollm2", "--tensors"]):
        assert cli.main(wrong) == 2
        assert "name one model, or --tensors" in capsys.readouterr().err

"""What `potluck rm` takes along."""

from __future__ import annotations

from pathlib import Path

import pytest

from potluck import catalogue, gguf
from potluck.packs import PackFolder
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

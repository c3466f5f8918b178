"""Opens URLs the way the person's network wants it: certificates, proxy, credentials.

The standard library's client with settings, and its many exceptions as one kind of error. No
credential is ever shown. Blocking; one thread a connection.
"""

from __future__ import annotations

import base64
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potluck import __version__
from potluck.errors import Unreachable

PATIENCE_SECONDS = 30.0  # without a byte from the server


class Connection:
    """Opens URLs with the person's certificates, proxy and credentials."""

    def __init__(
        self,
        *,
        certificates: str = "",
        client_certificate: str = "",
        proxy: str = "",
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """`certificates`: a bundle or a folder; empty: the system's (SSL_CERT_FILE counts).

        `proxy`: a URL; empty: what the environment says. Raises Unreachable if a certificate can't
        be read.
        """
        self._patience_seconds = patience_seconds
        self._authorization: dict[
            str, str
        ] = {}  # host:port -> header, from URLs with user:password@
        try:
            context = _tls(certificates, client_certificate)
        except OSError as error:
            raise Unreachable(
                f"can't read the certificates {certificates or client_certificate}: {error}",
                remedy="check PIP_CERT and `pip config list`",
            ) from error
        proxies = {"http": proxy, "https": proxy} if proxy else None
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler(proxies), urllib.request.HTTPSHandler(context=context)
        )

    def open(self, url: str, headers: Mapping[str, str]) -> Any:
        """The response to a GET, a context manager with read(), status and headers.

        Raises HTTPError for a status from 400, OSError or HTTPException if nobody answers.
        """
        parts = urllib.parse.urlsplit(url)
        user, at, host = parts.netloc.rpartition("@")
        if at:
            pair = urllib.parse.unquote(user).encode()
            self._authorization[host] = "Basic " + base64.b64encode(pair).decode()
        request = urllib.request.Request(
            parts._replace(netloc=host).geturl(),
            headers={
                "User-Agent": f"potluck/{__version__}",
                "Accept-Encoding": "identity",
                **headers,
            },
        )
        if host in self._authorization:  # a redirect to another host must not carry it along
            request.add_unredirected_header("Authorization", self._authorization[host])
        try:
            return self._opener.open(request, timeout=self._patience_seconds)
        except urllib.error.HTTPError as error:
            error.close()  # it is a response too, and holds the socket
            raise


def without_credentials(url: str) -> str:
    """`url` as it may be printed."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def describe(error: Exception, url: str) -> Unreachable:
    """What to tell a person about a failed request."""
    where = without_credentials(url)
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(error, urllib.error.HTTPError):
        return Unreachable(f"{where}: the server says {error.code} {error.reason}")
    if isinstance(reason, ssl.SSLError):
        remedy = (
            "behind a proxy with its own certificate? set SSL_CERT_FILE or PIP_CERT to its bundle"
        )
        return Unreachable(f"{where}: {reason}", remedy=remedy)
    if isinstance(reason, TimeoutError):
        return Unreachable(
            f"{where}: no byte came in time", remedy="try again: it goes on from here"
        )
    return Unreachable(
        f"{where}: {reason or type(reason).__name__}", remedy="is the network up? try again"
    )


def _tls(certificates: str, client_certificate: str) -> ssl.SSLContext:
    if not certificates:
        context = ssl.create_default_context()
    elif Path(certificates).is_dir():
        context = ssl.create_default_context(capath=certificates)
    else:
        context = ssl.create_default_context(cafile=certificates)
    if client_certificate:
        context.load_cert_chain(client_certificate)
    return context

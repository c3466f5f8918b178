"""The command line of potluck-worker."""

from __future__ import annotations

import pytest

from potluck.errors import UsageError
from worker.config import Settings, settings_of

HERE = ("--coordinator", "127.0.0.1:7685")


def test_all_options_are_read() -> None:
    given = settings_of(
        [
            *HERE,
            *(
                "--token",
                "t",
                "--name",
                "pi-1",
                "--host",
                "::1",
                "--port",
                "0",
                "--threads",
                "3",
                "--pin",
            ),
            *(
                "--isa",
                "scalar",
                "--memory",
                "1.5 GiB",
                "--weights",
                "mmap",
                "--pack-space",
                "2gb",
                "--stop-with-stdin",
                "--log-level",
                "debug",
            ),
        ]
    )
    assert given == Settings(
        coordinator="127.0.0.1:7685",
        token="t",
        name="pi-1",
        host="::1",
        port=0,
        threads=3,
        pinned=True,
        isa="scalar",
        memory_bytes=1610612736,
        weights="mmap",
        pack_space_bytes=2_000_000_000,
        stop_with_stdin=True,
        log_level="debug",
    )


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("500000000", 500_000_000), ("2 GiB", 2**31), ("2gb", 2_000_000_000), ("64MiB", 2**26)],
)
def test_memory_is_bytes_or_a_size(text: str, n_bytes: int) -> None:
    assert settings_of([*HERE, "--memory", text]).memory_bytes == n_bytes


@pytest.mark.parametrize("text", ["much", "12 gigs", "-1", "0", "GiB", "1e9"])
def test_what_is_no_size_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        settings_of([*HERE, f"--memory={text}"])
    assert left.value.code == 2
    assert "such as '2 GiB'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--coordinator", "nowhere"), "HOST:PORT such as 127.0.0.1:7685, not 'nowhere'"),
        (("--coordinator", "127.0.0.1:0"), "HOST:PORT"),
        (("--coordinator", "127.0.0.1:99999"), "HOST:PORT"),
        (("--coordinator", "10.0.0.1:7685"), "--coordinator 10.0.0.1: this release works on loop"),
        ((*HERE, "--host", "0.0.0.0"), "--host 0.0.0.0: this release works on loopback only"),
        ((*HERE, "--host", "example.org"), "--host example.org"),
        ((*HERE, "--name", "My Pi"), "--name: 1 to 32 of a-z, 0-9 and -, not 'My Pi'"),
        ((*HERE, "--port", "70000"), "--port: 0 to 65535, not 70000"),
        ((*HERE, "--threads", "-2"), "--threads: 0 to 1024, not -2"),
        ((*HERE, "--pack-space", "2 GiB"), "--pack-space goes with --weights mmap"),
    ],
)
def test_a_value_out_of_range_is_named(options: tuple[str, ...], text: str) -> None:
    with pytest.raises(UsageError) as error:
        settings_of(options)
    assert text in error.value.message

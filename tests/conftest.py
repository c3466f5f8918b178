"""What several folders of tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

from potluck import catalogue
from potluck.errors import PotluckError


def pytest_configure(config: pytest.Config) -> None:
    """Registers our marker of tests that take minutes on a loaded machine.

    A shell starts what it puts in the background with SIGINT ignored, and children inherit that:
    programs under test could not be interrupted.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "slow: compares thousands of positions of a real model")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With POTLUCK_NO_SKIPS (scripts/test --all) a test that leaves itself out has failed."""
    report = yield
    if os.environ.get("POTLUCK_NO_SKIPS") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} left itself out, which is no pass: {report.longrepr}"
    return report


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fetches the model before the first test: 93 MB have no place in a test's time limit."""
    if any("smollm2" in getattr(item, "fixturenames", ()) for item in session.items):
        try:
            catalogue.pull("smollm2")
        except PotluckError:
            return  # the tests that need it say why, the others run


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, from the cache."""
    return catalogue.pull("smollm2")

"""What several folders of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from potluck import catalogue
from potluck.errors import PotluckError


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

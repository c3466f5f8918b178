"""Admission of sessions by KV pages and places."""

from __future__ import annotations

import pytest

from potluck.errors import Full, UsageError
from worker.kv import KvBudget, KvLedger, pages_for


def test_pages_hold_sixteen_positions() -> None:
    assert [pages_for(n) for n in (0, 1, 16, 17, 4096)] == [0, 1, 1, 2, 256]


def test_a_budget_counts_whole_pages() -> None:
    assert KvBudget.of_bytes(250_000, 7_680, 4) == KvBudget(2, 122_880, 4)
    with pytest.raises(UsageError, match="at least 122880"):
        KvBudget.of_bytes(122_879, 7_680, 4)
    with pytest.raises(UsageError, match="max_sessions"):
        KvBudget.of_bytes(250_000, 7_680, 0)


def test_a_session_reserves_its_pages_until_it_is_closed() -> None:
    ledger = KvLedger(KvBudget(4, 100, 8))
    ledger.reserve(1, 33)
    assert (ledger.used_bytes, ledger.n_sessions) == (300, 1)
    with pytest.raises(Full, match="17 positions need 2 KV pages, 1 of 4 are left"):
        ledger.reserve(2, 17)
    ledger.reserve(2, 16)
    ledger.release(1)
    ledger.release(1)
    assert (ledger.used_bytes, ledger.n_sessions) == (100, 1)


def test_places_are_limited_too() -> None:
    ledger = KvLedger(KvBudget(9, 100, 1))
    ledger.reserve(1, 1)
    with pytest.raises(Full, match="all 1 places"):
        ledger.reserve(2, 1)

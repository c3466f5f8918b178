"""How much KV a session takes, and whether one more fits: the figures of admission.

Pure: it counts and holds nothing. The engine owns the pages (cpp/engine/kv.h) and shares those of
forked sessions; here each session counts in full. So what is admitted here always fits there, also
when a fork rewrites pages that it shared.
"""

from __future__ import annotations

from dataclasses import dataclass

from potluck.errors import Full, UsageError
from potluck.model import KV_PAGE_TOKENS


def pages_for(tokens: int) -> int:
    """Pages of 16 positions that `tokens` positions take: 1 for 1, 2 for 17."""
    return -(-tokens // KV_PAGE_TOKENS)


@dataclass(frozen=True, slots=True)
class KvBudget:
    """What all sessions of a shard share. Raises UsageError: no page fits."""

    n_pages: int
    page_bytes: int  # KV of the span's layers for 16 positions of one session
    max_sessions: int

    def __post_init__(self) -> None:
        if self.n_pages < 1:
            raise UsageError(f"kv_bytes: at least {self.page_bytes}, a page of 16 positions")
        if self.max_sessions < 1:
            raise UsageError(f"max_sessions: at least 1, not {self.max_sessions}")

    @staticmethod
    def of_bytes(kv_bytes: int, bytes_per_token: int, max_sessions: int) -> KvBudget:
        """Whole pages of `kv_bytes`. SmolLM2, 10 layers, 7,680 bytes a token: 122,880 each."""
        page_bytes = KV_PAGE_TOKENS * bytes_per_token
        return KvBudget(kv_bytes // page_bytes, page_bytes, max_sessions)


class KvLedger:
    """Which session has reserved how many pages. Owned by Sessions."""

    def __init__(self, budget: KvBudget) -> None:
        self.budget = budget
        self._pages: dict[int, int] = {}  # by session
        self._used = 0

    @property
    def n_sessions(self) -> int:
        """Sessions with a reservation."""
        return len(self._pages)

    @property
    def used_bytes(self) -> int:
        """Of all reservations."""
        return self._used * self.budget.page_bytes

    def reserve(self, session: int, max_tokens: int) -> None:
        """Room for `max_tokens` positions. Raises Full, and then nothing has changed."""
        assert session not in self._pages, "the caller knows its sessions"
        pages, free = pages_for(max_tokens), self.budget.n_pages - self._used
        if len(self._pages) >= self.budget.max_sessions:
            raise Full(f"all {self.budget.max_sessions} places for sessions are taken")
        if pages > free:
            of = f"{free} of {self.budget.n_pages} are left"
            raise Full(f"{max_tokens} positions need {pages} KV pages, {of}")
        self._pages[session] = pages
        self._used += pages

    def release(self, session: int) -> None:
        """Gives a reservation back; none is no error."""
        self._used -= self._pages.pop(session, 0)

"""Log-probabilities of the prompt's own tokens: asked for, cut into steps, told."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.answer import AnswerText
from coordinator.request import checked
from coordinator.scheduler import Batch, Limits, Scheduler
from coordinator.session import Session, SessionId
from coordinator.stream import AnswerStream
from potluck import errors
from potluck.replies import AnswerOptions
from potluck.sampling import Pick, Sampling

LIMITS = Limits(
    n_stages=2,
    max_sessions=4,
    queue=2,
    chunk_tokens=8,
    step_tokens=16,
    step_picks=16,
    kv_tokens=1024,
)
PROMPT = [100 + i for i in range(20)]


def asked(**fields: Any) -> AnswerOptions:
    return AnswerOptions(max_tokens=2, temperature=0.0, **fields)


def scheduler(scored_from: int, **limits: int) -> Scheduler:
    fields = {name: getattr(LIMITS, name) for name in LIMITS.__slots__}
    made = Scheduler(Limits(**{**fields, **limits}))
    made.add(Session(SessionId(1), PROMPT, 4, Sampling(), frozenset(), scored_from))
    return made


def cuts(made: Scheduler) -> list[tuple[int, int, int, tuple[int, ...]]]:
    """(start, rows, wanted, scored) of each step until the prompt is sent."""
    found = []
    while (batch := made.next_batch()) is not None:
        assert isinstance(batch, Batch)
        rows = batch.rows[0]
        found.append((rows.start, len(rows.tokens), rows.want_logits, rows.scored_ids))
    return found


async def test_each_token_but_the_first_has_one(start_service: Any, fake: Any) -> None:
    service = await start_service(settings={"prefill_chunk": 8})
    answer = await service.ask(PROMPT, asked(prompt_logprobs=2))
    assert [token.id for token in answer.prompt] == PROMPT[1:]
    assert [token.logprob for token in answer.prompt] == [-i / 8 for i in range(1, 20)]
    assert {len(token.top) for token in answer.prompt} == {2}
    assert answer.ids == fake.answer_to(PROMPT, 2)
    assert answer.tokens[0].logprob is None


async def test_they_begin_where_they_are_wanted(start_service: Any) -> None:
    service = await start_service()
    answer = await service.ask(PROMPT, asked(prompt_logprobs=0, prompt_logprobs_start=15))
    assert [token.id for token in answer.prompt] == PROMPT[15:]
    assert (await service.ask(PROMPT, asked())).prompt == []
    at_the_end = asked(prompt_logprobs=0, prompt_logprobs_start=20)
    assert (await service.ask(PROMPT, at_the_end)).prompt == []


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs: 0 to 20, not 21"),
        ({"prompt_logprobs": 0, "prompt_logprobs_start": 21}, "prompt_logprobs_start: 0 to 20"),
        ({"prompt_logprobs_start": 5}, "only with prompt_logprobs"),
    ],
)
async def test_a_value_out_of_range_is_refused(
    start_service: Any, fields: dict[str, int], text: str
) -> None:
    service = await start_service()
    with pytest.raises(errors.UsageError, match=text):
        await service.ask(PROMPT, asked(**fields))


async def test_a_worker_of_an_older_release_is_named_and_its_numbers_not_used(
    start_service: Any, fake: Any
) -> None:
    service = await start_service(is_old=True)
    with pytest.raises(errors.PotluckError, match="log-probability of position 1"):
        await service.ask(PROMPT, asked(prompt_logprobs=0))
    assert (await service.ask([5], asked())).ids == fake.answer_to([5], 2)


def test_the_first_token_of_a_prompt_cannot_be_scored() -> None:
    request = checked(
        [5],
        1,
        Sampling(prompt_logprobs=0),
        ends_at=frozenset(),
        continues=True,
        context_tokens=16,
        vocab=100,
    )
    assert request.scored_from == 1


def test_rows_before_the_first_scored_token_want_no_logits() -> None:
    assert cuts(scheduler(scored_from=10)) == [
        (0, 8, 0, ()),
        (8, 8, 7, tuple(PROMPT[10:17])),
        (16, 4, 4, tuple(PROMPT[17:])),
    ]


def test_a_chunk_is_cut_where_its_logits_fill_the_last_stage() -> None:
    found = cuts(scheduler(scored_from=6, step_picks=3))
    assert found == [
        (0, 8, 3, tuple(PROMPT[6:9])),
        (8, 3, 3, tuple(PROMPT[9:12])),
        (11, 3, 3, tuple(PROMPT[12:15])),
        (14, 3, 3, tuple(PROMPT[15:18])),
        (17, 3, 3, tuple(PROMPT[18:])),
    ]


def test_without_scores_a_prompt_is_cut_as_ever() -> None:
    assert cuts(scheduler(scored_from=20, step_picks=1)) == [
        (0, 8, 0, ()),
        (8, 8, 0, ()),
        (16, 4, 1, ()),
    ]


async def test_a_slow_reader_gets_the_scores_in_bounded_messages_and_before_an_error() -> None:
    session = Session(SessionId(1), PROMPT, 1, Sampling(), frozenset())
    stream = AnswerStream(session, AnswerText(_Nothing()), 0.0)
    stream.score([Pick(7, -0.5)] * 1500, 0.0)
    assert [len((await stream.next()).scores) for _ in range(2)] == [1024, 476]
    stream.score([Pick(8, -0.5)], 0.0)
    stream.fail(errors.StageLost("gone"))
    assert len((await stream.next()).scores) == 1
    with pytest.raises(errors.StageLost, match="gone"):
        await stream.next()


class _Nothing:
    def push(self, token_id: int, /) -> str:
        return ""

    def finish(self) -> str:
        return ""

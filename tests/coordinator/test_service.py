"""The coordinator from door to door: people on one side, fake workers on the other."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from potluck import errors
from potluck.replies import AnswerOptions, FinishReason, Message

GREEDY = AnswerOptions(max_tokens=8, temperature=0)
LONG = AnswerOptions(max_tokens=60, temperature=0)


async def test_an_answer_comes_from_the_last_stage(start_service: Any, fake: Any) -> None:
    service = await start_service(workers=3)
    answer = await service.ask([5, 6, 7], GREEDY)
    assert answer.ids == fake.answer_to([5, 6, 7], 8)
    assert (answer.done.prompt_tokens, answer.done.answer_tokens) == (3, 8)
    assert answer.done.finish_reason is FinishReason.LENGTH


async def test_joined_text_is_the_decoded_answer(start_service: Any) -> None:
    service = await start_service()
    answer = await service.ask("of the potluck", GREEDY)
    decode = service.engine.model.tokenizer.decode
    assert answer.text == decode(answer.ids, continues=True) != ""


async def test_a_conversation_goes_through_the_models_template(
    start_service: Any, fake: Any
) -> None:
    service = await start_service()
    pieces = [event async for event in service.client.chat([Message("user", "hello")], GREEDY)]
    assert pieces[-1].answer_tokens == 8
    first = service.workers[0].steps[0].rows[0]
    text = service.engine.model.tokenizer
    assert [text.name(id) for id in first.token_ids][:1] == ["<|im_start|>"]


async def test_a_seed_that_was_not_given_is_named(start_service: Any) -> None:
    service = await start_service()
    drawn = [await service.ask([5], AnswerOptions(max_tokens=1)) for _ in range(2)]
    assert len({answer.done.seed for answer in drawn}) == 2
    given = await service.ask([5], AnswerOptions(max_tokens=1, seed=42))
    assert given.done.seed == 42
    seeds = [rows.sampling.seed for step in service.workers[0].steps for rows in step.rows]
    assert seeds[-1] == 42


async def test_the_default_temperature_is_that_of_the_protocol(start_service: Any) -> None:
    service = await start_service()
    await service.ask([5], AnswerOptions(max_tokens=1))
    sampling = service.workers[0].steps[0].rows[0].sampling
    assert (sampling.temperature, sampling.prompt_tokens) == (0.8, 1)


async def test_without_max_tokens_an_answer_goes_on_to_the_context(start_service: Any) -> None:
    service = await start_service()
    answer = await service.ask([5] * 60, AnswerOptions(temperature=0))
    assert answer.done.answer_tokens == 4
    assert answer.done.finish_reason is FinishReason.LENGTH


async def test_the_end_token_ends_an_answer_and_is_not_part_of_it(
    start_service: Any, fake: Any
) -> None:
    service = await start_service(
        next_token=lambda tokens: fake.end if len(tokens) == 6 else fake.letters(tokens)
    )
    answer = await service.ask([5, 6, 7], GREEDY)
    assert len(answer.ids) == answer.done.answer_tokens == 3
    assert answer.done.finish_reason is FinishReason.STOP
    ignoring = AnswerOptions(max_tokens=8, temperature=0, ignore_end=True)
    answer = await service.ask([5, 6, 7], ignoring)
    assert answer.done.answer_tokens == 8
    assert answer.ids[3] == fake.end


async def test_a_stop_text_ends_an_answer_and_is_never_sent(start_service: Any) -> None:
    service = await start_service()
    whole = (await service.ask([5, 6], GREEDY)).text
    stop = whole[3:6]
    answer = await service.ask([5, 6], AnswerOptions(max_tokens=8, temperature=0, stop=(stop,)))
    assert answer.text == whole[: whole.index(stop)]
    assert answer.done.finish_reason is FinishReason.STOP


async def test_log_probabilities_come_if_they_are_asked_for(start_service: Any) -> None:
    service = await start_service()
    answer = await service.ask([5], AnswerOptions(max_tokens=2, temperature=0, logprobs=1))
    assert [token.logprob for token in answer.tokens] == [-0.5, -0.5]
    assert answer.tokens[0].top[0].token == answer.tokens[0].id
    assert (await service.ask([5], GREEDY)).tokens[0].logprob is None


async def test_a_prompt_goes_in_chunks_of_which_the_last_row_wants_a_pick(
    start_service: Any,
) -> None:
    service = await start_service(settings={"prefill_chunk": 8})
    await service.ask([5] * 20, AnswerOptions(max_tokens=1, temperature=0))
    rows = [rows for step in service.workers[1].steps for rows in step.rows]
    assert [(r.start_position, len(r.token_ids), r.want_logits) for r in rows] == [
        (0, 8, 0),
        (8, 8, 0),
        (16, 4, 1),
    ]


@pytest.mark.parametrize(("workers", "rows"), [(1, [63]), (2, [32, 31])])
async def test_chunks_are_smaller_where_the_next_stage_waits_for_them(
    start_service: Any, workers: int, rows: list[int]
) -> None:
    service = await start_service(workers=workers)
    await service.ask([5] * 63, AnswerOptions(max_tokens=1, temperature=0))
    found = [len(rows.token_ids) for step in service.workers[0].steps for rows in step.rows]
    assert found == rows


async def test_several_chunks_are_in_flight_at_once(start_service: Any, fake: Any) -> None:
    service = await start_service(settings={"prefill_chunk": 4})
    first, last = service.workers
    last.may_pass.clear()
    asking = asyncio.create_task(service.ask([5] * 40, GREEDY))
    await fake.until(lambda: len(first.steps) == 3, "one step more than stages")
    await asyncio.sleep(0.05)
    assert len(first.steps) == 3
    last.may_pass.set()
    assert (await asking).ids == fake.answer_to([5] * 40, 8)


async def test_two_sessions_interleave(start_service: Any, fake: Any) -> None:
    service = await start_service()
    prompts = ([5, 6], [7, 8, 9])
    answers = await asyncio.gather(*(service.ask(prompt, LONG) for prompt in prompts))
    assert [answer.ids for answer in answers] == [fake.answer_to(list(p), 60) for p in prompts]
    order = [rows.session for step in service.workers[0].steps for rows in step.rows]
    turns = sum(a != b for a, b in pairwise(order))
    assert turns > 60  # not one after the other


async def test_a_client_that_goes_frees_its_session_everywhere(
    start_service: Any, fake: Any
) -> None:
    service = await start_service(workers=3)
    answer = service.client.generate([5], LONG)
    async for _ in answer:
        if service.open_sessions == 3:
            break
    await answer.aclose()
    await fake.until(lambda: service.open_sessions == 0, "freed")
    assert service.engine.load_counts() == (0, 0)
    assert (await service.ask([5], GREEDY)).ids == fake.answer_to([5], 8)


async def test_a_cancelled_session_is_freed_with_the_next_step(
    start_service: Any, fake: Any
) -> None:
    service = await start_service()
    first, last = service.workers
    last.may_pass.clear()
    asking = asyncio.create_task(service.ask([5], LONG))
    await fake.until(lambda: len(last.steps) == 1, "a step is inside")
    asking.cancel()
    await fake.until(lambda: first.kv == {}, "its Close rode in the next step")
    assert len(first.steps) == 2
    last.may_pass.set()
    await fake.until(lambda: last.kv == {}, "freed in the last stage, too")


async def test_a_client_that_goes_leaves_the_queue(start_service: Any, fake: Any) -> None:
    service = await start_service(settings={"max_sessions": 1})
    service.workers[0].may_pass.clear()
    tasks = [asyncio.create_task(service.ask([5], GREEDY)) for _ in range(2)]
    await fake.until(lambda: service.engine.load_counts() == (1, 1), "one runs, one waits")
    tasks[1].cancel()
    await fake.until(lambda: service.engine.load_counts() == (1, 0), "nobody waits")
    service.workers[0].may_pass.set()
    assert (await tasks[0]).done.answer_tokens == 8


async def test_one_sessions_failure_harms_no_other(start_service: Any, fake: Any) -> None:
    service = await start_service(workers=3)
    service.workers[1].fail_session = 2
    good = asyncio.create_task(service.ask([5, 6], LONG))
    await fake.until(lambda: service.engine.load_counts()[0] == 1, "the first is there")
    with pytest.raises(errors.PotluckError, match=r"w2: NaN in layer 1"):
        await service.ask([7, 8], LONG)
    assert (await good).ids == fake.answer_to([5, 6], 60)
    await fake.until(lambda: service.open_sessions == 0, "both are freed")


async def test_a_session_that_finds_no_room_on_a_worker_ends_alone(
    start_service: Any, fake: Any
) -> None:
    service = await start_service(workers=1, full_for=2, settings={"prefill_chunk": 4})
    service.workers[0].may_pass.clear()
    first = asyncio.create_task(service.ask([5] * 40, GREEDY))
    await fake.until(lambda: service.engine.load_counts() == (1, 0), "the first is there")
    second = asyncio.create_task(service.ask([6], GREEDY))
    await fake.until(lambda: service.engine.load_counts() == (2, 0), "so is the second")
    service.workers[0].may_pass.set()
    with pytest.raises(errors.Full, match="w1: no pages are left"):
        await second
    assert (await first).ids == fake.answer_to([5] * 40, 8)


async def test_a_worker_that_invents_a_token_ends_the_session_only(
    start_service: Any, fake: Any
) -> None:
    service = await start_service(next_token=lambda tokens: 99_999 if tokens[0] == 9 else 100)
    with pytest.raises(errors.PotluckError, match="vocabulary"):
        await service.ask([9], GREEDY)
    assert (await service.ask([5], GREEDY)).ids == [100] * 8


async def test_a_full_queue_refuses_at_once(start_service: Any, fake: Any) -> None:
    service = await start_service(settings={"max_sessions": 1, "queue": 1})
    service.workers[0].may_pass.clear()
    tasks = [asyncio.create_task(service.ask([5], GREEDY)) for _ in range(2)]
    await fake.until(lambda: service.engine.load_counts() == (1, 1), "one runs, one waits")
    with pytest.raises(errors.Full, match=r"queue is full \(1\)"):
        await service.ask([5], GREEDY)
    service.workers[0].may_pass.set()
    assert [answer.done.answer_tokens for answer in await asyncio.gather(*tasks)] == [8, 8]


async def test_people_see_their_place_in_the_queue_and_how_far_a_prompt_is(
    start_service: Any, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.stream._PREFILL_SECONDS", 0.0)
    service = await start_service(settings={"max_sessions": 1, "prefill_chunk": 4})
    service.workers[0].may_pass.clear()
    first = asyncio.create_task(service.ask([5] * 12, GREEDY))
    await fake.until(lambda: service.engine.load_counts() == (1, 0), "one runs")
    second = asyncio.create_task(service.ask([5] * 12, GREEDY))
    await fake.until(lambda: service.engine.load_counts() == (1, 1), "one waits")
    service.workers[0].may_pass.set()
    await first
    prefills = (await second).prefills
    assert (prefills[0].queue, prefills[0].total_tokens) == (1, 12)
    assert prefills[-1].queue == 0
    done = [prefill.done_tokens for prefill in prefills]
    assert done == sorted(done)
    assert max(done) > 0


async def test_no_stream_is_silent_for_long(
    start_service: Any, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.stream.PATIENCE_SECONDS", 0.02)
    service = await start_service()
    service.workers[1].may_pass.clear()
    answer = service.client.generate([5], GREEDY)
    signs = [await anext(answer) for _ in range(3)]
    assert {sign.total_tokens for sign in signs} == {1}
    service.workers[1].may_pass.set()
    await answer.aclose()


async def test_activations_never_pass_through_the_coordinator(start_service: Any) -> None:
    service = await start_service(workers=3)
    await service.ask([5] * 20, GREEDY)
    figures = (await service.client.status()).figures
    assert figures.coordinator_activation_bytes == 0
    assert 0 < figures.coordinator_sent_bytes < 100 * 28
    assert 0 < figures.coordinator_received_bytes < 250 * 28
    first, middle, last = service.workers
    assert not any(step.HasField("activation") for step in first.steps)
    assert sum(len(step.activation.values) for step in middle.steps + last.steps) > 0


async def test_status_names_plan_workers_links_and_figures(start_service: Any, fake: Any) -> None:
    service = await start_service(workers=2)
    await service.ask([5], GREEDY)
    report = await service.client.status()
    assert (report.state, report.detail, report.epoch) == ("serving", "", 1)
    assert [(s.worker, s.span, s.shard_bytes) for s in report.plan] == [
        ("w1", (0, 3), 1234),
        ("w2", (3, 6), 1234),
    ]
    assert [s.compute_seconds for s in report.plan] == [0.001, 0.001]
    assert [(w.id, w.load_done_bytes, w.load_total_bytes) for w in report.workers] == [
        ("w1", 100, 100),
        ("w2", 100, 100),
    ]
    assert (report.links[0].start, report.links[0].end) == ("coordinator", "w1")
    assert report.links[0].rtt_seconds > 0
    assert (report.figures.answer_tokens, report.figures.prompt_tokens) == (8, 1)
    assert report.figures.tokens_per_second > 0
    assert report.figures.steps >= 8


async def test_the_served_model_is_listed(start_service: Any) -> None:
    service = await start_service(workers=1)
    (model,) = await service.client.models()
    assert (model.n_layers, model.context_tokens, model.has_chat_template) == (6, 64, True)
    assert model.name == service.engine.model.name


async def test_text_becomes_tokens_and_text_again(start_service: Any) -> None:
    service = await start_service(workers=1, wait=False)
    long = "of the potluck, " * 300
    for text in ("of the potluck", long):
        ids = await service.client.tokenize(text)
        assert await service.client.detokenize(ids) == text
    assert not set(await service.client.tokenize("<|im_end|>")) & {0, 1, 2}


async def test_a_stopping_coordinator_refuses_and_then_ends_what_runs(
    start_service: Any, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.engine.DRAIN_SECONDS", 0.2)
    service = await start_service()
    service.workers[1].may_pass.clear()
    running = asyncio.create_task(service.ask([5], GREEDY))
    await fake.until(lambda: service.engine.load_counts() == (1, 0), "one runs")
    stopping = asyncio.create_task(service.engine.stop())
    await asyncio.sleep(0.05)
    with pytest.raises(errors.Unreachable, match="stopping"):
        await service.ask([5], GREEDY)
    with pytest.raises(errors.Unreachable, match="stopping"):
        await running
    await stopping


async def test_a_stopping_coordinator_lets_short_answers_finish(
    start_service: Any, fake: Any
) -> None:
    service = await start_service()
    service.workers[0].may_pass.clear()
    running = asyncio.create_task(service.ask([5], GREEDY))
    await fake.until(lambda: service.engine.load_counts() == (1, 0), "one runs")
    stopping = asyncio.create_task(service.engine.stop())
    service.workers[0].may_pass.set()
    await stopping
    assert (await running).done.answer_tokens == 8

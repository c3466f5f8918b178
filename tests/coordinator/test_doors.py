"""Which method answers on which port, and how errors leave."""

from __future__ import annotations

import logging
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from coordinator.grpc_server import CALLERS, Door
from potluck import errors
from potluck.replies import AnswerOptions
from potluck.rpc import PROTOCOL
from potluck.rpc.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, types_pb2, weights_pb2

Code = grpc.StatusCode
HELLO = types_pb2.Hello(protocol=PROTOCOL)


async def code_of(call: Any) -> tuple[grpc.StatusCode, str]:
    """Status and details of a call that fails."""

    async def end() -> None:
        if hasattr(call, "read"):
            while await call.read() is not grpc.aio.EOF:
                pass
        else:
            await call

    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await end()
    return failed.value.code(), failed.value.details() or ""


def raw(channel: Any, method: str) -> Any:
    """A method that takes and gives bytes, whatever it really is."""
    return channel.unary_stream(method)


WEIGHTS = "/potluck.rpc.v1.Weights/"


def test_every_method_of_ours_has_its_door() -> None:
    ours = {
        f"/{service.full_name}/{method.name}"
        for file in (inference_pb2.DESCRIPTOR, cluster_pb2.DESCRIPTOR, weights_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
        for method in service.methods
    }
    assert {method for method in CALLERS if "/potluck." in method} == ours
    fleets = {
        method for method in CALLERS if method.startswith(("/potluck.rpc.v1.Fleet/", WEIGHTS))
    }
    assert {method for method, door in CALLERS.items() if door is Door.FLEET} == fleets


@pytest.mark.parametrize("method", CALLERS)
async def test_a_method_is_refused_at_the_other_door(start_service: Any, method: str) -> None:
    service = await start_service(workers=1, wait=False)
    wrong = {
        Door.PUBLIC: service.addresses.fleet,
        Door.FLEET: service.addresses.public,
    }[CALLERS[method]]
    async with grpc.aio.insecure_channel(wrong) as channel:
        code, details = await code_of(raw(channel, method)(b""))
    assert (code, details) == (Code.PERMISSION_DENIED, f"{method} is not served on this port")


async def test_a_method_that_nobody_lists_is_refused(start_service: Any) -> None:
    service = await start_service(workers=1, wait=False)
    async with grpc.aio.insecure_channel(service.addresses.public) as channel:
        code, _ = await code_of(raw(channel, "/potluck.rpc.v1.Inference/Train")(b""))
    assert code is Code.UNIMPLEMENTED


async def test_reflection_names_the_services_for_people(start_service: Any) -> None:
    service = await start_service(workers=1, wait=False)
    async with grpc.aio.insecure_channel(service.addresses.public) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        reply = await call.read()
        await call.done_writing()
        while await call.read() is not grpc.aio.EOF:
            pass
    names = {service.name for service in reply.list_services_response.service}
    assert "potluck.rpc.v1.Inference" in names
    assert "potluck.rpc.v1.Fleet" not in names


async def test_health_is_true_only_while_a_token_could_be_made(
    start_service: Any, fake: Any
) -> None:
    service = await start_service(workers=1, wait=False)
    name = service.engine.model.name
    serving, not_serving = (
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
    )
    async with grpc.aio.insecure_channel(service.addresses.public) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def status(of: str) -> int:
            reply = await stub.Check(health_pb2.HealthCheckRequest(service=of), timeout=5)
            return int(reply.status)

        watching = stub.Watch(health_pb2.HealthCheckRequest(service=name))
        assert (await watching.read()).status == not_serving
        assert (await status(""), await status("live")) == (not_serving, serving)
        await service.add("w1")
        assert (await watching.read()).status == serving
        assert await status("") == serving
        await service.workers.pop().die()
        assert (await watching.read()).status == not_serving
        assert await status("live") == serving
        watching.cancel()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 2.5}, "temperature: .*0.* to 2"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": -0.1}, "top_p"),
        ({"min_p": 2.0}, "min_p"),
        ({"top_k": 100_000}, "top_k"),
        ({"repetition_penalty": 1e30}, "repetition_penalty"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"frequency_penalty": -3.0}, "frequency_penalty"),
        ({"logprobs": 21}, "logprobs"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("x",) * 9}, "stop"),
    ],
)
async def test_values_out_of_range_are_named(
    start_service: Any, changes: dict[str, Any], words: str
) -> None:
    service = await start_service(workers=1)
    with pytest.raises(errors.UsageError, match=words):
        await service.ask([5], AnswerOptions(max_tokens=1, **changes))
    assert service.workers[0].steps == []  # refused before anything was queued


async def test_bad_prompts_are_refused(start_service: Any) -> None:
    service = await start_service(workers=1)
    one = AnswerOptions(max_tokens=1)
    with pytest.raises(errors.UsageError, match="empty"):
        await service.ask("", one)
    with pytest.raises(errors.UsageError, match=r"missing|empty"):
        await service.ask([], one)
    with pytest.raises(errors.UsageError, match="token 99999"):
        await service.ask([99_999], one)
    with pytest.raises(errors.UnknownModel, match="'other'"):
        await service.ask([5], AnswerOptions(model="other"))
    with pytest.raises(errors.ContextExceeded, match=r"60 tokens and max_tokens is 5; .* 64"):
        await service.ask([5] * 60, AnswerOptions(max_tokens=5))
    with pytest.raises(errors.ContextExceeded, match=r"70 tokens; the context is 64"):
        await service.ask([5] * 70, one)
    with pytest.raises(errors.UsageError, match="messages"):
        async for _ in service.client.chat([], one):
            pass


async def test_a_request_without_a_prompt_is_refused(start_service: Any) -> None:
    service = await start_service(workers=1)
    async with grpc.aio.insecure_channel(service.addresses.public) as channel:
        code, details = await code_of(raw(channel, "/potluck.rpc.v1.Inference/Generate")(b""))
    assert code is Code.INVALID_ARGUMENT
    assert "prompt is missing" in details


@pytest.mark.parametrize(
    "data",
    [
        inference_pb2.GenerateRequest(text="abcd").SerializeToString()[:-1],
        inference_pb2.GenerateRequest(text="ab").SerializeToString()[:-1] + b"\xff",
        b"\xff\xff\xff\xff",
    ],
)
async def test_bytes_that_are_no_request_are_refused_and_harm_nothing(
    start_service: Any, data: bytes
) -> None:
    service = await start_service(workers=1)
    async with grpc.aio.insecure_channel(service.addresses.public) as channel:
        code, details = await code_of(raw(channel, "/potluck.rpc.v1.Inference/Generate")(data))
    assert code is Code.INVALID_ARGUMENT
    assert "can't be read" in details
    assert (await service.ask([5], AnswerOptions(max_tokens=2))).done.answer_tokens == 2


async def test_a_defect_is_logged_under_an_id_and_told_without_detail(
    start_service: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = await start_service(workers=1, wait=False)

    def broken(_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("coordinator.report.status_of", broken)
    with pytest.raises(errors.PotluckError, match="internal error") as told:
        await service.client.status()
    assert "secret" not in told.value.message
    # by name: gRPC may log under asyncio that an earlier test's loop is closed
    (record,) = [r for r in caplog.records if r.name == "coordinator.grpc_server"]
    assert record.levelno == logging.ERROR
    assert record.getMessage().split()[1] in told.value.message


async def test_a_port_in_use_is_named_with_its_option(start_service: Any) -> None:
    service = await start_service(workers=1, wait=False)
    port = int(service.addresses.public.rpartition(":")[2])
    with pytest.raises(errors.PotluckError, match=f"port {port} on 127.0.0.1 is in use") as told:
        await start_service(workers=1, wait=False, settings={"fleet_port": port})
    assert "--fleet-port" in told.value.remedy


async def test_a_worker_joins_by_the_public_port(start_service: Any) -> None:
    service = await start_service(workers=1, wait=False)
    async with grpc.aio.insecure_channel(service.addresses.public) as channel:
        stub = cluster_pb2_grpc.ClusterStub(channel)
        reply = await stub.Join(cluster_pb2.JoinRequest(hello=HELLO), timeout=5)
        assert reply.fleet_address == service.addresses.fleet
        assert (reply.hello.protocol, reply.model) == (PROTOCOL, service.engine.model.name)
        for protocol in (0, PROTOCOL + 2):
            strange = types_pb2.Hello(protocol=protocol, potluck_version="9.9")
            code, details = await code_of(stub.Join(cluster_pb2.JoinRequest(hello=strange)))
            assert code is Code.INVALID_ARGUMENT
            assert f"protocol {protocol} (potluck 9.9)" in details


async def test_the_fleet_tells_a_retry_from_an_impostor(start_service: Any) -> None:
    service = await start_service(workers=2, wait=False)
    async with grpc.aio.insecure_channel(service.addresses.fleet) as channel:
        fleet = cluster_pb2_grpc.FleetStub(channel)

        def asked(instance: int, port: int, address: str = "127.0.0.1") -> Any:
            request = cluster_pb2.RegisterRequest(
                hello=HELLO, worker="pi", address=f"{address}:{port}", instance=instance
            )
            return fleet.Register(request, timeout=5)

        assert (await asked(1, 1000)).worker == "pi"
        assert (await asked(1, 1000)).heartbeat_seconds == 0.5
        assert (await code_of(asked(2, 2000)))[0] is Code.ALREADY_EXISTS
        assert (await code_of(asked(3, 1000, "")))[0] is Code.INVALID_ARGUMENT
        beat = cluster_pb2.HeartbeatRequest(worker="pi", instance=1)
        beat.state = cluster_pb2.WORKER_STATE_LOST  # only the coordinator says so
        assert (await fleet.Heartbeat(beat, timeout=5)).epoch == 1
        assert len(service.engine.membership.fleet.usable()) == 1
        beat.instance = 2
        assert (await code_of(fleet.Heartbeat(beat)))[0] is Code.NOT_FOUND
        await fleet.Leave(cluster_pb2.LeaveRequest(worker="pi", instance=1), timeout=5)
        beat.instance = 1
        assert (await code_of(fleet.Heartbeat(beat)))[0] is Code.NOT_FOUND


async def test_results_of_another_epoch_are_acknowledged_and_dropped(start_service: Any) -> None:
    service = await start_service(workers=1)
    async with grpc.aio.insecure_channel(service.addresses.fleet) as channel:
        results: Any = cluster_pb2_grpc.FleetStub(channel).Results()
        await results.write(cluster_pb2.StepResult(epoch=99, step=1))
        ack = await results.read()
        assert (ack.epoch, ack.step) == (99, 1)
        await results.write(cluster_pb2.StepResult(epoch=1, step=7))
        assert (await code_of(results))[0] is Code.FAILED_PRECONDITION  # no such step was sent
    assert (await service.ask([5], AnswerOptions(max_tokens=2))).done.answer_tokens == 2

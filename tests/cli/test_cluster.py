"""`potluck serve` with small programs in place of the real ones: what it does when they die."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potluck.cli import programs
from potluck.cli.programs import Child, ChildDied
from potluck.errors import PotluckError, UsageError
from potluck.testing import write_tiny

pytestmark = pytest.mark.cluster

PATIENCE_SECONDS = 20.0

# Both programs in one file; FAKE says what goes wrong. A worker notes its life in a file of its
# own, which is how the coordinator knows who is there.
PROGRAM = """#!{python}
import json, os, signal, sys, threading
from pathlib import Path

is_worker = "worker" in Path(sys.argv[0]).name
trouble = os.environ.get("FAKE", "")
here = Path(sys.argv[0]).parent
stop = threading.Event()
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: trouble == "deaf" or stop.set())
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()


def fail(what, remedy, code):
    print(f"{{Path(sys.argv[0]).name}}: error: {{what}}\\n  {{remedy}}", file=sys.stderr)
    sys.exit(code)


if trouble == "port" and not is_worker:
    fail("port 7685 on 127.0.0.1 is in use", "choose another with --grpc-port", 1)
if trouble == "usage" and not is_worker:
    fail("--host 0.0.0.0: loopback only", "use --host 127.0.0.1", 2)
if trouble == "plan" and not is_worker:  # after its doors have opened and closed again
    print(json.dumps({{"grpc": "127.0.0.1:1", "fleet": "x", "pid": os.getpid()}}), flush=True)
    stop.wait(0.5)
    fail("needs 9.1 GiB, two workers offer 2.0", "add a worker", 1)
if is_worker:
    name = sys.argv[sys.argv.index("--name") + 1]
    if trouble == "memory":
        fail("needs 9.1 GiB, 2.0 GiB are free", "lower --context", 1)
    if trouble == "once" and (here / "died").exists():
        fail("still broken", "mend it", 1)
    (here / f"{{name}}.alive").write_text(str(os.getpid()))
    print(json.dumps({{"worker": name, "address": "127.0.0.1:1", "pid": os.getpid()}}), flush=True)
    while not stop.wait(0.05):
        pass
    sys.exit(0)

import grpc
from concurrent.futures import ThreadPoolExecutor
from potluck.rpc.options import server_options
from potluck.rpc.v1 import inference_pb2, inference_pb2_grpc


def lives(pid):
    try:
        return Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Service(inference_pb2_grpc.InferenceServicer):
    def Status(self, request, context):
        wanted = int(sys.argv[sys.argv.index("--workers") + 1])
        files = here.glob("*.alive")
        living = sorted(f.stem for f in files if lives(int(f.read_text() or 0)))
        return inference_pb2.StatusReply(
            model="tiny",
            state="serving" if len(living) >= wanted else "waiting",
            expected_workers=wanted,
            kv_type="f16",
            kv_bytes_per_token=23_040,
            plan=[inference_pb2.StageStatus(worker=w) for w in living],
            workers=[inference_pb2.WorkerStatus(id=w) for w in living],
        )


server = grpc.server(ThreadPoolExecutor(4), options=server_options())
inference_pb2_grpc.add_InferenceServicer_to_server(Service(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
(here / "coordinator.alive.pid").write_text(str(os.getpid()))
print(json.dumps({{"grpc": f"127.0.0.1:{{port}}", "fleet": "x", "pid": os.getpid()}}), flush=True)
while not stop.wait(0.05):
    pass
server.stop(None).wait()
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the two programs; `serve` then takes them for the real ones."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("potluck-coordinator", "potluck-worker"):
        program = folder / name
        program.write_text(PROGRAM.format(python=sys.executable))
        program.chmod(0o755)
    write_tiny(tmp_path / "m.gguf")
    monkeypatch.setattr(programs, "path_of", lambda name: str(folder / name))
    return folder


Serve = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def serve(fakes: Path, tmp_path: Path) -> Serve:
    """Starts `potluck serve` of a model on two local workers, with the programs of `fakes`."""
    code = (
        "import sys, potluck.cli\n"
        "from potluck.cli import programs\n"
        f"programs.path_of = lambda name: {str(fakes)!r} + '/' + name\n"
        "sys.exit(potluck.cli.main())"
    )

    def start(*options: str, fake: str = "", n: int = 2) -> subprocess.Popen[str]:
        model = str(tmp_path / "m.gguf")
        return subprocess.Popen(
            [sys.executable, "-c", code, "serve", model, "--local-workers", str(n), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "FAKE": fake},
        )

    return start


def ready(server: subprocess.Popen[str]) -> dict[str, Any]:
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line, server.communicate()[1]
    announced: dict[str, Any] = json.loads(line)
    return announced


def until(claim: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not claim():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


def until_all_ended(pids: dict[str, int]) -> None:
    until(lambda: not any(lives(pid) for pid in pids.values()), f"some of {pids} still live")


def test_serve_says_in_json_where_it_is_and_who_belongs_to_it(serve: Serve) -> None:
    server = serve("--json")
    said = ready(server)
    assert said["model"].endswith("m.gguf")
    assert said["address"].startswith("127.0.0.1:")
    assert list(said["pids"]) == ["serve", "coordinator", "w1", "w2"]
    assert said["pids"]["serve"] == server.pid
    server.send_signal(signal.SIGTERM)
    _, err = server.communicate(timeout=PATIENCE_SECONDS)
    assert server.returncode == 0, err
    until_all_ended(said["pids"])


def test_a_running_cluster_is_found_without_an_address(
    serve: Serve, potluck: list[str], own_folders: Path
) -> None:
    server = serve("--json")
    said = ready(server)
    status = subprocess.run(
        [*potluck, "status", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(status.stdout)["model"] == "tiny"
    server.send_signal(signal.SIGINT)
    server.communicate(timeout=PATIENCE_SECONDS)
    assert server.returncode == 0  # Ctrl-C is how one ends what serves
    assert list((own_folders / "state" / "potluck" / "running").iterdir()) == []
    until_all_ended(said["pids"])


def test_people_are_told_what_to_paste(serve: Serve) -> None:
    server = serve()
    assert server.stderr is not None
    said = ""
    while "potluck generate" not in said:
        line = server.stderr.readline()
        assert line, said
        said += line
    assert "serving " in said
    assert "potluck chat --connect 127.0.0.1:" in said
    server.send_signal(signal.SIGINT)
    out, _ = server.communicate(timeout=PATIENCE_SECONDS)
    assert (out, server.returncode) == ("", 0)


def test_kill_9_of_serve_leaves_no_process(serve: Serve) -> None:
    server = serve("--json")
    said = ready(server)
    server.kill()
    server.communicate(timeout=PATIENCE_SECONDS)
    until_all_ended(said["pids"])


@pytest.mark.parametrize(
    ("fake", "first", "second", "code"),
    [
        ("port", "port 7685 on 127.0.0.1 is in use", "choose another with --grpc-port", 1),
        ("usage", "--host 0.0.0.0: loopback only", "use --host 127.0.0.1", 2),
        ("memory", "needs 9.1 GiB, 2.0 GiB are free", "lower --context", 1),
        ("plan", "needs 9.1 GiB, two workers offer 2.0", "add a worker", 1),
    ],
)
def test_a_program_that_can_not_start_is_quoted(
    fake: str, first: str, second: str, code: int, serve: Serve, fakes: Path
) -> None:
    server = serve(fake=fake)
    out, err = server.communicate(timeout=PATIENCE_SECONDS)
    assert (server.returncode, out) == (code, "")
    *_, said, remedy = err.splitlines()
    assert said.startswith("potluck: error: ")
    assert said.endswith(first)
    assert remedy.strip() == second
    coordinator = fakes / "coordinator.alive.pid"
    if coordinator.exists():
        until_all_ended({"coordinator": int(coordinator.read_text())})


def test_a_dead_worker_is_started_again(serve: Serve, fakes: Path) -> None:
    server = serve("--json")
    said = ready(server)
    os.kill(said["pids"]["w2"], signal.SIGKILL)
    assert server.stderr is not None
    heard: list[str] = []
    while not any("is back" in line for line in heard):
        line = server.stderr.readline()
        assert line, heard
        heard.append(line)
    assert "w2 was killed by SIGKILL; starting it again\n" in heard
    again = int((fakes / "w2.alive").read_text())
    assert again != said["pids"]["w2"]
    server.send_signal(signal.SIGTERM)
    server.communicate(timeout=PATIENCE_SECONDS)
    assert server.returncode == 0
    until_all_ended({**said["pids"], "w2": again})


def test_a_worker_that_dies_again_and_again_ends_it(serve: Serve, fakes: Path) -> None:
    server = serve("--json", fake="once")
    said = ready(server)
    (fakes / "died").touch()
    os.kill(said["pids"]["w1"], signal.SIGKILL)
    _, err = server.communicate(timeout=PATIENCE_SECONDS)
    assert server.returncode == 1
    assert "potluck: error: w1: still broken (after 3 restarts)\n  mend it" in err
    until_all_ended(said["pids"])


def test_a_dead_coordinator_ends_it(serve: Serve) -> None:
    server = serve("--json")
    said = ready(server)
    os.kill(said["pids"]["coordinator"], signal.SIGKILL)
    _, err = server.communicate(timeout=PATIENCE_SECONDS)
    assert server.returncode == 1
    first, second = err.splitlines()[-2:]
    assert first == "potluck: error: coordinator was killed by SIGKILL"
    assert second.startswith("  the log is ")
    until_all_ended(said["pids"])


def test_ctrl_c_before_it_serves_is_130(serve: Serve, fakes: Path) -> None:
    server = serve("--json", "--workers", "3")
    until((fakes / "w2.alive").exists, "the workers did not start")
    server.send_signal(signal.SIGINT)
    _, err = server.communicate(timeout=PATIENCE_SECONDS)
    assert server.returncode == 130
    assert "potluck join 127.0.0.1:" in err
    until_all_ended({"coordinator": int((fakes / "coordinator.alive.pid").read_text())})


def test_a_second_ctrl_c_ends_it_at_once(serve: Serve) -> None:
    server = serve("--json", fake="deaf")
    said = ready(server)
    assert server.stderr is not None
    server.send_signal(signal.SIGINT)
    until_asked_to_stop = time.monotonic()
    while "stopping" not in server.stderr.readline():
        assert time.monotonic() < until_asked_to_stop + PATIENCE_SECONDS
    server.send_signal(signal.SIGINT)
    server.communicate(timeout=PATIENCE_SECONDS)  # its children would drain for half a minute
    assert server.returncode == 130
    until_all_ended(said["pids"])


async def test_a_child_that_says_nonsense_is_named(fakes: Path) -> None:
    (fakes / "potluck-worker").write_text("#!/bin/sh\necho hello\ncat >/dev/null\n")
    child = await Child.start("w1", "potluck-worker")
    try:
        with pytest.raises(PotluckError, match=r"w1 said b'hello"):
            await child.ready()
    finally:
        await child.stop(5.0)
    assert not child.is_running


async def test_how_a_child_ended_is_told_with_its_last_words(fakes: Path) -> None:
    (fakes / "potluck-worker").write_text("#!/bin/sh\necho out of luck >&2\nexit 7\n")
    child = await Child.start("w1", "potluck-worker")
    told = await child.end()
    assert isinstance(told, ChildDied)
    assert told.message == "w1 ended (7): out of luck"


async def test_a_child_that_ignores_sigterm_is_killed(fakes: Path) -> None:
    script = "#!/bin/sh\ntrap '' TERM\necho '{}'\nwhile :; do sleep 0.05; done\n"
    (fakes / "potluck-worker").write_text(script)
    child = await Child.start("w1", "potluck-worker")
    await child.ready()
    async with asyncio.timeout(5.0):
        await child.stop(0.2)
    assert not child.is_running
    assert not lives(child.pid)


async def test_a_wrong_command_line_of_a_child_is_ours(fakes: Path) -> None:
    (fakes / "potluck-worker").write_text(
        "#!/bin/sh\necho 'potluck-worker: error: x' >&2\nexit 2\n"
    )
    child = await Child.start("w1", "potluck-worker")
    assert isinstance(await child.end(), UsageError)


def test_join_becomes_the_worker_with_the_same_options(
    fakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from potluck.cli import command_line as cli

    became: list[list[str]] = []

    def become(path: str, command: list[str]) -> None:
        became.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", become)
    given = ["--name", "attic", "--memory", "2 GiB", "--threads", "3", "--pin"]
    assert cli.main(["join", "pi1", *given]) == 0
    assert became == [
        [
            str(fakes / "potluck-worker"),
            *("--coordinator", "pi1:7685", "--name", "attic"),
            *("--threads", "3", "--memory", str(2**31), "--pin"),
        ]
    ]

"""A file of described machines: what it says is what is planned, and every slip has its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from coordinator.described import seconds_of, workers_of
from coordinator.limits import WorkerLimits
from coordinator.planner import ModelSizes
from coordinator.workers_file import from_json, read
from potluck.errors import UsageError
from potluck.plan import COORDINATOR, GIGABIT, DiskFigures, LayerTimes, LinkFigures, WorkerId

SIZES = ModelSizes((400 * 10**6,) * 8, 10**8, 2 * 10**8, 1000, 10**6)
MACS = 8 * 10**8

WHOLE = """
[network]
rtt_ms = 0.5
mbit_per_second = 800

[[worker]]
id = "laptop"
count = 2
memory = "12 GiB"
read_gb_per_second = 40
macs_per_second = 6e11
disk_free = "100 GB"
disk_read_mb_per_second = 3000

[[worker]]
id = "pi"
memory = 4_000_000_000
room = "2 GiB"
layer_ms = { 1 = 50, 8 = 80.5, 64 = 400 }
layer_mb = 200
head_ms = 30
layers = [2, 4]

[[worker]]
id = "old"
memory = "1.5GB"
read_gb_per_second = 6
layers = 3
exclude = true

[[link]]
between = ["laptop", "pi"]
rtt_ms = 3

[[link]]
from = "pi"
to = "coordinator"
mbit_per_second = 80
"""


def file_of(folder: Path, text: str) -> Path:
    path = folder / "home.toml"
    path.write_text(text, encoding="utf-8")
    return path


def id(name: str) -> WorkerId:
    return WorkerId(name)


def test_machines_are_what_the_file_says(tmp_path: Path) -> None:
    described = read(file_of(tmp_path, WHOLE))
    first, second, pi, old = workers_of(described, SIZES, MACS)
    assert [w.id for w in (first, second, pi, old)] == ["laptop-1", "laptop-2", "pi", "old"]
    assert (first.memory_free_bytes, first.room_bytes) == (12 * 2**30, None)
    assert first.read_bytes_per_second == 40e9
    assert first.disk == DiskFigures(100 * 10**9, 3e9, 0.0)
    assert first.times is not None
    assert first.times.layer_bytes == 400 * 10**6
    assert first.times.seconds == tuple(seconds_of(0.01, MACS / 6e11, first.times.rows))
    assert pi.times == LayerTimes(
        200 * 10**6, (1, 8, 64), (0.05, 0.0805, 0.4), SIZES.head_bytes, 0.03
    )
    assert (pi.memory_free_bytes, pi.room_bytes) == (4 * 10**9, 2 * 2**30)
    assert pi.read_bytes_per_second == 200e6 / 0.05  # bytes of the layer over its time
    assert (old.times, old.disk) == (None, None)


def test_limits_are_those_of_each_machine(tmp_path: Path) -> None:
    limits = read(file_of(tmp_path, WHOLE)).limits
    assert limits == {
        "laptop-1": WorkerLimits(12 * 2**30),
        "laptop-2": WorkerLimits(12 * 2**30),
        "pi": WorkerLimits(4 * 10**9, (2, 4)),
        "old": WorkerLimits(15 * 10**8, (0, 3), exclude=True),
    }


def test_a_file_of_limits_alone_needs_neither_memory_nor_speed(tmp_path: Path) -> None:
    described = read(file_of(tmp_path, '[[worker]]\nid = "w1"\nlayers = 4\n'))
    assert described.limits == {"w1": WorkerLimits(None, (0, 4))}


def test_a_group_stands_for_its_machines_and_what_is_not_said_is_the_networks(
    tmp_path: Path,
) -> None:
    links = read(file_of(tmp_path, WHOLE)).links
    near, far = LinkFigures(0.0005, 1e8), LinkFigures(0.003, 1e8)
    assert links.of(id("laptop-1"), id("laptop-2")) == near
    for laptop in (id("laptop-1"), id("laptop-2")):
        assert links.of(laptop, id("pi")) == links.of(id("pi"), laptop) == far
    assert links.of(id("pi"), COORDINATOR) == LinkFigures(0.0005, 1e7)


def test_a_group_may_be_linked_with_itself_and_a_machine_may_not(tmp_path: Path) -> None:
    text = '[[worker]]\nid = "a"\ncount = 2\n[[link]]\nbetween = ["a", "a"]\nrtt_ms = 9\n'
    links = read(file_of(tmp_path, text)).links
    assert set(links.between) == {("a-1", "a-2"), ("a-2", "a-1")}
    with pytest.raises(UsageError, match="'a' and itself"):
        read(file_of(tmp_path, text.replace("count = 2", "")))


def test_without_a_network_links_are_gigabit(tmp_path: Path) -> None:
    assert read(file_of(tmp_path, '[[worker]]\nid = "a"\n')).links.default == GIGABIT


def test_json_has_the_same_tables() -> None:
    described = from_json('{"worker": [{"id": "a", "memory": 5, "layer_ms": {"1": 2.5}}]}', "stdin")
    assert described.workers[0].seconds == (0.0025,)
    with pytest.raises(UsageError, match="stdin: not JSON"):
        from_json("{", "stdin")
    with pytest.raises(UsageError, match="an object of worker, link and network"):
        from_json("[]", "stdin")


def test_two_figures_make_the_times_of_pipeline_section_2() -> None:
    few, many = seconds_of(455.4e6 / 50e9, 809.5e6 / 6e11, [1, 8])
    assert (round(few * 1e3, 2), round(many * 1e3, 2)) == (9.11, 11.96)


WORKER = '[[worker]]\nid = "a"\nmemory = "1 GiB"\nread_gb_per_second = 5\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[wroker]]\n", "home.toml: wroker: unknown key; did you mean 'worker'?"),
        ('[[worker]]\nid = "a"\nmemroy = 5\n', "[[worker]] 1 'a': memroy: unknown key; did you me"),
        ('[[worker]]\nmemory = "5 GiB"\n', "[[worker]] 1: id: is missing"),
        ('[[worker]]\nid = "A B"\n', "[[worker]] 1 'A B': id: 1 to 32 of a-z, 0-9 and -"),
        ('[[worker]]\nid = "coordinator"\n', "id: 'coordinator' is the other end of links"),
        ("[[worker]]\nid = 3\n", "[[worker]] 1: id: expected a text in quotes"),
        (WORKER + WORKER, "[[worker]] 2 'a': id: 'a' is there twice"),
        (
            WORKER.replace('"a"', '"a-1"') + WORKER + "count = 2\n",
            "[[worker]] 2 'a': id: 'a-1' is there twice",
        ),
        (WORKER + "count = 0\n", "count: expected a whole number from 1 to 1000; found 0"),
        (WORKER + "count = true\n", "count: expected a whole number from 1 to 1000; found true"),
        (
            WORKER.replace('"a"', f'"{"x" * 31}"') + "count = 10\n",
            "is no id: 1 to 32 of a-z",
        ),
        (WORKER.replace('"1 GiB"', '"1 Gig"'), "memory: bytes or a size such as '2 GiB', not"),
        (WORKER.replace('"1 GiB"', "1.5"), "memory: expected bytes, or a size in quotes"),
        (WORKER.replace("= 5", "= -5"), "read_gb_per_second: expected a number above 0; found -5"),
        (WORKER.replace("= 5", "= nan"), "read_gb_per_second: expected a number above 0"),
        (WORKER + 'exclude = "yes"\n', "exclude: expected true or false; found 'yes'"),
        (WORKER + "layers = [9, 3]\n", "layers: at least 9 and at most 3: none fits"),
        (WORKER + 'layers = "all"\n', "layers: expected a whole number from 0 to 1000000"),
        (WORKER + "layer_ms = { 8 = 4 }\n", "layer_ms: 1 is missing, beside 8"),
        (WORKER + "layer_ms = { 1 = 4, 8 = 3 }\n", "layer_ms: 8 rows 3 ms and 1 4: more rows"),
        (WORKER + "layer_ms = { one = 4 }\n", "layer_ms: 'one' is no number of rows"),
        (WORKER + "layer_ms = 4\n", "layer_ms: expected { 1 = 9.1"),
        (WORKER + "head_ms = 4\n", "head_ms: goes with layer_ms, which is missing"),
        ('[[worker]]\nid="a"\nmacs_per_second=1e9\n', "goes with read_gb_per_second, which is mi"),
        ("[worker]\nid = 'a'\n", "worker: expected tables: write [[worker]] on a line of its own"),
        ("network = 4\n", "network: expected a table: write [network] on a line of its own"),
        ("[network]\nrtt = 4\n", "[network]: rtt: unknown key; did you mean 'rtt_ms'?"),
        (WORKER + "[[link]]\nrtt_ms = 1\n", "[[link]] 1: between: two ids are wanted"),
        (WORKER + '[[link]]\nfrom = "a"\n', "[[link]] 1: between: two ids are wanted"),
        (WORKER + '[[link]]\nbetween = ["a"]\n', "between: expected two ids, such as"),
        (WORKER + '[[link]]\nbetween = ["a", "b"]\n', "between: no worker 'b'"),
        ("[[worker]\n", "home.toml: not TOML: expected ']]'"),
    ],
)
def test_every_slip_is_one_line_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        read(file_of(tmp_path, text))
    assert said in refused.value.message
    assert refused.value.message.startswith(str(tmp_path / "home.toml"))
    assert "\n" not in refused.value.message


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file") as refused:
        read(tmp_path / "none.toml")
    assert "--describe" in refused.value.remedy
    with pytest.raises(UsageError, match="Is a directory"):
        read(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="byte 0 is not UTF-8"):
        read(tmp_path / "binary")


def test_a_machine_of_unknown_memory_or_speed_can_not_be_planned(tmp_path: Path) -> None:
    without_memory = read(file_of(tmp_path, '[[worker]]\nid = "a"\nread_gb_per_second = 5\n'))
    with pytest.raises(UsageError, match=r"\[\[worker\]\] 1 'a': memory is missing"):
        workers_of(without_memory, SIZES, MACS)
    without_speed = read(file_of(tmp_path, '[[worker]]\nid = "a"\nmemory = 5\n'))
    with pytest.raises(UsageError, match="read_gb_per_second or layer_ms is missing"):
        workers_of(without_speed, SIZES, MACS)


def test_the_files_in_the_documentation_can_be_read(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "planning.md"
    whole, limits = re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    described = read(file_of(tmp_path, whole))
    assert len(workers_of(described, SIZES, MACS)) == 6
    assert described.links.of(id("laptop-4"), id("hub")) == LinkFigures(0.003, 25e6)
    assert read(file_of(tmp_path, limits)).limits == {
        "hub": WorkerLimits(10 * 2**30, (0, 30)),
        "tv-box": WorkerLimits(exclude=True),
    }


def test_too_many_machines_are_refused(tmp_path: Path) -> None:
    text = "".join(f'[[worker]]\nid = "{name}"\ncount = 600\n' for name in ("a", "b"))
    with pytest.raises(UsageError, match="1200 workers in all, 1000 at most"):
        read(file_of(tmp_path, text))

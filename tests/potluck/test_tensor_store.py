"""Delivered tensors: whole and right or not there, cut anywhere, shared by processes, bounded."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from potluck import tensor_store
from potluck.errors import BeingWritten, DamagedTensor, ModelError
from potluck.tensor_store import TensorStore

SEED = 20
ROOT = Path(__file__).resolve().parents[2]


def bytes_of(n_bytes: int, seed: int = SEED) -> bytes:
    return random.Random(seed).randbytes(n_bytes)


def sha256_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def put(store: TensorStore, data: bytes) -> bytes:
    sha256 = sha256_of(data)
    with store.writer(sha256, len(data)) as writer:
        writer.write(data[writer.offset :])
        writer.finish()
    return sha256


def files_of(store: TensorStore) -> list[str]:
    return sorted(p.name for p in store.root.glob("??/*"))


def used_at(store: TensorStore, sha256: bytes, seconds: float) -> None:
    os.utime(store.path_of(sha256), (seconds, seconds))


@pytest.fixture
def store(tmp_path: Path) -> TensorStore:
    return TensorStore(tmp_path / "tensors")


@pytest.fixture
def disk_has(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The free bytes that disks say; set [0]."""
    free = [10 * 2**30]
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free[0]))
    return free


def test_what_was_put_is_there_under_its_sum(store: TensorStore) -> None:
    data = bytes_of(100_001)
    sha256 = sha256_of(data)
    assert not store.has(sha256, len(data))
    assert put(store, data) == sha256
    path = store.path_of(sha256)
    assert path.read_bytes() == data
    assert path == store.root / sha256.hex()[:2] / sha256.hex()
    assert (store.has(sha256, len(data)), store.has(sha256, 5)) == (True, False)
    assert (store.partial_bytes(sha256), store.total_bytes()) == (0, len(data))
    assert store.verify(sha256)
    with store.writer(sha256, len(data)) as again:
        assert again.offset == len(data)
        again.finish()
    assert files_of(store) == [sha256.hex()]


def test_a_fetch_goes_on_wherever_it_was_cut(store: TensorStore) -> None:
    where = random.Random(SEED)
    cuts = set()
    for i in range(60):
        data = bytes_of(where.randrange(1, 3_000_000 if i % 10 == 0 else 5_000), seed=i)
        sha256, at = sha256_of(data), 0
        while True:
            with store.writer(sha256, len(data)) as writer:
                assert writer.offset == at == store.partial_bytes(sha256)
                at = min(len(data), at + where.randrange(len(data) + 1))
                writer.write(memoryview(data)[writer.offset : at])
                cuts.add(at)
                if at == len(data):
                    writer.finish()
                    break
        assert store.path_of(sha256).read_bytes() == data
        assert store.partial_bytes(sha256) == 0
    assert len(cuts) > 100


def test_a_part_that_became_longer_or_other_bytes_costs_one_more_fetch(store: TensorStore) -> None:
    data = bytes_of(50_000)
    sha256 = sha256_of(data)
    part = store.path_of(sha256).with_name(sha256.hex() + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(50_001))
    with store.writer(sha256, len(data)) as writer:
        assert writer.offset == 0
    part.write_bytes(bytes(20_000))  # a power cut's
    with store.writer(sha256, len(data)) as writer:
        assert writer.offset == 20_000
        writer.write(data[20_000:])
        with pytest.raises(DamagedTensor, match="its sha256 is"):
            writer.finish()
    assert (store.partial_bytes(sha256), store.has(sha256, len(data))) == (0, False)
    put(store, data)
    assert store.verify(sha256)


@pytest.mark.parametrize("flipped", [0, 77_777, 99_999])
def test_wrong_bytes_never_get_the_name(store: TensorStore, flipped: int) -> None:
    data = bytes_of(100_000)
    wrong = bytearray(data)
    wrong[flipped] ^= 4
    with store.writer(sha256_of(data), len(data)) as writer:
        writer.write(bytes(wrong))
        with pytest.raises(DamagedTensor, match="sha256"):
            writer.finish()
    assert files_of(store) == []


def test_more_bytes_than_a_tensor_has_are_refused_and_fewer_are_kept(store: TensorStore) -> None:
    data = bytes_of(1000)
    sha256 = sha256_of(data)
    with store.writer(sha256, 1000) as writer:
        writer.write(data[:600])
        with pytest.raises(ModelError, match="600 bytes of 1,000 came"):
            writer.finish()
    assert store.partial_bytes(sha256) == 600
    with store.writer(sha256, 1000) as writer, pytest.raises(DamagedTensor, match="more than"):
        writer.write(data[:401])
    assert files_of(store) == []


def test_a_tensor_is_written_by_one_at_a_time_and_the_other_takes_the_result(
    store: TensorStore,
) -> None:
    data = bytes_of(30_000)
    sha256 = sha256_of(data)
    writer = store.writer(sha256, len(data))
    writer.write(data[:10_000])
    with pytest.raises(BeingWritten, match="another process is writing"):
        TensorStore(store.root).writer(sha256, len(data))
    assert not store.wait_for(sha256, len(data), 0.0)
    found: list[bool] = []
    waiting = threading.Thread(target=lambda: found.append(store.wait_for(sha256, 30_000, 20.0)))
    waiting.start()
    writer.write(data[10_000:])
    writer.finish()
    waiting.join()
    assert found == [True]


def test_who_waits_for_a_writer_that_gives_up_goes_on_itself(store: TensorStore) -> None:
    data = bytes_of(30_000)
    sha256 = sha256_of(data)
    with store.writer(sha256, len(data)) as writer:
        writer.write(data[:10_000])
    assert not store.wait_for(sha256, len(data), 20.0)
    assert put(store, data) == sha256


def _bring(root: str, sizes: list[int]) -> None:
    store = TensorStore(Path(root))
    for i, n_bytes in enumerate(sizes):
        data = bytes_of(n_bytes, seed=i)
        sha256 = sha256_of(data)
        while not store.has(sha256, n_bytes):
            try:
                with store.writer(sha256, n_bytes) as writer:
                    for at in range(writer.offset, n_bytes, 5_000):
                        writer.write(data[at : at + 5_000])
                    writer.finish()
            except BeingWritten:
                store.wait_for(sha256, n_bytes, 20.0)


def test_processes_that_bring_the_same_tensors_do_not_harm_each_other(store: TensorStore) -> None:
    sizes = [1, 5_000, 300_000, 1_000_003] * 3
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_bring, args=(str(store.root), sizes)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(50)
        assert process.exitcode == 0
    data = [bytes_of(n_bytes, seed=i) for i, n_bytes in enumerate(sizes)]
    assert files_of(store) == sorted({sha256_of(d).hex() for d in data})
    assert all(store.verify(sha256_of(d)) for d in data)


KILLED = """
import random, sys
from pathlib import Path
from potluck.tensor_store import TensorStore
store = TensorStore(Path(sys.argv[1]))
data = random.Random(20).randbytes(8_000_000)
with store.claimed([bytes.fromhex(sys.argv[2])]):
    with store.writer(bytes.fromhex(sys.argv[2]), len(data)) as writer:
        for at in range(writer.offset, len(data), 4096):
            writer.write(data[at : at + 4096])
            if at > 1_000_000:
                print("on its way", flush=True)
        sys.stdin.read()
"""


def test_a_killed_writer_leaves_what_it_wrote_and_no_lock(store: TensorStore) -> None:
    data = bytes_of(8_000_000)
    sha256 = sha256_of(data)
    for _ in range(2):
        command = [sys.executable, "-c", KILLED, str(store.root), sha256.hex()]
        with subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            with pytest.raises(BeingWritten):
                store.writer(sha256, len(data))
            assert store.removable_bytes() == 0  # in use, and claimed
            process.send_signal(signal.SIGKILL)
    assert 1_000_000 < store.partial_bytes(sha256) <= len(data)
    with store.writer(sha256, len(data)) as writer:
        assert writer.offset > 1_000_000
        writer.write(data[writer.offset :])
        writer.finish()
    assert store.verify(sha256)
    assert store.removable_bytes() == len(data)


@pytest.mark.parametrize("damage", ["flipped", "shorter", "gone", "a folder"])
def test_damage_is_found_when_a_tensor_is_verified(store: TensorStore, damage: str) -> None:
    data = bytes_of(3_000_000)
    sha256 = put(store, data)
    path = store.path_of(sha256)
    if damage == "flipped":
        with path.open("r+b") as file:
            file.seek(2_345_678)
            file.write(bytes([data[2_345_678] ^ 1]))
    elif damage == "shorter":
        os.truncate(path, 2_999_999)
    else:
        path.unlink()
        if damage == "a folder":
            path.mkdir()
    assert not store.verify(sha256)
    if damage != "a folder":
        assert put(store, data) == sha256
        assert store.verify(sha256)


def test_a_link_in_place_of_a_tensor_is_not_followed(store: TensorStore, tmp_path: Path) -> None:
    data = bytes_of(100)
    path = store.path_of(sha256_of(data))
    path.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").write_bytes(data)
    path.symlink_to(tmp_path / "elsewhere")
    assert not store.verify(sha256_of(data))
    part = path.with_name(path.name + ".part")
    part.symlink_to(tmp_path / "elsewhere")
    path.unlink()
    with pytest.raises(ModelError, match="can't write"):
        store.writer(sha256_of(data), 100)
    assert (tmp_path / "elsewhere").read_bytes() == data


def test_a_full_disk_is_said_and_what_came_is_gone_on_with(store: TensorStore) -> None:
    data = bytes_of(900_000)
    sha256 = sha256_of(data)
    script = f"""
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tests")!r})
from potluck.tensor_store import TensorStore
import random
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
data = random.Random({SEED}).randbytes(900_000)
with TensorStore(Path({str(store.root)!r})).writer(bytes.fromhex({sha256.hex()!r}), 900_000) as w:
    for at in range(0, 900_000, 70_000):
        w.write(data[at : at + 70_000])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "ModelError: can't write" in done.stderr
    assert store.partial_bytes(sha256) == 490_000  # whole messages
    with store.writer(sha256, len(data)) as writer:
        assert writer.offset == 490_000
        writer.write(data[writer.offset :])
        writer.finish()
    assert store.verify(sha256)


def test_those_unused_for_longest_make_room(store: TensorStore, disk_has: list[int]) -> None:
    sums = [put(store, bytes_of(1000 + i, seed=i)) for i in range(5)]
    for sha256, seconds in zip(sums, (50, 10, 40, 20, 30), strict=True):
        used_at(store, sha256, seconds)
    bounded = TensorStore(store.root, 5010 + 1000)
    assert bounded.make_room(1000) == ""
    assert store.total_bytes() == 5010
    assert bounded.make_room(1001) == ""
    assert [store.has(s, 1000 + i) for i, s in enumerate(sums)] == [True, False, True, True, True]
    assert bounded.make_room(2500, keep=[sums[3]]) == ""
    assert [store.has(s, 1000 + i) for i, s in enumerate(sums)] == [True, False, True, True, False]
    disk_has[0] = 2**30 + 1500
    assert store.make_room(1500) == ""
    assert store.total_bytes() == 1000 + 1002 + 1003
    store.make_room(1501)  # this disk stays full whatever goes: one tensor was enough for it
    assert [store.has(s, 1000 + i) for i, s in enumerate(sums)][::2] == [True, True, False]
    assert not store.has(sums[3], 1003)


def test_a_verified_tensor_counts_as_used(store: TensorStore, disk_has: list[int]) -> None:
    first, second = (put(store, bytes_of(1000, seed=i)) for i in range(2))
    used_at(store, first, 10)
    used_at(store, second, 20)
    assert store.verify(first)
    assert TensorStore(store.root, 2000).make_room(500) == ""
    assert (store.has(first, 1000), store.has(second, 1000)) == (True, False)


def test_nothing_goes_when_that_would_not_be_enough(
    store: TensorStore, disk_has: list[int]
) -> None:
    sums = [put(store, bytes_of(1000, seed=i)) for i in range(3)]
    said = TensorStore(store.root, 4000).make_room(3500, keep=sums[:1])
    assert said == "delivered tensors may take 4,000 bytes, 3,000 are taken, 3,500 are needed"
    disk_has[0] = 2**30 + 100
    assert "1,073,741,924 bytes of the disk are free, 9,000 are needed" in store.make_room(9000)
    assert store.total_bytes() == 3000


def test_what_others_claim_or_write_stays_and_own_claims_bind_nobody_here(
    store: TensorStore, disk_has: list[int]
) -> None:
    claimed, coming, free = (bytes_of(1000, seed=i) for i in range(3))
    put(store, claimed)
    put(store, free)
    other = TensorStore(store.root, 2600)
    with store.claimed([sha256_of(claimed)]), store.writer(sha256_of(coming), 1000) as writer:
        writer.write(coming[:500])
        assert "2,500 are taken" in other.make_room(1200)
        assert other.make_room(1000) == ""
        assert files_of(store) == sorted(
            [sha256_of(claimed).hex(), sha256_of(coming).hex() + ".part"]
        )
        assert store.removable_bytes() == 1000
        assert store.removable_bytes(keep=[sha256_of(claimed)]) == 0
    assert other.make_room(2600) == ""
    assert (files_of(store), list((store.root / "claims").iterdir())) == ([], [])


def test_old_parts_and_claims_of_the_dead_are_swept(store: TensorStore) -> None:
    sums = [sha256_of(bytes_of(100, seed=i)) for i in range(3)]
    for sha256 in sums:
        with store.writer(sha256, 100) as writer:
            writer.write(bytes(10))
    put(store, bytes_of(100, seed=9))
    (store.root / "claims").mkdir()
    (store.root / "claims" / "00aa").write_text(sums[0].hex())
    now = time.time()
    for sha256 in sums[:2]:
        os.utime(store.path_of(sha256).with_name(sha256.hex() + ".part"), (now - 6e5, now - 6e5))
    store.sweep(now)
    assert len(files_of(store)) == 4
    with store.writer(sums[0], 100):
        store.sweep(now + tensor_store.PART_SECONDS / 2)
    assert store.partial_bytes(sums[0]) == 10
    assert (store.partial_bytes(sums[1]), store.partial_bytes(sums[2])) == (0, 10)
    assert list((store.root / "claims").iterdir()) == []
    assert store.verify(sha256_of(bytes_of(100, seed=9)))


def test_a_store_that_is_not_there_has_nothing_and_is_not_made(store: TensorStore) -> None:
    assert not store.has(bytes(32), 0)
    assert not store.verify(bytes(32))
    assert (store.total_bytes(), store.removable_bytes(), store.remove()) == (0, 0, 0)
    store.sweep()
    assert not store.root.exists()


def test_a_folder_that_can_not_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = TensorStore(tmp_path / "file")
    with pytest.raises(ModelError, match="can't write"):
        store.writer(bytes(32), 5)
    with pytest.raises(ModelError, match="can't write"), store.claimed([bytes(32)]):
        pass
    assert "file" in store.make_room(5)


def test_a_header_is_kept_like_a_tensor(store: TensorStore) -> None:
    data = bytes_of(5000)
    name = hashlib.sha256(data).hexdigest()
    assert store.put_header(name, data).read_bytes() == data
    assert store.put_header(name, data) == store.header_path(name)
    with pytest.raises(DamagedTensor):
        store.put_header("0" * 64, data)

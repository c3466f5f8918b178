"""The house rules that no linter knows: sizes, names, words, places of threads and intrinsics."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_PASS_500_LINES: set[str] = set()
EMPTY_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base", "manager"}
OTHER_PEOPLES_WORDS = re.compile(r"(?:^|_)(peer|peers|master|hop|hops|topology|placement)(?:_|$)")
GRPC_OWN = {"peer", "placement_new"}  # context.peer() is gRPC's


def tracked(*endings: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return [
        ROOT / name
        for name in listed
        if name.endswith(endings) and "rpc/v1/" not in name and (ROOT / name).is_file()
    ]


def names_of(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def test_no_source_file_is_longer_than_500_lines() -> None:
    long = {
        name: lines
        for path in tracked(".py", ".cpp", ".h", ".proto", ".sh")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 500
        and (name := path.relative_to(ROOT).as_posix()) not in MAY_PASS_500_LINES
    }
    assert long == {}


def test_no_module_has_an_empty_name() -> None:
    assert [p.name for p in tracked(".py", ".cpp", ".h") if p.stem.lower() in EMPTY_NAMES] == []


def test_identifiers_use_our_words() -> None:
    found = []
    for path in tracked(".py", ".proto", ".cpp", ".h"):
        if "tests/house" in path.as_posix():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            code = re.sub(r"([\"']).*?\1|#.*|//.*", "", line)
            for identifier in re.findall(r"[A-Za-z_]\w*", code):
                if identifier not in GRPC_OWN and OTHER_PEOPLES_WORDS.search(identifier.lower()):
                    found.append(f"{path.name}:{number} {identifier}")
    assert found == []


def test_every_exception_to_a_check_has_its_code_and_reason() -> None:
    bare = []
    for path in tracked(".py"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for found in re.findall(r"#\s*(?:noqa|type:\s*ignore)[^#]*(?:#.*)?$", line):
                has_code = re.search(r"noqa: [A-Z]+\d+|ignore\[[a-z-]+", found)
                reason = re.sub(r"#\s*noqa: [A-Z0-9, ]+|#\s*type:\s*ignore\[[^\]]*\]", "", found)
                if not has_code or len(reason.strip(" -#:")) < 8:
                    bare.append(f"{path.relative_to(ROOT)}:{number} {found}")
    assert bare == []


def test_threads_that_compute_are_made_in_the_pool_only() -> None:
    guilty = [p for p in tracked(".cpp", ".h") if "std::thread" in p.read_text(encoding="utf-8")]
    engine = [name for name in names_of(guilty) if name.startswith("cpp/")]
    # The thread of paging.cpp computes nothing: it waits for the disk.
    assert set(engine) <= {"cpp/engine/pool.cpp", "cpp/engine/pool.h", "cpp/engine/paging.cpp"}


def test_intrinsics_are_in_kernels_only() -> None:
    guilty = [
        p
        for p in tracked(".cpp", ".h")
        if re.search(r"#include <(?:\w*mmintrin|immintrin|arm_neon)\.h>", p.read_text("utf-8"))
    ]
    outside = [
        name
        for name in names_of(guilty)
        if name.startswith("cpp/") and not name.startswith("cpp/engine/kernels/")
    ]
    # The crc32c instruction and the pause of a spin are no kernels; attributes guard them.
    assert set(outside) <= {"cpp/engine/crc32c.cpp", "cpp/engine/pool.cpp", "cpp/engine/cpu.cpp"}


def built_kernels() -> list[Path]:
    kernels = ROOT.glob("build/*/CMakeFiles/potluck_core.dir/engine/kernels/*.o")
    return sorted(path for path in kernels if not path.name.startswith("scalar_"))


def test_an_isa_object_exports_no_weak_symbol() -> None:
    """A weak symbol (inline, template) may become everyone's copy: a crash on older CPUs."""
    objects = [path for path in built_kernels() if "tidy" not in path.as_posix()]
    assert objects, "the engine was not built in build/"
    weak = {}
    for path in objects:
        if "cpp-address" in path.as_posix() or "cpp-thread" in path.as_posix():
            continue  # sanitizers add symbols of their own
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True
        ).stdout
        found = [line for line in listing.splitlines() if re.search(r"^\S* ?[WVu] ", line)]
        if found:
            weak[path.name] = found
    assert weak == {}


@pytest.mark.parametrize(
    "page", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "bench/README.md"]
)
def test_links_in_a_page_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [t for t in targets if not (ROOT / page).parent.joinpath(t).exists()] == []


def test_architecture_names_every_module_and_none_that_is_gone() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:potluck|coordinator|worker|cpp)/[\w./-]+\.(?:py|cpp|h))`", text))
    here = {
        name
        for name in names_of(tracked(".py", ".cpp"))
        if name.startswith(("potluck/", "coordinator/", "worker/", "cpp/"))
        and not name.endswith(("__init__.py",))
    }
    assert sorted(here - named) == []
    assert sorted(n for n in named if not (ROOT / n).exists()) == []


def test_nothing_names_a_path_of_the_machine_it_was_written_on() -> None:
    words = [
        "/" + "work/",
        "/" + "root/",
        "." + "library",
        "/tmp" + "/peer",
        "farm" + "-",
    ]
    guilty = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in tracked("")
        if path.suffix not in {".gguf", ".png"}
        for word in words
        if word in path.read_text(encoding="utf-8", errors="ignore") and path != Path(__file__)
    ]
    assert guilty == []


def test_the_measured_table_is_what_the_results_say() -> None:
    done = subprocess.run([sys.executable, "bench/table.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run python bench/table.py"

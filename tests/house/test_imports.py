"""Who may import what: the parts that import-linter can't see."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DECISIONS = [
    "coordinator.planner",
    "coordinator.fleet",
    "coordinator.session",
    "coordinator.scheduler",
    "coordinator.answer",
    "coordinator.request",
    "coordinator.figures",
    "coordinator.chat",
    "worker.kv",
    "worker.sessions",
    "worker.steps",
    "potluck.errors",
    "potluck.plan",
    "potluck.sampling",
    "potluck.model",
    "potluck.gguf",
]
MAY_IMPORT_GRPC = {
    "potluck/client.py",
    "coordinator/links.py",
    "coordinator/loading.py",
    "coordinator/pipeline.py",
    "coordinator/grpc_server.py",
    "coordinator/__main__.py",
    "worker/server.py",
    "worker/exchange.py",
    "worker/link.py",
    "worker/membership.py",
    "worker/ack_stream.py",
    "worker/sources.py",
    "worker/weights.py",
    "worker/__main__.py",
}


def sources() -> list[Path]:
    return [
        path
        for folder in ("potluck", "coordinator", "worker")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "rpc/v1" not in path.as_posix()
    ]


def imported(path: Path) -> set[str]:
    """Names of all modules that a source file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_only_engine_py_imports_the_compiled_module() -> None:
    guilty = [
        path.relative_to(ROOT).as_posix()
        for path in sources()
        if "potluck._engine" in imported(path)
    ]
    assert guilty == ["potluck/engine.py"]


def test_grpc_is_imported_only_at_the_edges() -> None:
    guilty = {
        path.relative_to(ROOT).as_posix()
        for path in sources()
        if any(name == "grpc" or name.startswith("grpc.") for name in imported(path))
    }
    assert {name for name in guilty if not name.startswith("potluck/rpc/")} <= MAY_IMPORT_GRPC


@pytest.mark.parametrize("module", DECISIONS)
def test_a_decision_loads_no_grpc_and_no_engine(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "print([m for m in ('grpc', 'potluck._engine', 'asyncio') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    loaded = done.stdout.strip()
    # numpy itself loads asyncio on some platforms; grpc and the engine are ours to keep out.
    assert "grpc" not in loaded
    assert "_engine" not in loaded


def test_the_top_of_the_library_is_light() -> None:
    code = "import sys, potluck; print(any(m in sys.modules for m in ('grpc', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_worker_needs_the_small_install_only() -> None:
    blocked = ["tokenizers", "sentencepiece", "jinja2", "rich", "prompt_toolkit", "grpc_health"]
    code = (
        "import sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "import worker.__main__, worker.server, worker.shard, worker.link, worker.probe\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")

"""The command `potluck`: finds the command's module, runs it, says what went wrong.

One module a command, imported when it is called (or when help lists it). A module has `HELP`,
`add_arguments(parser)` and `run(args) -> int`, and raises PotluckError. Errors are two lines on
stderr, never a traceback. Exit codes: 0; 1 the work failed; 2 a wrong command line; 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from potluck.cli import logs, parser
from potluck.errors import Cancelled, PotluckError, UsageError
from potluck.near_words import nearest

# In the order in which people meet them.
COMMANDS = {
    "Run": ("demo", "serve", "join"),
    "Ask": ("generate", "chat", "status"),
    "Models": ("pull", "list", "show", "plan", "rm", "tokenize", "convert", "quantize"),
    "Measure": ("bench", "bench-cluster", "perplexity"),
    "Set up": ("completion",),
}
# A module `list` would become an attribute of the package that hides the builtin.
_MODULES = {"list": "list_models", "bench-cluster": "bench_cluster"}
FAILED, WRONG, INTERRUPTED = 1, 2, 130

# Packages of the extra [server]; a worker's machine does without them.
_SERVER_PACKAGES = {
    "grpc_health",
    "grpc_reflection",
    "jinja2",
    "prompt_toolkit",
    "rich",
    "sentencepiece",
    "tokenizers",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (sys.argv) and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    with logs.everything(logging.DEBUG) if debug else contextlib.nullcontext():
        return _guarded(arguments, debug=debug)


def _guarded(arguments: Sequence[str], *, debug: bool) -> int:
    """Runs the command; whatever goes wrong becomes two lines and an exit code."""
    try:
        code = _run(arguments)
        sys.stdout.flush()  # a reader that went away shows here, not in the interpreter's exit
    except SystemExit as done:  # argparse printed its help
        return int(done.code or 0)
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the shell's prompt goes below the ^C
        return INTERRUPTED
    except BrokenPipeError:
        # The reader had enough (`| head`). Give the interpreter's last flush somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except PotluckError as error:
        logging.getLogger(__name__).debug("failed", exc_info=True)
        _say(error.message, error.remedy, where=debug)
        if isinstance(error, Cancelled):
            return INTERRUPTED
        return WRONG if isinstance(error, UsageError) else FAILED
    except ModuleNotFoundError as error:
        return _say_missing(error)
    except Exception as error:  # the outermost frame: people never see a traceback
        with contextlib.nullcontext() if debug else logs.everything(logging.ERROR):
            logging.getLogger(__name__).exception("a defect")
        remedy = "please report it with the end of the log"
        _say(f"a defect in potluck: {type(error).__name__}: {error}", remedy, where=True)
        return FAILED
    return code


def command_names() -> list[str]:
    """Every command, in the order of help."""
    return [name for group in COMMANDS.values() for name in group]


def module_of(command: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"potluck.cli.{_MODULES.get(command, command)}")


def parser_of(command: str) -> parser.Parser:
    """The command's parser."""
    module = module_of(command)
    made = parser.Parser(prog=f"potluck {command}", description=_summary(module))
    made.add_argument("--debug", action="store_true", help="write what happens to a log file")
    module.add_arguments(made)
    return made


def _run(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--debug"]:
        arguments = arguments[1:]
    if not arguments:
        print(_overview(), file=sys.stderr)
        return WRONG
    command, *rest = arguments
    if command in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if command in ("-V", "--version"):
        print(_version())
        return 0
    if command not in command_names():
        what = "option" if command.startswith("-") else "command"
        raise UsageError(
            f"unknown {what} {command!r}{nearest(command, command_names())}",
            remedy="`potluck --help` lists them",
        )
    made = parser_of(command)
    return int(module_of(command).run(made.read(rest)))


def summary_of(command: str) -> str:
    """What a command does, in one line."""
    return _summary(module_of(command))


def _summary(module: ModuleType) -> str:
    said = getattr(module, "HELP", None) or (module.__doc__ or "").strip().partition("\n")[0]
    return str(said)


def _overview() -> str:
    lines = ["usage: potluck COMMAND ...", "", "Run a language model on your machines together."]
    for group, names in COMMANDS.items():
        lines += ["", f"{group}:"]
        lines += [f"  {name:<14}{summary_of(name).rstrip('.')}" for name in names]
    lines += [
        "",
        "Options:",
        "  --version   versions of potluck, protocol, engine, Python and platform",
        "  --debug     write what happens to a log file",
        "",
        "`potluck COMMAND --help` says more. First steps: potluck demo",
    ]
    return "\n".join(lines)


def _version() -> str:
    import platform

    from potluck import __version__
    from potluck.rpc import PROTOCOL

    try:
        from potluck import engine

        isa = f"{engine.Engine(1).isa} (of {', '.join(engine.available_isas())})"
    except PotluckError as error:
        isa = f"none: {error.message}"
    return (
        f"potluck {__version__}\nprotocol {PROTOCOL}\nengine {isa}\n"
        f"python {platform.python_version()}\nplatform {platform.system().lower()} "
        f"{platform.machine()}"
    )


def _say(message: str, remedy: str, *, where: bool) -> None:
    print(f"potluck: error: {message}", file=sys.stderr)
    if remedy:
        print(f"  {remedy}", file=sys.stderr)
    if where:
        print(f"  log: {logs.debug_file()}", file=sys.stderr)


def _say_missing(error: ModuleNotFoundError) -> int:
    package = (error.name or "").partition(".")[0]
    if package in _SERVER_PACKAGES:
        _say(f"this needs the package {package}", "pip install 'potluck[server]'", where=False)
    else:
        _say(f"{error}", "pip install --force-reinstall potluck", where=False)
    return FAILED

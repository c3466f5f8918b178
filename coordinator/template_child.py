"""The process that renders a chat template: a script, with limits that hold for bombs too.

A model file is from a stranger, and so is its template. Jinja's sandbox stops what wants out, but
not what never ends or takes all memory. So templates.py starts this file alone (`python -I`): it
imports nothing of ours and holds nothing worth stealing. JSON lines: {"template": text} first, then
one {"messages": [...], "bos_token": text, "eos_token": text} a prompt; the answers are {"text":
text} or {"refused": why}. It ends when its input does.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.nodes
import jinja2.sandbox

CPU_SECONDS = 1.0
MEMORY_BYTES = 512 << 20  # address space of this process
OUTPUT_BYTES = 1 << 20
TEMPLATE_BYTES = 64 << 10
_REASON_LETTERS = 500
_FORBIDDEN = (
    jinja2.nodes.Import,
    jinja2.nodes.FromImport,
    jinja2.nodes.Include,
    jinja2.nodes.Extends,
)


class Refused(Exception):
    """The template can't be used, or says no itself."""


def main() -> None:
    """Answer each line of the input."""
    limit_this_process()
    template: jinja2.Template | None = None
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        # The kernel ends this process when its CPU time is over: no template can prevent it.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            if template is None:
                template = load(asked["template"])
                answer = {"text": ""}
            else:
                answer = {"text": render(template, asked)}
        except Exception as error:  # noqa: BLE001 (whatever a template can raise is its refusal)
            answer = {"refused": reason_of(error)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def limit_this_process() -> None:
    """No memory beyond the limit, no files, no core; SIGPROF ends it, Ctrl-C is not for it."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))


def load(source: str) -> jinja2.Template:
    """The template as Hugging Face's tokenizers would run it, less what reads files."""
    if len(source.encode()) > TEMPLATE_BYTES:
        raise Refused(f"has {len(source.encode()):,} bytes, expected at most {TEMPLATE_BYTES:,}")
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    found = next(environment.parse(source).find_all(_FORBIDDEN), None)
    if found is not None:
        word = type(found).__name__.lower().removeprefix("from")
        raise Refused(f"uses `{word}`, which is not allowed")
    return environment.from_string(source)


def render(template: jinja2.Template, asked: dict[str, Any]) -> str:
    """The prompt's text, at most OUTPUT_BYTES of it."""
    pieces: list[str] = []
    length = 0
    for piece in template.generate(**asked, add_generation_prompt=True):
        length += len(piece.encode())
        if length > OUTPUT_BYTES:
            raise Refused(f"makes more than {OUTPUT_BYTES >> 20} MiB of text")
        pieces.append(piece)
    return "".join(pieces)


def raise_exception(message: object) -> NoReturn:
    """For templates: refuse the conversation."""
    raise Refused(f"refuses: {message}")


def strftime_now(layout: str) -> str:
    """For templates: today."""
    return datetime.now().strftime(layout)


def reason_of(error: Exception) -> str:
    """What goes behind "the chat template of X"."""
    if isinstance(error, Refused):
        text = str(error)
    elif isinstance(error, MemoryError):
        text = f"needed more than {MEMORY_BYTES >> 20} MiB of memory"
    elif isinstance(error, RecursionError):
        text = "is nested too deeply"
    elif isinstance(error, jinja2.TemplateSyntaxError):
        text = f"is not valid: {error.message} (line {error.lineno})"
    else:
        text = f"failed: {str(error) or type(error).__name__}"
    return " ".join(text.split())[:_REASON_LETTERS]


if __name__ == "__main__":
    main()

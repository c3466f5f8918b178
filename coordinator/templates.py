"""Turns a conversation into a prompt's parts, by the model's own Jinja template or a built-in one.

A built-in template needs no process. The model's own is rendered in a child with limits on time and
memory (template_child.py): one, started on first use, used again, and replaced when it was killed.
It ends with this process, whatever ends that: its input closes, and no prompt takes it more than a
second of CPU. Belongs to the event loop of whoever made it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping, Sequence
from pathlib import Path

from coordinator import chat
from potluck.errors import UsageError
from potluck.tokenizer import Tokenizer

CHILD = Path(__file__).with_name("template_child.py")
# By the clock and not by CPU: enough for a machine that is busy with other things.
DEADLINE_SECONDS = 10.0
STOP_SECONDS = 2.0
_ENVIRONMENT = ("LD_LIBRARY_PATH", "TZ")  # all that the child needs of ours
ANSWER_BYTES = 8 << 20  # 1 MiB of text, each byte of it six in JSON, and some


class Conversations:
    """Messages to the parts of a prompt, for one model."""

    def __init__(self, tokenizer: Tokenizer, model_name: str, template_name: str = "") -> None:
        """`template_name`: of a built-in template; empty: the model's own. Raises UsageError."""
        self._model_name = model_name
        self._built_in = chat.built_in(template_name) if template_name else None
        self._start = "" if tokenizer.start_id is None else tokenizer.name(tokenizer.start_id)
        self._end = "" if tokenizer.end_id is None else tokenizer.name(tokenizer.end_id)
        own = tokenizer.chat_template
        self._renderer = None if own is None else Renderer(own, model_name)

    async def parts(self, messages: Sequence[tuple[str, str]]) -> list[chat.Part]:
        """The prompt of (role, content), oldest first, for Tokenizer.encode_template.

        Raises UsageError: bad messages, no template, or a template that fails or refuses.
        """
        turns = chat.checked([chat.Message(role, content) for role, content in messages])
        if self._built_in is not None:
            return chat.fill(self._built_in, turns, self._start, self._end)
        if self._renderer is None:
            raise UsageError(
                f"{self._model_name} has no chat template",
                remedy=f"serve it with --chat-template NAME: {', '.join(chat.BUILT_IN)}",
            )
        variables = {"bos_token": self._start, "eos_token": self._end}
        rendered = await self._renderer.render(chat.with_placeholders(turns), variables)
        return chat.parts_of(rendered, turns, self._model_name)

    async def close(self) -> None:
        """End the child, if there is one. Twice is no error."""
        if self._renderer is not None:
            await self._renderer.close()


class Renderer:
    """One Jinja template in its child process; renders one conversation at a time, in order."""

    def __init__(self, template: str, name: str) -> None:
        """`name` is for errors. Starts nothing."""
        self._template = template
        self._name = name
        self._child: Process | None = None
        self._turn = asyncio.Lock()
        self._refusal = ""  # why the template itself is bad: no use to try again

    async def render(
        self, messages: Sequence[Mapping[str, str]], variables: Mapping[str, str]
    ) -> str:
        """What the template makes of `messages` and `variables`. Raises UsageError."""
        async with self._turn:
            if self._refusal:
                raise self._refused(self._refusal)
            child = await self._started()
            answer = await self._ask(child, {"messages": messages, **variables})
        if "refused" in answer:
            raise self._refused(answer["refused"])
        return answer["text"]

    async def close(self) -> None:
        """End the child. Twice is no error."""
        async with self._turn:
            await self._stop()

    async def _started(self) -> Process:
        """The child, with the template loaded."""
        if self._child is not None and self._child.returncode is None:
            return self._child
        await self._stop()
        if importlib.util.find_spec("jinja2") is None:
            raise UsageError(
                f"the chat template of {self._name} needs the package jinja2, which is missing",
                remedy="pip install 'potluck[server]'",
            )
        self._child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", str(CHILD)),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            limit=ANSWER_BYTES,
            start_new_session=True,  # Ctrl-C is for us: we end the child when we are done
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        )
        answer = await self._ask(self._child, {"template": self._template})
        if "refused" in answer:
            self._refusal = answer["refused"]
            await self._stop()
            raise self._refused(self._refusal)
        return self._child

    async def _ask(self, child: Process, question: Mapping[str, object]) -> dict[str, str]:
        """The child's answer. A child that gave none, in whatever way, is gone afterwards."""
        answer = b""
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                answer = await _exchange(child, json.dumps(question).encode() + b"\n")
        except TimeoutError:
            raise self._refused(f"took more than {DEADLINE_SECONDS:.0f} s") from None
        finally:
            if not answer:  # also if whoever asked is gone: the answer would be taken for the next
                await self._stop()
        if not answer:
            raise self._refused(_cause_of_death(child.returncode))
        found: dict[str, str] = json.loads(answer)
        return found

    def _refused(self, why: str) -> UsageError:
        remedy = f"serve with --chat-template NAME: {', '.join(chat.BUILT_IN)}"
        return UsageError(f"the chat template of {self._name} {why}", remedy=remedy)

    async def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
        await asyncio.wait_for(asyncio.shield(child.wait()), STOP_SECONDS)
        if child.stdin is not None:
            child.stdin.close()


async def _exchange(child: Process, line: bytes) -> bytes:
    """One line in, one line out; empty if the child is dead."""
    assert child.stdin is not None
    assert child.stdout is not None
    answer = b""
    try:
        child.stdin.write(line)
        await child.stdin.drain()
        answer = await child.stdout.readline()
    except ValueError:  # a line over the limit
        return b""
    except ConnectionError:
        pass
    if not answer:
        # It is ending. Its status says why, and would be lost: kill() on a dead child collects it
        # behind asyncio's back.
        await child.wait()
    return answer


def _cause_of_death(returncode: int | None) -> str:
    if returncode == -signal.SIGPROF:
        return "needed more than 1 s"
    return "failed: its process ended"

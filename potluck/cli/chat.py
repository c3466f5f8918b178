"""Talk with the model; Ctrl-C stops an answer, Ctrl-D leaves."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import stat
import sys
from typing import TYPE_CHECKING, Protocol

from potluck.cli import asking, running, streaming, terminal, values
from potluck.cli.conversation import Conversation
from potluck.errors import ContextExceeded, PotluckError

if TYPE_CHECKING:
    from potluck.client import Client

HELP = "Talk with the model"
_KEYS = "Enter sends, Alt-Enter starts a new line, Ctrl-C stops an answer, Ctrl-D leaves, /help"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck chat`."""
    asking.add_connect(parser)
    text = values.plain
    parser.add_argument(
        "--system", type=text, default="", metavar="TEXT", help="what the model is told to be"
    )
    parser.add_argument("--message", type=text, metavar="TEXT", help="ask this one thing and leave")
    asking.add_answer_options(parser, usual_tokens="0")
    parser.epilog = f"On a terminal: {_KEYS}. Otherwise each line of stdin is a message."


def run(args: argparse.Namespace) -> int:
    """Talks until the person leaves."""
    talk = Conversation(asking.answer_options(args), args.system)
    address = running.address_of(args.connect)
    return asyncio.run(_talk(address, talk, args.message))


class _Input(Protocol):
    """Where the person's messages come from."""

    async def read(self) -> str:
        """The next message. EOFError: no more. KeyboardInterrupt: given up while typing."""


async def _talk(address: str, talk: Conversation, message: str | None) -> int:
    from potluck.client import Client

    async with Client(address) as client:
        report = (
            await client.status()
        )  # says now, and not after the first question, if nobody is there
        if message is not None:
            await _answer(client, talk, message)
            return 0
        source: _Input = _Lines()
        if sys.stdin.isatty():
            terminal.note(f"{report.model} at {address}. {_KEYS}")
            source = _Prompt()
        return await _converse(client, talk, source)


async def _converse(client: Client, talk: Conversation, source: _Input) -> int:
    """One message after the other. On a terminal an error ends an answer, not the program."""
    on_terminal = sys.stdin.isatty()
    while True:
        try:
            text = (await source.read()).strip()
            if text == "/quit":
                return 0
            await _do(client, talk, text)
        except EOFError:
            return 0
        except KeyboardInterrupt:
            if not on_terminal:
                raise
        except PotluckError as error:
            if not on_terminal:
                raise
            _tell(error)


async def _do(client: Client, talk: Conversation, text: str) -> None:
    if text.startswith("/"):
        terminal.note(talk.command(text))
    elif text:
        await _answer(client, talk, text)


def _tell(error: PotluckError) -> None:
    remedy = error.remedy
    if isinstance(error, ContextExceeded):
        remedy = "/reset forgets the conversation; `potluck serve --context N` makes room for more"
    terminal.note(f"potluck: error: {error.message}" + (f"\n  {remedy}" if remedy else ""))


async def _answer(client: Client, talk: Conversation, text: str) -> None:
    """Streams one answer and remembers the turn. Ctrl-C stops it: the session ends everywhere."""
    answer = streaming.Answer()
    events = client.chat(talk.asked(text), talk.options)
    work = asyncio.ensure_future(streaming.stream(events, answer, wrapped=True))
    loop = asyncio.get_running_loop()
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True
        work.cancel()

    interactive = sys.stdin.isatty()
    if interactive:
        loop.add_signal_handler(signal.SIGINT, stop)
    try:
        await work
    except asyncio.CancelledError:
        if not stopped:
            raise
        terminal.aside("(stopped)")
    finally:
        if interactive:
            loop.remove_signal_handler(signal.SIGINT)
    talk.answered(text, answer.text)
    if answer.done is not None:
        terminal.aside(f"({streaming.speed(answer.done)})")


class _Lines:
    """stdin, a message a line: for pipes and scripts."""

    def __init__(self) -> None:
        self._pipe: asyncio.StreamReader | None = None

    async def read(self) -> str:
        kind = os.fstat(sys.stdin.fileno()).st_mode
        if self._pipe is None and (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
            # Not a thread: Ctrl-C could not end one that waits for a line.
            self._pipe = asyncio.StreamReader(limit=4 * 1024 * 1024)
            protocol = asyncio.StreamReaderProtocol(self._pipe)
            stdin = os.fdopen(os.dup(sys.stdin.fileno()), "rb", buffering=0)  # closed at its end
            await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, stdin)
        if self._pipe is not None:
            line = await self._pipe.readline()
        else:
            line = sys.stdin.buffer.readline()  # of a file: never waits for a person
        if not line:
            raise EOFError
        return line.decode("utf-8", "replace")


class _Prompt:
    """An editor line with history (prompt_toolkit, from the extra [server])."""

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.key_binding.key_processor import KeyPressEvent

        keys = KeyBindings()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        path = running.state_folder() / "chat_history"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._session: PromptSession[str] = PromptSession(
            history=FileHistory(str(path)), key_bindings=keys, prompt_continuation="  "
        )

    async def read(self) -> str:
        text: str = await self._session.prompt_async("> ")
        return text

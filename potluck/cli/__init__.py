"""The command line: one module a command; command_line finds and runs them."""

from potluck.cli.command_line import main

__all__ = ["main"]

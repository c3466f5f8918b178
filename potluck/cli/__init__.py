"""The command line. Only `main` is here: `import potluck.cli.list` would hide a name `list`."""

from potluck.cli.command_line import main

__all__ = ["main"]

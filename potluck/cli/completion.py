"""Print a completion script for bash, zsh or fish; made from the commands' own parsers."""

from __future__ import annotations

import argparse

HELP = "Print a completion script for your shell"

_BASH = """\
# eval "$(potluck completion {shell})"
{start}_potluck() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} words="{commands}"
  if [ "$COMP_CWORD" -gt 1 ]; then
    case "${{COMP_WORDS[1]}}" in
{cases}
      *) words= ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  [ "${{#COMPREPLY[@]}}" -gt 0 ] || COMPREPLY=($(compgen -f -- "$word"))
}}
complete -o filenames -F _potluck potluck"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck completion`."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="bash|zsh|fish")


def run(args: argparse.Namespace) -> int:
    """Prints the script."""
    print(_fish() if args.shell == "fish" else _bash(args.shell))
    return 0


def _options() -> dict[str, list[str]]:
    """The long options of each command."""
    from potluck.cli import command_line as cli

    return {
        name: [o for o in cli.parser_of(name).option_strings() if o.startswith("--")]
        for name in cli.command_names()
    }


def _bash(shell: str) -> str:
    """zsh takes bash's script through its own bashcompinit."""
    options = _options()
    cases = "\n".join(f'      {name}) words="{" ".join(o)}" ;;' for name, o in options.items())
    start = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return _BASH.format(shell=shell, start=start, commands=" ".join(options), cases=cases)


def _fish() -> str:
    lines = ["# potluck completion fish | source"]
    for name, options in _options().items():
        lines.append(f"complete -c potluck -n __fish_use_subcommand -a {name}")
        lines += [
            f"complete -c potluck -n '__fish_seen_subcommand_from {name}' -l {option[2:]}"
            for option in options
        ]
    return "\n".join(lines)

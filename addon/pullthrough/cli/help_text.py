"""The words of `--help`: what a verb takes, said by the parser and laid out here.

Invariant: the layout depends on the width alone and not on the version of typer, whose parser is the only thing asked.
"""

import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, Final

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import CommandFunctionType

WIDEST: Final = 100
"""Columns: longer lines are hard to read."""
_TERMS: Final = 30
"""The widest left column."""
MODELS: Final = "Models"
CARRYING: Final = "Models in and out"
LOOKING: Final = "What goes on"
SETTING_UP: Final = "Setting up"
"""Heads of the verbs that belong together."""
OTHER: Final = "Commands"
_ELSEWHERE: Final = {
    **dict.fromkeys(("start", "serve", "up"), "run"),
    **dict.fromkeys(("remove", "delete", "del"), "rm"),
    **dict.fromkeys(("pull", "add", "fetch"), "warm"),
    **dict.fromkeys(("status", "info"), "stats"),
    **dict.fromkeys(("setup", "client"), "connect"),
    **dict.fromkeys(("check", "diagnose"), "doctor"),
    **dict.fromkeys(("gc", "clean", "cleanup"), "prune"),
    "help": "--help",
    "list": "ls",
    "settings": "config",
}
"""What others call our verbs."""
_HELP: Final = ("-h, --help", "Show this and exit.")


class Verbs(typer.Typer):
    """Verbs that belong together, with our help."""

    def __init__(self, **rest: Any) -> None:
        super().__init__(cls=Group, rich_markup_mode=None, add_completion=False, **rest)

    def command(self, name: str | None = None, **rest: Any) -> Callable[[CommandFunctionType], CommandFunctionType]:
        """As typer's."""
        return super().command(name, **({"cls": Command} | rest))


class Command(TyperCommand):
    """A verb."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        formatter.write("\n".join(help_lines(self, ctx.command_path, help_width())) + "\n")


class Group(TyperGroup):
    """Verbs behind one word."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As typer's, with a hint where the word of another program was meant."""
        verb = _ELSEWHERE.get(args[0], "") if args and args[0] not in self.commands else ""
        if verb.partition(" ")[0] in {*self.commands, "--help"}:
            ctx.fail(f"No such command {args[0]!r}. Did you mean '{ctx.command_path} {verb}'?")
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        formatter.write("\n".join(help_lines(self, ctx.command_path, help_width())) + "\n")


def help_lines(command: Any, path: str, width: int) -> list[str]:
    """Return the lines of the help for a command of typer's parser that was called as `path`."""
    lines = textwrap.wrap(f"Usage: {usage(command, path)}", width, subsequent_indent=" " * 7)
    lines += ["", *textwrap.wrap(command.help or "", width)]
    panels: dict[str, list[tuple[str, str]]] = {
        "Arguments": [(metavar(each), meaning(each)) for each in of_kind(command, "argument")],
        "Options": [*((term(each), meaning(each)) for each in of_kind(command, "option")), _HELP],
    }
    for name, child in getattr(command, "commands", {}).items():
        panel = getattr(child, "rich_help_panel", None)
        panels.setdefault(panel if isinstance(panel, str) else OTHER, []).append((name, child.help or ""))
    for title, rows in panels.items():
        if rows:
            lines += ["", f"{title}:", *term_lines(rows, width)]
    return lines


def usage(command: Any, path: str) -> str:
    """Return how the command is called."""
    words = [path, "[OPTIONS]", *(metavar(each) for each in of_kind(command, "argument"))]
    if hasattr(command, "commands"):
        words.append("[COMMAND]" if command.invoke_without_command else "COMMAND")
    return " ".join(words)


def term(parameter: Any) -> str:
    """Return how an option is written."""
    return f"{', '.join(parameter.opts)} {metavar(parameter)}".strip()


def metavar(parameter: Any) -> str:
    """Return what stands for the value, "" for a flag."""
    if parameter.metavar or getattr(parameter, "is_flag", False):
        return parameter.metavar or ""
    if choices := getattr(parameter.type, "choices", None):
        return f"[{'|'.join(str(getattr(choice, 'value', choice)) for choice in choices)}]"
    return "PATH" if "path" in type(parameter.type).__name__.lower() else "TEXT"


def meaning(parameter: Any, *, quote: str = "") -> str:
    """Return what an argument or option is for, with its default; names are between `quote`s."""
    default = getattr(parameter.default, "value", parameter.default)
    parts = [parameter.help or ""]
    if parameter.param_type_name == "option" and parameter.required:
        parts.append("Required.")
    if parameter.show_default and default not in (None, False, ""):
        parts.append(f"Default: {quote}{default}{quote}.")
    if parameter.envvar:
        parts.append(f"Else {quote}{parameter.envvar}{quote} of the environment.")
    return " ".join(parts)


def of_kind(command: Any, kind: str) -> list[Any]:
    """Return its arguments or its options."""
    return [parameter for parameter in command.params if parameter.param_type_name == kind]


def term_lines(rows: Sequence[tuple[str, str]], width: int) -> Iterator[str]:
    """Yield two columns, terms and what they mean; a name that is too long for the left one has a line of its own."""
    indent = 4 + max((len(name) for name, _ in rows if len(name) <= _TERMS), default=0)
    for name, text in rows:
        lines = textwrap.wrap(text, width - indent, break_on_hyphens=False) or [""]
        if len(name) > indent - 4:
            lines.insert(0, "")
        for left, right in zip_longest([f"  {name}"], lines, fillvalue=""):
            yield f"{left:{indent}}{right}".rstrip()


def help_width() -> int:
    """Return how wide the help may be here."""
    return min(shutil.get_terminal_size().columns, WIDEST)

"""commands: each that a program may use is documented, with its method and its arguments."""

import ast
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any, Final

from pullthrough.admin.command import Command, Look
from pullthrough.admin.commands import Commands

PAGE: Final = Path(__file__).parents[3] / "docs" / "command-line.md"
OWN: Final = {"admit", "mend"}
"""What only the command line asks, in the middle of its own work."""


def arguments(command: Command) -> set[str]:
    """Return the names that a command takes of its arguments."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(command.run)))
    return {
        str(ast.literal_eval(node.args[0]))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "arguments"
    }


def test_commands_are_documented() -> None:
    """The table of docs/command-line.md has them all, and no other."""
    nothing: Any = None
    commands = Commands(
        nothing, nothing, nothing, nothing, pins=(), options=[], count=nothing, pulls=nothing, services=nothing
    )
    table = {name: command for name, command in commands.table().items() if name not in OWN}
    documented = {}
    for paths, method, taken in re.findall(
        r"^\| (`/v1/[^|]*) \| (GET|POST) \| ([^|]*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    ):
        for path in re.findall(r"`/v1/(\w+)`", paths):
            documented[path] = method, set(re.findall(r"`(\w+)`", taken))
    assert documented == {
        name: ("GET" if isinstance(command, Look) else "POST", arguments(command)) for name, command in table.items()
    }

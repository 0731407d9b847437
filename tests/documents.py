"""What the pages of docs/ take from the code: tables and lists between two comments.

`python -m tests.documents` writes them anew; tests/e2e/test_docs.py fails while a page has another text. The figures of
docs/benchmarks.md are not among them: only a measurement makes those (`scripts/bench --docs`).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import typer.main

from pullthrough.cli import app as cli
from pullthrough.cli import help_text
from pullthrough.config.options import OPTIONS
from tests import doctor_faults, faults, gotchas, security
from tests.bench import report
from tests.support.blocks import with_block

DOCS: Final = Path(__file__).parents[1] / "docs"
_DEFAULTS: Final = {
    "dir": "the user's data folder",
    "certs": "`certs/` of the checkout, else the user's configuration folder",
    "blob_host": "R2's host",
}
"""Two depend on the machine, and one is a host name too long for a table."""


def options() -> str:
    """Return the table of all options with their defaults."""
    rows = []
    for option in OPTIONS:
        default = _DEFAULTS.get(option.name) or (f"`{option.default}`" if option.default else "")
        rows.append(_row(f"`{option.name}`", default, option.help))
    return "\n".join([_row("name", "default", "meaning"), _row(*["---"] * 3), *rows])


def commands() -> dict[str, Any]:
    """Return each verb of `ollama-cache` as the parser knows it, `ca renew` under both words."""
    found = {}
    for name, command in _group(cli.app).commands.items():
        found[name] = command
        for inner, child in getattr(command, "commands", {}).items():
            found[f"{name} {inner}"] = child
    return found


def verbs() -> str:
    """Return a section for each verb: what it does, its arguments and its options.

    From the parser, as `--help` is.
    """
    return "\n\n".join("\n\n".join(_section(name, command)) for name, command in commands().items())


def _section(name: str, command: Any) -> Iterator[str]:
    yield f"### `{name}`"
    yield f"{command.help}"
    if name == "run":
        yield "`ollama-cache run [OPTIONS OF MITMDUMP]`"
        return
    yield f"`{help_text.usage(command, f'ollama-cache {name}')}`"
    named = [(help_text.metavar(each), each) for each in help_text.of_kind(command, "argument")]
    named += [(help_text.term(each), each) for each in help_text.of_kind(command, "option")]
    rows = [_row(f"`{_escaped(words)}`", help_text.meaning(each, quote="`")) for words, each in named]
    if rows:
        yield "\n".join([_row("argument or option", "meaning"), _row("---", "---"), *rows])


def _group(app: typer.Typer) -> Any:
    """Return typer's parser; which classes it is made of depends on the version."""
    return typer.main.get_command(app)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def _escaped(text: str) -> str:
    """Return a text for the cell of a table."""
    return text.replace("|", r"\|")


BLOCKS: Final[dict[str, dict[str, Callable[[], str]]]] = {
    "options.md": {"options": options},
    "command-line.md": {"verbs": verbs},
    "who-gets-what.md": {"who gets what": security.markdown},
    "compatibility.md": {"faults": faults.markdown, "traps": gotchas.markdown},
    "troubleshooting.md": {"doctor's faults": doctor_faults.markdown},
    "benchmarks.md": {"bench rows": report.rows_block},
}
"""By page and name."""


def generated(page: str, text: str) -> str:
    """Return the text of a page with its blocks as the code has them now."""
    for name, make in BLOCKS.get(page, {}).items():
        text = with_block(text, name, make())
    return text


def main() -> None:
    """Write the pages, and what the verbs say."""
    for page in BLOCKS:
        path = DOCS / page
        path.write_text(generated(page, path.read_text(encoding="utf-8")), encoding="utf-8")
    from tests import screens  # which takes the verbs from here

    screens.write()


if __name__ == "__main__":
    main()

"""The command about the options, and what `run --help` says about them.

Invariant: the help, the file that `--init` writes and the parser go by one table.
"""

import os
import textwrap
from pathlib import Path
from typing import Annotated, Final

import typer

from pullthrough.admin.client import ask
from pullthrough.cli.common import AsJson, Folder, fail, folder_of, own_choices, print_json, print_lines, refusals
from pullthrough.cli.help_text import LOOKING, Verbs, term_lines
from pullthrough.config import paths
from pullthrough.config.config_file import template
from pullthrough.config.options import GROUPS, environment_texts
from pullthrough.config.sources import DEFAULT, new_config_file
from pullthrough.core.errors import NoDaemon
from pullthrough.core.humanize import columns

app = Verbs()

_USAGE: Final = "Usage: ollama-cache run [--set ollama_cache_NAME=VALUE]... [OPTIONS OF MITMDUMP]"
_WHAT: Final = """\
Run the cache: mitmdump with the addon. Each option is given as --set ollama_cache_NAME=VALUE, in the environment as
OLLAMA_CACHE_NAME=VALUE, or in a file as NAME = "VALUE"; the first of these counts. `ollama-cache config --init`
writes such a file, `ollama-cache config` shows the values in force."""
_MITMDUMP: Final = (
    ("--listen-port PORT", "Where clients find the proxy (8080)."),
    ("--listen-host HOST", "On which address; all, if it is not given. The port of `listen` has its own."),
    ("--mode MODE", "regular, transparent or reverse:https://HOST; see docs/gateway.md."),
    ("--help-mitmdump", "All of them."),
)


@app.command(rich_help_panel=LOOKING)
def config(
    init: Annotated[
        bool,
        typer.Option("--init", help="Write a configuration file with every option as a comment.", show_default=False),
    ] = False,
    dir: Folder = None,  # noqa: A002 -- the option's name
    json: AsJson = False,
) -> None:
    """Show the options in force, and where each comes from."""
    if init:
        return _write(dir)
    with refusals():
        try:
            rows = ask(folder_of(dir), "config", {})
        except NoDaemon:
            rows = own_choices(dir).rows()
    if json:
        return print_json(rows)
    table = [(row["name"], row["source"], row["value"]) for row in rows]
    return print_lines(columns([("OPTION", "FROM", "VALUE"), *table]))


def _write(given: Path | None) -> None:
    """Make the file, where the cache that runs looks for it, else one that is started from here.

    One that is there may hold what somebody has chosen.
    """
    with refusals():
        try:
            rows = {row["name"]: row for row in ask(folder_of(given), "config", {})}
        except NoDaemon:
            rows = {}
            said = environment_texts(os.environ)
            store = str(given.expanduser()) if given is not None else said.get("dir", "")
            named, defaults = said.get("config", ""), {}
        else:
            named = rows["config"]["value"]
            store = "" if rows["dir"]["source"] == DEFAULT else rows["dir"]["value"]
            defaults = {name: rows[name]["value"] for name in ("dir", "certs")}
        path = new_config_file(named, store)
        own = {"dir": store or str(paths.default_store()), "certs": str(paths.default_certs())}
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(template(own | defaults))
        except FileExistsError:
            fail(f"expected no {path} yet, got one, which is left as it is; edit it, or move it away first")
    restart = ", and the cache that runs is started again" if rows else ""
    print_lines([f"wrote {path}; it changes nothing until a line loses its #{restart}"])


def run_help(width: int) -> list[str]:
    """Return the lines of `run --help`: our options by group, and the way to mitmdump's."""
    lines = [*textwrap.wrap(_USAGE, width, subsequent_indent=" " * 7), "", *textwrap.wrap(_WHAT, width), ""]
    for group, options in GROUPS.items():
        texts = {each.name: each.help + (f" Default: {each.default}." if each.default else "") for each in options}
        lines += [f"{group}:", *term_lines(list(texts.items()), width), ""]
    return [*lines, "Of mitmdump's own options you may need:", *term_lines(_MITMDUMP, width)]

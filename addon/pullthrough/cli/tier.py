"""What the commands do with the fleet's object store, by `--tier`.

Invariant: only the daemon talks to the object store, which has its credentials and the fleet's secret.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pullthrough.admin.client import ask
from pullthrough.cli.common import fail, folder_of, print_json, print_lines, refusals
from pullthrough.core.errors import NoDaemon
from pullthrough.core.humanize import count_text, size_text

OnTier = Annotated[
    bool, typer.Option("--tier", help="In the fleet's object store; the cache must run.", show_default=False)
]


def ask_tier(
    given: Path | None,
    verb: str,
    arguments: Mapping[str, Any],
    on_progress: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> Any:
    """Return the result of the daemon's command; exits with one line if there is no daemon."""
    with refusals():
        try:
            return ask(folder_of(given), verb, arguments, on_progress=on_progress)
        except NoDaemon as error:
            fail(f"{error}; start it with `ollama-cache run`")


def verify(given: Path | None, *, json: bool) -> None:
    """Report what is wrong there; exit 1 if anything was."""
    found = ask_tier(given, "tier-verify", {})
    if json:
        print_json(found)
    else:
        wrong = [f"removed {finding['object']}: {finding['problem']}" for finding in found["findings"]]
        checked = f"{count_text(found['checked'], 'object')}, {size_text(found['bytes'])}"
        print_lines([*wrong, f"checked {checked}: {len(wrong)} wrong"])
    raise typer.Exit(1 if found["findings"] else 0)


def facts(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of `stats`."""
    counts = (state["corrupt"], "corrupt blob"), (state["forged"], "forged document"), (state["failures"], "failure")
    bad = ", ".join(count_text(*each) for each in counts)
    uploaded = count_text(state["uploaded"], "blob")
    return [
        ("tier", f"{state['state']}; {bad}"),
        ("from it", f"{size_text(state['recorded_bytes'])}, {count_text(state['manifests'], 'manifest')}"),
        ("to it", f"{size_text(state['uploaded_bytes'])}, {uploaded}; {state['waiting']} waiting"),
    ]

"""The commands about models: what is stored, what stays, what goes.

Invariant: changes to the store are made by the daemon that holds it, or under its lock; commands that only read create
and lock nothing. Standard output is the answer (plain columns, or JSON with stable keys), standard error is for errors:
exit 1, or 2 for wrong usage. Heavy modules are imported only when needed.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pullthrough.admin.client import ask
from pullthrough.cli import tier as fleet_tier
from pullthrough.cli.common import (
    AsJson,
    Folder,
    fail,
    folder_of,
    own_settings,
    print_json,
    print_lines,
    refusals,
    table_lines,
)
from pullthrough.cli.help_text import LOOKING, MODELS, Verbs
from pullthrough.config.quantities import parse_duration
from pullthrough.core.errors import CacheError, NoDaemon, StoreError
from pullthrough.core.humanize import ago_text, columns, count_text, size_text
from pullthrough.library.listing import Order, View, beyond_models, beyond_text, chosen, detail, listing, statistics
from pullthrough.runtime.gc_pause import gc_paused

app = Verbs()

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.", show_default=False)]
Models = Annotated[list[str], typer.Argument(metavar="MODEL...", help="As for `ollama pull`.", show_default=False)]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="As for `ollama pull`.", show_default=False)]


@app.command(rich_help_panel=MODELS)
def ls(
    pattern: Annotated[
        str, typer.Argument(metavar="[PATTERN]", help="The beginning of a name, or a pattern: 'llama3*'.")
    ] = "",
    sort: Annotated[Order, typer.Option(help="What comes first: A, the biggest, or the last one pulled.")] = (
        Order.PULLED
    ),
    dir: Folder = None,  # noqa: A002 -- the option's name
    json: AsJson = False,
) -> None:
    """List the stored models."""
    views: list[View] = []

    def look(view: View) -> Any:
        views.append(view)
        return listing(view)

    rows = chosen(_look(dir, "ls", {}, look), pattern, sort)
    if json:
        return print_json(rows)
    now = time.time()
    table = [("NAME", "ID", "SIZE", "HELD", "PULLED", "PINNED")]
    for row in rows:
        pulled = ago_text(now - row["pulled"] if row["pulled"] else None)
        pinned = "yes" if row["pinned"] else ""
        table.append((row["name"], row["id"], size_text(row["size"]), row["held"], pulled, pinned))
    total = f"{count_text(len(rows), 'model')}, {size_text(sum(row['size'] for row in rows))}"
    # What was read before is not read twice.
    sums = beyond_models(views[0]) if views else _look(dir, "stats", {}, statistics)
    rest = [f"on the disk: {beyond}"] if not pattern and (beyond := beyond_text(sums)) else []
    return print_lines([*table_lines(table, elastic=0, spare=(1,)), "", total, *rest])


@app.command(rich_help_panel=LOOKING)
def ps(dir: Folder = None, json: AsJson = False) -> None:  # noqa: A002
    """List what is being recorded."""
    folder = folder_of(dir)
    with refusals():
        try:
            rows = ask(folder, "ps", {})
        except NoDaemon as error:
            fail(f"nothing is being recorded: {error}; start it with `ollama-cache run`")
    if json:
        return print_json(rows)
    if not rows:
        return print_lines(["nothing is being recorded"])
    now = time.time()
    table = [("MODEL", "DIGEST", "SIZE", "DONE", "RATE", "READERS", "SINCE")]
    for row in rows:
        share = f"{100 * row['present'] // row['size']}%" if row["size"] else "?"
        table.append(
            (
                row["model"] or "unknown yet",
                row["digest"][7:19],
                size_text(row["size"]) if row["size"] is not None else "?",
                share,
                f"{size_text(row['rate'])}/s",
                str(row["readers"]),
                ago_text(now - row["since"]),
            )
        )
    return print_lines(table_lines(table, elastic=0, spare=(6, 1)))


@app.command(rich_help_panel=MODELS)
def show(model: Model, dir: Folder = None, json: AsJson = False) -> None:  # noqa: A002
    """Show one model: its layers, times, and who may have it."""
    found = _look(dir, "show", {"model": model}, lambda view: detail(view, model))
    if json:
        return print_json(found)
    now = time.time()
    facts = [
        ("name", found["name"]),
        ("host", found["host"]),
        ("digest", found["digest"]),
        *([("list", found["list"])] if found["list"] else []),
        ("size", size_text(found["size"])),
        ("held", found["held"]),
        ("pulled", ago_text(now - found["pulled"] if found["pulled"] else None)),
        ("confirmed", ago_text(now - found["confirmed"] if found["confirmed"] else None)),
        ("visibility", found["visibility"]),
        ("pinned", "yes" if found["pinned"] else "no"),
    ]
    lines = columns(facts)
    if found["layers"] or not found["children"]:
        lines += ["", *_layer_lines(found["layers"])]
    for child in found["children"]:
        title = " ".join(filter(None, [child["runner"] or "unnamed", child["format"], (child["digest"] or "")[7:19]]))
        lines += ["", f"{title}{'' if child['held'] else ': not held'}"]
        if child["layers"]:
            lines += _layer_lines(child["layers"])
    return print_lines(lines)


def _layer_lines(layers: list[Any]) -> list[str]:
    table = [("LAYER", "SIZE", "HELD", "MEDIA TYPE")]
    for layer in layers:
        held = "yes" if layer["held"] else "no"
        table.append((layer["digest"][7:19], size_text(layer["size"]), held, layer["media_type"]))
    return table_lines(table, elastic=3)


@app.command(rich_help_panel=MODELS)
def rm(
    models: Models,
    unpin: Annotated[
        bool,
        typer.Option("--unpin", "--force", help="Also remove pinned models, and their pins.", show_default=False),
    ] = False,
    dir: Folder = None,  # noqa: A002
    json: AsJson = False,
) -> None:
    """Remove models, and the blobs that no other model needs."""
    arguments = {"models": models, "unpin": unpin}
    done = _change(dir, "rm", arguments, lambda maintenance: maintenance.remove(models, unpin=unpin))
    if json:
        return print_json(done)
    return print_lines(
        [
            *(f"removed {name}" for name in done["models"]),
            *(f"unpinned {pin}" for pin in done["unpinned"]),
            *(f"the pin {pin} stays, and applies when the model is pulled again" for pin in done["pins"]),
            f"{size_text(done['freed'])} freed",
        ]
    )


@app.command(rich_help_panel=MODELS)
def pin(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model, or a pattern.", show_default=False)],
    dir: Folder = None,  # noqa: A002
    json: AsJson = False,
) -> None:
    """Keep a model, or all that a pattern such as 'llama3*' names."""
    done = _change(dir, "pin", {"model": model}, lambda maintenance: _at_once(maintenance.pin, model))
    if json:
        return print_json(done)
    names = [f"    {name}" for name in done["models"]] or ["    no stored model yet; it applies when one is pulled"]
    return print_lines([f"pinned {done['pattern']}", *names])


@app.command(rich_help_panel=MODELS)
def unpin(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model or pattern, as pinned.", show_default=False)],
    dir: Folder = None,  # noqa: A002
    json: AsJson = False,
) -> None:
    """Remove a pin."""
    done = _change(dir, "unpin", {"model": model}, lambda maintenance: _at_once(maintenance.unpin, model))
    if json:
        return print_json(done)
    return print_lines(
        [f"unpinned {done['pattern']}", *(f"    {name} is kept by another pin" for name in done["still"])]
    )


@app.command(rich_help_panel=LOOKING)
def stats(dir: Folder = None, json: AsJson = False) -> None:  # noqa: A002
    """Count models and bytes: what is stored, and what was saved."""
    found = _look(dir, "stats", {}, statistics)
    if json:
        return print_json(found)
    ratio = f" ({100 * found['ratio']:.0f} % of what was served)" if found["ratio"] is not None else ""
    facts = [
        ("models", str(found["models"])),
        ("blobs", f"{found['blobs']}, {size_text(found['bytes'])}"),
        ("shared", f"{size_text(found['deduplicated_bytes'])} not stored twice"),
        ("served", size_text(found["served"])),
        ("fetched", size_text(found["fetched"])),
        ("saved", size_text(found["saved"]) + ratio),
    ]
    if found.get("bypassed_pulls"):
        pulls = count_text(found["bypassed_pulls"], "pull")
        facts.append(("past the cache", f"{pulls} by Ollama 0.35 to 0.40.2 since the start"))
    if beyond := beyond_text(found):
        facts.insert(3, ("held", beyond))
    if "services" in found:
        from pullthrough.upstream.reachability import Service

        facts.append(("fetching", found["fetching"]))
        services = (Service(**service) for service in found["services"])
        facts += [(service.role, str(service).removeprefix(f"{service.role} ")) for service in services]
    if "tier" in found:
        facts += fleet_tier.facts(found["tier"])
    days = [("DAY (UTC)", "SERVED", "FETCHED")]
    for day in found["days"][:14]:
        days.append((day["day"], size_text(day["served"]), size_text(day["fetched"])))
    return print_lines([*columns(facts), *(["", *columns(days)] if found["days"] else [])])


@app.command(rich_help_panel=MODELS)
def prune(
    age: Annotated[str, typer.Option(help="Minimum age: 0, 12h, 7d.")] = "7d",
    all: Annotated[  # noqa: A002
        bool, typer.Option("--all", help="Also models not pulled for that long.", show_default=False)
    ] = False,
    tier: fleet_tier.OnTier = False,
    dry_run: DryRun = False,
    dir: Folder = None,  # noqa: A002
    json: AsJson = False,
) -> None:
    """Remove blobs without a model, and leftovers of broken pulls."""
    try:
        age_s = parse_duration(age)
    except ValueError as error:
        raise typer.BadParameter(f"expected {error}, got {age!r}") from None
    from pullthrough.library.maintenance import would_prune

    arguments = {"age": age_s, "all": all, "dry_run": dry_run}
    if tier:
        done = fleet_tier.ask_tier(dir, "tier-prune", arguments)
    elif dry_run:
        done = _survey(dir, "prune", arguments, lambda held, pins: would_prune(held, pins, age_s=age_s, every=all))
    else:
        done = _change(dir, "prune", arguments, lambda each: each.prune(age_s=age_s, every=all, dry_run=dry_run))
    if json:
        return print_json(done)
    word = "would remove" if dry_run else "removed"
    counts = f"{count_text(done['blobs'], 'blob')} and {count_text(done['leftovers'], 'leftover')}"
    if not (done["models"] or done["blobs"] or done["leftovers"]):
        lines = ["nothing to remove"]
    else:
        lines = [*(f"{word} {name}" for name in done["models"]), f"{word} {counts}, {size_text(done['freed'])}"]
    if beyond := beyond_text(done):
        lines.append(f"on the disk now: {beyond}")
    return print_lines(lines)


@app.command(rich_help_panel=MODELS)
def warm(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="As for `ollama pull`.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="A list of models, one a line; # begins a comment.", show_default=False)
    ] = None,
    tier_only: Annotated[
        bool,
        typer.Option("--tier-only", help="Into the fleet's object store only, not to stay here.", show_default=False),
    ] = False,
    dry_run: DryRun = False,
    dir: Folder = None,  # noqa: A002
    json: AsJson = False,
) -> None:
    """Record models before anybody pulls them; the cache must run."""
    if tier_only and dry_run:
        raise typer.BadParameter("expected --tier-only or --dry-run, got both")
    wanted = [*(models or []), *(_listed(file) if file is not None else [])]
    if not wanted:
        raise typer.BadParameter("name models, or a list of them with --file")
    from pullthrough.cli.layer_progress import Layers

    results: list[Mapping[str, Any]] = []
    with refusals(), Layers(stderr=json) as layers:
        for model in wanted:
            arguments = {"models": [model], "dry_run": dry_run}
            try:
                verb = "tier-warm" if tier_only else "warm"
                (done,) = ask(folder_of(dir), verb, arguments, on_progress=layers.show)
            except NoDaemon as error:
                fail(f"{error}; start it with `ollama-cache run`")
            except CacheError as error:
                done = {"model": model, "error": str(error)}
            results.append(done)
            if "error" in done:
                typer.echo(f"ollama-cache: {done['model']}: {done['error']}", err=True)
            elif not json:
                word = "would record" if dry_run else "recorded"
                layers.say(f"{done['model']}: {word} {size_text(done['missing'])} of {size_text(done['size'])}")
    if json:
        print_json(results)
    raise typer.Exit(int(any("error" in done for done in results)))


# --- how a verb is done


def _look(given: Path | None, verb: str, arguments: Mapping[str, Any], local: Callable[[View], Any]) -> Any:
    return _survey(
        given,
        verb,
        arguments,
        lambda held, pins: local(held.view(pins)),
    )


def _survey(given: Path | None, verb: str, arguments: Mapping[str, Any], local: Callable[..., Any]) -> Any:
    """Ask the daemon, or read the store here; `local` gets a Snapshot, and all pins."""
    folder = folder_of(given)
    with refusals(), gc_paused():
        try:
            return ask(folder, verb, arguments)
        except NoDaemon:
            from pullthrough.library.snapshot import Snapshot

            settings = own_settings(given)
            held = Snapshot.read(folder, settings.index_dir)
            return local(held, (*settings.pins, *sorted(held.pins)))


def _change(given: Path | None, verb: str, arguments: Mapping[str, Any], local: Callable[[Any], Any]) -> Any:
    """Make a change through the daemon, or here; `local` is a coroutine function of a Maintenance."""
    folder = folder_of(given)
    with refusals():
        try:
            return ask(folder, verb, arguments)
        except NoDaemon:
            import asyncio
            from contextlib import closing

            from pullthrough.library.maintenance import Maintenance
            from pullthrough.runtime.platform import become_owner
            from pullthrough.store.layout import MARKER
            from pullthrough.store.store import Store

            if not (folder / MARKER).exists():
                raise StoreError(f"there is no store in {folder}; see --dir") from None
            settings = own_settings(given)
            become_owner(folder)
            with closing(Store.open(folder, settings.index_dir)) as store:
                return asyncio.run(local(Maintenance(store, settings.pins, ())))


async def _at_once(work: Callable[[str], Any], text: str) -> Any:
    return work(text)


def _listed(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        fail(f"expected a list of models in {file}: {error.strerror}")
    except UnicodeDecodeError:
        fail(f"expected a list of models in {file}, got a file that is no text")
    return [text for line in lines if (text := line.partition("#")[0].strip())]

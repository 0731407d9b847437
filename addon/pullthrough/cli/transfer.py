"""The verbs `verify`, `import` and `export` of the command line.

Invariant: results go to standard output, progress and errors to standard error, and the exit code is 0 only if
everything was done and nothing was wrong. What enters or leaves the store goes through the daemon that holds it, or
under its lock; bytes are hashed here, on all cores.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from pullthrough.admin.client import ask
from pullthrough.cli import tier as fleet_tier
from pullthrough.cli.common import AsJson, Folder, print_json, refusals, settings_in_force
from pullthrough.cli.help_text import CARRYING, MODELS, Verbs
from pullthrough.config.settings import Settings
from pullthrough.core.errors import NoDaemon, TransferRefused
from pullthrough.core.humanize import count_text

if TYPE_CHECKING:
    from pullthrough.library.import_commit import ImportOutcome, Model, Terms
    from pullthrough.library.verifier import Defect

app = Verbs()

_AT_ONCE: Final = 500
"""Findings that the running cache is told of in one request: with the longest names they still fit."""


@app.command(rich_help_panel=MODELS)
def verify(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Models to check; none: everything.")
    ] = None,
    tier: fleet_tier.OnTier = False,
    dir: Folder = None,  # noqa: A002 -- the option's name
    json: AsJson = False,
) -> None:
    """Hash every blob again and compare with the index; what is wrong is no longer served."""
    if tier and models:
        raise typer.BadParameter("--tier checks the whole object store: leave out the models, or --tier")
    if tier:
        fleet_tier.verify(dir, json=json)
    from pullthrough.cli.progress import Meter
    from pullthrough.library.verifier import check
    from pullthrough.runtime.platform import become_owner

    with refusals("; the same command goes on from here"):
        settings = settings_in_force(dir)
        become_owner(settings.dir)
        with Meter("verified") as meter:
            report = check(
                settings.dir,
                models or (),
                now=time.time(),
                index_dir=settings.index_dir,
                on_total=meter.expect,
                on_bytes=meter.advance,
            )
        mended = _mend(settings, report.findings)
    if json:
        print_json(
            {
                "checked": report.checked,
                "bytes": report.size,
                "remembered": report.remembered,
                "seconds": round(meter.seconds, 3),
                "findings": [
                    {**finding.fields(), "done": done} for finding, done in zip(report.findings, mended, strict=True)
                ],
            }
        )
    else:
        for finding, done in zip(report.findings, mended, strict=True):
            typer.echo(f"{finding}{'; ' if done else ''}{done}")
        earlier = f", {report.remembered} by the run before" if report.remembered else ""
        wrong = f"{count_text(len(report.findings), 'thing')} wrong"
        typer.echo(f"{count_text(report.checked, 'blob')} checked{earlier}, {wrong}; {meter.summary()}")
    if report.findings:
        raise typer.Exit(1)


def _mend(settings: Settings, findings: list["Defect"]) -> list[str]:
    """Return what was done about each finding."""
    done: list[str] = []
    for some in batched(findings, _AT_ONCE, strict=False):
        try:
            done += ask(settings.dir, "mend", {"findings": [finding.fields() for finding in some]})
        except NoDaemon:
            from pullthrough.library.verifier import mend
            from pullthrough.store.store import Store

            with closing(Store.open(settings.dir, settings.index_dir)) as store:
                done += [mend(store, finding, now=time.time()) for finding in some]
    return done


@app.command("import", rich_help_panel=CARRYING)
def import_models(
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR|BUNDLE]", help="A models folder of Ollama, or a bundle; none: this machine's Ollama."
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Serve the models to nobody until their registry grants them.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Also replace manifests that the registry has confirmed.")
    ] = False,
    link: Annotated[
        bool, typer.Option("--link", help="Hard links, no copies, of files that only our own user can write to.")
    ] = False,
    dir: Folder = None,  # noqa: A002 -- the option's name
    json: AsJson = False,
) -> None:
    """Import models from a folder or bundle; then everybody may pull them, unless --private is given."""
    from pullthrough.cli.progress import Meter
    from pullthrough.library.import_commit import Fate, Terms
    from pullthrough.library.importer import Bounds, Staging, take
    from pullthrough.library.snapshot import Snapshot
    from pullthrough.store.ollama_dir import default_tree

    with refusals(), Meter("imported") as meter:
        settings = settings_in_force(dir)
        source = source or default_tree(os.environ)
        if not source.exists():
            raise TransferRefused(f"{source} does not exist: name a models folder of Ollama, or a bundle")
        with _door(settings, Terms(public=not private, replace_confirmed=replace)) as admit:
            staging = Staging(
                settings.dir,
                held=Snapshot.read(settings.dir, settings.index_dir).held_sizes(),
                bounds=Bounds(settings.max_size, settings.min_free),
                link=link,
                on_total=meter.expect,
                on_bytes=meter.advance,
            )
            with staging:
                outcomes = take(source, staging, partial(admit, staging.folder))
    if json:
        models = [{"model": outcome.model, "fate": outcome.fate, "why": outcome.why} for outcome in outcomes]
        print_json({"models": models, "bytes": meter.size, "seconds": round(meter.seconds, 3)})
    else:
        for outcome in outcomes:
            typer.echo(f"{outcome.model}: {outcome.fate}{': ' if outcome.why else ''}{outcome.why}")
        imported = sum(outcome.fate is Fate.IMPORTED for outcome in outcomes)
        typer.echo(f"{count_text(imported, 'model')} imported; {meter.summary()}")
    if any(outcome.fate is Fate.REFUSED for outcome in outcomes):
        raise typer.Exit(1)


@contextmanager
def _door(settings: Settings, terms: "Terms") -> Iterator[Callable[[Path, "Model"], "ImportOutcome"]]:
    """What admits a staged model: the daemon that has the store, or we, if it is free."""
    from pullthrough.library.import_commit import MANIFEST, Fate, ImportOutcome, admit

    folder = settings.dir

    def by_daemon(staging: Path, model: "Model") -> ImportOutcome:
        (staging / MANIFEST).write_bytes(model.record.body)
        answer = ask(
            folder,
            "admit",
            {
                "staging": staging.name,
                "model": str(model.name),
                "blobs": dict(model.blobs),
                "public": terms.public,
                "replace_confirmed": terms.replace_confirmed,
            },
        )
        return ImportOutcome(answer["model"], Fate(answer["fate"]), answer["why"])

    try:
        ask(folder, "config", {})
    except NoDaemon:
        import asyncio

        from pullthrough.runtime.platform import become_owner
        from pullthrough.store.store import Store

        become_owner(folder)
        with closing(Store.open(folder, settings.index_dir)) as store:
            asyncio.run(store.settle())
            yield lambda staging, model: admit(store, staging, model, terms, now=time.time())
    else:
        yield by_daemon


@app.command(rich_help_panel=CARRYING)
def export(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Names as they are typed, or patterns.")],
    to: Annotated[str, typer.Option("--to", metavar="DIR|FILE.tar|-", help="A models folder, a bundle, or - .")],
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.", show_default=False)] = False,
    link: Annotated[
        bool,
        typer.Option(
            "--link",
            help="A folder without copies on the store's disk: reflinks or hard links; private models are left out.",
            show_default=False,
        ),
    ] = False,
    dir: Folder = None,  # noqa: A002 -- the option's name
    json: AsJson = False,
) -> None:
    """Export models: to a folder that serves as OLLAMA_MODELS, or to a bundle; - is standard output."""
    from pullthrough.cli.progress import Meter
    from pullthrough.library.exporter import (
        BUNDLE_SUFFIX,
        export_bundle,
        export_bundle_file,
        export_tree,
        overwritten,
        select,
    )
    from pullthrough.library.snapshot import Snapshot

    with refusals(), Meter("exported") as meter:
        if to == "-" and (json or sys.stdout.isatty()):
            what = "--json writes there" if json else "it is a terminal"
            raise TransferRefused(f"a bundle cannot go to standard output: {what}")
        if (packed := re.search(r"\.(t[gbx]z|tzst|zip|gz|bz2|xz|zst)$", to.lower())) is not None:
            raise TransferRefused(
                "a bundle is not compressed, because weights hardly shrink: name it .tar, or pipe `--to -` into a "
                f"program that makes a {packed[0]}"
            )
        settings = settings_in_force(dir)
        inventory = Snapshot.read(settings.dir, settings.index_dir)
        if link and (to == "-" or to.endswith(BUNDLE_SUFFIX)):
            raise TransferRefused("a bundle cannot share the store's files: name a folder, or leave out --link")
        cargo = select(inventory, models, on_left_out=partial(typer.echo, err=True) if link else None)
        if not force and (lost := overwritten(cargo, Path(to))):
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise TransferRefused(f"{lost[0]}{more}: already there, and not the same; --force replaces it")
        meter.expect(0 if link else cargo.size)
        if to == "-":
            export_bundle(inventory, cargo, sys.stdout.buffer, on_bytes=meter.advance)
        elif to.endswith(BUNDLE_SUFFIX):
            export_bundle_file(inventory, cargo, Path(to), on_bytes=meter.advance)
        else:
            export_tree(inventory, cargo, Path(to), link=link, on_bytes=meter.advance)
    if json:
        print_json({"models": cargo.models, "blobs": len(cargo.blobs), "bytes": cargo.size, "to": to})
    carried = f"{count_text(cargo.models, 'model')}, {count_text(len(cargo.blobs), 'blob')}"
    typer.echo(f"{carried}; {meter.summary()}", err=True)

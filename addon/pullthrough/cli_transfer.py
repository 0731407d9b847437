"""The verbs `verify`, `import` and `export` of the command line.

Invariant: results are on standard output, progress and errors on standard error, and the exit code is 0 only if all
was done and nothing was wrong; 130 after Ctrl-C. Knows no layout and no format.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from pullthrough import places
from pullthrough.errors import CacheError, StoreError, TransferRefused
from pullthrough.exporting import export_bundle, export_bundle_file, export_tree, select
from pullthrough.importing import Bounds, Fate, Outcome, import_bundle, import_tree
from pullthrough.inventory import Inventory
from pullthrough.meter import Meter
from pullthrough.modeltree import default_tree
from pullthrough.options import ENVIRONMENT_PREFIX, OPTIONS, parse_settings
from pullthrough.settings import Settings
from pullthrough.store import Store
from pullthrough.verifying import Finding, check, mend

Dir = Annotated[
    Path | None, typer.Option("--dir", help="The store; as the option ollama_cache_dir.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command("verify")(verify)
    app.command("import")(import_models)
    app.command("export")(export)


def verify(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Models to check; none: everything.")
    ] = None,
    dir: Dir = None,  # noqa: A002 -- the option's name
    as_json: Json = False,
) -> None:
    """Hash every blob again and hold the store against its index; what is wrong is no hit any more."""
    with _refusals("; the same command goes on from here"):
        folder = _settings(dir).dir
        with Meter("verified") as meter:
            report = check(folder, models or (), now=time.time(), on_total=meter.expect, on_bytes=meter.advance)
        mended, problem = _mend(folder, report.findings)
    if as_json:
        findings = [
            {**asdict(finding), "digest": str(finding.digest or ""), "done": mended.get(finding, "")}
            for finding in report.findings
        ]
        _print_json(
            checked=report.checked,
            bytes=report.size,
            remembered=report.remembered,
            seconds=round(meter.seconds, 3),
            findings=findings,
        )
    else:
        for finding in report.findings:
            typer.echo(f"{finding}{'; ' if mended.get(finding) else ''}{mended.get(finding, '')}")
        earlier = f", {report.remembered} by the run before" if report.remembered else ""
        typer.echo(f"{report.checked} blobs checked{earlier}, {len(report.findings)} things wrong; {meter.summary()}")
    if problem:
        _fail(f"what was found stays as it is: {problem}; stop the cache and run verify again")
    if report.findings:
        raise typer.Exit(1)


def _mend(folder: Path, findings: list[Finding]) -> tuple[dict[Finding, str], str]:
    """(what was done, why nothing could be)."""
    if not findings:
        return {}, ""
    try:
        with closing(Store.open(folder)) as store:
            return dict(mend(store, findings, now=time.time())), ""
    except (StoreError, OSError) as error:
        return {}, str(error)


def import_models(
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR|BUNDLE]", help="A models folder of Ollama, or a bundle; none: this machine's Ollama."
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Let nobody have the models until their registry grants them.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Also replace manifests that their registry has confirmed.")
    ] = False,
    link: Annotated[
        bool, typer.Option("--link", help="Hard links, no copies, of files that only our own user can write to.")
    ] = False,
    dir: Dir = None,  # noqa: A002 -- the option's name
    as_json: Json = False,
) -> None:
    """Take in models from a folder or bundle; everybody may pull them then, unless --private says otherwise."""
    with _refusals(), Meter("imported") as meter:
        settings = _settings(dir)
        source = source or default_tree(os.environ)
        if not source.exists():
            raise TransferRefused(f"expected a folder or file, got no {source}")
        try:
            store = Store.open(settings.dir)
        except StoreError as error:
            raise StoreError(f"{error}; an import needs the store for itself: stop the cache meanwhile") from error
        bounds = Bounds(settings.max_size, settings.min_free)
        with closing(store):
            if source.is_dir():
                outcomes = import_tree(
                    store,
                    source,
                    public=not private,
                    replace_confirmed=replace,
                    now=time.time(),
                    bounds=bounds,
                    link=link,
                    on_total=meter.expect,
                    on_bytes=meter.advance,
                )
            else:
                outcomes = import_bundle(
                    store,
                    source,
                    public=not private,
                    replace_confirmed=replace,
                    now=time.time(),
                    bounds=bounds,
                    on_total=meter.expect,
                    on_bytes=meter.advance,
                )
    _tell(outcomes, meter, as_json)


def _tell(outcomes: list[Outcome], meter: Meter, as_json: bool) -> None:
    if as_json:
        _print_json(models=[asdict(outcome) for outcome in outcomes], bytes=meter.size, seconds=round(meter.seconds, 3))
    else:
        for outcome in outcomes:
            typer.echo(f"{outcome.model}: {outcome.fate}{': ' if outcome.why else ''}{outcome.why}")
        typer.echo(f"{sum(outcome.fate is Fate.IMPORTED for outcome in outcomes)} models imported; {meter.summary()}")
    if any(outcome.fate is Fate.REFUSED for outcome in outcomes):
        raise typer.Exit(1)


def export(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Names as they are typed, or patterns.")],
    to: Annotated[str, typer.Option("--to", metavar="DIR|FILE.tar|-", help="A models folder, a bundle, or - .")],
    dir: Dir = None,  # noqa: A002 -- the option's name
) -> None:
    """Carry models out: to a folder that serves as OLLAMA_MODELS, or to a bundle; - is standard output."""
    with _refusals(), Meter("exported") as meter:
        if to == "-" and sys.stdout.isatty():
            raise TransferRefused("expected standard output to be a file or pipe, got a terminal")
        inventory = Inventory.read(_settings(dir).dir)
        cargo = select(inventory, models)
        meter.expect(cargo.size)
        if to == "-":
            export_bundle(inventory, cargo, sys.stdout.buffer, on_bytes=meter.advance)
        elif to.endswith(".tar"):
            export_bundle_file(inventory, cargo, Path(to), on_bytes=meter.advance)
        else:
            export_tree(inventory, cargo, Path(to), on_bytes=meter.advance)
    typer.echo(f"{len(cargo.manifests)} models, {len(cargo.blobs)} blobs; {meter.summary()}", err=True)


def _settings(folder: Path | None) -> Settings:
    texts = {
        option.name: value
        for option in OPTIONS
        if (value := os.environ.get(f"{ENVIRONMENT_PREFIX}{option.name.upper()}"))
    }
    if folder is not None:
        texts["dir"] = str(folder)
    return parse_settings(texts, dir=places.default_store(), certs=places.default_certs())


def _print_json(**document: object) -> None:
    typer.echo(json.dumps(document, indent=2))


@contextlib.contextmanager
def _refusals(hint: str = "") -> Iterator[None]:
    """What cannot be done is said in one line, and so is Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"ollama-cache: interrupted{hint}", err=True)
        raise typer.Exit(130) from None
    except (CacheError, OSError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    console = Console(stderr=True, emoji=False, highlight=False, markup=False, soft_wrap=True)
    console.print(f"ollama-cache: {message}")
    raise typer.Exit(1)

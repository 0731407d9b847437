"""The layers hold: a module knows only what lies below it, and the lower two rows know no world outside."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ADDON: Final = Path(__file__).parents[1] / "addon"
PACKAGE: Final = ADDON / "pullthrough"

# From the bottom up. A module imports from the rows below its own.
ROWS: Final = {
    "L0": "errors digest route byterange intervals capability presigned cachestatus settings records datacheck"
    " chunksums coding conditional requestlog options loopguard wording gcpause jsonlog fleet addressing"
    " manifestjson termlog webpage boundedjson fields refusals",
    "L1": "assembly scheduler freshness retention access tunnel budget parent traffic catalogue pruning"
    " diagnosis breaker returns lease pulls patience connlimit distrust",
    "L2a": "store upstream datastream collapse ca platform control contents index ingest places threads looplag"
    " resolver storefolder copying inventory modeltree bundle ledger asking housekeeping admission"
    " authorities clientsetup objectstore manifesttable blobfiles modelfiles blobtable proofs surveying migration"
    " dialling clock impostors claims tls_contexts readiness byte_threads outlets tls_outlet dialer dataclient"
    " fallocate",
    "L2b": "recorder relay verifying importing exporting recording fetcher sealer supply keeper workroom cursor ahead"
    " tier uploader leaseholder nearby counters",
    "L3a": "reader",
    "L3b": "registry statuspage metrics vitals watch manifests exchange prefetch refresh grants warm verbs"
    " examining ollamadaemon tierverbs offload redirects blobs blob_content signed_addresses pings",
    "L3c": "byte_sender passing_on blob_connection door sender loopback delivery",
    "L4": "addon takeover idle_addons blobserver cli gate modes opening parentleg flows messages desk"
    " pages lookout cli_base cli_models cli_progress cli_transfer meter clientpages cli_ca cli_setup cli_tier"
    " intake drill logsetup incomplete",
}
ROW_OF: Final = {module: row for row, modules in ROWS.items() for module in modules.split()}
ORDER: Final = list(ROWS)

# Within a row only this, and it has no cycle.
SIDEWAYS: Final = {
    "digest": {"errors"},
    "route": {"digest", "errors"},
    "byterange": {"errors"},
    "capability": {"digest", "errors"},
    "settings": {"records"},
    "addressing": {"settings"},
    "options": {"addressing", "errors", "settings"},
    "requestlog": {"cachestatus"},
    "jsonlog": {"termlog"},
    "manifestjson": {"boundedjson", "digest", "errors"},
    "refusals": {"boundedjson"},
    "records": {"digest", "errors", "manifestjson"},
    "fleet": {"digest", "errors", "records"},
    "datacheck": {"byterange", "errors", "refusals"},
    "chunksums": {"datacheck", "digest", "errors"},
    "coding": {"errors"},
    "access": {"tunnel"},
    "connlimit": {"tunnel"},
    "parent": {"tunnel"},
    "diagnosis": {"parent"},
    "examining": {"manifests"},
    "ollamadaemon": {"examining"},
    "catalogue": {"traffic"},
    "scheduler": {"assembly"},
    "ingest": {"fallocate", "platform"},
    "looplag": {"clock"},
    "blobfiles": {"modeltree"},
    "proofs": {"platform"},
    "modelfiles": {"blobfiles", "modeltree", "platform"},
    "storefolder": {"blobfiles", "modeltree", "platform", "proofs"},
    "index": {"contents"},
    "ledger": {"contents", "index", "storefolder"},
    "manifesttable": {"contents", "index"},
    "blobtable": {"blobfiles", "index", "ingest", "platform", "proofs"},
    "surveying": {"blobtable", "manifesttable", "modelfiles"},
    "migration": {"blobfiles", "contents", "index", "modelfiles", "modeltree", "platform", "proofs", "storefolder"},
    "store": {
        "blobtable",
        "contents",
        "index",
        "ingest",
        "ledger",
        "manifesttable",
        "migration",
        "modelfiles",
        "platform",
        "storefolder",
        "surveying",
    },
    "authorities": {"ca"},
    "clientsetup": {"platform"},
    "control": {"asking"},
    "byte_threads": {"platform"},
    "outlets": {"platform", "readiness"},
    "tls_outlet": {"outlets", "readiness"},
    "tls_contexts": {"ca"},
    "housekeeping": {"ingest", "inventory", "store"},
    "admission": {"store"},
    "threads": {"platform"},
    "copying": {"platform"},
    "inventory": {"blobfiles", "contents", "modelfiles", "proofs", "storefolder", "surveying"},
    "modeltree": {"platform"},
    "bundle": {"modeltree"},
    "impostors": {"datastream"},
    "claims": {"store"},
    "dialer": {"resolver"},
    "dataclient": {"dialer", "threads"},
    "datastream": {"dataclient", "dialer", "threads"},
    "upstream": {"dataclient", "datastream", "dialer", "impostors", "resolver", "threads"},
    "leaseholder": {"tier"},
    "nearby": {"leaseholder", "tier"},
    "supply": {"nearby"},
    "uploader": {"tier"},
    "fetcher": {"counters", "sealer", "supply"},
    "relay": {"counters", "fetcher", "supply"},
    "workroom": {"counters", "fetcher", "keeper", "leaseholder", "nearby", "tier"},
    "recording": {"counters", "cursor", "fetcher", "relay", "sealer", "supply", "workroom"},
    "recorder": {"recording", "supply", "workroom"},
    "ahead": {"recorder", "recording"},
    "manifests": {"exchange"},
    "refresh": {"manifests"},
    "offload": {"exchange"},
    "pings": {"exchange"},
    "redirects": {"exchange", "grants", "signed_addresses"},
    "blob_content": {"exchange", "grants", "offload", "signed_addresses"},
    "blobs": {"blob_content", "exchange", "grants", "manifests", "offload", "redirects", "signed_addresses"},
    "grants": {"exchange"},
    "warm": {"manifests"},
    "verbs": {"warm"},
    "tierverbs": {"warm"},
    "metrics": {"vitals"},
    "watch": {"vitals"},
    "statuspage": {"watch"},
    "registry": {
        "blob_content",
        "blobs",
        "exchange",
        "grants",
        "manifests",
        "offload",
        "pings",
        "prefetch",
        "refresh",
        "signed_addresses",
        "warm",
    },
    "blob_connection": {"byte_sender", "passing_on"},
    "sender": {"byte_sender"},
    "loopback": {"byte_sender", "door", "sender"},
    "delivery": {"blob_connection", "byte_sender", "loopback", "passing_on"},
    "drill": {"gate", "intake"},
    "gate": {"intake", "opening", "parentleg", "takeover"},
    "blobserver": {"incomplete", "pages"},
    "clientpages": {"pages"},
    "cli_ca": {"cli_base"},
    "cli_setup": {"cli_base"},
    "cli_tier": {"cli_base"},
    "cli_models": {"cli_base", "cli_progress", "cli_tier"},
    "cli_transfer": {"cli_base", "cli_tier", "meter"},
    "cli": {"cli_base", "cli_ca", "cli_models", "cli_setup", "cli_transfer"},
    "flows": {"gate", "messages"},
    "lookout": {"pages"},
    "addon": {
        "blobserver",
        "clientpages",
        "desk",
        "drill",
        "flows",
        "gate",
        "idle_addons",
        "logsetup",
        "lookout",
        "modes",
        "parentleg",
        "takeover",
    },
}

PURE_ROWS: Final = {"L0", "L1"}
OUTSIDE_WORLD: Final = {
    *("aiohttp", "diskcache", "mitmproxy", "psutil"),
    *("asyncio", "concurrent", "multiprocessing", "select", "signal", "subprocess", "threading"),
    *("os", "shutil", "sqlite3", "tempfile"),
    *("socket", "ssl"),
    *("random", "secrets", "time"),  # time and chance are arguments there
}
# Path is a value there: what it can do to a disk is forbidden by name, but for `replace`, which str has too.
OUTSIDE_CALLS: Final = {
    *("now", "today", "utcnow"),
    *("open", "read_bytes", "read_text", "touch", "write_bytes", "write_text"),
    *("cwd", "exists", "glob", "home", "is_dir", "is_file", "iterdir", "lstat", "resolve", "rglob", "stat"),
    *("mkdir", "rmdir", "unlink"),
}
MITMPROXY_HOMES: Final = {
    *("addon", "drill", "flows", "gate", "idle_addons", "intake", "logsetup", "messages", "modes", "opening"),
    *("parentleg", "takeover"),
}
LONGEST: Final = 400  # lines; past that a module has two jobs


def package_imports(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The modules of our package that an import names; the package itself is the empty string."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            package, _, module = alias.name.partition(".")
            if package == "pullthrough":
                yield module
        return
    path = (node.module or "").split(".")
    if node.level:
        path = ["pullthrough", *filter(None, path)]
    if path[0] != "pullthrough":
        return
    if path[1:]:
        yield ".".join(path[1:])
        return
    for alias in node.names:
        is_module = alias.name in ROW_OF or (PACKAGE / f"{alias.name}.py").exists()
        yield alias.name if is_module else ""


def outside_imports(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The top-level names of what an import takes from elsewhere."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name.partition(".")[0]
    elif not node.level:
        yield (node.module or "").partition(".")[0]


def may_import(importer: str, imported: str) -> bool:
    if imported == "":
        return True  # the package's own __init__ holds a version and imports nothing
    if importer == "__init__" or imported not in ROW_OF:
        return False
    here, there = ORDER.index(ROW_OF[importer]), ORDER.index(ROW_OF[imported])
    return there < here or imported in SIDEWAYS.get(importer, set())


def called_name(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def violations(module: str, source: str) -> list[str]:
    """What a module of the package does against the layers, one line each."""
    found = []
    tree = ast.parse(source)
    row = ROW_OF.get(module, "no row" if module != "__init__" else "the package")
    if row == "no row":
        found.append(f"{module}: expected a row in ROWS, got none")
    if not ast.get_docstring(tree):
        found.append(f"{module}: expected a module docstring, got none")
    if (lines := len(source.splitlines())) > LONGEST:
        found.append(f"{module}: expected at most {LONGEST} lines, got {lines}")
    if row == "no row":
        return found
    for node in ast.walk(tree):  # all of it: an import inside a function or under TYPE_CHECKING is one too
        if isinstance(node, ast.Import | ast.ImportFrom):
            for imported in package_imports(node):
                if not may_import(module, imported):
                    there = ROW_OF.get(imported, "no row")
                    found.append(f"{module}:{node.lineno}: {row} may not import {imported} of {there}")
            for name in outside_imports(node):
                if name == "__future__":
                    found.append(f"{module}:{node.lineno}: expected no __future__ import, got one")
                if row in PURE_ROWS and name in OUTSIDE_WORLD:
                    found.append(f"{module}:{node.lineno}: {row} may not import {name}")
                elif name == "mitmproxy" and module not in MITMPROXY_HOMES:
                    found.append(f"{module}:{node.lineno}: only {sorted(MITMPROXY_HOMES)} import mitmproxy")
        elif isinstance(node, ast.Call) and row in PURE_ROWS and called_name(node) in OUTSIDE_CALLS:
            found.append(f"{module}:{node.lineno}: {row} may not call {called_name(node)}()")
    return found


MODULES: Final = sorted(path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_module_keeps_its_layer(module: Path) -> None:
    """Every module has a row, a docstring and a bearable length, and imports only from below."""
    source = (PACKAGE / module.with_suffix(".py")).read_text(encoding="utf-8")
    assert violations(".".join(module.parts), source) == []


def test_the_package_was_found() -> None:
    """The check above is not passing for want of modules."""
    assert {Path("addon"), Path("errors"), Path("store")} <= set(MODULES)


def test_nothing_else_lives_in_addon() -> None:
    """`addon/` is the first entry of sys.path: any other file there could shadow somebody's module."""
    names = {path.name for path in ADDON.iterdir() if not path.name.startswith(".")}
    assert names - {"__pycache__"} == {"ollama_cache.py", "pullthrough"}


def test_script_imports_the_addon_alone() -> None:
    """The script that mitmdump loads names the addon and nothing else; relative imports would fail there."""
    tree = ast.parse((ADDON / "ollama_cache.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [name for node in imports for name in package_imports(node)] == ["addon"]
    assert [name for node in imports for name in outside_imports(node)] == ["pullthrough"]


def test_rows_name_each_module_once() -> None:
    """A module has one row, and what it may import beside itself is in that row."""
    assert len(ROW_OF) == len(" ".join(ROWS.values()).split())
    for module, others in SIDEWAYS.items():
        assert {ROW_OF[other] for other in others} == {ROW_OF[module]}


def test_sideways_imports_have_no_cycle() -> None:
    """Within a row, too, imports lead in one direction."""

    def reach(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"{' -> '.join([*path, module])}"
        for other in SIDEWAYS.get(module, ()):
            reach(other, (*path, module))

    for module in SIDEWAYS:
        reach(module, ())


CAUGHT: Final = {
    "upward": ("digest", "from pullthrough.store import Store", "digest:2: L0 may not import store of L2a"),
    "same-row": (
        "freshness",
        "from pullthrough.access import decide",
        "freshness:2: L1 may not import access of L1",
    ),
    "sideways-back": ("errors", "from pullthrough import digest", "errors:2: L0 may not import digest of L0"),
    "reader-from-recorder": (
        "recorder",
        "import pullthrough.reader",
        "recorder:2: L2b may not import reader of L3a",
    ),
    "relative": ("route", "from . import store", "route:2: L0 may not import store of L2a"),
    "relative-module": ("route", "from .store import Store", "route:2: L0 may not import store of L2a"),
    "in-function": ("route", "def f():\n    import pullthrough.ca", "route:3: L0 may not import ca of L2a"),
    "type-checking": (
        "route",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pullthrough.ca import Authority",
        "route:4: L0 may not import ca of L2a",
    ),
    "unknown-module": (
        "store",
        "from pullthrough.misc import x",
        "store:2: L2a may not import misc of no row",
    ),
    "from-init": (
        "__init__",
        "from pullthrough.errors import X",
        "__init__:2: the package may not import errors of L0",
    ),
    "clock-module": ("freshness", "import time", "freshness:2: L1 may not import time"),
    "socket": ("tunnel", "from socket import getaddrinfo", "tunnel:2: L1 may not import socket"),
    "asyncio": ("scheduler", "import asyncio.events", "scheduler:2: L1 may not import asyncio"),
    "mitmproxy-low": ("route", "from mitmproxy import http", "route:2: L0 may not import mitmproxy"),
    "mitmproxy-high": (
        "registry",
        "from mitmproxy import http",
        f"registry:2: only {sorted(MITMPROXY_HOMES)} import mitmproxy",
    ),
    "open": ("settings", "x = open('y')", "settings:2: L0 may not call open()"),
    "path-open": ("settings", "x = path.open()", "settings:2: L0 may not call open()"),
    "clock-call": ("capability", "x = datetime.now(UTC)", "capability:2: L0 may not call now()"),
    "future": (
        "store",
        "from __future__ import annotations",
        "store:2: expected no __future__ import, got one",
    ),
}


@pytest.mark.parametrize(("module", "body", "expected"), CAUGHT.values(), ids=CAUGHT.keys())
def test_violation_is_caught(module: str, body: str, expected: str) -> None:
    """The checker sees each kind of breach."""
    assert violations(module, f'"""A job."""\n{body}\n') == [expected]


def test_missing_row_docstring_and_length_are_caught() -> None:
    """A new file without a row fails, and so do a bare and an endless module."""
    assert violations("novelty", "x = 1\n" * 401) == [
        "novelty: expected a row in ROWS, got none",
        "novelty: expected a module docstring, got none",
        "novelty: expected at most 400 lines, got 401",
    ]


@pytest.mark.parametrize(
    ("module", "body"),
    [
        pytest.param("store", "from pullthrough.digest import Digest", id="downward"),
        pytest.param("route", "from pullthrough.digest import Digest", id="sideways-as-listed"),
        pytest.param("settings", "from pathlib import Path", id="path-value"),
        pytest.param("takeover", "from mitmproxy import http", id="mitmproxy-at-home"),
        pytest.param("upstream", "import asyncio, time\nx = open('y')", id="world-above-the-pure-rows"),
        pytest.param("addon", "from pullthrough import __version__", id="name-of-the-package"),
    ],
)
def test_allowed_import_passes(module: str, body: str) -> None:
    """What the table allows is not reported."""
    assert violations(module, f'"""A job."""\n{body}\n') == []


def test_the_picture_is_the_house() -> None:
    """The package's docstring shows each module in its row."""
    picture = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))) or ""
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    shown: dict[str, str] = {}
    for row, words in re.findall(r"^ +(L\d\w?) (.*(?:\n {8}.*)*)", picture, re.MULTILINE):
        shown |= dict.fromkeys(modules.intersection(re.findall(r"\w+", words)), row)
    assert shown == {module: ROW_OF[module] for module in modules}

"""The command line of the benchmark; tests/bench does the measuring."""

import argparse
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from tests.bench import report
from tests.bench.figures import Bench, machine
from tests.bench.load import Load
from tests.bench.rows import ROWS

ROOT: Final = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description="Measure the cache against nginx, stock mitmdump and clients going direct."
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; default: all")
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="rounds, the sides in turns (default 3)")
    parser.add_argument("--quick", action="store_true", help="only see that it works: one round, small sizes")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="measure nothing: tell this JSON again"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the ratios there")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/benchmarks.md")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.rows if name not in ROWS]:
        parser.error(f"expected rows of {', '.join(ROWS)}, got {unknown[0]}")
    if arguments.pairs < 1:
        parser.error(f"expected at least 1 pair, got {arguments.pairs}")
    if arguments.docs and (arguments.quick or arguments.rows):
        parser.error("expected a full run for --docs, got --quick or some rows")
    if arguments.plot and find_spec("matplotlib") is None:
        parser.error("expected matplotlib for --plot, got none: it is in the extra `dev`")
    if arguments.source:
        document = json.loads(arguments.source.read_text())
    else:
        if sys.platform != "linux":
            parser.error(f"expected Linux (/proc), got {sys.platform}")
        if shutil.which("nginx") is None:
            parser.error("expected nginx on PATH, got none: install it")
        names = arguments.rows or list(ROWS)
        document = measure(names, pairs=arguments.pairs, is_quick=arguments.quick, file=arguments.json)
    Console(width=max(160, shutil.get_terminal_size().columns)).print(report.table(document), highlight=False)
    if arguments.plot:
        report.plot(document, arguments.plot)
    if arguments.docs:
        path = ROOT / "docs" / "benchmarks.md"
        path.write_text(report.page(path.read_text(encoding="utf-8"), document), encoding="utf-8")


def measure(names: list[str], *, pairs: int, is_quick: bool, file: Path | None) -> dict[str, Any]:
    """Return the document; each figure is also told on the way, and each row kept in `file`: a run takes half an
    hour.
    """
    rows: dict[str, Any] = {}
    pairs = 1 if is_quick else pairs
    document = {"machine": machine(), "pairs": pairs, "quick": is_quick, "rows": rows}
    print(report.machine(document), file=sys.stderr)
    with Load() as load:
        bench = Bench(load, pairs, is_quick)
        for name in names:
            row = rows[name] = {"about": ROWS[name].about, "limit": ROWS[name].limit, "figures": []}
            print(f"\n{name}: {ROWS[name].about}", file=sys.stderr)
            for figure in ROWS[name].measure(bench):
                row["figures"].append(figure.to_json())
                shown = next(report.lines({"rows": {name: {"figures": [figure.to_json()]}}}))
                print("  " + " | ".join(cell for cell in shown[1:] if cell), file=sys.stderr, flush=True)
            if file is not None:
                file.write_text(json.dumps(document, indent=2) + "\n")
    return document


if __name__ == "__main__":
    main()

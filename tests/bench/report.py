"""How results are told: a table for the terminal, the two blocks of docs/benchmarks.md, a plot.

**Invariant**: every number shown is in the JSON document, which is all that is told from:
`{"machine", "pairs", "quick", "rows": {name: {"about", "limit", "figures": [{"what", "unit", "sides", "ratios"}]}}}`.
Knows nothing of measuring.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tests.bench.figures import OURS
from tests.bench.rows import ROWS, Row
from tests.support.blocks import with_block

Document = Mapping[str, Any]
TIMES: Final = "\N{MULTIPLICATION SIGN}"
HEAD: Final = ("row", "what", "the cache", f"beside it (the cache is so many {TIMES} as good)", "also")


def number(value: float) -> str:
    """Three significant digits, more only of what is a thousand or larger."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) >= 0.01 else f"{value:.2g}"


def lines(document: Document) -> Iterator[tuple[str, ...]]:
    """The cells of each line, by HEAD."""
    for name, row in document["rows"].items():
        for figure in row["figures"]:
            unit, sides = figure["unit"], figure["sides"]
            others = []
            for side, sample in sides.items():
                if side != OURS:
                    ratio = f" ({number(figure['ratios'][side])} {TIMES})" if side in figure["ratios"] else ""
                    others.append(f"{side} {_with_unit(sample[unit], unit)}{ratio}")
            ours = _with_unit(sides[OURS][unit], unit) if OURS in sides else ""
            yield name, figure["what"], ours, "; ".join(others), "; ".join(_also(unit, sides))


def _also(unit: str, sides: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """The other metrics, side by side in the order of the sides."""
    metrics = dict.fromkeys(metric for sample in sides.values() for metric in sample if metric != unit)
    for metric in metrics:
        values = [number(sample[metric]) for sample in sides.values() if metric in sample]
        yield f"{metric} {' / '.join(values)}"


def _with_unit(value: float, unit: str) -> str:
    """A unit with a qualification (`p50 ms`) keeps it before the number."""
    *before, last = unit.split(" ")
    return " ".join([*before, number(value), last])


def machine(document: Document) -> str:
    """One line on what it was measured on."""
    facts = document["machine"]
    return (
        f"{facts['cores']} cores ({facts['processor'] or 'of an unknown kind'}), {facts['memory GiB']} GiB, "
        f"{facts['system']}, Python {facts['Python']}; load {facts['load at the start']} at the start; "
        f"medians of {document['pairs']} rounds"
    )


def table(document: Document) -> Table:
    """For the terminal."""
    result = Table(*HEAD, box=SIMPLE_HEAD)
    for cells in lines(document):
        result.add_row(*cells)
    return result


def figures_block(document: Document) -> str:
    """Return the table of docs/benchmarks.md with the machine above it."""
    cells = [("`" + name + "`", *rest) for name, *rest in lines(document)]
    rows = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in (HEAD, ("---",) * len(HEAD), *cells)]
    return f"Measured on {machine(document)}.\n\n" + "\n".join(rows)


def rows_block(rows: Mapping[str, Row] = ROWS) -> str:
    """Return the list of what each row does and what limits it."""
    return "\n".join(f"- `{name}`: {row.about} *Limited by* {row.limit}." for name, row in rows.items())


def page(text: str, document: Document) -> str:
    """Return docs/benchmarks.md with both blocks made anew. Raises ValueError for a quick run."""
    if document["quick"]:
        raise ValueError("expected a full run, got one of --quick")
    return with_block(with_block(text, "bench figures", figures_block(document)), "bench rows", rows_block())


def plot(document: Document, path: Path) -> None:
    """A PNG of all ratios on a logarithmic scale, a colour for each that is compared with; ImportError as it comes."""
    # Not everybody who measures plots: the library is in the `dev` extra.
    from matplotlib.figure import Figure

    bars = [
        (f"{name}: {figure['what']}", side, ratio)
        for name, row in document["rows"].items()
        for figure in row["figures"]
        for side, ratio in figure["ratios"].items()
    ]
    bars.reverse()
    names = list(dict.fromkeys(side for _, side, _ in reversed(bars)))
    figure = Figure(figsize=(12, 1.4 + 0.24 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    for index, side in enumerate(names):
        places = [place for place, bar in enumerate(bars) if bar[1] == side]
        drawn = axes.barh(
            places, [bars[place][2] - 1 for place in places], left=1, color=f"C{index}", label=f"than {side}"
        )
        axes.bar_label(drawn, [f"{number(bars[place][2])} {TIMES}" for place in places], padding=3, fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.15, y=0.01)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars], fontsize=8)
    axes.set_xlabel("times as good (1 is equal; to the right the cache is better)")
    axes.set_title(machine(document), fontsize=8)
    if names:
        axes.legend(loc="best", fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})

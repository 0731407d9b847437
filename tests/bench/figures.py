"""Samples of several sides, taken in turns, and what is made of them.

**Invariant**: the sides of a figure alternate within a round, and a ratio is the median of the rounds' own ratios, so
that what slows the machine for a while slows all sides. Knows nothing of what is measured.
"""

import itertools
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from tests.bench.load import Load

OURS: Final = "the cache"
Sample = dict[str, float]
"""Metrics by name with their unit; the first is the one that is compared."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table."""

    what: str
    unit: str
    """Of the metric that is compared: more is better if it is a rate, less if it is a time."""
    sides: Mapping[str, Sample]
    """Medians; a side's first metric is named by the unit."""
    ratios: Mapping[str, float] = field(default_factory=dict)
    """How many times as good as each other side the cache is: above 1 it is the better one."""

    @classmethod
    def single(cls, what: str, samples: list[Sample], *, side: str = OURS) -> Self:
        """A figure of one side alone."""
        middle = _median(samples)
        return cls(what, next(iter(middle)), {side: middle})

    @property
    def more_is_better(self) -> bool:
        """Whether the unit is a rate."""
        return is_rate(self.unit)

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return {"what": self.what, "unit": self.unit, "sides": self.sides, "ratios": self.ratios}


@dataclass(frozen=True, slots=True)
class Bench:
    """What a row is given."""

    load: Load
    pairs: int
    """How many rounds count."""
    is_quick: bool
    """Whether it is only to be seen that it works: sizes and times are a small part then."""

    def size(self, full: int) -> int:
        """Bytes of a blob."""
        return full // 32 if self.is_quick else full

    def seconds(self, full: float) -> float:
        """How long something is kept up."""
        return full / 8 if self.is_quick else full

    def compare(
        self, what: str, sides: Mapping[str, Callable[[int], Sample]], *, warm: bool = True, pairs: int = 0
    ) -> Figure:
        """Call the sides in turns with the number of the round; a first round does not count if `warm`."""
        samples: dict[str, list[Sample]] = {name: [] for name in sides}
        rounds = (pairs or self.pairs) + warm
        for number in range(rounds):
            for name, measure in sides.items():
                sample = measure(number)
                if number or not warm:
                    samples[name].append(sample)
        unit = next(iter(samples[OURS][0]))
        ratios = {
            name: statistics.median(
                a[unit] / b[unit] if is_rate(unit) else b[unit] / a[unit]
                for a, b in zip(samples[OURS], other, strict=True)
            )
            for name, other in samples.items()
            if name != OURS
        }
        return Figure(what, unit, {name: _median(found) for name, found in samples.items()}, ratios)

    @property
    def rounds(self) -> range:
        """The numbers of the rounds of `compare`, with the one that does not count."""
        return range(self.pairs + 1)


def is_rate(unit: str) -> bool:
    """Whether more of it is better."""
    return unit.endswith("/s")


def _median(samples: list[Sample]) -> Sample:
    return {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}


@contextmanager
def workplace() -> Iterator[Callable[[str], Path]]:
    """Folders by name in a temporary one, each a new one."""
    with tempfile.TemporaryDirectory(prefix="ollama-cache-bench-") as folder:
        numbers = itertools.count()

        def new(name: str) -> Path:
            path = Path(folder) / f"{name}{next(numbers)}"
            path.mkdir()
            return path

        yield new


def machine() -> dict[str, Any]:
    """What it was measured on."""
    model = ""
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else ""
    return {
        "cores": os.cpu_count(),
        "processor": model,
        "memory GiB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "Python": platform.python_version(),
        "load at the start": round(os.getloadavg()[0], 2),
    }

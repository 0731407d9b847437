"""status_page: what is seen is said, hostile texts are texts, and nothing private has a name."""

import re
from dataclasses import replace
from typing import Any

import pytest

from pullthrough.monitoring.health import Disk
from pullthrough.monitoring.status import Holdings, Progress, Sight
from pullthrough.monitoring.status_page import Bar, StatusPage, bars, span_text

HOSTILE = "<img src=x onerror=alert(1)>\r\n\nevent: health\u2028data: \"'&amp;</script>"
SUMS: dict[str, Any] = {"served": 4_000, "fetched": 1_000, "saved": 3_000, "ratio": 0.75, "days": []}
QUIET = Sight(
    now=1000.0,
    recordings=(),
    running=0,
    holdings=Holdings((), 0, 0, 0, SUMS | {"served": 0, "fetched": 0, "saved": 0, "ratio": None}),
    disk=Disk(50),
    held_bytes=0,
    max_size=None,
    min_free=10,
    upstream={"registry.ollama.ai": True},
    upstream_errors=0,
    retries=0,
    mismatches=0,
    problems=(),
    bypassed=0,
)


def row(name: str, **facts: Any) -> dict[str, Any]:
    return {"name": name, "size": 2_000_000, "pulled": 940.0, "held": "complete", "pinned": False} | facts


def words(html: str) -> str:
    """What a reader reads."""
    return " ".join(re.sub("<[^>]*>", " ", html).split())


@pytest.mark.parametrize(("count", "text"), [(1, "1 pull by"), (7, "7 pulls by")])
def test_pulls_past_the_cache(count: int, text: str) -> None:
    """A line that says how many, and what helps."""
    health = StatusPage().parts(replace(QUIET, bypassed=count))["health"]
    assert f"{text} Ollama 0.35 to 0.40.2 went past the cache: use it as gateway" in words(health)


def test_an_empty_cache() -> None:
    """Zeros, no plot, no table, and nothing amiss."""
    parts = StatusPage().parts(QUIET)
    assert words(parts["recordings"]) == "Recording now nothing"
    assert words(parts["saved"]) == "Saved bytes saved 0 B from the store ? served 0 B fetched 0 B"
    assert words(parts["models"]) == "Models, by their last pull 0"
    assert words(parts["health"]).startswith("Health ready registry.ollama.ai: up 0 B stored 50 B of disk free")
    assert "bad" not in parts["health"]


def test_a_busy_one() -> None:
    """Progress, models, sums; what does not fit is counted, and what is private only that."""
    sight = replace(
        QUIET,
        recordings=(Progress("llama3.2:latest", 30_000, 120_000, 1_500.0, 16), Progress("", 0, None, 0.0, 1)),
        running=9,
        holdings=Holdings((row("a:latest"), row("b:1", pulled=None, held="partial", pinned=True)), 7, 3, 5_000, SUMS),
        max_size=10_000,
    )
    parts = StatusPage().parts(sight)
    assert words(parts["recordings"]) == (
        "Recording now 9 llama3.2:latest 25 % of 120 KB 1.5 KB/s, 60 s left, 16 readers "
        "a blob of no public model asking upstream 0 B/s, ? left, 1 reader and 7 more"
    )
    assert '<progress max="120000" value="30000">' in parts["recordings"]
    assert words(parts["saved"]) == "Saved bytes saved 3.0 KB from the store 75 % served 4.0 KB fetched 1.0 KB"
    assert words(parts["models"]) == (
        "Models, by their last pull 7 name size pulled a:latest 2.0 MB 1 minute ago "
        "b:1 partial pinned 2.0 MB never and 5 more: ollama-cache ls 3 private, 5.0 KB"
    )
    assert "0 B stored of 10 KB allowed" in words(parts["health"])


def test_a_sick_one() -> None:
    """What is wrong is marked."""
    sight = replace(
        QUIET, disk=Disk(5), upstream={"hf.co": False}, upstream_errors=9, retries=8, mismatches=1,
        problems=("store: not writable",),
    )  # fmt: skip
    marked = re.findall('<li class="bad">(.*?)</li>', StatusPage().parts(sight)["health"])
    assert marked == [
        "store: not writable",
        "hf.co: does not answer",
        "5 B of disk free, 10 B are kept so",
        "1 blobs did not hash to their name",
    ]


def test_hostile_texts() -> None:
    """A model's name, a registry's and a problem's are shown as they are and make no element."""
    page = StatusPage()
    sight = replace(
        QUIET,
        recordings=(Progress(HOSTILE, 1, 2, 1.0, 1),),
        running=1,
        holdings=Holdings((row(HOSTILE),), 1, 0, 0, SUMS),
        upstream={HOSTILE: False},
        problems=(HOSTILE,),
    )
    parts = page.parts(sight)
    html = page.page(parts)
    assert html.count("&lt;img src=x onerror=alert(1)&gt;") == 4
    assert "<img" not in html
    assert html.count("<script>") == html.count("</script>") == 1


def test_policy() -> None:
    """Nothing runs or loads but what the page was built with; no frame shows it."""
    page = StatusPage()
    assert "unsafe" not in page.policy
    assert page.policy.startswith("default-src 'none'; script-src 'sha256-")
    assert page.policy.endswith("frame-ancestors 'none'")
    html = page.page(page.parts(QUIET))
    assert re.findall(r'(?:src|href)="(?!data:|/)', html) == []
    assert re.findall(r'\s(?:style|on[a-z]+)="', html) == []


def test_bars() -> None:
    """The newest last, to one scale; what was fetched and not served (prefetch) fits in too."""
    days = [{"day": "2", "served": 40, "fetched": 10}, {"day": "1", "served": 0, "fetched": 20}]
    assert bars(days) == [Bar("1", 0, 20, 40.0, 40.0), Bar("2", 40, 10, 0.0, 60.0)]
    assert bars([]) == []
    assert bars([{"day": "1", "served": 0, "fetched": 0}]) == [Bar("1", 0, 0, 80.0, 80.0)]


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (7200, "2 h")]
)
def test_spans(seconds: float | None, text: str) -> None:
    """How long still."""
    assert span_text(seconds) == text

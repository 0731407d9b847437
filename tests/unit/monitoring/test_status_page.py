"""status_page: what is seen is said, hostile texts are texts, and nothing private has a name."""

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest

from pullthrough.core.records import Name
from pullthrough.library.listing import View
from pullthrough.monitoring.event_log import Event
from pullthrough.monitoring.health import Disk
from pullthrough.monitoring.model_index import ModelIndex, Order, Page
from pullthrough.monitoring.status import ClientRow, Holdings, Progress, Sight
from pullthrough.monitoring.status_page import SHARE, ModelQuery, StatusPage, _numbers, model_path, span_text
from pullthrough.net.client_table import Client, Way
from pullthrough.net.pull_history import Pull
from pullthrough.pki.client_setup import KINDS, SetupGuide
from pullthrough.upstream.reachability import Role, Service, State
from tests.unit.monitoring.test_model_index import NOW, stored

HOSTILE = "<img src=x onerror=alert(1)>\r\n\nevent: health\u2028data: \"'&amp;</script>"
SUMS: dict[str, Any] = {"served": 4_000, "fetched": 1_000, "saved": 3_000, "ratio": 0.75, "days": []}
NOTHING: dict[str, Any] = {"served": 0, "fetched": 0, "saved": 0, "ratio": None}
QUIET = Sight(
    now=NOW,
    recordings=(),
    running=0,
    holdings=Holdings(
        ModelIndex(View({}, {}, (), {})), 0, 0, SUMS | {"served": 0, "fetched": 0, "saved": 0, "ratio": None}
    ),
    disk=Disk(50),
    held_bytes=0,
    max_size=None,
    min_free=10,
    services=(Service(Role.REGISTRY, "registry.ollama.ai", State.UP, since=0.5, asked=1.0),),
    upstream_errors=0,
    retries=0,
    mismatches=0,
    problems=(),
    bypassed=0,
    uptime_s=7200.0,
    clients=(),
    pulls=(),
    events=(),
)
GUIDE = SetupGuide(
    {}, {kind: f"run {kind} && echo done" for kind in KINDS}, dict.fromkeys(KINDS, "5e" * 32), "http://10.0.0.1:8080",
    ("AB:CD",),
)  # fmt: skip
DOWN = (Service(Role.REGISTRY, "hf.co", State.DOWN, "connection refused", 9.0, 9.0),)


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
    assert words(parts["saved"]) == (
        "Saved not fetched again 0 B of all that was served nothing yet served to clients 0 B fetched from "
        "upstream 0 B Nothing was pulled in the last 30 days."
    )
    assert words(parts["models"]) == "Latest models 0 Nothing is stored yet."
    assert words(parts["health"]).startswith(
        "Health ready registry registry.ollama.ai: up since 1970-01-01 00:00:00 UTC 0 B stored 50 B of disk free"
    )
    assert words(parts["health"]).endswith("running for 2 h")
    assert "bad" not in parts["health"]
    assert parts["notice"].strip() == ""


def test_a_busy_one() -> None:
    """Progress, models, sums; what does not fit is counted, and what is private only that."""
    sight = replace(
        QUIET,
        recordings=(Progress("llama3.2:latest", 30_000, 120_000, 1_500.0, 16), Progress("", 0, None, 0.0, 1)),
        running=9,
        holdings=Holdings(
            ModelIndex(stored({"a:latest": NOW - 60, "b:1": 0.0}, pins=("b:*",), lacking=["b:1"])),
            3,
            5_000,
            SUMS | {"private_bytes": 6_000, "unfinished_bytes": 0, "quarantined_bytes": 70},
        ),
        max_size=10_000,
    )
    parts = StatusPage().parts(sight)
    assert words(parts["recordings"]) == (
        "Recording now 9 llama3.2:latest 25 % of 120 KB 1.5 KB/s, 60 s left, 16 clients "
        "a blob of no public model asking upstream 0 B/s, ? left, 1 client and 7 more"
    )
    assert '<progress max="120000" value="30000" aria-label="llama3.2:latest">' in parts["recordings"]
    assert words(parts["saved"]).startswith(
        "Saved not fetched again 3.0 KB of all that was served 75 % served to clients 4.0 KB fetched from upstream 1.0"
    )
    assert words(parts["models"]) == (
        "Latest models 2 Name Size Last pull a:latest 1.0 KB 1 minute ago b:1 partial pinned 1.0 KB never "
        "Search and sort 3 private, 5.0 KB On the disk besides: private blobs 6.0 KB, quarantine 70 B"
    )
    assert "0 B stored of 10 KB allowed" in words(parts["health"])


def test_a_sick_one() -> None:
    """What is wrong is marked."""
    sight = replace(
        QUIET, disk=Disk(5), services=DOWN, upstream_errors=9, retries=8, mismatches=1,
        problems=("store: not writable",),
    )  # fmt: skip
    marked = re.findall('<li class="bad">(.*?)</li>', StatusPage().parts(sight)["health"])
    assert marked == [
        "store: not writable",
        "registry hf.co: down since 1970-01-01 00:00:09 UTC, connection refused",
        "5 B of disk free, 10 B are kept so",
        "1 blob did not hash to its name",
    ]
    assert words(StatusPage().parts(sight)["notice"]) == "Not ready: store: not writable"


def test_latest_pulls() -> None:
    """Who, what, how much of how much, how long, when and from where; one line each."""
    name = Name("registry.ollama.ai", "library/m", "latest")
    pulls = (
        Pull("10.0.0.7", name, 4000, 0, 3000, 990.0, 8.0, is_whole=False, is_running=True),
        Pull("10.0.0.8", name, 4000, 1000, 3000, 900.0, 40.0, is_whole=True),
        Pull("10.0.0.9", name, 4000, 500, 0, 100.0, 600.0, is_whole=False),
    )
    told = StatusPage().parts(replace(QUIET, now=1000.0, pulls=pulls))["pulls"]
    assert [words(line) for line in re.findall("<tr>(.*?)</tr>", told, re.S)[1:]] == [
        "m:latest 10.0.0.7 3.0 KB from upstream now for 10 s",
        "m:latest 10.0.0.8 4.0 KB from both 1 minute ago in 40 s",
        "m:latest 10.0.0.9 500 B of 4.0 KB from the cache 5 minutes ago in 10 min",
    ]
    assert words(StatusPage().parts(QUIET)["pulls"]) == "Latest pulls None since the start."


def test_events() -> None:
    """What happened and when, and what of it is trouble."""
    events = (Event(NOW - 70, "registry.ollama.ai is <down>", True), Event(NOW - 7200, "evicted 3 blobs", False))
    told = StatusPage().parts(replace(QUIET, events=events))["events"]
    assert words(told) == "Events registry.ollama.ai is &lt;down&gt; 1 minute ago evicted 3 blobs 2 hours ago"
    assert re.findall('<li class="bad">(.*?) <small>', told) == ["registry.ollama.ai is &lt;down&gt;"]
    assert "Nothing out of the ordinary" in words(StatusPage().parts(QUIET)["events"])


@pytest.mark.parametrize(
    ("services", "said"),
    [
        pytest.param(DOWN, "serving what is stored; fetching the rest: no", id="down"),
        pytest.param((*QUIET.services, *DOWN), "serving what is stored; fetching the rest: in part", id="one of two"),
        pytest.param((), "serving what is stored; fetching the rest: not known yet", id="unknown"),
        pytest.param(QUIET.services, "ready", id="up"),
    ],
)
def test_what_can_be_fetched(services: tuple[Service, ...], said: str) -> None:
    """The heading never says ready while a registry is down."""
    health = words(StatusPage().parts(replace(QUIET, services=services))["health"])
    assert re.match(f"Health {said} (?:registry|0 B)", health)


CLIENTS = [
    ClientRow(
        "10.0.0.7",
        Client(NOW - 5, Way.PROXY, (0, 36, 1), True, 5_000_000),
        Name("registry.ollama.ai", "library/a", "1"),
        NOW - 70,
    ),
    ClientRow("fd00::8", Client(NOW - 9), None, 0.0),
]


def test_clients() -> None:
    """What each was seen to do; one that downloads past the cache is marked, and what helps is said."""
    overview = words(StatusPage().parts(replace(QUIET, clients=tuple(CLIENTS)))["clients"])
    assert overview == (
        "Clients Address Last pull Received 10.0.0.7 bypassing a:1 1 minute ago 5.0 MB fd00::8 none 0 B All clients"
    )
    page = words(StatusPage().clients(CLIENTS, 2, NOW))
    assert "2 seen since the start Address" in page
    assert "10.0.0.7 bypassing a:1 1 minute ago 0.36.1 HTTPS_PROXY 5 seconds ago 5.0 MB" in page
    assert "fd00::8 none ? ? 9 seconds ago 0 B" in page
    assert "upgrade it, make the cache its gateway" in page
    assert "upgrade it" not in words(StatusPage().clients(CLIENTS[1:], 500, NOW))
    assert "these are the latest 1" in words(StatusPage().clients(CLIENTS[1:], 500, NOW))


def test_hostile_texts() -> None:
    """A model's name, a registry's and a problem's are shown as they are and make no element."""
    page = StatusPage()
    sight = replace(
        QUIET,
        recordings=(Progress(HOSTILE, 1, 2, 1.0, 1),),
        running=1,
        holdings=Holdings(ModelIndex(stored({HOSTILE: 5.0})), 0, 0, SUMS),
        services=(Service(Role.REGISTRY, HOSTILE, State.DOWN, HOSTILE, 1.0, 1.0),),
        problems=(HOSTILE,),
    )
    parts = page.parts(sight)
    html = page.overview(parts, GUIDE, welcome=True)
    assert html.count("&lt;img src=x onerror=alert(1)&gt;") == 7  # twice of a recording, of a problem, of a server
    for text in (
        html,
        page.models(sight.holdings, ModelQuery(HOSTILE), NOW),
        page.models(sight.holdings, ModelQuery(), NOW),
    ):
        assert "&lt;img src=x" in text
        assert "<img" not in text
        assert text.count("<script>") == text.count("</script>") == 1


def luminance(colour: str) -> float:
    """Relative, as WCAG 2.2 defines it."""
    digits = colour.removeprefix("#")
    digits = "".join(digit * 2 for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme: int) -> None:
    """Text is 4.5 times as bright as what it stands on, or the other way round, and a bar of the plot 3 times."""
    style = (SHARE / "status.css").read_text()
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]+);", re.findall(r":root {(.*?)}", style, re.S)[scheme]))
    for least, names, grounds in (
        (4.5, ("ink", "faint", "accent", "bad"), ("card", "paper")),
        (4.5, ("bad",), ("bad-paper",)),
        (3.0, ("saved", "fetched"), ("card",)),
    ):
        for name, ground in itertools.product(names, grounds):
            darker, lighter = sorted((luminance(colours[name]), luminance(colours[ground])))
            assert (lighter + 0.05) / (darker + 0.05) >= least, (name, ground)


def test_policy() -> None:
    """Nothing runs or loads but what the page was built with; no frame shows it."""
    page = StatusPage()
    assert "unsafe" not in page.policy
    assert page.policy.startswith("default-src 'none'; script-src 'sha256-")
    assert page.policy.endswith("frame-ancestors 'none'")
    html = page.overview(page.parts(QUIET), GUIDE, welcome=True)
    assert re.findall(r'(?:src|href)="(?!data:|/)', html) == []
    assert re.findall(r'\s(?:style|on[a-z]+)="', html) == []


def test_set_up_comes_first_while_nothing_is_stored() -> None:
    """A line and its checksum for each system, before all else; later they have a page of their own."""
    page = StatusPage()
    first = page.overview(page.parts(QUIET), GUIDE, welcome=True)
    assert first.index("run linux &amp;&amp; echo done") < first.index('id="saved"')
    later = page.overview(page.parts(QUIET), GUIDE, welcome=False)
    assert "run linux" not in later and 'href="/setup"' in later
    for html in (first, page.setup(GUIDE)):
        for kind, file in KINDS.items():
            assert html.count(f"<code>run {kind} &amp;&amp; echo done</code>") == 1
            assert f'href="/connect/{file}"' in html
        assert html.count("5e" * 32) == len(KINDS)
        assert "HTTPS_PROXY=http://10.0.0.1:8080" in html and "AB:CD" in html


def models_page(query: ModelQuery, count: int = 120) -> str:
    times = {f"m{number:03d}:latest": float(number) for number in range(count)}
    return StatusPage().models(Holdings(ModelIndex(stored(times)), 0, 0, SUMS), query, NOW)


def test_a_page_of_models() -> None:
    """Fifty of them, links to the other pages and orders, and what was searched for goes along."""
    html = models_page(ModelQuery("M", Order.NAME, 2))
    assert re.findall(r">(m\d+:latest)<", html) == [f"m{number:03d}:latest" for number in range(50, 100)]
    assert 'href="/models?q=M&amp;sort=name&amp;page=3"' in html
    assert 'rel="prev" href="/models?q=M&amp;sort=name"' in html
    assert 'href="/models?q=M&amp;sort=size"' in html and 'href="/models?q=M&amp;sort=-name"' in html
    assert html.count('aria-sort="ascending"') == 1 and 'aria-sort="descending"' not in html
    assert "120 of 120 models match" in words(html)


def test_pages_of_models_that_are_not_there() -> None:
    """Nothing found, and nothing stored, are said; a page beyond the last is the last."""
    assert "No stored model has nothing-like-it in its name." in words(models_page(ModelQuery("nothing-like-it")))
    assert "Nothing is stored yet. Set up a client" in words(models_page(ModelQuery(), count=0))
    assert '<b aria-current="page">3</b>' in models_page(ModelQuery(number=999))


@pytest.mark.parametrize(
    ("number", "pages", "expected"),
    [
        (1, 1, [1]),
        (1, 200, [1, 2, 3, None, 200]),
        (100, 200, [1, None, 98, 99, 100, 101, 102, None, 200]),
        (200, 200, [1, None, 198, 199, 200]),
        (4, 7, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_links_to_pages(number: int, pages: int, expected: list[int | None]) -> None:
    """The first, the last and the neighbours."""
    assert _numbers(Page([], number, pages, 0)) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ModelQuery()),
        ({"q": " llama ", "sort": "-size", "page": "3"}, ModelQuery("llama", Order.SMALLEST, 3)),
        ({"sort": "price", "page": "-3"}, ModelQuery()),
        ({"page": "1e9"}, ModelQuery()),
        ({"page": "\u0663"}, ModelQuery()),
        ({"page": "9" * 5000}, ModelQuery()),
    ],
)
def test_queries(fields: dict[str, str], expected: ModelQuery) -> None:
    """What makes no sense is as if it were not there."""
    assert ModelQuery.parse(fields) == expected


def test_addresses_of_models() -> None:
    """Every character of a name stays within the query."""
    assert model_path(Name("registry.ollama.ai", "library/a", "1b")) == "/model?name=registry.ollama.ai/library/a:1b"
    assert model_path(Name("h", 'a&b#c<"', "t")) == "/model?name=h/a%26b%23c%3C%22:t"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (7200, "2 h"), (5 * 86400, "5 days")],
)
def test_spans(seconds: float | None, text: str) -> None:
    """How long still."""
    assert span_text(seconds) == text

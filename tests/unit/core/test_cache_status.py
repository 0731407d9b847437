"""cache_status: every outcome in the words of RFC 9211."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullthrough.core.cache_status import CACHE_NAME, CacheStatus, Outcome


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        pytest.param(CacheStatus(Outcome.HIT), "ollama-cache; hit", id="hit"),
        pytest.param(CacheStatus(Outcome.MISS), "ollama-cache; fwd=miss", id="miss"),
        pytest.param(CacheStatus(Outcome.URI_MISS), "ollama-cache; fwd=uri-miss", id="uri-miss"),
        pytest.param(CacheStatus(Outcome.STALE), "ollama-cache; fwd=stale", id="stale"),
        pytest.param(CacheStatus(Outcome.PARTIAL), "ollama-cache; fwd=partial", id="partial"),
        pytest.param(CacheStatus(Outcome.BYPASS), "ollama-cache; fwd=bypass", id="bypass"),
        pytest.param(CacheStatus(Outcome.REQUEST), "ollama-cache; fwd=request", id="request"),
        pytest.param(CacheStatus(Outcome.MISS, stored=True), "ollama-cache; fwd=miss; stored", id="stored"),
        pytest.param(
            CacheStatus(Outcome.PARTIAL, collapsed=True), "ollama-cache; fwd=partial; collapsed", id="collapsed"
        ),
        pytest.param(
            CacheStatus(Outcome.STALE, forward_status=304), "ollama-cache; fwd=stale; fwd-status=304", id="fwd-status"
        ),
        pytest.param(CacheStatus(Outcome.HIT, detail="stale"), "ollama-cache; hit; detail=stale", id="detail"),
        pytest.param(
            CacheStatus(Outcome.STALE, True, True, 200, "x"),
            "ollama-cache; fwd=stale; fwd-status=200; stored; collapsed; detail=x",
            id="all",
        ),
    ],
)
def test_spelling(status: CacheStatus, expected: str) -> None:
    """One member of a list: the cache's name, then what is true of the exchange."""
    assert str(status) == expected


# RFC 9651 sections 3.1.2 and 3.3.4, as far as we use it: keys with or without an integer or a token.
TOKEN = r"[A-Za-z*][A-Za-z0-9:/!#$%&'*+.^_`|~-]*"
MEMBER = re.compile(rf"{TOKEN}(?:; [a-z*][a-z0-9_.*-]*(?:=(?:[0-9]{{1,15}}|{TOKEN}))?)*")


@given(
    outcome=st.sampled_from(Outcome),
    stored=st.booleans(),
    collapsed=st.booleans(),
    forward_status=st.none() | st.integers(100, 599),
    detail=st.sampled_from(("", "stale", "upstream-failed")),
)
def test_is_a_structured_field(
    outcome: Outcome, stored: bool, collapsed: bool, forward_status: int | None, detail: str
) -> None:
    """Whatever is said, a parser of structured fields understands it; each parameter stands there once, or not."""
    text = str(CacheStatus(outcome, stored, collapsed, forward_status, detail))
    assert MEMBER.fullmatch(text)
    name, first, *others = text.split("; ")
    assert (name, first) == (CACHE_NAME, outcome.value)
    expected = {
        *({f"fwd-status={forward_status}"} if forward_status is not None else ()),
        *({"stored"} if stored else ()),
        *({"collapsed"} if collapsed else ()),
        *({f"detail={detail}"} if detail else ()),
    }
    assert sorted(others) == sorted(expected)


def test_outcomes_are_the_words_of_the_rfc() -> None:
    """A hit, or why it was forwarded (RFC 9211 section 2.2); each word once."""
    forwarded = {"bypass", "uri-miss", "miss", "request", "stale", "partial"}
    assert sorted(outcome.value for outcome in Outcome) == sorted({"hit", *(f"fwd={word}" for word in forwarded)})

"""refusals, fields and bounded_json: what has the shape of a registry's words, and what of it is fit for use."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from pullthrough.core.bounded_json import MAX_VALUES, loads
from pullthrough.core.fields import LONGEST, cleaned
from pullthrough.upstream.refusals import described, is_page, is_refusal

JSON = {"Content-Type": "application/json"}
ERRORS = b'{"errors": [{"code": "DENIED", "message": "no"}]}'


@pytest.mark.parametrize(
    ("status", "fields", "body", "expected"),
    [
        pytest.param(401, {"WWW-Authenticate": 'Bearer realm="x"'}, b"", True, id="a challenge"),
        pytest.param(403, JSON, ERRORS, True, id="OCI's errors"),
        pytest.param(403, JSON, b'{"message": "no"}', True, id="a message"),
        pytest.param(401, {}, b'{"error": "no"}', True, id="JSON without a type"),
        pytest.param(404, {"Content-Type": "text/plain; charset=utf-8"}, b"404 page not found", True, id="Go's"),
        pytest.param(412, {"Content-Type": "text/plain"}, b"too old", True, id="too old a client"),
        pytest.param(403, {"Content-Type": "text/plain"}, b"blocked", False, id="plain text"),
        pytest.param(403, JSON, b'{"ok": true}', False, id="JSON of somebody else"),
        pytest.param(403, JSON, b"[" * 60_000, False, id="brackets"),
        pytest.param(403, JSON, b'{"error": "' + b"x" * 70_000 + b'"}', False, id="too long"),
        pytest.param(403, {"Content-Type": "text/html"}, ERRORS, False, id="a page"),
        pytest.param(401, {"WWW-Authenticate": "Basic", "Content-Type": "text/html"}, b"", False, id="it asks"),
        pytest.param(403, {**JSON, "cf-mitigated": "challenge"}, ERRORS, False, id="a challenge for browsers"),
        pytest.param(404, {}, b"", False, id="nothing"),
    ],
)
def test_a_refusal_has_a_shape(status: int, fields: dict[str, str], body: bytes, expected: bool) -> None:
    """The registry's own is told from a page that has its status."""
    assert is_refusal(status, CIMultiDict(fields), body) is expected


def test_a_refusal_of_a_head() -> None:
    """It has only fields to show."""
    assert is_refusal(404, CIMultiDict(JSON), b"", head=True)
    assert not is_refusal(404, CIMultiDict(), b"", head=True)


def test_a_description_has_no_text_of_the_page() -> None:
    """Status and type, and no more of it than fits."""
    fields = CIMultiDict({"Content-Type": "Text/HTML; charset=x" + "y" * 500, "CF-Mitigated": "challenge"})
    assert is_page(fields)
    assert described(403, fields) == "403 text/html, a challenge for browsers"


def test_fields_are_cleaned() -> None:
    """Control characters, other alphabets and overlong values are as if they had not been sent."""
    given_fields = CIMultiDict(
        {"ETag": '"v"', "Location": "https://x/\udcff", "X-A": "a\x00b", "Date": "D" * 65, "X-B": "b" * (LONGEST + 1)}
    )
    assert dict(cleaned(given_fields)) == {"ETag": '"v"'}


@given(st.dictionaries(st.text("abcETag-", min_size=1), st.text()))
def test_what_is_kept_can_be_sent_on(fields: dict[str, str]) -> None:
    """Whatever comes, what is left is bytes of one line."""
    for value in cleaned(CIMultiDict(fields)).values():
        assert b"\r" not in value.encode("latin-1") and b"\n" not in value.encode("ascii")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"[" * 100_000, id="brackets without end"),
        pytest.param(b"[" + b"{}," * MAX_VALUES + b"{}]", id="values without end"),
        pytest.param(b"\xff", id="no text"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"1" * 5000, id="a number without end"),
        pytest.param(b'"' + b"x" * (1 << 20) + b'"', id="longer than is permitted"),
    ],
)
def test_json_within_bounds(body: bytes) -> None:
    """One error for all that is not."""
    with pytest.raises(ValueError, match=r"."):
        loads(body, limit=1 << 20)

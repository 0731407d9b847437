"""ranges: RFC 9110 section 14 as a table."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullthrough.core.errors import UnexpectedResponse
from pullthrough.core.ranges import (
    ByteRange,
    Unsatisfiable,
    format_range,
    if_range_matches,
    parse_content_range,
    parse_range,
)

BLOB = b"0123456789abcdef"
N = len(BLOB)


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        pytest.param(None, None, id="absent"),
        pytest.param("bytes=0-15", (0, 16), id="whole"),
        pytest.param("bytes=0-0", (0, 1), id="first byte (client2 0.6.0)"),
        pytest.param("bytes=15-15", (15, 16), id="last byte"),
        pytest.param("bytes=4-", (4, 16), id="open-ended (A0, x/transfer, ramalama)"),
        pytest.param("bytes=0-", (0, 16), id="open-ended from the start"),
        pytest.param("bytes=-4", (12, 16), id="suffix"),
        pytest.param("bytes=-99", (0, 16), id="suffix longer than the blob"),
        pytest.param("bytes=-0", N, id="empty suffix is unsatisfiable"),
        pytest.param("bytes=7-99", (7, 16), id="last-pos past the end"),
        pytest.param("bytes=16-", N, id="start at the length"),
        pytest.param("bytes=16-20", N, id="start past the end"),
        pytest.param("bytes=5-4", None, id="last-pos before first-pos is invalid"),
        pytest.param("bytes=20-4", None, id="invalid, not unsatisfiable"),
        pytest.param("BYTES=1-2", (1, 3), id="unit is case-insensitive"),
        pytest.param("bytes= 1-2 ", (1, 3), id="white space around the spec"),
        pytest.param("bytes=1-2,4-5", None, id="several ranges are ignored"),
        pytest.param("bytes=1-2,", None, id="trailing comma"),
        pytest.param("lines=1-2", None, id="unknown unit"),
        pytest.param("bytes=a-b", None, id="no digits"),
        pytest.param("bytes=--1", None, id="two dashes"),
        pytest.param("bytes=+1-2", None, id="sign"),
        pytest.param("bytes=1 - 2", None, id="inner white space"),
        pytest.param("bytes=-", None, id="neither end"),
        pytest.param("bytes", None, id="no equals sign"),
        pytest.param("", None, id="empty"),
        pytest.param("bytes=\u0661-", None, id="digits of another script"),
        pytest.param("bytes=1-" + "9" * 40, None, id="absurdly many digits"),
    ],
)
def test_range_grammar(field: str | None, expected: tuple[int, int] | int | None) -> None:
    """A field selects an interval, nothing (416), or is ignored (200)."""
    match expected:
        case tuple():
            assert parse_range(field, N) == ByteRange(*expected, N)
        case int():
            assert parse_range(field, N) == Unsatisfiable(N)
        case None:
            assert parse_range(field, N) is None


@pytest.mark.parametrize("field", ["bytes=0-", "bytes=0-0", "bytes=-1"])
def test_empty_blob_satisfies_nothing(field: str) -> None:
    """An empty representation has no byte to select."""
    assert parse_range(field, 0) == Unsatisfiable(0)


@given(first=st.integers(0, 40), last=st.integers(0, 40) | st.none(), length=st.integers(0, 32))
def test_agrees_with_slicing(first: int, last: int | None, length: int) -> None:
    """first-pos and last-pos select what a Python slice selects."""
    data = bytes(range(length))
    result = parse_range(f"bytes={first}-{'' if last is None else last}", length)
    if last is not None and last < first:
        assert result is None
    elif first >= length:
        assert result == Unsatisfiable(length)
    else:
        assert isinstance(result, ByteRange)
        assert data[result.start : result.stop] == data[first : None if last is None else last + 1]
        assert result.size == result.stop - result.start > 0


@given(suffix=st.integers(1, 40), length=st.integers(1, 32))
def test_suffix_agrees_with_slicing(suffix: int, length: int) -> None:
    """A suffix selects the last bytes."""
    result = parse_range(f"bytes=-{suffix}", length)
    assert isinstance(result, ByteRange)
    assert (result.start, result.stop) == (max(0, length - suffix), length)


def test_spells_content_range() -> None:
    """Inclusive on the wire; `*` where nothing was selected."""
    assert ByteRange(0, 1, 16).content_range == "bytes 0-0/16"
    assert Unsatisfiable(16).content_range == "bytes */16"


@given(start=st.integers(0, 1000), size=st.integers(1, 1000), more=st.integers(0, 1000))
def test_what_we_ask_is_what_we_read(start: int, size: int, more: int) -> None:
    """format_range, parse_range, content_range and parse_content_range are one round trip."""
    length = start + size + more
    selected = parse_range(format_range(start, start + size), length)
    assert isinstance(selected, ByteRange)
    assert parse_content_range(selected.content_range) == (start, start + size, length)


@pytest.mark.parametrize(
    "field",
    [None, "", "bytes 5-4/10", "bytes 0-10/10", "bytes */10", "bytes 0-1", "0-1/10", "bytes=0-1/10", "bytes a-b/c"],
)
def test_bad_content_range(field: str | None) -> None:
    """What is no Content-Range of a 206 is refused, with what was got."""
    with pytest.raises(UnexpectedResponse, match=r"expected .*, got "):
        parse_content_range(field)


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        pytest.param(None, True, id="absent"),
        pytest.param('"x"', True, id="same strong tag"),
        pytest.param('"y"', False, id="other tag"),
        pytest.param('W/"x"', False, id="weak tag never matches"),
        pytest.param("Sat, 21 Nov 2026 00:00:00 GMT", False, id="date"),
        pytest.param("x", False, id="unquoted"),
    ],
)
def test_if_range(field: str | None, expected: bool) -> None:
    """Only the same strong entity tag keeps a Range in force."""
    assert if_range_matches(field, '"x"') is expected

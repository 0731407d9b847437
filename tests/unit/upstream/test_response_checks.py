"""response_checks: every claim that a data response makes about itself, as a table."""

import re
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from pullthrough.core.errors import (
    LengthContradicted,
    SourceExpired,
    UnexpectedResponse,
    UpstreamError,
    UpstreamRefused,
)
from pullthrough.core.ranges import ByteRange
from pullthrough.upstream.response_checks import Extent, check_data, relayable

SIZE = 16
SIGNED = "https://r2.example/data?X-Amz-Credential=key&X-Amz-Signature=c0ffee"
ASKED = (4, 8)


def fields(*pairs: tuple[str, str]) -> CIMultiDict[str]:
    """Header fields as the HTTP client hands them on, on a response that also names a signed address."""
    return CIMultiDict([*pairs, ("Location", SIGNED), ("Content-Location", SIGNED), ("Link", f"<{SIGNED}>")])


def partial(content_range: str | None = "bytes 4-7/16", content_length: str | None = "4") -> CIMultiDict[str]:
    """The fields of a 206."""
    pairs = [("Content-Range", content_range), ("Content-Length", content_length)]
    return fields(*((name, value) for name, value in pairs if value is not None))


def check(
    status: int,
    headers: CIMultiDict[str],
    *,
    asked: tuple[int, int] | None = ASKED,
    length: int | None = SIZE,
) -> Extent:
    return check_data(status, headers, asked=asked, length=length)


def refused(
    expected: type[UpstreamError],
    status: int,
    headers: CIMultiDict[str],
    *,
    asked: tuple[int, int] | None = ASKED,
    length: int | None = SIZE,
) -> str:
    """The message of the error, which is of this type and names no signed address."""
    with pytest.raises(UpstreamError) as caught:
        check(status, headers, asked=asked, length=length)
    assert isinstance(caught.value, expected)
    assert not re.search(r"\?|X-Amz|c0ffee", str(caught.value))
    return str(caught.value)


@pytest.mark.parametrize(
    ("status", "headers", "asked", "length", "expected"),
    [
        pytest.param(206, partial(), ASKED, SIZE, Extent(4, 8, 16), id="206 of a blob of known length"),
        pytest.param(206, partial(), ASKED, None, Extent(4, 8, 16), id="206 tells the length"),
        pytest.param(206, partial("bytes 4-15/16", "12"), (4, 99), 16, Extent(4, 16, 16), id="206 up to the end"),
        pytest.param(206, partial("bytes 0-15/16", "16"), (0, 16), 16, Extent(0, 16, 16), id="206 of everything"),
        pytest.param(206, partial("bytes 0-0/1", "1"), (0, 99), None, Extent(0, 1, 1), id="206 of a small blob"),
        pytest.param(206, partial("BYTES  4-7/16"), ASKED, 16, Extent(4, 8, 16), id="unit in capitals"),
        pytest.param(200, partial(None, "16"), None, None, Extent(0, 16, 16), id="200 to an un-ranged GET"),
        pytest.param(200, partial(None, "16"), None, 16, Extent(0, 16, 16), id="200 of known length"),
        pytest.param(200, partial(None, "16"), ASKED, 16, Extent(0, 16, 16), id="200 in place of 206: the whole"),
        pytest.param(200, partial("bytes 4-7/16", "16"), ASKED, 16, Extent(0, 16, 16), id="Content-Range of a 200"),
        pytest.param(200, partial(None, "0"), None, None, Extent(0, 0, 0), id="empty blob"),
        pytest.param(200, partial(None, "0"), None, 0, Extent(0, 0, 0), id="empty blob of known length"),
        pytest.param(416, partial("bytes */0", None), (0, 1), None, Extent(0, 0, 0), id="416 of an empty blob"),
        pytest.param(416, partial("bytes */0", None), (0, 1), 0, Extent(0, 0, 0), id="416 of one known to be empty"),
        pytest.param(416, partial("bytes  */0 ", "9"), (0, 1), None, Extent(0, 0, 0), id="416 with white space"),
    ],
)
def test_accepted(
    status: int, headers: CIMultiDict[str], asked: tuple[int, int] | None, length: int | None, expected: Extent
) -> None:
    """The interval that the response carries, and the complete length."""
    assert check(status, headers, asked=asked, length=length) == expected


@pytest.mark.parametrize("status", [401, 403, 404, 410])
@pytest.mark.parametrize("asked", [ASKED, None], ids=["ranged", "whole"])
def test_a_source_that_is_gone(status: int, asked: tuple[int, int] | None) -> None:
    """An expired signature or a deleted object: the address is to be obtained anew."""
    assert refused(SourceExpired, status, partial(), asked=asked) == f"the source answered {status}"


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 507, 599])
def test_a_source_that_refuses(status: int) -> None:
    """The status is kept for the client, and so is when to come back."""
    with pytest.raises(UpstreamRefused, match=f"^upstream answered {status}$") as caught:
        check(status, CIMultiDict([("retry-after", "7"), ("Server", "cloudflare")]))
    assert caught.value.status_hint == status
    assert caught.value.headers == (("Retry-After", "7"),)
    assert caught.value.body == b""


@pytest.mark.parametrize("status", [100, 201, 203, 204, 205, 207, 301, 302, 304, 307, 400, 402, 405, 408, 412, 428])
@pytest.mark.parametrize(("asked", "good"), [(ASKED, "206 or 200"), (None, "200")], ids=["ranged", "whole"])
def test_any_other_status(status: int, asked: tuple[int, int] | None, good: str) -> None:
    """What is neither the bytes nor a refusal is not understood, whatever its fields say."""
    assert refused(UnexpectedResponse, status, partial(), asked=asked) == f"expected {good}, got {status}"


def test_206_to_an_unranged_get() -> None:
    """A part that nobody asked for."""
    assert refused(UnexpectedResponse, 206, partial(), asked=None) == "expected 200, got 206"


@pytest.mark.parametrize(
    ("content_range", "length"),
    [
        pytest.param("bytes */16", 16, id="the blob has bytes"),
        pytest.param("bytes */16", None, id="the blob has bytes, as we learn"),
        pytest.param("bytes */*", None, id="no length"),
        pytest.param("*/0", None, id="no unit"),
        pytest.param("bytes 0-0/0", None, id="an interval"),
        pytest.param(None, None, id="no Content-Range"),
    ],
)
def test_other_416(content_range: str | None, length: int | None) -> None:
    """We never ask beyond the end: only an empty blob satisfies no range."""
    headers = partial(content_range, "0")
    assert refused(UnexpectedResponse, 416, headers, length=length) == "expected 206 or 200, got 416"


def test_a_416_that_tells_another_length() -> None:
    """What was asked for lies within what was expected: then the blob is shorter than that."""
    for told in (0, 3):
        message = f"expected a complete length of 16, got {told}"
        assert refused(LengthContradicted, 416, partial(f"bytes */{told}", "0")) == message


@pytest.mark.parametrize(
    ("content_range", "message"),
    [
        pytest.param(None, "expected a Content-Range like 'bytes 0-99/200', got None", id="missing"),
        pytest.param("", "expected a Content-Range like 'bytes 0-99/200', got ''", id="empty"),
        pytest.param("garbage", "expected a Content-Range like 'bytes 0-99/200', got 'garbage'", id="garbage"),
        pytest.param("bytes */16", "expected a Content-Range like 'bytes 0-99/200', got 'bytes */16'", id="of a 416"),
        pytest.param(
            "bytes 4-7/16, bytes 4-7/16",
            "expected a Content-Range like 'bytes 0-99/200', got 'bytes 4-7/16, bytes 4-7/16'",
            id="duplicated, joined on the way",
        ),
        pytest.param(
            "items 4-7/16", "expected a Content-Range like 'bytes 0-99/200', got 'items 4-7/16'", id="other unit"
        ),
        pytest.param(
            "bytes 7-4/16", "expected first-pos <= last-pos < complete length, got 'bytes 7-4/16'", id="reversed"
        ),
        pytest.param(
            "bytes 4-7/7", "expected first-pos <= last-pos < complete length, got 'bytes 4-7/7'", id="past its own end"
        ),
        pytest.param("bytes 4-7/*", "expected a complete length, got '*'", id="unknown length"),
        pytest.param("bytes 5-8/16", "expected bytes 4-7, got 5-8/16", id="shifted by a byte"),
        pytest.param("bytes 0-3/16", "expected bytes 4-7, got 0-3/16", id="from the start"),
        pytest.param("bytes 3-7/16", "expected bytes 4-7, got 3-7/16", id="begins early"),
        pytest.param("bytes 4-6/16", "expected bytes 4-7, got 4-6/16", id="ends early"),
        pytest.param("bytes 4-8/16", "expected bytes 4-7, got 4-8/16", id="ends late"),
        pytest.param("bytes 0-15/16", "expected bytes 4-7, got 0-15/16", id="everything"),
        pytest.param("bytes 4-7/17", "expected a complete length of 16, got 17", id="longer blob"),
        pytest.param("bytes 4-7/15", "expected a complete length of 16, got 15", id="shorter blob"),
    ],
)
def test_content_range(content_range: str | None, message: str) -> None:
    """Exactly what was asked of exactly this blob, or an error that says what it is of."""
    spans = re.match(r"bytes (\d+)-(\d+)/", content_range or "")
    carried = abs(int(spans[2]) + 1 - int(spans[1])) if spans else 4
    assert refused(UnexpectedResponse, 206, partial(content_range, str(carried))) == message


def test_a_range_cut_short_of_the_end() -> None:
    """A 206 may end early only where the blob does."""
    headers = partial("bytes 4-7/16", "4")
    assert refused(UnexpectedResponse, 206, headers, asked=(4, 99)) == "expected bytes 4-98, got 4-7/16"


@pytest.mark.parametrize(
    ("content_length", "message"),
    [
        pytest.param("3", "expected a Content-Length of 4, got 3", id="shorter"),
        pytest.param("5", "expected a Content-Length of 4, got 5", id="longer"),
        pytest.param("16", "expected a Content-Length of 4, got 16", id="the blob's"),
        pytest.param("0", "expected a Content-Length of 4, got 0", id="zero"),
        pytest.param(None, "expected a Content-Length, got ''", id="missing"),
        pytest.param("", "expected a Content-Length, got ''", id="empty"),
        pytest.param("four", "expected a Content-Length, got 'four'", id="no number"),
        pytest.param("-4", "expected a Content-Length, got '-4'", id="negative"),
        pytest.param("+4", "expected a Content-Length, got '+4'", id="sign"),
        pytest.param("4.0", "expected a Content-Length, got '4.0'", id="fraction"),
        pytest.param("4, 4", "expected a Content-Length, got '4, 4'", id="duplicated, joined on the way"),
        pytest.param("4" * 20, f"expected a Content-Length, got '{'4' * 20}'", id="absurdly many digits"),
    ],
)
def test_content_length_of_a_part(content_length: str | None, message: str) -> None:
    """It agrees with Content-Range; without it an early end would look like the end."""
    assert refused(UnexpectedResponse, 206, partial(content_length=content_length)) == message


@pytest.mark.parametrize("asked", [ASKED, None], ids=["ranged", "whole"])
@pytest.mark.parametrize(
    ("content_length", "message"),
    [
        pytest.param("15", "expected a complete length of 16, got 15", id="shorter"),
        pytest.param("17", "expected a complete length of 16, got 17", id="longer"),
        pytest.param("0", "expected a complete length of 16, got 0", id="empty"),
        pytest.param(None, "expected a Content-Length, got ''", id="missing"),
    ],
)
def test_content_length_of_the_whole(content_length: str | None, message: str, asked: tuple[int, int] | None) -> None:
    """A 200 is the whole blob, or it is something else."""
    assert refused(UnexpectedResponse, 200, partial(None, content_length), asked=asked) == message


@pytest.mark.parametrize("status", [200, 206])
@pytest.mark.parametrize(
    ("coding", "got"),
    [
        ("identity", None),
        (" Identity ", None),
        ("", None),
        ("gzip", "gzip"),
        ("GZIP", "gzip"),
        ("br", "br"),
        ("zstd", "zstd"),
        ("gzip, identity", "gzip, identity"),
        ("aws-chunked", "aws-chunked"),
    ],
)
def test_content_coding(status: int, coding: str, got: str | None) -> None:
    """Encoded bytes have other offsets and another hash."""
    headers = partial("bytes 4-7/16", "4" if status == 206 else "16")
    headers["Content-Encoding"] = coding
    if got is None:
        assert check(status, headers).length == SIZE
    else:
        assert refused(UnexpectedResponse, status, headers) == f"expected no content coding, got {got}"


def test_names_in_any_case() -> None:
    """HTTP/2 proxies on the way write field names in lower case."""
    lower = CIMultiDict([("content-range", "bytes 4-7/16"), ("content-length", "4"), ("content-encoding", "gzip")])
    assert refused(UnexpectedResponse, 206, lower) == "expected no content coding, got gzip"
    del lower["Content-Encoding"]
    assert check(206, lower) == Extent(4, 8, 16)


LIES = st.sampled_from((0, 0, 0, -1, 1))


@given(
    status=st.sampled_from((200, 206)),
    start=st.integers(1, 15),
    size=st.integers(2, 20),
    complete=st.integers(16, 18),
    moved=LIES,
    stretched=LIES,
    misstated=LIES,
    known=st.none() | st.integers(15, 19),
)
def test_what_is_accepted_was_asked_for(
    status: int, start: int, size: int, complete: int, moved: int, stretched: int, misstated: int, known: int | None
) -> None:
    """Whatever a response claims: accepted is the whole blob, or the asked interval as far as the blob has it."""
    got = ByteRange(start + moved, min(start + size, complete) + stretched, complete)
    content_length = (complete if status == 200 else got.size) + misstated
    told = content_length if status == 200 else complete
    honest = known in (None, told) and (status == 200 or not (moved or stretched or misstated))
    headers = partial(got.content_range, str(content_length))
    if honest:
        whole = Extent(0, content_length, content_length)
        expected = whole if status == 200 else Extent(got.start, got.stop, complete)
        assert check(status, headers, asked=(start, start + size), length=known) == expected
    else:
        refused(UnexpectedResponse, status, headers, asked=(start, start + size), length=known)


RELAYED = [
    ("WWW-Authenticate", 'Bearer realm="https://registry.ollama.ai/token"'),
    ("Content-Type", "application/json"),
    ("Docker-Content-Digest", "sha256:ab"),
    ("Docker-Distribution-Api-Version", "registry/2.0"),
    ("Retry-After", "7"),
]
DROPPED = [
    ("Location", "/elsewhere"),
    ("Connection", "close"),
    ("Transfer-Encoding", "chunked"),
    ("Content-Encoding", "gzip"),
    ("Content-Length", "99"),
    ("Set-Cookie", "session=secret"),
    ("Strict-Transport-Security", "max-age=1"),
    ("Alt-Svc", 'h3=":443"'),
    ("ETag", '"x"'),
    ("Content-Range", "bytes 4-7/16"),
]


def sorted_pairs(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted((name.lower(), value) for name, value in pairs)


def test_relayable_fields() -> None:
    """What a client needs to try again elsewhere or later; nothing about the connection, the body or a session."""
    assert sorted_pairs(relayable(CIMultiDict(DROPPED + RELAYED))) == sorted_pairs(RELAYED)
    assert relayable(CIMultiDict(DROPPED)) == []
    assert relayable(CIMultiDict({"content-TYPE": "text/plain"})) == [("Content-Type", "text/plain")]

"""humanize: numbers and tables as people read them."""

import pytest

from pullthrough.core.humanize import ago_text, columns, count_text, fitted, shortened

ROWS = [("NAME", "ID", "SIZE"), ("a-rather-long-name:latest", "0123456789ab", "1.0 GB"), ("b", "ba9876543210", "3 B")]


def test_counts() -> None:
    """One is one, and nothing is many."""
    assert [count_text(count, "model") for count in (0, 1, 2)] == ["0 models", "1 model", "2 models"]
    assert [ago_text(seconds) for seconds in (1, 60, 3 * 86400)] == ["1 second ago", "1 minute ago", "3 days ago"]


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (51, "a-rather-long-name:latest    0123456789ab    1.0 GB"),
        (50, "a-rather-long-name:latest  0123456789ab  1.0 GB"),
        (46, "a-rather-long-name:latest  1.0 GB"),
        (30, "a-rather-lo…ame:latest  1.0 GB"),
        (5, "a-ra…test  1.0 GB"),
    ],
)
def test_fitted(width: int, line: str) -> None:
    """First the gaps go, then the column that can be spared, then the middle of a name; a name is never all gone."""
    lines = fitted(ROWS, width, elastic=0, spare=(1,))
    assert lines[1] == line
    assert max(map(len, lines)) <= max(width, 17)
    assert fitted(ROWS, 200, elastic=0) == columns(ROWS)


def test_shortened() -> None:
    """Both ends stay."""
    assert shortened("llama3.2-vision:11b-instruct-q4_K_M", 20) == "llama3.2-v…ct-q4_K_M"
    assert shortened("short", 20) == "short"

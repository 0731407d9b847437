"""quantities: sizes and durations as people type them."""

import pytest

from pullthrough.config.quantities import parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1234", 1234),
        ("7 bytes", 7),
        ("1 byte", 1),
        ("12B", 12),
        ("500K", 500_000),
        ("500kb", 500_000),
        ("40GB", 40 * 10**9),
        ("200 gb", 200 * 10**9),
        ("512MiB", 512 << 20),
        ("5gib", 5 << 30),
        ("3Ti", 3 << 40),
        ("1.5 TB", 1_500_000_000_000),
        ("1.1 GB", 1_100_000_000),
        ("0.5KiB", 512),
        ("1.0009KB", 1000),
        (" 2TB\n", 2 * 10**12),
        ("1PB", 10**15),
        ("999999999999999EiB", 999_999_999_999_999 << 60),
    ],
)
def test_sizes(text: str, size: int) -> None:
    """Exact, by decimal and binary units; a part of a byte is dropped."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("300", 300),
        ("90 s", 90),
        ("90s", 90),
        ("1.5m", 90),
        ("5 minutes", 300),
        ("12h", 43_200),
        ("1 Hour", 3600),
        ("7d", 604_800),
        ("1 day", 86_400),
        ("2w", 1_209_600),
        ("1y", 31_536_000),
        ("0.25 sec", 0.25),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    """Bare numbers are seconds."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "GB",
        "-1",
        "+1",
        "1,5GB",
        "1_000",
        ".5GB",
        "5.GB",
        "1e9",
        "nan",
        "inf",
        "1GB 2MB",
        "1 G B",
        "\uff11GB",
        "9" * 16,
    ],
)
def test_no_sizes(text: str) -> None:
    """What may be read in two ways, or in none, is refused."""
    with pytest.raises(ValueError, match=r"^a size such as 500MB, 200GiB or 2TB$"):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "soon", "-5m", "5 m 3 s", "1h30m", "1e3", "nan", "5ms", "1 month", "5mb"])
def test_no_durations(text: str) -> None:
    """As for sizes."""
    with pytest.raises(ValueError, match=r"^a duration such as 300, 90s, 5m, 12h or 10d$"):
        parse_duration(text)

"""The grammar of the options.

Invariant: a text either yields a value that is ready for use, or raises a ValueError that says what was expected.
"""

import ipaddress
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from urllib.parse import SplitResult, urlsplit

from pullthrough.config.quantities import parse_duration, parse_size
from pullthrough.config.settings import Endpoint, Lifetimes, Network


def parse_host(text: str) -> str:
    host = text.strip().lower().rstrip(".")
    labels = host.split(".")
    if len(host) > 253 or not all(
        label and len(label) <= 63 and label.replace("-", "").replace("_", "").isalnum() and label.isascii()
        for label in labels
    ):
        raise ValueError("a host name")
    if is_address(host):
        raise ValueError("a host name, not an address (the CA signs names only)")
    return host


def _split(text: str, expected: str) -> SplitResult:
    """Return the parts of a URL. Raises a ValueError that does not quote the URL."""
    try:
        return urlsplit(text)
    except ValueError:
        raise ValueError(expected) from None


def port_of(split: SplitResult) -> int | None:
    """Return the port of a URL, if it has one. Raises a ValueError that does not quote the URL."""
    try:
        return split.port
    except ValueError:
        raise ValueError("a port from 1 to 65535") from None


def is_address(text: str) -> bool:
    """Return whether the text is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def parse_hosts(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(parse_host(part) for part in text.split(",")))


def parse_upstream(text: str) -> Mapping[str, Endpoint]:
    result: dict[str, Endpoint] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, url = part.partition("=")
        if not equals:
            raise ValueError("host=url[,host=url]")
        split = _split(url, "host=url where url is http(s)://name[:port] without a path")
        if split.scheme not in ("http", "https") or not split.hostname or split.path not in ("", "/"):
            raise ValueError("host=url where url is http(s)://name[:port] without a path")
        if split.query or split.fragment or split.username is not None:
            raise ValueError("host=url where url has no query, fragment or user")
        port = port_of(split) or (443 if split.scheme == "https" else 80)
        result[parse_host(name)] = Endpoint(split.scheme, split.hostname, port)
    return MappingProxyType(result)


def parse_clients(text: str) -> tuple[Network | str, ...]:
    result: list[Network | str] = []
    for part in (piece.strip() for piece in text.split(",")):
        if part in ("private", "local", "any"):
            result.append(part)
            continue
        try:
            result.append(ipaddress.ip_network(part))
        except ValueError as error:
            bits = "; behind the slash of a network no bits are set" if "host bits" in str(error) else ""
            raise ValueError(f"CIDR networks or the words private, local, any{bits}") from None
    return tuple(result)


def parse_listen(text: str) -> tuple[tuple[str, int], ...]:
    if text.strip().lower() in ("", "off"):
        return ()
    result = []
    for part in (piece.strip() for piece in text.split(",")):
        split = _split(f"//{part}", "off or [host]:port, with an IPv6 address in brackets")
        port = port_of(split)
        if not (split.hostname or part.startswith(":")) or split.netloc != part or "@" in part or not port:
            raise ValueError("off or [host]:port[,[host]:port], with an IPv6 address in brackets")
        host = split.hostname or ""
        result.append((host if not host or is_address(host) else parse_host(host), port))
    return tuple(dict.fromkeys(result))


def parse_advertise(text: str) -> Endpoint | None:
    if not text.strip():
        return None
    expected = "host, host:port or http://host[:port], with an IPv6 address in brackets"
    split = _split(text.strip() if "://" in text else f"//{text.strip()}", expected)
    port = port_of(split)
    plain = split.scheme in ("", "http") and split.path in ("", "/") and not split.query and not split.fragment
    if not plain or not split.hostname or "@" in split.netloc or port == 0:
        raise ValueError(expected)
    host = split.hostname if is_address(split.hostname) else parse_host(split.hostname)
    return Endpoint("http", host, port or (80 if "://" in text else 0))


def parse_front(text: str) -> Mapping[int, str] | None:
    """Return the registry that each port represents; None for `off`."""
    if text.strip().lower() == "off":
        return None
    result: dict[int, str] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        port, equals, host = part.partition("=")
        if not equals or not port.isdecimal() or not 0 < int(port) < 65536 or int(port) in result:
            raise ValueError("off or port=registry[,port=registry]")
        result[int(port)] = parse_host(host)
    return MappingProxyType(result)


def parse_object_store(text: str) -> str | None:
    if not text.strip():
        return None
    expected = "a URL such as s3://bucket/prefix, without credentials (those come from the environment)"
    split = _split(text.strip(), expected)
    if not split.scheme or not split.netloc or "@" in split.netloc or split.query or split.fragment:
        raise ValueError(expected)
    return text.strip()


def _parse_period(text: str) -> float:
    seconds = parse_duration(text)
    if seconds > 10 * 365 * 86400:
        raise ValueError("a duration of ten years at most")
    return seconds


def parse_lifetimes(text: str) -> Lifetimes:
    default, *rest = (part.strip() for part in text.split(","))
    rules = []
    for part in rest:
        pattern, equals, duration = part.rpartition("=")
        if not equals or not pattern.strip():
            raise ValueError("a duration, then pattern=duration for some models, separated by commas")
        rules.append((pattern.strip(), _parse_period(duration)))
    return Lifetimes(_parse_period(default), tuple(rules))


def parse_refresh(text: str) -> float | None:
    if text.strip().lower() == "off":
        return None
    seconds = _parse_period(text)
    if seconds < 10:
        raise ValueError("off, or a duration of at least 10 seconds")
    return seconds


def parse_patterns(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def parse_rate(text: str) -> float | None:
    if not text.strip():
        return None
    try:
        rate = float(parse_size(text))
    except ValueError:
        raise ValueError("bytes per second such as 500KB, 20MB or 1GiB") from None
    if rate < 1000:
        raise ValueError("at least 1000 bytes per second")
    return rate


def parse_limit(text: str) -> int | None:
    """Return a number of bytes; None for an empty text."""
    return parse_size(text) if text.strip() else None


def parse_flag(text: str) -> bool:
    match text.strip().lower():
        case "true" | "yes" | "on" | "1":
            return True
        case "false" | "no" | "off" | "0":
            return False
    raise ValueError("true or false")


def parse_count(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.strip().isdecimal() or not low <= int(text) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(text)

    return parse


def parse_word[T: StrEnum](words: type[T]) -> Callable[[str], T]:
    def parse(text: str) -> T:
        try:
            return words(text.strip().lower())
        except ValueError:
            raise ValueError(" or ".join(words)) from None

    return parse


def parse_folder(text: str) -> Path:
    if not text.strip() or "\0" in text:
        raise ValueError("a folder")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError("a folder; `~` or `~NAME` in front stands for a home that is not known here") from None


def parse_file(text: str) -> Path | None:
    return parse_folder(text) if text.strip() else None


def parse_level(text: str) -> str:
    level = text.strip().lower()
    if level not in ("debug", "info", "warning", "error"):
        raise ValueError("debug, info, warning or error")
    return level

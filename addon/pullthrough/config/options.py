"""Every option: its name, default, meaning and grammar; from texts to `Settings`.

Invariant: `Settings` are made only if every option was understood; a bad value raises SettingsError that names the
option, what was expected and what was got.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from pullthrough.config.parsers import (
    parse_advertise,
    parse_clients,
    parse_front,
    parse_host,
    parse_hosts,
    parse_listen,
    parse_object_store,
    parse_upstream,
)
from pullthrough.config.quantities import parse_duration, parse_size
from pullthrough.config.settings import (
    PREFIX,
    R2_HOST,
    Finish,
    Lifetimes,
    Log,
    Settings,
    Tunnel,
    Withdrawn,
)
from pullthrough.core.errors import SettingsError

_ENVIRONMENT: Final = "OLLAMA_CACHE_"
_USER: Final = re.compile(r"//[^/\s,]*@")


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the option table; `default` is the text a user would type, "" where it depends on the machine."""

    name: str
    default: str
    help: str
    parse: Callable[[str], object]
    may_be_empty: bool = False
    """An empty text is a value of its own and does not stand for the default."""


def _parse_duration(text: str) -> float:
    seconds = parse_duration(text)
    if seconds > 10 * 365 * 86400:
        raise ValueError("a duration of ten years at most")
    return seconds


def _parse_lifetimes(text: str) -> Lifetimes:
    default, *rest = (part.strip() for part in text.split(","))
    rules = []
    for part in rest:
        pattern, equals, duration = part.rpartition("=")
        if not equals or not pattern.strip():
            raise ValueError("a duration, then pattern=duration for some models, separated by commas")
        rules.append((pattern.strip(), _parse_duration(duration)))
    return Lifetimes(_parse_duration(default), tuple(rules))


def _parse_refresh(text: str) -> float | None:
    if text.strip().lower() == "off":
        return None
    seconds = _parse_duration(text)
    if seconds < 10:
        raise ValueError("off, or a duration of at least 10 seconds")
    return seconds


def _parse_patterns(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def _parse_rate(text: str) -> float | None:
    if not text.strip():
        return None
    try:
        rate = float(parse_size(text))
    except ValueError:
        raise ValueError("bytes per second such as 500KB, 20MB or 1GiB") from None
    if rate < 1000:
        raise ValueError("at least 1000 bytes per second")
    return rate


def _parse_size(text: str) -> int | None:
    return parse_size(text) if text.strip() else None


def _parse_flag(text: str) -> bool:
    match text.strip().lower():
        case "true" | "yes" | "on" | "1":
            return True
        case "false" | "no" | "off" | "0":
            return False
    raise ValueError("true or false")


def _parse_count(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.strip().isdecimal() or not low <= int(text) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(text)

    return parse


def _parse_word[T: StrEnum](words: type[T]) -> Callable[[str], T]:
    def parse(text: str) -> T:
        try:
            return words(text.strip().lower())
        except ValueError:
            raise ValueError(" or ".join(words)) from None

    return parse


def _parse_folder(text: str) -> Path:
    if not text.strip() or "\0" in text:
        raise ValueError("a folder")
    return Path(text).expanduser()


def _parse_file(text: str) -> Path | None:
    return _parse_folder(text) if text.strip() else None


def _parse_level(text: str) -> str:
    level = text.strip().lower()
    if level not in ("debug", "info", "warning", "error"):
        raise ValueError("debug, info, warning or error")
    return level


OPTIONS: Final = (
    Option("dir", "", "The store: a folder of its own for the recorded models.", _parse_folder),
    Option("certs", "", "The folder of the certificate authority that clients trust.", _parse_folder),
    Option(
        "registries",
        "registry.ollama.ai",
        "Registries to cache, separated by commas; all other hosts are tunnelled unread.",
        parse_hosts,
    ),
    Option("blob_host", R2_HOST, "The host that the registry redirects blob downloads to.", parse_host),
    Option(
        "upstream",
        "",
        "Where a registry or the blob host is really reached: host=url[,host=url].",
        parse_upstream,
    ),
    Option(
        "clients",
        "private,local",
        "Who may use the cache: networks (CIDR), and the words private (private ranges and loopback), "
        "local (networks this machine is on) and any.",
        parse_clients,
    ),
    Option("tunnel", Tunnel.ANY, "CONNECT to other public hosts: any or none.", _parse_word(Tunnel)),
    Option(
        "listen",
        ":9200",
        "Where models are served without a proxy, by plain HTTP: host:port[,host:port], no host for all addresses; "
        "off for nowhere.",
        parse_listen,
        may_be_empty=True,
    ),
    Option(
        "front",
        "9200=registry.ollama.ai",
        "Which registry a port speaks for: port=registry[,port=registry]; each of these ports is listened on too.",
        parse_front,
        may_be_empty=True,
    ),
    Option(
        "advertise",
        "",
        "Where clients find `listen`, for set-up and pages: host, host:port or http://host[:port]; empty for the "
        "address at which they reached the proxy.",
        parse_advertise,
    ),
    Option(
        "manifest_lifetime",
        "5m",
        "How long a stored manifest is served unasked: a duration, then pattern=duration for some models, "
        "as in 5m,llama3*=1d.",
        _parse_lifetimes,
    ),
    Option(
        "refresh",
        "off",
        "How often tags pulled in the last 30 days are looked at in the background, such as 6h; what has changed is "
        "recorded before the tag moves.",
        _parse_refresh,
    ),
    Option(
        "withdrawn",
        Withdrawn.SERVE,
        "A stored model that the registry has no more (404): serve it on, or drop it.",
        _parse_word(Withdrawn),
    ),
    Option(
        "pins",
        "",
        "Patterns of models that are never evicted, and refreshed however long ago they were pulled, "
        "separated by commas.",
        _parse_patterns,
    ),
    Option("offline", "false", "Never contact a registry: serve what is recorded.", _parse_flag),
    Option(
        "max_size",
        "",
        "The most that the store may hold, such as 200GB: models not pulled for longest go first; empty for no limit.",
        _parse_size,
    ),
    Option("min_free", "5GiB", "How much of the disk is left free, whatever max_size says.", _parse_size),
    Option(
        "finish",
        Finish.AUTO,
        "Complete a recording that every client has left: auto (when half is there), always or never.",
        _parse_word(Finish),
    ),
    Option("prefetch", "true", "Record the layers behind the one that a client pulls.", _parse_flag),
    Option("upstream_connections", "16", "Connections per blob towards its source.", _parse_count(1, 64)),
    Option(
        "upstream_rate",
        "",
        "The most that comes in from blob sources, all together: bytes per second such as 20MB; empty for no limit.",
        _parse_rate,
    ),
    Option(
        "object_store",
        "",
        "What all caches of a fleet share beyond their own disks: s3://bucket/prefix, gs://… or az://…, credentials "
        "and endpoint by the usual variables of the environment; empty for none.",
        parse_object_store,
    ),
    Option(
        "fleet_secret_file",
        "",
        "A file, readable by its owner alone, with what the fleet's caches sign by: at least 32 bytes, the same on "
        "each.",
        _parse_file,
    ),
    Option(
        "offload",
        "false",
        "Redirect requests of 8 MiB and more for public blobs to presigned addresses of the object store, for Ollama "
        "0.34.4 and older; never to a private address.",
        _parse_flag,
    ),
    Option("log", Log.TEXT, "How the cache logs: text, or json (an object a line).", _parse_word(Log)),
    Option("log_level", "info", "How much the cache logs: debug, info, warning or error.", _parse_level),
)


REMOVED: Final = {
    "direct": "Ollama since 0.35 refuses every redirect from https to http, so parts stay in TLS; "
    f"in place of direct=object-store there is {PREFIX}offload=true",
}
"""Options of earlier versions, and what to do without them."""


def environment_texts(environ: Mapping[str, str]) -> dict[str, str]:
    """The option texts that the environment has, by bare name; an empty one is none. Removed options are told too."""
    names = {name: f"{_ENVIRONMENT}{name.upper()}" for name in (*(option.name for option in OPTIONS), *REMOVED)}
    return {name: environ[variable] for name, variable in names.items() if environ.get(variable)}


def parse_settings(texts: Mapping[str, str], *, dir: Path, certs: Path) -> Settings:  # noqa: A002 -- as the option
    """Settings of the option texts by bare name; absent or empty ones take their default.

    `dir` and `certs` are the defaults of the two options that depend on the machine.
    SettingsError for an unknown name or a value that does not parse.
    """
    known = {option.name for option in OPTIONS}
    if removed := sorted(set(texts) & set(REMOVED)):
        raise SettingsError(f"option {PREFIX}{removed[0]} was removed: {REMOVED[removed[0]]}")
    if unknown := sorted(set(texts) - known):
        raise SettingsError(
            f"unknown option {PREFIX}{unknown[0]}: expected one of {', '.join(sorted(known))} after {PREFIX!r}"
        )
    values: dict[str, object] = {"dir": dir, "certs": certs}
    for option in OPTIONS:
        text = texts.get(option.name, option.default)
        if not text and not option.may_be_empty:
            text = option.default
        if not text and option.name in values:
            continue
        try:
            values[option.name] = option.parse(text)
        except ValueError as error:
            # What does not parse may be a URL with a password, which this is to refuse and not to tell.
            shown = _USER.sub("//...@", text)
            raise SettingsError(f"option {PREFIX}{option.name}: expected {error}, got {shown!r}") from None
    settings = Settings(**values)  # type: ignore[arg-type]  # the table above is the typing
    _check_together(settings)
    return settings


def _check_together(settings: Settings) -> None:
    if settings.blob_host in settings.registries:
        raise SettingsError(
            f"option {PREFIX}blob_host: expected a host other than the registries "
            f"(clients demand another host name behind the redirect), got {settings.blob_host!r}"
        )
    for host in settings.registries:
        if settings.blob_host.endswith(f".{host}"):
            # Go forwards Authorization to subdomains of the first host (net/http, shouldCopyHeaderOnRedirect).
            raise SettingsError(
                f"option {PREFIX}blob_host: expected no subdomain of a registry, got {settings.blob_host!r}"
            )
    if settings.listen and (strangers := sorted(set(settings.front.values()) - set(settings.registries))):
        raise SettingsError(
            f"option {PREFIX}front: expected only registries of {PREFIX}registries "
            f"({', '.join(settings.registries)}), got {strangers[0]!r}"
        )
    if settings.object_store is not None and settings.fleet_secret_file is None:
        raise SettingsError(
            f"option {PREFIX}object_store: expected {PREFIX}fleet_secret_file beside it, got none "
            "(what is shared is believed only when it is signed)"
        )
    if settings.object_store is None and settings.offload:
        raise SettingsError(f"option {PREFIX}offload: expected {PREFIX}object_store beside it, got none")
    if strangers := sorted(set(settings.upstream) - set(settings.intercepted)):
        raise SettingsError(
            f"option {PREFIX}upstream: expected only {', '.join(settings.intercepted)}, got {strangers[0]!r}"
        )

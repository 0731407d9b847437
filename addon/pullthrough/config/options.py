"""Every option: its name, default, meaning and grammar; conversion of texts to `Settings`.

Invariant: `Settings` are made only if every option was understood; a bad value raises a SettingsError that names the
option, what was expected and what was got.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pullthrough.config.near_misses import hint, meant, near_flag, unknown_variables
from pullthrough.config.parsers import (
    parse_advertise,
    parse_clients,
    parse_count,
    parse_file,
    parse_flag,
    parse_folder,
    parse_front,
    parse_host,
    parse_hosts,
    parse_level,
    parse_lifetimes,
    parse_limit,
    parse_listen,
    parse_object_store,
    parse_patterns,
    parse_rate,
    parse_refresh,
    parse_upstream,
    parse_word,
)
from pullthrough.config.settings import (
    ENVIRONMENT,
    PREFIX,
    R2_HOST,
    Finish,
    Log,
    Settings,
    Tunnel,
    Withdrawn,
)
from pullthrough.core.errors import SettingsError

_SECRETS: Final = (
    (re.compile(r"//[^/\s,]*@"), "//...@"),
    (re.compile(r"\?\S+"), "?..."),
    (re.compile(r"\b(?:AKIA|ASIA|hf_|ghp_|glpat-|sk-)[\w-]{8,}|\b[0-9a-fA-F]{40,}\b"), "..."),
    (re.compile(r"(?<![\w/+=-])(?=[\w/+=-]*[0-9])(?=[\w/+=-]*[a-z])(?=[\w/+=-]*[A-Z])[\w+=-][\w/+=-]{19,}"), "..."),
)
"""Patterns of what may be a password, a signature, a token or a key, and what is shown instead."""


def shown(text: str) -> str:
    """Return what an error may quote of a value, which may be a secret in the wrong place."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _parse_secret_file(text: str) -> Path | None:
    if not text.startswith(("/", "~", ".")) and shown(text) != text:
        raise ValueError("the path of a file, not the secret itself")
    return parse_file(text)


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the option table; `default` is what a user would type, "" if it depends on the machine."""

    name: str
    default: str
    help: str
    parse: Callable[[str], object]
    may_be_empty: bool = False
    """Whether an empty text is a value of its own rather than the default."""


GROUPS: Final[Mapping[str, tuple[Option, ...]]] = {
    "Where things lie": (
        Option("dir", "", "The store: a folder of its own for the recorded models.", parse_folder),
        Option(
            "index_dir",
            "",
            "Where the store's index is: a folder on a disk of this machine; empty for the store itself, or for the "
            "user's state folder if the store is on a share.",
            parse_file,
        ),
        Option("certs", "", "The folder of the certificate authority that clients trust.", parse_folder),
        Option(
            "config",
            "",
            "A file of these options (TOML), which the command line and the environment override; empty for "
            "config.toml beside the store or in the usual places.",
            parse_file,
        ),
        Option(
            "runtime_dir",
            "",
            "Where a running cache leaves the note by which the commands find it; empty for /run/ollama-cache, or a "
            "folder of the user's own in /tmp.",
            parse_file,
        ),
    ),
    "What is cached": (
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
    ),
    "Who may use it, and where": (
        Option(
            "clients",
            "private,local",
            "Who may use the cache: networks (CIDR), and the words private (private ranges and loopback), local "
            "(networks this machine is on) and any.",
            parse_clients,
        ),
        Option("tunnel", Tunnel.ANY, "CONNECT to other public hosts: any or none.", parse_word(Tunnel)),
        Option(
            "listen",
            ":9200",
            "Where models are served without a proxy, by plain HTTP: host:port[,host:port], no host for all "
            "addresses; off for nowhere.",
            parse_listen,
            may_be_empty=True,
        ),
        Option(
            "front",
            "",
            "Which registry a port speaks for: port=registry[,port=registry]; each of these ports is listened on "
            "too. The other ports of `listen` speak for the first of `registries`; off for none.",
            parse_front,
        ),
        Option(
            "advertise",
            "",
            "Where clients find `listen`, for set-up and pages: host, host:port or http://host[:port]; empty for "
            "the address at which they reached the proxy.",
            parse_advertise,
        ),
    ),
    "How fresh it is": (
        Option(
            "manifest_lifetime",
            "5m",
            "How long a stored manifest is served unasked: a duration, then pattern=duration for some models, as "
            "in 5m,llama3*=1d.",
            parse_lifetimes,
        ),
        Option(
            "refresh",
            "off",
            "How often tags pulled in the last 30 days are looked at in the background, such as 6h; what has "
            "changed is recorded before the tag moves.",
            parse_refresh,
        ),
        Option(
            "withdrawn",
            Withdrawn.SERVE,
            "A stored model that the registry has no more (404): serve it on, or drop it.",
            parse_word(Withdrawn),
        ),
        Option("offline", "false", "Never contact a registry: serve what is recorded.", parse_flag),
    ),
    "What is kept": (
        Option(
            "max_size",
            "",
            "The most that the store may hold, such as 200GB: models not pulled for longest go first; empty for "
            "no limit.",
            parse_limit,
        ),
        Option("min_free", "5GiB", "How much of the disk is left free, whatever max_size says.", parse_limit),
        Option(
            "pins",
            "",
            "Patterns of models that are never evicted, and refreshed however long ago they were pulled, "
            "separated by commas.",
            parse_patterns,
        ),
        Option(
            "finish",
            Finish.AUTO,
            "Complete a recording that every client has left: auto (when half is there), always or never.",
            parse_word(Finish),
        ),
    ),
    "How it is fetched": (
        Option("prefetch", "true", "Record the layers behind the one that a client pulls.", parse_flag),
        Option("upstream_connections", "16", "Connections per blob towards its source.", parse_count(1, 64)),
        Option(
            "upstream_rate",
            "",
            "The most that comes in from blob sources, all together: bytes per second such as 20MB; empty for no "
            "limit.",
            parse_rate,
        ),
    ),
    "A fleet that shares an object store": (
        Option(
            "object_store",
            "",
            "What all caches of a fleet share beyond their own disks: s3://bucket/prefix, gs://… or az://…, "
            "credentials and endpoint by the usual variables of the environment; empty for none.",
            parse_object_store,
        ),
        Option(
            "fleet_secret_file",
            "",
            "A file, readable by its owner alone, with what the fleet's caches sign by: at least 32 bytes, the "
            "same on each.",
            _parse_secret_file,
        ),
        Option(
            "offload",
            "false",
            "Redirect requests of 8 MiB and more for public blobs to presigned addresses of the object store, for "
            "Ollama 0.34.4 and older; never to a private address.",
            parse_flag,
        ),
    ),
    "The log": (
        Option("log", Log.TEXT, "How the cache logs: text, or json (an object a line).", parse_word(Log)),
        Option("log_level", "info", "How much the cache logs: debug, info, warning or error.", parse_level),
    ),
}
"""Every option, grouped by subject."""
OPTIONS: Final = tuple(option for group in GROUPS.values() for option in group)


REMOVED: Final = {
    "direct": "Ollama since 0.35 refuses every redirect from https to http, so parts stay in TLS; "
    f"in place of direct=object-store there is {PREFIX}offload=true",
}
"""Options of earlier versions, and what to do instead."""


def environment_texts(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the option texts in the environment, by bare name; an empty variable counts as unset.

    Raises:
        SettingsError: a variable is meant for us but names no option, or one of an earlier version.
    """
    known = [option.name for option in OPTIONS]
    for name in REMOVED:
        if environ.get(f"{ENVIRONMENT}{name.upper()}"):
            raise _removed(name)
    removed = {f"{ENVIRONMENT}{name.upper()}" for name in REMOVED}
    for variable, name in unknown_variables({key: environ[key] for key in environ.keys() - removed}, known):
        mend = hint(
            name,
            known,
            spelt=lambda option: f"{ENVIRONMENT}{option.upper()}",
            otherwise="`ollama-cache run --help` lists the options",
        )
        raise SettingsError(f"unknown variable {variable} in the environment; {mend}")
    return {name: text for name in known if (text := environ.get(f"{ENVIRONMENT}{name.upper()}"))}


def check_foreign(names: Iterable[str]) -> None:
    """Refuse options that mitmproxy does not know and that were meant for us.

    Raises:
        SettingsError: an option has our prefix, or is close to one of our names.
    """
    known = [option.name for option in OPTIONS]
    for name in names:
        bare = name.removeprefix(PREFIX)
        if bare in REMOVED:
            raise _removed(bare)
        if name.startswith(PREFIX):
            raise _unknown(bare)
        if option := meant(name, known):
            raise SettingsError(f"unknown option {name}; did you mean {PREFIX}{option}?")


def check_flags(arguments: Iterable[str]) -> None:
    """Refuse flags that would make mitmdump print its own usage (`--max-size`, `--listen-prot`), and its `--certs`.

    Raises:
        SettingsError: an argument is an option of ours given like one of mitmdump's, or a misspelt one of mitmdump's.
    """
    known = [option.name for option in OPTIONS]
    for argument in arguments:
        flag, _, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_").removeprefix(PREFIX)
        if flag.startswith("--") and name in known:
            given = f"--set {PREFIX}{name}={shown(value) or 'VALUE'}"
            raise SettingsError(f"{flag} is no option of the cache; did you mean {given}?")
        if near := near_flag(flag):
            raise SettingsError(f"{flag} is no option of mitmdump; did you mean {near}?")


def _removed(name: str) -> SettingsError:
    return SettingsError(f"option {PREFIX}{name} was removed: {REMOVED[name]}")


def _unknown(name: str) -> SettingsError:
    known = [option.name for option in OPTIONS]
    otherwise = f"expected one of {', '.join(sorted(known))} after {PREFIX!r}"
    mend = hint(name, known, spelt=lambda option: f"{PREFIX}{option}", otherwise=otherwise)
    return SettingsError(f"unknown option {PREFIX}{name}; {mend}")


def parse_settings(
    texts: Mapping[str, str],
    *,
    dir: Path,  # noqa: A002 -- as the option
    certs: Path,
    sources: Mapping[str, str] | None = None,
) -> Settings:
    """Convert option texts, by bare name, to settings; absent or empty ones take their default.

    `dir` and `certs` are the defaults of the two options that depend on the machine; `sources` says where each text
    comes from.

    Raises:
        SettingsError: a name is unknown, or a value does not parse.
    """
    for name in texts:
        if name in REMOVED:
            raise _removed(name)
        if name not in {option.name for option in OPTIONS}:
            raise _unknown(name)
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
            source = f" ({sources[option.name]})" if sources and option.name in sources else ""
            raise SettingsError(
                f"option {PREFIX}{option.name}: expected {error}, got {shown(text)!r}{source}"
            ) from None
    settings = Settings(**values)  # type: ignore[arg-type]  # the table above has the types
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
    if settings.front and not settings.listen:
        raise SettingsError(
            f"option {PREFIX}front: expected hosts to listen on in {PREFIX}listen beside it, got {PREFIX}listen=off"
        )
    if strangers := sorted(set(settings.fronts.values()) - set(settings.registries)):
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

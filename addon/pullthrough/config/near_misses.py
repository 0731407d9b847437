"""Unknown names that were meant to be options of ours, and which option was meant.

Invariant: a name that has a meaning for Ollama, mitmproxy or Kubernetes is never taken for a misspelt option.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from difflib import SequenceMatcher, get_close_matches
from typing import Final

from pullthrough.config.settings import ENVIRONMENT, PREFIX

_ALIKE: Final = 0.8
_PREFIX_ALIKE: Final = 0.6
"""`ollama_`, `olama_cache_` and `cach_` are meant as our prefix; an option's exact name must follow."""
_SHORT: Final = 5
"""A shorter bare name, such as `dir`, counts only if spelt exactly."""
_SERVICE: Final = re.compile(r"SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?")
"""What Kubernetes adds to the environment, after `OLLAMA_CACHE_`, for a Service called ollama-cache."""
_SERVICE_URL: Final = re.compile(r"(tcp|udp|sctp)://\S+")
"""Kubernetes' value of `OLLAMA_CACHE_PORT`, a variable that users set, too."""
_SAME: Final = dict.fromkeys(("store", "folder", "path", "data", "data_dir", "home"), "dir") | {"size": "max_size"}
"""Other words for our options."""
_OF_MITMDUMP: Final = {
    "port": "the proxy's port is mitmdump's own option, --listen-port PORT; that of the pages is in listen",
    "listen_port": "it is mitmdump's own option: --listen-port PORT",
    "host": "the proxy's address is mitmdump's own option, --listen-host ADDRESS; that of the pages is in listen",
    "listen_host": "it is mitmdump's own option: --listen-host ADDRESS",
    "mode": "it is mitmdump's own option: --mode MODE",
}
"""Options of mitmdump that may be taken for ours, and what to do."""


_FLAGS: Final = (
    *("--listen-host", "--listen-port", "--mode", "--set", "--options", "--certs", "--cert-passphrase", "--proxyauth"),
    *("--upstream-auth", "--ssl-insecure", "--allow-hosts", "--ignore-hosts", "--tcp-hosts", "--quiet", "--verbose"),
    *("--version", "--help", "--help-mitmdump", "--show-ignored-hosts"),
)
"""The flags of mitmdump that a user of the cache may give."""


def near_flag(flag: str) -> str | None:
    """Return the flag of mitmdump that this one misspells; None for a real flag, or the beginning of one."""
    switched_on = f"--{flag.removeprefix('--no-').removeprefix('--')}"
    if not flag.startswith("--") or any(known.startswith(switched_on) for known in _FLAGS):
        return None
    return next(iter(get_close_matches(f"--{_plain(flag[2:]).replace('_', '-')}", _FLAGS, n=1, cutoff=_ALIKE)), None)


def hint(name: str, known: Collection[str], *, spelt: Callable[[str], str], otherwise: str) -> str:
    """Return advice on an unknown name: the option that was meant, as `spelt` writes it, else `otherwise`."""
    if elsewhere := _OF_MITMDUMP.get(_plain(name)):
        return elsewhere
    found = closest(name, known)
    return f"did you mean {spelt(found)}?" if found else otherwise


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that this one misspells."""
    plain = _plain(name)
    return _SAME.get(plain) or next(iter(get_close_matches(plain, known, n=1, cutoff=0.6)), None)


def meant(name: str, known: Collection[str]) -> str | None:
    """Return our option that was meant by an option `name` unknown to mitmproxy."""
    plain = _plain(name)
    for option in known:
        head = plain.removesuffix(option)
        if head != plain and (not head or _alike(head, PREFIX) >= _PREFIX_ALIKE):
            return option
    found = get_close_matches(plain, [f"{PREFIX}{option}" for option in known], n=1, cutoff=_ALIKE)
    if not found and len(plain) >= _SHORT:
        found = get_close_matches(plain, known, n=1, cutoff=_ALIKE)
    return found[0].removeprefix(PREFIX) if found else None


def unknown_variables(environ: Mapping[str, str], known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield each environment variable that is meant for us and names no option, with the name it may mean."""
    variables = {f"{ENVIRONMENT}{option.upper()}" for option in known}
    for name in sorted(environ.keys() - variables):
        if name.startswith(ENVIRONMENT):
            rest = name.removeprefix(ENVIRONMENT)
            if not _SERVICE.fullmatch(rest) or (rest == "PORT" and not _SERVICE_URL.fullmatch(environ[name])):
                yield name, rest
            continue
        plain = _plain(name)
        for option in known:
            head = plain.removesuffix(option)
            if head != plain and _alike(head, PREFIX) >= _ALIKE:
                yield name, option
                break


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _alike(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()

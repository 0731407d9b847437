"""The options of mitmproxy: ours, those that the cache sets, and those that it refuses.

Invariant: no option of mitmproxy can undo what clients trust the cache for.
"""

from typing import Any, Final, Optional

from mitmproxy import addonmanager, ctx
from mitmproxy.proxy.mode_specs import ProxyMode

from pullthrough.config.options import OPTIONS, check_foreign
from pullthrough.config.settings import PREFIX
from pullthrough.core.errors import SettingsError

SET: Final = {
    # A hit must not dial upstream first (mitmproxy#4775).
    "connection_strategy": "lazy",
    # An early end over HTTP/2 costs Ollama its progress, and mitmproxy's HTTP/2 send buffer is unbounded.
    "http2": False,
    "http3": False,
    "onboarding": False,
    "flow_detail": 0,
    # The option `clients` alone says who may connect.
    "block_global": False,
    "block_private": False,
    "store_streamed_bodies": False,
    "stream_large_bodies": None,
    "body_size_limit": None,
    "upstream_cert": False,
    # In reverse mode, too, Host is the client's own: it must agree with SNI.
    "keep_host_header": True,
}
_TEXT: Final[Any] = Optional[str]  # noqa: UP045 -- mitmproxy recognises types by how they are written
MAX_PORT: Final = 65_535
REFUSED: Final = {"ssl_insecure": "the certificates of registries are always verified"} | dict.fromkeys(
    ("emudhra", "emudhra_old"), "it signs with the leaked key of a public authority"
)
"""Options that stop the start if they are on, and why. The last two came with 12.3."""


def check_refused() -> None:
    """Raise SettingsError if an option is on that undoes what clients trust us for, or one is not to be understood."""
    for name, reason in REFUSED.items():
        if name in ctx.options and getattr(ctx.options, name):
            raise SettingsError(f"option {name}: must be off ({reason}); remove it and start again")
    # mitmdump takes any word that is no option, and all that follows it, for a filter of its output.
    if "dumper_filter" in ctx.options and (words := ctx.options.dumper_filter):
        raise SettingsError(
            f"expected options, got {words!r}, and nothing behind it counts; an option of the cache is written "
            "--set ollama_cache_NAME=VALUE"
        )
    for name, value in ctx.options.deferred.items():
        if name.startswith(PREFIX):
            _check_given(name, value)
    if (port := ctx.options.listen_port) is not None and not 0 <= port <= MAX_PORT:
        raise SettingsError(f"option listen_port: expected 0 to {MAX_PORT}, got {port}")


def declare(loader: addonmanager.Loader) -> None:
    """Declare our options, as text: mitmproxy unloads an addon whose numeric option does not parse, silently."""
    for option in OPTIONS:
        # None means not on the command line; mitmproxy need not know where else an option may come from.
        default = f" Default: {option.default}." if option.default else ""
        loader.add_option(f"{PREFIX}{option.name}", _TEXT, None, f"{option.help}{default}")
    ctx.options.update(**SET)


def _check_given(name: str, value: Any) -> None:
    """Raise SettingsError for what mitmproxy would not take as text: it would go on without us."""
    # From the command line it is a list of texts, from mitmproxy's config.yaml what YAML makes of it.
    found = getattr(value, "val", value)
    if isinstance(found, list) and len(found) != 1:
        raise SettingsError(
            f"option {name}: expected it once, got it {len(found)} times; where it takes several values, separate them "
            "by commas"
        )
    if found is value and not isinstance(found, str | None):
        raise SettingsError(f"option {name}: expected text, got {type(value).__name__}; put the value in quotes")


def unaccepted() -> SettingsError:
    """Return why mitmproxy has not accepted our options: then it silently does without the addon."""
    try:
        ctx.options.process_deferred()
    except Exception as error:
        return SettingsError(f"an option was not accepted: {error}")
    return SettingsError("mitmproxy has not configured the addon, for a reason that it does not tell")


def given() -> dict[str, str]:
    """Return our options on mitmproxy's command line, by bare name. Raises SettingsError."""
    check_foreign(ctx.options.deferred)
    texts = {option.name: getattr(ctx.options, f"{PREFIX}{option.name}") for option in OPTIONS}
    return {name: text for name, text in texts.items() if text is not None}


def ports_to_listen_on() -> set[int]:
    """Return the ports that mitmproxy is told to listen on."""
    modes = (ProxyMode.parse(spec) for spec in ctx.options.mode)
    return {port for mode in modes if (port := mode.listen_port(ctx.options.listen_port))}

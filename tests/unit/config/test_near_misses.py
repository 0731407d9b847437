"""near_misses: what is meant for us is found, and what others have named is left alone."""

import pytest

from pullthrough.config.near_misses import closest, hint, meant, unknown_variables
from pullthrough.config.options import OPTIONS

KNOWN = [option.name for option in OPTIONS]


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("max_size", "max_size"),
        ("max-size", "max_size"),
        ("maxsize", "max_size"),
        ("dir", "dir"),
        ("listen", "listen"),
        ("olama_cache_dir", "dir"),
        ("ollama_cach_listen", "listen"),
        ("ollamacache_max_size", "max_size"),
        ("ollama_max_size", "max_size"),
        ("cache_min_free", "min_free"),
        ("OLLAMA_CACHE_PINS", "pins"),
        ("olama_cache_max_sise", "max_size"),
    ],
)
def test_meant_for_us(name: str, option: str) -> None:
    """Without the prefix, with a misspelt one, in another spelling."""
    assert meant(name, KNOWN) == option


@pytest.mark.parametrize(
    "name", ["my_addon_dir", "report_log", "d", "lisp", "view_order", "web_port", "kv_store", "models"]
)
def test_meant_for_others(name: str) -> None:
    """Another script's options may end like ours."""
    assert meant(name, KNOWN) is None


OLLAMA = """HOST MODELS DEBUG KEEP_ALIVE MAX_LOADED_MODELS MAX_QUEUE NUM_PARALLEL NOHISTORY NOPRUNE ORIGINS SCHED_SPREAD
FLASH_ATTENTION KV_CACHE_TYPE LLM_LIBRARY LOAD_TIMEOUT GPU_OVERHEAD MULTIUSER_CACHE CONTEXT_LENGTH NEW_ENGINE REMOTES
TMPDIR RUNNERS_DIR INTEL_GPU EDITOR AUTH USE_AUTH LOG_LEVEL DIR"""
KUBERNETES = """SERVICE_HOST SERVICE_PORT SERVICE_PORT_PROXY SERVICE_PORT_BLOBS PORT PORT_8080_TCP PORT_8080_TCP_PROTO
PORT_8080_TCP_PORT PORT_8080_TCP_ADDR PORT_9200_UDP"""


def test_variables_of_others() -> None:
    """Ollama's own, those that Kubernetes makes of a Service called ollama-cache, and any without our name."""
    names = [f"OLLAMA_{name}" for name in OLLAMA.split()] + [f"OLLAMA_CACHE_{name}" for name in KUBERNETES.split()]
    names += ["DIR", "XDG_CACHE_DIR", "PIP_CACHE_DIR", "CACHE_DIR", "LOG_LEVEL", "OLLAMA_CACHE_DIR"]
    assert list(unknown_variables(dict.fromkeys(names, "tcp://10.96.0.7:8080"), KNOWN)) == []


@pytest.mark.parametrize("value", ["3128", ":3128", "", "http://x"])
def test_a_port_that_is_not_of_kubernetes(value: str) -> None:
    """It is meant for us, and the message says which option of whom it is."""
    assert list(unknown_variables({"OLLAMA_CACHE_PORT": value}, KNOWN)) == [("OLLAMA_CACHE_PORT", "PORT")]
    assert "--listen-port PORT" in hint("PORT", KNOWN, spelt=str, otherwise="")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("OLLAMA_CACHE_MAXSIZE", "max_size"),
        ("OLLAMA_CACHE_STORE", "dir"),
        ("OLLAMA_CACHE_QQQ", None),
        ("OLLAMA_CACHE_", None),
        ("ollama_cache_dir", "dir"),
        ("OLAMA_CACHE_DIR", "dir"),
        ("OLLAMACACHE_DIR", "dir"),
        ("OLLAMA_CASH_LOG_LEVEL", "log_level"),
    ],
)
def test_variables_meant_for_us(name: str, option: str | None) -> None:
    """With the prefix each one, with a misspelt prefix those that end like an option."""
    ((variable, meant_by),) = unknown_variables({"PATH": "/bin", name: "x"}, KNOWN)
    assert (variable, closest(meant_by, KNOWN)) == (name, option)


def test_closest() -> None:
    """Or none, where a guess would be a riddle."""
    assert closest("registrys", KNOWN) == "registries"
    assert closest("manifest_ttl", KNOWN) == "manifest_lifetime"
    assert closest("zzz", KNOWN) is None

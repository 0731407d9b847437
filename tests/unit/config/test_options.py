"""options: every option's grammar, and errors that say expected and got."""

import ipaddress
from pathlib import Path

import pytest

from pullthrough.config.options import OPTIONS, Option, check_foreign, environment_texts, parse_settings, shown
from pullthrough.config.settings import R2_HOST, Endpoint, Finish, Lifetimes, Log, Settings, Tunnel, Withdrawn
from pullthrough.core.errors import SettingsError


def parse(**texts: str) -> Settings:
    return parse_settings(texts, dir=Path("/d"), certs=Path("/c"))


def test_defaults() -> None:
    """Without options: the Ollama registry, its CDN, the local networks."""
    assert parse() == Settings(
        dir=Path("/d"),
        index_dir=None,
        certs=Path("/c"),
        config=None,
        runtime_dir=None,
        registries=("registry.ollama.ai",),
        blob_host=R2_HOST,
        upstream={},
        clients=("private", "local"),
        tunnel=Tunnel.ANY,
        listen=(("", 9200),),
        front={},
        advertise=None,
        offload=False,
        manifest_lifetime=Lifetimes(300.0),
        refresh=None,
        withdrawn=Withdrawn.SERVE,
        pins=(),
        offline=False,
        max_size=None,
        min_free=5 << 30,
        finish=Finish.AUTO,
        prefetch=True,
        upstream_connections=16,
        upstream_rate=None,
        object_store=None,
        fleet_secret_file=None,
        log=Log.TEXT,
        log_level="info",
    )


@pytest.mark.parametrize(
    ("registries", "expected"),
    [
        ("registry.ollama.ai", "registry.ollama.ai"),
        ("registry.ollama.com,registry.ollama.ai", "registry.ollama.ai"),
        ("hf.co,registry.ollama.com", "registry.ollama.com"),
        ("hf.co", "registry.ollama.ai"),
    ],
)
def test_which_name_of_a_registry_is_asked(registries: str, expected: str) -> None:
    """The one under which all is stored if it is configured, else its other name."""
    assert parse(registries=registries, listen="off").asked("registry.ollama.ai") == expected


def test_every_option_has_help() -> None:
    """One paragraph, without a line break."""
    assert all(option.help and "\n" not in option.help for option in OPTIONS)


def test_values() -> None:
    """Each grammar once."""
    settings = parse(
        dir="/x",
        registries="Registry.Ollama.AI., hub.example",
        upstream="registry.ollama.ai=https://mirror.lan:8443,hub.example=http://[::1]:5000/",
        clients="10.1.0.0/16,any",
        tunnel="none",
        manifest_lifetime="1h, llama3*=2d,hf.co/*=0",
        refresh="6h",
        withdrawn="DROP",
        pins="gemma*, hf.co/me/*",
        max_size="200GB",
        min_free="0",
        offline="yes",
        finish="never",
        upstream_connections="4",
        log_level="DEBUG",
    )
    assert settings.dir == Path("/x")
    assert settings.registries == ("registry.ollama.ai", "hub.example")
    assert settings.upstream["registry.ollama.ai"] == Endpoint("https", "mirror.lan", 8443)
    assert settings.endpoint("hub.example").origin == "http://[::1]:5000"
    assert settings.endpoint("other.example").origin == "https://other.example:443"
    assert settings.clients == (ipaddress.ip_network("10.1.0.0/16"), "any")
    assert settings.tunnel is Tunnel.NONE
    assert settings.manifest_lifetime == Lifetimes(3600, (("llama3*", 2 * 86400.0), ("hf.co/*", 0.0)))
    assert settings.refresh == 6 * 3600
    assert settings.withdrawn is Withdrawn.DROP
    assert (settings.max_size, settings.min_free) == (200 * 10**9, 0)
    assert settings.pins == ("gemma*", "hf.co/me/*")
    assert settings.offline is True
    assert settings.finish is Finish.NEVER
    assert settings.upstream_connections == 4
    assert settings.log_level == "debug"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("registries", "a b"),
        ("registries", "registry.ollama.ai,"),
        ("registries", "10.0.0.1"),
        ("blob_host", "registry.ollama.ai"),
        ("blob_host", "cdn.registry.ollama.ai"),
        ("upstream", "registry.ollama.ai"),
        ("upstream", "registry.ollama.ai=ftp://x"),
        ("upstream", "registry.ollama.ai=https://x/path"),
        ("upstream", "registry.ollama.ai=https://user:pw@x"),
        ("upstream", "registry.ollama.ai=https://x:99999"),
        ("upstream", "stranger.example=https://x"),
        ("clients", "everybody"),
        ("clients", "10.0.0.1/8"),
        ("tunnel", "some"),
        ("listen", "9200"),
        ("listen", "cache.lan"),
        ("listen", ":0"),
        ("listen", ":99999"),
        ("listen", "::1:9200"),
        ("listen", ":9200,"),
        ("listen", "http://cache:9200"),
        ("listen", ":9200/path"),
        ("front", "registry.ollama.ai"),
        ("front", "0=registry.ollama.ai"),
        ("front", "9200=registry.ollama.ai,9200=registry.ollama.ai"),
        ("front", "9200=10.0.0.1"),
        ("front", "9200=stranger.example"),
        ("offload", "maybe"),
        ("advertise", "https://cache.lan"),
        ("advertise", "cache.lan:0"),
        ("advertise", "cache.lan:99999"),
        ("advertise", "http://cache.lan/path"),
        ("advertise", "user@cache.lan"),
        ("advertise", "::1"),
        ("advertise", "a b"),
        ("manifest_lifetime", "soon"),
        ("manifest_lifetime", "-5m"),
        ("manifest_lifetime", "5m,llama3"),
        ("manifest_lifetime", "5m,=1h"),
        ("manifest_lifetime", "llama3=1h"),
        ("max_size", "much"),
        ("min_free", "-1"),
        ("refresh", "5s"),
        ("refresh", "sometimes"),
        ("withdrawn", "keep"),
        ("offline", "perhaps"),
        ("finish", "later"),
        ("upstream_connections", "0"),
        ("upstream_connections", "99"),
        ("upstream_connections", "four"),
        ("upstream_rate", "fast"),
        ("upstream_rate", "10"),
        ("front", "9200"),
        ("object_store", "bucket/prefix"),
        ("object_store", "s3://key:secret@bucket"),
        ("object_store", "s3://bucket?region=x"),
        ("object_store", "s3://without-a-secret-beside-it"),
        ("offload", "true"),
        ("log", "xml"),
        ("log_level", "loud"),
    ],
)
def test_bad_values_are_named(name: str, text: str) -> None:
    """The option, what was expected and what was got are in the message."""
    with pytest.raises(SettingsError, match=rf"ollama_cache_{name}: expected .*got "):
        parse(**{name: text})


def test_removed_options_say_what_to_do() -> None:
    """Also where the environment has them, and whatever their value was."""
    said = r"ollama_cache_direct was removed: .*0\.35.*ollama_cache_offload=true"
    with pytest.raises(SettingsError, match=said):
        environment_texts({"OLLAMA_CACHE_DIRECT": "auto"})
    with pytest.raises(SettingsError, match=said):
        check_foreign(["ollama_cache_direct"])
    with pytest.raises(SettingsError, match=said):
        parse(direct="off")


def test_where_it_listens() -> None:
    """Hosts and ports, and each port of `front` at the same hosts; off and empty are one."""
    settings = parse(
        listen="cache.lan:9200, [::1]:9300,127.0.0.1:9200",
        front="9201=hub.example",
        registries="registry.ollama.ai,hub.example",
    )
    assert settings.listen == (("cache.lan", 9200), ("::1", 9300), ("127.0.0.1", 9200))
    assert settings.fronts == {9200: "registry.ollama.ai", 9300: "registry.ollama.ai", 9201: "hub.example"}
    assert settings.listeners == (*settings.listen, ("cache.lan", 9201), ("::1", 9201), ("127.0.0.1", 9201))
    assert parse(listen=":9300").listeners == (("", 9300),)
    assert parse(listen=":9300", registries="hub.example").fronts == {9300: "hub.example"}
    assert parse(listen=":9300", front="off").fronts == {}
    for nowhere in ("", "off", "OFF"):
        assert parse(listen=nowhere, registries="hub.example").listeners == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("Cache.LAN", Endpoint("http", "cache.lan", 0)),
        ("10.0.0.1:9300", Endpoint("http", "10.0.0.1", 9300)),
        ("[2001:db8::1]", Endpoint("http", "2001:db8::1", 0)),
        ("http://cache.lan", Endpoint("http", "cache.lan", 80)),
        ("http://cache.lan:9300/", Endpoint("http", "cache.lan", 9300)),
    ],
)
def test_where_clients_find_it(text: str, expected: Endpoint | None) -> None:
    """Without a port it is the one that is listened on, but in a URL, where it is 80."""
    assert parse(advertise=text).advertise == expected


def test_unknown_options_are_named() -> None:
    """A misspelt option is not silently ignored."""
    with pytest.raises(SettingsError, match=r"unknown option ollama_cache_max_sise; did you mean .*_max_size\?"):
        parse(max_sise="1GB")
    with pytest.raises(SettingsError, match=r"unknown option ollama_cache_xyz; expected one of .*manifest_lifetime"):
        parse(xyz="1GB")


def test_unknown_variables_are_named() -> None:
    """Those of ours by their prefix, those with a misspelt one by the whole; what others mean by theirs is let be."""
    with pytest.raises(SettingsError, match=r"unknown variable OLLAMA_CACHE_MAXSIZE .* mean OLLAMA_CACHE_MAX_SIZE\?"):
        environment_texts({"OLLAMA_CACHE_MAXSIZE": "1GB"})
    with pytest.raises(SettingsError, match=r"unknown variable OLAMA_CACHE_DIR .* mean OLLAMA_CACHE_DIR\?"):
        environment_texts({"OLAMA_CACHE_DIR": "/srv"})
    with pytest.raises(SettingsError, match=r"unknown variable OLLAMA_CACHE_XYZ .*`ollama-cache run --help`"):
        environment_texts({"OLLAMA_CACHE_XYZ": ""})
    assert environment_texts({"OLLAMA_MODELS": "/m", "OLLAMA_CACHE_PORT": "tcp://10.0.0.1:80", "DIR": "x"}) == {}


def test_options_meant_for_us_are_named() -> None:
    """What mitmproxy does not know is ours without its prefix, or with a misspelt one."""
    with pytest.raises(SettingsError, match=r"unknown option max_size; did you mean ollama_cache_max_size\?"):
        check_foreign(["other_addon", "max_size"])
    with pytest.raises(SettingsError, match=r"unknown option ollama_cache_maxsize; did you mean .*_max_size\?"):
        check_foreign(["ollama_cache_maxsize"])
    check_foreign(["other_addon"])


@pytest.mark.parametrize(
    ("name", "text"),
    [("object_store", "s3://key:hunter2@bucket/prefix"), ("upstream", "registry.ollama.ai=https://me:hunter2@mirror")],
)
def test_a_refused_password_is_not_told(name: str, text: str) -> None:
    """The message quotes the rest."""
    with pytest.raises(SettingsError, match=rf"ollama_cache_{name}: expected .*got .*//\.\.\.@") as refused:
        parse_settings({name: text}, dir=Path("/d"), certs=Path("/c"))
    assert "hunter2" not in str(refused.value)
    assert refused.value.__cause__ is None


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("https://me:hunter2@mirror", "hunter2"),
        ("s3://bucket?X-Amz-Signature=abc", "abc"),
        ("hf_abcdefghijklmnop", "hf_abcdefghijklmnop"),
        ("q7Jm2Zp0Xv9LkT4sWb8NcR1d", "q7Jm2Zp0"),
        ("0123456789abcdef" * 4, "0123456789abcdef"),
    ],
)
def test_what_may_be_a_secret_is_not_shown(text: str, secret: str) -> None:
    """Whichever option it was given to."""
    assert secret not in shown(text)
    with pytest.raises(SettingsError) as refused:
        parse(upstream_connections=text)
    assert secret not in str(refused.value)


@pytest.mark.parametrize(
    "around", ["{}", "cache:{}", "[{}", "http://[{}", "x=http://y:{}", "~{}/x", "10.0.0.0/{}", "5m,{}"]
)
@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_what_was_expected_quotes_nothing(option: Option, around: str) -> None:
    """Whatever refuses a text has words of its own: what is quoted goes through `shown`."""
    secret = "q7Jm2Zp0Xv9LkT4sWb8NcR1d"
    said = ""
    try:
        option.parse(around.format(secret))
    except ValueError as error:
        said = str(error)
    assert secret.lower() not in said.lower()


def test_ports_beyond_the_last() -> None:
    """Said in our words."""
    for name, text in (
        ("listen", ":99999"),
        ("advertise", "x:99999"),
        ("upstream", "registry.ollama.ai=http://x:99999"),
    ):
        with pytest.raises(SettingsError, match=rf"{name}: expected a port from 1 to 65535, got '{text}'"):
            parse(**{name: text})


@pytest.mark.parametrize("text", ["/srv/models/2026-11/Store", "sometimes", "registry.ollama.ai=ftp://mirror", R2_HOST])
def test_what_is_no_secret_is_shown(text: str) -> None:
    """The message would be of no use without it."""
    assert shown(text) == text


def test_a_secret_in_place_of_its_file() -> None:
    """It would be shown as a path wherever options are."""
    with pytest.raises(
        SettingsError, match="fleet_secret_file: expected the path of a file, not the secret"
    ) as refused:
        parse(object_store="s3://bucket", fleet_secret_file="q7Jm2Zp0Xv9LkT4sWb8NcR1dq7Jm2Zp0Xv9LkT4s")
    assert "q7Jm2Zp0" not in str(refused.value)
    path = "/run/secrets/q7Jm2Zp0Xv9LkT4sWb8NcR1d"
    assert parse(object_store="s3://bucket", fleet_secret_file=path).fleet_secret_file == Path(path)


def test_a_front_needs_a_port() -> None:
    """Nobody is left to believe that a registry has a port where nothing listens."""
    with pytest.raises(SettingsError, match=r"ollama_cache_front: expected hosts to listen on .*listen=off"):
        parse(listen="off", front="9201=registry.ollama.ai")

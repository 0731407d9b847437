"""A cache whose authority is renewed, as its clients see it; several starts of mitmdump."""

import ssl
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from pullthrough.cli import app as cli
from tests.e2e.conftest import MB, add_model, get, unique
from tests.support.a2 import A2Client
from tests.support.goclient import PullError
from tests.support.http1 import connect
from tests.support.origin import Origin
from tests.support.proxy import CA_NAME, Proxy, run_until_exit

pytestmark = pytest.mark.long

REGISTRIES = "registry.ollama.ai,hf.co"


def ca(proxy: Proxy, *arguments: str) -> str:
    """What the verb says."""
    env = {"OLLAMA_CACHE_REGISTRIES": REGISTRIES}
    done = CliRunner().invoke(cli.app, ["ca", *arguments, "--certs", str(proxy.ca_file.parent)], env=env)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_renew(origin: Origin, tmp_path: Path) -> None:
    """Renewed for another name: who trusts only the former pulls on, until it is switched; then who trusts the next."""
    models = [add_model(origin, unique(MB)) for _ in range(3)]
    numbers = iter(models)

    def pull(proxy: Proxy, cafile: Path) -> None:
        model = next(numbers)
        client = A2Client(proxy.url, cafile, tmp_path / model.repository, min_part=MB, max_part=10 * MB)
        assert client.pull(model.name).retries == 0

    with Proxy(tmp_path, origin, front=True) as proxy:
        first = tmp_path / "first.pem"
        first.write_bytes(proxy.ca_file.read_bytes())
        pull(proxy, first)
    more = {**proxy.options, "ollama_cache_registries": REGISTRIES}
    code, said = run_until_exit(tmp_path, **more)
    assert code == 1 and "permits hf.co, got" in said and "ollama-cache ca renew hf.co` makes one beside it" in said
    said = ca(proxy, "renew", "hf.co")
    assert "hf.co" in said and "/next/" in said

    proxy.options["ollama_cache_registries"] = REGISTRIES
    with proxy:
        pull(proxy, first)
        with connect(None, "127.0.0.1", proxy.front_port, None) as connection:
            both = x509.load_pem_x509_certificates(get(connection, "/ca.crt")[2])
        following = proxy.ca_file.parent / "next" / CA_NAME
        assert both == [x509.load_pem_x509_certificate(path.read_bytes()) for path in (first, following)]
        connect(proxy.url, "hf.co", 443, following).close()
        with pytest.raises(ssl.SSLCertVerificationError):
            connect(proxy.url, "hf.co", 443, first)

    ca(proxy, "renew", "--switch")
    with proxy:
        with pytest.raises(PullError, match="certificate"):
            pull(proxy, first)
        numbers = iter(models[2:])
        pull(proxy, proxy.ca_file)

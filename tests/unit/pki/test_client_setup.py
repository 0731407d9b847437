"""client_setup: what the scripts do to a machine that is a folder, with programs that note how they were called."""

import os
import plistlib
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Final

import pytest
import yaml
from cryptography import x509

from pullthrough.config.options import parse_settings
from pullthrough.pki.authority import Authority
from pullthrough.pki.client_setup import KINDS, SYSTEMS, SetupDocument, clients_origin, command, documents, guide
from tests.unit.pki.test_authority import NAMES

PROXY: Final = "http://10.0.0.1:8080"
DROP_IN: Final = "etc/systemd/system/ollama.service.d/ollama-cache.conf"
ANCHORS: Final = "usr/local/share/ca-certificates"
SYSTEM_LIST: Final = "etc/ssl/certs/ca-certificates.crt"

# Each notes its call. systemctl knows the environment that drop-ins set; update-ca-certificates makes one list.
STUBS: Final = {
    "systemctl": """
        case "$1 $*" in
            cat*) [ -e "$OLLAMA_CACHE_ROOT/etc/systemd/system/ollama.service" ] ;;
            show*) cd "$OLLAMA_CACHE_ROOT/etc/systemd/system/ollama.service.d"
                sed -n 's/^Environment="\\(.*\\)"/\\1/p' *.conf |
                    awk -F= '{ last[$1] = $0 } END { for (name in last) printf "%s ", last[name] }' ;;
            *) echo "systemctl $*" >>"$CALLS" ;;
        esac""",
    "update-ca-certificates": """
        echo "update-ca-certificates $*" >>"$CALLS"
        cd "$OLLAMA_CACHE_ROOT/usr/local/share/ca-certificates"
        cat ../../../../etc/roots *.crt >../../../../etc/ssl/certs/ca-certificates.crt 2>/dev/null || :""",
    "sudo": 'echo "sudo $*" >>"$CALLS"; exec "$@"',
    "launchctl": """
        case $1 in
            setenv) printf %s "$3" >"$OLLAMA_CACHE_ROOT/setting" ;;
            unsetenv) rm "$OLLAMA_CACHE_ROOT/setting" ;;
            getenv) cat "$OLLAMA_CACHE_ROOT/setting" 2>/dev/null ;;
        esac""",
    "security": """
        keychain=$OLLAMA_CACHE_ROOT/keychain
        case $1 in
            find-certificate) cat "$keychain" 2>/dev/null || : ;;
            add-trusted-cert)
                for file do :; done
                openssl x509 -in "$file" -noout -fingerprint -sha256 |
                    sed 's/.*=//; s/://g; s/^/SHA-256 hash: /' >>"$keychain" ;;
            delete-certificate) grep -v "$3" "$keychain" >"$keychain.new"; mv "$keychain.new" "$keychain" ;;
        esac""",
}  # fmt: skip


@pytest.fixture(scope="module")
def rollover(tmp_path_factory: pytest.TempPathFactory) -> list[Authority]:
    """The one in use and the next."""
    now = datetime.now(UTC)
    return [Authority.load_or_create(tmp_path_factory.mktemp("ca"), NAMES, now=now) for _ in range(2)]


@pytest.fixture(params=[1, 2], ids=["one authority", "two"])
def made(request: pytest.FixtureRequest, rollover: list[Authority]) -> dict[str, SetupDocument]:
    certificates = [authority.certificate for authority in rollover[: request.param]]
    return dict(documents(certificates, NAMES, PROXY))


of_two = pytest.mark.parametrize("made", [2], indirect=True, ids=["two"])


@pytest.fixture
def script(rollover: list[Authority]) -> SetupDocument:
    """That for Linux, of one authority."""
    return documents([rollover[0].certificate], NAMES, PROXY)["/connect/linux.sh"]


HOME: Final = "/home"


class Machine:
    """A folder with a space in its name that stands for a client's `/`."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a root"
        self.calls = folder / "calls"
        self._tools = folder / "bin"
        for path in (ANCHORS, "etc/ssl/certs", "etc/systemd/system", "home"):
            (self.root / path).mkdir(parents=True)
        for path in ("etc/roots", SYSTEM_LIST):
            (self.root / path).write_text("the system's own\n")
        (self.root / "etc/systemd/system/ollama.service").touch()
        self._tools.mkdir()
        for name, body in STUBS.items():
            (self._tools / name).write_text(f"#!/bin/sh\n{body}\n")
            (self._tools / name).chmod(0o755)

    def without(self, program: str) -> None:
        """`program` is not there, whatever this machine has: what is left on PATH is no more than needed."""
        (self._tools / program).unlink()
        for tool in ("cat", "cmp", "grep", "awk", "id", "mkdir", "mktemp", "mv", "rm", "rmdir", "sed", "sh"):
            (self._tools / tool).symlink_to(str(shutil.which(tool)))

    def run(self, script: SetupDocument, *arguments: str) -> tuple[int, str]:
        """The script's exit code and what it said."""
        self.calls.write_text("")
        path = self.root.parent / "the script.sh"
        path.write_bytes(script.body)
        tools = str(self._tools)
        search = tools if (self._tools / "cat").exists() else f"{tools}:{os.environ['PATH']}"
        done = subprocess.run(
            ["/bin/sh", path, *arguments],
            env={"PATH": search, "OLLAMA_CACHE_ROOT": str(self.root), "CALLS": str(self.calls), "HOME": HOME},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def files(self) -> dict[str, str]:
        """Every file and folder, with its content."""
        found = sorted(self.root.rglob("*"))
        return {str(path.relative_to(self.root)): path.read_text() if path.is_file() else "" for path in found}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# --- Linux


def test_linux(machine: Machine, made: dict[str, SetupDocument]) -> None:
    """The store trusts, the service has the proxy and a new start; again nothing is done; undo leaves nothing."""
    before = machine.files()
    code, said = machine.run(made["/connect/linux.sh"], PROXY)
    later = "ollama-cache: sh /etc/ollama-cache/client.sh --undo takes it back\n"
    assert (code, said) == (0, f"{later}ollama-cache: ollama.service pulls through {PROXY}\n")
    assert machine.calls.read_text().splitlines() == [
        "update-ca-certificates --fresh",
        "systemctl daemon-reload",
        "systemctl try-restart ollama.service",
    ]
    after = machine.files()
    assert after[DROP_IN] == f'[Service]\nEnvironment="HTTPS_PROXY={PROXY}"\n'
    assert after[SYSTEM_LIST] == "the system's own\n" + made["/ca.crt"].body.decode()
    for path in set(after) - set(before):
        assert (machine.root / path).stat().st_mode & 0o444 == 0o444, path

    code, said = machine.run(made["/connect/linux.sh"], PROXY)
    assert (code, said) == (0, f"{later}ollama-cache: nothing to change: ollama.service pulls through {PROXY}\n")
    assert machine.calls.read_text() == ""
    assert machine.files() == after

    kept = SetupDocument("", (machine.root / "etc/ollama-cache/client.sh").read_bytes())
    assert kept.body == made["/connect/linux.sh"].body
    assert machine.run(kept, "--undo") == (0, "ollama-cache: undone\n")
    assert machine.calls.read_text().count("systemctl") == 2
    assert machine.files() == before
    assert machine.run(made["/connect/linux.sh"], "--undo") == (0, "ollama-cache: nothing to undo\n")
    assert machine.calls.read_text() == ""


@of_two
def test_linux_without_the_system_store(machine: Machine, made: dict[str, SetupDocument]) -> None:
    """A list for the service alone, the system's roots in it; each way replaces the other, and undo ends both."""
    before = machine.files()
    assert machine.run(made["/connect/linux.sh"], PROXY)[0] == 0
    by_the_store = machine.files()
    assert machine.run(made["/connect/linux.sh"], "--no-system-store", PROXY)[0] == 0
    after = machine.files()
    assert "SSL_CERT_FILE=/etc/ollama-cache/roots.pem" in after[DROP_IN]
    assert after["etc/ollama-cache/roots.pem"] == "the system's own\n" + made["/ca.crt"].body.decode()
    assert after[SYSTEM_LIST] == before[SYSTEM_LIST]
    assert not list((machine.root / ANCHORS).iterdir())
    assert "nothing to change" in machine.run(made["/connect/linux.sh"], "--no-system-store", PROXY)[1]
    assert machine.run(made["/connect/linux.sh"], PROXY)[0] == 0
    assert machine.files() == by_the_store
    assert machine.run(made["/connect/linux.sh"], "--no-system-store", PROXY)[0] == 0
    assert machine.run(made["/connect/linux.sh"], "--undo")[0] == 0
    assert machine.files() == before


def test_linux_fewer_authorities(machine: Machine, rollover: list[Authority]) -> None:
    """After a change of the authority has ended, the former is trusted no more."""
    both = [authority.certificate for authority in rollover]
    machine.run(documents(both, NAMES, PROXY)["/connect/linux.sh"], PROXY)
    one = documents(both[1:], NAMES, PROXY)
    assert machine.run(one["/connect/linux.sh"], PROXY)[0] == 0
    assert machine.files()[SYSTEM_LIST] == "the system's own\n" + one["/ca.crt"].body.decode()


def test_linux_mends_what_failed(machine: Machine, script: SetupDocument) -> None:
    """A store that could not be brought up to date is told of, and the next run tries again."""
    (machine.root / "etc/ssl/certs").rename(machine.root / "etc/ssl/away")
    stub = machine.root.parent / "bin/update-ca-certificates"
    good = stub.read_text()
    stub.write_text("#!/bin/sh\nexit 1\n")
    code, said = machine.run(script, PROXY)
    assert code == 1 and "to take over" in said
    (machine.root / "etc/ssl/away").rename(machine.root / "etc/ssl/certs")
    stub.write_text(good)
    assert machine.run(script, PROXY)[0] == 0
    assert "-BEGIN" in machine.files()[SYSTEM_LIST]


def no_service(machine: Machine) -> None:
    (machine.root / "etc/systemd/system/ollama.service").unlink()


def no_systemd(machine: Machine) -> None:
    machine.without("systemctl")


def no_store(machine: Machine) -> None:
    (machine.root / ANCHORS).rmdir()


@pytest.mark.parametrize(
    ("spoil", "arguments", "expected"),
    [
        pytest.param(no_service, [PROXY], "expected ollama.service, got none: install Ollama first", id="no service"),
        pytest.param(no_systemd, [PROXY], "expected systemd, got a system without systemctl", id="no systemd"),
        pytest.param(no_store, [PROXY], "try --no-system-store", id="no store"),
        pytest.param(None, [], "expected http://CACHE:PORT, the proxy's address, got nothing", id="no address"),
        pytest.param(None, ["https://x:1"], "got 'https://x:1'", id="not http"),
        pytest.param(None, ["http://x"], "got 'http://x'", id="no port"),
        pytest.param(None, ['http://x:1"\nExecStart='], "got 'http://x:1\"\nExecStart='", id="more than an address"),
        pytest.param(None, ["http://%h:1"], "got 'http://%h:1'", id="systemd's specifier"),
        pytest.param(None, ["--force"], "got '--force'", id="unknown option"),
    ],
)
def test_linux_refuses(
    machine: Machine,
    script: SetupDocument,
    spoil: Callable[[Machine], None] | None,
    arguments: list[str],
    expected: str,
) -> None:
    """What cannot be done is said, and nothing is written."""
    if spoil:
        spoil(machine)
    before = machine.files()
    code, said = machine.run(script, *arguments)
    assert code == 1 and expected in said, said
    assert machine.files() == before
    assert machine.calls.read_text() == ""


def test_linux_another_setting_wins(machine: Machine, script: SetupDocument) -> None:
    """A drop-in that is read after ours and says otherwise is told of."""
    folder = machine.root / "etc/systemd/system/ollama.service.d"
    folder.mkdir()
    (folder / "override.conf").write_text('[Service]\nEnvironment="HTTPS_PROXY=http://other:1"\n')
    code, said = machine.run(script, PROXY)
    assert code == 1 and f"expected ollama.service to have HTTPS_PROXY={PROXY}, got another" in said


# --- macOS


def test_macos(machine: Machine, made: dict[str, SetupDocument], rollover: list[Authority]) -> None:
    """Each certificate is trusted once, the setting holds now and at the next login, and undo leaves nothing."""
    before = machine.files()
    later = f"ollama-cache: sh '{HOME}/Library/Application Support/ollama-cache/client.sh' --undo takes it back\n"
    assert machine.run(made["/connect/macos.sh"], PROXY) == (
        0,
        f"{later}ollama-cache: set up; quit Ollama and open it again\n",
    )
    after = machine.files()
    count = made["/ca.crt"].body.count(b"BEGIN")
    assert after["keychain"].split("\n")[:-1] == [
        f"SHA-256 hash: {authority.fingerprint.replace(':', '')}" for authority in rollover[:count]
    ]
    assert after["setting"] == PROXY
    agent = plistlib.loads(after["home/Library/LaunchAgents/ollama-cache.plist"].encode())
    assert agent["ProgramArguments"] == ["/bin/launchctl", "setenv", "HTTPS_PROXY", PROXY]
    assert agent["RunAtLoad"] is True
    assert machine.run(made["/connect/macos.sh"], PROXY) == (0, f"{later}ollama-cache: nothing to change\n")
    assert after["home/Library/Application Support/ollama-cache/client.sh"] == made["/connect/macos.sh"].body.decode()
    assert machine.files() == after
    assert machine.run(made["/connect/macos.sh"], "--undo")[0] == 0
    left = set(machine.files()) - set(before)
    assert left == {"keychain", *(f"home/Library{name}" for name in ("", "/LaunchAgents", "/Application Support"))}
    assert machine.files()["keychain"] == ""
    assert machine.run(made["/connect/macos.sh"], "--undo") == (0, "ollama-cache: nothing to undo\n")


def test_macos_keeps_another_proxy(machine: Machine, rollover: list[Authority]) -> None:
    """A proxy that somebody else has set is not replaced."""
    (machine.root / "setting").write_text("http://corp:3128")
    script = documents([rollover[0].certificate], NAMES, PROXY)["/connect/macos.sh"]
    code, said = machine.run(script, PROXY)
    assert code == 1 and "expected no HTTPS_PROXY of another kind" in said and "corp" not in said


# --- what can be read only


@of_two
@pytest.mark.parametrize("name", ["linux.sh", "macos.sh"])
def test_shellcheck(made: dict[str, SetupDocument], tmp_path: Path, name: str) -> None:
    """What a client is asked to run is clean POSIX shell."""
    if shutil.which("shellcheck") is None:
        pytest.skip("needs the program shellcheck")
    (tmp_path / name).write_bytes(made[f"/connect/{name}"].body)
    done = subprocess.run(["shellcheck", "--shell", "sh", tmp_path / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_documents_have_no_holes(made: dict[str, SetupDocument]) -> None:
    """Nothing of a template is left, all is ASCII, HTTP_PROXY is not meddled with, and every document has the CA."""
    certificates = made["/ca.crt"].body.decode()
    for path, document in made.items():
        if path == "/ca.cer":
            assert x509.load_der_x509_certificate(document.body) == x509.load_pem_x509_certificate(
                certificates.encode()
            )
            continue
        text = document.body.decode("ascii")
        assert "@@" not in text, path
        assert not [line for line in text.splitlines() if "HTTP_PROXY" in line.replace("HTTPS_PROXY", "")], path
        plain = "\n".join(line.strip() for line in text.splitlines())
        assert certificates.strip() in plain, path


@of_two
def test_compose(made: dict[str, SetupDocument]) -> None:
    """The container has the proxy, and trusts the file that comes with the description."""
    document = yaml.safe_load(made["/connect/compose.yaml"].body)
    service = document["services"]["ollama"]
    (config,) = service["configs"]
    assert service["environment"] == {
        "OLLAMA_MODELS": "/models",
        "HTTPS_PROXY": PROXY,
        "SSL_CERT_FILE": config["target"],
    }
    assert document["configs"][config["source"]]["content"] == made["/ca.crt"].body.decode()


@of_two
def test_kubernetes(made: dict[str, SetupDocument]) -> None:
    """The pod has the proxy, and trusts the file of the map beside it."""
    config, deployment = yaml.safe_load_all(made["/connect/kubernetes.yaml"].body)
    pod = deployment["spec"]["template"]
    assert pod["metadata"]["labels"].items() >= deployment["spec"]["selector"]["matchLabels"].items()
    (container,) = pod["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment == {
        "OLLAMA_MODELS": "/models",
        "HTTPS_PROXY": PROXY,
        "SSL_CERT_FILE": "/etc/ollama-cache/ca.pem",
    }
    volume = next(volume for volume in pod["spec"]["volumes"] if "configMap" in volume)
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted[volume["name"]] == "/etc/ollama-cache"
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    assert config["data"] == {"ca.pem": made["/ca.crt"].body.decode()}


@of_two
def test_command(made: dict[str, SetupDocument], tmp_path: Path) -> None:
    """It fetches from the server, goes on only with the right bytes, and names the proxy to a script."""
    lines = {}
    for kind, name in KINDS.items():
        document = made[f"/connect/{name}"]
        line = lines[kind] = command(kind, document, server="http://10.0.0.1:9200", proxy=PROXY)
        assert f"http://10.0.0.1:9200/connect/{name}" in line
        assert sha256(document.body).hexdigest() in line
        assert line.count("\n") == 0 and (f" {PROXY}" in line) is (kind in SYSTEMS)
    tools = tmp_path / "bin"
    tools.mkdir()
    stubs = dict.fromkeys(("sudo", "docker", "kubectl"), 'echo "ran $*"')
    for stub, body in {"curl": 'for url do :; done; cp "$SOURCE" "${url##*/}"', **stubs}.items():
        (tools / stub).write_text(f"#!/bin/sh\n{body}\n")
        (tools / stub).chmod(0o755)
    runs = {
        "linux": f"ran sh linux.sh {PROXY}",
        "compose": "ran compose -f compose.yaml up -d",
        "kubernetes": "ran apply -f kubernetes.yaml",
    }
    for kind, ran in runs.items():
        body = made[f"/connect/{KINDS[kind]}"].body
        (tmp_path / "right").write_bytes(body)
        (tmp_path / "wrong").write_bytes(body + b"rm -rf /\n")
        said = {}
        for name in ("right", "wrong"):
            env = {"PATH": f"{tools}:{os.environ['PATH']}", "SOURCE": str(tmp_path / name), "TMPDIR": str(tmp_path)}
            done = subprocess.run(
                ["/bin/sh", "-c", lines[kind]], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
            )
            said[name] = (done.returncode == 0, ran in done.stdout)
        assert said == {"right": (True, True), "wrong": (False, False)}, kind


def test_guide(rollover: list[Authority], tmp_path: Path) -> None:
    """A line for each kind of client, by the address that clients know; sums and fingerprints of what is served."""
    texts = {"advertise": "cache.lan:9300", "listen": ":9200"}
    settings = parse_settings(texts, dir=tmp_path / "store", certs=tmp_path / "certs")
    made = guide(settings, [authority.certificate for authority in rollover], NAMES, 3128)
    assert made.commands.keys() == made.sums.keys() == KINDS.keys()
    for kind, name in KINDS.items():
        assert f"http://cache.lan:9300/connect/{name}" in made.commands[kind]
        assert made.sums[kind] == sha256(made.documents[f"/connect/{name}"].body).hexdigest()
        assert made.sums[kind].upper() in made.commands[kind].upper()
    assert made.proxy == "http://cache.lan:3128"
    assert b"http://cache.lan:3128" in made.documents["/connect/compose.yaml"].body
    assert len(made.fingerprints) == 2 and all(len(each) == 95 for each in made.fingerprints)
    assert clients_origin(settings, "10.0.0.1") == "http://10.0.0.1:9300"
    plain = parse_settings({"listen": ":9207"}, dir=tmp_path / "store", certs=tmp_path / "certs")
    assert clients_origin(plain, "10.0.0.1") == "http://10.0.0.1:9207"

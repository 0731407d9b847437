"""scripts/services: what runs the cache as a service has the fields that it needs, and no right that it does not."""

import fnmatch
import os
import plistlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

ROOT: Final = Path(__file__).parents[1]
SERVICES: Final = ROOT / "scripts/services"
UNIT: Final = (SERVICES / "ollama-cache.service").read_text()
CONTAINERFILE: Final = (SERVICES / "Containerfile").read_text()


def install(root: Path, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [SERVICES / "install", *arguments],
        env={"PATH": os.environ["PATH"], "DESTDIR": str(root), "HOME": "/srv/me", "SUDO_USER": "me"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: it looks for systemd there")
def test_install(tmp_path: Path) -> None:
    """The unit gets the program's real path; again for another; what the service could not run is refused."""
    program = tmp_path / "opt/bin/ollama-cache"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    assert "expected a program, got" in install(tmp_path, program).stderr
    program.chmod(0o755)
    (tmp_path / "link").symlink_to("opt")
    unit = tmp_path / "etc/systemd/system/ollama-cache.service"
    for _ in range(2):
        done = install(tmp_path, tmp_path / "link/bin/ollama-cache")
        assert done.returncode == 0, done.stderr
        assert f"\nExecStart={program} run $MITMDUMP_OPTIONS\n" in unit.read_text()
        assert f"\nDocumentation=file:{ROOT}/docs/operate.md file:{ROOT}/docs/README.md\n" in unit.read_text()
    assert "@" not in unit.read_text().replace("@system-service", "").replace("@priv", "")
    program.rename(program.with_name("ollama cache"))
    assert "letters, digits" in install(tmp_path, program.with_name("ollama cache")).stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: it looks for systemd there")
def test_uninstall(tmp_path: Path) -> None:
    """Of what was installed and set nothing is left but the store and the authority; a client's own files stay."""
    program = fake_program(tmp_path / "opt")
    theirs = ["var/lib/ollama-cache/store/x", "var/lib/ollama-cache/certs/y", "etc/ollama-cache/roots.pem"]
    ours = [
        "etc/systemd/system/ollama-cache.service",
        "etc/systemd/system/ollama-cache.service.d/port.conf",
        "etc/default/ollama-cache",
        "etc/ollama-cache/config.toml",
    ]
    assert install(tmp_path, program).stdout == f"/{ours[0]}\n"
    if shutil.which("systemctl"):
        assert (tmp_path / "etc/systemd/system/multi-user.target.wants/ollama-cache.service").is_symlink()
    for name in (*theirs, *ours[1:]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    done = install(tmp_path, "--undo")
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        [f"/{ours[0]}", "/etc/systemd/system/ollama-cache.service.d", *(f"/{name}" for name in ours[2:])],
    )
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*theirs, "opt/bin/ollama-cache", "opt/bin/python"}
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]
    assert "got none" in install(tmp_path, "--undo").stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: it looks for systemd there")
def test_the_service_is_started_and_stopped(tmp_path: Path) -> None:
    """On a machine, and not in a folder, by systemctl; a stub, in a name space where the real /etc is hidden."""
    if not (shutil.which("unshare") and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0):
        pytest.skip("needs the right to unshare mounts")
    stub = tmp_path / "bin/systemctl"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n')
    stub.chmod(0o755)
    program = fake_program(tmp_path / "opt")
    # Where no folder for temporary files is above it.
    place = f"mount --bind {program.parent.parent} /mnt"
    lines = (
        f"set -e; mount -t tmpfs x /etc; {place}; {SERVICES}/install /mnt/bin/ollama-cache; {SERVICES}/install --undo"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", lines],
        env={"PATH": f"{stub.parent}:{os.environ['PATH']}", "HOME": "/srv/me", "SUDO_USER": "me"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "mount:" in done.stderr:
        pytest.skip("needs the right to mount")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text().splitlines() == [
        "daemon-reload",
        "--quiet enable ollama-cache.service",
        "restart ollama-cache.service",
        "stop ollama-cache.service",
        "--quiet disable ollama-cache.service",
        "daemon-reload",
    ]


def fake_program(folder: Path, *places: str) -> Path:
    """A program, and beside it a Python that is made of what lies in these places."""
    (folder / "bin").mkdir(parents=True)
    for name, lines in (("ollama-cache", ()), ("python", places)):
        path = folder / "bin" / name
        path.write_text("\n".join(["#!/bin/sh", *(f"echo {line}" for line in lines), ""]))
        path.chmod(0o755)
    return folder / "bin" / "ollama-cache"


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: it looks for systemd there")
@pytest.mark.parametrize("home", ["/" + "root/.pyenv/versions/3.13.0", "/ho" + "me/me/.local/share/uv/python/3.13"])
def test_an_interpreter_that_the_service_cannot_see(tmp_path: Path, home: str) -> None:
    """It is refused before anything is written, and the message says what to install instead, on which system."""
    done = install(tmp_path, fake_program(tmp_path / "opt", f"{tmp_path}/opt/bin/python", home, str(tmp_path)))
    assert done.returncode == 1
    assert f"expected a Python that the service may see, got {home} in a home folder" in done.stderr
    for word in ("Debian 12, Ubuntu 22.04", "uv python install --install-dir /opt/python", "apt install python3-full"):
        assert word in done.stderr
    assert not (tmp_path / "etc").exists()
    seen = fake_program(tmp_path / "srv", "/opt/python/3.13/bin/python3.13", "/opt/python/3.13", f"{tmp_path}/srv")
    assert install(tmp_path, seen).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: it looks for systemd there")
@pytest.mark.parametrize("place", ["tmp", "var/tmp"])
def test_temporary_folders(tmp_path: Path, place: str) -> None:
    """The unit has its own, in which there is no program: the service would never start."""
    done = install(tmp_path, fake_program(tmp_path / place / "cache"))
    assert done.returncode == 1
    assert "expected a program that the service may see, got" in done.stderr
    assert "temporary files" in done.stderr and "such as in /opt" in done.stderr
    python = fake_program(tmp_path / "opt", f"{tmp_path}/{place}/python")
    assert "expected a Python that the service may see" in install(tmp_path, python).stderr
    assert not (tmp_path / "etc").exists()


def test_the_python_to_install_is_one_that_is_found() -> None:
    """Where the message has it put is where scripts/setup looks."""
    assert "/opt/python/*/bin" in (ROOT / "scripts/find-python").read_text()


def test_a_mistake_in_the_options_is_not_started_again() -> None:
    """It exits with 2, each time."""
    assert "\nRestart=on-failure\n" in UNIT and "\nRestartPreventExitStatus=2\n" in UNIT


def test_launchd() -> None:
    """It is no root's, starts with the machine and again after a crash."""
    job = plistlib.loads((SERVICES / "ollama-cache.plist").read_bytes())
    assert job["ProgramArguments"] == ["@PROGRAM@", "run"]
    assert (job["UserName"], job["RunAtLoad"], job["KeepAlive"]) == ("@USER@", True, {"SuccessfulExit": False})
    assert job["EnvironmentVariables"]["HOME"] == "@HOME@"
    assert job["Umask"] == 0o027


def test_containerfile() -> None:
    """No root, a health check, and of the checkout only what the image needs."""
    *_, image = CONTAINERFILE.split("\nFROM ")
    assert re.search(r"^USER 10001:10001$", image, re.MULTILINE)
    assert image.index("USER ") < image.index("ENTRYPOINT ")
    assert "/readyz" in image.split("HEALTHCHECK")[1]
    wanted = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        word for line in re.findall(r"^COPY (?!--)(.*) \S+$", CONTAINERFILE, re.MULTILINE) for word in line.split()
    ]
    assert sorted(copied) == sorted(wanted)
    for path in copied:
        assert (ROOT / path).exists(), path
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert any(fnmatch.fnmatch("addon/x.pem", line.removeprefix("**/")) for line in ignored)


def test_compose() -> None:
    """The ports, one folder to write to, and nothing more to be had."""
    (service,) = yaml.safe_load((SERVICES / "compose.yaml").read_text())["services"].values()
    assert service["ports"] == ["8080:8080", "9200:9200"]
    assert (service["read_only"], service["cap_drop"], service["user"]) == (True, ["ALL"], "10001:10001")
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [volume.partition(":")[2] for volume in service["volumes"]] == ["/data"]
    assert (SERVICES / service["build"]["context"]).resolve() == ROOT
    assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_kubernetes() -> None:
    """One cache on one volume, found by its labels, probed, and without rights."""
    documents = list(yaml.safe_load_all((SERVICES / "kubernetes.yaml").read_text()))
    kinds: dict[str, Any] = {document["kind"]: document for document in documents}
    assert all({"apiVersion", "kind", "metadata", "spec"} <= document.keys() for document in documents)
    deployment = kinds["Deployment"]["spec"]
    template = deployment["template"]
    labels = template["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels == kinds["Service"]["spec"]["selector"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
    pod = template["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {port["name"]: port["port"] for port in kinds["Service"]["spec"]["ports"]}
    for probe, path in (("readinessProbe", "/readyz"), ("livenessProbe", "/healthz")):
        assert container[probe]["httpGet"]["path"] == path
        assert container[probe]["httpGet"]["port"] in ports
    rights = container["securityContext"]
    assert rights["readOnlyRootFilesystem"] and rights["capabilities"] == {"drop": ["ALL"]}
    assert rights["allowPrivilegeEscalation"] is False
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    claim = next(
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["volumes"]
        if len(volume) > 1 and "persistentVolumeClaim" in volume
    )
    assert claim == kinds["PersistentVolumeClaim"]["metadata"]["name"]


def test_what_the_image_sets_exists() -> None:
    """Variables of ours name options."""
    from pullthrough.config.options import OPTIONS

    names = {f"OLLAMA_CACHE_{option.name.upper()}" for option in OPTIONS}
    for path in SERVICES.iterdir():
        assert set(re.findall(r"OLLAMA_CACHE_[A-Z_]+", path.read_text())) - {"OLLAMA_CACHE_NAME"} <= names, path

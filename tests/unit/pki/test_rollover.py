"""rollover: the next CA stands beside the one in use, and nobody who trusts only that notices."""

import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest
from cryptography import x509

from pullthrough.core.errors import AuthorityError
from pullthrough.pki.authority import CERTIFICATE_NAME, DER_NAME, KEY_NAME, Authority
from pullthrough.pki.rollover import NEXT, Rollover, renew, switch
from tests.unit.pki.test_authority import HOST, NAMES

NOW: Final = datetime.now(UTC).replace(microsecond=0)
LATER: Final = NOW + timedelta(days=1)
FILES: Final = {KEY_NAME, CERTIFICATE_NAME, DER_NAME}


def signer(rollover: Rollover, host: str) -> str:
    """The fingerprint of the CA that the leaf for `host` leads to."""
    leaf, ca = x509.load_pem_x509_certificates(rollover.issue(host, now=LATER).pem)
    leaf.verify_directly_issued_by(ca)
    return next(each.fingerprint for each in rollover.all if each.certificate == ca)


def load(folder: Path, *names: str) -> Rollover:
    return Rollover.load_or_create(folder, [*NAMES, *names], now=LATER)


def test_nothing_to_renew(tmp_path: Path) -> None:
    """Without an authority there is nothing to put another beside, and nothing is made."""
    with pytest.raises(AuthorityError, match="expected the private key"):
        renew(tmp_path, NAMES, now=NOW)
    with pytest.raises(AuthorityError, match="ollama-cache ca renew"):
        switch(tmp_path, now=NOW)
    assert list(tmp_path.iterdir()) == []


def test_renew(tmp_path: Path) -> None:
    """The next one permits more; each name that the one in use permits stays with it, whoever asks how often."""
    first = load(tmp_path).current.fingerprint
    with pytest.raises(AuthorityError, match=r"`ollama-cache ca renew hf\.co`"):
        load(tmp_path, "hf.co")
    made = renew(tmp_path, ["hf.co"], now=NOW)
    assert made.permitted == (*NAMES, "hf.co")
    assert renew(tmp_path, ["hf.co"], now=LATER).fingerprint == made.fingerprint
    rollover = load(tmp_path, "hf.co")
    assert [each.fingerprint for each in rollover.all] == [first, made.fingerprint]
    assert [signer(rollover, name) for name in (*NAMES, f"x.{HOST}", "hf.co")] == [*[first] * 3, made.fingerprint]
    assert rollover.permitted == (*NAMES, "hf.co")
    with pytest.raises(AuthorityError, match=r"oci\.example"):
        load(tmp_path, "oci.example")
    with pytest.raises(AuthorityError, match=r"oci\.example"):
        renew(tmp_path, ["oci.example"], now=LATER)


def test_switch(tmp_path: Path) -> None:
    """One authority again, the former put away where nobody else may look."""
    first = load(tmp_path).current.fingerprint
    made = renew(tmp_path, ["hf.co"], now=NOW)
    assert switch(tmp_path, now=LATER).fingerprint == made.fingerprint
    rollover = load(tmp_path, "hf.co")
    assert rollover.all == (rollover.current,)
    assert signer(rollover, HOST) == made.fingerprint != first
    (former,) = tmp_path.glob("former-*")
    assert {path.name for path in tmp_path.iterdir()} == {former.name, *FILES}
    assert Authority.load(former, NAMES, now=LATER).fingerprint == first
    if os.name == "posix":
        assert former.stat().st_mode & 0o077 == 0
        assert (former / KEY_NAME).stat().st_mode & 0o077 == 0
    with pytest.raises(AuthorityError, match="ca renew"):
        switch(tmp_path, now=LATER)


@pytest.mark.parametrize("step", ["mkdir", "copy2", "unlink", "replace", "rmtree"])
def test_switch_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Wherever it ends, one of the two is in use, whole; where that is the former, the switch can be made again."""
    first = load(tmp_path).current.fingerprint
    made = renew(tmp_path, [], now=NOW).fingerprint

    def power_cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    owner = {"mkdir": Path, "unlink": Path, "replace": os}.get(step, shutil)
    with monkeypatch.context() as patched:
        patched.setattr(owner, step, power_cut)
        with pytest.raises(KeyboardInterrupt):
            switch(tmp_path, now=LATER)
    assert load(tmp_path).current.fingerprint == (made if step == "rmtree" else first)
    if step == "rmtree":
        assert load(tmp_path).following is None
    else:
        assert switch(tmp_path, now=LATER).fingerprint == made
        assert not (tmp_path / NEXT).exists()

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
    more = [*NAMES, "hf.co"]
    first = load(tmp_path).current.fingerprint
    with pytest.raises(AuthorityError, match=r"permits hf\.co, got .*`ollama-cache ca renew hf\.co`"):
        load(tmp_path, "hf.co")
    made = renew(tmp_path, more, now=NOW)
    assert made.permitted == (*NAMES, "hf.co")
    assert renew(tmp_path, more, now=LATER).fingerprint == made.fingerprint
    rollover = load(tmp_path, "hf.co")
    assert [each.fingerprint for each in rollover.all] == [first, made.fingerprint]
    assert [signer(rollover, name) for name in (*NAMES, f"x.{HOST}", "hf.co")] == [*[first] * 3, made.fingerprint]
    assert rollover.permitted == (*NAMES, "hf.co")
    with pytest.raises(AuthorityError, match=r"oci\.example"):
        load(tmp_path, "oci.example")


def test_from_two_names_to_four_to_three(tmp_path: Path) -> None:
    """A next one that nobody can trust yet makes way for one of other names; one that clients know stays, unasked."""
    load(tmp_path)
    four, three = [*NAMES, "hf.co", "oci.example"], [*NAMES, "hf.co"]
    with pytest.raises(AuthorityError, match=r"permits hf\.co, oci\.example, got one that permits"):
        load(tmp_path, "hf.co", "oci.example")
    first = renew(tmp_path, four, now=NOW)
    assert first.permitted == tuple(four)
    second = renew(tmp_path, three, now=NOW)
    assert second.permitted == tuple(three) and second.fingerprint != first.fingerprint
    rollover = load(tmp_path, "hf.co")
    rollover.offer()
    assert renew(tmp_path, three, now=LATER).fingerprint == second.fingerprint
    with pytest.raises(AuthorityError, match="clients may trust it; --replace makes another in its place"):
        renew(tmp_path, four, now=LATER)
    assert load(tmp_path, "hf.co").following is not None
    third = renew(tmp_path, four, now=LATER, replace=True)
    assert renew(tmp_path, three, now=LATER).permitted == tuple(three), "nobody was told of the third"
    assert third.fingerprint != second.fingerprint
    assert switch(tmp_path, now=LATER).permitted == tuple(three)
    assert renew(tmp_path, NAMES, now=LATER).permitted == NAMES, "a name that is no longer configured is dropped"


@pytest.mark.parametrize("name", ["com", "co.uk", "github.io", "s3.amazonaws.com"])
def test_public_suffixes(tmp_path: Path, name: str) -> None:
    """What would let an authority sign for strangers' hosts is refused, at first and later; nothing is made."""
    with pytest.raises(AuthorityError, match=rf"got {name}, below which anybody may have a host"):
        load(tmp_path, name)
    assert list(tmp_path.iterdir()) == []
    load(tmp_path)
    with pytest.raises(AuthorityError, match=rf"got {name}, below which anybody may have a host"):
        renew(tmp_path, [*NAMES, name], now=NOW)
    assert not (tmp_path / NEXT).exists()
    for fine in ("registry", "oci.example", "cache.lan"):
        renew(tmp_path, [*NAMES, fine], now=NOW)


def test_a_clock_that_must_be_wrong(tmp_path: Path) -> None:
    """After a boot without a clock nothing is made that would end too early; what is there is not touched by it."""
    with pytest.raises(AuthorityError, match="clock says 1970-01-02, which is before this version was made"):
        Rollover.load_or_create(tmp_path, NAMES, now=datetime(1970, 1, 2, tzinfo=UTC))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["all", "key"])
def test_backup_and_another_machine(tmp_path: Path, what: str) -> None:
    """The folder, or the key file alone, is the authority: clients go on with what they trust."""
    old, new = tmp_path / "old", tmp_path / "new"
    first = load(old).current
    renew(old, [*NAMES, "hf.co"], now=NOW)
    if what == "all":
        shutil.copytree(old, new)
    else:
        for part in ("", NEXT):
            (new / part).mkdir()
            shutil.copy2(old / part / KEY_NAME, new / part)
    shutil.rmtree(old)
    rollover = Rollover.load(new, [*NAMES, "hf.co"], now=LATER)
    assert rollover.current.fingerprint == first.fingerprint
    leaf = x509.load_pem_x509_certificates(rollover.issue(HOST, now=LATER).pem)[0]
    leaf.verify_directly_issued_by(first.certificate)
    assert (new / CERTIFICATE_NAME).exists() and (new / NEXT / CERTIFICATE_NAME).exists()


def test_switch(tmp_path: Path) -> None:
    """One authority again, the former put away where nobody else may look."""
    first = load(tmp_path).current.fingerprint
    made = renew(tmp_path, [*NAMES, "hf.co"], now=NOW)
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
    made = renew(tmp_path, NAMES, now=NOW).fingerprint

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

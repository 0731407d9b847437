"""paths: where the authority of a checkout lies, and how this installation is called."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from pullthrough.config import paths


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with an empty `certs/`, and a home beside it."""
    root = tmp_path / "checkout"
    (root / "certs").mkdir(parents=True)
    (root / "pyproject.toml").touch()
    monkeypatch.setattr(paths, "__file__", str(root / "addon" / "pullthrough" / "config" / "paths.py"))
    monkeypatch.setattr(paths, "_user_config", lambda: tmp_path / "home")
    return root


def test_certs_of_a_checkout(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own folder; where that is empty and cannot be written to, the user's, as without a checkout."""
    assert paths.default_certs() == checkout / "certs"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert paths.default_certs() == tmp_path / "home" / "certs"
    (checkout / "certs" / "ollama-cache-ca-key.pem").touch()
    assert paths.default_certs() == checkout / "certs"
    (checkout / "pyproject.toml").unlink()
    assert paths.default_certs() == tmp_path / "home" / "certs"


def test_own_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name where PATH leads to it, else by its path, as short as it is from here."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert paths.own_program() == "ollama-cache"
    program = tmp_path / "bin" / ("ollama-cache.exe" if sys.platform == "win32" else "ollama-cache")
    program.parent.mkdir()
    program.touch()
    assert paths.own_program() == str(program)
    monkeypatch.chdir(tmp_path)
    assert paths.own_program() == str(program.relative_to(tmp_path))
    message = "ollama-cache: this ollama-cache is old; see `ollama-cache ls`, sudo ollama-cache ca renew"
    called = program.relative_to(tmp_path)
    assert paths.as_called_here(message) == (
        f"ollama-cache: this ollama-cache is old; see `{called} ls`, sudo {called} ca renew"
    )
    monkeypatch.setattr(shutil, "which", lambda name: str(program))
    assert paths.as_called_here(message) == message
    assert paths.own_program() == "ollama-cache"

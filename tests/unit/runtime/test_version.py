"""version: as installed, or not known."""

from importlib import metadata

import pytest

from pullthrough.runtime import version


def test_installed() -> None:
    """The version of the metadata."""
    assert version.own_version() == metadata.version("ollama-cache")


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare checkout says that it does not know."""

    def fail(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(version, "version", fail)
    assert version.own_version() == "unknown"

"""The version of this program, as its installed metadata tells it."""

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """Return the version, "unknown" where the package was not installed and runs from a bare checkout."""
    try:
        return version("ollama-cache")
    except PackageNotFoundError:
        return "unknown"

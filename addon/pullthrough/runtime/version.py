"""The version of this program, from its installed metadata."""

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """Return the version; "unknown" if the package is not installed but runs from a bare checkout."""
    try:
        return version("ollama-cache")
    except PackageNotFoundError:
        return "unknown"

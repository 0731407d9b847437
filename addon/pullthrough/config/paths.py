"""Where things lie on this machine when no option says so."""

from pathlib import Path

import platformdirs


def default_store() -> Path:
    """A data folder: cleaners sweep cache folders."""
    return Path(platformdirs.user_data_dir("ollama-cache", appauthor=False))


def default_certs() -> Path:
    """`certs/` of a checkout, else a folder beside the user's other configuration."""
    checkout = Path(__file__).resolve().parents[3]
    if (checkout / "pyproject.toml").is_file() and (checkout / "certs").is_dir():
        return checkout / "certs"
    return Path(platformdirs.user_config_dir("ollama-cache", appauthor=False)) / "certs"

"""The command line. typer and rich are imported here only.

Begin with `app`, which the console script runs; each other module has the verbs of one subject.
"""

from pullthrough.cli.app import main

__all__ = ["main"]

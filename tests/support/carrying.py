"""Import into a store that a test has open."""

from pathlib import Path

from pullthrough.library.import_commit import ImportOutcome, Terms, admit
from pullthrough.library.importer import Bounds, Staging, take
from pullthrough.store.store import Store


def import_into(
    store: Store,
    source: Path,
    *,
    now: float = 9.0,
    public: bool = True,
    replace_confirmed: bool = False,
    bounds: Bounds | None = None,
    link: bool = False,
) -> list[ImportOutcome]:
    """What `ollama-cache import` does without a daemon."""
    held = {digest: record.size or 0 for digest, record in store.blobs().items() if store.held(digest) is not None}
    with Staging(store.folder, held=held, bounds=bounds or Bounds(), link=link) as staging:
        terms = Terms(public=public, replace_confirmed=replace_confirmed)
        return take(source, staging, lambda model: admit(store, staging.folder, model, terms, now=now))

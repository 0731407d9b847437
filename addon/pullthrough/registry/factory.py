"""Build the parts that answer in a registry's place, each from those before it.

Invariant: nothing is started here; the caller opens and closes the parts that run in the background.
"""

from dataclasses import dataclass

from pullthrough.config.settings import Settings
from pullthrough.core.digest import Digest
from pullthrough.fleet.tier import Tier
from pullthrough.net.client_table import ClientTable
from pullthrough.net.pull_history import PullHistory
from pullthrough.recording.pulls import Place, Pulls
from pullthrough.recording.recorder import Recorder
from pullthrough.registry.blob_content import BlobContent
from pullthrough.registry.blobs import Blobs
from pullthrough.registry.grants import Grants
from pullthrough.registry.manifests import Manifests
from pullthrough.registry.offload import Offload
from pullthrough.registry.pings import Pings
from pullthrough.registry.prefetch import Prefetcher
from pullthrough.registry.redirects import Redirects
from pullthrough.registry.refresh import Refresher
from pullthrough.registry.service import Registry, log_lost, log_pull
from pullthrough.registry.signed_urls import SignedUrls
from pullthrough.registry.warm import Warmer
from pullthrough.runtime.clock import lasting
from pullthrough.store.store import Store
from pullthrough.upstream.client import Upstream


@dataclass(frozen=True, slots=True)
class RegistrySide:
    """The parts that answer clients in the registry's place, and those that fetch ahead for them."""

    registry: Registry
    grants: Grants
    pulls: Pulls
    clients: ClientTable
    history: PullHistory
    redirects: Redirects
    prefetcher: Prefetcher
    refresher: Refresher
    warmer: Warmer


def build_registry(
    settings: Settings, store: Store, upstream: Upstream, recorder: Recorder, tier: Tier | None = None
) -> RegistrySide:
    """Build the registry of one daemon; nothing runs before it is called or opened."""
    pulls, clients, history = Pulls(log_lost), ClientTable(), PullHistory(log_pull)
    addresses = SignedUrls(store.secret, store.ledger, store.is_public)
    manifests = Manifests(settings, store, upstream, tier)
    grants = Grants(settings, store, upstream)
    offload = Offload(store, tier if settings.offload else None)
    prefetcher = Prefetcher(store, recorder, grants.source, lambda digest: addresses.source(digest, now=lasting()))

    def follow(place: Place, digest: Digest) -> None:
        if settings.prefetch and not settings.offline:
            prefetcher.follow(*place, digest)

    content = BlobContent(store, recorder, grants, offload, pulls, history, follow, tier)
    redirects = Redirects(settings, upstream, grants, addresses, content.record)
    blobs = Blobs(settings, store, upstream, recorder, grants, manifests, content, redirects, offload, pulls, tier)
    registry = Registry(
        settings,
        store,
        upstream.loop,
        addresses=addresses,
        manifests=manifests,
        pings=Pings(settings, upstream),
        blobs=blobs,
        content=content,
        redirects=redirects,
        clients=clients,
        history=history,
    )
    refresher = Refresher(settings, store, upstream, recorder, grants.source, manifests)
    warmer = Warmer(settings, store, recorder, grants.source, manifests)
    return RegistrySide(registry, grants, pulls, clients, history, redirects, prefetcher, refresher, warmer)

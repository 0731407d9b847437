"""probes: what nobody has asked for a while is looked at, what has been asked is not, and nothing while offline."""

import asyncio
from collections import Counter
from pathlib import Path

from pullthrough.config.options import parse_settings
from pullthrough.config.settings import R2_HOST
from pullthrough.core.errors import UpstreamUnreachable
from pullthrough.monitoring.probes import Look, Probes, looks_at
from pullthrough.upstream.client import Upstream
from pullthrough.upstream.reachability import OBJECT_STORE, Reachability, State

REGISTRY = "registry.ollama.ai"
EVERY_S = 0.05


def settings_of(**options: str) -> Reachability:
    return Reachability(parse_settings(options, dir=Path("/d"), certs=Path("/c")))


class Servers:
    """Two servers, and how often each was looked at."""

    def __init__(self) -> None:
        self.reachability = settings_of()
        self.looks: Counter[str] = Counter()
        self.is_up = True
        self.looked = asyncio.Event()
        names = (REGISTRY, R2_HOST)
        self.probes = Probes(self.reachability, {name: self._look(name) for name in names}, every_s=EVERY_S)

    def _look(self, name: str) -> Look:
        async def look() -> None:
            self.looks[name] += 1
            self.looked.set()
            with self.reachability.asking(name):
                if not self.is_up:
                    raise UpstreamUnreachable("connection refused")
            self.reachability.answered(name)

        return look

    async def seen(self) -> None:
        self.looked.clear()
        await asyncio.wait_for(self.looked.wait(), 20)


def state(reachability: Reachability, name: str = REGISTRY) -> State:
    service = reachability.find(name)
    assert service is not None
    return service.state


def test_a_quiet_server_is_looked_at() -> None:
    """What it does then is known, down and up again, although nobody pulls."""

    async def main() -> None:
        servers = Servers()
        servers.probes.open()
        for is_up, expected in ((True, State.UP), (False, State.DOWN), (True, State.UP)):
            servers.is_up = is_up
            async with asyncio.timeout(20):
                while state(servers.reachability) is not expected:
                    await servers.seen()
                    await asyncio.sleep(0)
        await servers.probes.close()

    asyncio.run(main())


def test_a_busy_server_is_left_alone() -> None:
    """Its answers to pulls say enough; the quiet one beside it is looked at."""

    async def main() -> Counter[str]:
        servers = Servers()
        servers.probes.open()
        async with asyncio.timeout(20):
            while servers.looks[R2_HOST] < 4:
                servers.reachability.answered(REGISTRY)
                await asyncio.sleep(EVERY_S / 20)
        await servers.probes.close()
        return servers.looks

    assert asyncio.run(main())[REGISTRY] == 0


def test_whoever_asks_first_has_it_looked_at() -> None:
    """At the start nothing is known: it is found out then, and once for all who ask; later what is known will do."""

    async def main() -> None:
        servers = Servers()
        servers.probes._every_s = 3600.0
        servers.probes.open()
        both = await asyncio.gather(servers.probes.services(), servers.probes.services())
        for services in (*both, await servers.probes.services()):
            known = {service.host: service.state for service in services}
            assert (known[REGISTRY], known[R2_HOST]) == (State.UP, State.UP)
        assert servers.looks == {REGISTRY: 1, R2_HOST: 1}
        await servers.probes.close()

    asyncio.run(main())


def test_who_may_be_asked() -> None:
    """Registries and the blob host unless offline; the object store where there is one."""

    def names(**options: str) -> list[str]:
        return list(looks_at(Upstream(parse_settings(options, dir=Path("/d"), certs=Path("/c"))), None))

    assert names() == [REGISTRY, R2_HOST]
    assert names(offline="true") == []
    assert OBJECT_STORE not in names(object_store="s3://bucket", fleet_secret_file="/s")

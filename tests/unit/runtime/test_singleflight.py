"""singleflight: N callers, one call. On the default loop and on one that starts tasks eagerly, as mitmproxy's does."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pullthrough.runtime.singleflight import SingleFlight


@pytest.fixture(params=[False, True], ids=["lazy tasks", "eager tasks"])
def run(request: pytest.FixtureRequest) -> Callable[[Awaitable[None]], None]:
    def runner(main: Awaitable[None]) -> None:
        async def wrapped() -> None:
            if request.param:
                asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
            await main

        asyncio.run(wrapped())

    return runner


Runner = Callable[[Awaitable[None]], None]


def test_followers_get_the_leaders_result(run: Runner) -> None:
    """Five callers, one call."""

    async def main() -> None:
        gate = asyncio.Event()
        calls = 0

        async def work() -> int:
            nonlocal calls
            calls += 1
            await gate.wait()
            return calls

        single_flight: SingleFlight[str, int] = SingleFlight()
        tasks = [asyncio.create_task(single_flight.join("key", work)) for _ in range(5)]
        await asyncio.sleep(0)
        gate.set()
        results = await asyncio.gather(*tasks)
        assert [value for value, _ in results] == [1] * 5
        assert sorted(collapsed for _, collapsed in results) == [False, True, True, True, True]
        assert (await single_flight.join("key", work))[0] == 2

    run(main())


def test_a_cancelled_leader_harms_nobody(run: Runner) -> None:
    """The work goes on for those who still wait."""

    async def main() -> None:
        gate = asyncio.Event()

        async def work() -> str:
            await gate.wait()
            return "done"

        single_flight: SingleFlight[str, str] = SingleFlight()
        leader = asyncio.create_task(single_flight.join("key", work))
        follower = asyncio.create_task(single_flight.join("key", work))
        await asyncio.sleep(0)
        leader.cancel()
        await asyncio.sleep(0)
        gate.set()
        assert await follower == ("done", True)
        assert leader.cancelled() or (await asyncio.gather(leader, return_exceptions=True))[0] is not None

    run(main())


def test_abandoned_work_is_cancelled_and_not_joined(run: Runner) -> None:
    """When nobody waits the work stops, and the next caller starts afresh."""

    async def main() -> None:
        started, cancelled = 0, 0

        async def work() -> str:
            nonlocal started, cancelled
            started += 1
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled += 1
                raise
            return "never"

        async def quick() -> str:
            return "fresh"

        single_flight: SingleFlight[str, str] = SingleFlight()
        callers = [asyncio.create_task(single_flight.join("key", work)) for _ in range(2)]
        await asyncio.sleep(0)
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        assert await single_flight.join("key", quick) == ("fresh", False)
        await asyncio.sleep(0)
        assert (started, cancelled) == (1, 1)

    run(main())


def test_an_error_reaches_everybody(run: Runner) -> None:
    """Not one waiter and the rest silence."""

    async def main() -> None:
        gate = asyncio.Event()

        async def work() -> str:
            await gate.wait()
            raise ValueError("no")

        single_flight: SingleFlight[str, str] = SingleFlight()
        tasks = [asyncio.create_task(single_flight.join("key", work)) for _ in range(3)]
        await asyncio.sleep(0)
        gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [str(result) for result in results] == ["no"] * 3

    run(main())

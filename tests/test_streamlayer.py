"""streamlayer: turns on the event loop (bodies themselves go through a real mitmdump in e2e/test_streams)."""

import asyncio

from pullthrough.streamlayer import Turns


def test_so_many_in_each_pass() -> None:
    """Equal callers get through three at a time, in the order they came; one that is cancelled takes no turn."""

    async def main() -> list[list[int]]:
        turns = Turns(3)
        passes: list[list[int]] = [[]]

        async def caller(number: int) -> None:
            await turns.take()
            passes[-1].append(number)

        tasks = [asyncio.create_task(caller(number)) for number in range(10)]
        await asyncio.sleep(0)
        tasks[4].cancel()
        while not all(task.done() for task in tasks):
            passes.append([])
            await asyncio.sleep(0)
        await caller(10)
        return [numbers for numbers in passes if numbers]

    first, *rest = asyncio.run(main())
    assert first == [0, 1, 2]
    assert max(map(len, rest)) <= 4  # two passes may fall between two looks of this test
    assert [number for numbers in (first, *rest) for number in numbers] == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]

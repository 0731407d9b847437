"""window_map: windows one behind the other, and how a file is read by them."""

from hypothesis import given
from hypothesis import strategies as st

from pullthrough.runtime.window_map import AHEAD, WindowMap


def test_in_order() -> None:
    """A file that grows from its beginning, a little ahead in places, is in order."""
    windows = WindowMap(window=10)
    assert windows.make_places(0, 5) == [0]
    assert windows.make_places(35, 41) == [1, 2, 3, 4]
    assert windows.make_places(12, 13) == []
    assert (windows.in_order, windows.locate(3, 99)) == (True, (3, 50))


def test_far_ahead() -> None:
    """What comes first lies first, and all that was left out stays out."""
    windows = WindowMap(window=10)
    assert windows.make_places(10 * (AHEAD + 1), 10 * (AHEAD + 1) + 1) == [AHEAD + 1]
    assert windows.make_places(0, 25) == [0, 1, 2]
    assert not windows.in_order
    assert windows.locate(3, 99) == (13, 30)
    assert windows.locate(10 * AHEAD + 15, 10 * AHEAD + 17) == (5, 10 * AHEAD + 17)


def test_what_a_short_file_lacks() -> None:
    """What has no place, and what lies behind the end."""
    windows = WindowMap([2, 0], window=10)
    assert list(windows.beyond(20, 25)) == [(10, 20)]
    assert list(windows.beyond(13, 25)) == [(3, 10), (10, 20)]
    assert list(windows.beyond(3, 25)) == [(0, 10), (10, 20), (23, 25)]


@given(st.lists(st.tuples(st.integers(0, 299), st.integers(1, 60)), max_size=40))
def test_what_is_written_is_read(writes: list[tuple[int, int]]) -> None:
    """Bytes are found where they were put, after a restart as well, and no write skips much."""
    size, windows, file = 300, WindowMap(window=10), bytearray()
    content = bytes(number % 251 for number in range(size))
    written: set[int] = set()
    for start, count in writes:
        stop = min(size, start + count)
        windows.make_places(start, stop)
        position = start
        while position < stop:
            place, end = windows.locate(position, stop)
            assert place - len(file) < 10 * (AHEAD + 2)
            file.extend(bytes(max(0, place + end - position - len(file))))
            file[place : place + end - position] = content[position:end]
            position = end
        written.update(range(start, stop))
    again = WindowMap(windows.order, window=10)
    assert again.in_order == windows.in_order
    for number in written:
        place, end = again.locate(number, number + 1)
        assert (end, file[place]) == (number + 1, content[number])
    if again.in_order:
        assert bytes(file) == bytes(byte if n in written else 0 for n, byte in enumerate(content[: len(file)]))

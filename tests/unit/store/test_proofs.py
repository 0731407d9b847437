"""proofs: what a file's size, time and inode prove."""

import pytest

from pullthrough.store.proofs import Proof

TIME = 1_234_567_891_234_567_891


@pytest.mark.parametrize(
    ("mtime_ns", "of_a_copy", "here"),
    [
        (TIME, True, True),
        (1_234_567_891_234_567_800, True, False),  # NTFS
        (1_234_567_891_234_567_000, True, False),  # archives
        (1_234_567_891_230_000_000, True, False),  # exFAT
        (1_234_567_891_000_000_000, True, False),  # GNU tar
        (1_234_567_890_000_000_000, True, False),  # FAT
        (TIME + 1, False, False),
        (TIME - 2, False, False),
        (1_234_567_892_000_000_000, False, False),
        (1_234_567_889_000_000_000, False, False),
    ],
)
def test_times(mtime_ns: int, of_a_copy: bool, here: bool) -> None:
    """A copy's may have been cut off, never moved; where the inode counts they are the same."""
    assert Proof(5, TIME, 0).proves(5, mtime_ns, 7) is of_a_copy
    assert Proof(5, TIME, 7).proves(5, mtime_ns, 7) is here
    assert not Proof(5, TIME, 7).proves(5, mtime_ns, 8)
    assert not Proof(5, TIME, 0).proves(6, mtime_ns, 7)

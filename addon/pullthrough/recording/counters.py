"""What recordings have done since the start of the daemon, in numbers, and how each has ended.

Invariant: bytes are counted when they have come, each once.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from pullthrough.upstream.data_stream import DataStream


class Ending(StrEnum):
    """How a recording ends."""

    STORED = "stored"
    FAILED = "failed"
    LEFT = "left"
    """By all clients."""
    UNKEPT = "unkept"
    """For want of room."""


@dataclass
class Counters:
    """What recordings have done since the start of the daemon."""

    upstream_bytes: int = 0
    near_bytes: int = 0
    """From the fleet's own sources."""
    retries: int = 0
    mismatches: int = 0
    restarts: int = 0
    ended: Counter[Ending] = field(default_factory=Counter)

    def take(self, stream: DataStream, count: int) -> None:
        """So many bytes of the stream have come."""
        if stream.near:
            self.near_bytes += count
        else:
            self.upstream_bytes += count

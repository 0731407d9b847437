"""traffic: what was counted elsewhere reaches the store's days, once."""

from contextlib import closing
from pathlib import Path

from pullthrough.core.access_log import RequestLog
from pullthrough.core.cache_status import CacheStatus, Outcome
from pullthrough.monitoring.traffic import Traffic
from pullthrough.net.pull_history import PullHistory
from pullthrough.recording.plan import Counters
from pullthrough.recording.pulls import Pulls
from pullthrough.store.store import Store


def test_counting(tmp_path: Path) -> None:
    """Two looks count nothing twice, and the days outlast the daemon."""
    line = ("192.0.2.1", "GET", "/", 200, CacheStatus(Outcome.HIT))
    for run in (1, 2):
        with closing(Store.open(tmp_path / "store")) as store:
            requests = RequestLog()
            traffic = Traffic(store.ledger, requests, Counters(), Pulls(), PullHistory())
            requests.transfer(*line, sent=1000, seconds=1.0, problem="")
            traffic.count()
            traffic.count()
            assert sum(totals.served for totals in store.ledger.days.values()) == 1000 * run

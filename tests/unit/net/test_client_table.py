"""client_table: what is remembered of clients, and that it is bounded."""

from pullthrough.core.records import Name
from pullthrough.net.client_table import MODELS, ClientTable, Way


def name(number: int, *, takes_lists: bool = False) -> Name:
    return Name("registry.ollama.ai", f"library/m{number}", "latest", takes_lists)


def test_a_client() -> None:
    """The latest of each fact, bytes added up, and both representations of a model as one."""
    table = ClientTable()
    table.ask("10.0.0.1", Way.PROXY, (0, 36, 0), bypasses=True, now=1.0)
    table.ask("10.0.0.1", Way.GATEWAY, (0, 41, 0), bypasses=False, now=2.0)
    for takes_lists, now in ((False, 3.0), (True, 4.0)):
        table.pull("10.0.0.1", name(1, takes_lists=takes_lists), now=now)
    table.send("10.0.0.1", 5, now=5.0)
    table.send("10.0.0.1", 6, now=6.0)
    ((address, client),) = table.latest()
    assert (address, client.seen, client.way, client.version, client.bypasses, client.sent) == (
        "10.0.0.1", 6.0, Way.GATEWAY, (0, 41, 0), False, 11,
    )  # fmt: skip
    assert dict(client.pulls) == {name(1): 4.0}


def test_bounds() -> None:
    """Who was seen longest ago goes, and the model that a client pulled longest ago."""
    table = ClientTable(limit=2)
    for number in range(MODELS + 1):
        table.pull("10.0.0.1", name(number), now=float(number))
    table.send("10.0.0.2", 1, now=50.0)
    table.pull("10.0.0.1", name(1), now=60.0)
    table.pull("10.0.0.3", name(0), now=70.0)
    assert [address for address, _ in table.latest()] == ["10.0.0.3", "10.0.0.1"]
    pulls = list(dict(table.latest())["10.0.0.1"].pulls)
    assert pulls == [*(name(number) for number in range(2, MODELS + 1)), name(1)]
    assert len(table) == 2

"""`weftline hosts` and `weftline ps` against a broker that says what it is told to."""

import json
import socket

import pytest
from rich.console import Console

from cli.fleet import age, print_table
from cli.main import main
from common.errors import Code
from common.protocol import Admin, Beat, Engine, Error, Host, Job, Message, Model, Query, Snapshot
from tests.unit.cli.conftest import BrokerOf

LLAMA = Model(name="llama2:latest", digest="d1", slots=2, resident=True, size_bytes=7)
MIXTRAL = Model(name="mixtral:latest", digest="d3")
EMBED = Model(name="nomic-embed-text:latest", digest="d2", embedding=True)
OLLAMA = Engine(url="http://127.0.0.1:11434", version="0.33.0", memory_bytes=24 * 2**30, models=(LLAMA, EMBED))
HOSTS = Snapshot(
    id=1,
    what="hosts",
    hosts=(
        Host(name="gpu-2", engines=(Engine(url="http://10.0.0.2:11434", up=False, error="it burns"),), beat_age_ms=900),
        Host(name="gpu-1", engines=(OLLAMA,), busy={OLLAMA.url: {"d1": 1}}, draining=True, beat_age_ms=400),
    ),
)


def test_hosts_as_text(broker_of: BrokerOf, capsys: pytest.CaptureFixture[str]) -> None:
    with broker_of(HOSTS) as address:
        assert main(["hosts", "--broker", address]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "HOST   STATE     SEEN   ENGINE  AT               BUSY  MODELS (BUSY/SLOTS)",
        "gpu-1  draining  0.4 s  ollama  127.0.0.1:11434  1     llama2 1/2 loaded, nomic-embed-text 0/1",
        "gpu-2  down      0.9 s  ollama  10.0.0.2:11434   0     it burns",
    ]


def test_hosts_with_labels_and_what_they_load(broker_of: BrokerOf, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(url=OLLAMA.url, models=(LLAMA, MIXTRAL))
    labelled = Host(name="gpu-3", engines=(engine,), busy={OLLAMA.url: {"d3": 1}}, labels=("gpu=a100", "site=b"))
    with broker_of(Snapshot(id=1, what="hosts", hosts=(labelled, Host(name="gpu-4", engines=())))) as address:
        assert main(["hosts", "--broker", address]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "HOST   STATE  SEEN   ENGINE  AT               BUSY  MODELS (BUSY/SLOTS)                     LABELS",
        "gpu-3  up     0.0 s  ollama  127.0.0.1:11434  1     llama2 0/2 loaded, mixtral 1/1 loading  gpu=a100, site=b",
        "gpu-4  down   0.0 s  -       -                0     no engine",
    ]


def test_hosts_as_json(broker_of: BrokerOf, capsys: pytest.CaptureFixture[str]) -> None:
    with broker_of(HOSTS) as address:
        assert main(["hosts", "--broker", address, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["name"], first["draining"], first["heartbeatAgeMs"]) == ("gpu-1", True, 400)
    assert first["labels"] == []
    (engine,) = first["engines"]
    assert (engine["memoryBytes"], engine["modelsMax"]) == (24 * 2**30, None)
    assert (engine["kind"], engine["version"], engine["up"], engine["busy"]) == ("ollama", "0.33.0", True, 1)
    llama, embed = engine["models"]
    assert llama == {
        "name": "llama2",
        "digest": "d1",
        "sizeBytes": 7,
        "embedding": False,
        "resident": True,
        "slots": 2,
        "busy": 1,
        "free": 1,
    }
    assert (embed["embedding"], embed["free"]) == (True, 1)
    assert second["engines"][0]["error"] == "it burns"


def test_no_host_is_said_on_stderr(broker_of: BrokerOf, capsys: pytest.CaptureFixture[str]) -> None:
    with broker_of(Snapshot(id=1, what="hosts")) as address:
        assert main(["hosts", "--broker", address]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "weftline worker" in shown.err


REQUESTS = Snapshot(
    id=1,
    what="requests",
    queued=3,
    running=1,
    jobs=(
        Job(
            rid=b"\3" * 16,
            client="bob",
            ref="r3",
            model="llama2",
            state="queued",
            age_ms=10,
            position=2,
            priority="batch",
        ),
        Job(
            rid=b"\2" * 16,
            client="bob",
            ref="r2",
            model="llama2",
            state="queued",
            age_ms=200_000,
            position=1,
            eta_ms=4_500,
        ),
        Job(
            rid=b"\1" * 16,
            client="ann",
            ref="r1",
            model="llama2",
            state="streaming",
            age_ms=12_345,
            worker="gpu-1",
            engine=OLLAMA.url,
            attempt=1,
            events=7,
            priority="interactive",
        ),
    ),
)


def test_ps_as_text(broker_of: BrokerOf, capsys: pytest.CaptureFixture[str]) -> None:
    with broker_of(REQUESTS) as address:
        assert main(["ps", "--broker", address]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "REQUEST       STATE                    AGE    MODEL   CLIENT  HOST   EVENTS",
        "010101010101  streaming (interactive)  12 s   llama2  ann     gpu-1  7",
        "020202020202  queued #1, in 4.5 s      3 min  llama2  bob     -      0",
        "030303030303  queued #2 (batch)        0.0 s  llama2  bob     -      0",
    ]
    assert "1 more" in shown.err


def test_ps_as_json(broker_of: BrokerOf, capsys: pytest.CaptureFixture[str]) -> None:
    with broker_of(REQUESTS) as address:
        assert main(["ps", "--broker", address, "--json"]) == 0
    running, waiting, _ = json.loads(capsys.readouterr().out)
    assert running == {
        "id": "01" * 16,
        "client": "ann",
        "ref": "r1",
        "model": "llama2",
        "state": "streaming",
        "position": None,
        "etaMs": None,
        "priority": "interactive",
        "ageMs": 12_345,
        "host": "gpu-1",
        "engine": OLLAMA.url,
        "attempt": 1,
        "events": 7,
    }
    assert (waiting["position"], waiting["etaMs"], waiting["host"]) == (1, 4_500, None)


def test_nothing_to_do(broker_of: BrokerOf, capsys: pytest.CaptureFixture[str]) -> None:
    with broker_of(Snapshot(id=1, what="requests")) as address:
        assert main(["ps", "--broker", address]) == 0
        assert capsys.readouterr().out == ""
        assert main(["ps", "--broker", address, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == []


def test_no_broker_is_unreachable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("cli.fleet.ANSWER_S", 0.05)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # taken, and nobody listens
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        assert main(["hosts", "--broker", address]) == 69
    assert f"no broker answers at {address}. Start one with `weftline broker`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "answer",
    [
        Error(code=Code.INVALID_MESSAGE, message="Invalid value 'query'"),
        b"\0\0\0\0not of the wire",
    ],
)
def test_the_wrong_port_is_named_as_such(
    answer: Error | bytes, broker_of: BrokerOf, capsys: pytest.CaptureFixture[str]
) -> None:
    with broker_of(answer) as address:
        assert main(["ps", "--broker", address]) == 69
    assert "is not the port where a broker of this version waits for gateways" in capsys.readouterr().err


def test_other_messages_are_passed_over(
    broker_of: BrokerOf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cli.fleet.ANSWER_S", 0.05)
    with broker_of(Beat()) as address:
        assert main(["ps", "--broker", address]) == 69
    assert "no broker answers" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["nowhere", "tcp://host", "tcp://127.0.0.1:99999"])
def test_an_address_that_is_none_is_a_usage_error(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hosts", "--broker", address]) == 2
    assert "--broker must read HOST:PORT" in capsys.readouterr().err


def test_a_table_on_a_terminal_folds_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("rich.console.Console", lambda: Console(width=80, color_system=None))
    name, models = "a-host-with-quite-a-name.example", [f"model-{number}:70b 0/1" for number in range(4)]
    print_table(["HOST", "AT", "[MODELS]"], [[name, "192.168.100.100:11434", "\n".join(models)]])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line.rstrip()) <= 80 for line in lines)
    assert "[MODELS]" in lines[0]
    for number, line in enumerate(lines[1:]):
        assert line.rstrip().endswith(models[number])
    assert name in lines[1]


@pytest.mark.parametrize(
    ("ms", "said"),
    [(0, "0.0 s"), (9_949, "9.9 s"), (10_000, "10 s"), (119_999, "119 s"), (120_000, "2 min"), (7_200_000, "2 h")],
)
def test_ages(ms: int, said: str) -> None:
    assert age(ms) == said


# Draining -------------------------------------------------------------------------------------------------------------


def seen(*, left: int = 0, draining: bool = True) -> Snapshot:
    """A snapshot in which gpu-1 has that much left to do."""
    return Snapshot(id=1, what="hosts", hosts=(Host(name="gpu-1", engines=(), kept=left, draining=draining),))


GONE = Snapshot(id=1, what="hosts")


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.fleet.WAIT_S", 0.001)
    monkeypatch.setattr("cli.fleet.GONE_S", 0.2)


def test_drain_asks_the_broker_and_is_done(broker_of: BrokerOf, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Message] = []
    with broker_of(seen(left=3), asked=asked) as address:
        assert main(["drain", "gpu-1", "--broker", address]) == 0
    assert asked == [Admin(id=1, action="drain", target="gpu-1")]
    assert capsys.readouterr().out == "gpu-1 takes no new requests.\n"


@pytest.mark.usefixtures("hurried")
def test_drain_waits_until_nothing_is_left(broker_of: BrokerOf, capsys: pytest.CaptureFixture[str]) -> None:
    """Also while the broker is restarted: its first words know of no host, or of one that was not told."""
    asked: list[Message] = []
    answers = seen(left=2), seen(left=2), GONE, seen(left=1, draining=False), GONE, seen(draining=False), seen(), GONE
    with broker_of(*answers, asked=asked) as address:
        assert main(["drain", "gpu-1", "--wait", "--broker", address]) == 0
    drain, query = Admin(id=1, action="drain", target="gpu-1"), Query(id=1, what="hosts")
    assert asked == [drain, query, query, query, drain, query, drain]
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [f"gpu-1: {left} requests run or can be resumed from it" for left in (2, 1, 0)]
    assert shown.out == "gpu-1 takes no new requests.\n"


@pytest.mark.usefixtures("hurried")
def test_drain_of_a_host_that_goes_away_is_no_success(broker_of: BrokerOf, capsys: pytest.CaptureFixture[str]) -> None:
    with broker_of(seen(left=2), GONE) as address:
        assert main(["drain", "gpu-1", "--wait", "--broker", address]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "gpu-1 has been gone for 0 s" in shown.err


@pytest.mark.parametrize("command", [["drain"], ["drain", "--wait"], ["resume"]])
def test_a_host_that_does_not_exist(
    command: list[str], broker_of: BrokerOf, capsys: pytest.CaptureFixture[str]
) -> None:
    with broker_of(Error(code=Code.NOT_FOUND, message="cannot drain 'x'; the hosts are: gpu-1")) as address:
        assert main([*command, "x", "--broker", address]) == 2
    assert "the hosts are: gpu-1" in capsys.readouterr().err


def test_resume_asks_the_broker(broker_of: BrokerOf) -> None:
    asked: list[Message] = []
    with broker_of(seen(draining=False), asked=asked) as address:
        assert main(["resume", "gpu-1", "--broker", address]) == 0
    assert asked == [Admin(id=1, action="resume", target="gpu-1")]

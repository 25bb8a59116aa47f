"""`weftline doctor`: what it makes of what it finds."""

import json
from collections.abc import Iterable
from contextlib import closing
from importlib import metadata
from pathlib import Path

import pytest

from cli import doctor
from cli.doctor import Check, Status, at_once, data_dir_checks, fleet_checks, libraries, probe, verdict
from cli.keys import create_client
from cli.main import main
from cli.settings import ClientSettings
from common.protocol import Engine, Host, Model, Snapshot
from gateway.store import FILE_NAME, Store
from tests.unit.cli.conftest import BrokerOf
from tests.unit.client.fake_gateway import FakeGateway
from workers.embedded.server import running
from workers.embedded.simulated import Settings, SimulatedBackend

LLAMA = Model(name="llama2:latest", digest="a" * 64, resident=True)


def engine(*models: Model, url: str = "http://127.0.0.1:11434", up: bool = True, error: str = "") -> Engine:
    return Engine(url=url, models=models, up=up, error=error)


def of(part: str, checks: Iterable[Check]) -> list[Check]:
    return [check for check in checks if check.part == part]


# This machine ---------------------------------------------------------------------------------------------------------


def test_the_libraries_of_this_environment_are_fine() -> None:
    assert libraries().status is Status.OK


def test_a_missing_and_an_old_library_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["no-such-library>=1", "msgspec>=99.1", "rich", "only-elsewhere>=1; sys_platform == 'plan9'"]
    monkeypatch.setattr(metadata, "requires", lambda _: needed)
    check = libraries()
    assert check.status is Status.FAIL
    assert "no-such-library is missing, msgspec" in check.finding
    assert "is older than 99.1" in check.finding
    assert "only-elsewhere" not in check.finding


def test_running_from_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert libraries().status is Status.WARN


def test_a_data_dir_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    (check,) = data_dir_checks(ClientSettings(data_dir=folder))
    assert check.status is Status.WARN
    assert not folder.exists()


def test_a_data_dir_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    (check,) = data_dir_checks(ClientSettings(data_dir=file))
    assert check.status is Status.FAIL
    assert "--data-dir" in check.remedy


def test_the_clients_of_the_registry_are_counted(tmp_path: Path) -> None:
    settings = ClientSettings(data_dir=tmp_path)
    assert [check.status for check in data_dir_checks(settings)] == [Status.OK, Status.WARN]
    assert not (tmp_path / FILE_NAME).exists()
    with closing(Store.open(tmp_path)) as store:
        create_client(store, "ann", tmp_path / "keys", algorithm="ed25519")
        create_client(store, "bob", tmp_path / "keys", algorithm="ed25519")
        store.revoke("bob")
        assert of("clients", data_dir_checks(settings))[0].finding == "1 can connect, 1 revoked"
        store.revoke("ann")
    assert of("clients", data_dir_checks(settings))[0].status is Status.WARN


def test_a_registry_that_is_none(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("not a database " * 100)
    (check,) = of("clients", data_dir_checks(ClientSettings(data_dir=tmp_path)))
    assert check.status is Status.FAIL


# Broker and hosts -----------------------------------------------------------------------------------------------------


def test_a_sound_fleet() -> None:
    hosts = tuple(Host(name=name, engines=(engine(LLAMA),)) for name in ("gpu-1", "gpu-2"))
    assert {check.status for check in fleet_checks(Snapshot(hosts=hosts), "tcp://b:1")} == {Status.OK}


@pytest.mark.parametrize(
    ("snapshot", "part", "status", "words"),
    [
        (Snapshot(), "hosts", Status.FAIL, "no host is connected"),
        (Snapshot(queued=3), "queue", Status.WARN, "3 requests wait and none runs"),
        (Snapshot(hosts=(Host(name="g", engines=(), beat_age_ms=2500),)), "host", Status.WARN, "heard 2.5 s ago"),
        (Snapshot(hosts=(Host(name="g", engines=(), draining=True),)), "host", Status.WARN, "g is draining"),
        (Snapshot(hosts=(Host(name="g", engines=(engine(),)),)), "engines", Status.WARN, "has no models"),
        (
            Snapshot(hosts=(Host(name="g", engines=(engine(LLAMA, up=False, error="it burns"),)),)),
            "engines",
            Status.FAIL,
            "on g it burns",
        ),
    ],
)
def test_what_is_wrong_with_a_fleet(snapshot: Snapshot, part: str, status: Status, words: str) -> None:
    (check,) = of(part, fleet_checks(snapshot, "tcp://b:1"))
    assert check.status is status
    assert words in check.finding


def test_one_name_for_two_models_is_told() -> None:
    other = Model(name="llama2:latest", digest="b" * 64)
    hosts = (
        Host(name="gpu-1", engines=(engine(LLAMA),)),
        Host(name="gpu-2", engines=(engine(other),)),
        Host(name="gpu-3", engines=(engine(Model(name="llama2:latest", digest="c" * 64), up=False),)),
    )
    (check,) = of("models", fleet_checks(Snapshot(hosts=hosts), "tcp://b:1"))
    assert check.status is Status.WARN
    assert "llama2:latest is not the same everywhere: aaaaaaaaaaaa on gpu-1; bbbbbbbbbbbb on gpu-2" in check.finding


# What an engine serves at a time --------------------------------------------------------------------------------------


def times(start: float, end: float, tokens: int = 10) -> list[float]:
    return [start + (end - start) * n / (tokens - 1) for n in range(tokens)]


@pytest.mark.parametrize(
    ("streams", "expected"),
    [
        ([times(0, 1), times(1.1, 2), times(2.1, 3)], 1),
        ([times(0, 1), times(0.1, 1), times(1.1, 2), times(1.2, 2)], 2),
        ([times(0, 1)] * 4, 4),
        # Read together: the next one's first token seems to come before the last token of the one before.
        ([times(0, 1), times(0.999, 2)], 1),
        ([times(0, 1), times(0, 1, tokens=3)], None),
        ([times(0, 1), times(0, 0.01)], None),
        ([times(0, 1), []], None),
    ],
)
def test_how_many_ran_at_once(streams: list[list[float]], expected: int | None) -> None:
    assert at_once(streams) == expected


@pytest.mark.parametrize(
    ("slots", "words"), [(1, "serves 1 at a time"), (2, "serves 2 at a time"), (4, "serves at least 4 at a time")]
)
async def test_an_engine_is_measured(slots: int, words: str) -> None:
    backend = SimulatedBackend(Settings(slots=slots, tokens_per_s=150, models=["simulated"]))
    async with running(backend) as url:
        check = await probe(url, {"simulated:latest": slots})
    assert check.status is Status.OK
    assert f"{words} with simulated:latest; slots={slots} is set" in check.finding


@pytest.mark.parametrize(
    ("measured", "slots", "status", "words"),
    [
        (1, 3, Status.WARN, "Run its worker with slots=1"),
        (2, 1, Status.WARN, "It could serve more: run its worker with --ollama URL,slots=2"),
        (4, 1, Status.WARN, "at least 4 at a time with llama2; slots=1 is set It could serve more"),
        (2, None, Status.OK, "slots=2 is right for it"),
        (4, None, Status.OK, "slots=4 is safe"),
        (4, 8, Status.OK, "at least 4 at a time"),
        (None, 1, Status.WARN, "too briefly"),
    ],
)
def test_what_is_measured_is_compared_with_what_is_set(
    measured: int | None, slots: int | None, status: Status, words: str
) -> None:
    check = verdict("an engine", "llama2", measured, slots)
    assert check.status is status
    assert words in f"{check.finding} {check.remedy}"


async def test_an_engine_too_fast_to_be_measured() -> None:
    async with running(SimulatedBackend(Settings())) as url:
        assert "too briefly" in (await probe(url, {})).finding


async def test_an_engine_without_a_model_to_talk_to() -> None:
    async with running(SimulatedBackend(Settings(models=[]))) as url:
        check = await probe(url, {})
    assert check.status is Status.WARN
    assert "no model to generate with" in check.finding


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_broker(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("cli.fleet.ANSWER_S", 0.05)
    return ["--broker", "tcp://127.0.0.1:1"]


def test_nothing_reachable_fails_and_everything_has_a_remedy(
    no_broker: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*no_broker, "--url", "ws://127.0.0.1:1", "--ollama", "127.0.0.1:1", "--json"]
    assert main(["doctor", *arguments]) == 1
    checks = json.loads(capsys.readouterr().out)
    failed = {check["part"]: check for check in checks if check["status"] == "fail"}
    assert failed.keys() == {"broker", "gateway", "login", "engine"}
    assert all(check["remedy"] for check in failed.values())
    assert "weftline keys create" in failed["login"]["remedy"]
    assert "ollama serve" in failed["engine"]["remedy"]


def test_what_answers_may_be_no_gateway(
    no_broker: list[str], config: Path, gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    """This one speaks WebSocket only: no /livez, so not a gateway of ours."""
    assert main(["doctor", *no_broker, "--key", str(config), "--ollama", "127.0.0.1:1"]) == 1
    shown = capsys.readouterr().out
    assert f"what answers at {gateway.url} is not a gateway" in shown
    assert "generation" not in shown


def test_engines_on_other_machines_are_not_held_against_this_one(
    broker_of: BrokerOf, capsys: pytest.CaptureFixture[str]
) -> None:
    host = Host(name="far-away", engines=(engine(LLAMA, url="http://127.0.0.1:1"),))
    with broker_of(Snapshot(id=1, what="hosts", hosts=(host,))) as address:
        assert main(["doctor", "--broker", address, "--url", "ws://127.0.0.1:1"]) == 1
    shown = capsys.readouterr().out
    assert "1 could not be reached from here: http://127.0.0.1:1" in shown
    assert "no engine answers" not in shown


@pytest.mark.parametrize(("expected", "status"), [(False, Status.OK), (True, Status.FAIL)])
async def test_a_machine_without_ollama_is_held_against_nobody_who_expects_none(
    expected: bool, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.settings.OLLAMA_PORT", 1)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/ollama" if expected else None)
    (check,) = [check async for check in doctor.engine_checks(ClientSettings(), Snapshot())]
    assert check.status is status
    assert "http://127.0.0.1:1" in check.finding


def test_a_wrong_engine_address_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--ollama", "ftp://x"]) == 2
    assert "an engine is reached by http or https" in capsys.readouterr().err


def test_on_a_terminal_it_is_coloured_and_wrapped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    doctor._print(Check("engine", Status.WARN, "words " * 12, "more " * 12))
    shown = capsys.readouterr().out
    assert shown.startswith("\x1b[33mwarn\x1b[0m  engine      words")
    lines = shown.splitlines()
    assert len(lines) == 4
    assert all(len(line) <= 60 for line in lines[1:])
    monkeypatch.setenv("NO_COLOR", "1")
    doctor._print(Check("engine", Status.FAIL, "words"))
    assert capsys.readouterr().out == "FAIL  engine      words\n"

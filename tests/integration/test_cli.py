"""The command line against a running fabric, and what it says when something is not as it should be."""

import contextlib
import json
import logging
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.keys import create_client, create_key_files
from cli.main import main
from gateway.store import Store
from tests.fabric import Fabric
from tests.processes import started
from workers.embedded.simulated import Settings

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _as_on_a_fresh_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Settings of the machine do not reach the commands, nor what commands do to the root logger other tests.

    SIGINT reaches what is started even where the tests run in the background of a shell, which ignores it there.
    """
    for name in ("WEFTLINE_CONFIG", "WEFTLINE_KEY", "OLLAMA_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WEFTLINE_DATA_DIR", str(tmp_path / "data"))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, interrupt)
    root.handlers[:] = handlers
    root.setLevel(level)


def broker_of(fabric: Fabric) -> str:
    assert fabric.addresses is not None
    return fabric.addresses.gateways


def json_of(capsys: Capture, *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# A running fabric -----------------------------------------------------------------------------------------------------


def test_hosts_models_and_chat(fabric: Fabric, capsys: Capture) -> None:
    key = ["--key", str(fabric.config_path)]
    found = json_of(capsys, "hosts", "--broker", broker_of(fabric))
    assert [host["name"] for host in found] == ["worker-1", "worker-2"]
    assert {model["slots"] for host in found for model in host["engines"][0]["models"] if not model["embedding"]} == {4}
    assert "llama2" in json_of(capsys, "models", *key)
    assert main(["chat", *key, "--option", "num_predict=5", "Hello"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.split()) == 5
    assert shown.err == ""


def test_an_unknown_model_names_those_there_are(fabric: Fabric, capsys: Capture) -> None:
    assert main(["chat", "--key", str(fabric.config_path), "--model", "nope", "Hello"]) == 1
    said = capsys.readouterr().err
    assert "MODEL_NOT_FOUND" in said
    assert "llama2" in said


def test_a_revoked_client_is_not_authenticated(fabric: Fabric, tmp_path: Path, capsys: Capture) -> None:
    with contextlib.closing(Store.open(fabric.folder)) as store:
        files = create_client(store, "revoked", tmp_path, server_url=fabric.url)
        assert main(["models", "--key", str(files.config)]) == 0
        store.revoke("revoked")
    assert main(["models", "--key", str(files.config)]) == 77
    assert "weftline keys list" in capsys.readouterr().err


def test_an_unknown_client_is_not_authenticated(fabric: Fabric, tmp_path: Path, capsys: Capture) -> None:
    files, _ = create_key_files("stranger", tmp_path, server_url=fabric.url)
    assert main(["chat", "--key", str(files.config), "Hello"]) == 77
    assert "weftline keys create" in capsys.readouterr().err


def test_the_doctor_finds_a_fabric_sound(fabric: Fabric, capsys: Capture) -> None:
    arguments = ["--broker", broker_of(fabric), "--key", str(fabric.config_path), "--data-dir", str(fabric.folder)]
    checks = json_of(capsys, "doctor", *arguments)
    by_part = {check["part"]: check for check in checks}
    parts = ["python", "libraries", "data dir", "clients", "broker", "host", "engines", "models", "gateway", "login"]
    assert [by_part[part]["status"] for part in parts] == ["ok"] * len(parts)
    assert "first token after" in by_part["generation"]["finding"]
    # The shared engines run at full speed, where nothing can be measured; that they were probed is what counts here.
    assert [check["status"] for check in checks if check["part"] == "engine"] == ["warn", "warn"]


def test_the_doctor_finds_what_is_missing(fabric: Fabric, tmp_path: Path, capsys: Capture) -> None:
    """One key too few, a wrong model name: the rest is checked all the same."""
    arguments = ["--broker", broker_of(fabric), "--ollama", fabric.engine_urls[0]]
    assert main(["doctor", *arguments, "--url", fabric.url]) == 1
    assert "FAIL  login       there is no client key" in capsys.readouterr().out
    assert main(["doctor", *arguments, "--key", str(fabric.config_path), "--model", "nope"]) == 1
    said = capsys.readouterr().out
    assert "ok    login" in said
    assert "FAIL  generation  model 'nope'" in said


def test_running_and_waiting_requests_and_ctrl_c(tmp_path: Path, capsys: Capture) -> None:
    slow = Settings(slots=1, tokens_per_s=20)
    with Fabric(tmp_path / "fabric", engines=[slow]) as fabric:
        chat = ["chat", "--key", str(fabric.config_path), "--json", "--option", "num_predict=1000"]
        with started("cli.main", *chat, "first") as first:
            first.find('"token"')
            with started("cli.main", *chat, "second") as second:
                second.find('"queued"')
                running, waiting = json_of(capsys, "ps", "--broker", broker_of(fabric))
                assert (running["state"], running["host"], running["client"]) == (
                    "streaming",
                    "worker-1",
                    "test-client",
                )
                assert (waiting["state"], waiting["host"], waiting["position"]) == ("queued", None, 1)
                (host,) = json_of(capsys, "hosts", "--broker", broker_of(fabric))
                assert host["engines"][0]["busy"] == 1
                first.signal(signal.SIGINT)
                assert first.wait() == 130
                second.find('"token"')
                second.signal(signal.SIGINT)
                assert second.wait() == 130
        fabric.until(lambda: fabric.busy() == 0, "the engine stopped")


def test_a_client_revoked_in_an_answer_is_refused(tmp_path: Path) -> None:
    with Fabric(tmp_path / "fabric", engines=[Settings(tokens_per_s=20)]) as fabric:
        with started("cli.main", "chat", "--key", str(fabric.config_path), "--json", "Hello") as chat:
            chat.find('"token"')
            with contextlib.closing(Store.open(fabric.folder)) as store:
                store.revoke(fabric.client_id)
            assert chat.wait() == 77
            chat.find("the gateway refuses this client")
        fabric.until(lambda: fabric.busy() == 0, "the engine stopped")


# Processes that cannot start ------------------------------------------------------------------------------------------


@pytest.fixture
def taken() -> Iterator[str]:
    """HOST:PORT that another process listens on."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield f"127.0.0.1:{other.getsockname()[1]}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["broker", "--gateways", "tcp://{taken}", "--workers", "tcp://127.0.0.1:*"],
        ["broker", "--gateways", "tcp://127.0.0.1:*", "--workers", "tcp://{taken}"],
        ["gateway", "--listen", "{taken}"],
        ["engine", "--simulated", "--listen", "{taken}"],
    ],
)
def test_a_port_in_use(arguments: list[str], taken: str, capsys: Capture) -> None:
    assert main([argument.format(taken=taken) for argument in arguments]) == 1
    said = capsys.readouterr().err
    assert taken in said
    assert "in use" in said


@pytest.mark.parametrize(
    "arguments",
    [["broker", "--gateways", "tcp://0.0.0.0:0"], ["gateway", "--listen", "0.0.0.0:0"]],
)
def test_a_port_that_others_reach_needs_a_yes(arguments: list[str], capsys: Capture) -> None:
    assert main(arguments) == 2
    assert "--insecure" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["gateway", "--listen", "127.0.0.1:0"], ["up"], ["keys", "create", "ann"]])
def test_a_data_dir_that_cannot_be_written(
    command: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main([*command, "--data-dir", str(tmp_path / "file" / "below")]) in (1, 2)
    said = capsys.readouterr().err
    assert "--data-dir" in said
    assert "Not a directory" in said


@pytest.mark.parametrize(
    ("command", "key", "nearest"),
    [
        ("broker", "gateway", "gateways"),
        ("gateway", "lisen", "listen"),
        ("worker", "brokr", "broker"),
        ("up", "engin", "engine"),
    ],
)
def test_a_wrong_setting_is_named_with_the_nearest(
    command: str, key: str, nearest: str, tmp_path: Path, capsys: Capture
) -> None:
    config = tmp_path / "weftline.toml"
    config.write_text(f'[{command}]\n{key} = "x"\n')
    assert main([command, "--config", str(config)]) == 2
    assert f"[{command}] has no setting {key!r}; did you mean {nearest!r}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["broker", "--gateways", "nonsense"],
        ["broker", "--workers", "tcp://127.0.0.1:99999"],
        ["gateway", "--listen", "nonsense"],
        ["gateway", "--listen", "127.0.0.1:99999"],
        ["gateway", "--broker", "foo"],
        ["up", "--port", "99999"],
        ["up", "--port", "-1"],
        ["up", "--workers", "0"],
        ["models", "--url", "127.0.0.1:3000"],
        ["worker", "--broker", "nonsense"],
        ["worker", "--ollama", "127.0.0.1:1,slots=0"],
        ["engine", "--model", "no-file"],
        ["engine", "--slots", "many"],
    ],
)
def test_an_ill_formed_flag(arguments: list[str], capsys: Capture) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err


def test_up_without_the_ollama_that_was_asked_for(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GATEWAYS", "WORKERS_PORT"):
        monkeypatch.setenv(f"WEFTLINE_UP_{name}", f"tcp://127.0.0.1:{_free_port()}")
    arguments = ["--port", str(_free_port()), "--engine", "ollama", "--ollama", "http://127.0.0.1:1"]
    assert main(["up", *arguments, "--data-dir", str(tmp_path)]) == 69
    assert "ollama serve" in capsys.readouterr().err


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# By hand: every part a process ----------------------------------------------------------------------------------------


def test_parts_started_one_by_one(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part says what is still missing, and notices when it comes; everything ends with 0."""
    monkeypatch.setenv("WEFTLINE_WORKER_POLL_INTERVAL_S", "0.1")
    weftline, data = "cli.main", str(tmp_path / "data")
    engine = f"127.0.0.1:{_free_port()}"
    with contextlib.ExitStack() as stack:
        ports = ["--gateways", "tcp://127.0.0.1:*", "--workers", "tcp://127.0.0.1:*"]
        broker = stack.enter_context(started(weftline, "broker", *ports))
        gateways, workers = broker.find(r"listening gateways=(\S+) workers=(\S+)").groups()
        monkeypatch.setenv("WEFTLINE_CLIENT_BROKER", gateways)
        listen = ["--broker", gateways, "--listen", "127.0.0.1:0", "--data-dir", data]
        gateway = stack.enter_context(started(weftline, "gateway", *listen))
        url = gateway.find(r"listening url=(\S+)")[1]
        gateway.find("connected")

        assert main(["keys", "create", "local", "--out", f"{data}/keys", "--server-url", url]) == 0
        assert main(["models"]) == 0
        assert "No model can be served" in capsys.readouterr().err
        assert main(["doctor", "--ollama", engine]) == 1
        said = capsys.readouterr().out
        assert "FAIL  hosts       no host is connected to the broker" in said
        assert f"FAIL  gateway     {url} answers but is not ready: no worker is connected" in said
        assert f"FAIL  engine      no engine answers at http://{engine}" in said

        to_broker = ["--broker", workers, "--ollama", engine, "--name", "gpu-1"]
        worker = stack.enter_context(started(weftline, "worker", *to_broker))
        worker.find("registered")
        (host,) = json_of(capsys, "hosts")
        assert host["engines"][0]["up"] is False
        assert engine in host["engines"][0]["error"]

        serving = stack.enter_context(started(weftline, "engine", "--simulated", "--listen", engine))
        serving.find("listening")
        worker.find("engine up")
        assert main(["chat", "--model", "llama2", "--option", "num_predict=3", "Hello"]) == 0
        assert len(capsys.readouterr().out.split()) == 3
        for process in (gateway, worker, serving, broker):
            process.signal(signal.SIGINT)  # at once: SIGTERM waits for what could be resumed
            assert process.wait() == 0


@pytest.mark.skipif(shutil.which("ollama") is not None, reason="there is an ollama here, and it would be started")
def test_start_ollama_without_ollama(capsys: Capture) -> None:
    arguments = ["--broker", "tcp://127.0.0.1:1", "--ollama", f"127.0.0.1:{_free_port()}", "--start-ollama"]
    assert main(["worker", *arguments]) != 0
    assert "ollama" in capsys.readouterr().err

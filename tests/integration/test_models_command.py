"""`weftline models …` against a fabric: the operator's way to the operations on models."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from weftline_client import Client

from cli.main import main
from gateway import autopull
from gateway.store import Store
from tests.fabric import Fabric
from workers.embedded.simulated import Settings

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def fabric(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fabric]:
    engines = [Settings(), Settings()]
    pulls = {"auto_pull": ("sought",)}
    with Fabric(tmp_path_factory.mktemp("models"), engines=engines, gateway_settings=pulls) as running:
        yield running


@pytest.fixture(autouse=True)
def _where(fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFTLINE_DATA_DIR", str(fabric.folder))
    monkeypatch.setenv("WEFTLINE_CLIENT_URL", fabric.url)
    monkeypatch.setenv("WEFTLINE_KEY", str(fabric.config_path))
    monkeypatch.setenv("COLUMNS", "200")


def seen(fabric: Fabric, name: str, capsys: Capture, count: int = 2) -> list[str]:
    """The hosts that have it, when so many are known to."""
    found: list[str] = []

    def known() -> bool:
        nonlocal found
        main(["models", "where", name, "--json"])
        out = capsys.readouterr().out
        found = [host["host"] for entry in json.loads(out or "[]") for host in entry["hosts"]]
        return len(found) == count

    fabric.until(known, f"{count} hosts have {name}")
    return found


def test_the_list_is_still_what_it_was(capsys: Capture) -> None:
    assert main(["models"]) == 0
    assert "llama2" in capsys.readouterr().out.splitlines()


def test_pull_find_pin_unload_and_remove(fabric: Fabric, capsys: Capture) -> None:
    assert main(["models", "pull", "fresh"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "fresh is on worker-1, worker-2.\n"
    assert "worker-2: success" in shown.err
    assert seen(fabric, "fresh", capsys) == ["worker-1", "worker-2"]
    assert main(["models", "where", "fresh:latest"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["fresh", "worker-1"],
        ["fresh", "worker-2"],
    ]
    assert main(["models", "pin", "fresh", "--host", "worker-2"]) == 0
    assert main(["models", "unload", "fresh"]) == 0
    assert main(["models", "rm", "fresh", "--host", "worker-1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "fresh is kept in memory on worker-2.",
        "fresh is let go on worker-1, worker-2.",
        "fresh was deleted on worker-1.",
    ]
    assert seen(fabric, "fresh", capsys, 1) == ["worker-2"]
    assert main(["models", "log", "-n", "4", "--json"]) == 0
    log = json.loads(capsys.readouterr().out)
    assert [(entry["action"], entry["hosts"], entry["outcome"]) for entry in log] == [
        ("delete", ["worker-1"], "success"),
        ("load", ["worker-1", "worker-2"], "success"),
        ("load", ["worker-2"], "success"),
        ("pull", ["worker-1", "worker-2"], "success"),
    ]
    assert main(["models", "log"]) == 0
    assert "operator  pull" in capsys.readouterr().out


def test_the_key_of_a_command_dies_with_it(fabric: Fabric, capsys: Capture) -> None:
    main(["models", "where"])
    with contextlib.closing(Store.open(fabric.folder)) as store:
        assert store.tokens("operator")
        assert all(token.revoked for token in store.tokens("operator"))


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["pull", "missing"], 1, "file does not exist"),
        (["rm", "nowhere"], 1, "model 'nowhere' not found"),
        (["where", "nowhere"], 1, "no host has nowhere"),
        (["pull", "m", "--host", "gone"], 1, "no host gone"),
        (["pull", "m", "--token", "wrong"], 77, "authentication failed"),
        (["pull", "m", "--url", "ws://127.0.0.1:9"], 69, "no gateway answers at http://127.0.0.1:9"),
        (["pull"], 2, "MODEL"),
    ],
)
def test_what_goes_wrong(arguments: list[str], status: int, words: str, capsys: Capture) -> None:
    assert main(["models", *arguments]) == status
    assert words in capsys.readouterr().err


def test_without_a_registry_a_key_is_needed(tmp_path: Path, capsys: Capture) -> None:
    assert main(["models", "rm", "m", "--data-dir", str(tmp_path)]) == 2
    assert "Give a key with --token" in capsys.readouterr().err


def test_a_name_stands_for_a_model_and_is_switched_and_switched_back(fabric: Fabric, capsys: Capture) -> None:
    def answers(model: str) -> bool:
        return main(["chat", "--model", "prod", "--option", "num_predict=3", "hello"]) == 0 and listed(model)

    def listed(model: str) -> bool:
        tags = httpx.get(f"{fabric.http_url}/k/{key}/api/tags", trust_env=False).json()["models"]
        return [tag["alias"] for tag in tags if tag["name"] == "prod:latest"] == [f"{model}:latest"]

    with contextlib.closing(Store.open(fabric.folder)) as store:
        _, key = store.add_token("reader")
    assert main(["models", "alias", "prod", "llama2"]) == 0
    assert capsys.readouterr().out == "prod stands for llama2 now; gateways follow within 2 s.\n"
    fabric.until(lambda: answers("llama2"), "it answers")
    main(["models"])
    assert "prod" in capsys.readouterr().out.splitlines()
    assert main(["models", "alias", "prod", "simulated"]) == 0
    fabric.until(lambda: answers("simulated"), "the other answers")
    assert main(["models", "alias", "prod", "--back"]) == 0
    fabric.until(lambda: answers("llama2"), "the first answers again")
    capsys.readouterr()
    assert main(["models", "alias", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"name": "prod:latest", "model": "llama2:latest", "previous": "simulated:latest"}
    ]
    assert main(["models", "alias"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["prod", "llama2", "simulated"]
    for path, body in {
        "/api/show": {"name": "prod"},
        "/api/generate": {"model": "prod", "prompt": "p", "options": {"num_predict": 2}},
        "/v1/chat/completions": {"model": "prod", "messages": [{"role": "user", "content": "p"}], "max_tokens": 2},
    }.items():
        assert httpx.post(f"{fabric.http_url}/k/{key}{path}", json=body, trust_env=False).status_code == 200
    one = httpx.get(f"{fabric.http_url}/k/{key}/v1/models/prod", trust_env=False)
    assert one.json()["id"] == "prod"
    assert main(["models", "alias", "prod", "--delete"]) == 0
    fabric.until(lambda: not listed("llama2"), "it is gone")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a"], "say which MODEL"),
        (["a", "b", "--back"], "take one NAME"),
        (["a", "--back", "--delete"], "take one NAME"),
        (["--back"], "take one NAME"),
        (["a", "--back"], "'a' has stood for nothing else"),
        (["a", "--delete"], "'a' is no alias"),
        (["a", "a:latest"], "is an alias itself"),
        (["", "m"], "1 to 512 characters"),
    ],
)
def test_what_cannot_be_an_alias(arguments: list[str], words: str, capsys: Capture) -> None:
    assert main(["models", "alias", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_what_is_being_pulled_is_said(fabric: Fabric, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autopull, "GRACE_S", 0.01)
    fault = {"kind": "hang", "model": "sought", "after": 5, "count": 2}
    for url in fabric.engine_urls:
        httpx.post(f"{url}/debug/faults", json=fault, trust_env=False).raise_for_status()

    def said(name: str) -> str:
        assert main(["models", "where", *name.split()]) == (1 if name else 0)
        return capsys.readouterr().err

    with Client.from_config(fabric.config_path) as client, client.generate("p", "sought", stream=True):
        fabric.until(lambda: ", 50 %" in said("sought"), "it is said how far it is")
        told = said("sought")
        assert told.startswith("sought is being pulled on worker-1, worker-2: pulling ")
        assert told.endswith(", 50 %\nweftline: no host has sought.\n")
        assert "sought is being pulled" in said("")
        assert "sought" not in said("other")
    fabric.until(lambda: not said(""), "it is stopped")

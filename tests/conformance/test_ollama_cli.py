"""The `ollama` command line, unchanged, where one is installed; of v0.24.0 what it prints was looked at."""

import os
import pty
import re
import select
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fabric import Fabric
from workers.embedded.simulated import transcript

CLIENT = "`ollama` v0.24.0, the command line"
BY_HAND = True
CONTROLS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)|\r")
OLLAMA = shutil.which("ollama") or ""

pytestmark = [pytest.mark.by_hand, pytest.mark.skipif(not OLLAMA, reason="needs the `ollama` command line")]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment(fleet: Fabric, key: str, tmp_path: Path) -> dict[str, str]:
    """All that a user changes."""
    return os.environ | {"OLLAMA_HOST": f"{fleet.http_url}/k/{key}", "HOME": str(tmp_path)}


@pytest.fixture
def ollama(environment: dict[str, str]) -> Run:
    """Runs a command of `ollama`."""

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [OLLAMA, *arguments],
            env=environment | more,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
        )

    return run


def words(text: str) -> str:
    """Without the terminal's controls, and what they overwrite at a line's end."""
    return CONTROLS.sub("", text)


def test_list_show_and_ps(ollama: Run) -> None:
    listed = ollama("list").stdout.splitlines()
    assert listed[0].split() == ["NAME", "ID", "SIZE", "MODIFIED"]
    assert {line.split()[0] for line in listed[1:]} >= {"llama2:latest", "simulated-embed:latest"}
    assert "context length    4096" in ollama("show", "llama2").stdout
    assert ollama("ps").stdout.split()[:2] == ["NAME", "ID"]


def test_run(ollama: Run) -> None:
    done = ollama("run", "--nowordwrap", "llama2", "Why is the sky blue?")
    assert (done.returncode, words(done.stdout).strip()) == (0, transcript("Why is the sky blue?", 0, 128).strip())
    assert words(ollama("run", "simulated-embed", "a cat").stdout).startswith("[")


def test_run_in_a_terminal(environment: dict[str, str]) -> None:
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [OLLAMA, "run", "llama2"], env=environment | {"TERM": "xterm"}, stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    try:
        said = ""

        def until(text: str) -> None:
            nonlocal said
            while text not in words(said):
                assert select.select([screen], [], [], 20)[0], said
                said += os.read(screen, 65536).decode()

        until(">>>")
        os.write(screen, b"Why is the sky blue?\r")
        until(transcript("Why is the sky blue?", 0, 3).split()[-1])
        os.write(screen, b"/bye\r")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(screen)


def test_stop(ollama: Run, fleet: Fabric) -> None:
    ollama("run", "simulated", "Hello")
    fleet.until(lambda: "simulated:latest" in ollama("ps").stdout, "the model is loaded", timeout_s=10)
    assert ollama("stop", "simulated").returncode == 0
    fleet.until(lambda: "simulated:latest" not in ollama("ps").stdout, "the model is not loaded", timeout_s=10)


def test_pull_cp_and_rm(ollama: Run, fleet: Fabric, new_key: Callable[..., str]) -> None:
    host = f"{fleet.http_url}/k/{new_key('inference', 'models:read', 'models:write')}"  # rm stops the model first
    done = ollama("pull", "carried", OLLAMA_HOST=host)
    assert (done.returncode, "success" in done.stderr) == (0, True)
    fleet.until(lambda: "carried:latest" in ollama("list").stdout, "the model is listed")
    assert ollama("cp", "carried", "carried-too", OLLAMA_HOST=host).returncode == 0
    fleet.until(lambda: "carried-too:latest" in ollama("list").stdout, "the copy is listed")
    done = ollama("rm", "carried", "carried-too", OLLAMA_HOST=host)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["deleted 'carried'", "deleted 'carried-too'"])
    assert ollama("pull", "carried").returncode == 1


def test_create_from_a_file(ollama: Run, fleet: Fabric, new_key: Callable[..., str], tmp_path: Path) -> None:
    host = f"{fleet.http_url}/k/{new_key('models:read', 'models:write')}"
    (tmp_path / "model.gguf").write_bytes(b"GGUF" * 2**19)
    (tmp_path / "Modelfile").write_text("FROM ./model.gguf\n")
    done = ollama("create", "filed-too", "-f", str(tmp_path / "Modelfile"), OLLAMA_HOST=host)
    assert (done.returncode, "success" in done.stderr) == (0, True), done.stderr
    fleet.until(lambda: "filed-too:latest" in ollama("list").stdout, "the model is listed")


def test_a_model_that_is_nowhere(ollama: Run) -> None:
    done = ollama("show", "none")
    assert (done.returncode, done.stderr.strip()) == (1, "Error: model 'none' not found")


def test_a_key_that_is_missing(ollama: Run, fleet: Fabric) -> None:
    done = ollama("list", OLLAMA_HOST=fleet.http_url)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: a key is needed")

"""ollama-python's own tests, with a fabric between its client and its mock server.

They come with its source distribution, which is fetched as locked in suite/requirements.txt. Each asks the mock server
for something, and the mock server checks the JSON it gets: what arrives is what was sent.

Left out are its tests of managing models. For those the fabric makes calls of its own to each host it chooses (it
always asks for progress, and asks again), so a mock that waits for one certain body is not asked as it expects; and
those of delete and copy ask for /api/delete/api/delete, which no Ollama has. test_ollama_python.py tries these
operations instead.
"""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

SUITE = Path(__file__).parent / "suite"
ROOT = Path(__file__).parents[2]
LEFT_OUT = ("pull", "push", "create", "delete", "copy")
TESTS = 31
CLIENT = "`ollama` 0.6.3 for Python, its own tests"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By test, "" or what went wrong; of those tests that asked the server."""
    folder = tmp_path_factory.mktemp("suite")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary=ollama", "--require-hashes", f"--requirement={SUITE}/requirements.txt", f"--dest={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    if done.returncode:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing(f"the tests could not be fetched: {done.stderr.strip()}")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as files:
            files.extractall(folder / "site")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    left_out = " or ".join(f"_client_{what}" for what in LEFT_OUT)
    command = [sys.executable, "-P", "-m", "pytest", "--import-mode=importlib", "-p", "anyio", "-p", "behind_gateway"]
    done = subprocess.run(
        [*command, "-k", f"not ({left_out})", "tests/test_client.py"],
        cwd=folder / archive.name.removesuffix(".tar.gz"),
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, SUITE, folder / "site"))),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "WEFTLINE_OUTCOMES": str(folder / "outcomes.json"),
        },
        capture_output=True,
        text=True,
        timeout=100,
    )
    print(done.stdout, done.stderr)
    found: dict[str, str] = json.loads((folder / "outcomes.json").read_text(encoding="utf-8"))
    return found


def test_those_that_ask_a_server_for_an_answer(outcomes: dict[str, str]) -> None:
    assert {name: why for name, why in outcomes.items() if why} == {}
    assert len(outcomes) == TESTS

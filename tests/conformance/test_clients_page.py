"""What docs/clients.md tells people to do does what it says."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conformance.conftest import CLIENTS
from tests.fabric import Fabric
from tests.unit.docs import markdown

SECTIONS = markdown.sections((markdown.DOCS / "clients.md").read_text(encoding="utf-8"), 2)
Follow = Callable[[str], str]


@pytest.fixture
def follow(fleet: Fabric, key: str, tmp_path: Path) -> Follow:
    """Does what a section says, in a shell; what was printed."""

    def run(section: str) -> str:
        text = SECTIONS[section].replace("http://gateway:3000", fleet.http_url)
        text = re.sub(r"\bKEY\b", key, text)
        script = "set -eu\n" + markdown.blocks(text, "sh")[0]
        for number, program in enumerate(markdown.blocks(text, "python")):
            (tmp_path / f"{number}.py").write_text(program, encoding="utf-8")
            script += f"{shlex.quote(sys.executable)} -W error {number}.py\n"
        for number, program in enumerate(markdown.blocks(text, "js")):
            (tmp_path / f"{number}.mjs").write_text(program, encoding="utf-8")
            script += f"node {number}.mjs\n"
        done = subprocess.run(
            ["sh", "-c", script],
            cwd=tmp_path,
            env=os.environ | {"HOME": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize(
    "section", ["Ollama's Python library", "OpenAI's Python library", "Anthropic's Python library"]
)
def test_the_python_libraries(follow: Follow, section: str) -> None:
    assert len(follow(section).split()) >= 100


@pytest.mark.node
@pytest.mark.parametrize("section", ["Ollama's JavaScript library", "OpenAI's JavaScript library"])
def test_the_javascript_libraries(follow: Follow, node: str, tmp_path: Path, section: str) -> None:
    assert node
    (tmp_path / "node_modules").symlink_to(CLIENTS / "node_modules")
    assert len(follow(section).split()) >= 100


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(follow: Follow) -> None:
    assert '"done":true' in follow("curl").splitlines()[-1]


@pytest.mark.by_hand
@pytest.mark.skipif(shutil.which("ollama") is None, reason="needs the `ollama` command line")
def test_the_command_line(follow: Follow) -> None:
    assert "llama2:latest" in follow("The `ollama` command line")


def test_every_client_of_the_list_has_a_section() -> None:
    text = (markdown.DOCS / "clients.md").read_text(encoding="utf-8")
    listed = [row["Client"] for row in markdown.table(text, "Client", "What is changed")]
    named = [re.sub(r"\]\(.*", "", cell).lstrip("[") for cell in listed]
    assert len(named) >= 10
    assert set(named) <= SECTIONS.keys()

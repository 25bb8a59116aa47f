"""What the other pages state is so: the wire's messages, the metrics, the examples of the README."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cli.main import COMMANDS
from common import protocol
from gateway.metrics import Metrics
from tests.fabric import Fabric
from tests.unit.docs import markdown

ROOT = markdown.DOCS.parent
MODULES = ROOT / "tests" / "conformance" / "guides" / "node_modules"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *markdown.DOCS.glob("*.md"))}


def test_the_messages_of_the_wire_are_listed_by_direction() -> None:
    unions: dict[str, Any] = {
        "gateway → broker": protocol.FromGateway,
        "broker → gateway": protocol.ToGateway,
        "worker → broker": protocol.FromWorker,
        "broker → worker": protocol.ToWorker,
    }
    rows = markdown.table(PAGES["architecture.md"], "Direction", "Messages")
    listed = {row["Direction"]: set(re.findall(r"`(\w+)`", row["Messages"])) for row in rows}
    assert listed == {
        direction: {cls.__struct_config__.tag for cls in union.__args__} for direction, union in unions.items()
    }


def test_the_metrics_are_listed() -> None:
    upstream: Any = SimpleNamespace(fleet=protocol.Snapshot(), streams=0, waiting=0, connected=True)
    families = text_string_to_metric_families(Metrics(upstream).render().decode())
    offered = {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in families
        if not family.name.endswith("_created")
    }
    rows = markdown.table(PAGES["operations.md"], "Metric", "Type", "Meaning")
    assert {markdown.code(row["Metric"]): row["Type"] for row in rows} == offered


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_are_named_exist(page: str) -> None:
    shown = "\n".join(markdown.blocks(PAGES[page], "sh")) + "\n".join(re.findall(r"`([^`\n]+)`", PAGES[page]))
    named = set(re.findall(r"\bweftline ([a-z]+)\b", shown))
    assert named <= COMMANDS.keys()


def test_the_change_log_speaks_of_this_version() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version
    assert version[1] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", range(len(markdown.blocks(README, "python"))))
def test_the_python_examples_of_the_readme_run(number: int, fabric: Fabric, tmp_path: Path) -> None:
    example = markdown.blocks(README, "python")[number]
    (tmp_path / "keys").mkdir()
    config = json.loads(fabric.config_path.read_text())
    (tmp_path / "keys" / "alice_config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 20, "no answer"
    assert not done.stderr


# What a browser has and the oldest Node that is looked after may not have, or hides.
BROWSER = """
globalThis.WebSocket ??= require('ws');
globalThis.crypto ??= require('node:crypto').webcrypto;
const { readFileSync } = require('node:fs');
const config = JSON.parse(readFileSync('keys/alice_config.json'));
ask(config.serverUrl, config.clientId, readFileSync(config.privateKeyPath, 'utf8'), 'Hello', (token) =>
  process.stdout.write(token),
).then((end) => console.log(`\\n${end.totalTokens}`));
"""


@pytest.mark.skipif(shutil.which("node") is None or not MODULES.exists(), reason="needs node, and npm for its `ws`")
@pytest.mark.parametrize(("number", "driver"), [(0, ""), (1, BROWSER)], ids=["node", "browser"])
def test_the_javascript_examples_of_the_readme_run(number: int, driver: str, fabric: Fabric, tmp_path: Path) -> None:
    example = markdown.blocks(README, "js")[number]
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "alice_config.json").write_bytes(fabric.config_path.read_bytes())
    (tmp_path / "node_modules").symlink_to(MODULES)
    (tmp_path / "example.js").write_text(example + driver)
    done = subprocess.run(["node", "example.js"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 20, "no answer"
    assert not done.stderr

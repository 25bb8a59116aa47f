"""Pure modules stay so with all they import: the linter's contract looks at their own lines only."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
[PURE] = [contract["source_modules"] for contract in CONTRACTS if contract["name"].startswith("pure modules")]


@pytest.mark.parametrize("module", PURE)
def test_importing_a_pure_module_loads_neither_sockets_nor_an_event_loop(module: str) -> None:
    program = f"import sys, {module}; print(*sorted({{'zmq', 'asyncio'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

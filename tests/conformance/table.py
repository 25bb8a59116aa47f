"""The table of docs/compatibility.md that tells which clients pass which tests.

    python -m tests.conformance.table

runs the tests of the clients and writes it. What is tried reads as the tests' names do. A client whose tests were all
skipped keeps its row, if it had one: it was tried where it was installed.
"""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "compatibility.md"
CLIENTS = (
    "test_ollama_cli",
    "test_ollama_python",
    "test_ollama_python_suite",
    "test_ollama_js",
    "test_openai_python",
    "test_openai_node",
    "test_anthropic_python",
    "test_langchain",
    "test_llamaindex",
)
HEAD = "| Client | What is tried | Passed |\n|---|---|---|\n"


class Outcomes:
    """A pytest plugin: the tests that passed, and those that did not, by module."""

    def __init__(self) -> None:
        self.passed: dict[str, set[str]] = {}
        self.failed: dict[str, set[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        module, test = Path(report.location[0]).stem, re.sub(r"\[.*", "", report.location[2])
        if report.failed:
            self.failed.setdefault(module, set()).add(test)
        elif report.passed and report.when == "call":
            self.passed.setdefault(module, set()).add(test)


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f"tests.conformance.{name}")


def tests_of(module: ModuleType) -> list[str]:
    """The names of its tests, as they stand in the file."""
    return [name for name in vars(module) if name.startswith("test_")]


def row(module: ModuleType, passed: int) -> str:
    """A client's row of the table; `passed` of its tests did."""
    tests = tests_of(module)
    each = getattr(module, "TESTS", len(tests)) // len(tests)  # TESTS: of the client's own, which one of ours runs
    where = "by hand" if getattr(module, "BY_HAND", False) else "in CI"
    tried = "; ".join(name.removeprefix("test_").replace("_", " ") for name in tests)
    return f"| {module.CLIENT} | {tried} | {passed * each} of {len(tests) * each}, {where} |\n"


def main() -> int:
    outcomes = Outcomes()
    pytest.main(["-q", *(str(HERE / f"{name}.py") for name in CLIENTS)], plugins=[outcomes])
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(HEAD)
    old = re.match(r"(\|.*\n)*", rest)
    assert old is not None
    rows = []
    for name in CLIENTS:
        module = module_of(name)
        passed = outcomes.passed.get(name, set()) - outcomes.failed.get(name, set())
        if name in outcomes.passed or name in outcomes.failed:
            rows.append(row(module, len(passed)))
        else:
            rows += [line for line in old[0].splitlines(keepends=True) if line.startswith(f"| {module.CLIENT} |")]
    PAGE.write_text(before + HEAD + "".join(rows) + rest[old.end() :], encoding="utf-8")
    return bool(outcomes.failed)


if __name__ == "__main__":
    sys.exit(main())

"""docs/compatibility.md has a row for every client that is tried, and says of it what is."""

from pathlib import Path

from tests.conformance import table


def test_the_table_is_what_the_tests_are() -> None:
    page = table.PAGE.read_text(encoding="utf-8").partition(table.HEAD)[2]
    modules = [table.module_of(name) for name in table.CLIENTS]
    expected = "".join(table.row(module, len(table.tests_of(module))) for module in modules)
    assert page.startswith(expected + "\n"), "`python -m tests.conformance.table` writes it anew"


def test_every_client_that_is_tried_is_listed() -> None:
    tried = {path.stem for path in Path(__file__).parent.glob("test_*.py") if "\nCLIENT = " in path.read_text("utf-8")}
    assert tried == set(table.CLIENTS)

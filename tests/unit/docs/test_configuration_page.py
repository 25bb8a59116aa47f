"""docs/configuration.md lists every setting as the code has it, and its example loads."""

import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
import typer
from typer.core import TyperOption

from broker.__main__ import broker
from broker.settings import BrokerSettings
from cli import chat, doctor, fleet, models
from cli.settings import ClientSettings
from common import errors
from common.config import PREFIX, SECONDS_MAX, Settings
from deploy.local import UpSettings, up
from gateway.__main__ import gateway
from gateway.settings import GatewaySettings
from tests.unit.docs import markdown
from workers.__main__ import worker
from workers.embedded.__main__ import engine
from workers.settings import WorkerSettings

TEXT = (markdown.DOCS / "configuration.md").read_text(encoding="utf-8")
CHAPTERS = markdown.sections(TEXT, 2)

COMMANDS: dict[type[Settings], tuple[Callable[..., Any], ...]] = {
    BrokerSettings: (broker,),
    GatewaySettings: (gateway,),
    WorkerSettings: (worker,),
    UpSettings: (up,),
    ClientSettings: (chat.chat, models.models, models.pull, fleet.hosts, fleet.ps, doctor.doctor),
}


def options(*commands: Callable[..., Any]) -> dict[str, TyperOption]:
    """The options of commands, by parameter."""
    found: dict[str, TyperOption] = {}
    for function in commands:
        app = typer.Typer(add_completion=False)
        app.command()(function)
        found |= {p.name: p for p in typer.main.get_command(app).params if isinstance(p, TyperOption) and p.name}
    return found


def wording(kind: Any) -> str:
    """An annotation, as the page calls it."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        (meta,) = kind.__metadata__
        if meta.le == SECONDS_MAX:
            return "seconds" if meta.gt is None else "seconds, more than 0"
        bounds = f" of at least {meta.ge}" if meta.le is None else f" from {meta.ge} to {meta.le:.0f}"
        return wording(args[0]) + bounds
    if origin is Literal:
        return ", ".join(f"`{word}`" for word in args[:-1]) + f" or `{args[-1]}`"
    if origin in (types.UnionType, typing.Union):
        (kind,) = (arg for arg in args if arg is not type(None))
        return wording(kind)
    if origin is tuple:
        return "list of strings"
    words: dict[Any, str] = {str: "string", bool: "boolean", int: "integer", float: "number", Path: "path"}
    return words[kind]


def test_every_number_has_bounds() -> None:
    """Zero, negative and absurd values end a command; they never reach what would loop, stall or overflow on them."""
    for cls in COMMANDS:
        for field in msgspec.structs.fields(cls):
            for kind in (
                typing.get_args(field.type) if typing.get_origin(field.type) is types.UnionType else [field.type]
            ):
                assert kind not in (int, float), f"{field.name} of [{cls.section}]"


def default(field: msgspec.structs.FieldInfo) -> str | None:
    """The default as TOML has it; None if it is not a constant, and is told in words."""
    if field.default is msgspec.NODEFAULT or field.default is None:
        return None
    return f"`{msgspec.json.encode(field.default).decode()}`"


def test_there_is_a_chapter_for_every_section() -> None:
    assert set(re.findall(r"^## \[(\w+)\]$", TEXT, re.MULTILINE)) == {cls.section for cls in COMMANDS}
    ours = {cls for cls in Settings.__subclasses__() if not cls.__module__.startswith(("tests.", "test_"))}
    assert ours == COMMANDS.keys()


@pytest.mark.parametrize("cls", COMMANDS, ids=lambda cls: cls.section)
def test_a_section_is_described_as_it_is(cls: type[Settings]) -> None:
    listed = markdown.table(CHAPTERS[cls.section], "Setting", "Type", "Default", "Environment", "Flag", "Meaning")
    rows = {markdown.code(row["Setting"]): row for row in listed}
    assert len(rows) == len(listed)
    fields = {field.name: field for field in msgspec.structs.fields(cls)}
    assert rows.keys() == fields.keys()
    flags = options(*COMMANDS[cls])
    for name, field in fields.items():
        row = rows[name]
        assert row["Type"] == wording(field.type), name
        assert row["Environment"] == f"`{PREFIX}{cls.section.upper()}_{name.upper()}`"
        assert row["Flag"] == (f"`{flags[name].opts[0]}`" if name in flags else "-"), name
        expected = default(field)
        assert row["Default"] == expected if expected else row["Default"].startswith("*"), name
        assert row["Meaning"]


def test_variables_that_count_as_flags_are_listed() -> None:
    listed = {markdown.code(row["Variable"]) for row in markdown.table(TEXT, "Variable", "Meaning")}
    given = {str(option.envvar) for commands in COMMANDS.values() for option in options(*commands).values()}
    assert listed == given - {"None"}


def test_the_flags_of_the_engine_are_listed() -> None:
    rows = {
        markdown.code(row["Flag"]): row for row in markdown.table(CHAPTERS["The embedded engine"], "Flag", "Default")
    }
    flags = {option.opts[0]: option for option in options(engine).values() if option.name != "help"}
    assert rows.keys() == flags.keys()
    for flag, option in flags.items():
        assert rows[flag]["Default"] == (
            "-" if option.default is None or option.default is False else f"`{option.default}`"
        ), flag


def test_the_exit_statuses_are_listed() -> None:
    listed = {int(row["Status"]) for row in markdown.table(CHAPTERS["Exit status"], "Status", "Meaning")}
    kinds: list[type[errors.ProcessError]] = [errors.ProcessError, *errors.ProcessError.__subclasses__()]
    of_errors = {kind.exit_status for kind in kinds}
    assert listed == {0, chat.INTERRUPTED} | of_errors


@pytest.mark.parametrize("cls", COMMANDS, ids=lambda cls: cls.section)
def test_the_example_loads_and_says_something(cls: type[Settings], tmp_path: Path) -> None:
    (example,) = markdown.blocks(CHAPTERS["Example"], "toml")
    file = tmp_path / "weftline.toml"
    file.write_text(example, encoding="utf-8")
    loaded = cls.load(config=file, environment={})
    assert f"[{cls.section}]" in example
    assert loaded != cls() or cls is UpSettings

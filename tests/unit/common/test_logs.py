"""Logs: one line per event on stderr, as text or as JSON, whatever the facts contain."""

import json
import logging
import re
from collections.abc import Iterator

import pytest

from common import logs

log = logs.Log("oven")


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    """`setup` takes over the process's logging: give it back."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    levels = {
        name: logger.level for name, logger in logging.Logger.manager.loggerDict.items() if hasattr(logger, "level")
    }
    yield
    root.handlers[:], root.level = before
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_text_is_the_time_the_level_the_process_the_event_and_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup()
    log("tray inserted", rid=b"\x01\xff", degrees=180, name="top")
    [line] = lines(capsys)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO    oven tray inserted rid=01ff degrees=180 name=top", line
    )


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup(fmt="json")
    log.warn("tray inserted", rid=b"\x01\xff", degrees=180, tags=("a", "b"), kind=logs.Log)
    [line] = lines(capsys)
    entry = json.loads(line)
    assert re.fullmatch(r"[\d-]{10}T[\d:]{8}\.\d{3}Z", entry.pop("ts"))
    assert entry == {
        "level": "warning",
        "process": "oven",
        "event": "tray inserted",
        "rid": "01ff",
        "degrees": 180,
        "tags": ["a", "b"],
        "kind": str(logs.Log),
    }


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_a_peers_words_cannot_begin_a_line(capsys: pytest.CaptureFixture[str], fmt: logs.Format) -> None:
    logs.setup(fmt=fmt)
    log("not understood", reason="x\n2026-11-21T10:00:00.000Z INFO oven all is well\u2028\x1b[2J")
    [line] = lines(capsys)
    assert line.isprintable()


def test_a_fact_of_several_words_is_one_word_of_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup()
    log("failed", reason='no "such" name=tray', empty="", name="große", why="zu heiß")
    assert lines(capsys)[0].endswith(r'reason="no \"such\" name=tray" empty="" name=große why="zu heiß"')


def test_levels_below_the_one_asked_for_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup(level="warning")
    log.debug("one")
    log("two")
    log.warn("three")
    assert [line.split()[-1] for line in lines(capsys)] == ["three"]
    logs.setup(level="debug")
    log.debug("four")
    assert [line.split()[-1] for line in lines(capsys)] == ["four"]


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_an_exception_is_written_with_its_story(capsys: pytest.CaptureFixture[str], fmt: logs.Format) -> None:
    logs.setup(fmt=fmt)
    try:
        raise ValueError("burnt")
    except ValueError:
        logging.getLogger("weftline.oven").exception("bug")
    text = "\n".join(lines(capsys))
    assert "Traceback" in text
    assert "ValueError: burnt" in text


def test_setup_replaces_what_was_there_and_quiets_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup()
    logs.setup()
    log("once")
    logging.getLogger("httpx").info("chatter")
    logging.getLogger("other.library").warning("careful")
    assert [line.split()[-1] for line in lines(capsys)] == ["once", "careful"]


def test_there_is_no_level_loud() -> None:
    with pytest.raises(ValueError, match="LOUD"):
        logs.setup(level="loud")

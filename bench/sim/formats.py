"""Traces of requests: the two public formats, read as rows in order of time.

    azure      CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens; a timestamp is a date and time with
               fractional seconds, or seconds (Azure Public Dataset, LLM inference)
    mooncake   JSON lines {"timestamp": ms, "input_length", "output_length", "hash_ids": [one per 512 tokens]}

Rows may stand in any order, blank lines and further columns or keys are passed over, and time begins at the first.
"""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import msgspec

from common.errors import UsageError

BLOCK_TOKENS: Final = 512
"""Of each hash in a trace of Mooncake's; blocks are counted so everywhere in the simulator."""
TOKENS_MAX: Final = 10_000_000
COLUMNS: Final = ("timestamp", "contexttokens", "generatedtokens")


class Format(StrEnum):
    """What a trace looks like."""

    AZURE = "azure"
    MOONCAKE = "mooncake"


@dataclass(slots=True, frozen=True)
class Row:
    """A request: `at_s` since the first, its tokens, and what its blocks are, as far as the trace tells."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


class _Line(msgspec.Struct):
    """A line of Mooncake's."""

    timestamp: float
    input_length: Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)]
    output_length: Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)]
    hash_ids: tuple[int, ...] = ()


def read(file: Path, form: Format) -> list[Row]:
    """All rows of a trace, the first at 0 s.

    Raises:
        UsageError: it cannot be read, or has no rows, or a line is wrong, which is named.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read the trace {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file} is no text in UTF-8") from None
    rows: list[Row] = []
    parse = _azure if form is Format.AZURE else _mooncake
    try:
        for number, row in parse(text):
            if not math.isfinite(row.at_s):
                raise _Wrong(number, f"its time is {row.at_s}")
            rows.append(row)
    except _Wrong as wrong:
        raise UsageError(f"{file}, line {wrong.line}: {wrong}; is it of the format {form}?") from None
    if not rows:
        raise UsageError(f"{file} has no requests")
    rows.sort(key=lambda row: row.at_s)
    start = rows[0].at_s
    return [Row(row.at_s - start, row.prompt_tokens, row.output_tokens, row.blocks) for row in rows]


class _Wrong(Exception):
    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line


def _azure(text: str) -> Iterator[tuple[int, Row]]:
    reader = csv.reader(text.splitlines())
    columns: list[int] | None = None
    for fields in reader:
        if not any(field.strip() for field in fields):
            continue
        if columns is None:
            names = [field.strip().lower() for field in fields]
            if missing := [name for name in COLUMNS if name not in names]:
                raise _Wrong(reader.line_num, f"no column {', '.join(missing)}")
            columns = [names.index(name) for name in COLUMNS]
            continue
        if len(fields) <= max(columns):
            raise _Wrong(reader.line_num, f"{len(fields)} fields are too few")
        at, prompt, output = (fields[column].strip() for column in columns)
        try:
            yield reader.line_num, Row(_seconds(at), _tokens(prompt), _tokens(output))
        except ValueError as error:
            raise _Wrong(reader.line_num, str(error)) from None


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        moment = datetime.fromisoformat(text)
    # Without a zone it is UTC, so that no summer time of this machine gets in.
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _tokens(text: str) -> int:
    count = int(text)
    if not 0 <= count <= TOKENS_MAX:
        raise ValueError(f"{count} tokens")
    return count


def _mooncake(text: str) -> Iterator[tuple[int, Row]]:
    decoder = msgspec.json.Decoder(_Line)
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise _Wrong(number, str(error)) from None
        yield number, Row(entry.timestamp / 1000, entry.input_length, entry.output_length, entry.hash_ids)

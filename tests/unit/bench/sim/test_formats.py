"""Traces are read whatever they hold, and what is wrong is named with its line."""

from pathlib import Path

import pytest

from bench.sim.formats import Format, Row, read
from common.errors import UsageError

SAMPLES = Path(__file__).parents[4] / "bench" / "sim" / "traces"


def trace(folder: Path, text: str) -> Path:
    file = folder / "trace"
    file.write_text(text, encoding="utf-8")
    return file


def test_azure_rows_in_order_of_time(tmp_path: Path) -> None:
    text = (
        "\ufeffTIMESTAMP,Extra,ContextTokens,GeneratedTokens\r\n"
        "\r\n"
        "2023-11-16 18:15:50.9951690,x,396,109\r\n"
        "2023-11-16 18:15:46.4951690,x,0,0\n\n"
    )
    assert read(trace(tmp_path, text), Format.AZURE) == [Row(0.0, 0, 0), Row(4.5, 396, 109)]


def test_azure_takes_zones_and_seconds(tmp_path: Path) -> None:
    text = "timestamp, ContextTokens, GeneratedTokens\n2024-05-10 00:00:01.5+00:00, 3, 4\n1715299200.25, 1, 2\n"
    assert read(trace(tmp_path, text), Format.AZURE) == [Row(0.0, 1, 2), Row(1.25, 3, 4)]


def test_mooncake_rows(tmp_path: Path) -> None:
    text = (
        '{"timestamp": 3000, "input_length": 600, "output_length": 7, "hash_ids": [4, 5], "more": 1}\n\n'
        '{"timestamp": 500, "input_length": 0, "output_length": 0}\n'
    )
    assert read(trace(tmp_path, text), Format.MOONCAKE) == [Row(0.0, 0, 0), Row(2.5, 600, 7, (4, 5))]


@pytest.mark.parametrize(
    ("form", "text", "story"),
    [
        (Format.AZURE, "", "no requests"),
        (Format.AZURE, "TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        (Format.AZURE, "\nTIMESTAMP,ContextTokens\n", "line 2: no column generatedtokens"),
        (Format.AZURE, "TIMESTAMP,ContextTokens,GeneratedTokens\n1,2,3\n\n1,2\n", "line 4: 2 fields"),
        (Format.AZURE, "TIMESTAMP,ContextTokens,GeneratedTokens\n1,2,x\n", "line 2: .*'x'"),
        (Format.AZURE, "TIMESTAMP,ContextTokens,GeneratedTokens\n1,-2,3\n", "line 2: -2 tokens"),
        (Format.AZURE, "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,2,3\n", "line 2: .*'noon'"),
        (Format.AZURE, "TIMESTAMP,ContextTokens,GeneratedTokens\nnan,2,3\n", "line 2: its time is nan"),
        (Format.MOONCAKE, "\n{]\n", "line 2: .*is it of the format mooncake"),
        (Format.MOONCAKE, '{"timestamp": 1, "input_length": 2}\n', "line 1: .*output_length"),
        (Format.MOONCAKE, '{"timestamp": 1, "input_length": -2, "output_length": 1}\n', "line 1: .*input_length"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, form: Format, text: str, story: str) -> None:
    with pytest.raises(UsageError, match=story):
        read(trace(tmp_path, text), form)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read(tmp_path / "none", Format.AZURE)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        read(tmp_path / "binary", Format.AZURE)


def test_the_samples() -> None:
    azure = read(SAMPLES / "azure-conversation.csv", Format.AZURE)
    mooncake = read(SAMPLES / "mooncake-conversation.jsonl", Format.MOONCAKE)
    assert len(azure) == len(mooncake) == 2000
    assert azure[1] == Row(pytest.approx(4.314579, abs=1e-6), 396, 109)  # type: ignore[arg-type]
    assert mooncake[0].blocks == tuple(range(14))

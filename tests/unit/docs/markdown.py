"""What the tests of the documentation read out of Markdown: sections, tables and fenced blocks, plain ones."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[3] / "docs"


def sections(text: str, level: int) -> dict[str, str]:
    """The bodies under the headings of `level`, by heading; a body ends at the next heading of that level or above."""
    found: dict[str, list[str]] = {}
    body: list[str] = []
    fenced = False
    for line in text.splitlines(keepends=True):
        fenced ^= line.startswith("```")
        marks, _, heading = line.partition(" ")
        if not fenced and marks and len(marks) <= level and not marks.strip("#"):
            body = []
            if len(marks) == level:
                found[heading.strip("`[] \n")] = body
        else:
            body.append(line)
    return {heading: "".join(lines) for heading, lines in found.items()}


def tables(text: str) -> list[list[dict[str, str]]]:
    """All tables, each as its rows by column name; `\\|` in a cell stands for a bar."""
    found = []
    for lines in re.findall(r"(?:^ *\|.*\n)+", text, flags=re.MULTILINE):
        cells = [
            [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
            for line in lines.splitlines()
        ]
        found.append([dict(zip(cells[0], row, strict=True)) for row in cells[2:]])
    return found


def table(text: str, *columns: str) -> list[dict[str, str]]:
    """The rows of the one table that has these columns; none if there is no such table."""
    matching = [rows for rows in tables(text) if rows and set(columns) <= rows[0].keys()]
    assert len(matching) <= 1, f"{len(matching)} tables have the columns {columns}"
    return matching[0] if matching else []


def blocks(text: str, language: str) -> list[str]:
    """The contents of the fenced blocks of that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def code(cell: str) -> str:
    """What stands between backticks in a cell, whose whole it is."""
    match = re.fullmatch(r"`([^`]+)`", cell)
    assert match, f"{cell!r} should stand in backticks"
    return match[1]

"""Read a table of utterances: TSV or CSV with a header, or JSON lines."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from speechllm.data.corpora.utterance import Utterance, as_text, find_columns, from_fields
from speechllm.errors import InputError, first_line

Row = tuple[int, dict]  # line number, cells by column


def read_table(table: Path) -> Iterator[Utterance]:
    """Read the utterances of a table; paths are relative to its folder.

    Raises:
      InputError: the file is not a table in UTF-8, or a required column is missing.
    """
    header, rows = _json_lines(table) if _is_json(table) else _cells(table)
    columns = find_columns(header, table)
    for line, row in rows:
        fields = {field: as_text(row.get(name)) for field, name in columns.items()}
        utterance = from_fields(fields, table.parent, f"line {line}")
        if None in row:
            utterance.problem = "malformed", "more cells than the header"
        yield utterance


def _is_json(table: Path) -> bool:
    return table.suffix in (".jsonl", ".json", ".ndjson")


def _cells(table: Path) -> tuple[list[str], list[Row]]:
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            is_tsv = "\t" in file.readline()
            file.seek(0)
            dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {}
            reader = csv.DictReader(file, restval="", **dialect)
            return list(reader.fieldnames or []), [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table} is not a TSV or CSV table in UTF-8: {error}") from error


def _json_lines(table: Path) -> tuple[list[str], list[Row]]:
    rows = []
    try:
        for number, line in enumerate(table.read_bytes().splitlines(), start=1):
            if line.strip():
                rows.append((number, json.loads(line)))
                if not isinstance(rows[-1][1], dict):
                    raise ValueError("not an object")
    except (ValueError, RecursionError) as error:  # invalid JSON or UTF-8
        raise InputError(f"{table} line {number} is not JSON: {first_line(error)}") from error
    return list(dict.fromkeys(name for _, row in rows for name in row)), rows

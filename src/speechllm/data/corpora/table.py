"""Read tables of utterances: TSV or CSV with a header, or JSON lines; or a folder of such.

A table named `dev.tsv` (train, test, …) without a split column is that split. Paths are relative
to the table, or to `clips/` next to it as in Common Voice, or to --audio-dir.
"""

import csv
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from speechllm.data.corpora.utterance import (
    SPLITS,
    Utterance,
    as_text,
    find_columns,
    from_fields,
)
from speechllm.errors import InputError, first_line

Row = tuple[int, dict]  # line number, cells by column
JSON = (".jsonl", ".json", ".ndjson")
TABLES = (".tsv", ".csv", *JSON)
FEWER = ""  # key of rows with too few cells
ENDINGS = ("", ".mp3", ".wav", ".flac", ".ogg", ".opus", ".m4a")  # some corpora leave them out

logger = logging.getLogger(__name__)


def table_files(path: Path) -> list[Path]:
    """List the tables of a folder that are named after splits; a file is itself.

    Raises:
      InputError: the folder has no such table.
    """
    if path.is_file():
        return [path]
    tables = sorted(one for one in path.iterdir() if one.suffix.lower() in TABLES)
    found = [one for one in tables if _split(one)]
    if not found:
        raise InputError(f"{path} has no table with the name of a split, such as train.tsv")
    if others := [one.name for one in tables if one not in found]:
        logger.info("tables without the name of a split are ignored: %s", ", ".join(others))
    return found


def read_table(
    path: Path, audio_dir: Path | None = None, chosen: Mapping[str, str] | None = None
) -> Iterator[Utterance]:
    """Read the utterances of a table, or of the tables of a folder.

    Args:
      audio_dir: folder of the audio, if it is not that of the table.
      chosen: names of columns, by field.

    Raises:
      InputError: a file is not a table, or a required column is missing.
    """
    tables = table_files(path)
    for table in tables:
        header, rows = _json_lines(table) if table.suffix.lower() in JSON else _cells(table)
        columns = find_columns(header, table, chosen or {})
        prefix = f"{table.name} " if len(tables) > 1 else ""
        for line, row in rows:
            yield _utterance(row, columns, table, audio_dir, f"{prefix}line {line}")


def _utterance(
    row: dict, columns: Mapping[str, str], table: Path, audio_dir: Path | None, place: str
) -> Utterance:
    fields = {field: as_text(row.get(name)) for field, name in columns.items()}
    fields.setdefault("split", _split(table))
    utterance = from_fields(fields, audio_dir or table.parent, place)
    utterance.path = _find_audio(utterance.path, audio_dir or table.parent)
    if None in row or row.get(FEWER):
        fewer_or_more = "more" if None in row else "fewer"
        utterance.problem = "malformed", f"{fewer_or_more} cells than the header"
    return utterance


def _split(table: Path) -> str:
    """`Dev.tsv` and VoxPopuli's `asr_dev.tsv` -> `dev`; otherwise empty."""
    name = table.stem.lower().removeprefix("asr_")
    return name if name in SPLITS else ""


def _find_audio(path: Path, folder: Path) -> Path:
    places = [path]
    if path.is_relative_to(folder):
        places.append(folder / "clips" / path.relative_to(folder))
    for place in places:
        for ending in ENDINGS:
            if (found := place.with_name(place.name + ending)).is_file():
                return found
    return path


def _cells(table: Path) -> tuple[list[str], list[Row]]:
    try:  # undecodable bytes become U+FFFD, which is an error of the row
        with open(table, encoding="utf-8-sig", errors="replace", newline="") as file:
            header = file.readline()
            delimiter = max("\t,;|", key=header.count) if header.strip() else "\t"
            file.seek(0)
            quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
            reader = csv.reader(file, delimiter=delimiter, quoting=quoting)
            names = next(reader, [])
            rows = [(reader.line_num, _row(names, cells)) for cells in reader if cells]
            return names, rows
    except csv.Error as error:
        raise InputError(f"{table} is not a TSV or CSV table in UTF-8: {error}") from error


def _row(names: list[str], cells: list[str]) -> dict:
    row: dict = dict(zip(names, cells, strict=False)) | {FEWER: len(cells) < len(names)}
    return row if len(cells) <= len(names) else row | {None: cells[len(names) :]}


def _json_lines(table: Path) -> tuple[list[str], list[Row]]:
    rows = []
    try:
        for number, line in enumerate(table.read_text("utf-8-sig").split("\n"), start=1):
            if line.strip():
                rows.append((number, json.loads(line)))
                if not isinstance(rows[-1][1], dict):
                    raise ValueError("not an object")
    except UnicodeDecodeError as error:
        raise InputError(f"{table} is not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{table} line {number} is not JSON: {first_line(error)}") from error
    return list(dict.fromkeys(name for _, row in rows for name in row)), rows

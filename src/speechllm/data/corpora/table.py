"""Reader for tables of utterances (TSV or CSV with a header, or JSON lines), and folders of tables.

Without a split column, a table's name gives its split (`dev.tsv`) or, for `dev/metadata.csv`, its
folder's name, as in Hugging Face's audio folders. Paths are relative to the table or, as in Common
Voice, to `clips/` next to it, or to --audio-dir.
"""

import codecs
import csv
import json
import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from os.path import isfile  # false for names that are too long
from pathlib import Path
from types import MappingProxyType

from speechllm.data.corpora.utterance import SPLITS, Utterance, as_text, find_columns, from_fields
from speechllm.errors import InputError, first_line
from speechllm.io import files_below

Row = tuple[int, dict]  # line number, cells by column
JSON = (".jsonl", ".json", ".ndjson")
TABLES = (".tsv", ".csv", *JSON)
METADATA = ("metadata.csv", "metadata.jsonl")  # in Hugging Face's audio folders
FEWER = ""  # key that marks rows with too few cells
ENDINGS = ("", ".mp3", ".wav", ".flac", ".ogg", ".opus", ".m4a")  # some corpora omit them

logger = logging.getLogger(__name__)


def table_files(path: Path) -> list[Path]:
    """List the table, or a folder's tables named after splits or metadata, or raise InputError."""
    if path.is_file():
        return [path]
    found = [one for one in _tables(path) if _split(one)]
    found = found or [one for one in files_below(path) if one.name.lower() in METADATA]
    if not found:
        others = ", ".join(one.name for one in _tables(path))
        hint = f": name one of {others} by --table, and its --split" if others else ""
        raise InputError(f"{path} has no table named after a split, such as train.tsv{hint}")
    return found


def _tables(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if one.suffix.lower() in TABLES)


def read_table(
    path: Path, audio_dir: Path | None = None, chosen: Mapping[str, str] = MappingProxyType({})
) -> list[Utterance]:
    """Read a table or a folder's tables, with audio in `audio_dir` or next to them."""
    tables = table_files(path)
    if path.is_dir() and (others := [one.name for one in _tables(path) if one not in tables]):
        logger.info("tables not named after a split are ignored: %s", ", ".join(others))
    folder = audio_dir or (path if path.is_dir() else path.parent)
    utterances, has_ids = [], False
    for table in tables:
        header, rows = _json_lines(table) if table.suffix.lower() in JSON else _cells(table)
        columns = find_columns(header, table, chosen)
        prefix = f"{table.relative_to(path)} " if len(tables) > 1 else ""
        has_ids = has_ids or "id" in columns
        utterances += [
            _utterance(row, columns, table, audio_dir, f"{prefix}line {line}") for line, row in rows
        ]
    return utterances if has_ids else _with_ids_of_paths(utterances, folder)


def _with_ids_of_paths(utterances: list[Utterance], folder: Path) -> list[Utterance]:
    """Put the paths into the ids of files that share a name: `anna/1.wav` and `ben/1.wav`."""
    paths = defaultdict(set)
    for one in utterances:
        paths[one.path.stem].add(one.path)
    for one in utterances:
        stem = one.path.stem
        if len(paths[stem]) > 1 and one.id.startswith(stem):
            path = one.path.relative_to(folder) if one.path.is_relative_to(folder) else one.path
            name = "-".join(path.with_suffix("").parts).replace("/-", "")
            one.id, one.recording = name + one.id[len(stem) :], one.recording and name
    return utterances


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
    """Return `dev` for `Dev.tsv`, VoxPopuli's `asr_dev.tsv` and `dev/metadata.csv`, or ""."""
    named = table.absolute().parent if table.name.lower() in METADATA else table
    name = named.stem.lower().removeprefix("asr_")
    return name if name in SPLITS else ""


def _find_audio(path: Path, folder: Path) -> Path:
    places = [path]
    if path.is_relative_to(folder):
        places.append(folder / "clips" / path.relative_to(folder))
    for place in places:
        for ending in ENDINGS:
            if isfile(found := place.with_name(place.name + ending)):
                return found
    return places[-1] if places[-1].parent.is_dir() else path


def _cells(table: Path) -> tuple[list[str], list[Row]]:
    try:  # undecodable bytes become U+FFFD, reported later as an error of the row
        with open(table, encoding=_encoding(table), errors="replace", newline="") as file:
            header = file.readline()
            if "\0" in header:
                raise InputError(f"{table} is not a text file: save it as CSV or TSV in UTF-8")
            delimiter = max("\t,;|", key=header.count) if header.strip() else "\t"
            file.seek(0)
            quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
            reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
            names = next(reader, [])
            rows = [(reader.line_num, _row(names, cells)) for cells in reader if cells]
            return names, rows
    except csv.Error as error:
        place = f"{table} line {reader.line_num}"
        raise InputError(f"{place} is not a row of a TSV or CSV table: {error}") from error


def _encoding(table: Path) -> str:
    """Return UTF-16 (Excel's "Unicode text") if the file has its byte order mark, else UTF-8."""
    with open(table, "rb") as file:
        is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return "utf-16" if is_utf16 else "utf-8-sig"


def _row(names: list[str], cells: list[str]) -> dict:
    cells = [_unquoted(cell) for cell in cells]
    row: dict = dict(zip(names, cells, strict=False)) | {FEWER: len(cells) < len(names)}
    return row if len(cells) <= len(names) else row | {None: cells[len(names) :]}


def _unquoted(cell: str) -> str:
    """Remove the quotes around a cell if all quotes within it are doubled."""
    if re.fullmatch(r'"([^"]|"")+"', cell) and cell != '""':
        return cell[1:-1].replace('""', '"')
    return cell


def _json_lines(table: Path) -> tuple[list[str], list[Row]]:
    """Read JSON lines, or one JSON list of objects, numbered from 1 like lines."""
    try:
        text = table.read_text(_encoding(table))
    except UnicodeDecodeError as error:
        raise InputError(f"{table} is not UTF-8: {error}") from None
    is_list, rows = text.lstrip().startswith("["), []
    try:
        lines = json.loads(text) if is_list else text.split("\n")
        for number, line in enumerate(lines, start=1):
            if is_list or line.strip():
                rows.append((number, line if is_list else json.loads(line)))
                if not isinstance(rows[-1][1], dict):
                    raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        place = table if is_list else f"{table} line {number}"
        raise InputError(f"{place} is not JSON: {first_line(error)}") from error
    return list(dict.fromkeys(name for _, row in rows for name in row)), rows

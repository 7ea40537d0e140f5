"""Reader for Hugging Face datasets on disk: output of `save_to_disk`, or the hub's parquet files.

Requires pyarrow but not datasets. Embedded audio is written to files.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from speechllm.data.corpora.utterance import Utterance, as_text, find_columns, from_fields
from speechllm.errors import InputError, first_line

ROWS = 16  # rows read at a time: audio is large


def dataset_files(folder: Path) -> list[tuple[str, Path]]:
    """List (split, file) for the data files, in order; split is "" if the dataset has no splits.

    Raises:
      InputError: no files were found, or the dataset's JSON cannot be read.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits", [])
        return [(split, file) for split in splits for file in _arrow_files(folder / split)]
    if (folder / "state.json").is_file():
        return [("", file) for file in _arrow_files(folder)]
    if parquet := sorted(folder.rglob("*.parquet")):
        return [(_split(path, folder), path) for path in parquet]
    raise InputError(f"{folder} has no state.json, dataset_dict.json or *.parquet")


def _split(parquet: Path, folder: Path) -> str:
    """Return the split of `train-00000-of-00002.parquet` or `train/0000.parquet`."""
    name = parquet.stem.split("-")[0]
    if not name.isdigit():
        return name
    return "" if parquet.parent == folder else parquet.parent.name


def huggingface_files(folder: Path) -> list[Path]:
    return [path for _, path in dataset_files(folder)]


def read_huggingface(
    folder: Path, copies: Path, chosen: Mapping[str, str] | None = None
) -> Iterator[Utterance]:
    """Read the utterances in a dataset.

    Args:
      copies: folder for embedded audio; created if needed.
      chosen: column names given by flags, by field.

    Raises:
      InputError: pyarrow is missing, a file cannot be read, or a required column is missing.
    """
    rows = ((split, path, row) for split, path in dataset_files(folder) for row in _rows(path))
    for number, (split, path, row) in enumerate(rows):
        columns = find_columns(list(row), path, chosen)
        # If there is a column `audio`, `path` is only the original location.
        is_chosen = "path" in (chosen or {})
        audio = row["audio" if "audio" in row and not is_chosen else columns["path"]]
        content = audio if isinstance(audio, dict) else {"path": audio}
        name = as_text(content.get("path"))
        fields = {k: as_text(row[column]) for k, column in columns.items() if k != "path"}
        fields.setdefault("id", Path(name).stem or f"{split or 'row'}-{number}")
        fields.setdefault("split", split)
        if content.get("bytes"):
            copies.mkdir(parents=True, exist_ok=True)
            copy = (copies / f"{number}{Path(name).suffix}").absolute()
            copy.write_bytes(content["bytes"])
            name = str(copy)
        yield from_fields(fields | {"path": name}, folder, f"{path.name} row {number}")


def _arrow_files(folder: Path) -> list[Path]:
    """List the data files named in state.json."""
    names = [entry["filename"] for entry in _json(folder / "state.json").get("_data_files", [])]
    return [folder / Path(name).name for name in names]


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from None


def _rows(path: Path) -> Iterator[dict]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path} needs pyarrow: pip install pyarrow") from None
    try:
        if path.suffix == ".parquet":
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(ROWS)
        else:
            batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS):
                yield from batch.slice(start, ROWS).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from None

"""A Hugging Face dataset on disk: what `save_to_disk` or a download of the hub leaves.

Arrow and parquet files are read by pyarrow alone. Audio that is inside them is written to files.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from speechllm.corpora.utterance import Utterance, as_text, find_columns, from_fields
from speechllm.errors import InputError, first_line

ROWS = 16  # at a time: audio is large


def dataset_files(folder: Path) -> list[tuple[str, Path]]:
    """(split, file) of all that has rows, in order; the split is empty where there is one only.

    Raises:
      ValueError: there is none.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits", [])
        return [(split, file) for split in splits for file in _arrow_files(folder / split)]
    if (folder / "state.json").is_file():
        return [("", file) for file in _arrow_files(folder)]
    parquet = sorted(folder.rglob("*.parquet"))
    if not parquet:
        raise InputError(f"{folder} has no state.json, dataset_dict.json or *.parquet")
    return [(_split(path, folder), path) for path in parquet]


def _split(parquet: Path, folder: Path) -> str:
    """`train-00000-of-00002.parquet`, or `train/0000.parquet` as the hub converts datasets."""
    name = parquet.stem.split("-")[0]
    if not name.isdigit():
        return name
    return "" if parquet.parent == folder else parquet.parent.name


def huggingface_files(folder: Path) -> list[Path]:
    return [path for _, path in dataset_files(folder)]


def read_huggingface(folder: Path, copies: Path) -> Iterator[Utterance]:
    """The utterances of a dataset.

    Args:
      copies: a folder for the audio that is inside the dataset; made when there is some.

    Raises:
      ValueError: pyarrow is missing, a file cannot be read, or a needed column is missing.
    """
    number = 0
    for split, path in dataset_files(folder):
        for row in _rows(path):
            columns = find_columns(list(row), path)
            # `path` beside `audio` is where the sound once was.
            audio = row["audio" if "audio" in row else columns["path"]]
            fields = {k: as_text(row[name]) for k, name in columns.items() if k != "path"}
            named = _name_of(audio)
            fields.setdefault("id", Path(named).stem or f"{split or 'row'}-{number}")
            fields.setdefault("split", split)
            inside = audio.get("bytes") if isinstance(audio, dict) else None
            if inside:
                copies.mkdir(parents=True, exist_ok=True)
                named = str((copies / f"{number}{Path(named).suffix}").absolute())
                Path(named).write_bytes(inside)
            yield from_fields(fields | {"path": named}, folder, f"{path.name} row {number}")
            number += 1


def _name_of(audio: object) -> str:
    return as_text(audio.get("path") if isinstance(audio, dict) else audio)


def _arrow_files(folder: Path) -> list[Path]:
    """As state.json has them."""
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

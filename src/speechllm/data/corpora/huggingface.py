"""Reader for Hugging Face datasets on disk: output of `save_to_disk`, or the hub's parquet files.

Requires pyarrow but not datasets. Embedded audio is written to files.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from speechllm.data.corpora.utterance import Utterance, as_text, find_columns, from_fields
from speechllm.errors import InputError, first_line
from speechllm.io import files_below

ROWS = 16  # rows read at a time: audio is large


def dataset_files(folder: Path) -> list[Path]:
    """List the data files, except caches; raise InputError if their names show a missing one."""
    found = [path for path in files_below(folder) if path.suffix in (".arrow", ".parquet")]
    files = [path for path in found if not path.name.startswith("cache-")]
    if not files:
        raise InputError(f"{folder} has no *.arrow or *.parquet")
    numbered = [(path.parent, re.match(r"(.*)-\d+-of-(\d+)", path.stem)) for path in files]
    counts = Counter((parent, *name.groups()) for parent, name in numbered if name)
    for (parent, name, total), count in counts.items():
        if count != int(total):
            raise InputError(f"{parent} has {count} of the {int(total)} files {name}-…-of-{total}")
    return files


def _split(file: Path, folder: Path) -> str:
    """Return the split of `train-0-of-2.parquet`, `train/0.parquet` and `train/data-0-of-2.arrow`,
    or "" if the dataset has no splits.
    """
    name = file.stem.split("-")[0]
    if file.suffix == ".parquet" and not (name == "data" or name.isdigit()):
        return name
    return "" if file.parent == folder else file.parent.name


def read_huggingface(folder: Path, copies: Path, chosen: Mapping[str, str]) -> Iterator[Utterance]:
    """Read a dataset, with embedded audio written to `copies`; raise InputError if unreadable."""
    rows = ((path, row) for path in dataset_files(folder) for row in _rows(path))
    for number, (path, row) in enumerate(rows):
        split = _split(path, folder)
        columns = find_columns(list(row), path, chosen)
        # If there is a column `audio`, `path` is only the original location.
        audio = row["audio" if "audio" in row and "path" not in chosen else columns["path"]]
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

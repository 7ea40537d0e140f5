"""A folder of audio with a text file beside each: `anna/1.wav` and `anna/1.txt`.

The first folder of a path is the split if it is called as one (train, dev, test, …), the others are
the speaker. The id is the path without its ending, `-` for `/`.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from speechllm.corpora.utterance import Utterance
from speechllm.errors import InputError
from speechllm.sound_files import SUFFIXES

SPLITS = ("train", "training", "dev", "valid", "validation", "eval", "test")
TEXTS = (".txt", ".lab")


def audio_and_texts(folder: Path) -> list[Path]:
    """In the order of their names; hidden ones are left."""
    files = (path for path in _files(folder) if path.suffix.lower() in (*SUFFIXES, *TEXTS))
    return sorted(path for path in files if not path.name.startswith("."))


def _files(folder: Path) -> Iterator[Path]:
    """Links to folders are followed, but into no folder again."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place, name) for name in names)


def read_folder(folder: Path) -> Iterator[Utterance]:
    """The utterances of a folder, however deep; audio without a text file has a problem.

    Raises:
      ValueError: there is no audio in it.
    """
    files = audio_and_texts(folder)
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() in TEXTS}
    sounds = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not sounds:
        raise InputError(f"{folder} has no audio ({', '.join(SUFFIXES)})")
    for path in sounds:
        yield _utterance(path, folder, texts.pop(path.with_suffix(""), None))
    for path in texts.values():
        place = path.relative_to(folder)
        yield Utterance(_id(place), "", path, problem=("no-audio", f"no audio beside {place}"))


def _utterance(path: Path, folder: Path, text_file: Path | None) -> Utterance:
    *folders, _ = path.relative_to(folder).parts
    split = folders.pop(0) if folders and folders[0] in SPLITS else ""
    text, problem = "", None
    try:
        text = text_file.read_text("utf-8-sig") if text_file else ""
    except UnicodeDecodeError:
        problem = "not-unicode", f"{text_file} is not in UTF-8"
    if not text_file:
        problem = "no-text", f"no text file beside {path}"
    return Utterance(
        id=_id(path.relative_to(folder)),
        text=text,
        path=path,
        speaker="/".join(folders) or None,
        split=split,
        problem=problem,
    )


def _id(place: Path) -> str:
    return "-".join(place.with_suffix("").parts)

"""Reader for folders with a text file per audio file: `anna/1.wav` and `anna/1.txt`.

If the first folder in a path is the name of a split (train, dev, test, …), it is the split; the
other folders are the speaker. The id is the path without its suffix, with `/` replaced by `-`.
"""

from collections.abc import Iterator
from pathlib import Path

from speechllm.audio.reader import SUFFIXES
from speechllm.data.corpora.utterance import SPLITS, Utterance
from speechllm.errors import InputError
from speechllm.io import files_below

TEXTS = (".txt", ".lab")


def audio_and_texts(folder: Path) -> list[Path]:
    """List audio and text files, except hidden files, sorted by path."""
    return sorted(
        path for path in files_below(folder) if path.suffix.lower() in (*SUFFIXES, *TEXTS)
    )


def read_folder(folder: Path) -> Iterator[Utterance]:
    """Read a folder's utterances; raise InputError if it has no audio file."""
    files = audio_and_texts(folder)
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() in TEXTS}
    sounds = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not sounds:
        raise InputError(f"{folder} has no audio ({', '.join(SUFFIXES)})")
    for path in sounds:
        yield _utterance(path, folder, texts.get(path.with_suffix("")))
    alone = texts.keys() - {path.with_suffix("") for path in sounds}
    for path in map(texts.get, sorted(alone)):
        place = path.relative_to(folder)
        yield Utterance(_id(place), "", path, problem=("no-audio", f"no audio file for {place}"))


def _utterance(path: Path, folder: Path, text_file: Path | None) -> Utterance:
    place = path.relative_to(folder)
    *folders, _ = place.parts
    split = folders.pop(0) if folders and folders[0].lower() in SPLITS else ""
    text, problem = "", None
    try:
        text = text_file.read_text("utf-8-sig") if text_file else ""
    except UnicodeDecodeError:
        problem = "not-unicode", f"{text_file} is not UTF-8"
    if not text_file:
        problem = "no-text", f"no text file for {path}"
    return Utterance(
        id=_id(place),
        text=text,
        path=path,
        speaker="/".join(folders) or None,
        split=split,
        place=str(place),
        problem=problem,
    )


def _id(place: Path) -> str:
    return "-".join(place.with_suffix("").parts)

"""Recognize and read corpora as they are published.

lhotse's recipes leave out what they cannot use and stop at the first unreadable file; here each
line of a transcript and each audio file is an utterance, so that all are counted. Other corpora
are read by the recipe of lhotse that has their name.
"""

import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from speechllm.audio.reader import SUFFIXES
from speechllm.data.corpora.config import LAYOUTS
from speechllm.data.corpora.lhotse_manifests import read_manifests
from speechllm.data.corpora.table import TABLES, read_table
from speechllm.data.corpora.utterance import SPLITS, Utterance
from speechllm.errors import InputError, first_line


class Transcripts(NamedTuple):
    """A layout with transcripts of many utterances; audio is found by the id.

    patterns: globs of the transcripts.
    root: the audio is within this parent of a transcript, 0 for its folder.
    separator: between id and text; None for white space.
    speaker: from id and audio file.
    split: from transcript and audio file.
    """

    patterns: tuple[str, ...]
    root: int
    separator: str | None
    speaker: Callable[[str, Path], str | None]
    split: Callable[[Path, Path], str]
    language: str | None = None


TRANSCRIPTS = {
    "librispeech": Transcripts(
        ("**/*.trans.txt",), 0, None, lambda utt, _: utt.split("-")[0],
        lambda transcript, _: _part(transcript.absolute().parents[2].name),
    ),
    "aishell": Transcripts(
        ("**/aishell_transcript*.txt",), 1, None, lambda _, audio: audio.parent.name,
        lambda _, audio: _part(audio.parents[1].name), "zh",
    ),
    "mls": Transcripts(
        ("transcripts.txt", "*/transcripts.txt", "*/*/transcripts.txt"), 0, "\t",
        lambda utt, _: utt.split("_")[0], lambda transcript, _: _part(transcript.parent.name),
    ),
    "ljspeech": Transcripts(
        ("metadata.csv", "*/metadata.csv"), 0, "|", lambda *_: None, lambda *_: ""
    ),
    "vctk": Transcripts(
        ("txt/*/*.txt", "*/txt/*/*.txt"), 2, "", lambda _, audio: audio.parent.name, lambda *_: ""
    ),
    "tedlium": Transcripts(
        ("**/stm/*.stm",), 1, None, lambda *_: None,
        lambda transcript, _: _part(transcript.absolute().parents[1].name),
    ),
}  # fmt: skip
RECOGNIZED = {  # other layouts by their files
    "kaldi": ("wav.scp", "*/wav.scp"),
    "huggingface": ("dataset_dict.json", "state.json", "**/*.parquet"),
    "lhotse": ("*cuts*.jsonl*", "*recordings*.jsonl*"),
    "voxpopuli": ("**/asr_*.tsv",),
    "common-voice": ("clips", "*/clips"),
}
TABLE_NAMES = tuple(f"{split}{ending}" for split in SPLITS for ending in TABLES)
CONFIRMED = {  # checks of files that other corpora may have too
    "common-voice": lambda clips: any((clips.parent / f"{one}.tsv").is_file() for one in SPLITS),
    "ljspeech": lambda metadata: _has_bars(metadata),
}
IGNORED_STM = ("ignore_time_segment_in_scoring", "inter_segment_gap")


def recognize(folder: Path) -> str:
    """Return the name of a folder's layout; `folder` if no other fits."""
    others = {name: one.patterns for name, one in TRANSCRIPTS.items()}
    for name, patterns in (RECOGNIZED | others | {"table": TABLE_NAMES}).items():
        found = [path for pattern in patterns for path in islice(folder.glob(pattern), 1)]
        if found and (name not in CONFIRMED or CONFIRMED[name](found[0])):
            return name
    return "folder"


def _has_bars(metadata: Path) -> bool:
    with open(metadata, encoding="utf-8-sig", errors="replace") as lines:
        return "|" in lines.readline()


def layout_files(layout: str, folder: Path) -> list[Path]:
    """List the transcripts of a layout.

    Raises:
      InputError: there are none.
    """
    if layout not in TRANSCRIPTS and layout not in ("voxpopuli", "common-voice"):
        return [folder]
    if layout == "common-voice":
        patterns = tuple(f"{where}{one}.tsv" for where in ("", "*/") for one in SPLITS)
    elif layout == "voxpopuli":
        patterns = RECOGNIZED[layout]
    else:
        patterns = TRANSCRIPTS[layout].patterns
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if not found:
        raise InputError(f"{folder} has no {' or '.join(patterns)}: not the layout of {layout}")
    return found


def read_layout(layout: str, folder: Path) -> Iterator[Utterance]:
    """Read the utterances of a corpus of a known layout.

    Raises:
      InputError: the folder does not have this layout.
    """
    files = layout_files(layout, folder)
    if layout == "common-voice":
        for file in files:
            yield from (_placed(one, file) for one in read_table(file))
    elif layout == "voxpopuli":
        yield from _read_voxpopuli(files)
    elif layout in TRANSCRIPTS:
        yield from _read_transcripts(layout, files)
    else:
        yield from _read_recipe(layout, folder)


def _placed(utterance: Utterance, file: Path) -> Utterance:
    return replace(utterance, place=f"{file.name} {utterance.place}")


def _part(name: str) -> str:
    """Return the name of a split such as `dev` or `train-clean-100`; otherwise empty."""
    return name if name.lower().split("-")[0] in SPLITS else ""


# ---- transcripts


def _read_transcripts(layout: str, files: list[Path]) -> Iterator[Utterance]:
    spec = TRANSCRIPTS[layout]
    of_root: dict[Path, dict[str, Path]] = {}
    used: set[str] = set()
    for file in files:
        root = file.absolute().parents[spec.root]
        root = next((one for one in of_root if one == root), root)
        if root not in of_root:
            of_root[root] = _audio_by_name(root)
        for one in _lines(layout, file):
            audio = _audio_of(one.recording or one.id, of_root[root])
            used.add(one.recording or one.id)
            if audio is None:
                one.problem = one.problem or ("no-audio", f"no audio file named {one.id} in {root}")
            else:
                one.path = audio
                one.speaker = one.speaker or spec.speaker(one.id, audio)
                one.split = spec.split(file, audio)
            one.language = spec.language
            yield one
    for audio_files in of_root.values():
        for name, path in audio_files.items():
            if name not in used and name.removesuffix("_mic1").removesuffix("_mic2") not in used:
                problem = "no-text", f"no transcript of {path}"
                yield Utterance(name, "", path, problem=problem)


def _lines(layout: str, file: Path) -> Iterator[Utterance]:
    separator = TRANSCRIPTS[layout].separator
    content = file.read_text("utf-8-sig", errors="replace")
    if layout == "vctk":
        yield Utterance(file.stem, content, file, place=file.name)
        return
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{file.name} line {number}"
        if layout == "tedlium":
            yield _stm_line(line, file, place)
            continue
        utt, *texts = line.strip().split(separator, 1 if separator != "|" else -1)
        text = next((one for one in reversed(texts) if one.strip()), "")
        if layout == "aishell":
            text = text.replace(" ", "")
        yield Utterance(utt.strip(), text, file, place=place)


def _stm_line(line: str, file: Path, place: str) -> Utterance:
    """Parse `recording channel speaker start end <label> text`."""
    try:
        recording, _, speaker, start, end, _, text = [*line.split(maxsplit=6), ""][:7]
        times = float(start), float(end)
    except ValueError:
        problem = "malformed", "not `recording channel speaker start end label text`"
        return Utterance("", "", file, place=place, problem=problem)
    utt = f"{recording}-{round(1000 * times[0]):07}-{round(1000 * times[1]):07}"
    problem = ("no-words", f"text {text!r}") if text.strip() in IGNORED_STM else None
    return Utterance(
        utt, text, file, speaker, start=times[0], end=times[1], recording=recording, place=place,
        problem=problem,
    )  # fmt: skip


def _audio_by_name(root: Path) -> dict[str, Path]:
    found = {}
    for place, _, names in os.walk(root, followlinks=True):
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in SUFFIXES:
                found[path.stem] = path
    return dict(sorted(found.items()))


def _audio_of(name: str, audio: dict[str, Path]) -> Path | None:
    """Find an audio file by its id; VCTK has two microphones, of which lhotse uses the second."""
    names = (name, f"{name}_mic2", f"{name}_mic1")
    return next((audio[one] for one in names if one in audio), None)


def _read_voxpopuli(files: list[Path]) -> Iterator[Utterance]:
    """Read `asr_train.tsv` …, whose ids name audio files in folders by year."""
    audio: dict[Path, dict[str, Path]] = {}
    for file in files:
        found = audio.setdefault(file.parent, _audio_by_name(file.parent))
        for one in read_table(file, chosen=_voxpopuli_columns(file)):
            one.path = found.get(Path(one.path).name, one.path)
            yield _placed(one, file)


def _voxpopuli_columns(file: Path) -> dict[str, str]:
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        header = lines.readline().rstrip("\n").split("\t")
    name = next((one for one in ("id", "id_") if one in header), "id")
    text = "raw_text" if "raw_text" in header else "normalized_text"
    return {"path": name, "id": name, "text": text}


# ---- recipes of lhotse


def _read_recipe(name: str, folder: Path) -> Iterator[Utterance]:
    """Read a corpus by lhotse's recipe; it logs what it leaves out.

    Raises:
      InputError: lhotse has no such recipe, or it failed.
    """
    from lhotse import recipes

    prepare = getattr(recipes, f"prepare_{name.replace('-', '_')}", None)
    if prepare is None:
        raise InputError(f"--layout {name} is not one of {', '.join(LAYOUTS)}, nor in lhotse")
    with tempfile.TemporaryDirectory() as manifests:
        options = {}
        if "output_dir" in inspect.signature(prepare).parameters:
            options["output_dir"] = manifests
        try:
            prepared = prepare(folder, **options)
        except Exception as error:  # each recipe has its own
            raise InputError(f"lhotse's recipe of {name} failed: {first_line(error)}") from None
        for split, parts in _parts(prepared):
            target = Path(manifests, "written")
            target.mkdir(exist_ok=True)
            for kind in ("recordings", "supervisions"):
                parts[kind].to_file(target / f"{name}_{kind}_{split}.jsonl.gz")
        yield from read_manifests(target)


def _parts(manifests: dict, split: str = "") -> Iterator[tuple[str, dict]]:
    """Find recordings and supervisions in nested dicts; the innermost key is the split."""
    if "recordings" in manifests and "supervisions" in manifests:
        yield split, manifests
        return
    for name, inner in manifests.items():
        if isinstance(inner, dict):
            yield from _parts(inner, str(name))

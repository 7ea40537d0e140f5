"""Recognition and reading of corpora in their published layouts.

lhotse's recipes omit unusable data and stop at the first unreadable file; here each line of a
transcript and each audio file is an utterance, so that all are counted. Other corpora are read by
lhotse's recipe of the same name.
"""

import inspect
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from speechllm.audio.reader import SUFFIXES
from speechllm.data.corpora.config import LAYOUTS
from speechllm.data.corpora.lhotse_manifests import read_manifests
from speechllm.data.corpora.table import METADATA, TABLES, read_table, table_files
from speechllm.data.corpora.utterance import SPLITS, Utterance
from speechllm.errors import InputError, first_line
from speechllm.io import files_below


class Transcripts(NamedTuple):
    """Layout with transcript files; audio files are found by utterance id."""

    pattern: str  # glob pattern of the transcript files
    root: int  # index of the transcript's parent folder with the audio; 0 is its own folder
    separator: str | None  # between id and text; None for white space
    speaker: Callable[[str, Path], str | None]  # id, audio file -> speaker
    split: Callable[[Path, Path], str]  # transcript file, audio file -> split
    language: Callable[[Path], str | None] = lambda _: None  # transcript file -> language


TRANSCRIPTS = {
    "librispeech": Transcripts(
        "**/*.trans.txt", 0, None, lambda utt, _: utt.split("-")[0],
        lambda transcript, _: _part(transcript.absolute().parents[2].name),
    ),
    "aishell": Transcripts(
        "**/aishell_transcript*.txt", 1, None, lambda _, audio: audio.parent.name,
        lambda _, audio: _part(audio.parents[1].name), lambda _: "zh",
    ),
    "mls": Transcripts(
        "**/transcripts.txt", 0, "\t", lambda utt, _: utt.split("_")[0],
        lambda transcript, _: _part(transcript.absolute().parent.name),
        lambda transcript: MLS_LANGUAGES.get(
            transcript.absolute().parents[1].name.lower().removesuffix("_opus").removeprefix("mls_")
        ),
    ),
    "ljspeech": Transcripts("**/metadata.csv", 0, "|", lambda *_: None, lambda *_: ""),
    "vctk": Transcripts(
        "**/txt/*/*.txt", 2, "", lambda _, audio: audio.parent.name, lambda *_: ""
    ),
    "tedlium": Transcripts(
        "**/stm/*.stm", 1, None, lambda *_: None,
        lambda transcript, _: _part(transcript.absolute().parents[1].name),
    ),
}  # fmt: skip
PATTERNS = {  # files that identify a layout, the most specific first
    "kaldi": ("wav.scp", "*/wav.scp"),
    "huggingface": ("**/*.arrow", "**/*.parquet"),
    "lhotse": ("*cuts*.jsonl*", "*recordings*.jsonl*"),
    "voxpopuli": ("**/asr_*.tsv",),
    "common-voice": ("**/clips/*",),
    **{name: (one.pattern,) for name, one in TRANSCRIPTS.items()},
    "table": tuple(f"{one}{ending}" for one in SPLITS for ending in TABLES)
    + tuple(f"**/{name}" for name in METADATA),
}
CONFIRMED = {  # further checks for files that other corpora may also have
    "common-voice": lambda clip: any(clip.parents[1].glob("*.[tT][sS][vV]")),
    "ljspeech": lambda metadata: "|" in _first_line(metadata),
    "table": lambda file: file.name.lower() not in METADATA or "file_name" in _first_line(file),
}
MLS_LANGUAGES = {
    "dutch": "nl", "english": "en", "french": "fr", "german": "de", "italian": "it",
    "polish": "pl", "portuguese": "pt", "spanish": "es",
}  # fmt: skip
VOXPOPULI_TEXTS = ("raw_text", "original_text", "normalized_text", "normed_text")
IGNORED_STM = ("ignore_time_segment_in_scoring", "inter_segment_gap")


def recognize(folder: Path) -> str:
    """Return the name of a folder's layout; `folder` if no other layout matches."""
    files = _files(folder)
    for name in PATTERNS:
        found = _matching(name, files)
        if found and (name not in CONFIRMED or CONFIRMED[name](found[0])):
            return name
    return "folder"


def _files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in files_below(folder)}


def _matching(layout: str, files: dict[str, Path]) -> list[Path]:
    """Select files by a layout's patterns, ignoring case."""
    pattern = re.compile("|".join(map(_regex, PATTERNS[layout])), re.IGNORECASE)
    return [path for name, path in files.items() if pattern.fullmatch(name)]


def _regex(glob: str) -> str:
    parts = re.split(r"(\*\*/|\*)", glob)
    return "".join({"**/": "(.*/)?", "*": "[^/]*"}.get(part, re.escape(part)) for part in parts)


def _first_line(path: Path) -> str:
    with open(path, encoding="utf-8-sig", errors="replace") as lines:
        return lines.readline()


def layout_files(layout: str, folder: Path) -> list[Path]:
    """List the transcript files of a layout; raise InputError if there are none."""
    if layout not in TRANSCRIPTS and layout not in ("voxpopuli", "common-voice"):
        return [folder]
    found = _matching(layout, _files(folder))
    if not found:
        patterns = " or ".join(PATTERNS[layout])
        raise InputError(f"{folder} has no {patterns}: not the layout of {layout}")
    if layout == "common-voice":
        folders = dict.fromkeys(clip.parents[1] for clip in found)
        return [table for one in folders for table in table_files(one)]
    if layout == "tedlium":  # the third release contains each talk twice: in data/ and by split
        found = [one for one in found if one.parts[-4:-3] == ("legacy",)] or found
    return found


def read_layout(layout: str, folder: Path) -> Iterator[Utterance]:
    """Read the utterances of a corpus; raise InputError if it does not have this layout."""
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
    """Return the name if it is a split, such as `dev` or `train-clean-100`, else ""."""
    return name if name.lower().split("-")[0] in SPLITS else ""


# ---- transcripts


def _read_transcripts(layout: str, files: list[Path]) -> Iterator[Utterance]:
    spec = TRANSCRIPTS[layout]
    of_root: dict[Path, dict[str, Path]] = {}
    used: set[str] = set()
    for file in files:
        root = file.absolute().parents[spec.root]
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
            one.language = spec.language(file)
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
        if not line.strip() or (layout == "tedlium" and line.startswith(";;")):
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
    files = (path for path in files_below(root) if path.suffix.lower() in SUFFIXES)
    return {path.stem: path for path in files}


def _audio_of(name: str, audio: dict[str, Path]) -> Path | None:
    """Find an audio file by id; of VCTK's two microphones, the second is used, as in lhotse."""
    names = (name, f"{name}_mic2", f"{name}_mic1")
    return next((audio[one] for one in names if one in audio), None)


def _read_voxpopuli(files: list[Path]) -> Iterator[Utterance]:
    """Read `asr_train.tsv` etc.; ids are names of audio files, which are in folders by year.

    Many utterances have only a normalized text, no raw text. The folder gives the language.
    """
    for file in files:
        audio = _audio_by_name(file.parent)
        header = _first_line(file).strip().split("\t")
        name = "id" if "id" in header else "id_"
        texts = [one for one in VOXPOPULI_TEXTS if one in header]
        columns = [{"path": name, "id": name, "text": one} for one in texts or ["raw_text"]]
        for versions in zip(*(read_table(file, chosen=one) for one in columns), strict=True):
            one = next((version for version in versions if version.text), versions[0])
            one.path = audio.get(Path(one.path).name, one.path)
            if language := re.fullmatch("([a-z]{2})(_accented)?", file.absolute().parent.name):
                one.language = language[1]
            yield _placed(one, file)


# ---- lhotse's recipes


def _read_recipe(name: str, folder: Path) -> Iterator[Utterance]:
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
        except Exception as error:  # recipes raise different exceptions
            raise InputError(f"lhotse's recipe for {name} failed: {first_line(error)}") from None
        for split, parts in _parts(prepared):
            target = Path(manifests, "written")
            target.mkdir(exist_ok=True)
            for kind in ("recordings", "supervisions"):
                parts[kind].to_file(target / f"{name}_{kind}_{split}.jsonl.gz")
        yield from read_manifests(target)


def _parts(manifests: dict, split: str = "") -> Iterator[tuple[str, dict]]:
    """Yield the recordings and supervisions in nested dicts; the innermost key is the split."""
    if "recordings" in manifests and "supervisions" in manifests:
        yield split, manifests
        return
    for name, inner in manifests.items():
        if isinstance(inner, dict):
            yield from _parts(inner, str(name))

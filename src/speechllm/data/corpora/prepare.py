"""Preparation of a corpus: read and check it, compute features, write cut files and a report."""

import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from lhotse import CutSet
from lhotse.cut import Cut

from speechllm.audio.fbank import FRAME_SHIFT
from speechllm.data.corpora.audio_files import AudioFile, check_files
from speechllm.data.corpora.config import LAYOUTS, MIX, PrepareConfig
from speechllm.data.corpora.corpus_report import report_text, shorten, split_statistics
from speechllm.data.corpora.folder import audio_and_texts, read_folder
from speechllm.data.corpora.huggingface import dataset_files, read_huggingface
from speechllm.data.corpora.kaldi import kaldi_files, read_kaldi
from speechllm.data.corpora.layouts import layout_files, read_layout, recognize
from speechllm.data.corpora.lhotse_manifests import manifest_files, read_manifests
from speechllm.data.corpora.table import read_table, table_files
from speechllm.data.corpora.to_cuts import OVERSHOOT, to_cut, utterance_error, without_tags
from speechllm.data.corpora.utterance import Utterance
from speechllm.data.features import compute_fbank, cuts_path, with_perturbed_speed
from speechllm.data.validation import CutError, count_errors, shown_id
from speechllm.errors import InputError
from speechllm.io import atomic_write

FILES = {  # source: function that lists its files; the others are layouts
    "table": table_files,
    "folder": audio_and_texts,
    "kaldi": kaldi_files,
    "huggingface": dataset_files,
    "lhotse": manifest_files,
}
TRAIN = "train"
HELD_OUT = {"dev": 0.1, "test": 0.1}  # fraction of the duration
SPLIT_SEED = 42
WITHOUT_HASH = ("source", "path", "manifest_dir", "num_jobs", "overwrite")

logger = logging.getLogger(__name__)


def prepare(config: PrepareConfig) -> tuple[str, list[str]]:
    """Prepare a corpus, unless already done; return the report and the names of all splits.

    The JSON report is written after each split, so that an interrupted run can be resumed.

    Raises:
      InputError: the source cannot be read or has invalid utterances, or a split exists that was
        made from another source.
    """
    config = with_layout(config)
    folder, source = config.manifest_dir, source_hash(config)
    path = folder / f"{config.corpus}_report.json"
    report = _read_report(path, config.corpus)
    splits = report["splits"]
    made_from = {split: one.get("source") for split, one in splits.items()}
    done = report["sources"].get(source)
    if done and all(made_from.get(split) == source for split in done["splits"]):
        logger.info("%s was prepared from the same files with the same flags", config.corpus)
        return report_text(report), list(splits)
    copies = folder / f"{config.corpus}_audio-{source[:8]}"
    taken = {} if config.overwrite else made_from
    corpus, errors = _read_with_copies(config, copies, taken, source)
    folder.mkdir(parents=True, exist_ok=True)
    for split, cuts in corpus.items():
        if made_from.get(split) != source:
            compute_fbank(cuts, cuts_path(folder, config.corpus, split), config.num_jobs)
            splits[split] = {**split_statistics(cuts), "source": source}
            _write_report(path, report)
    used = sum(splits[split]["utterances"] for split in corpus)
    report["sources"][source] = {
        "path": str(config.path),
        "splits": list(corpus),
        "given": used + len(errors),
        "used": used,
        "skipped": [error._asdict() for error in errors],
    }
    _write_report(path, report)
    _remove_former_copies(copies, config.corpus, report)
    return report_text(report), list(splits)


def _read_report(path: Path, corpus: str) -> dict:
    """Read a report, except for splits whose cut file was removed."""
    if not path.is_file():
        return {"splits": {}, "sources": {}}
    report = json.loads(path.read_text("utf-8"))
    splits = report["splits"].items()
    found = {name: one for name, one in splits if cuts_path(path.parent, corpus, name).is_file()}
    return report | {"splits": found}


def _write_report(path: Path, report: dict) -> None:
    in_use = _sources_in_use(report)
    report["sources"] = {key: one for key, one in report["sources"].items() if key in in_use}
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(report, ensure_ascii=False, indent=1), "utf-8")


def _sources_in_use(report: dict) -> set[str | None]:
    return {one.get("source") for one in report["splits"].values()}


def with_layout(config: PrepareConfig) -> PrepareConfig:
    """Replace the source `folder` with the given or recognized layout."""
    if config.source != "folder":
        return config
    layout = config.layout
    spelled = {one.replace("-", ""): one for one in LAYOUTS}  # LibriSpeech, common_voice
    layout = spelled.get(re.sub("[-_]", "", layout.lower()), layout)
    if layout == "auto":
        layout = recognize(config.path)
        logger.info("%s has the layout %s", config.path, layout)
    return replace(config, source=layout)


def source_hash(config: PrepareConfig) -> str:
    """Hash the non-default options, and the input files' names, sizes and modification times."""
    options = {
        one.name: str(value)
        for one in fields(config)
        if (value := getattr(config, one.name)) != one.default and one.name not in WITHOUT_HASH
    }
    list_files = FILES.get(config.source) or partial(layout_files, config.source)
    files = [file for file in list_files(config.path) if file.exists()]
    states = [(os.path.relpath(file, config.path), file.stat()) for file in files]
    content = [options, [(name, one.st_size, one.st_mtime_ns) for name, one in states]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _remove_former_copies(copies: Path, corpus: str, report: dict) -> None:
    used = {str(source)[:8] for source in _sources_in_use(report)}
    for folder in copies.parent.glob(f"{corpus}_audio-*"):
        is_ours = re.fullmatch(rf"{corpus}_audio-[0-9a-f]{{8}}", folder.name)
        if is_ours and folder.name[-8:] not in used:
            shutil.rmtree(folder)


# ---- reading and checking


def is_training(split: str) -> bool:
    """Return true for training splits, such as `train` and LibriSpeech's `train-clean-100`."""
    return split.split("-")[0] in (TRAIN, "training")


def _read_with_copies(
    config: PrepareConfig, copies: Path, former: Mapping[str, str | None], source: str
) -> tuple[dict[str, CutSet], list[CutError]]:
    """Read like `read_corpus`; raise InputError if a split was made from another source."""
    is_new = not copies.exists()
    try:
        splits, errors = read_corpus(config, copies)
        taken = [one for one in splits if former.get(one, source) != source]
        if taken:
            paths = [str(cuts_path(config.manifest_dir, config.corpus, one)) for one in taken]
            raise InputError(
                f"made earlier from other files or flags: {', '.join(paths)}; --overwrite true "
                "replaces them, --split NAME adds another split"
            )
        return splits, errors
    except BaseException:
        if is_new:
            shutil.rmtree(copies, ignore_errors=True)
        raise


def read_corpus(config: PrepareConfig, copies: Path) -> tuple[dict[str, CutSet], list[CutError]]:
    """Read and check a corpus; audio that lhotse cannot read is copied to `copies`.

    Raises:
      InputError: utterances are invalid and --skip-invalid is false, or all are invalid.
    """
    utterances = list(_read(config, copies))
    for one in utterances:
        one.split = (config.split or one.split).lower()
        if config.drop_tags:
            one.text = without_tags(one.text) or one.text
    paths = (one.path for one in utterances if not one.problem)
    files = check_files(paths, copies, config.channel == MIX, config.num_jobs)
    valid, errors = _to_cuts(utterances, files, config)
    _report_invalid(errors, config.skip_invalid)
    if not valid:
        raise InputError(f"{config.path} has no usable utterances")
    splits = {split: CutSet.from_cuts(cuts) for split, cuts in assign_splits(valid).items()}
    train = [one for one in splits if is_training(one)]
    for split in train if config.speed_perturb else ():
        splits[split] = with_perturbed_speed(splits[split])
    if config.speed_perturb and not train and not config.split:
        logger.warning("no split is named %s: speed perturbation is skipped", TRAIN)
    _report_late([one for one, _ in valid], files)
    return splits, errors


def _read(config: PrepareConfig, copies: Path) -> Iterator[Utterance]:
    path, given = config.path, {"text": config.text_column, "path": config.path_column}
    columns = {field: name for field, name in given.items() if name}
    readers = {
        "table": lambda: read_table(path, config.audio_dir, columns),
        "folder": lambda: read_folder(path),
        "kaldi": lambda: read_kaldi(path),
        "huggingface": lambda: read_huggingface(path, copies, columns),
        "lhotse": lambda: read_manifests(path),
    }
    return readers.get(config.source, lambda: read_layout(config.source, path))()


def _to_cuts(
    utterances: list[Utterance], files: dict, config: PrepareConfig
) -> tuple[list[tuple[Utterance, Cut]], list[CutError]]:
    valid, errors, ids = [], [], set()
    for one in utterances:
        cut = to_cut(one, files.get(one.path), config.language, config.channel_index)
        name = shown_id(one)
        if name and name in ids and not isinstance(cut, CutError):
            cut = utterance_error(one, "duplicate-id", "duplicate id")
        ids.add(name)
        if isinstance(cut, CutError):
            errors.append(cut)
        else:
            valid.append((one, cut))
    return valid, errors


def _report_late(utterances: list[Utterance], files: dict[Path, AudioFile]) -> None:
    ends = [(one, files[one.path].duration + FRAME_SHIFT) for one in utterances if one.end]
    if late := [shown_id(one) for one, end in ends if one.end > end]:
        logger.warning(
            "%d segments end up to %g s after their audio and are shortened: %s",
            len(late), OVERSHOOT, shorten(late, ", "),
        )  # fmt: skip


def _report_invalid(errors: list[CutError], skip: bool) -> None:
    if not errors:
        return
    if skip or all(error.reason == "no-words" for error in errors):
        counts = count_errors(errors)
        logger.warning("skipping %d invalid utterances (%s)", len(errors), counts)
        return
    messages = shorten((f"  {error.message}" for error in errors), "\n")
    raise InputError(
        f"{len(errors)} invalid utterances ({count_errors(errors)}):\n{messages}\n"
        "--skip-invalid true skips them"
    )


# ---- splits


def assign_splits(cuts: list[tuple[Utterance, Cut]]) -> dict[str, list[Cut]]:
    """Group cuts by split; utterances without a split get their speaker's split, or a new one."""
    split_of = {cut.supervisions[0].speaker: one.split for one, cut in cuts if one.split}
    without = [cut for one, cut in cuts if not one.split]
    seconds = defaultdict(float)
    for cut in without:
        if cut.supervisions[0].speaker not in split_of:
            seconds[cut.supervisions[0].speaker] += cut.duration
    split_of |= divide_speakers(seconds)
    by_split = defaultdict(list)
    for one, cut in cuts:
        by_split[one.split or split_of[cut.supervisions[0].speaker]].append(cut)
    if without:
        used = ", ".join(sorted({split_of[cut.supervisions[0].speaker] for cut in without}))
        logger.info("%d utterances had no split: assigned by speaker to %s", len(without), used)
    return dict(by_split)


def divide_speakers(seconds: dict[str, float]) -> dict[str, str]:
    """Map speakers to random, reproducible splits; `seconds` is each speaker's speech."""
    speakers = sorted(seconds)
    random.Random(SPLIT_SEED).shuffle(speakers)
    split_of = dict.fromkeys(speakers, TRAIN)
    room = {split: share * sum(seconds.values()) for split, share in HELD_OUT.items()}
    for speaker in speakers:
        split = max(room, key=room.get)
        if seconds[speaker] <= room[split]:
            split_of[speaker] = split
            room[split] -= seconds[speaker]
    for split in HELD_OUT:  # with few speakers, take the shortest
        left = [speaker for speaker in speakers if split_of[speaker] == TRAIN]
        if split not in split_of.values() and len(left) > 1:
            split_of[min(left, key=seconds.get)] = split
    return split_of

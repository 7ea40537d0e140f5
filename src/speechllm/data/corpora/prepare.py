"""Preparation of a corpus: read and check it, compute features, write cut files and a report."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from lhotse import CutSet
from lhotse.cut import Cut

from speechllm.data.corpora.audio_files import check_files
from speechllm.data.corpora.config import LAYOUTS, PrepareConfig
from speechllm.data.corpora.corpus_report import (
    corpus_report,
    merge_reports,
    report_text,
    shorten,
)
from speechllm.data.corpora.folder import audio_and_texts, read_folder
from speechllm.data.corpora.huggingface import huggingface_files, read_huggingface
from speechllm.data.corpora.kaldi import kaldi_files, read_kaldi
from speechllm.data.corpora.layouts import layout_files, read_layout, recognize
from speechllm.data.corpora.lhotse_manifests import manifest_files, read_manifests
from speechllm.data.corpora.splits import assign_splits
from speechllm.data.corpora.table import read_table, table_files
from speechllm.data.corpora.to_cuts import (
    OVERSHOOT,
    has_words,
    is_late,
    to_cut,
    utterance_error,
    without_tags,
)
from speechllm.data.corpora.utterance import Utterance
from speechllm.data.features import compute_fbank, cuts_path, with_perturbed_speed
from speechllm.data.validation import CutError, count_reasons, format_counts, shown_id
from speechllm.errors import InputError
from speechllm.io import atomic_write

READERS: dict[str, tuple[Callable, Callable]] = {  # layout: reader, function listing its files
    "table": (read_table, table_files),
    "folder": (read_folder, audio_and_texts),
    "kaldi": (read_kaldi, kaldi_files),
    "huggingface": (read_huggingface, huggingface_files),
    "lhotse": (read_manifests, manifest_files),
}
WITHOUT_HASH = ("source", "path", "manifest_dir", "num_jobs", "overwrite")

logger = logging.getLogger(__name__)


def prepare(config: PrepareConfig) -> tuple[str, list[str]]:
    """Prepare a corpus, unless already done; return the report and the names of all splits.

    `.<corpus>.json` next to the cut files contains the source hash of each finished split.

    Raises:
      InputError: the source cannot be read or has invalid utterances, or a split exists that was
        made from another source.
    """
    config = with_layout(config)
    folder, source = config.manifest_dir, source_hash(config)
    stamp, report = folder / f".{config.corpus}.json", folder / f"{config.corpus}_report.txt"
    former = _read_stamp(stamp)
    former = {
        split: made_from
        for split, made_from in former.items()
        if cuts_path(folder, config.corpus, split).is_file()
    }
    content = _read_report(report.with_suffix(".json"))
    done = content.get("sources", {}).get(source)
    if done and all(former.get(split) == source for split in done["splits"]):
        logger.info("%s was prepared from the same files with the same flags", config.corpus)
        return report.read_text("utf-8"), list(former)
    copies = folder / f"{config.corpus}_audio-{source[:8]}"
    finished = content.get("sources", former.values() if content else ())
    kept = {one: made_from for one, made_from in former.items() if made_from in finished}
    folder.mkdir(parents=True, exist_ok=True)
    corpus = _read_with_copies(config, copies, {} if config.overwrite else kept, source)
    for split, cuts in corpus.splits.items():
        if former.get(split) != source:
            compute_fbank(cuts, cuts_path(folder, config.corpus, split), config.num_jobs)
            former[split] = source
            _write(stamp, json.dumps(former))
    added = corpus_report(str(config.path), corpus.splits, corpus.errors)
    content = merge_reports(content, added, source)
    _write(report.with_suffix(".json"), json.dumps(content, ensure_ascii=False, indent=1))
    _write(report, report_text(content))
    _remove_former_copies(copies, config.corpus, set(former.values()))
    return report.read_text("utf-8"), list(former)


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


def _read_stamp(stamp: Path) -> dict[str, str]:
    former = json.loads(stamp.read_text()) if stamp.is_file() else {}
    if isinstance(former.get("splits"), list):  # written by earlier versions
        return dict.fromkeys(former["splits"], former["source"])
    return former


def _read_report(report: Path) -> dict:
    return json.loads(report.read_text("utf-8")) if report.is_file() else {}


def source_hash(config: PrepareConfig) -> str:
    """Hash the non-default options, and the input files' names, sizes and modification times."""
    options = {
        one.name: str(value)
        for one in fields(config)
        if (value := getattr(config, one.name)) != one.default and one.name not in WITHOUT_HASH
    }
    if config.source in READERS:
        _, list_files = READERS[config.source]
        input_files = list_files(config.path)
    else:
        input_files = layout_files(config.source, config.path)
    states = [
        (os.path.relpath(file, config.path), file.stat()) for file in input_files if file.exists()
    ]
    files = [(file, state.st_size, state.st_mtime_ns) for file, state in states]
    return hashlib.sha256(json.dumps([options, files]).encode()).hexdigest()


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as partial:
        partial.write_text(text, "utf-8")


def _remove_former_copies(copies: Path, corpus: str, sources: set[str]) -> None:
    used = {source[:8] for source in sources}
    for folder in copies.parent.glob(f"{corpus}_audio-*"):
        is_ours = re.fullmatch(rf"{corpus}_audio-[0-9a-f]{{8}}", folder.name)
        if is_ours and folder.name[-8:] not in used:
            shutil.rmtree(folder)


# ---- reading and checking


class Corpus(NamedTuple):
    splits: dict[str, CutSet]  # with copies at other speeds
    errors: list[CutError]  # errors of the skipped utterances


def is_training(split: str, train_split: str) -> bool:
    """Return true for training splits, such as `train` and LibriSpeech's `train-clean-100`."""
    return split.split("-")[0] == train_split.lower() or split == train_split.lower()


def _read_with_copies(
    config: PrepareConfig, copies: Path, former: Mapping[str, str], source: str
) -> Corpus:
    """Read like `read_corpus`, and remove new copies on failure.

    Raises:
      InputError: see `read_corpus`; or a split exists that was made from another source.
    """
    is_new = not copies.exists()
    try:
        corpus = read_corpus(config, copies)
        taken = [one for one in corpus.splits if former.get(one, source) != source]
        if taken:
            paths = [str(cuts_path(config.manifest_dir, config.corpus, one)) for one in taken]
            raise InputError(
                f"made earlier from other files or flags: {', '.join(paths)}; --overwrite true "
                "replaces them, --split NAME adds another split"
            )
        return corpus
    except BaseException:
        if is_new:
            shutil.rmtree(copies, ignore_errors=True)
            with suppress(OSError):  # not empty
                copies.parent.rmdir()
        raise


def read_corpus(config: PrepareConfig, copies: Path) -> Corpus:
    """Read and check a corpus; every cut has audio, a text and a split.

    Args:
      copies: folder for copies of audio; created if needed.

    Raises:
      InputError: utterances are invalid and --skip-invalid is false, or no utterance is valid.
    """
    utterances = [_with_flags(one, config) for one in _read(config, copies)]
    paths = (one.path for one in utterances if not one.problem)
    files = check_files(paths, copies, config.mix, config.num_jobs)
    valid, errors = _to_cuts(utterances, files, config)
    _report_invalid(errors, config.skip_invalid)
    if not valid:
        raise InputError(f"{config.path} has no usable utterance")
    by_split = assign_splits(valid, config.train_split.lower())
    splits = {split: CutSet.from_cuts(cuts) for split, cuts in by_split.items()}
    train = [one for one in splits if is_training(one, config.train_split)]
    for split in train if config.speed_perturb else ():
        splits[split] = with_perturbed_speed(splits[split])
    if config.speed_perturb and not train and not config.split:
        logger.warning("no split is named %s: no speed perturbation", config.train_split)
    _report_late([one for one, _ in valid if is_late(one, files[one.path])])
    return Corpus(splits, errors)


def _read(config: PrepareConfig, copies: Path) -> Iterator[Utterance]:
    if config.source == "huggingface":
        return read_huggingface(config.path, copies, config.columns)
    if config.source == "table":
        return read_table(config.path, config.audio_dir, config.columns)
    if config.source in READERS:
        return READERS[config.source][0](config.path)
    return read_layout(config.source, config.path)


def _with_flags(utterance: Utterance, config: PrepareConfig) -> Utterance:
    utterance.split = (config.split or utterance.split).lower()
    if config.drop_tags and has_words(utterance.text):
        utterance.text = without_tags(utterance.text)
    return utterance


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


def _report_late(utterances: list[Utterance]) -> None:
    if utterances:
        names = shorten(map(shown_id, utterances), ", ")
        logger.warning(
            "%d segments end up to %g s after their audio and are shortened: %s",
            len(utterances), OVERSHOOT, names,
        )  # fmt: skip


def _report_invalid(errors: list[CutError], skip: bool) -> None:
    if not errors:
        return
    counts = format_counts(count_reasons([error] for error in errors))
    if skip or all(error.reason == "no-words" for error in errors):
        logger.warning("skipping %d invalid utterances (%s)", len(errors), counts)
        return
    messages = shorten((f"  {error.message}" for error in errors), "\n")
    raise InputError(
        f"{len(errors)} invalid utterances ({counts}):\n{messages}\n--skip-invalid true skips them"
    )

"""Prepare a corpus: read it, check it, compute features, write cut files and a report."""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from lhotse import CutSet
from lhotse.cut import Cut

from speechllm.data.corpora.audio_files import AudioFile, check_files
from speechllm.data.corpora.config import PrepareConfig
from speechllm.data.corpora.corpus_report import corpus_report, report_text, shorten
from speechllm.data.corpora.folder import audio_and_texts, read_folder
from speechllm.data.corpora.huggingface import huggingface_files, read_huggingface
from speechllm.data.corpora.kaldi import kaldi_files, read_kaldi
from speechllm.data.corpora.lhotse_manifests import manifest_files, read_manifests
from speechllm.data.corpora.splits import assign_splits
from speechllm.data.corpora.table import read_table
from speechllm.data.corpora.to_cuts import to_cut, utterance_error
from speechllm.data.corpora.utterance import Utterance
from speechllm.data.features import compute_fbank, cuts_path, with_perturbed_speed
from speechllm.data.validation import CutError, count_reasons, format_counts, shown_id
from speechllm.errors import InputError
from speechllm.io import atomic_write

READERS: dict[str, tuple[Callable, Callable]] = {  # source: reader, and its input files
    "table": (read_table, lambda path: [path]),
    "folder": (read_folder, audio_and_texts),
    "kaldi": (read_kaldi, kaldi_files),
    "huggingface": (read_huggingface, huggingface_files),
    "lhotse": (read_manifests, manifest_files),
}

logger = logging.getLogger(__name__)


def prepare(config: PrepareConfig) -> str:
    """Prepare a corpus unless this was done before; return the report as text.

    `.<corpus>.json` next to the cut files lists the finished splits and what they were made from.

    Raises:
      InputError: the source cannot be read, or has invalid utterances.
    """
    folder, source = config.manifest_dir, source_hash(config)
    stamp, report = folder / f".{config.corpus}.json", folder / f"{config.corpus}_report.txt"
    former = json.loads(stamp.read_text()) if stamp.is_file() else {"source": "", "splits": []}
    is_done = {
        split: former["source"] == source and cuts_path(folder, config.corpus, split).is_file()
        for split in former["splits"]
    }
    if is_done and all(is_done.values()) and report.is_file():
        logger.info("%s was prepared from the same files with the same flags", config.corpus)
        return report.read_text("utf-8")
    copies = folder / f"{config.corpus}_audio-{source[:8]}"
    corpus = _read_with_copies(config, copies)
    folder.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)  # without it the corpus is unfinished
    finished = [split for split in corpus.splits if is_done.get(split)]
    for split, cuts in corpus.splits.items():
        if split not in finished:
            compute_fbank(cuts, cuts_path(folder, config.corpus, split), config.num_jobs)
            finished.append(split)
        _write(stamp, json.dumps({"source": source, "splits": finished}))
    content = corpus_report(str(config.path), corpus.splits, corpus.files, corpus.errors)
    _write(report.with_suffix(".json"), json.dumps(content, ensure_ascii=False, indent=1))
    _write(report, report_text(content))
    _remove_former_copies(copies, config.corpus)
    return report.read_text("utf-8")


def source_hash(config: PrepareConfig) -> str:
    """Hash the options, and names, sizes and times of the input files."""
    options = {name: str(value) for name, value in asdict(config).items() if name != "num_jobs"}
    _, input_files = READERS[config.source]
    states = [(str(file), file.stat()) for file in input_files(config.path) if file.exists()]
    files = [(file, state.st_size, state.st_mtime_ns) for file, state in states]
    return hashlib.sha256(json.dumps([options, files]).encode()).hexdigest()


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as partial:
        partial.write_text(text, "utf-8")


def _remove_former_copies(copies: Path, corpus: str) -> None:
    for folder in copies.parent.glob(f"{corpus}_audio-*"):
        if folder != copies and re.fullmatch(rf"{corpus}_audio-[0-9a-f]{{8}}", folder.name):
            shutil.rmtree(folder)


# ---- reading and checking


class Corpus(NamedTuple):
    splits: dict[str, CutSet]  # with copies at other speeds
    files: list[AudioFile]  # audio files of these cuts
    errors: list[CutError]  # errors of the skipped utterances


def _read_with_copies(config: PrepareConfig, copies: Path) -> Corpus:
    """Read as `read_corpus`, and remove new copies if that fails."""
    is_new = not copies.exists()
    try:
        return read_corpus(config, copies)
    except BaseException:
        if is_new:
            shutil.rmtree(copies, ignore_errors=True)
        raise


def read_corpus(config: PrepareConfig, copies: Path) -> Corpus:
    """Read and check a corpus; every cut has audio, a text and a split.

    Args:
      copies: folder for copies of audio; created if needed.

    Raises:
      InputError: utterances are invalid and --skip-invalid is false, or all are invalid.
    """
    read, _ = READERS[config.source]
    arguments = [config.path, copies] if config.source == "huggingface" else [config.path]
    utterances = list(read(*arguments))
    paths = (one.path for one in utterances if not one.problem)
    files = check_files(paths, copies, config.mix, config.num_jobs)
    valid, errors = _to_cuts(utterances, files, config)
    _report_invalid(errors, config.skip_invalid)
    if not valid:
        raise InputError(f"{config.path} has no usable utterance")
    by_split = assign_splits(valid, config.train_split)
    splits = {split: CutSet.from_cuts(cuts) for split, cuts in by_split.items()}
    if config.speed_perturb and config.train_split in splits:
        splits[config.train_split] = with_perturbed_speed(splits[config.train_split])
    elif config.speed_perturb:
        logger.warning("no split is named %s: no speed perturbation", config.train_split)
    return Corpus(splits, sorted({files[one.path] for one, _ in valid}), errors)


def _to_cuts(
    utterances: list[Utterance], files: dict, config: PrepareConfig
) -> tuple[list[tuple[Utterance, Cut]], list[CutError]]:
    valid, errors, ids = [], [], set()
    for one in utterances:
        cut = to_cut(one, files.get(one.path), config.language, config.channel_index)
        name = shown_id(one)
        if name and name in ids:
            cut = utterance_error(one, "duplicate-id", "duplicate id")
        ids.add(name)
        if isinstance(cut, CutError):
            errors.append(cut)
        else:
            valid.append((one, cut))
    return valid, errors


def _report_invalid(errors: list[CutError], skip: bool) -> None:
    if not errors:
        return
    counts = format_counts(count_reasons([error] for error in errors))
    if skip:
        logger.warning("skipping %d invalid utterances (%s)", len(errors), counts)
        return
    messages = shorten((f"  {error.message}" for error in errors), "\n")
    raise InputError(
        f"{len(errors)} invalid utterances ({counts}):\n{messages}\n--skip-invalid true skips them"
    )

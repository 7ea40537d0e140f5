"""Any corpus, in the form it comes in, to cuts and fbank.

  python local/prepare_corpus.py --table corpora/an4/transcripts.tsv --corpus an4 \
    --manifest-dir data/fbank --num-jobs 4

  --table FILE        TSV or CSV with a header, or JSON lines; paths are relative to it
  --folder DIR        audio with a text file beside each: [train/][anna/]1.wav, [train/][anna/]1.txt
  --kaldi DIR         wav.scp, text, [segments, utt2spk, utt2lang, reco2file_and_channel]
  --huggingface DIR   a dataset as save_to_disk leaves it, or its parquet files (needs pyarrow)
  --lhotse PATH       a cut file or a folder of cuts, or of recordings and supervisions

DIR may have a folder, PATH a file for each split. Columns of tables and datasets are found by name,
others are ignored:

  text | sentence | transcript         as the corpus spells it
  path | audio | wav | audio_filepath
  utt_id | id                          unique; without it the name of the audio file, and the
                                       start in it in milliseconds
  speaker | speaker_id | client_id     optional; without it every recording is its own speaker
  split                                optional; utterances without one are divided by speaker,
                                       about 80/10/10
  language | locale                    optional, see --language
  context                              optional: words that may occur, such as names
  start, end | offset, duration        optional: seconds in the file
  channel                              optional: 1, 2, … or A, B

Audio may be in any rate and in any format that soundfile or PyAV (m4a, webm, …) reads; what
training cannot read by itself is copied to FLAC in <manifest-dir>/<corpus>_audio-….

Writes <manifest-dir>/<corpus>_cuts_<split>.jsonl.gz with the features beside it, and what the
corpus holds and lacks to <corpus>_report.json and .txt. The train split also gets copies at 0.9 and
1.1 times the speed. Everything is checked before features are computed: bad utterances are reported
together, and left out only with --skip-bad true. A split that was made from the same files with the
same flags is kept.
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from lhotse import CutSet
from lhotse.cut import Cut

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from speechllm.corpora.audio import AudioFile, check_files
from speechllm.corpora.cuts import fault, to_cut
from speechllm.corpora.folder import audio_and_texts, read_folder
from speechllm.corpora.huggingface import huggingface_files, read_huggingface
from speechllm.corpora.kaldi import kaldi_files, read_kaldi
from speechllm.corpora.manifests import manifest_files, read_manifests
from speechllm.corpora.report import corpus_report, report_text, shown
from speechllm.corpora.splits import assign_splits
from speechllm.corpora.table import read_table
from speechllm.corpora.utterance import Utterance, channel_number
from speechllm.cut_faults import Fault, counted, first_reasons, shown_id
from speechllm.errors import InputError, in_sentences
from speechllm.features import SAMPLING_RATE, compute_fbank, cuts_path, with_perturbed_speed
from speechllm.flags import Parser, str2bool
from speechllm.whole_file import whole_file

SOURCES = {  # flag: what it reads, and the files this depends on
    "table": (read_table, lambda path: [path]),
    "folder": (read_folder, audio_and_texts),
    "kaldi": (read_kaldi, kaldi_files),
    "huggingface": (read_huggingface, huggingface_files),
    "lhotse": (read_manifests, manifest_files),
}
MIX = "mix"  # of --channel

logger = logging.getLogger(__name__)


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True).add_argument
    for name in SOURCES:
        source(f"--{name}", type=Path, help="see above")
    add = parser.add_argument
    add("--corpus", required=True, help="name of the corpus in file names")
    add("--manifest-dir", type=Path, default=Path("data/fbank"))
    add("--train-split", default="train", help="its name in the corpus")
    add("--language", help="of utterances that have none, such as en; zh, ja, th and others "
        "without spaces are scored by characters")  # fmt: skip
    add("--channel", type=channel, help="of files with several where the corpus does not tell: 1, "
        "2, … or mix, the mean of all")  # fmt: skip
    add("--speed-perturb", type=str2bool, default=True,
        help="0.9 and 1.1 copies of the train split")  # fmt: skip
    add("--skip-bad", type=str2bool, default=False,
        help="leave bad utterances out instead of stopping")  # fmt: skip
    add("--num-jobs", type=int, default=4, help="processes computing features")
    return parser


def channel(text: str) -> int | str:
    """A number from 0, or `mix`."""
    try:
        return MIX if text == MIX else channel_number(text or "0")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor {MIX}") from None


# --- what is there and whether it can be used ---------------------------------------------------


class Corpus(NamedTuple):
    by_split: dict[str, list[Cut]]
    files: list[AudioFile]  # of these cuts
    faults: list[Fault]  # of the utterances that are left out


def source_of(args: argparse.Namespace) -> tuple[str, Path]:
    """The flag that was given, and its value.

    Raises:
      FileNotFoundError: it is not there.
    """
    name = next(name for name in SOURCES if getattr(args, name) is not None)
    if not (path := getattr(args, name)).exists():
        raise FileNotFoundError(f"--{name} {path}: it is not there")
    return name, path


def read_corpus(args: argparse.Namespace, copies: Path) -> Corpus:
    """The cuts of a corpus, all with audio, a text and a split.

    Args:
      copies: folder for copies of audio; made when there are some.

    Raises:
      ValueError: with the bad utterances, or if there is no good one.
    """
    name, path = source_of(args)
    read = SOURCES[name][0]
    utterances = list(read(path, copies) if name == "huggingface" else read(path))
    paths = (one.path for one in utterances if not one.problem)
    files = check_files(paths, copies, args.channel == MIX, args.num_jobs)
    good, faults = to_cuts(utterances, files, args)
    report_bad(faults, args.skip_bad)
    if not good:
        raise InputError(f"{path} has no usable utterance")
    if alone := sum(not one.speaker for one, _ in good):
        logger.info("%d utterances have no speaker: each recording is its own", alone)
    used = {files[one.path] for one, _ in good}
    require_resampler(used)
    return Corpus(assign_splits(good, args.train_split), sorted(used), faults)


def to_cuts(
    utterances: Iterable[Utterance], files: dict, args: argparse.Namespace
) -> tuple[list[tuple[Utterance, Cut]], list[Fault]]:
    good, faults, ids = [], [], set()
    for one in utterances:
        channel = 0 if args.channel == MIX else args.channel
        made = to_cut(one, files.get(one.path), args.language, channel)
        name = shown_id(one)
        if name and name in ids:
            made = fault(one, "duplicate-id", "duplicate id")
        ids.add(name)
        if isinstance(made, Fault):
            faults.append(made)
        else:
            good.append((one, made))
    return good, faults


def report_bad(faults: list[Fault], skip: bool) -> None:
    """Raises ValueError with the bad utterances, or counts what is left out."""
    if not faults:
        return
    counts = counted(first_reasons([fault] for fault in faults))
    if skip:
        logger.warning("leaving out %d bad utterances (%s)", len(faults), counts)
        return
    sentences = shown((f"  {fault.sentence}" for fault in faults), "\n")
    raise InputError(
        f"{len(faults)} bad utterances ({counts}):\n{sentences}\n--skip-bad true leaves them out"
    )


def require_resampler(files: Iterable[AudioFile]) -> None:
    """lhotse resamples with torchaudio or scipy and declares neither."""
    other = next((file for file in files if file.sampling_rate != SAMPLING_RATE), None)
    if other is None or any(map(importlib.util.find_spec, ("torchaudio", "scipy"))):
        return
    raise InputError(
        f"{other.path} is at {other.sampling_rate} Hz; resampling it to {SAMPLING_RATE} Hz needs "
        "scipy: pip install scipy"
    )


# --- what is written ----------------------------------------------------------------------------


class Stamp:
    """Which splits were made, and from what: `.<corpus>.json` beside the cut files."""

    def __init__(self, path: Path, source: str):
        self.path, self.source = path, source
        saved = json.loads(path.read_text()) if path.is_file() else {}
        self.former_splits = saved.get("splits", [])
        is_same = saved.get("source") == source
        self.splits = self.former_splits if is_same else []
        self.complete = is_same and saved["complete"]

    def save(self, splits: list[str], complete: bool) -> None:
        self.splits, self.complete = splits, complete
        content = {"source": self.source, "splits": splits, "complete": complete}
        with whole_file(self.path) as partial:
            partial.write_text(json.dumps(content))


def source_hash(args: argparse.Namespace) -> str:
    """Of the flags that matter, and of names, sizes and times of the files that are read."""
    name, path = source_of(args)
    flags = {flag: str(value) for flag, value in vars(args).items() if flag != "num_jobs"}
    states = [(str(file), file.stat()) for file in SOURCES[name][1](path) if file.exists()]
    files = [(file, state.st_size, state.st_mtime_ns) for file, state in states]
    return hashlib.sha256(json.dumps([flags, files]).encode()).hexdigest()


def prepare_splits(args: argparse.Namespace, by_split: dict[str, list], stamp: Stamp) -> None:
    done = [s for s in stamp.splits if cuts_path(args.manifest_dir, args.corpus, s).is_file()]
    stamp.save(done, complete=False)
    for split, of_split in by_split.items():
        path = cuts_path(args.manifest_dir, args.corpus, split)
        if split in done:
            logger.info("%s exists, made from the same files", path)
            continue
        cuts = CutSet.from_cuts(of_split)
        if split == args.train_split and args.speed_perturb:
            cuts = with_perturbed_speed(cuts)
        compute_fbank(cuts, path, args.num_jobs)
        stamp.save(stamp.splits + [split], complete=False)


def write_report(args: argparse.Namespace, corpus: Corpus, stem: Path) -> None:
    paths = {split: cuts_path(args.manifest_dir, args.corpus, split) for split in corpus.by_split}
    report = corpus_report(str(source_of(args)[1]), paths, corpus.files, corpus.faults)
    for ending, text in (
        ("json", json.dumps(report, ensure_ascii=False, indent=1)),
        ("txt", report_text(report)),
    ):
        with whole_file(Path(f"{stem}.{ending}")) as partial:
            partial.write_text(text, "utf-8")


def remove_former_copies(copies: Path, corpus: str) -> None:
    for folder in copies.parent.glob(f"{corpus}_audio-*"):
        if folder != copies and re.fullmatch(rf"{corpus}_audio-[0-9a-f]{{8}}", folder.name):
            shutil.rmtree(folder)


def prepare(args: argparse.Namespace) -> None:
    if not re.fullmatch(r"[\w-]+", args.corpus):
        raise InputError(f"--corpus {args.corpus!r} may have letters, digits, _ and - only")
    stamp = Stamp(args.manifest_dir / f".{args.corpus}.json", source_hash(args))
    files = [cuts_path(args.manifest_dir, args.corpus, split) for split in stamp.splits]
    report = args.manifest_dir / f"{args.corpus}_report"
    if stamp.complete and all(file.is_file() for file in (*files, Path(f"{report}.txt"))):
        logger.info("%s was prepared from the same files with the same flags", args.corpus)
    else:
        copies = args.manifest_dir / f"{args.corpus}_audio-{stamp.source[:8]}"
        corpus = read_with_copies(args, copies)
        if args.speed_perturb and args.train_split not in corpus.by_split:
            logger.warning("no split is called %s: none gets speed copies", args.train_split)
        for split in sorted(set(stamp.former_splits) - set(corpus.by_split)):
            former = cuts_path(args.manifest_dir, args.corpus, split)
            logger.warning("%s was made from other files and is left as it is", former)
        args.manifest_dir.mkdir(parents=True, exist_ok=True)
        prepare_splits(args, corpus.by_split, stamp)
        write_report(args, corpus, report)
        stamp.save(stamp.splits, complete=True)
        remove_former_copies(copies, args.corpus)
    print(Path(f"{report}.txt").read_text("utf-8"), end="")
    logging.info(
        f"Train on it with --manifest-dir {args.manifest_dir} "
        f"--train-cuts {args.corpus}_cuts_train --valid-cuts {args.corpus}_cuts_dev, "
        f"decode with --test-cuts {args.corpus}_cuts_test"
    )


def read_with_copies(args: argparse.Namespace, copies: Path) -> Corpus:
    """As `read_corpus`; no new copies are left where that fails."""
    is_new = not copies.exists()
    try:
        return read_corpus(args, copies)
    except BaseException:
        if is_new:
            shutil.rmtree(copies, ignore_errors=True)
        raise


@in_sentences
def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    torch.set_num_threads(1)
    args = get_parser().parse_args(argv)
    try:
        prepare(args)
    except (InputError, OSError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()

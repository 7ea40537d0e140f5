"""Any corpus given as a table, to cuts and fbank.

  python local/prepare_corpus.py --table corpora/an4/transcripts.tsv --corpus an4 \
    --manifest-dir data/fbank --num-jobs 4

The table is TSV or CSV with a header. Columns are found by name, others are ignored:

  utt_id | id           unique
  text                  as the corpus spells it
  path | audio | wav    mono, any rate and format soundfile reads; relative to the table
  speaker               optional; without it every utterance is its own speaker
  split                 optional; utterances without one are divided by speaker, about 80/10/10

Writes <manifest-dir>/<corpus>_cuts_<split>.jsonl.gz with the features beside it. The train split
also gets copies at 0.9 and 1.1 times the speed. Everything is checked before features are computed:
bad rows are reported together, and left out only with --skip-bad true. A split that was made from
the same table with the same flags is kept.
"""

import argparse
import csv
import hashlib
import importlib.util
import json
import logging
import random
import re
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
from lhotse import (
    AudioSource,
    CutSet,
    MonoCut,
    Recording,
    SupervisionSegment,
    load_manifest_lazy,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from speechllm.features import (
    SAMPLING_RATE,
    compute_fbank,
    cuts_path,
    has_perturbed_speed,
    with_perturbed_speed,
)
from speechllm.flags import str2bool
from speechllm.whole_file import whole_file

COLUMNS = {  # field: accepted names, in order of preference
    "id": ("utt_id", "id"),
    "text": ("text",),
    "path": ("path", "audio", "wav"),
    "speaker": ("speaker",),
    "split": ("split",),
}
OPTIONAL = ("speaker", "split")
HELD_OUT = {"dev": 0.1, "test": 0.1}  # share of the duration, where the table has no splits
SPLIT_SEED = 42
MIN_DURATION = 0.025  # seconds, one fbank window

logger = logging.getLogger(__name__)


@dataclass
class Utterance:
    """One row of the table; the last two are known once the audio was read."""

    id: str
    text: str
    path: Path
    speaker: str
    split: str
    num_samples: int = 0
    sampling_rate: int = 0

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.num_samples / self.sampling_rate


@dataclass(frozen=True)
class BadRow:
    line: int
    id: str
    reason: str  # counted
    detail: str = ""  # this row's value

    def __str__(self) -> str:
        detail = f": {self.detail}" if self.detail else ""
        return f"line {self.line}, {self.id or '(no id)'}: {self.reason}{detail}"


# --- the table ---------------------------------------------------------------------------------


def find_columns(header: list[str], table: Path) -> dict[str, str]:
    """Field -> name of its column.

    Raises:
      ValueError: a needed column is missing.
    """
    found = {
        field: next(name for name in names if name in header)
        for field, names in COLUMNS.items()
        if set(names) & set(header)
    }
    missing = [" or ".join(COLUMNS[f]) for f in COLUMNS if f not in found and f not in OPTIONAL]
    if missing:
        raise ValueError(f"{table} has no column {', '.join(missing)}; it has {', '.join(header)}")
    return found


def read_rows(table: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The header, and every row with the number of its (last) line.

    Raises:
      ValueError: the file is not a table in UTF-8.
    """
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            is_tsv = "\t" in file.readline()
            file.seek(0)
            dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {}
            reader = csv.DictReader(file, restval="", **dialect)
            return reader.fieldnames or [], [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table} is not a TSV or CSV table in UTF-8: {error}") from error


def read_table(table: Path) -> tuple[list[tuple[int, Utterance]], list[BadRow]]:
    """The utterances with their line numbers, and the rows whose cells are wrong."""
    header, rows = read_rows(table)
    columns = find_columns(header, table)
    if "speaker" not in columns:
        logger.info("%s has no column speaker: every utterance is its own speaker", table)
    good, bad, seen = [], [], set()
    for line, row in rows:
        fields = {field: " ".join(row[name].split()) for field, name in columns.items()}
        problem = row_problem(fields, extra=None in row, seen=seen)
        seen.add(fields["id"])
        if problem:
            bad.append(BadRow(line, fields["id"], *problem))
        else:
            good.append((line, to_utterance(fields, row[columns["path"]].strip(), table.parent)))
    return good, bad


def row_problem(fields: dict[str, str], extra: bool, seen: set[str]) -> tuple[str, ...] | None:
    """(reason, value) of what is wrong with a row's text, or None."""
    if extra:
        return ("more cells than the header",)
    for field in ("id", "path", "text", "speaker"):
        if not fields.get(field, "none"):  # an absent column is no empty cell
            return (f"empty {field}",)
    if fields["id"] in seen:
        return ("duplicate id",)
    if not re.fullmatch(r"[\w.-]*", fields.get("split", "")):
        return "split is not usable in a file name", fields["split"]
    return None


def to_utterance(fields: dict[str, str], path: str, base: Path) -> Utterance:
    return Utterance(
        id=fields["id"],
        text=fields["text"],
        path=base / path,
        speaker=fields.get("speaker", fields["id"]),
        split=fields.get("split", ""),
    )


# --- the audio ---------------------------------------------------------------------------------


def read_audio(utterance: Utterance) -> tuple[str, ...] | None:
    """Decode the whole file, set the utterance's samples and rate; (reason, value) if it is bad.

    A header alone does not show that a file was cut short.
    """
    path = utterance.path
    if not path.is_file():
        return "missing audio", str(path)
    try:
        with soundfile.SoundFile(path) as audio:
            expected = audio.frames
            num_samples = sum(len(block) for block in audio.blocks(1 << 18, dtype="float32"))
            channels, rate = audio.channels, audio.samplerate
    except (soundfile.SoundFileError, RuntimeError) as error:
        return "unreadable audio", str(error)
    if channels != 1:
        return "more than one channel", f"{channels} in {path}"
    if num_samples == 0:
        return "zero duration", str(path)
    if num_samples < expected:
        return "unreadable audio", f"{path} ends after {num_samples} of {expected} samples"
    if num_samples / rate < MIN_DURATION:
        return "shorter than 25 ms", f"{num_samples} samples at {rate} Hz in {path}"
    utterance.num_samples, utterance.sampling_rate = num_samples, rate
    return None


def check_audio(
    rows: list[tuple[int, Utterance]], num_jobs: int
) -> tuple[list[Utterance], list[BadRow]]:
    with ThreadPoolExecutor(num_jobs) as executor:  # soundfile decodes outside Python's lock
        problems = list(executor.map(lambda row: read_audio(row[1]), rows))
    pairs = list(zip(rows, problems, strict=True))
    good = [utterance for (_, utterance), problem in pairs if not problem]
    bad = [BadRow(line, utt.id, *problem) for (line, utt), problem in pairs if problem]
    return good, bad


def require_resampler(utterances: list[Utterance]) -> None:
    """lhotse resamples with torchaudio or scipy and declares neither."""
    other = next((u for u in utterances if u.sampling_rate != SAMPLING_RATE), None)
    if other is None or any(map(importlib.util.find_spec, ("torchaudio", "scipy"))):
        return
    raise ValueError(
        f"{other.path} ({other.id}) is at {other.sampling_rate} Hz; resampling it to "
        f"{SAMPLING_RATE} Hz needs scipy: pip install scipy"
    )


# --- splits ------------------------------------------------------------------------------------


def assign_splits(utterances: list[Utterance], train_split: str) -> None:
    """Give a split to the utterances that have none: no speaker gets into two splits.

    A speaker with a split in the table keeps it.
    """
    split_of = {u.speaker: u.split for u in utterances if u.split}
    without = [u for u in utterances if not u.split]
    seconds = defaultdict(float)
    for utterance in without:
        if utterance.speaker not in split_of:
            seconds[utterance.speaker] += utterance.duration
    split_of |= divide_speakers(seconds, train_split)
    for utterance in without:
        utterance.split = split_of[utterance.speaker]
    if without:
        logger.info(
            "%d utterances had no split: divided by speaker into %s",
            len(without),
            ", ".join(sorted({u.split for u in without})),
        )


def divide_speakers(seconds: dict[str, float], train_split: str) -> dict[str, str]:
    """Speaker -> split, by duration; a random draw that is the same every time."""
    speakers = sorted(seconds)
    random.Random(SPLIT_SEED).shuffle(speakers)
    split_of = dict.fromkeys(speakers, train_split)
    room = {split: share * sum(seconds.values()) for split, share in HELD_OUT.items()}
    for speaker in speakers:
        split = max(room, key=room.get)
        if seconds[speaker] <= room[split]:
            split_of[speaker] = split
            room[split] -= seconds[speaker]
    for split in HELD_OUT:  # few speakers: each has more than the share, so take the shortest
        left = [speaker for speaker in speakers if split_of[speaker] == train_split]
        if split not in split_of.values() and len(left) > 1:
            split_of[min(left, key=seconds.get)] = split
    return split_of


# --- cuts --------------------------------------------------------------------------------------


def to_cut(utterance: Utterance) -> MonoCut:
    recording = Recording(
        id=utterance.id,
        sources=[AudioSource("file", channels=[0], source=str(utterance.path))],
        sampling_rate=utterance.sampling_rate,
        num_samples=utterance.num_samples,
        duration=utterance.duration,
    ).resample(SAMPLING_RATE)
    supervision = SupervisionSegment(
        id=utterance.id,
        recording_id=utterance.id,
        start=0.0,
        duration=recording.duration,
        text=utterance.text,
        speaker=utterance.speaker,
    )
    return MonoCut(
        id=utterance.id,
        start=0.0,
        duration=recording.duration,
        channel=0,
        recording=recording,
        supervisions=[supervision],
    )


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


def prepare_splits(args: argparse.Namespace, by_split: dict[str, list], stamp: Stamp) -> None:
    done = [s for s in stamp.splits if cuts_path(args.manifest_dir, args.corpus, s).is_file()]
    stamp.save(done, complete=False)
    for split, utterances in by_split.items():
        path = cuts_path(args.manifest_dir, args.corpus, split)
        if split in done:
            logger.info("%s exists, made from the same table", path)
            continue
        cuts = CutSet.from_cuts(map(to_cut, utterances))
        if split == args.train_split and args.speed_perturb:
            cuts = with_perturbed_speed(cuts)
        compute_fbank(cuts, path, args.num_jobs)
        stamp.save(stamp.splits + [split], complete=False)
    stamp.save(stamp.splits, complete=True)


# --- report ------------------------------------------------------------------------------------


def report_bad(bad: list[BadRow], skip: bool) -> None:
    """Raises ValueError with all bad rows, or counts what is left out."""
    counts = ", ".join(f"{n} {reason}" for reason, n in Counter(b.reason for b in bad).items())
    rows = "\n".join(f"  {row}" for row in sorted(bad, key=lambda b: b.line))
    if bad and not skip:
        raise ValueError(
            f"{len(bad)} bad rows ({counts}):\n{rows}\n--skip-bad true leaves them out"
        )
    if bad:
        logger.warning("left out %d bad rows (%s):\n%s", len(bad), counts, rows)


def report_splits(manifest_dir: Path, corpus: str, splits: list[str]) -> None:
    """Print utterances, hours and speakers per split; warn of speakers in more than one."""
    splits_of = defaultdict(set)
    print(f"{'split':<12} {'utterances':>10} {'hours':>8} {'speakers':>8}  with speed copies")
    for split in splits:
        cuts = load_manifest_lazy(cuts_path(manifest_dir, corpus, split))
        counts, seconds, speakers = Counter(), Counter(), set()
        for cut in cuts:
            is_copy = has_perturbed_speed(cut)
            counts[is_copy] += 1
            seconds[is_copy] += cut.duration
            speakers.add(cut.supervisions[0].speaker)
        for speaker in speakers:
            splits_of[speaker].add(split)
        print(
            f"{split:<12} {counts[False]:>10} {seconds[False] / 3600:>8.2f} {len(speakers):>8}"
            f"  {counts.total()} cuts, {seconds.total() / 3600:.2f} hours"
        )
    warn_of_shared_speakers(splits_of)


def warn_of_shared_speakers(splits_of: dict[str, set[str]]) -> None:
    shared = [f"{who} ({', '.join(sorted(s))})" for who, s in splits_of.items() if len(s) > 1]
    if shared:
        logger.warning("%d speakers are in several splits: %s", len(shared), "; ".join(shared[:10]))


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, required=True, help="TSV or CSV with a header")
    parser.add_argument("--corpus", required=True, help="name of the corpus in file names")
    parser.add_argument("--manifest-dir", type=Path, default=Path("data/fbank"))
    parser.add_argument("--train-split", default="train", help="its name in the table")
    parser.add_argument(
        "--speed-perturb", type=str2bool, default=True, help="0.9 and 1.1 copies of the train split"
    )
    parser.add_argument(
        "--skip-bad", type=str2bool, default=False, help="leave bad rows out instead of stopping"
    )
    parser.add_argument("--num-jobs", type=int, default=4, help="processes computing features")
    return parser


def source_hash(args: argparse.Namespace) -> str:
    flags = [str(args.table.parent), args.train_split, args.speed_perturb, args.skip_bad]
    return hashlib.sha256(json.dumps(flags).encode() + args.table.read_bytes()).hexdigest()


def read_corpus(args: argparse.Namespace) -> list[Utterance]:
    """The utterances of the table, all with audio and a split.

    Raises:
      ValueError: with every bad row, or for a table that has no good one.
    """
    rows, bad = read_table(args.table)
    utterances, bad_audio = check_audio(rows, args.num_jobs)
    report_bad(bad + bad_audio, args.skip_bad)
    if not utterances:
        raise ValueError(f"{args.table} has no usable row")
    require_resampler(utterances)
    assign_splits(utterances, args.train_split)
    return utterances


def prepare(args: argparse.Namespace) -> None:
    if not re.fullmatch(r"[\w-]+", args.corpus):
        raise ValueError(f"--corpus {args.corpus!r} may have letters, digits, _ and - only")
    stamp = Stamp(args.manifest_dir / f".{args.corpus}.json", source_hash(args))
    files = [cuts_path(args.manifest_dir, args.corpus, split) for split in stamp.splits]
    if stamp.complete and all(file.is_file() for file in files):
        logger.info("%s was prepared from %s with the same flags", args.corpus, args.table)
        return report_splits(args.manifest_dir, args.corpus, stamp.splits)
    by_split = defaultdict(list)
    for utterance in read_corpus(args):
        by_split[utterance.split].append(utterance)
    if args.speed_perturb and args.train_split not in by_split:
        logger.warning("no split is called %s: none gets speed copies", args.train_split)
    for split in sorted(set(stamp.former_splits) - set(by_split)):
        former = cuts_path(args.manifest_dir, args.corpus, split)
        logger.warning("%s was made from another table and is left as it is", former)
    args.manifest_dir.mkdir(parents=True, exist_ok=True)
    prepare_splits(args, by_split, stamp)
    report_splits(args.manifest_dir, args.corpus, list(by_split))


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    torch.set_num_threads(1)
    args = get_parser().parse_args(argv)
    try:
        prepare(args)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()

"""PrepareConfig: the corpus that `local/prepare_corpus.py` prepares, and its options."""

import re
from dataclasses import dataclass
from pathlib import Path

from speechllm.cli import check_range, option
from speechllm.errors import InputError

SOURCES = ("table", "folder", "kaldi", "huggingface", "lhotse")
FOLDERS = ("folder", "kaldi", "huggingface")
LAYOUTS = (
    "librispeech", "common-voice", "aishell", "mls", "ljspeech", "vctk", "tedlium", "voxpopuli",
    "kaldi", "huggingface", "lhotse", "table", "folder",
)  # fmt: skip
MIX = "mix"  # value of --channel
SIDES = {"A": 1, "B": 2}  # channel names in telephone corpora


@dataclass(frozen=True)
class PrepareConfig:
    """Options of prepare_corpus.py; invalid values raise InputError or FileNotFoundError."""

    source: str  # one of SOURCES
    path: Path
    corpus: str = option("", "name of the corpus in file names")
    manifest_dir: Path = option(Path("data/fbank"), "output directory for cut files")
    split: str = option("", "assign all utterances to this split, and add it to the corpus")
    layout: str = option(
        "auto", "layout of --folder: auto (recognized by its files), " + ", ".join(LAYOUTS)
        + ", or the name of a lhotse recipe, such as thchs_30",
    )  # fmt: skip
    audio_dir: Path | None = option(None, "audio folder for --table, if not the table's folder")
    text_column: str | None = option(None, "name of the text column", unset="by name")
    path_column: str | None = option(None, "name of the audio path column", unset="by name")
    drop_tags: bool = option(False, "remove tags such as <NOISE> and [music] within texts")
    overwrite: bool = option(False, "replace splits that were made from other files or flags")
    language: str | None = option(
        None, "language of utterances for which the corpus has none, such as en; languages "
        "without spaces (zh, ja, th, …) are scored by characters",
    )  # fmt: skip
    channel: str | None = option(
        None, "channel of multi-channel files, unless the corpus specifies it: 1, 2, …, A, B or "
        "mix (the mean)",
    )  # fmt: skip
    speed_perturb: bool = option(True, "add copies at speed 0.9 and 1.1 to the training split")
    skip_invalid: bool = option(False, "skip invalid utterances instead of stopping")
    num_jobs: int = option(4, "processes that compute features")

    def __post_init__(self):
        check_range("num_jobs", self.num_jobs, 1)
        if not re.fullmatch(r"[\w-]+", self.corpus):
            raise InputError(f"--corpus {self.corpus!r} may have letters, digits, _ and - only")
        if not re.fullmatch(r"[\w.-]*", self.split):
            raise InputError(f"--split {self.split!r} cannot be part of a file name")
        if self.audio_dir and not self.audio_dir.is_dir():
            raise InputError(f"--audio-dir {self.audio_dir} is not a directory")
        try:
            self.channel_index
        except ValueError:
            allowed = f"1, 2, …, A, B or {MIX}"
            raise InputError(f"--channel {self.channel!r}: expected {allowed}") from None
        if not self.path.exists():
            raise FileNotFoundError(f"--{self.source} {self.path} does not exist")
        if self.source in FOLDERS and not self.path.is_dir():
            raise InputError(f"--{self.source} {self.path} is not a directory")

    @property
    def channel_index(self) -> int | None:
        """0-based channel index, 0 for the mean; None if not set."""
        if self.channel == MIX:
            return 0
        return None if self.channel is None else channel_number(self.channel or "0")


def channel_number(text: str) -> int | None:
    """Parse `1` or `A` as 0, the first channel, and "" as None; else raise ValueError."""
    if not text:
        return None
    number = SIDES.get(text) or (int(text) if re.fullmatch(r"[0-9]{1,3}", text) else 0)
    if number < 1:
        raise ValueError(f"channel {text!r}: expected 1, 2, …, A or B")
    return number - 1

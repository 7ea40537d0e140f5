"""Download the recipe's models from Hugging Face or a mirror; download_models.sh calls it.

  python local/fetch.py --mirror https://hf-mirror.com llm encoder

Every file is checked against the size and hash in the mirror's own listing of the repository. A
download that was cut off goes on where it stopped (FILE.part); a file has its final name only once
its hash was right. What is already there and right is kept.
"""

import hashlib
import http.client
import json
import logging
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from speechllm.errors import in_sentences, without_secrets
from speechllm.flags import Parser

HUGGING_FACE = "https://huggingface.co"
REPOSITORY = Path(__file__).resolve().parents[1]
TIMEOUT = 30  # seconds without an answer
ATTEMPTS = 5  # in a row that bring nothing new
PAUSE = 2  # seconds, times the failures in a row
CHUNK = 1 << 20  # bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Download:
    repo: str
    file: str  # path in the repo
    dest: str  # relative to this repository


LLM = [
    Download("Qwen/Qwen2-1.5B-Instruct", name, f"models/qwen2-1.5b-instruct/{name}")
    for name in (
        "LICENSE",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    )
]
ENCODER_REPOS = {
    "transducer_large": "Zengwei/icefall-asr-librispeech-zipformer-large-2023-05-16",
    "aed_crctc_large": "Zengwei/icefall-asr-librispeech-zipformer-large-cr-ctc-aed-20241020",
    "crctc_large": "Zengwei/icefall-asr-librispeech-zipformer-large-cr-ctc-20241018",
    "transducer_crctc_large": (
        "Zengwei/icefall-asr-librispeech-zipformer-large-transducer-with-CR-CTC-20241019"
    ),
}
ENCODERS = {
    name: Download(repo, "exp/pretrained.pt", f"models/zipformer/librispeech/{name}/pretrained.pt")
    for name, repo in ENCODER_REPOS.items()
}
BPE = Download(
    ENCODER_REPOS["transducer_crctc_large"],
    "data/lang_bpe_500/bpe.model",
    "models/zipformer/librispeech/bpe.model",
)
CHECKPOINTS = {
    name: Download(f"zhu-han/{name}", "epoch-10-avg-5.pt", f"exp/{name}/epoch-10-avg-5.pt")
    for name in (
        "asr_librispeech_zipformer_qwen2_1.5B",
        "asr_librispeech_zipformer_mose_qwen2_1.5B",
    )
}
GROUPS = {
    "llm": LLM,
    "encoder": [ENCODERS["transducer_crctc_large"], BPE],
    "encoders": [*ENCODERS.values(), BPE],
    "baseline": [CHECKPOINTS["asr_librispeech_zipformer_qwen2_1.5B"]],
    "mose": [CHECKPOINTS["asr_librispeech_zipformer_mose_qwen2_1.5B"]],
}
GROUPS["all"] = [*LLM, *GROUPS["encoders"], *CHECKPOINTS.values()]


@dataclass(frozen=True)
class Record:
    """What the mirror says of one file."""

    url: str
    size: int  # bytes
    sha256: str = ""  # of large files (LFS)
    git_sha1: str = ""  # of small ones, of "blob <size>\0" + content

    def matches(self, path: Path) -> bool:
        if path.stat().st_size != self.size:
            return False
        if self.sha256:
            return file_hash(path, hashlib.sha256()) == self.sha256
        return file_hash(path, hashlib.sha1(b"blob %d\0" % self.size)) == self.git_sha1


class MirrorError(Exception):
    """The mirror does not answer, or not with what was asked for."""


def file_hash(path: Path, digest: "hashlib._Hash") -> str:
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def open_url(url: str, start: int = 0) -> http.client.HTTPResponse:
    """The answer from byte `start` on, if the server can do that (status 206).

    Raises:
      MirrorError: no answer, or a refusal.
    """
    headers = {"User-Agent": "speechllm"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        raise MirrorError(f"{url} answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise MirrorError(f"{url}: {getattr(error, 'reason', error)}") from error


def list_repo(mirror: str, repo: str) -> list[dict]:
    """Path, size and hash of every file of a repository, in Hugging Face's JSON."""
    url = f"{mirror}/api/models/{repo}/tree/main?recursive=true"
    try:
        with open_url(url) as answer:
            listing = json.load(answer)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise MirrorError(f"{url}: {error}") from error
    if not isinstance(listing, list):
        raise MirrorError(f"{url} answers something that is no list of files")
    return listing


def find_record(mirror: str, download: Download, listing: list[dict]) -> Record:
    """What the listing says of one file. Of the names in it none is used for a file here.

    Raises:
      ValueError: the file is not listed.
      MirrorError: the listing is not as Hugging Face's.
    """
    url = f"{mirror}/{download.repo}/resolve/main/{quote(download.file)}"
    try:
        entries = {entry["path"]: entry for entry in listing}
        if download.file in entries:
            entry = entries[download.file]
            if lfs := entry.get("lfs"):
                return Record(url, int(lfs["size"]), sha256=lfs["oid"])
            return Record(url, int(entry["size"]), git_sha1=entry["oid"])
        there = ", ".join(entries)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MirrorError(f"{url} is not listed as Hugging Face lists files: {error!r}") from error
    raise ValueError(f"{mirror}/{download.repo} has no file {download.file}; it has {there}")


def fetch(record: Record, dest: Path) -> None:
    """Download to `dest`, going on with what `dest`.part has.

    Raises:
      ValueError: what came is not what the mirror's listing says; it is removed.
      MirrorError: the connection broke too often; the .part stays for the next time.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    part = dest.with_name(f"{dest.name}.part")
    if part.exists() and part.stat().st_size > record.size:
        part.unlink()
    with tqdm(total=record.size, unit="B", unit_scale=True, desc=dest.name) as progress:
        receive_all(record, part, progress)
    if not record.matches(part):
        part.unlink()
        raise ValueError(
            f"{record.url} has another size or hash than the mirror's listing says: removed"
        )
    os.replace(part, dest)


def receive_all(record: Record, part: Path, progress: tqdm) -> None:
    part.touch()
    failures = 0
    while (before := part.stat().st_size) < record.size:
        problem = receive(record, part, progress)
        failures = 0 if part.stat().st_size > before else failures + 1
        if failures == ATTEMPTS:
            raise MirrorError(problem)
        time.sleep(failures * PAUSE)


def receive(record: Record, part: Path, progress: tqdm) -> str:
    """Append to `part` until the connection ends; why it ended.

    A server that cannot go on in the middle makes it start anew.
    """
    start = part.stat().st_size
    try:
        with open_url(record.url, start) as answer, open(part, "ab") as file:
            if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
                file.truncate(0)
            while file.tell() <= record.size and (block := answer.read(CHUNK)):
                file.write(block)
                progress.update(file.tell() - progress.n)
    except MirrorError as error:
        return str(error)
    except (OSError, http.client.HTTPException) as error:
        return f"{record.url}: {error}"
    return f"{record.url} ended early"


def fetch_all(mirror: str, downloads: list[Download], root: Path) -> None:
    listings = {repo: list_repo(mirror, repo) for repo in {d.repo: None for d in downloads}}
    to_do = []
    for download in downloads:
        record, dest = find_record(mirror, download, listings[download.repo]), root / download.dest
        if not dest.exists():
            to_do.append((record, dest))
        elif record.matches(dest):
            logger.info("%s is there, hash checked", dest)
        else:
            raise ValueError(
                f"{dest} is not {record.url}: move it away to download that, or leave it out"
            )
    require_space(to_do, root)
    for record, dest in to_do:
        fetch(record, dest)
        logger.info("%s: %d bytes, hash checked", dest, record.size)


def require_space(to_do: list[tuple[Record, Path]], root: Path) -> None:
    parts = [dest.with_name(f"{dest.name}.part") for _, dest in to_do]
    have = sum(part.stat().st_size for part in parts if part.exists())
    need, free = sum(record.size for record, _ in to_do) - have, shutil.disk_usage(root).free
    if need > free:
        raise ValueError(f"{need / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free in {root}")


def by_hand(mirror: str, downloads: list[Download], root: Path) -> str:
    files = "; ".join(f"{mirror}/{d.repo}/resolve/main/{d.file} to {d.dest}" for d in downloads)
    return (
        "Try another mirror (--mirror https://hf-mirror.com), run this again to go on where it "
        f"stopped, or fetch these on a machine with internet and put them into {root}: {files}"
    )


@in_sentences
def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    parser = Parser(__doc__)
    parser.add_argument("groups", nargs="+", choices=GROUPS, metavar="GROUP", help=" ".join(GROUPS))
    parser.add_argument("--mirror", default=HUGGING_FACE, help=f"instead of {HUGGING_FACE}")
    parser.add_argument(
        "--root", type=Path, default=REPOSITORY, help="where models/ and exp/ are, or will be"
    )
    args = parser.parse_args(argv)
    mirror = args.mirror.rstrip("/")
    downloads = list({d: None for group in args.groups for d in GROUPS[group]})
    try:
        fetch_all(mirror, downloads, args.root)
    except MirrorError as error:
        advice = by_hand(mirror, downloads, args.root)
        raise SystemExit(without_secrets(f"{error}. {advice}")) from None
    except (ValueError, OSError) as error:
        raise SystemExit(without_secrets(error)) from None


if __name__ == "__main__":
    main()

"""Download the recipe's models from Hugging Face or a mirror; called by download_models.sh.

  python local/fetch.py --mirror https://hf-mirror.com llm encoder

Interrupted downloads (FILE.part) resume. A file is given its final name only if its size and hash
match those published by the mirror; existing files that match are kept.
"""

import hashlib
import os
from pathlib import Path

import _path  # noqa: F401

from speechllm.cli import Parser
from speechllm.errors import InputError, exit_on_user_error, first_line, redact_secrets
from speechllm.models.config import MODEL_FILE, MOSE, ONE_ENCODER, save_model_config

ROOT = Path(__file__).resolve().parents[1]
LLM_FILES = (
    "LICENSE", "config.json", "generation_config.json", "merges.txt", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "vocab.json",
)  # fmt: skip
LLM = {f"models/qwen2-1.5b-instruct/{name}": ("Qwen/Qwen2-1.5B-Instruct", name)
       for name in LLM_FILES}  # fmt: skip
ZIPFORMER = "models/zipformer/librispeech"
ICEFALL = "Zengwei/icefall-asr-librispeech-zipformer-large"
ENCODERS = {
    f"{ZIPFORMER}/{name}/pretrained.pt": (f"{ICEFALL}-{repo}", "exp/pretrained.pt")
    for name, repo in (
        ("transducer_large", "2023-05-16"),
        ("aed_crctc_large", "cr-ctc-aed-20241020"),
        ("crctc_large", "cr-ctc-20241018"),
        ("transducer_crctc_large", "transducer-with-CR-CTC-20241019"),
    )
}
ENCODER = f"{ZIPFORMER}/transducer_crctc_large/pretrained.pt"
BPE = {f"{ZIPFORMER}/bpe.model": (ENCODERS[ENCODER][0], "data/lang_bpe_500/bpe.model")}
BASELINE, MOSE_EXP = (
    {f"exp/{name}/epoch-10-avg-5.pt": (f"zhu-han/{name}", "epoch-10-avg-5.pt")}
    for name in (f"asr_librispeech_zipformer_{kind}qwen2_1.5B" for kind in ("", "mose_"))
)
GROUPS = {  # file under the root: repository, file in the repository
    "llm": LLM,
    "encoder": {ENCODER: ENCODERS[ENCODER], **BPE},
    "encoders": ENCODERS | BPE,
    "baseline": BASELINE,
    "mose": MOSE_EXP,
    "all": LLM | ENCODERS | BPE | BASELINE | MOSE_EXP,
}


def matches(path: Path, size: int, etag: str) -> bool:
    """Return true if size and hash match: SHA-256 for large files, git's SHA-1 for others."""
    if path.stat().st_size != size:
        return False
    with open(path, "rb") as content:
        if len(etag) == 64:
            return hashlib.file_digest(content, "sha256").hexdigest() == etag
        return hashlib.sha1(b"blob %d\0" % size + content.read()).hexdigest() == etag


def fetch(url: str, size: int, etag: str, dest: Path) -> None:
    """Download to `dest`, resuming from `dest`.part; raise InputError for a wrong size or hash."""
    from huggingface_hub.file_download import http_get  # hf_hub_download cannot resume after a kill

    part = dest.with_name(f"{dest.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab") as to:
        if to.tell() < size:
            http_get(url, to, resume_size=to.tell(), expected_size=size)
    if not matches(part, size, etag):
        part.unlink()
        raise InputError(f"{url}: size or hash differs from the published one; file removed")
    os.replace(part, dest)
    print(f"{dest}: {size} bytes, hash checked")


def fetch_all(mirror: str, files: dict[str, tuple[str, str]], root: Path) -> None:
    """Download missing files to `root`; raise InputError if a different file exists there."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    missing = []
    for name, (repo, file) in files.items():
        dest, url = root / name, hf_hub_url(repo, file, endpoint=mirror)
        found = get_hf_file_metadata(url, token=False)
        if not dest.exists():
            missing.append((url, found.size, found.etag, dest))
        elif not matches(dest, found.size, found.etag):
            raise InputError(
                f"{dest} differs from {url}: move it away to download that, or omit its group"
            )
    for one in missing:
        fetch(*one)
    for name in {**BASELINE, **MOSE_EXP}.keys() & files.keys():  # then --exp-dir suffices
        folder = (root / name).parent
        if not (folder / MODEL_FILE).exists():
            save_model_config(MOSE if name in MOSE_EXP else ONE_ENCODER, folder)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("groups", nargs="+", choices=GROUPS, metavar="GROUP", help=" ".join(GROUPS))
    add("--mirror", default=os.environ.get("HF_ENDPOINT", "https://huggingface.co"),
        help="base URL to download from; by default HF_ENDPOINT or huggingface.co")  # fmt: skip
    add("--root", type=Path, default=ROOT, help="directory that contains models/ and exp/")
    args = parser.parse_args(argv)
    mirror, files = args.mirror.rstrip("/"), {}
    for group in args.groups:
        files |= GROUPS[group]
    try:
        fetch_all(mirror, files, args.root)
    except InputError:
        raise
    except Exception as error:  # connection, HTTP or invalid-response errors, a full disk
        by_hand = "; ".join(f"{mirror}/{repo}/resolve/main/{file} to {name}"
                            for name, (repo, file) in files.items())  # fmt: skip
        raise SystemExit(redact_secrets(
            f"download from {mirror} failed: {first_line(error)}. Try another mirror (--mirror "
            "https://hf-mirror.com), run this again to resume, or fetch these on a machine with "
            f"internet access and put them into {args.root}: {by_hand}"
        )) from None  # fmt: skip


if __name__ == "__main__":
    main()

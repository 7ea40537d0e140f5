"""Content hashes that identify encoders and LLMs independently of their paths."""

import hashlib
from functools import cache
from pathlib import Path

from speechllm.cli import comma_list


@cache
def content_hash(path: str) -> str:
    """Return 16 hexadecimal digits for a file or a directory's weights; "" if it is missing.

    For a Hugging Face hub name, the downloaded copy is hashed.
    """
    found = Path(path)
    if not found.exists() and path.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(path, "config.json")
        found = Path(config).parent if isinstance(config, str) else found
    files = sorted(found.glob("*.safetensors")) if found.is_dir() else [found]
    if not files or not all(file.is_file() for file in files):
        return ""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def content_hashes(paths: str) -> str:
    """Return comma-separated hashes of comma-separated paths; "" if a path is missing."""
    hashes = [content_hash(path) for path in comma_list(paths)]
    return ",".join(hashes) if all(hashes) else ""

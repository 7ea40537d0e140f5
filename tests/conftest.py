"""Makes src/ and local/ importable, and says where the shared material is."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
for folder in ("src", "local"):
    sys.path.insert(0, str(ROOT / folder))

SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with goldens, corpora and the Qwen2 tokenizer."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    return SHARED

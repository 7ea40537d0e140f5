"""Golden files: values of the published implementation, in tests/goldens or ../shared/goldens."""

from pathlib import Path

import pytest

GOLDENS = Path(__file__).parent / "goldens"
SHARED_GOLDENS = Path(__file__).resolve().parents[2] / "shared" / "goldens"


def golden_path(name: str) -> Path:
    """Return the path of a golden file; skip the test if neither folder has it."""
    for folder in (GOLDENS, SHARED_GOLDENS):
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"{name} is neither in {GOLDENS} nor in {SHARED_GOLDENS}")

"""Make `speechllm` importable for the programs in this folder, which import this module first."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

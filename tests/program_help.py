"""The --help of all Python programs, and the heavy libraries that each imports for it."""

import contextlib
import functools
import io
import json
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [ROOT / folder for folder in ("src", "local", "tests/benchmarks", "tests")]
HEAVY = {"torch", "lhotse", "transformers", "peft", "matplotlib", "uvicorn", "fastapi"}


def programs() -> list[str]:
    """Return the paths of all programs with flags, relative to the root."""
    paths = [path for folder in FOLDERS[:-1] for path in sorted(folder.glob("*.py"))]
    paths += [ROOT / "tests/provoke.py", ROOT / "tests/soak.py"]
    return [str(p.relative_to(ROOT)) for p in paths if '__name__ == "__main__"' in p.read_text()]


@functools.cache
def helps() -> dict[str, dict]:
    """Return `help` and `heavy` of each program, all run in one other process."""
    process = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout)


def run_help(program: str) -> dict:
    before, shown = set(sys.modules), io.StringIO()
    sys.argv = [program, "--help"]
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / program), run_name="__main__")
    return {"help": shown.getvalue(), "heavy": sorted(HEAVY & (set(sys.modules) - before))}


if __name__ == "__main__":
    sys.path[:0] = map(str, FOLDERS)
    print(json.dumps({program: run_help(program) for program in programs()}))

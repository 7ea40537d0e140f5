"""READMEs: commands name programs and flags that exist, links lead somewhere."""

import functools
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from program_help import helps

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", *sorted(ROOT.glob("[a-z]*/README.md"))]
PROGRAM = re.compile(r"(src|local|tests)/[\w/]+\.(py|sh|sbatch)")
BLOCK = re.compile(r"^ *```bash\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(?:#([\w-]+))?\)")
PASSES_ON = {"local/train.sbatch": "src/train.py"}  # programs that pass their arguments on
PYTEST = "local/test.sh"  # its arguments are pytest's


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(readme: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each command in the code blocks as program and flags, `--` separating two programs."""
    for block in BLOCK.findall(readme.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            programs = [k for k, word in enumerate(words) if PROGRAM.fullmatch(word)]
            if programs:
                flags = [word.partition("=")[0] for word in words[programs[0] :]]
                yield flags[0], [flag for flag in flags if flag.startswith("--")]


@functools.cache
def flags_of(program: str) -> set[str]:
    """Read the flags of a program from its --help."""
    program = PASSES_ON.get(program, program)
    if program.endswith(".py"):
        shown = helps()[program]["help"]
    else:
        command = ["bash", program, "--help"]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    return set(re.findall(r"--[a-z][\w-]*", shown))


@pytest.mark.parametrize("readme", READMES, ids=relative)
def test_commands_use_existing_programs_and_flags(readme):
    for program, flags in commands(readme):
        assert (ROOT / program).is_file(), program
        if program != PYTEST:
            own, _, for_decoding = " ".join(flags).partition("-- ")
            assert set(own.split()) <= flags_of(program), program
            assert set(for_decoding.split()) <= flags_of("src/decode.py"), program


@pytest.mark.parametrize("readme", READMES, ids=relative)
def test_links_lead_to_existing_files_and_headings(readme):
    for target, heading in LINK.findall(readme.read_text(encoding="utf-8")):
        path = (readme.parent / target).resolve()
        assert path.exists() and path.is_relative_to(ROOT), target
        if heading:
            titles = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
            assert heading in anchors, f"{target}#{heading}"

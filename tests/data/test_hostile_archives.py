"""Archives that would write outside their folder are rejected, and nothing is written."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

PREPARE = Path(__file__).resolve().parents[2] / "local" / "prepare.sh"
CLI = "import sys, tarfile\ndef cli():\n    tarfile.open(sys.argv[1]).extractall(sys.argv[2])\n"


def hostile_members(outside: Path) -> dict[str, list[tarfile.TarInfo]]:
    def member(name, kind=tarfile.REGTYPE, link=""):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        return info

    return {
        "parent": [member("../../outside/x")],
        "absolute": [member(f"{outside}/x")],
        "through a link": [member("a", tarfile.SYMTYPE, str(outside)), member("a/x")],
        "hard link": [member("x", tarfile.LNKTYPE, "../../outside/secret")],
        "device": [member("x", tarfile.CHRTYPE)],
    }


@pytest.mark.parametrize("attack", hostile_members(Path("x")))
def test_prepare_sh_rejects_the_archive(attack, tmp_path):
    """prepare.sh downloads with lhotse; here a stub that unpacks the given archive."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for info in hostile_members(outside)[attack]:
            tar.addfile(info)
    package = tmp_path / "packages" / "lhotse" / "bin"
    package.mkdir(parents=True)
    (package / "lhotse.py").write_text(CLI)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    definition = f"eval \"$(sed -n '/^lhotse() {{/,/^}}/p' '{PREPARE}')\""
    target = tmp_path / "dl" / "in"
    target.mkdir(parents=True)
    command = f"python='{sys.executable}'; {definition}; lhotse '{tmp_path}/x.tar' '{target}'"
    env = os.environ | {"PYTHONPATH": str(tmp_path / "packages")}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
    inside = [path for path in target.rglob("*") if path.is_file() and not path.is_symlink()]
    if attack == "absolute":  # its root is the folder
        assert done.returncode == 0 and [path.name for path in inside] == ["x"]
    else:
        assert done.returncode == 1 and "tarfile." in done.stderr and not inside
    assert os.listdir(outside) == ["secret"]

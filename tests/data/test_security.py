"""Manifests and shards that would execute code are rejected, and nothing is executed.

The commands create a folder, the canary. A test first shows that lhotse alone would execute them.
"""

import gzip
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import compute_fbank
import pytest
import validate_manifest
from hostile_cuts import cut_of, hostile_cuts, recording, write_lines
from lhotse import CutSet, load_manifest
from runs_code import was_executed

from speechllm.data import features
from speechllm.data.length_limits import Limits
from speechllm.data.manifests import cuts_within, read_cuts, scan_manifests
from speechllm.data.security import check_safe
from speechllm.data.shar import check_shards, read_shards
from speechllm.errors import InputError


@pytest.fixture(params=hostile_cuts(Path("x")))
def hostile_manifest(request, canary, tmp_path):
    """A cut file with an attack, and the error message."""
    cut, reason = hostile_cuts(canary)[request.param]
    path = write_lines(tmp_path / "hostile_cuts.jsonl.gz", [cut])
    return path, f"cut cut-7 is rejected: {reason}"


@pytest.mark.parametrize("attack", ["command", "shell in a name", "features of a pipe"])
def test_lhotse_alone_executes_the_attack(canary, attack):
    cut, _ = hostile_cuts(canary)[attack]
    [cut] = CutSet.from_dicts([cut])
    with pytest.raises(Exception):  # noqa: B017 (the command returns no audio)
        cut.load_features() if cut.has_features else cut.load_audio()
    assert was_executed(canary)


def test_every_reader_rejects_the_attack(hostile_manifest, tmp_path):
    path, message = hostile_manifest
    for read in (
        lambda: list(read_cuts(path)),
        lambda: list(cuts_within([path], Limits(min_frames=0))),
        lambda: scan_manifests([path], need_features=False),
        lambda: features.compute_fbank(load_manifest(path), tmp_path / "out_cuts.jsonl.gz"),
    ):
        with pytest.raises(InputError) as error:
            read()
        assert message in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == [path.name]


def test_harmless_cuts_pass(tiny_corpus, tmp_path):
    for cut in load_manifest(tiny_corpus / "tiny_cuts_train.jsonl.gz"):
        assert check_safe(cut) is cut
    source = "{}://bucket/a b; c.flac"
    for scheme in ("s3", "https", "gs"):
        [cut] = CutSet.from_dicts([cut_of(recording=recording("url", source.format(scheme)))])
        assert check_safe(cut) is cut
    [cut] = CutSet.from_dicts([cut_of(recording=recording("file", "a/b_1.sph"))])
    assert check_safe(cut) is cut


@pytest.mark.parametrize("flag", ["--train-cuts", "--valid-cuts", "musan", "--test-cuts"])
def test_programs_reject_the_attack(
    flag, tiny_argv, tiny_corpus, tmp_path, canary, restore_logging
):
    import decode
    import train

    corpus = shutil.copytree(tiny_corpus, tmp_path / "corpus")
    name = "musan_cuts" if flag == "musan" else "hostile_cuts"
    write_lines(corpus / f"{name}.jsonl.gz", [hostile_cuts(canary)["command"][0]])
    program = train.main
    argv = [*tiny_argv(), "--exp-dir", str(tmp_path / "exp"), "--manifest-dir", str(corpus)]
    if flag == "--test-cuts":
        program, argv = decode.main, [*argv, flag, name, "--checkpoint", "x.pt"]
    else:
        names = {"--train-cuts": "tiny_cuts_train", "--valid-cuts": "tiny_cuts_dev", flag: name}
        names["--enable-musan"] = str(names.pop("musan", None) is not None)
        argv += ["--on-the-fly-feats", "true", *(word for pair in names.items() for word in pair)]
    with pytest.raises(SystemExit, match="cut cut-7 is rejected: its audio comes from a command"):
        program(argv)
    assert not list(tmp_path.glob("exp/*.pt"))


def test_local_programs_reject_the_attack(tmp_path, canary, capsys):
    path = write_lines(tmp_path / "x.jsonl.gz", [hostile_cuts(canary)["command"][0]])
    with pytest.raises(SystemExit, match="1 errors in 1 files"):
        validate_manifest.main([str(path)])
    assert "cut cut-7 is rejected: " in capsys.readouterr().out
    manifests = {"recordings": recording("command", f"mkdir {canary}"),
                 "supervisions": cut_of()["supervisions"][0]}  # fmt: skip
    for kind, line in manifests.items():
        write_lines(tmp_path / f"librispeech_{kind}_dev-clean.jsonl.gz", [line])
    folders = ["--manifest-dir", str(tmp_path), "--output-dir", str(tmp_path / "fbank")]
    with pytest.raises(SystemExit, match="cut r is rejected: its audio comes from a command"):
        compute_fbank.main(["librispeech", *folders])


# ---- shards


@pytest.fixture
def shards(tiny_shards, tmp_path):
    return shutil.copytree(tiny_shards, tmp_path / "shards")


def update_sizes(directory: Path) -> None:
    """Write the current sizes of the shards to the index."""
    index = json.loads((directory / "index.json").read_text())
    for listed in index["shards"].values():
        listed[:] = [[name, (directory / name).stat().st_size] for name, _ in listed]
    (directory / "index.json").write_text(json.dumps(index))


def test_attacks_in_the_texts_of_a_shard_are_rejected(shards, canary):
    path = shards / "cuts.000000.jsonl.gz"
    lines = [json.loads(line) for line in gzip.open(path, "rt")]
    lines[0]["custom"] = {"far": recording("command", f"mkdir {canary}")}
    write_lines(path, lines)
    update_sizes(shards)
    found = read_shards([str(shards)])
    for read in (lambda: list(found.cuts()), found.sample, lambda: check_shards(found)):
        with pytest.raises(InputError, match="is rejected: its audio comes from a command"):
            read()


def test_attacks_in_the_tar_of_a_shard_are_rejected(shards, canary):
    """The tar's manifest of the features replaces the cut's."""
    path = shards / "features.000003.tar"
    with tarfile.open(path) as old:
        members = [(member.name, old.extractfile(member).read()) for member in old]
    room = {"rir": recording("command", f"mkdir {canary}"), "rir_channels": [0]}
    transform = {"name": "ReverbWithImpulseResponse", "kwargs": room}
    meta = recording("shar", "") | {"transforms": [transform]}
    members[1] = (members[1][0], json.dumps(meta).encode())
    with tarfile.open(path, "w") as new:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            new.addfile(info, io.BytesIO(content))
    update_sizes(shards)
    with pytest.raises(InputError, match="is rejected: its audio comes from a command"):
        list(read_shards([str(shards)]).cuts())


@pytest.mark.parametrize(
    ("kind", "name"),
    [("features", "../other/features.000000.tar"), ("features", "features.000000.pkl"),
     ("cuts", "pipe:mkdir x"), ("custom", "custom.0.tar")],
)  # fmt: skip
def test_an_index_with_other_file_names_is_an_error(shards, kind, name):
    index = json.loads((shards / "index.json").read_text())
    index["shards"].setdefault(kind, [])[:1] = [[name, 10]]
    (shards / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError) as error:
        read_shards([str(shards)])
    assert str(error.value) == f"{shards}/index.json lists {name!r}, which is not a shard's name"

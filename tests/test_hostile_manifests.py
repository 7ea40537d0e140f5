"""Manifests and shards made to run something: refused in one sentence, and nothing has run.

What would run makes a folder, the canary. Where it is not plain, a test shows first that without
the refusal the file does what it was made for.
"""

import gzip
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import compute_fbank
import manifest_statistics
import pytest
import validate_manifest
import write_shar
from hostile_cuts import cut_of, hostile_cuts, recording, write_lines
from lhotse import CutSet, load_manifest
from runs_code import has_sung

import decode
import train
from speechllm import features
from speechllm.cut_files import check_cuts, cuts_within, read_cuts
from speechllm.errors import InputError
from speechllm.manifest_safety import safe_cut
from speechllm.shards import check_shards, read_shards


@pytest.fixture(params=hostile_cuts(Path("x")))
def hostile_manifest(request, canary, tmp_path):
    """A cut file after others' cuts, and what is said of the cut."""
    cut, said = hostile_cuts(canary)[request.param]
    return write_lines(tmp_path / "hostile_cuts.jsonl.gz", [cut]), f"cut cut-7 is refused: {said}"


@pytest.mark.parametrize("attack", ["command", "pipe", "shell in a name", "features of a pipe"])
def test_what_lhotse_would_do(canary, attack):
    cut, _ = hostile_cuts(canary)[attack]
    [cut] = CutSet.from_dicts([cut])
    with pytest.raises(Exception):  # noqa: B017 (what it ran gives no audio)
        cut.load_features() if cut.has_features else cut.load_audio()
    assert has_sung(canary)


def test_every_reader_refuses(hostile_manifest, tmp_path, capsys):
    path, said = hostile_manifest
    for read in (
        lambda: list(read_cuts(path)),
        lambda: list(cuts_within([path], min_frames=0)),
        lambda: check_cuts([path], need_features=False),
        lambda: features.compute_fbank(load_manifest(path), tmp_path / "out_cuts.jsonl.gz"),
    ):
        with pytest.raises(InputError) as error:
            read()
        assert said in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == [path.name]


def test_the_same_cuts_without_the_attack_are_read(tiny_corpus, tmp_path):
    for cut in load_manifest(tiny_corpus / "tiny_cuts_train.jsonl.gz"):
        assert safe_cut(cut) is cut
    source = "{}://bucket/a b; c.flac"
    for scheme in ("s3", "https", "gs"):
        [cut] = CutSet.from_dicts([cut_of(recording=recording("url", source.format(scheme)))])
        assert safe_cut(cut) is cut
    [cut] = CutSet.from_dicts([cut_of(recording=recording("file", "a/b_1.sph"))])
    assert safe_cut(cut) is cut


@pytest.mark.parametrize("flag", ["--train-cuts", "--valid-cuts", "musan", "--test-cuts", "--cuts"])
def test_programs_given_a_manifest(flag, tiny_argv, tiny_corpus, tmp_path, canary, restore_logging):
    corpus = shutil.copytree(tiny_corpus, tmp_path / "corpus")
    name = "musan_cuts" if flag == "musan" else "hostile_cuts"
    write_lines(corpus / f"{name}.jsonl.gz", [hostile_cuts(canary)["command"][0]])
    argv = [*tiny_argv(), "--exp-dir", str(tmp_path / "exp"), "--manifest-dir", str(corpus)]
    if flag == "--test-cuts":
        program, argv = decode.main, [*argv, flag, name, "--checkpoint", "x.pt"]
    elif flag == "--cuts":
        program = write_shar.main
        argv = [*argv[-2:], flag, name, "--out", str(tmp_path / "exp"), "--audio", "wav"]
    else:
        program = train.main
        names = {"--train-cuts": "tiny_cuts_train", "--valid-cuts": "tiny_cuts_dev", flag: name}
        names["--enable-musan"] = str(names.pop("musan", None) is not None)
        argv += ["--on-the-fly-feats", "true", *(word for pair in names.items() for word in pair)]
    with pytest.raises(SystemExit, match="cut cut-7 is refused: it wants audio from a command"):
        program(argv)
    assert not list(tmp_path.glob("exp/*.pt"))


def test_noise_that_changed_after_it_was_checked(
    tiny_argv, tiny_corpus, tmp_path, canary, monkeypatch, restore_logging
):
    corpus = shutil.copytree(tiny_corpus, tmp_path / "corpus")
    write_lines(corpus / "musan_cuts.jsonl.gz", [hostile_cuts(canary)["command"][0]])
    monkeypatch.setattr(
        "speechllm.training.training_cuts.check_cuts",
        lambda paths, **options: check_cuts(
            [tiny_corpus / path.name for path in paths],
            **options,  # as it was then
        ),
    )
    argv = [*tiny_argv(), "--exp-dir", str(tmp_path / "exp"), "--manifest-dir", str(corpus)]
    argv += ["--train-cuts", "tiny_cuts_train", "--valid-cuts", "tiny_cuts_dev"]
    with pytest.raises(SystemExit, match="cut cut-7 is refused: it wants audio from a command"):
        train.main([*argv, "--world-size", "1", "--enable-musan", "true"])


def test_local_programs_given_a_manifest(tmp_path, canary, capsys):
    path = write_lines(tmp_path / "x.jsonl.gz", [hostile_cuts(canary)["command"][0]])
    with pytest.raises(SystemExit, match="1 problems in 1 files"):
        validate_manifest.main([str(path)])
    assert "cut cut-7 is refused: " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="cut cut-7 is refused: "):
        manifest_statistics.main([str(path)])
    manifests = {"recordings": recording("command", f"mkdir {canary}"),
                 "supervisions": cut_of()["supervisions"][0]}  # fmt: skip
    for kind, line in manifests.items():
        write_lines(tmp_path / f"librispeech_{kind}_dev-clean.jsonl.gz", [line])
    folders = ["--manifest-dir", str(tmp_path), "--output-dir", str(tmp_path / "fbank")]
    with pytest.raises(SystemExit, match="cut r is refused: it wants audio from a command"):
        compute_fbank.main(["librispeech", *folders])


# Shards


@pytest.fixture
def shards(tiny_shards, tmp_path):
    return shutil.copytree(tiny_shards, tmp_path / "shards")


def sizes_again(directory: Path) -> None:
    """The index with the sizes that the shards have now."""
    index = json.loads((directory / "index.json").read_text())
    for listed in index["shards"].values():
        listed[:] = [[name, (directory / name).stat().st_size] for name, _ in listed]
    (directory / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("number", [0, 7])
def test_a_shard_of_texts(shards, canary, number):
    path = shards / f"cuts.{number:06}.jsonl.gz"
    lines = [json.loads(line) for line in gzip.open(path, "rt")]
    lines[number]["custom"] = {"far": recording("command", f"mkdir {canary}")}
    write_lines(path, lines)
    sizes_again(shards)
    found = read_shards([str(shards)])
    with pytest.raises(InputError, match="is refused: it wants audio from a command"):
        list(found.cuts())
    if number == 0:
        with pytest.raises(InputError, match="is refused: it wants audio from a command"):
            check_shards(found)


def test_a_shard_of_data(shards, canary):
    """What the tar says of a cut's features takes the place of what the cut says."""
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
    sizes_again(shards)
    with pytest.raises(InputError, match="is refused: it wants audio from a command"):
        list(read_shards([str(shards)]).cuts())


@pytest.mark.parametrize(
    ("kind", "name"),
    [("features", "../other/features.000000.tar"), ("features", "/features.000000.tar"),
     ("features", "features.000000.pkl"), ("cuts", "pipe:mkdir x"), ("custom", "custom.0.tar")],
)  # fmt: skip
def test_an_index_that_names_other_files(shards, kind, name):
    index = json.loads((shards / "index.json").read_text())
    index["shards"].setdefault(kind, [])[:1] = [[name, 10]]
    (shards / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError) as error:
        read_shards([str(shards)])
    assert str(error.value) == f"{shards}/index.json lists {name!r}, which is no name of a shard"


def test_the_sample_of_shards(shards, canary):
    write_lines(shards / "sample.jsonl.gz", [hostile_cuts(canary)["command"][0]])
    with pytest.raises(InputError, match="is refused: it wants audio from a command"):
        list(read_shards([str(shards)]).sample())

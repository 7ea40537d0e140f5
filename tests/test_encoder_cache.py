"""A training that reads what its encoders said is the training in which they hear."""

import copy
import json
import os
import re
import shutil
import threading
from collections import namedtuple

import numpy as np
import pytest
import torch
from lhotse import CutSet, load_manifest
from lhotse.utils import fastcopy

import train
import train_mose
from speechllm import encoder_cache
from speechllm.data import evaluation_loader
from speechllm.encoder_cache import EncoderCache, fingerprint, hash_of_encoders, outputs_of
from speechllm.training.checkpoint import load_checkpoint
from speechllm.training.distributed import Ranks
from speechllm.training.heard_cuts import make_encoder_cache
from speechllm.training.training_cuts import check_data
from speechllm.zipformer import load_encoder

pytestmark = pytest.mark.usefixtures("restore_logging")

QUIET = (
    "--enable-musan", "false", "--enable-spec-aug", "false", "--encoder-feature-mask", "false",
)  # fmt: skip
LOSS = re.compile(r"(?:validation: |tot_loss\[)loss=([\d.]+)")
CPU = torch.device("cpu")


def log(exp_dir):
    return "".join(path.read_text() for path in sorted((exp_dir / "log").iterdir()))


def losses(exp_dir):
    return [float(loss) for loss in LOSS.findall(log(exp_dir))]


def model_of(exp_dir):
    return load_checkpoint(exp_dir / "epoch-2.pt")["model"]


def found_and_heard(exp_dir):
    [line] = re.findall(r"Encoder cache \S+: (\d+) utterances found, (\d+) heard", log(exp_dir))
    return tuple(map(int, line))


@pytest.fixture
def trained(tiny_train_argv, tmp_path):
    """A function from a name and flags to the folder of a training without augmentation."""

    def run(name, *flags, n=1):
        program = train if n == 1 else train_mose
        program.main([*tiny_train_argv(tmp_path / name, n), *QUIET, *map(str, flags)])
        return tmp_path / name

    return run


@pytest.fixture
def encoders(tiny_encoder_dir, encoder_size):
    return [load_encoder(tiny_encoder_dir / f"{name}.pt", encoder_size).freeze() for name in "ab"]


@pytest.fixture
def cuts(tiny_corpus):
    return CutSet.from_cuts(load_manifest(tiny_corpus / "tiny_cuts_train.jsonl.gz"))


def batches(cuts, **options):
    options = {"max_duration": 6.0, "num_workers": 0, **options}
    return evaluation_loader(cuts, num_cuts=len(cuts), **options)


@pytest.fixture
def filled(encoders, cuts, tmp_path):
    """A cache with all of `cuts`."""
    cache = EncoderCache(tmp_path / "cache", encoders)
    cache.folder.mkdir(parents=True)
    cache.fill(encoders, batches(cuts.map(cache.named)), CPU)
    cache.look()
    return cache


# ---- the same training


@pytest.mark.parametrize("n, flags", [(1, ()), (2, ("--max-tokens", "100"))])
def test_trained_from_the_cache_as_from_features(trained, tmp_path, n, flags):
    """Up to rounding: an utterance was heard in another batch."""
    cached = (*flags, "--cache-encoder", tmp_path / "cache")
    heard, made, found = (
        trained("heard", *flags, n=n), trained("made", *cached, n=n), trained("found", *cached, n=n)
    )  # fmt: skip
    assert losses(made) == losses(found) == pytest.approx(losses(heard), rel=1e-3)
    assert (found_and_heard(made), found_and_heard(found)) == ((0, 13), (13, 0))
    heard, made, found = map(model_of, (heard, made, found))
    for name, value in heard.items():
        assert torch.equal(made[name], found[name])
        assert (made[name] - value).norm() < 1e-3 * value.norm()


def test_bit_by_bit_where_utterances_are_heard_alone(trained, tmp_path):
    alone = ("--max-duration", "0.5", "--num-epochs", "2")
    heard = model_of(trained("heard", *alone, n=2))
    found = model_of(trained("found", *alone, "--cache-encoder", tmp_path / "cache", n=2))
    assert heard.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in heard.items())


def test_with_checkpointed_activations(trained, tmp_path):
    """There is nothing to checkpoint, or compile, where nothing is heard."""
    flags = ("--cache-encoder", tmp_path / "cache", "--activation-checkpointing", "true")
    assert losses(trained("cached", *flags)) == losses(trained("plain", *flags[:2]))
    encoder_cache._HeardBefore(0, 1).compile_layers()


def test_in_half_precision(trained, tmp_path):
    flags = ("--use-bf16", "true")
    cached = trained("cached", *flags, "--cache-encoder", tmp_path / "cache")
    assert losses(cached) == pytest.approx(losses(trained("heard", *flags)), rel=1e-2)


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"on_the_fly_feats": True}])
def test_batches_from_the_cache(encoders, cuts, tmp_path, options):
    cache = EncoderCache(tmp_path, encoders, on_the_fly_feats="on_the_fly_feats" in options)
    cache.folder.mkdir()
    cache.fill(encoders, batches(cuts.map(cache.named), **options, max_duration=3.0), CPU)
    cache.look()
    heard = list(batches(cuts, **options))
    read = list(batches(cuts, **options, encoder_cache=cache))
    assert len(heard) == len(read) > 2
    for before, after in zip(heard, read):
        assert before.keys() == after.keys()
        for name in ("texts", "ids", "seconds"):
            assert before[name] == pytest.approx(after[name])
        assert torch.equal(before["feature_lens"], after["feature_lens"])
        for k, (encoder, stand_in) in enumerate(zip(encoders, cache.stand_ins())):
            expected, lens = encoder(before["features"], before["feature_lens"])
            output, same_lens = stand_in(after["features"], after["feature_lens"], False)
            assert torch.equal(lens, same_lens)
            for i, length in enumerate(lens):
                torch.testing.assert_close(
                    output[i, :length], expected[i, :length], rtol=0, atol=1e-5
                )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_written_is_read(encoders, cuts, tmp_path, dtype):
    cache = EncoderCache(tmp_path, encoders, dtype)
    cache.folder.mkdir()
    [batch] = batches(cuts.map(cache.named).subset(first=3), max_duration=99.0)
    cache.fill(encoders, [batch], CPU)
    cache.look()
    cuts = {str(fingerprint(cut)): cut for cut in cuts}
    for key, expected in zip(batch["ids"], outputs_of(encoders, batch, CPU, dtype)):
        output, _ = cache.read(cuts[key])
        assert output.dtype == dtype and torch.equal(output, expected[: len(output)])
    assert cache.gigabytes * 1e9 == sum(len(cache.read(cuts[i])[0]) for i in batch["ids"]) * 96


# ---- what is another cut, another encoder


def changed(cut, **fields):
    return fastcopy(cut, **fields)


def test_a_fingerprint_is_of_what_is_heard(cuts):
    cut = cuts[1]
    [spoken] = cut.supervisions
    noted = copy.deepcopy(cut)
    noted.llm_positions = 7
    for same in (
        copy.deepcopy(cut), noted, changed(cut, recording=None),
        changed(cut, supervisions=[changed(spoken, text="other words")]),
    ):  # fmt: skip
        assert fingerprint(same) == fingerprint(cut)
    others = [
        cut,
        cut.with_id("other"),
        cut.truncate(offset=0.1, preserve_id=True),
        cut.truncate(duration=1.0, preserve_id=True),
        changed(cut, supervisions=[changed(spoken, duration=0.5)]),
        changed(cut, features=changed(cut.features, storage_path="elsewhere")),
        changed(cut, features=changed(cut.features, storage_key="0,1")),
        cut.pad(duration=9.0, preserve_id=True),
    ]
    assert len({fingerprint(other) for other in others}) == len(others)
    assert fingerprint(cut, on_the_fly_feats=True) not in map(fingerprint, others)
    moved = changed(cut, features=None)
    assert fingerprint(moved, on_the_fly_feats=True) == fingerprint(cut, on_the_fly_feats=True)
    padded = cut.pad(duration=9.0)
    before = fingerprint(padded)
    padded.llm_positions = 7
    assert fingerprint(padded) == before


@pytest.mark.parametrize("on_the_fly_feats", [False, True])
def test_a_file_that_was_written_again_is_another(cuts, tmp_path, on_the_fly_feats):
    cut = cuts[1]
    features = shutil.copy(cut.features.storage_path, tmp_path)
    audio = shutil.copy(cut.recording.sources[0].source, tmp_path)
    cut = cut.with_features_path_prefix("").with_recording_path_prefix("")
    cut.features.storage_path, cut.recording.sources[0].source = features, audio
    before = fingerprint(cut, on_the_fly_feats)
    assert fingerprint(cut, on_the_fly_feats) == before
    os.utime(audio if on_the_fly_feats else features, (0, 0))
    encoder_cache._size_and_time.cache_clear()
    assert fingerprint(cut, on_the_fly_feats) != before


def test_encoders_have_other_folders_unless_they_say_the_same(encoders):
    one, two = encoders
    hashes = {hash_of_encoders(some) for some in ([one], [two], [one, two], [two, one])}
    hashes.add(hash_of_encoders([one], torch.bfloat16))
    assert len(hashes) == 5
    before = hash_of_encoders([one])
    with torch.no_grad():
        one.ctc_output[1].bias += 1
        assert hash_of_encoders([one]) == before
        next(one.parameters())[0] += 1e-6
    assert hash_of_encoders([one]) != before


def test_only_what_changed_is_heard_again(trained, tiny_corpus, tiny_encoder_dir, tmp_path):
    cached = ("--num-epochs", "1", "--cache-encoder", tmp_path / "cache")
    trained("first", *cached)
    cuts = list(load_manifest(tiny_corpus / "tiny_cuts_train.jsonl.gz"))
    cuts[3].supervisions[0].duration = 2.0
    cuts[6].supervisions[0].text = "other words"
    CutSet.from_cuts(cuts).to_file(tmp_path / "changed.jsonl.gz")
    flags = (*cached, "--train-cuts", tmp_path / "changed.jsonl.gz")
    assert found_and_heard(trained("changed", *flags)) == (12, 1)
    assert found_and_heard(trained("again", *flags)) == (13, 0)
    flags = (*cached, "--speech-encoder-path", tiny_encoder_dir / "b.pt")
    assert found_and_heard(trained("other", *flags)) == (0, 13)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_utterances_that_cannot_be_heard_are_left_out(trained, tiny_corpus, tmp_path):
    cuts = list(load_manifest(tiny_corpus / "tiny_cuts_train.jsonl.gz"))
    number = max(range(len(cuts)), key=lambda i: cuts[i].duration)
    cuts[number].features.storage_path = "gone.lca"
    CutSet.from_cuts(cuts).to_file(tmp_path / "broken.jsonl.gz")
    flags = ("--cache-encoder", tmp_path / "cache", "--train-cuts", tmp_path / "broken.jsonl.gz")
    exp_dir = trained("exp", *flags, "--max-bad-fraction", 0.2)
    assert f"leaves out (unreadable-features): the features of cut {cuts[number].id} can" in (
        log(exp_dir)
    )
    assert f"Left out (not-cached): the encoder cache has no outputs of cut {cuts[number].id}" in (
        log(exp_dir)
    )
    listed = [json.loads(line) for line in (exp_dir / "bad-cuts.jsonl").read_text().splitlines()]
    assert [(one["id"], one["reason"]) for one in listed] == [
        (cuts[number].id, "unreadable-features"), (cuts[number].id, "not-cached"),
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="1 of 13 utterances are bad .1 unreadable-features."):
        trained("other", *flags)


# ---- filling


class Threads(Ranks):
    """Ranks that are threads."""

    meeting = threading.Barrier(2)

    def barrier(self):
        self.meeting.wait()


def test_ranks_share_the_work(tiny_train_argv, encoders, tmp_path):
    argv = [*tiny_train_argv(tmp_path / "exp"), *QUIET, "--cache-encoder", str(tmp_path / "cache")]
    args = train.get_parser(train.DEFAULTS).parse_args(argv)
    args.train_statistics, args.valid_statistics = check_data(args)
    caches = {}

    def run(rank):
        caches[rank] = make_encoder_cache(encoders, args, Threads(rank, 2))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(cache.keys) for cache in caches.values()] == [13, 13]
    assert sorted(np.bincount(caches[0].part_numbers)) == [6, 7]


def test_an_interruption_leaves_only_whole_parts(encoders, cuts, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_cache, "BATCHES_IN_PART", 2)
    cache = EncoderCache(tmp_path, encoders)
    cache.folder.mkdir()
    there = list(batches(cuts.map(cache.named), max_duration=3.0))

    def interrupted():
        yield from there[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.fill(encoders, interrupted(), CPU)
    cache.look()
    assert len(list(cache.folder.iterdir())) == 1
    assert len(cache.keys) == sum(len(batch["ids"]) for batch in there[:2])


# ---- what is said


@pytest.fixture
def said(trained):
    def run(*flags):
        with pytest.raises(SystemExit) as error:
            trained("exp", *flags)
        assert "\n" not in error.value.code
        return error.value.code

    return run


@pytest.mark.parametrize("flag", [
    "--unfreeze-encoder", "--encoder-feature-mask", "--enable-musan", "--enable-spec-aug",
    "--concatenate-cuts",
])  # fmt: skip
def test_flags_that_change_what_encoders_say(said, tmp_path, flag):
    assert said("--cache-encoder", tmp_path / "cache", flag, "true") == (
        f"--cache-encoder {tmp_path}/cache needs {flag} false: "
        "encoders must say the same in every epoch"
    )
    assert not (tmp_path / "exp").exists() and not (tmp_path / "cache").exists()


def test_shards_and_places_that_cannot_be(said, tmp_path):
    assert said("--cache-encoder", tmp_path / "cache", "--shar-dir", "x") == (
        f"--cache-encoder {tmp_path}/cache is for cut files, not for shards (--shar-dir x)"
    )
    (tmp_path / "file").touch()
    sentence = said("--cache-encoder", tmp_path / "file")
    assert sentence == f"--cache-encoder {tmp_path}/file cannot be a directory: File exists"


def test_no_room(said, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(20_000))
    sentence = said("--cache-encoder", tmp_path / "cache")
    assert re.fullmatch(
        rf"{tmp_path}/cache/\w+ needs 0.00 GB more for the outputs of the encoders, 0.00 GB are "
        r"free", sentence,
    )  # fmt: skip


def test_a_damaged_part(filled, encoders):
    [part] = filled.parts
    size = (part / "outputs.bin").stat().st_size
    os.truncate(part / "outputs.bin", size - 4)
    with pytest.raises(ValueError, match=f"outputs.bin has {size - 4} bytes, not {size}: remove "):
        filled.look()


def test_a_damaged_index(filled):
    [part] = filled.parts
    (part / "index.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="index.npy cannot be read: .*: remove "):
        filled.look()


def test_a_cut_that_is_not_there(filled, cuts):
    with pytest.raises(KeyError, match="other"):
        filled.read(cuts[1].with_id("other"))

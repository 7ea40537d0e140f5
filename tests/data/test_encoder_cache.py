"""Cached encoder outputs: training with them equals training with the encoders."""

import json
import os
import re
import shutil

import pytest
import torch
from exp_dirs import equal, log
from lhotse import CutSet, load_manifest
from lhotse.utils import fastcopy
from tiny_batches import cut_file, eval_batches

from speechllm.checkpoints import load_checkpoint
from speechllm.data import encoder_cache
from speechllm.data.encoder_cache import EncoderCache, encode_batch, fingerprint, hash_of_encoder
from speechllm.errors import InputError
from speechllm.models.zipformer.checkpoint import load_encoder, save_encoder
from speechllm.models.zipformer.config import SIZES
from speechllm.models.zipformer.encoder import ZipformerEncoder

pytestmark = pytest.mark.usefixtures("restore_logging")

NO_AUGMENTATION = (
    "--enable-musan", "false", "--enable-spec-aug", "false", "--encoder-feature-mask", "false",
)  # fmt: skip
LOSS = re.compile(r"(?:validation: |tot_loss\[)loss=([\d.]+)")
CPU = torch.device("cpu")


def losses(exp_dir):
    return [float(loss) for loss in LOSS.findall(log(exp_dir))]


def state_of(exp_dir):
    return load_checkpoint(exp_dir / "epoch-2.pt")["model"]


def found_and_encoded(exp_dir):
    [line] = re.findall(r"Encoder cache \S+: (\d+) utterances found, (\d+) enc", log(exp_dir))
    return tuple(map(int, line))


@pytest.fixture
def trained(tiny_train_argv, tmp_path):
    """A function (name, *flags) -> the folder of a training without augmentation."""
    import train
    import train_mose

    def run(name, *flags, n=1):
        program = train if n == 1 else train_mose
        program.main([*tiny_train_argv(tmp_path / name, n), *NO_AUGMENTATION, *map(str, flags)])
        return tmp_path / name

    return run


@pytest.fixture
def cache_flags(tmp_path):
    return "--encoder-cache-dir", tmp_path / "cache"


@pytest.fixture
def encoders(tiny_encoder_dir, encoder_size):
    return [load_encoder(tiny_encoder_dir / f"{name}.pt", encoder_size).freeze() for name in "ab"]


@pytest.fixture
def cuts(tiny_corpus):
    return CutSet.from_cuts(load_manifest(cut_file(tiny_corpus)))


def filled(directory, encoders, cuts, dtype=torch.float32, **options):
    """Return a cache with the outputs for all of `cuts`."""
    cache = EncoderCache(directory, encoders, dtype, options.get("on_the_fly_feats", False))
    cache.check_space(1.0)
    batches = eval_batches(cuts.map(cache.with_fingerprint), **options)
    cache.fill(encoders, batches, CPU)
    cache.refresh()
    return cache


# ---- the same training


@pytest.mark.slow
@pytest.mark.parametrize("n, flags", [(1, ()), (2, ("--max-batch-tokens", "100"))])
def test_training_with_the_cache_equals_training_with_encoders(trained, cache_flags, n, flags):
    """Up to rounding, as an utterance was encoded in another batch."""
    encoded = trained("encoded", *flags, n=n)
    made, found = (trained(name, *flags, *cache_flags, n=n) for name in ("made", "found"))
    assert losses(made) == losses(found) == pytest.approx(losses(encoded), rel=1e-3)
    assert (found_and_encoded(made), found_and_encoded(found)) == ((0, 13), (13, 0))
    encoded, made, found = map(state_of, (encoded, made, found))
    assert equal(made, found)
    assert all((made[k] - value).norm() < 1e-3 * value.norm() for k, value in encoded.items())


@pytest.mark.slow
@pytest.mark.ranks
def test_ranks_share_the_encoding(trained, tmp_path, cache_flags, port):
    save_encoder(ZipformerEncoder(SIZES["tiny"], vocab_size=7), tmp_path / "tiny.pt")
    exp_dir = trained(
        "exp", *cache_flags, "--world-size", 2, "--master-port", port, "--num-epochs", 1,
        "--speech-encoder-type", "tiny", "--speech-encoder-path", tmp_path / "tiny.pt",
    )  # fmt: skip
    assert "Encoder cache" in log(exp_dir) and ": 0 utterances found, 13 enc" in log(exp_dir)
    assert len([*cache_flags[1].glob("*/*/*.safetensors")]) == 13


# ---- contents


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_outputs_are_those_computed_bit_for_bit(encoders, cuts, tmp_path, dtype):
    cuts = cuts.subset(first=3)
    cache = filled(tmp_path, encoders, cuts, dtype, max_duration=99.0)
    [batch] = eval_batches(cuts, max_duration=99.0)
    by_id = {cut.id: cut for cut in cuts}
    outputs = [encode_batch(encoder, batch, CPU, dtype) for encoder in encoders]
    for cut_id, expected in zip(batch["cut_ids"], torch.cat(outputs, dim=-1)):
        output, _ = cache.read(by_id[cut_id])
        assert output.dtype == dtype and torch.equal(output, expected[: len(output)])


def test_fingerprint_depends_on_the_input_of_the_encoders_only(cuts):
    cut = cuts[1]
    [spoken] = cut.supervisions
    before = fingerprint(cut)
    cut.llm_positions = 7
    other_words = fastcopy(cut, supervisions=[fastcopy(spoken, text="other words")])
    for same in (cut, fastcopy(cut, recording=None), other_words):
        assert fingerprint(same) == before
    padded = cut.pad(duration=9.0, preserve_id=True)
    others = [
        cut, cut.with_id("other"), cut.truncate(offset=0.1, preserve_id=True),
        fastcopy(cut, supervisions=[fastcopy(spoken, duration=0.5)]),
        fastcopy(cut, features=fastcopy(cut.features, storage_path="elsewhere")),
        fastcopy(cut, features=fastcopy(cut.features, storage_key="0,1")), padded,
    ]  # fmt: skip
    fingerprints = [fingerprint(other) for other in others]
    assert len(set(fingerprints)) == len(others)
    assert fingerprint(cut, on_the_fly_feats=True) not in fingerprints
    moved = fastcopy(cut, features=None)
    assert fingerprint(moved, on_the_fly_feats=True) == fingerprint(cut, on_the_fly_feats=True)


@pytest.mark.parametrize("on_the_fly_feats", [False, True])
def test_fingerprint_changes_when_a_file_is_written_again(cuts, tmp_path, on_the_fly_feats):
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


def test_hash_depends_on_the_outputs_of_the_encoder_only(encoders):
    one, two = encoders
    assert len({hash_of_encoder(one), hash_of_encoder(two), hash_of_encoder(one, 16)}) == 3
    before = hash_of_encoder(one)
    with torch.no_grad():
        one.ctc_output[1].bias += 1
        assert hash_of_encoder(one) == before
        next(one.parameters())[0] += 1e-6
    assert hash_of_encoder(one) != before


def test_sets_of_encoders_share_the_outputs(encoders, cuts, tmp_path):
    one, two = encoders
    both = filled(tmp_path, encoders, cuts)
    reverse = EncoderCache(tmp_path, [two, one])
    assert not any(map(reverse.is_missing, cuts))
    expected, _ = both.read(cuts[1])
    assert torch.equal(reverse.read(cuts[1])[0], expected.roll(one.output_dim, dims=1))
    shutil.rmtree(both.folders[1])
    [kept] = EncoderCache(tmp_path, [one]).paths_of(both.with_fingerprint(cuts[1]).id)
    os.utime(kept, (0, 0))
    again = filled(tmp_path, encoders, cuts)
    assert torch.equal(again.read(cuts[1])[0], expected)
    assert kept.stat().st_mtime == 0  # not written again


# ---- errors


@pytest.mark.slow
def test_utterances_that_cannot_be_encoded_are_skipped(trained, tiny_corpus, tmp_path, cache_flags):
    cuts = list(load_manifest(cut_file(tiny_corpus)))
    number = max(range(len(cuts)), key=lambda i: cuts[i].duration)
    cuts[number].features.storage_path = "missing.lca"
    CutSet.from_cuts(cuts).to_file(tmp_path / "broken.jsonl.gz")
    flags = (*cache_flags, "--train-cuts", tmp_path / "broken.jsonl.gz")
    exp_dir = trained("exp", *flags, "--max-invalid-fraction", 0.2)
    text = log(exp_dir)
    assert f"skips (unreadable-features): the features of cut {cuts[number].id} cannot" in text
    assert f"(not-cached): the encoder cache has no outputs for cut {cuts[number].id}" in text
    lines = (exp_dir / "invalid-cuts.jsonl").read_text().splitlines()
    assert [(error["id"], error["reason"]) for error in map(json.loads, lines)] == [
        (cuts[number].id, "unreadable-features"), (cuts[number].id, "not-cached"),
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="1 of 13 utterances are invalid .1 unreadable-features."):
        trained("other", *flags)


def test_interrupted_filling_keeps_what_was_encoded(encoders, cuts, tmp_path):
    cache = EncoderCache(tmp_path, encoders)
    batches = eval_batches(cuts.map(cache.with_fingerprint), max_duration=3.0)

    def interrupted():
        yield from batches[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.fill(encoders, interrupted(), CPU)
    cache.refresh()
    assert cache.keys == {cut_id for batch in batches[:2] for cut_id in batch["cut_ids"]}


@pytest.mark.parametrize(
    "directory, flags, message",
    [
        ("cache",
         ("--enable-musan", "true", "--on-the-fly-feats", "true", "--enable-reverb", "true"),
         "needs --enable-reverb false, --enable-musan false: the encoders' outputs must be the "
         "same in every epoch"),
        ("cache", ("--shar-dir", "x"), "needs cut files, not shards (--shar-dir x)"),
        ("cache", ("--chunk-size", "16,-1"),
         "needs one --chunk-size and one --left-context-frames"),
        ("file", (), "cannot be created: File exists"),
    ],
)  # fmt: skip
def test_flags_that_do_not_fit_the_cache_are_errors(trained, tmp_path, directory, flags, message):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as error:
        trained("exp", "--encoder-cache-dir", tmp_path / directory, *flags)
    assert error.value.code == f"--encoder-cache-dir {tmp_path / directory} {message}"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]


def test_missing_and_damaged_outputs_are_errors(encoders, cuts, tmp_path):
    cache = filled(tmp_path, encoders, cuts)
    with pytest.raises(InputError, match="the encoder cache has no outputs for cut other"):
        cache.read(cuts[1].with_id("other"))
    _, path = cache.paths_of(cache.with_fingerprint(cuts[1]).id)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(InputError, match=f"{path.name} is damaged .*: remove it"):
        cache.read(cuts[1])

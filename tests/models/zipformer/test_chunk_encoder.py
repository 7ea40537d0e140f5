"""A causal encoder: chunk by chunk with state as by mask, whatever the batch of streams."""

from dataclasses import replace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from speechllm.errors import InputError
from speechllm.models.zipformer.checkpoint import load_encoder, save_encoder
from speechllm.models.zipformer.chunk_encoder import ChunkEncoder
from speechllm.models.zipformer.config import OFFLINE, SIZES, Chunking, parse_chunkings
from speechllm.models.zipformer.encoder import ZipformerEncoder

CAUSAL = pytest.mark.parametrize("config", [True], indirect=True, ids=["causal"])
SMALL, LARGE = [Chunking(4, 4), Chunking(8, 24), Chunking(16, 20)], Chunking(32, 8)


def stream(chunks: ChunkEncoder, features: list, starts: list[int]) -> list[torch.Tensor]:
    """Encode streams that join the batch at different steps; returns their outputs (T, C)."""
    states = [chunks.initial_state() for _ in features]
    outputs, position, step = [[] for _ in features], [0] * len(features), 0
    while any(len(one) - at >= 9 for one, at in zip(features, position)):
        rows = [
            i for i, one in enumerate(features) if starts[i] <= step and len(one) - position[i] >= 9
        ]
        step += 1
        if not rows:
            continue
        windows = [features[i][position[i] : position[i] + chunks.window] for i in rows]
        lens = torch.tensor([len(one) for one in windows])
        padded = torch.randn(len(rows), chunks.window, features[0].size(1))  # also in the padding
        for row, one in zip(padded, windows):
            row[: len(one)] = one
        out, out_lens, new = chunks(padded, lens, [states[i] for i in rows])
        for row, i in enumerate(rows):
            outputs[i].append(out[row, : out_lens[row]])
            states[i] = new[row]
            position[i] += chunks.advance
    return [torch.cat(parts) for parts in outputs]


@CAUSAL
@pytest.mark.parametrize(
    "chunking", [*(pytest.param(one, marks=pytest.mark.slow) for one in SMALL), LARGE], ids=str
)
@torch.no_grad()
@pytest.mark.slow
def test_chunk_by_chunk_equals_the_mask(encoder, chunking):
    encoder.eval()
    lens = torch.tensor([9, 10, 30, 71, 77, 78, 79, 150])
    features = [5 * torch.randn(n, 20) for n in lens.tolist()]
    masked, masked_lens = encoder(pad_sequence(features, batch_first=True), lens, chunking=chunking)
    chunks = ChunkEncoder(encoder, chunking)
    together = stream(chunks, features, [0] * len(lens))
    joined_later = stream(chunks, features, [3, 0, 2, 2, 0, 1, 4, 0])
    for i, n in enumerate(masked_lens.tolist()):
        for found in (together[i], joined_later[i]):
            torch.testing.assert_close(found, masked[i, :n], atol=1e-4, rtol=1e-4)
    again = stream(chunks, features, [0] * len(lens))
    assert all(torch.equal(a, b) for a, b in zip(together, again))


@CAUSAL
@pytest.mark.parametrize("chunking", [*SMALL, LARGE], ids=str)
@torch.no_grad()
def test_no_frame_sees_a_later_chunk(encoder, chunking):
    encoder.eval()
    features, lens = torch.randn(1, 150, 20), torch.tensor([150])
    before, _ = encoder(features, lens, chunking=chunking)
    border = 2 * chunking.chunk_size  # feature frames of the first chunk
    features[:, border + 13 :] += 1
    after, _ = encoder(features, lens, chunking=chunking)
    same = (before == after).all(dim=2)[0]
    assert same[: chunking.chunk_size // 2].all() and not same[chunking.chunk_size // 2 :].any()
    assert not torch.allclose(encoder(features, lens, chunking=OFFLINE)[0], after, atol=1e-3)


@CAUSAL
@pytest.mark.parametrize("size", ["mini", "auto"])
def test_a_causal_checkpoint_loads(monkeypatch, encoder, config, tmp_path, size):
    monkeypatch.setitem(SIZES, "mini", config)
    save_encoder(encoder, tmp_path / "pretrained.pt")
    loaded = load_encoder(tmp_path / "pretrained.pt", size, (2,), config.encoder_unmasked_dim)
    assert loaded.config == config and loaded.config.causal


@pytest.mark.parametrize(
    "causal, sizes, left, sentence",
    [
        (False, "32", "64", r"--chunk-size 32: the encoder is not causal"),
        (True, "-1,12", "64", "--chunk-size 12 is not a multiple of 8, the downsampling"),
        (True, "16", "32", "--left-context-frames 32 is too short: the convolutions need 56"),
        (True, "0", "64", "--chunk-size 0 must be positive numbers or -1"),
        (True, "16", "-2", "--left-context-frames -2 must be positive numbers or -1"),
        (True, "16,x", "64", "--chunk-size 16,x must be positive numbers or -1"),
    ],
)
def test_chunks_that_do_not_fit_are_an_error(causal, sizes, left, sentence):
    with torch.device("meta"):
        encoder = ZipformerEncoder(replace(SIZES["medium"], causal=causal))
    with pytest.raises(InputError, match=sentence):
        encoder.set_chunkings(parse_chunkings(sizes, left))


@CAUSAL
def test_training_draws_the_chunks_and_other_passes_use_the_last(encoder):
    encoder.set_chunkings(parse_chunkings("4,8,-1", "8,16"))
    drawn = {encoder.sample_chunking() for _ in range(200)}
    assert drawn == {Chunking(4, 8), Chunking(4, 16), Chunking(8, 8), Chunking(8, 16), OFFLINE}
    features, lens = torch.randn(1, 90, 20), torch.tensor([90])
    offline, _ = encoder.eval()(features, lens)
    assert torch.equal(offline, encoder(features, lens, chunking=OFFLINE)[0])


@CAUSAL
@pytest.mark.parametrize("chunking", [OFFLINE, Chunking(8, -1)], ids=str)
def test_a_stream_needs_limits(encoder, chunking):
    with pytest.raises(InputError, match=" -1: streaming needs a limit"):
        ChunkEncoder(encoder.eval(), chunking)

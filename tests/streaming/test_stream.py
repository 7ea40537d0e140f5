"""Streams through a tiny untrained model: endpoints, partial and final texts, batches, memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from speechllm.audio.fbank import StreamingFbank, fbank_extractor
from speechllm.audio.resample import StreamResampler, resampled
from speechllm.decoding.config import SearchConfig
from speechllm.decoding.ctc_decoder import find_ctc_decoder
from speechllm.decoding.recognizer import Recognizer
from speechllm.errors import InputError
from speechllm.longform.config import LongformConfig
from speechllm.longform.transcript import NO_SPEECH, Segment
from speechllm.models.build import build_model
from speechllm.models.config import ModelConfig
from speechllm.models.speech_encoders import EncoderOutput
from speechllm.models.zipformer.checkpoint import load_encoder, save_encoder
from speechllm.models.zipformer.config import OFFLINE, SIZES, Chunking
from speechllm.models.zipformer.encoder import ZipformerEncoder
from speechllm.streaming.encoding import Reencoding
from speechllm.streaming.phrase import Phrase, phrase_end, quiet_frames
from speechllm.streaming.stream import Partial, Streamer

CONFIG = LongformConfig(max_segment_duration=3.0, endpoint_silence=0.16)
CHUNKING = Chunking(8, 16)
BLANK_BIAS = 0.4  # makes about half of the frames of these encoders blank


@pytest.fixture(scope="module")
def recognizers(tiny_llm_dir, tiny_encoder_dir, encoder_size, tmp_path_factory):
    """Recognizers by name: with a causal encoder, with another one, and without CTC."""
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    causal = ZipformerEncoder(replace(SIZES[encoder_size], causal=True), vocab_size=7)
    for name, encoder in (
        ("causal", causal),
        ("offline", load_encoder(tiny_encoder_dir / "a.pt", encoder_size)),
    ):
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            encoder.ctc_output[1].bias[0] += BLANK_BIAS
        save_encoder(encoder, folder / f"{name}.pt")

    def load(name, bpe_path):
        encoder_path = str(folder / f"{name}.pt")
        config = ModelConfig(str(tiny_llm_dir), encoder_size, speech_encoder_path=encoder_path)
        model, tokenizer = build_model(config)
        ctc = find_ctc_decoder(model.eval(), [bpe_path] if bpe_path else [])
        search = SearchConfig(max_new_tokens=6).resolve(ctc is not None)
        return Recognizer(model, tokenizer, ctc, search, torch.device("cpu"), torch.float32)

    bpe_path = str(tiny_encoder_dir / "bpe.model")
    found = {name: load(name, bpe_path) for name in ("causal", "offline")}
    return found | {"no CTC": load("offline", "")}


@pytest.fixture(params=["causal", "offline"])
def streamer(recognizers, request):
    chunking = CHUNKING if request.param == "causal" else None
    return Streamer(recognizers[request.param], CONFIG, chunking=chunking)


def noise(seconds, seed=0):
    generator = torch.Generator().manual_seed(seed)
    loudness = torch.rand(round(seconds * 4) + 1, generator=generator).repeat_interleave(4000)
    samples = torch.randn(round(seconds * 16000), generator=generator)
    return 0.1 * samples * loudness[: len(samples)]


def run(stream, samples, sizes):
    """Feed blocks of these sizes again and again; returns the events."""
    events, start, step = [], 0, 0
    while start < len(samples):
        size = sizes[step % len(sizes)]
        events += stream.feed(samples[start : start + size])
        start, step = start + size, step + 1
    return events + stream.finish()


def finals(events):
    return [event for event in events if isinstance(event, Segment)]


def times_and_texts(segments):
    return [(one.start, one.end, one.text) for one in segments]


# ---- features


@pytest.mark.parametrize("length", [400, 401, 560, 16079, 16081, 40123])
def test_features_block_by_block_are_those_of_the_whole(length):
    samples = noise(length / 16000 + 1)[:length]
    fbank, blocks = StreamingFbank(), samples.split([*[101] * 3, length - 303])
    found = torch.cat([*map(fbank, blocks), fbank(torch.zeros(0), last=True)])
    torch.testing.assert_close(found, fbank_extractor().extract(samples, 16000))


@pytest.mark.parametrize("rate", [8000, 16000, 24000, 44100])
def test_resampling_block_by_block_is_that_of_the_whole(rate):
    samples, resample = torch.randn(rate + 17), StreamResampler(rate)
    blocks = [*samples.split(777), torch.zeros(0)]
    found = [resample(block, last=i == len(blocks) - 1) for i, block in enumerate(blocks)]
    torch.testing.assert_close(torch.cat(found), torch.cat([*resampled([samples], rate, "")]))


# ---- where a phrase ends


@pytest.mark.parametrize(
    "frames, expected",
    [
        ("_" * 50, None),  # blanks
        ("__ab_" + "_" * 9, None),  # 10 blanks of 12
        ("__ab_" + "_" * 11, (0, 14)),
        ("_" * 40 + "A" + "_" * 20, (15, 51)),
        ("Ab_" * 19, None),  # 57 frames of at most 60
        ("Abbb_____" + "Ab__" * 6 + "______Ab_" + "Ab__" * 6, (0, 35)),  # the gap in the middle
        ("Abb" + "b" * 60, (0, 60)),  # no gap
    ],
)
def test_where_a_phrase_ends(frames, expected):
    best = np.array(["_bA".find(one) if one in "_bA" else 3 for one in frames])
    assert phrase_end(best, lambda piece: piece == 2, silence=12, longest=60) == expected


@pytest.mark.parametrize("quiet, expected", [(1, None), (2, (0, 14))])
def test_quiet_audio_before_the_next_chunk_ends_a_phrase(quiet, expected):
    best = np.array([0] * 2 + [2] * 2 + [0] * 10)  # 10 blanks of 12
    ends = phrase_end(best, lambda piece: True, silence=12, longest=60, quiet=quiet)
    assert ends == expected


@pytest.mark.parametrize(
    "before, after, expected",
    [("..b..", "..b...", 2), ("bb.bb", "....", 4), ("bbbbb", "bb.a", 3), ("....", "..", 0)],
)
def test_quiet_frames_are_as_quiet_as_those_without_a_token(before, after, expected):
    energies = {".": 0.0, "b": 1.0, "a": 3.0}  # nats
    before, after = (
        torch.tensor([energies[one] for one in part]).repeat_interleave(4)[:, None].repeat(1, 80)
        for part in (before, after)
    )
    assert quiet_frames(before, after) == expected


# ---- events


@pytest.mark.slow
def test_blocks_do_not_change_the_final_segments(streamer):
    samples = noise(4.2)
    expected = finals(run(streamer.open(), samples, [len(samples)]))
    assert len(expected) > 1 and any(one.text for one in expected)
    found = finals(run(streamer.open(), samples, [160, 5000, 1, 3333]))
    assert times_and_texts(found) == times_and_texts(expected)
    longest = CONFIG.max_segment_duration + 1e-6
    assert all(one.end - one.start <= longest for one in expected), times_and_texts(expected)
    assert all(one.end <= later.start for one, later in zip(expected, expected[1:]))
    assert 0 <= expected[0].start and expected[-1].end <= 4.2


@pytest.mark.slow
def test_a_stream_is_the_same_alone_and_among_others(streamer):
    recordings = [noise(seconds, seed) for seed, seconds in enumerate((1.1, 2.4, 0.4, 1.5))]
    alone = [finals(run(streamer.open(), one, [1600])) for one in recordings]
    streams, together = [streamer.open() for _ in recordings], [[] for _ in recordings]
    for step in range(0, 40000, 1600):
        for stream, own, begin in zip(streams, recordings, (0, 0, 4800, 3200)):
            block = own[max(0, step - begin) : max(0, step + 1600 - begin)]
            if len(block):
                stream.push(block, end=step + 1600 - begin >= len(own))
        while True:
            for own, events in zip(together, streamer.advance(streams)):
                own += events
            if not any(stream.is_ready for stream in streams):
                break
    for found, expected in zip(map(finals, together), alone):
        assert times_and_texts(found) == times_and_texts(expected)


def test_partial_texts_keep_what_is_stable(streamer):
    events = run(streamer.open(), noise(4.2), [1600])
    partial = [event for event in events if isinstance(event, Partial)]
    assert partial
    if isinstance(streamer.encoding, Reencoding):  # the untrained causal encoder writes one word
        assert any(event.stable for event in partial)
    stable = ""
    for event in events:
        if isinstance(event, Segment):
            stable = ""
        else:
            assert event.text.startswith(event.stable) and event.stable.startswith(stable)
            stable = event.stable


@pytest.mark.slow
def test_final_texts_are_those_of_the_offline_llm(streamer, monkeypatch):
    recognizer, samples = streamer.recognizer, noise(3.0)
    features = fbank_extractor().extract(samples, 16000)[None]
    lens = torch.tensor([features.size(1)])
    is_causal = recognizer.model.encoder[0].config.causal
    out, _ = recognizer.model.encoder[0](features, lens, chunking=CHUNKING if is_causal else None)
    for one in finals(run(streamer.open(), samples, [1600])):
        first, end = round(one.start * 25), round(one.end * 25)
        own, n = features[:, 4 * first : 4 * end], torch.tensor([4 * (end - first)])
        if is_causal:
            output = EncoderOutput([0], out[:, first:end], torch.tensor([end - first]))
            [expected] = recognizer.decode(recognizer.embed([output], own, n))
        else:
            [expected] = recognizer.decode(recognizer.encode({"features": own, "feature_lens": n}))
        assert one.text == expected.text
        assert [word.text for word in one.words] == [word.text for word in expected.words]


@pytest.mark.slow
def test_memory_does_not_grow(streamer):
    stream, sizes = streamer.open(), []
    block = noise(1.0)
    for _ in range(8):
        stream.feed(block)
        phrase, states = stream.phrase, stream.phrase.states
        sizes.append(len(phrase.features))
        assert len(phrase) <= 25 * (CONFIG.max_segment_duration + 1)
        assert phrase.features.untyped_storage().size() == 4 * phrase.features.numel()
        shapes = [one.shape for state in states for one in state.stored]
        assert shapes == [
            one.shape for state in streamer.encoding.initial for one in state.stored
        ]
    assert max(sizes[4:]) <= max(sizes[:4]) + 100


@pytest.mark.parametrize(
    "name, options, sentence",
    [
        ("no CTC", {}, "streaming: no encoder has both a CTC head and a BPE model"),
        ("offline", {"chunking": Chunking(8, 16)}, "--chunk-size 8: the encoder is not causal"),
        ("causal", {"chunking": Chunking(7, 16)}, "--chunk-size 7 is not a multiple of 2"),
        ("causal", {"chunking": Chunking(8, 2)}, "--left-context-frames 2 is too short"),
    ],
)
def test_models_that_cannot_stream_are_an_error(recognizers, name, options, sentence):
    with pytest.raises(InputError, match=sentence):
        Streamer(recognizers[name], **options)


def test_the_chunks_of_the_model_are_the_default(recognizers):
    encoder = recognizers["causal"].model.encoder[0]
    assert Streamer(recognizers["causal"]).encoding.encoders[0].advance == 64
    encoder.set_chunkings((CHUNKING,))
    assert Streamer(recognizers["causal"]).encoding.encoders[0].advance == 16
    encoder.set_chunkings((OFFLINE,))


def test_an_unsupported_rate_is_an_error(streamer):
    with pytest.raises(InputError, match="stream: unsupported sample rate 44101 Hz"):
        streamer.open(sampling_rate=44101)


def test_phrases_without_speech_get_no_text(streamer, monkeypatch):
    """CTC writes words for noise."""
    monkeypatch.setattr(streamer, "detect_speech", lambda all: [torch.zeros(9) for _ in all])
    segments = finals(run(streamer.open(), noise(3.0), [4000]))
    assert segments and {(one.text, one.source) for one in segments} == {("", NO_SPEECH)}


@pytest.mark.slow
def test_phrases_have_their_samples(streamer):
    samples, found = noise(7.0), []
    streamer.detect_speech = lambda all: found.extend(all) or [torch.zeros(9) for _ in all]
    segments = finals(run(streamer.open(), samples, [4000, 16000]))
    assert len(found) == len(segments) > 2
    for segment, own in zip(segments, found):
        start = round(segment.start * 16000)
        assert own.equal(samples[start : start + len(own)])
        assert len(own) == pytest.approx((segment.end - segment.start) * 16000, abs=640)


@pytest.mark.slow
def test_samples_may_be_integers_or_arrays(streamer):
    integers, texts = (noise(2.0) * 32767).to(torch.int16), []
    for samples in (integers / 32768, integers, integers.numpy()):
        texts.append([event.text for event in run(streamer.open(), samples, [16000])])
    assert any(texts[0]) and texts[1:] == texts[:1] * 2


@pytest.mark.parametrize("samples", [torch.zeros(2, 16000), torch.full((160,), torch.nan)])
def test_wrong_samples_add_nothing(streamer, samples):
    stream = streamer.open()
    with pytest.raises(InputError, match="samples (have shape|contain NaN)"):
        stream.feed(samples)
    assert stream.finish() == []


def test_phrases_too_short_to_recognize_are_no_speech(streamer):
    short = Phrase(0, 1, torch.zeros(0), torch.zeros(0, 80), [])
    assert streamer._has_speech([short]) == [False]

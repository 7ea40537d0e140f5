"""Recordings through a tiny untrained recognizer: nothing is lost, doubled or mixed up."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from speechllm.audio.resample import audio_blocks
from speechllm.decoding.config import CheckpointConfig, SearchConfig
from speechllm.decoding.hypothesis import Hypothesis
from speechllm.decoding.recognition import Recognition
from speechllm.decoding.recognizer import one_ahead
from speechllm.errors import InputError
from speechllm.longform.chunker import AudioChunk
from speechllm.longform.config import LongformConfig
from speechllm.longform.transcriber import Transcriber, load_transcriber
from speechllm.longform.transcript import NO_SPEECH, Segment, Transcript
from speechllm.models.config import load_model_config
from speechllm.precision import auto_dtype

RATE = 16000


@pytest.fixture(scope="module")
def recognizers(tiny_exp, tiny_encoder_dir):
    """Two recognizers: by whether they use the CTC head."""
    checkpoint = CheckpointConfig(tiny_exp, checkpoint="epoch-2.pt", use_fp16=False)
    search = SearchConfig(max_new_tokens=6, guard="stop")

    def load(bpe_path):
        model = replace(load_model_config(tiny_exp), speech_encoder_bpe_path=bpe_path)
        return load_transcriber(model, checkpoint, search).recognizer

    return {True: load(str(tiny_encoder_dir / "bpe.model")), False: load("")}


@pytest.fixture(params=[True, False], ids=["CTC", "no CTC"])
def recognizer(recognizers, request):
    return recognizers[request.param]


def bursts(seconds, seed=0):
    """Loud for 0.5 s in every 1.2 s."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(round(seconds * RATE), generator=generator) * 0.1
    time = torch.arange(len(samples)) / RATE
    return samples * torch.where(time % 1.2 < 0.5, 1.0, 0.01)


def transcriber_of(recognizer, language=None, **options):
    return Transcriber(recognizer, LongformConfig(**options), language)


def transcribed(recognizer, *recordings, **options):
    named = [(str(number), blocks) for number, blocks in enumerate(recordings)]
    return transcriber_of(recognizer, **options)(named)


@pytest.mark.slow
def test_chunks_cover_the_recording(recognizer):
    samples = bursts(61.23)
    split = transcriber_of(recognizer, max_segment_duration=6.0).split
    chunks = list(split(samples.split(12345)))
    assert torch.cat([chunk.samples for chunk in chunks]).equal(samples)
    assert all(samples[start : start + len(own)].equal(own) for start, own, *_ in chunks)
    lengths = [len(chunk.samples) / RATE for chunk in chunks]
    assert max(lengths) <= 6.0 and min(lengths) >= 1.0 and len(chunks) > 9
    if not recognizer.ctc_decoder:  # cut where it is quiet
        assert all(0.5 <= chunk.start / RATE % 1.2 <= 1.2 for chunk in chunks[1:])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[160000] * 7, [1000] * 1120])
def test_blocks_and_batches_do_not_change_the_result(recognizer, sizes):
    samples = bursts(70.0)
    options = {"max_segment_duration": 8.0}
    [whole] = transcribed(recognizer, [samples], **options)
    [blocks] = transcribed(recognizer, samples.split(sizes), max_duration=8.0, **options)
    assert [(one.start, one.end) for one in blocks.segments] == [
        (one.start, one.end) for one in whole.segments
    ]
    assert blocks.text == whole.text and blocks.duration == whole.duration == 70.0


def test_a_short_recording_is_decoded_as_one_utterance(recognizer):
    samples = bursts(3.0)
    [transcript] = transcribed(recognizer, [samples])
    [segment] = transcript.segments
    features = Transcriber(recognizer).split.fbank.extract(samples, RATE)
    batch = {"features": features[None], "feature_lens": torch.tensor([300]), "seconds": 3.0}
    [(_, [expected])] = recognizer([batch])
    assert (segment.text, segment.source) == (expected.text, expected.source) and segment.text
    assert segment.flags == tuple(expected.flags) and 0 < segment.confidence <= 1
    assert [word.text for word in segment.words] == [word.text for word in expected.words or []]


@pytest.mark.slow
def test_non_speech_is_not_recognized(recognizer):
    silence = torch.zeros(9 * RATE)
    samples = torch.cat([silence, bursts(4.0, 1), silence, bursts(8.0, 2), silence])
    transcriber = transcriber_of(recognizer, max_segment_duration=12.0, min_silence=3.0)
    *streamed, (_, transcript) = transcriber.stream([("a", [samples])])
    segments = transcript.segments
    assert [one.source == NO_SPEECH for one in segments] == [True, False] * 2 + [True]
    borders = [one.start for one in segments] + [segments[-1].end]
    assert borders == pytest.approx([0, 9, 13, 22, 30, 39], abs=1.3)
    assert [one.end for one in segments] == borders[1:]
    assert all(one.text == "" for one in segments[::2])
    assert [segment for _, segment in streamed] == list(segments[1::2])
    [short] = transcribed(recognizer, [torch.cat([bursts(3.0), torch.zeros(6 * RATE)])])
    speech, silence = short.segments
    assert 3 <= speech.end <= 4.5 and speech.text and silence.source == NO_SPEECH
    assert short.duration == silence.end == 9.0


@pytest.mark.parametrize(("ctc_text", "text"), [("no", "go"), ("", ""), (None, "go")])
def test_a_segment_without_ctc_tokens_is_no_speech(recognizers, monkeypatch, ctc_text, text):
    """A click is not stationary, and an LLM generates words for it."""
    transcriber = Transcriber(recognizers[True])
    result = Recognition("go", Hypothesis([5], [-0.1]), ctc_text, flags=["disagrees with CTC"])
    monkeypatch.setattr(transcriber, "recognizer", lambda batches: [(None, [result])])
    chunk = AudioChunk(RATE, torch.zeros(RATE), torch.zeros(100, 80))
    [segment] = transcriber.recognize([chunk])
    assert (segment.text, segment.source) == (text, "LLM" if text else NO_SPEECH)
    assert (segment.start, segment.end, *segment.flags) == (1.0, 2.0, "disagrees with CTC")


@pytest.fixture
def takes_context(recognizers, monkeypatch):
    model = recognizers[True].model
    monkeypatch.setattr(model, "chat", replace(model.chat, use_context=True))
    return transcriber_of(recognizers[True], max_segment_duration=5.0)


@pytest.mark.slow
def test_every_chunk_has_the_context(takes_context):
    def confidences(context):
        [*_, (_, transcript)] = takes_context.stream([("a", [bursts(12.0)])], context)
        return [segment.confidence for segment in transcript.segments]

    without, names = confidences(""), confidences("Ada Lovelace, Grace Hopper")
    assert len(without) == len(names) > 2
    assert all(one != other for one, other in zip(without, names))
    assert confidences(" ") == without


def test_a_context_must_fit(takes_context, recognizers, monkeypatch):
    with pytest.raises(InputError, match=r"^the context has \d{4,} tokens; speech and transcript"):
        takes_context.check_context("Ada Lovelace " * 5000)
    monkeypatch.undo()
    with pytest.raises(InputError, match="^context 'Ada': the model was trained without --use-c"):
        Transcriber(recognizers[True]).check_context("Ada")


def test_words_are_in_their_segments_in_order(recognizers):
    [transcript] = transcribed(recognizers[True], [bursts(30.0)], max_segment_duration=5.0)
    assert len(transcript.segments) > 5
    for segment in transcript.segments:
        assert " ".join(word.text for word in segment.words) == " ".join(segment.text.split())
        times = [time for word in segment.words for time in (word.start, word.end)]
        assert times == sorted(times)
        assert segment.start <= times[0] + 1e-6 and times[-1] <= segment.end + 1e-6


@pytest.mark.slow
def test_recordings_in_one_batch_are_kept_apart(recognizer, caplog):
    recordings = [[bursts(2.0, 1)], [bursts(25.0, 2)], [], [bursts(0.1)], [bursts(3.0, 3)]]
    options = {"max_segment_duration": 5.0}
    alone = [transcribed(recognizer, blocks, **options)[0] for blocks in recordings]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        together = transcribed(recognizer, *recordings, **options, language="fr")
    assert [one.name for one in together] == ["0", "1", "2", "3", "4"]
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.duration for one in together] == pytest.approx([2.0, 25.0, 0.0, 0.1, 3.0])
    assert together[2].segments == () and together[2].language == "fr"
    assert together[3].segments == (Segment(0.0, 0.1, "", source=NO_SPEECH),)
    assert "2 (0.00 s): no speech found, or too short" in caplog.text
    assert "3 (0.10 s): no speech found, or too short" in caplog.text


@pytest.mark.parametrize("samples", [1, 79, 639, 640, 1600])
def test_a_very_short_recording_is_no_speech(recognizer, samples):
    [short] = transcribed(recognizer, [torch.randn(samples)])
    assert [one.source for one in short.segments] == [NO_SPEECH] and short.error is None
    assert short.segments[0].end == samples / RATE


def test_an_unreadable_recording_does_not_stop_the_others(recognizer):
    def damaged():
        yield bursts(10.0)
        raise InputError("b.wav is damaged")

    recordings = [("a", [bursts(2.0)]), ("b", damaged()), ("c", [bursts(2.0)])]
    results = list(transcriber_of(recognizer, max_segment_duration=4.0).stream(recordings))
    transcripts = [one for _, one in results if isinstance(one, Transcript)]
    assert [(one.name, one.error) for one in transcripts] == [
        ("a", None), ("b", "b.wav is damaged"), ("c", None)
    ]  # fmt: skip
    names = [name for name, one in results if isinstance(one, Segment)]
    assert names == sorted(names) and {"a", "c"} <= set(names)


@pytest.mark.parametrize("ahead", [False, True], ids=["CPU", "one batch ahead"])
def test_a_failing_segment_does_not_stop_the_others(recognizers, monkeypatch, caplog, ahead):
    recognizer = recognizers[False]
    decode = recognizer.decode

    def fail(encoded):
        if any(abs(seconds - 2.5) < 0.1 for seconds in encoded.seconds):
            raise RuntimeError("out of luck")
        return decode(encoded)

    monkeypatch.setattr(recognizer, "decode", fail)
    if ahead:
        monkeypatch.setattr(type(recognizer), "__call__", recognized_one_ahead)
    recordings = [("a", [bursts(2.0)]), ("b", [bursts(2.5)]), ("c", [bursts(2.0)])] * 2
    transcripts = transcriber_of(recognizer, max_duration=7.0)(recordings)
    expected = [("a", False), ("b", True), ("c", False)] * 2
    assert [(one.name, bool(one.error)) for one in transcripts] == expected
    assert all(one.text or one.error for one in transcripts)
    assert transcripts[1].error == "b: unexpected RuntimeError from 0.0 to 2.5 s: out of luck"
    assert "Traceback" in caplog.text


def recognized_one_ahead(recognizer, batches):
    """Recognize as on a GPU."""
    for batch, encoded in one_ahead((batch, recognizer.encode(batch)) for batch in batches):
        yield batch, recognizer.decode(encoded)


def test_a_failing_split_does_not_stop_the_others(recognizers, monkeypatch):
    transcriber = transcriber_of(recognizers[False])
    extract = transcriber.split.fbank.extract

    def fail(samples, rate):
        if len(samples) == 2.5 * RATE:
            raise RuntimeError("out of luck")
        return extract(samples, rate)

    monkeypatch.setattr(transcriber.split.fbank, "extract", fail)
    transcripts = transcriber([("a", [bursts(2.5)]), ("b", [bursts(2.0)])])
    assert [one.error for one in transcripts] == ["a: unexpected RuntimeError: out of luck", None]


def test_segments_are_yielded_while_the_recording_is_read(recognizer):
    read = []

    def live():
        for block in bursts(200.0).split(RATE):
            read.append(len(block))
            yield block

    transcriber = transcriber_of(recognizer, max_segment_duration=5.0, max_duration=10.0)
    name, segment = next(transcriber.stream([("live", live())]))
    assert name == "live" and segment.start == 0.0 and len(read) < 60


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_segment_duration", 2.0, "--max-segment-duration 2 must be from 3 to 3600"),
        ("min_silence", 0.0, "--min-silence 0 must be"),
        ("max_segment_duration", 3000.0, r"-duration 3000 needs \d+ positions; the LLM has \d+"),
    ],
)
def test_invalid_options_are_named(recognizers, option, value, message):
    with pytest.raises(InputError, match=message):
        transcriber_of(recognizers[False], **{option: value})


@pytest.mark.shared
def test_joined_clips_are_cut_where_they_were_joined(recognizers, shared, monkeypatch):
    """By energy alone; tests/benchmarks/long_recordings.py measures with a trained CTC head."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    from long_recordings import pause

    paths = sorted((shared / "corpora" / "an4" / "flac").rglob("*.flac"))[::40][:20]
    if not paths:
        pytest.skip("AN4 is absent")
    parts, borders = [], []
    for path in paths:
        clip = torch.cat(list(audio_blocks(path)))
        gap = pause(clip, RATE // 2)
        parts += [gap, clip, gap]
        borders.append(sum(map(len, parts)))
    joined = torch.cat(parts)
    starts = [chunk.start for chunk in Transcriber(recognizers[False]).split([joined])][1:]
    distances = [min(abs(start - border) for start in starts) / RATE for border in borders[:-1]]
    assert sum(distance < 0.5 for distance in distances) >= 18
    loud = joined.square().mean()
    assert all(joined[start - 800 : start + 800].square().mean() < loud / 10 for start in starts)


@pytest.mark.parametrize(
    "avx512_bf16, amx, size, expected",
    [
        (True, False, 896, "bfloat16"),
        (False, True, 896, "bfloat16"),
        (False, False, 896, "float32"),
        (True, True, 128, "float32"),
    ],
)
def test_dtype_auto_follows_cpu_and_llm(monkeypatch, avx512_bf16, amx, size, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert auto_dtype(size) == getattr(torch, expected)

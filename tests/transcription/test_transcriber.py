"""Recordings through a tiny untrained recognizer: nothing is lost, doubled or mixed up."""

import logging
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import transcribe
from speechllm.decoding.draft import Hypothesis
from speechllm.decoding.recognizer import Recognition
from speechllm.errors import InputError
from speechllm.transcription.audio import audio_blocks
from speechllm.transcription.transcriber import Stretch, Transcriber
from speechllm.transcription.transcript import NOBODY, Segment, Transcript

RATE = 16000


@pytest.fixture(scope="module")
def recognizers(tiny_exp, tiny_encoder_dir, tiny_transcribe_argv):
    """With a CTC head that is read, and without."""

    def load(*flags):
        argv = [*tiny_transcribe_argv(tiny_exp), *flags, "x.wav"]
        return transcribe.load_recognizer(transcribe.get_parser().parse_args(argv))

    bpe = str(tiny_encoder_dir / "bpe.model")
    return {True: load("--speech-encoder-bpe-path", bpe), False: load()}


@pytest.fixture(params=[True, False], ids=["CTC", "no CTC"])
def recognizer(recognizers, request):
    return recognizers[request.param]


def bursts(seconds, seed=0):
    """Loud for 0.5 s in every 1.2 s."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(round(seconds * RATE), generator=generator) * 0.1
    place = torch.arange(len(samples)) / RATE
    return samples * torch.where(place % 1.2 < 0.5, 1.0, 0.01)


def transcribed(recognizer, *sounds, **options):
    named = [(str(number), blocks) for number, blocks in enumerate(sounds)]
    return Transcriber(recognizer, **options)(named)


def test_parts_make_up_the_recording(recognizer):
    samples = bursts(61.23)
    transcriber = Transcriber(recognizer, max_segment=6.0)
    parts = list(transcriber.cut(samples.split(12345)))
    assert torch.cat([part.samples for part in parts]).equal(samples)
    assert all(samples[start : start + len(part)].equal(part) for start, part, *_ in parts)
    lengths = [len(part.samples) / RATE for part in parts]
    assert max(lengths) <= 6.0 and min(lengths) >= 1.0 and len(parts) > 9


def test_without_ctc_it_is_cut_where_it_is_quiet(recognizers):
    parts = Transcriber(recognizers[False], max_segment=6.0).cut([bursts(61.23)])
    starts = [part.start / RATE for part in parts][1:]
    assert all(0.5 <= start % 1.2 <= 1.2 for start in starts)


@pytest.mark.parametrize("sizes", [[160000] * 7, [1000] * 1120])
def test_blocks_and_batches_do_not_matter(recognizer, sizes):
    samples = bursts(70.0)
    [whole] = transcribed(recognizer, [samples], max_segment=8.0)
    [blocks] = transcribed(recognizer, samples.split(sizes), max_segment=8.0, max_duration=8.0)
    assert [(one.start, one.end) for one in blocks.segments] == [
        (one.start, one.end) for one in whole.segments
    ]
    assert blocks.text == whole.text and blocks.seconds == whole.seconds == 70.0


def test_a_short_recording_is_what_decoding_makes_of_it(recognizer):
    samples = bursts(3.0)
    [transcript] = transcribed(recognizer, [samples])
    [segment] = transcript.segments
    features = Transcriber(recognizer).fbank.extract(samples, RATE)
    batch = {"features": features[None], "feature_lens": torch.tensor([300]), "seconds": 3.0}
    [(_, [answer])] = recognizer([batch])
    assert (segment.text, segment.source) == (answer.text, answer.source) and segment.text
    assert segment.reasons == tuple(answer.reasons) and 0 < segment.confidence <= 1
    assert [word.text for word in segment.words] == [word.word for word in answer.words or []]


def test_where_nothing_is_said_nobody_is_asked(recognizer):
    silence = torch.zeros(9 * RATE)
    sounds = [silence, bursts(4.0, 1), silence, bursts(8.0, 2), silence]
    transcriber = Transcriber(recognizer, max_segment=12.0, pause=3.0)
    [transcript] = transcriber([("a", [torch.cat(sounds)])])
    assert [one.source == NOBODY for one in transcript.segments] == [True, False] * 2 + [True]
    borders = [one.start for one in transcript.segments] + [transcript.segments[-1].end]
    assert borders == pytest.approx([0, 9, 13, 22, 30, 39], abs=1.3)
    assert [one.end for one in transcript.segments] == borders[1:]
    assert all(one.text == "" for one in transcript.segments[::2])
    streamed = [one for _, one in transcriber.stream([("a", [torch.cat(sounds)])])]
    assert streamed == [*transcript.segments[1::2], transcript]


def test_a_short_recording_is_still_too(recognizer):
    [transcript] = transcribed(recognizer, [torch.cat([bursts(3.0), torch.zeros(6 * RATE)])])
    said, unheard = transcript.segments
    assert 3 <= said.end <= 4.5 and said.text and unheard.source == NOBODY
    assert transcript.seconds == unheard.end == 9.0


def test_what_ctc_does_not_hear_is_not_said(recognizers, monkeypatch):
    """A click is not still: an LLM makes words of it."""

    def heard(text):
        transcriber = Transcriber(recognizers[True])
        answer = Recognition("go", Hypothesis([5], [-0.1]), text, reasons=["disagrees with CTC"])
        monkeypatch.setattr(transcriber, "recognizer", lambda batches: [(None, [answer])])
        return transcriber.recognize([Stretch(RATE, torch.zeros(RATE), torch.zeros(100, 80))])

    [said], [unheard], [without_ctc] = heard("no"), heard(""), heard(None)
    assert (said.text, said.source) == (without_ctc.text, without_ctc.source) == ("go", "LLM")
    assert (unheard.text, unheard.source, unheard.words) == ("", NOBODY, ())
    assert (unheard.start, unheard.end, *unheard.reasons) == (1.0, 2.0, "disagrees with CTC")


@pytest.fixture
def takes_context(recognizers, monkeypatch):
    model = recognizers[True].model
    monkeypatch.setattr(model, "chat", replace(model.chat, use_context=True))
    return Transcriber(recognizers[True], max_segment=5.0)


def test_a_context_is_told_with_every_stretch(takes_context):
    def told(context):
        [*_, (_, transcript)] = takes_context.stream([("a", [bursts(12.0)])], context)
        return [segment.confidence for segment in transcript.segments]

    without, names = told(""), told("Ada Lovelace, Grace Hopper")
    assert len(without) == len(names) > 2
    assert all(one != other for one, other in zip(without, names))
    assert told(" ") == without


def test_a_context_must_fit(takes_context, recognizers, monkeypatch):
    takes_context.check_context("Ada Lovelace")
    with pytest.raises(InputError, match=r"^a context of \d{4,} tokens: beside speech and text "):
        takes_context.check_context("Ada Lovelace " * 5000)
    monkeypatch.undo()
    Transcriber(recognizers[True]).check_context("")
    with pytest.raises(InputError, match="^a context, 'Ada': the model was trained without --use-"):
        Transcriber(recognizers[True]).check_context("Ada")


def test_a_batch_in_one_go(recognizer):
    transcriber = Transcriber(recognizer)
    sounds = [bursts(3.0, 1), torch.zeros(5 * RATE), bursts(2.0, 2)]
    stretches = [next(transcriber.cut([sound])) for sound in sounds]
    together = transcriber.recognize(stretches)
    assert [one.source == NOBODY for one in together] == [False, True, False]
    for one, stretch in zip(together, stretches, strict=True):
        [alone] = transcriber.recognize([stretch])
        assert (one.start, one.end, one.text) == (alone.start, alone.end, alone.text)


def test_words_are_in_their_segments_in_order(recognizers):
    [transcript] = transcribed(recognizers[True], [bursts(30.0)], max_segment=5.0)
    assert len(transcript.segments) > 5
    for segment in transcript.segments:
        assert " ".join(word.text for word in segment.words) == " ".join(segment.text.split())
        times = [time for word in segment.words for time in (word.start, word.end)]
        assert times == sorted(times)
        assert segment.start <= times[0] + 1e-6 and times[-1] <= segment.end + 1e-6


def test_recordings_of_a_batch_are_told_apart(recognizer, caplog):
    sounds = [[bursts(2.0, 1)], [bursts(25.0, 2)], [], [bursts(0.1)], [bursts(3.0, 3)]]
    alone = [transcribed(recognizer, sound, max_segment=5.0)[0] for sound in sounds]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        together = transcribed(recognizer, *sounds, max_segment=5.0)
    assert [one.name for one in together] == ["0", "1", "2", "3", "4"]
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.seconds for one in together] == pytest.approx([2.0, 25.0, 0.0, 0.1, 3.0])
    assert together[2].segments == ()
    assert together[3].segments == (Segment(0.0, 0.1, "", source=NOBODY),)
    assert "2 of 0.00 s: nothing is said, or it is too short to hear" in caplog.text
    assert "3 of 0.10 s: nothing is said, or it is too short to hear" in caplog.text


@pytest.mark.parametrize("samples", [1, 79, 80, 639, 640, 1600])
def test_next_to_nothing_is_too_short_to_hear(recognizer, samples):
    tiny, other = transcribed(recognizer, [torch.randn(samples)], [bursts(2.0)])
    assert [one.source for one in tiny.segments] == ["nobody"] and tiny.error is None
    assert tiny.segments[0].end == samples / RATE
    assert other.segments[0].source != "nobody"


def test_batches_are_within_their_seconds(recognizer):
    transcriber = Transcriber(recognizer, max_duration=10.0)
    named = [(str(i), [bursts(1.0 + i % 3)]) for i in range(20)]
    batches = list(transcriber._batches(named, "", deque()))
    assert sum(len(batch["pieces"]) for batch in batches) == 20
    shapes = [batch["features"].shape for batch in batches]
    assert all(shape[0] * shape[1] <= 1000 for shape in shapes) and len(batches) < 10


def test_what_cannot_be_read_ends_one_recording_alone(recognizer):
    def broken():
        yield bursts(10.0)
        raise InputError("b.wav is broken")

    found = list(
        Transcriber(recognizer, max_segment=4.0).stream(
            [("a", [bursts(2.0)]), ("b", broken()), ("c", [bursts(2.0)])]
        )
    )
    ends = [one for _, one in found if isinstance(one, Transcript)]
    assert [(one.name, one.error) for one in ends] == [
        ("a", None), ("b", "b.wav is broken"), ("c", None)
    ]  # fmt: skip
    names = [name for name, one in found if isinstance(one, Segment)]
    assert names == sorted(names) and {"a", "c"} <= set(names)


def test_segments_are_given_while_the_recording_goes_on(recognizer):
    read = []

    def live():
        for block in bursts(200.0).split(RATE):
            read.append(len(block))
            yield block

    found = Transcriber(recognizer, max_segment=5.0, max_duration=10.0).stream([("live", live())])
    name, segment = next(found)
    assert name == "live" and segment.start == 0.0 and len(read) < 60


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_segment": 2.0}, "--max-segment 2.0 must be at least 3"),
        ({"max_segment": float("nan")}, "--max-segment nan must be"),
        ({"max_segment": float("inf")}, "--max-segment inf must be at least 3 and finite"),
        ({"pause": 0.0}, "--pause 0.0 must be above 0"),
        ({"pause": float("inf")}, "--pause inf must be above 0 and finite"),
        ({"max_duration": 0.0}, "--max-duration 0.0 must be above 0"),
        ({"max_duration": float("nan")}, "--max-duration nan must be above 0"),
        ({"max_duration": float("inf")}, "--max-duration inf must be above 0 and finite"),
        ({"max_segment": 1e5}, r"--max-segment 100000 needs \d+ positions, the LLM has \d+"),
    ],
)
def test_what_cannot_be_is_said(recognizer, options, sentence):
    with pytest.raises(InputError, match=sentence):
        Transcriber(recognizer, **options)


def test_the_language_is_passed_on(recognizer):
    [transcript] = transcribed(recognizer, [bursts(1.5)], language="fr")
    assert transcript.language == "fr"


def test_real_speech_is_cut_between_clips(recognizers, shared, monkeypatch):
    """By energy alone, as no trained CTC head is at hand; the benchmark measures with one."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    from long_recordings import silence

    paths = sorted((shared / "corpora" / "an4" / "flac").rglob("*.flac"))[::40][:20]
    if not paths:
        pytest.skip("AN4 is not there")
    sounds, borders = [], []
    for path in paths:
        clip = torch.cat(list(audio_blocks(path)))
        gap = silence(clip, RATE // 2)
        sounds += [gap, clip, gap]
        borders.append(sum(map(len, sounds)))
    joined = torch.cat(sounds)
    starts = [part.start for part in Transcriber(recognizers[False]).cut([joined])][1:]
    near = [min(abs(start - border) for start in starts) / RATE for border in borders[:-1]]
    assert sum(distance < 0.5 for distance in near) >= 18
    loud = joined.square().mean()
    assert all(joined[start - 800 : start + 800].square().mean() < loud / 10 for start in starts)

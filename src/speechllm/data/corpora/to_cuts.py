"""Conversion of utterances to cuts, or to errors."""

import re
import unicodedata

from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment

from speechllm.audio.fbank import SAMPLING_RATE
from speechllm.data.corpora.audio_files import AudioFile, Problem
from speechllm.data.corpora.utterance import Utterance
from speechllm.data.security import check_safe
from speechllm.data.validation import LOST, CutError, shown_id, validate_cut
from speechllm.errors import InputError

MIN_DURATION = 0.025  # s, one fbank window
NOISE = "(noise|music|laugh(s|ter)?|applause|silence|inaudible|unintelligible|cough(s|ing)?|breath)"
TAG = re.compile(
    rf"<[^<>]*>|\[[^\[\]]*\]|\{{[^{{}}]*\}}|\(\(?{NOISE}\)?\)|\*{NOISE}\*", re.IGNORECASE
)
OVERSHOOT = 0.5  # s by which a segment may exceed its file, as in Kaldi


def to_cut(
    utterance: Utterance, file: AudioFile | Problem, language: str | None, channel: int | None
) -> MonoCut | CutError:
    """Convert an utterance to a 16 kHz cut or its error; `language` and `channel` are defaults."""
    problem = utterance.problem or _field_problem(utterance)
    if problem or not isinstance(file, AudioFile):
        return utterance_error(utterance, *(problem or file))
    channel = channel if utterance.channel is None else utterance.channel
    if file.channels == 1:  # Kaldi and lhotse may give its number in the conversation
        channel = 0
    if problem := _segment_problem(utterance, file, channel):
        return utterance_error(utterance, *problem)
    cut = _cut(utterance, file, language, channel)
    try:
        errors = validate_cut(check_safe(cut), need_features=False)
    except InputError as error:
        return utterance_error(utterance, "malformed", str(error))
    return utterance_error(utterance, errors[0].reason, errors[0].message) if errors else cut


def without_tags(text: str) -> str:
    """Remove noise tags such as `<NOISE>`, `[music]`, `{breath}` and `(laughter)`."""
    return " ".join(TAG.sub(" ", text).split())


def has_words(text: str) -> bool:
    """Return true if the text contains a letter or digit outside tags."""
    return any(unicodedata.category(letter)[0] in "LN" for letter in without_tags(text))


def utterance_error(utterance: Utterance, reason: str, what: str) -> CutError:
    """Return an error whose message starts with the utterance's location in the source."""
    return CutError(shown_id(utterance), reason, f"{utterance}: {what}")


def _field_problem(utterance: Utterance) -> Problem | None:
    for name in ("id", "text", "speaker", "language", "context"):
        if not isinstance(value := getattr(utterance, name), str | None):
            return "malformed", f"{name} {value!r} is not a string"
    if not utterance.id:
        return "invalid-id", "empty id"
    if not utterance.text.strip():
        return "no-text", "empty text"
    if not has_words(utterance.text) and not LOST.search(utterance.text):
        return "no-words", f"text without a word: {ascii(utterance.text[:40])}"
    if utterance.speaker == "":  # None means unknown
        return "malformed", "empty speaker"
    if not re.fullmatch(r"[\w.-]*", utterance.split):
        return "malformed", f"split {utterance.split!r} cannot be part of a file name"
    return None


def _segment_problem(utterance: Utterance, file: AudioFile, channel: int | None) -> Problem | None:
    if channel is None:
        return "channels", f"{file.path} has {file.channels} channels: choose one with --channel"
    if channel >= file.channels:
        return "channels", f"{file.path} has {file.channels} channels, not {channel + 1}"
    end = file.duration if utterance.end is None else utterance.end
    if end > file.duration + OVERSHOOT:
        what = f"ends at {end:g} s, but {file.path} at {file.duration:g} s"
        return "supervision-outside", what
    if (seconds := min(end, file.duration) - utterance.start) < MIN_DURATION:
        return "malformed", f"{seconds:.3f} s of {file.path} are fewer than {MIN_DURATION:g} s"
    return None


def _cut(utterance: Utterance, file: AudioFile, language: str | None, channel: int) -> MonoCut:
    name = utterance.recording or utterance.id
    recording = Recording(
        id=name,
        sources=[AudioSource("file", list(range(file.channels)), str(file.path))],
        sampling_rate=file.sampling_rate,
        num_samples=file.num_samples,
        duration=file.duration,
    ).resample(SAMPLING_RATE)
    first = round(utterance.start * SAMPLING_RATE)
    end = file.duration if utterance.end is None else utterance.end
    last = min(round(end * SAMPLING_RATE), recording.num_samples)
    duration = (last - first) / SAMPLING_RATE
    supervision = SupervisionSegment(
        id=utterance.id,
        recording_id=name,
        start=0.0,
        duration=duration,
        channel=channel,
        text=" ".join(utterance.text.split()),
        speaker=utterance.speaker or name,
        language=utterance.language or language,
        custom={"context": utterance.context} if utterance.context else None,
    )
    return MonoCut(
        utterance.id, first / SAMPLING_RATE, duration, channel, [supervision], recording=recording
    )

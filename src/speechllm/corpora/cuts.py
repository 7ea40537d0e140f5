"""Utterances to cuts, or to what is wrong with them."""

import re

from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment

from speechllm.corpora.audio import AudioFile, Problem
from speechllm.corpora.utterance import Utterance
from speechllm.cut_faults import Fault, cut_faults, shown_id
from speechllm.errors import InputError
from speechllm.features import SAMPLING_RATE
from speechllm.manifest_safety import safe_cut

MIN_DURATION = 0.025  # s, one fbank window
OVERSHOOT = 0.5  # s by which a segment may end after its file, as in Kaldi


def to_cut(
    utterance: Utterance, file: AudioFile | Problem, language: str | None, channel: int | None
) -> MonoCut | Fault:
    """The cut of an utterance at 16 kHz, or the first thing that is wrong with it.

    Args:
      language: of utterances that have none.
      channel: the one to take of files with several, where the utterance does not tell.
    """
    problem = utterance.problem or _problem(utterance)
    if not problem and not isinstance(file, AudioFile):
        problem = file
    if not problem:
        channel = _channel(utterance, file, channel)
        problem = _problem_of_part(utterance, file, channel)
    if problem:
        return fault(utterance, *problem)
    cut = _cut(utterance, file, language, channel)
    try:
        faults = cut_faults(safe_cut(cut), need_features=False)
    except InputError as error:
        return fault(utterance, "malformed", str(error))
    return fault(utterance, faults[0].reason, faults[0].sentence) if faults else cut


def fault(utterance: Utterance, reason: str, what: str) -> Fault:
    """A fault of `cut_faults.REASONS`, with a sentence that says where the utterance is."""
    return Fault(shown_id(utterance), reason, f"{utterance}: {what}")


def _problem(utterance: Utterance) -> Problem | None:
    """What is wrong with the texts of an utterance, if its source knows of nothing."""
    for name in ("id", "text", "speaker", "language", "context"):
        if not isinstance(value := getattr(utterance, name), str | None):
            return "malformed", f"its {name} {value!r} is no text"
    if not utterance.id:
        return "bad-id", "empty id"
    if not utterance.text.strip():
        return "no-text", "empty text"
    if utterance.speaker == "":  # an unknown one is no empty one
        return "malformed", "empty speaker"
    if not re.fullmatch(r"[\w.-]*", utterance.split):
        return "malformed", f"split {utterance.split!r} is not usable in a file name"
    return None


def _channel(utterance: Utterance, file: AudioFile, channel: int | None) -> int | None:
    if file.channels == 1:  # Kaldi and lhotse call it the channel that it was in a conversation
        return 0
    return channel if utterance.channel is None else utterance.channel


def _problem_of_part(utterance: Utterance, file: AudioFile, channel: int | None) -> Problem | None:
    if channel is None:
        return "channels", f"{file.channels} channels in {file.path}, see --channel"
    if channel >= file.channels:
        return "channels", f"no channel {channel + 1} in {file.path}, which has {file.channels}"
    if utterance.end is not None and utterance.end > file.duration + OVERSHOOT:
        return (
            "supervision-outside",
            f"it ends at {utterance.end:g} s, {file.path} at {file.duration:g} s",
        )
    if (seconds := _end(utterance, file) - utterance.start) < MIN_DURATION:
        return "malformed", f"{seconds:.3f} s of {file.path} are shorter than {MIN_DURATION:g} s"
    return None


def _end(utterance: Utterance, file: AudioFile) -> float:
    return file.duration if utterance.end is None else min(utterance.end, file.duration)


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
    last = min(round(_end(utterance, file) * SAMPLING_RATE), recording.num_samples)
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
        id=utterance.id,
        start=first / SAMPLING_RATE,
        duration=duration,
        channel=channel,
        recording=recording,
        supervisions=[supervision],
    )

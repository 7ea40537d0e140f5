"""What can be wrong with a cut: each fault has the name of its kind and a sentence with the values.

    malformed             a duration or another field that is none
    bad-id                no text, or one that cannot be written into a line
    duplicate-id          another cut of the file had this id
    no-text               no supervision, no text, or a blank one
    not-unicode           half of a surrogate pair, or U+FFFD: characters were lost
    long-text             more than anybody says in the time
    supervision-outside   it reaches beyond the cut
    no-features, feature-dim, frame-shift, no-audio, sampling-rate, channels
    wrong-length          features of fewer or more frames than the cut, audio likewise
    unreadable-features, unreadable-audio, not-finite
    positions             more than the LLM has
    not-cached            the encoder cache has no outputs of it
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lhotse import MonoCut, validate
from lhotse.audio.backend import info
from lhotse.cut import Cut
from lhotse.utils import compute_num_frames

from speechllm.errors import InputError, first_line
from speechllm.features import FRAME_SHIFT, NUM_MEL_BINS, SAMPLING_RATE

REASONS = (
    "malformed", "bad-id", "duplicate-id", "no-text", "not-unicode", "long-text",
    "supervision-outside", "no-features", "feature-dim", "frame-shift", "no-audio",
    "sampling-rate", "channels", "wrong-length", "unreadable-features", "unreadable-audio",
    "not-finite", "positions", "not-cached",
)  # fmt: skip
TOLERANCE = 2e-3  # s, lhotse's, by which a supervision may reach beyond its cut
CHARACTERS_A_SECOND = 100  # nobody speaks half as fast
ALWAYS_SHORT = 1000  # characters
FEW = 0.025  # s of audio that may be missing: decoders of some formats differ so much
LOST = re.compile("[\ud800-\udfff\ufffd]")


class Fault(NamedTuple):
    """One thing that is wrong with one cut."""

    id: str
    reason: str  # of REASONS
    sentence: str


def cut_faults(
    cut: Cut, *, need_text: bool | None = True, need_features: bool = True
) -> list[Fault]:
    """What its manifest tells is wrong with a cut; nothing is read.

    Args:
      need_text: False where it may be blank, as in a test set; None for noise.
      need_features: False where they are to be computed from the audio.
    """
    name = shown_id(cut)
    try:
        found = [*_identity_faults(cut)]
        if not found:
            found += _supervision_faults(cut)
            found += [] if need_text is None else text_faults(cut, need_text)
            found += _input_faults(cut, need_features)
        if not found:
            validate(cut)  # what lhotse's dataset would stop at
    except Exception as error:  # values of other types fail in as many ways
        found = [("malformed", f"cannot be used: {first_line(error)}")]
    return [Fault(name, reason, f"cut {name} {what}") for reason, what in found]


def shown_id(cut: Cut) -> str:
    """The id, written so that it can be printed."""
    is_plain = isinstance(cut.id, str) and cut.id.isprintable()
    return cut.id if is_plain else ascii(cut.id)


def duplicate(cut: Cut) -> Fault:
    return Fault(shown_id(cut), "duplicate-id", f"cut {shown_id(cut)} is there twice")


def _identity_faults(cut: Cut) -> Iterator[tuple[str, str]]:
    if not isinstance(cut.id, str) or not cut.id.isprintable() or not cut.id.strip():
        yield "bad-id", "has an id that cannot be written"
    if not 0 < cut.duration < math.inf:
        yield "malformed", f"has a duration of {cut.duration:g} s"


def _supervision_faults(cut: Cut) -> Iterator[tuple[str, str]]:
    for supervision in cut.supervisions:
        start, end = supervision.start, supervision.end
        if not (start >= -TOLERANCE and end <= cut.duration + TOLERANCE):  # also if it is no number
            yield (
                "supervision-outside",
                f"of {cut.duration:g} s has a supervision from {start:g} to {end:g} s",
            )


def text_faults(cut: Cut, need_text: bool = True) -> Iterator[tuple[str, str]]:
    """(reason, what follows the id in the sentence) of what is wrong with its texts."""
    texts = [supervision.text for supervision in cut.supervisions]
    if others := [text for text in texts if not isinstance(text, str | None)]:
        yield "malformed", f"has a {type(others[0]).__name__} as its text"
        return
    if not texts or any(text is None or (need_text and not text.strip()) for text in texts):
        yield "no-text", "has no text"
        return
    if need_text and LOST.search(" ".join(texts)):
        yield "not-unicode", "has a text with characters that are lost"
    length = sum(map(len, texts))
    if need_text and length > most_characters(cut.duration):
        yield "long-text", f"of {cut.duration:g} s has a text of {length} characters"


def most_characters(seconds: float) -> float:
    """More in the time is no transcript."""
    return max(ALWAYS_SHORT, CHARACTERS_A_SECOND * seconds)


def _input_faults(cut: Cut, need_features: bool) -> Iterator[tuple[str, str]]:
    if need_features:
        yield from _feature_faults(cut)
    elif not cut.has_recording:
        yield "no-audio", "has no audio to compute features from"
    else:
        if cut.sampling_rate != SAMPLING_RATE:
            yield "sampling-rate", f"has audio of {cut.sampling_rate} Hz, not {SAMPLING_RATE} Hz"
        if cut.num_channels != 1:
            yield "channels", f"has audio of {cut.num_channels} channels, not 1"


def _feature_faults(cut: Cut) -> Iterator[tuple[str, str]]:
    if not cut.has_features:
        yield "no-features", "has no features (see --on-the-fly-feats)"
        return
    if cut.num_features != NUM_MEL_BINS:
        yield "feature-dim", f"has features of {cut.num_features} dimensions, not {NUM_MEL_BINS}"
    if abs(cut.frame_shift - FRAME_SHIFT) > 1e-6:
        yield (
            "frame-shift",
            f"has features every {cut.frame_shift * 1000:g} ms, not {FRAME_SHIFT * 1000:g} ms",
        )
    elif isinstance(cut, MonoCut):  # others are made of such
        yield from _length_faults(cut)


def _length_faults(cut: MonoCut) -> Iterator[tuple[str, str]]:
    """cut.num_frames follows from the duration, the features' own number was counted."""
    feats = cut.features
    expected = compute_num_frames(feats.duration, feats.frame_shift, cut.sampling_rate)
    if abs(feats.num_frames - expected) > 1:
        yield (
            "wrong-length",
            f"has features of {feats.num_frames} frames for {feats.duration:g} s, "
            f"which make {expected}",
        )
    if feats.start > cut.start + FRAME_SHIFT or feats.end < cut.end - FRAME_SHIFT:
        yield (
            "wrong-length",
            f"from {cut.start:g} to {cut.end:g} s has features from {feats.start:g} "
            f"to {feats.end:g} s",
        )


def reading_faults(cut: Cut, need_features: bool = True) -> list[Fault]:
    """What is wrong with the features or the audio of a cut without `cut_faults`; they are read."""
    name = shown_id(cut)
    what = "features" if need_features else "audio"
    if not need_features and (faults := header_faults(cut)):
        return faults
    try:
        data = cut.load_features() if need_features else cut.load_audio()  # (T, 80) | (1, N)
        finite = np.isfinite(data).all()  # of no numbers an error
    except Exception as error:  # lhotse's storages each have their own
        sentence = f"the {what} of cut {name} cannot be read: {first_line(error)}"
        return [Fault(name, f"unreadable-{what}", sentence)]
    expected = (cut.num_frames, NUM_MEL_BINS) if need_features else (1, cut.num_samples)
    if data.shape != expected:
        sentence = f"the {what} of cut {name} have the shape {data.shape}, not {expected}"
        return [Fault(name, "wrong-length", sentence)]
    if not finite:
        sentence = f"the {what} of cut {name} are not all finite numbers"
        return [Fault(name, "not-finite", sentence)]
    return []


def header_faults(cut: Cut) -> list[Fault]:
    """Whether audio files have the sampling rate, channels and length that their manifest says.

    lhotse would take audio of 8 kHz for audio of 16 kHz, and mirror half a second that is missing.
    """
    faults, name = [], shown_id(cut)
    for path, channels, rate, samples in _audio_files(cut):
        try:
            header = info(path, force_opus_sampling_rate=rate)
        except Exception as error:  # audio backends each have their own
            sentence = f"the audio of cut {name} cannot be read: {first_line(error)}"
            faults.append(Fault(name, "unreadable-audio", sentence))
            continue
        if header.samplerate != rate:
            sentence = f"cut {name} has audio of {header.samplerate:g} Hz in {path}, not {rate} Hz"
            faults.append(Fault(name, "sampling-rate", sentence))
        if header.channels != channels:
            sentence = f"cut {name} has {header.channels} channels in {path}, not {channels}"
            faults.append(Fault(name, "channels", sentence))
        if abs(header.frames - samples) > FEW * rate:
            sentence = f"cut {name} has {header.frames} samples in {path}, not {samples}"
            faults.append(Fault(name, "wrong-length", sentence))
    return faults


def _audio_files(cut: Cut) -> Iterator[tuple[str, int, int, int]]:
    """Path, channels, sampling rate (Hz) and samples of the files that are read as they are."""
    for part in [track.cut for track in cut.tracks] if hasattr(cut, "tracks") else [cut]:
        recording = getattr(part, "recording", None)
        if recording is None or recording.transforms:  # these may change the rate
            continue
        for source in recording.sources:
            if source.type == "file":
                channels = len(source.channels)
                yield source.source, channels, recording.sampling_rate, recording.num_samples


def first_reasons(bad_cuts: Iterable[list[Fault]]) -> Counter[str]:
    """How many cuts are bad for each reason; of several the first counts."""
    return Counter(faults[0].reason for faults in bad_cuts)


def counted(reasons: Mapping[str, int]) -> str:
    """`3 no-text, 1 long-text`."""
    return ", ".join(f"{reasons[reason]} {reason}" for reason in REASONS if reasons.get(reason))


def list_faults(path: Path, faults: Iterable[Fault]) -> None:
    """Append them to a file of JSON lines (id, reason, sentence), except those it has."""
    listed = path.read_text().splitlines() if path.exists() else []
    lines = dict.fromkeys(json.dumps(fault._asdict()) for fault in faults)
    if new := [f"{line}\n" for line in lines if line not in set(listed)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write("".join(new))


def check_fraction(
    reasons: Mapping[str, int], total: int, max_bad_fraction: float, example: str, listing: Path
) -> None:
    """Whether few enough of `total` utterances are bad.

    Raises:
      ValueError: with the numbers, an example and the file that lists them all.
    """
    bad = sum(reasons.values())
    if bad > max_bad_fraction * total:
        raise InputError(
            f"{bad} of {total} utterances are bad ({counted(reasons)}), more than "
            f"--max-bad-fraction {max_bad_fraction:g} allows, such as: {example}; "
            f"{listing} lists them"
        )

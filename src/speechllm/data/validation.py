"""Checks of a single cut. Each error has a reason, and a message with the id and the values.

    malformed             field of the wrong type or range, or cut rejected by lhotse's validation
    invalid-id            empty or unprintable id
    duplicate-id          id of an earlier cut in the same file
    no-text               no supervision, or a missing or blank text
    no-words              text of only tags, punctuation or invisible characters
    not-unicode           NUL, a lone surrogate or U+FFFD: characters were lost
    long-text             more characters than can be spoken in the duration
    supervision-outside   supervision that exceeds the cut
    no-features, feature-dim, frame-shift, no-audio, sampling-rate, channels
    wrong-length          number of frames or samples other than in the manifest
    unreadable-features, unreadable-audio, not-finite
    positions             more LLM positions than supported
    not-cached            missing from the encoder cache
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from lhotse import AudioSource, MonoCut, validate
from lhotse.audio.backend import info
from lhotse.augmentation import Speed
from lhotse.cut import Cut

from speechllm.audio.fbank import FRAME_SHIFT, NUM_MEL_BINS, SAMPLING_RATE
from speechllm.errors import InputError, first_line

REASONS = (  # in the order used in reports; see above
    "malformed", "invalid-id", "duplicate-id", "no-text", "no-words", "not-unicode", "long-text",
    "supervision-outside", "no-features", "feature-dim", "frame-shift", "no-audio",
    "sampling-rate", "channels", "wrong-length", "unreadable-features", "unreadable-audio",
    "not-finite", "positions", "not-cached",
)  # fmt: skip
TOLERANCE = 2e-3  # s, as in lhotse
MAX_CHARACTERS_PER_SECOND = 100  # twice the fastest speech
ALWAYS_SHORT = 1000  # characters that are accepted for any duration
LENGTH_TOLERANCE = 0.025  # s; decoders of some formats differ by this much
LOST = re.compile("[\ud800-\udfff\ufffd\0]")


class CutError(NamedTuple):
    """Reason why a cut cannot be used."""

    id: str
    reason: str  # one of REASONS
    message: str


def validate_cut(
    cut: Cut, *, need_text: bool | None = True, need_features: bool = True
) -> list[CutError]:
    """Check a cut using only its manifest, without reading features or audio.

    Args:
      need_text: False if the text may be blank, as in a test set; None for noise.
      need_features: False if features are computed from the audio.
    """
    name = shown_id(cut)
    try:
        found = [*_identity_errors(cut)]
        if not found:
            found += _supervision_errors(cut)
            found += [] if need_text is None else text_errors(cut, need_text)
            found += _feature_errors(cut) if need_features else _audio_errors(cut)
        if not found:
            validate(cut)
    except Exception as error:  # fields of a wrong type fail in many ways
        is_length = isinstance(error, AssertionError) and "declared num_frames" in str(error)
        reason = "wrong-length" if is_length else "malformed"
        found = [(reason, f"cannot be used: {first_line(error)}")]
    return [CutError(name, reason, f"cut {name} {what}") for reason, what in found]


def shown_id(cut: Cut) -> str:
    """Return the id, escaped if it is not printable."""
    is_plain = isinstance(cut.id, str) and cut.id.isprintable()
    return cut.id if is_plain else ascii(cut.id)


def context_of(cut: Cut) -> str:
    """Join the distinct contexts of a cut's supervisions; raise InputError for non-strings."""
    found = [(supervision.custom or {}).get("context") for supervision in cut.supervisions]
    for context in found:
        if not isinstance(context, str | None):
            raise InputError(f"cut {cut.id} has a context that is not a string: {context!r}")
    return " ".join(dict.fromkeys(filter(None, found)))


def _identity_errors(cut: Cut) -> Iterator[tuple[str, str]]:
    if not isinstance(cut.id, str) or not cut.id.isprintable() or not cut.id.strip():
        yield "invalid-id", "has an empty or unprintable id"
    if not 0 < cut.duration < math.inf:
        yield "malformed", f"has a duration of {cut.duration:g} s"


def _supervision_errors(cut: Cut) -> Iterator[tuple[str, str]]:
    for one in cut.supervisions:
        if not (one.start >= -TOLERANCE and one.end <= cut.duration + TOLERANCE):  # NaN too
            yield (
                "supervision-outside",
                f"of {cut.duration:g} s has a supervision from {one.start:g} to {one.end:g} s",
            )


def text_errors(cut: Cut, need_text: bool = True) -> Iterator[tuple[str, str]]:
    """Yield (reason, message without `cut <id>`) for each problem in the texts."""
    texts = [supervision.text for supervision in cut.supervisions]
    if others := [text for text in texts if not isinstance(text, str | None)]:
        yield "malformed", f"has a text of type {type(others[0]).__name__}"
    elif not texts or any(text is None or (need_text and not text.strip()) for text in texts):
        yield "no-text", "has no text"
    elif need_text:
        if LOST.search(" ".join(texts)):
            yield "not-unicode", "has a text with NUL, lone surrogates or U+FFFD (not UTF-8?)"
        if (length := sum(map(len, texts))) > max_characters(cut.duration):
            yield "long-text", f"of {cut.duration:g} s has a text of {length} characters"


def max_characters(seconds: float) -> float:
    """Return the maximum length of a transcript for this duration, in characters."""
    return max(ALWAYS_SHORT, MAX_CHARACTERS_PER_SECOND * seconds)


def _audio_errors(cut: Cut) -> Iterator[tuple[str, str]]:
    if not cut.has_recording:
        yield "no-audio", "has no audio to compute features from"
        return
    if cut.sampling_rate != SAMPLING_RATE:
        yield "sampling-rate", f"has audio of {cut.sampling_rate} Hz, not {SAMPLING_RATE} Hz"
    if cut.num_channels != 1:
        yield "channels", f"has audio of {cut.num_channels} channels, not 1"


def _feature_errors(cut: Cut) -> Iterator[tuple[str, str]]:
    if not cut.has_features:
        yield "no-features", "has no features (see --on-the-fly-feats)"
        return
    if cut.num_features != NUM_MEL_BINS:
        yield "feature-dim", f"has features of {cut.num_features} dimensions, not {NUM_MEL_BINS}"
    if abs(cut.frame_shift - FRAME_SHIFT) > 1e-6:
        shift, expected = cut.frame_shift * 1000, FRAME_SHIFT * 1000
        yield "frame-shift", f"has features every {shift:g} ms, not {expected:g} ms"
    feats = cut.features if isinstance(cut, MonoCut) else None  # a mixed cut consists of MonoCuts
    if feats and (feats.start > cut.start + FRAME_SHIFT or feats.end < cut.end - FRAME_SHIFT):
        yield (
            "wrong-length",
            f"from {cut.start:g} to {cut.end:g} s has features from {feats.start:g} "
            f"to {feats.end:g} s",
        )


# ---- reading


def read_errors(cut: Cut, need_features: bool = True) -> list[CutError]:
    """Read and check the features or audio of a cut that passed `validate_cut`."""
    name = shown_id(cut)
    what = "features" if need_features else "audio"
    if not need_features and (errors := header_errors(cut)):
        return errors
    try:
        data = cut.load_features() if need_features else cut.load_audio()  # (T, 80) | (1, N)
        finite = np.isfinite(data).all()  # raises for strings
    except Exception as error:  # lhotse's storages raise different exceptions
        return [_unreadable(name, what, error)]
    expected = (cut.num_frames, NUM_MEL_BINS) if need_features else (1, cut.num_samples)
    if data.shape != expected:
        message = f"the {what} of cut {name} have the shape {data.shape}, not {expected}"
        return [CutError(name, "wrong-length", message)]
    if not finite:
        return [CutError(name, "not-finite", f"the {what} of cut {name} contain NaN or infinity")]
    return []


def header_errors(cut: Cut) -> list[CutError]:
    """Compare audio file headers with the manifest: sampling rate, channels, length.

    lhotse would read 8 kHz as 16 kHz, and fill up to half a second of missing audio by mirroring.
    """
    errors, name = [], shown_id(cut)
    for source, rate, samples in _files(cut):
        path = source.source
        try:
            header = info(path, force_opus_sampling_rate=rate)
        except Exception as error:  # audio backends raise different exceptions
            errors.append(_unreadable(name, "audio", error))
            continue
        for reason, is_wrong, found, expected in (
            ("sampling-rate", header.samplerate != rate, f"{header.samplerate:g} Hz", rate),
            ("channels", header.channels != len(source.channels),
             f"{header.channels} channels", len(source.channels)),
            ("wrong-length", abs(header.frames - samples) > LENGTH_TOLERANCE * rate,
             f"{header.frames} samples", round(samples)),
        ):  # fmt: skip
            if is_wrong:
                message = f"cut {name} has {found} in {path}, not {expected}"
                errors.append(CutError(name, reason, message))
    return errors


def _unreadable(name: str, what: str, error: Exception) -> CutError:
    message = f"the {what} of cut {name} cannot be read: {first_line(error)}"
    return CutError(name, f"unreadable-{what}", message)


def _files(cut: Cut) -> Iterator[tuple[AudioSource, int, float]]:
    """Yield the audio files with their expected sampling rate and number of samples."""
    for part in [track.cut for track in cut.tracks] if hasattr(cut, "tracks") else [cut]:
        recording = getattr(part, "recording", None)
        transforms = recording.transforms or [] if recording else []
        if not recording or not all(isinstance(one, Speed) for one in transforms):
            continue  # other transforms may change the sampling rate
        samples = recording.num_samples * math.prod(one.factor for one in transforms)
        for source in recording.sources:
            if source.type == "file":
                yield source, recording.sampling_rate, samples


# ---- counts


def format_counts(reasons: Mapping[str, int]) -> str:
    """Format counts like `3 no-text, 1 long-text`."""
    return ", ".join(f"{reasons[reason]} {reason}" for reason in REASONS if reasons.get(reason))


def count_errors(errors: Iterable[CutError]) -> str:
    """Format the number of errors by reason; see `format_counts`."""
    return format_counts(Counter(error.reason for error in errors))

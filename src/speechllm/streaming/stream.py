"""Streaming recognition: partial texts from CTC, and final segments from the LLM.

    streamer = Streamer(recognizer, LongformConfig(), language="en")
    stream = streamer.open()
    for samples in microphone:
        for event in stream.feed(samples):
            print(event)
    print(stream.finish())

A phrase ends at a pause; then the LLM verifies its CTC text. All data before the open phrase is
discarded, so memory use does not grow. `Streamer.advance` runs many streams in shared batches:

    for stream, samples in zip(streams, blocks):
        stream.push(samples)
    while ready := [stream for stream in streams if stream.is_ready]:
        events = streamer.advance(ready)
"""

from dataclasses import asdict, dataclass
from itertools import groupby, takewhile

import numpy as np
import torch
from torch import Tensor

from speechllm.audio.fbank import FRAME_SHIFT, SAMPLING_RATE, StreamingFbank
from speechllm.audio.resample import StreamResampler, mono_samples
from speechllm.audio.vad import SpeechDetector
from speechllm.decoding.recognizer import NEEDS_CTC, Recognizer
from speechllm.decoding.word_times import CTC_FRAME_SHIFT
from speechllm.errors import InputError
from speechllm.longform.config import LongformConfig
from speechllm.longform.cut_points import FRAMES_PER_SECOND, SPEECH
from speechllm.longform.transcriber import make_segment
from speechllm.longform.transcript import Segment, word_separator
from speechllm.longform.writers import segment_json
from speechllm.models.zipformer.config import Chunking
from speechllm.models.zipformer.ctc_head import BLANK
from speechllm.scoring.wer import by_characters, units
from speechllm.streaming.encoding import CausalEncoding, Reencoding
from speechllm.streaming.phrase import (
    BEFORE,
    FEATURES_PER_FRAME,
    MIN_BLANKS,
    OpenPhrase,
    Phrase,
    phrase_end,
    quiet_frames,
    trailing_blanks,
)

NO_SAMPLES = torch.zeros(0)
DEFAULT_CHUNKING = Chunking(chunk_size=32, left_context=128)  # 640 ms


@dataclass(frozen=True)
class Partial:
    """CTC text of the open phrase so far.

    start: in seconds.
    stable: beginning of `text` that is the same in all later partial texts of the phrase.
    """

    start: float
    text: str
    stable: str


Event = Partial | Segment  # a segment is final


def event_json(event: Event) -> dict:
    """Return an event's fields and `type` (partial or final), as in transcribe.py --stream."""
    if isinstance(event, Segment):
        return {"type": "final", **segment_json(event)}
    return {"type": "partial", **asdict(event), "start": round(event.start, 3)}


class Streamer:
    """Opens streams for a recognizer, and runs them in shared batches."""

    def __init__(
        self,
        recognizer: Recognizer,
        config: LongformConfig = LongformConfig(),
        language: str | None = None,
        chunking: Chunking | None = None,
    ):
        """
        Args:
          chunking: for causal encoders; by default the model's chunking, or DEFAULT_CHUNKING.

        Raises:
          InputError: no encoder has a CTC head, or the encoders do not support the chunking.
        """
        if recognizer.ctc_decoder is None:
            raise InputError(NEEDS_CTC.format("streaming"))
        self.recognizer, self.config, self.language = recognizer, config, language
        encoders = recognizer.model.encoder
        if all(encoder.config.causal for encoder in encoders):
            own = encoders[0].chunkings[-1]
            chunking = chunking or (own if own.chunk_size > 0 else DEFAULT_CHUNKING)
            self.encoding = CausalEncoding(recognizer, chunking)
        else:
            for encoder in encoders:
                (chunking or Chunking()).check(encoder.config)
            self.encoding = Reencoding(recognizer)
        self.detect_speech = SpeechDetector()
        self.longest = round(config.max_segment_duration * FRAMES_PER_SECOND)

    def open(
        self,
        sampling_rate: int = SAMPLING_RATE,
        context: str = "",
        endpoint_silence: float | None = None,
        start: float = 0.0,
    ) -> "Stream":
        """Return a new stream.

        Args:
          context: text for the LLM in addition to the audio; see Transcriber.check_context.
          endpoint_silence: seconds of silence that end a phrase, by default from the config.
          start: time of the first sample in seconds.

        Raises:
          InputError: the sampling rate is unsupported.
        """
        seconds = self.config.endpoint_silence if endpoint_silence is None else endpoint_silence
        stream = Stream(self, sampling_rate, context, max(1, round(seconds * FRAMES_PER_SECOND)))
        stream.phrase.start = round(start * FRAMES_PER_SECOND)
        return stream

    def advance(self, streams: list["Stream"]) -> list[list[Event]]:
        """Encode a chunk of each stream that is ready, and return the events of each stream.

        After an exception, it can be called again with fewer streams; no phrase is lost.
        """
        for stream in streams:  # first, so that the result does not depend on block sizes
            stream.find_phrases()
        ready = [one for one in streams if one.is_ready]
        if ready:
            self.encoding([one.phrase for one in ready])
        for stream in streams:
            stream.find_phrases()
        found = iter(self._recognize([(one, phrase) for one in streams for phrase in one.phrases]))
        events: list[list[Event]] = [[next(found) for _ in one.phrases] for one in streams]
        for own, stream in zip(events, streams):
            stream.phrases.clear()
            if stream in ready:
                own += stream.new_partial()
        return events

    def _recognize(self, phrases: list[tuple["Stream", Phrase]]) -> list[Segment]:
        """Return the final segments of phrases; phrases with speech are recognized as one batch."""
        has_speech = self._has_speech([one for _, one in phrases])
        spoken = [pair for pair, speech in zip(phrases, has_speech) if speech]
        found = iter(())
        if spoken:
            contexts = [stream.context for stream, _ in spoken]
            encoded = self.encoding.embed([one for _, one in spoken], contexts)
            found = iter(self.recognizer.decode(encoded))
        return [
            make_segment(
                one.start * CTC_FRAME_SHIFT,
                one.end * CTC_FRAME_SHIFT,
                next(found) if speech else None,
            )
            for (_, one), speech in zip(phrases, has_speech)
        ]

    def _has_speech(self, phrases: list[Phrase]) -> list[bool]:
        """Return false for noise and phrases that are too short; CTC may emit words for both."""
        shortest = self.recognizer.model.ds_rate
        long = [one.samples for one in phrases if one.end - one.start >= shortest]
        found = iter(self.detect_speech(long) if long else ())
        return [
            one.end - one.start >= shortest and bool((next(found) >= SPEECH).any())
            for one in phrases
        ]


class Stream:
    """Stream of audio from one speaker or microphone, fed block by block; see Streamer.

    Attributes:
      phrase: the open phrase.
      phrases: complete phrases that have no final text yet.
    """

    def __init__(self, streamer: Streamer, sampling_rate: int, context: str, silence: int):
        """
        Args:
          silence: number of silent frames that end a phrase.
        """
        self.streamer, self.context, self.silence = streamer, context, silence
        self.phrase = OpenPhrase(streamer.encoding.initial)
        self.phrases: list[Phrase] = []
        self._rate = sampling_rate
        self._resample = StreamResampler(sampling_rate)
        self._fbank = StreamingFbank()
        self._forget()

    def feed(self, samples: np.ndarray | Tensor) -> list[Event]:
        """Add samples (N,), int16 or floats from -1 to 1, and return the resulting events.

        Raises:
          InputError: see audio.resample.mono_samples; no samples are added.
        """
        events = []
        for block in mono_samples(samples).split(self._rate):
            self.push(block)
            events += self._advance()
        return events

    def finish(self) -> list[Event]:
        """End the stream and return its last events."""
        self.push(end=True)
        return self._advance()

    def _advance(self) -> list[Event]:
        [events] = self.streamer.advance([self])
        while self.is_ready:
            events += self.streamer.advance([self])[0]
        return events

    @property
    def is_ready(self) -> bool:
        """True if a chunk can be encoded."""
        return self.streamer.encoding.is_ready(self.phrase)

    @property
    def missing_samples(self) -> int:
        """Approximate number of samples missing to complete a chunk or a phrase."""
        pending, blanks = self.phrase.pending, trailing_blanks(self.phrase.best)
        frames = self.streamer.encoding.window - pending
        to_endpoint = FEATURES_PER_FRAME * (self.silence - blanks) - pending
        if blanks >= MIN_BLANKS and to_endpoint > 0:
            frames = min(frames, to_endpoint)
        return max(0, round(frames * FRAME_SHIFT * self._rate))

    def push(self, samples: Tensor = NO_SAMPLES, end: bool = False) -> None:
        """Add samples for the next `Streamer.advance`; `end` marks the end of the stream."""
        samples = torch.as_tensor(samples, dtype=torch.float32)
        samples, phrase = self._resample(samples, end), self.phrase
        phrase.samples = torch.cat([phrase.samples, samples])
        phrase.features = torch.cat([phrase.features, self._fbank(samples, end)])
        phrase.ended |= end

    # ---- used by Streamer

    def find_phrases(self) -> None:
        """Move complete phrases from the open phrase to `phrases`."""
        streamer, phrase, encoded = self.streamer, self.phrase, self.phrase.encoded
        silence = 0 if phrase.ended and not self.is_ready else self.silence
        blanks = trailing_blanks(phrase.best)
        before = phrase.features[encoded - FEATURES_PER_FRAME * blanks : encoded]
        after = phrase.features[encoded : encoded + streamer.encoding.window - 1]
        quiet = quiet_frames(before, after)
        begins_word = streamer.recognizer.ctc_decoder.tokenizer.begins_word
        limits = silence, streamer.longest, quiet
        while end := phrase_end(phrase.best, begins_word, *limits):
            self.phrases.append(phrase.cut(*end))
            self._forget()

    def new_partial(self) -> list[Partial]:
        """Return the partial text if it changed; before any token, drop old silence."""
        phrase, streamer = self.phrase, self.streamer
        tokens = [token for token, _ in groupby(phrase.best.tolist()) if token != BLANK]
        if not tokens:
            if len(phrase) > BEFORE:
                phrase.cut(0, len(phrase) - BEFORE)
            return []
        text = streamer.recognizer.ctc_decoder.tokenizer.decode(tokens)
        found = units(text, by_characters(streamer.language))
        self._commit(found)
        self._units, space = found, word_separator(streamer.language)
        shown = self._stable + found[len(self._stable) :]
        start = phrase.start + int((phrase.best != BLANK).argmax())
        partial = Partial(start * CTC_FRAME_SHIFT, space.join(shown), space.join(self._stable))
        if partial == self._last_partial:
            return []
        self._last_partial = partial
        return [partial]

    def _commit(self, found: list[str]) -> None:
        """Extend the stable words: all but the last, or those on which two encodings agree."""
        agreed = found[:-1]
        if isinstance(self.streamer.encoding, Reencoding):  # LocalAgreement-2
            pairs = takewhile(lambda pair: pair[0] == pair[1], zip(found, self._units))
            agreed = [word for word, _ in pairs]
        if len(agreed) > len(self._stable):
            self._stable = self._stable + agreed[len(self._stable) :]

    def _forget(self) -> None:
        self._units: list[str] = []
        self._stable: list[str] = []
        self._last_partial: Partial | None = None

"""Transcription of recordings: their chunks are recognized in shared batches, then reassembled."""

import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from speechllm.audio.fbank import SAMPLING_RATE
from speechllm.decoding.config import CheckpointConfig, SearchConfig
from speechllm.decoding.hotwords import Hotwords
from speechllm.decoding.load import TrainedModel
from speechllm.decoding.recognition import Recognition
from speechllm.decoding.recognizer import Recognizer
from speechllm.errors import InputError, first_line
from speechllm.longform.chunker import AudioChunk, Chunker
from speechllm.longform.config import LongformConfig
from speechllm.longform.transcript import NO_SPEECH, Segment, Transcript
from speechllm.models.config import ModelConfig, check_model_files
from speechllm.models.llm import fastest_dtype
from speechllm.models.prompt import encode_contexts
from speechllm.models.speech_encoders import pad_features

Item = TypeVar("Item")
Recordings = Iterable[tuple[str, Iterable[Tensor]]]  # names, and blocks of 16 kHz samples (N,)


def load_transcriber(
    model: ModelConfig,
    checkpoint: CheckpointConfig,
    search: SearchConfig = SearchConfig(),
    longform: LongformConfig = LongformConfig(),
) -> "Transcriber":
    """Load a trained or exported model, on a GPU if there is one.

    With a CTC head, the guard is "fallback" unless `search` sets another one.

    Raises:
      FileNotFoundError: a directory or file is missing.
      InputError: a file is damaged or does not match the model, or options contradict the model.
    """
    if not checkpoint.exp_dir.is_dir():
        raise FileNotFoundError(
            f"{checkpoint.exp_dir} is missing: --exp-dir is the directory of the checkpoints"
        )
    check_model_files(model)
    if longform.dtype:
        is_auto = longform.dtype == "auto"
        dtype = fastest_dtype(model.llm_path) if is_auto else getattr(torch, longform.dtype)
        precision = dict(use_fp16=dtype == torch.float16, use_bf16=dtype == torch.bfloat16)
        checkpoint = replace(checkpoint, **precision)
    recognizer = TrainedModel(model, checkpoint).recognizer(search, default_guard="fallback")
    return Transcriber(recognizer, longform, model.language)


@dataclass
class _Recording:
    name: str
    samples: int = 0  # number of samples in chunks so far
    pending: int = 0  # number of chunks being recognized
    ended: bool = False
    error: str | None = None
    segments: list[Segment] = field(default_factory=list)

    def until_error(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield items until an exception, and record it in `error`."""
        try:
            yield from items
        except (InputError, FileNotFoundError) as error:
            self.error = self.error or str(error)
        except Exception as error:  # a failed recording must not end the others
            self.fail(error, "")

    def fail(self, error: Exception, where: str) -> None:
        """Log an unexpected exception with its traceback; record the first in `error`."""
        logging.error(f"{self.name} failed{where}", exc_info=error)
        reason = f"unexpected {type(error).__name__}{where}: {first_line(error)}"
        self.error = self.error or f"{self.name}: {reason}"


class Transcriber:
    """Transcribes recordings of any length with a recognizer."""

    def __init__(
        self,
        recognizer: Recognizer,
        config: LongformConfig = LongformConfig(),
        language: str | None = None,
    ):
        """Raise InputError if a segment could exceed the LLM's positions.

        Args:
          language: language of the transcripts.
        """
        self.recognizer, self.config, self.language = recognizer, config, language
        self.split = Chunker(recognizer, config)
        limit, needed = self._positions()
        if needed > limit:
            raise InputError(
                f"--max-segment-duration {config.max_segment_duration:g} needs {needed} positions; "
                f"the LLM has {limit}"
            )

    def __call__(
        self, recordings: Recordings, context: str = "", hotwords: Hotwords | None = None
    ) -> list[Transcript]:
        """Return the transcripts in the order of the recordings; see `stream`."""
        results = self.stream(recordings, context, hotwords)
        return [result for _, result in results if isinstance(result, Transcript)]

    def stream(
        self, recordings: Recordings, context: str = "", hotwords: Hotwords | None = None
    ) -> Iterator[tuple[str, Segment | Transcript]]:
        """Yield (name, segment) for each recognized speech segment, then (name, transcript).

        Transcripts are in the order of the recordings. An exception raised by a recording's blocks
        ends only this recording and becomes its `error`; the audio read before is recognized. A
        segment whose recognition fails is omitted, and the exception becomes the `error`.

        Args:
          recordings: names with blocks of 16 kHz float32 samples (N,), such as `audio_blocks(path)`
            or `[samples]`.
          context: text for all recordings; see `check_context`.
          hotwords: result of `recognizer.tokenize_hotwords` for all recordings, instead of the
            search's hotwords.
        """
        open_recordings: deque[_Recording] = deque()
        chunks = (
            (recording, chunk._replace(context=context, hotwords=hotwords))
            for recording, chunk in self._chunks(recordings, open_recordings)
        )
        batches = self._batches(chunks)
        for chunks, recognitions in self._recognitions(batches):
            for (recording, chunk), recognition in zip(chunks, recognitions, strict=True):
                recording.pending -= 1
                if recognition:
                    segment = _segment(chunk, recognition)
                    recording.segments.append(segment)
                    yield recording.name, segment
            while open_recordings and open_recordings[0].ended and not open_recordings[0].pending:
                recording = open_recordings.popleft()
                yield recording.name, self._transcript(recording)
        for recording in open_recordings:  # the last ones may have no chunk to recognize
            yield recording.name, self._transcript(recording)

    def recognize(self, chunks: list[AudioChunk]) -> list[Segment]:
        """Recognize chunks as one batch and return their segments."""
        with_speech = [chunk for chunk in chunks if chunk.features is not None]
        batches = self.recognizer([_collate(with_speech)] if with_speech else [])
        found = iter([one for _, batch in batches for one in batch])
        return [_segment(one, None if one.features is None else next(found)) for one in chunks]

    def _transcript(self, recording: _Recording) -> Transcript:
        duration = recording.samples / SAMPLING_RATE
        segments = tuple(sorted(recording.segments, key=lambda segment: segment.start))
        if not recording.error and all(one.source == NO_SPEECH for one in segments):
            logging.warning(f"{recording.name} ({duration:.2f} s): no speech found, or too short")
        for one in segments:
            if one.source != NO_SPEECH and not one.text:
                logging.warning(
                    f"{recording.name}: the LLM generated no text for the speech from "
                    f"{one.start:.1f} to {one.end:.1f} s"
                )
        return Transcript(recording.name, duration, segments, self.language, recording.error)

    def _recognitions(
        self, batches: Iterable[dict]
    ) -> Iterator[tuple[list[tuple[_Recording, AudioChunk]], list[Recognition | None]]]:
        """Yield each batch's chunks with their recognitions, which are None for failed chunks."""
        started: deque[dict] = deque()  # on a GPU, the recognizer runs one batch ahead
        errors: list[Exception] = []
        source = _until_error(batches, started, errors)
        while True:
            try:
                for batch, recognitions in self.recognizer(source):
                    started.popleft()
                    yield batch["chunks"], recognitions
                break
            except Exception as error:
                logging.warning(f"a batch failed, retrying each chunk alone: {first_line(error)}")
            while started:
                for one in started.popleft()["chunks"]:
                    yield [one], [self._recognize_alone(*one)]
        if errors:
            raise errors[0]

    def _recognize_alone(self, recording: _Recording, chunk: AudioChunk) -> Recognition | None:
        try:
            [(_, [recognition])] = self.recognizer([_collate([chunk])])
        except Exception as error:
            start, end = _times(chunk)
            recording.fail(error, f" from {start:.1f} to {end:.1f} s")
            return None
        return recognition

    # ---- from recordings to batches

    def _batches(self, arriving: Iterable[tuple[_Recording, AudioChunk]]) -> Iterator[dict]:
        """Yield batches of chunks in the order of arrival, so that recordings finish in order."""
        chunks, longest = [], 0
        for recording, chunk in arriving:
            samples = len(chunk.samples)
            longest = max(longest, samples)
            if chunks and (len(chunks) + 1) * longest > self.config.max_duration * SAMPLING_RATE:
                yield _collate(chunk for _, chunk in chunks) | {"chunks": chunks}
                chunks, longest = [], samples
            chunks.append((recording, chunk))
        if chunks:
            yield _collate(chunk for _, chunk in chunks) | {"chunks": chunks}

    def _chunks(
        self, recordings: Recordings, open_recordings: deque[_Recording]
    ) -> Iterator[tuple[_Recording, AudioChunk]]:
        """Yield the chunks to recognize; chunks without speech become segments immediately."""
        for name, blocks in recordings:
            recording = _Recording(name)
            open_recordings.append(recording)
            chunks = self.split(recording.until_error(blocks))
            for chunk in recording.until_error(chunks):
                recording.samples = chunk.start + len(chunk.samples)
                if chunk.features is None:
                    recording.segments.append(_segment(chunk))
                else:
                    recording.pending += 1
                    yield recording, chunk
            recording.ended = True

    # ---- features of the model

    @property
    def has_word_times(self) -> bool:
        """True if segments contain words with times."""
        return self.recognizer.ctc_decoder is not None and self.recognizer.search.word_timestamps

    @property
    def takes_context(self) -> bool:
        """True if the LLM was trained with contexts."""
        return self.recognizer.model.chat.use_context

    def check_context(self, context: str) -> None:
        """Raise InputError if the model does not support contexts, or the context is too long."""
        if not context:
            return
        if not self.takes_context:
            raise InputError(f"context {context!r}: the model was trained without --use-context")
        tokenizer, chat = self.recognizer.tokenizer, self.recognizer.model.chat
        [ids] = encode_contexts(tokenizer, chat, [context])
        limit, needed = self._positions()
        if len(ids) > limit - needed:
            raise InputError(
                f"the context has {len(ids)} tokens; speech and transcript leave {limit - needed} "
                "of the LLM's positions"
            )

    def _positions(self) -> tuple[int, int]:
        """Return the LLM's number of positions, and the maximum that a segment may need."""
        check = self.recognizer.too_many_positions
        before_text = check.count_positions.before_text(self.config.max_segment_duration)
        return check.limit, before_text + check.max_new_tokens


def _until_error(
    batches: Iterable[dict], started: deque[dict], errors: list[Exception]
) -> Iterator[dict]:
    """Yield batches, appending them to `started`; an exception ends them and goes to `errors`."""
    try:
        for batch in batches:
            started.append(batch)
            yield batch
    except Exception as error:
        errors.append(error)


def _collate(chunks: Iterable[AudioChunk]) -> dict:
    """Return a batch of chunks that have features, in the format of speechllm.data.dataset."""
    chunks = list(chunks)
    features, lens = pad_features([chunk.features for chunk in chunks])
    return {
        "features": features,
        "feature_lens": lens,
        "seconds": sum(len(chunk.samples) for chunk in chunks) / SAMPLING_RATE,
        "contexts": [chunk.context for chunk in chunks],
        "hotwords": [chunk.hotwords for chunk in chunks],
    }


def _times(chunk: AudioChunk) -> tuple[float, float]:
    """Return the chunk's start and end in seconds."""
    return chunk.start / SAMPLING_RATE, (chunk.start + len(chunk.samples)) / SAMPLING_RATE


def _segment(chunk: AudioChunk, recognition: Recognition | None = None) -> Segment:
    """Return the segment for a chunk; without a recognition, it is non-speech."""
    return make_segment(*_times(chunk), recognition)


def make_segment(start: float, end: float, recognition: Recognition | None) -> Segment:
    """Return a segment; recognition None or an empty CTC text, as for a click, means non-speech."""
    flags = tuple(recognition.flags) if recognition else ()
    if recognition is None or recognition.ctc_text == "":
        return Segment(start, end, "", source=NO_SPEECH, flags=flags)
    words = tuple(word.shifted(start) for word in recognition.words or ())
    log_probs = recognition.hypothesis.log_probs
    confidence = math.exp(sum(log_probs) / len(log_probs)) if log_probs else 0.0
    return Segment(start, end, recognition.text, words, confidence, recognition.source, flags)

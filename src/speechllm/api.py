"""The Python API: load a trained model, transcribe files and arrays.

    asr = speechllm.load("exp/mine", epoch=10, avg=5, method="beam", language="en")
    for transcript in asr.transcribe(["talk.mp3", "film.mp4"]):
        print(transcript.text, transcript.error)
    asr.transcribe(samples, sampling_rate=44100).segments[0].confidence

    stream = asr.stream(sampling_rate=48000)
    for samples in microphone:
        for event in stream.feed(samples):  # Partial: text by CTC so far; Segment: final text
            print(event.text)
    print(stream.finish())
"""

import dataclasses
from collections.abc import Iterable, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import overload

import numpy as np
from torch import Tensor

from speechllm.audio.fbank import SAMPLING_RATE
from speechllm.audio.resample import audio_blocks, mono_samples, resampled
from speechllm.decoding.config import CheckpointConfig, SearchConfig
from speechllm.errors import InputError
from speechllm.longform.config import LongformConfig
from speechllm.longform.transcriber import Transcriber, load_transcriber
from speechllm.longform.transcript import Segment, Transcript, Word
from speechllm.models.config import ONE_ENCODER, load_model_config
from speechllm.models.zipformer.config import Chunking
from speechllm.streaming.stream import DEFAULT_CHUNKING, Partial, Stream, Streamer

__all__ = ["InputError", "Partial", "Segment", "SpeechRecognizer", "Transcript", "Word", "load"]
Audio = str | PathLike | np.ndarray | Tensor  # a file, or samples (N,): float in -1 to 1, or int16


def load(
    model_dir: str | PathLike, *, language: str | None = None, **options
) -> "SpeechRecognizer":
    """Load a trained model, on a GPU if there is one.

    Args:
      model_dir: directory written by export.py, or an experiment directory (--exp-dir).
      language: language of the transcripts, instead of that in model.json.
      options: fields of CheckpointConfig, SearchConfig and LongformConfig, with the names, meanings
        and defaults of transcribe.py's flags; for an experiment directory without `epoch`, `iter`
        and `checkpoint`, the newest epochs are averaged.

    Raises:
      FileNotFoundError: a directory or file is missing.
      InputError: a file is damaged, or an option is out of range or contradicts the model.
      TypeError: an option does not exist.
    """
    options["exp_dir"] = Path(model_dir)
    configs = []
    for kind in (CheckpointConfig, SearchConfig, LongformConfig):
        names = options.keys() & kind.__dataclass_fields__.keys()
        configs.append(kind(**{name: options.pop(name) for name in names}))
    if options:
        raise TypeError(f"load() got an unexpected keyword argument {min(options)!r}")
    model = load_model_config(Path(model_dir)) or ONE_ENCODER
    if language:
        model = dataclasses.replace(model, language=language)
    return SpeechRecognizer(load_transcriber(model, *configs))


class SpeechRecognizer:
    """A loaded model; `transcriber.stream` yields segments as they are recognized."""

    def __init__(self, transcriber: Transcriber):
        self.transcriber = transcriber
        self._streamers: dict[Chunking | None, Streamer] = {}

    @property
    def language(self) -> str | None:
        """Language of the transcripts, if it is known."""
        return self.transcriber.language

    @overload
    def transcribe(
        self,
        audio: Audio,
        *,
        sampling_rate: int = ...,
        context: str = ...,
        hotwords: Sequence[str] = ...,
    ) -> Transcript: ...

    @overload
    def transcribe(
        self,
        audio: Sequence[Audio],
        *,
        sampling_rate: int = ...,
        context: str = ...,
        hotwords: Sequence[str] = ...,
    ) -> list[Transcript]: ...

    def transcribe(
        self,
        audio,
        *,
        sampling_rate: int = SAMPLING_RATE,
        context: str = "",
        hotwords: Sequence[str] = (),
    ):
        """Transcribe recordings of any length; several share batches.

        Args:
          audio: a file of any format that soundfile or PyAV reads, an array or tensor of samples
            (N,), or a list of these.
          sampling_rate: sampling rate of arrays, in Hz.
          context: text for the LLM besides the audio, such as names; only for models trained with
            --use-context.
          hotwords: phrases to favour, such as names, instead of those given to `load`.

        Returns:
          A Transcript, or a list of them, in which a recording that cannot be read has an `error`
          and the segments before it.

        Raises:
          FileNotFoundError, InputError: a single recording cannot be read.
          InputError: the model does not take this context or a hotword, or an array has the wrong
            shape or type.
        """
        self.transcriber.check_context(context)
        entries = self.transcriber.recognizer.tokenize_hotwords(hotwords)
        several = isinstance(audio, list | tuple)
        sources = [_source(one, sampling_rate) for one in (audio if several else [audio])]
        transcripts = self.transcriber(sources, context, entries)
        if several:
            return transcripts
        if transcripts[0].error:
            missing = not isinstance(audio, np.ndarray | Tensor) and not Path(audio).exists()
            raise (FileNotFoundError if missing else InputError)(transcripts[0].error)
        return transcripts[0]

    def stream(
        self,
        *,
        sampling_rate: int = SAMPLING_RATE,
        context: str = "",
        chunk_size: int | None = None,
        left_context_frames: int = DEFAULT_CHUNKING.left_context,
    ) -> Stream:
        """Return a stream: `feed` blocks of samples, `finish` at the end; both return events.

        Args:
          sampling_rate: of the samples, in Hz.
          context: as for `transcribe`.
          chunk_size: of causal encoders, in frames of 20 ms: the delay of the partial texts; by
            default that of model.json if it is one, else 32.
          left_context_frames: with `chunk_size`, the frames before a chunk that attention sees.

        Raises:
          InputError: the model has no CTC head or takes no such chunks or context, or the sampling
            rate is not supported.
        """
        self.transcriber.check_context(context)
        chunking = Chunking(chunk_size, left_context_frames) if chunk_size else None
        if chunking not in self._streamers:
            parts = self.transcriber
            self._streamers[chunking] = Streamer(
                parts.recognizer, parts.config, self.language, chunking
            )
        return self._streamers[chunking].open(sampling_rate, context)


def _source(audio: Audio, sampling_rate: int) -> tuple[str, Iterable[Tensor]]:
    """Name and blocks of samples of a recording, as Transcriber takes them."""
    if isinstance(audio, str | PathLike):
        return fspath(audio), audio_blocks(fspath(audio))
    if not isinstance(audio, np.ndarray | Tensor):
        raise TypeError(f"expected a path, an array or a tensor, got {type(audio).__name__}")
    if sampling_rate < 1 or sampling_rate != int(sampling_rate):
        raise InputError(f"sampling_rate is {sampling_rate}: expected a whole number of Hz")
    length = 10 * int(sampling_rate)
    blocks = (mono_samples(audio[i : i + length]) for i in range(0, len(audio), length))
    return "array", resampled(blocks, int(sampling_rate), "array")

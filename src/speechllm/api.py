"""Python API: load a trained model, transcribe files and arrays.

    asr = speechllm.load("exp/mine", epoch=10, avg=5, method="beam", language="en")
    for transcript in asr.transcribe(["talk.mp3", "film.mp4"]):
        print(transcript.text, transcript.error)
    asr.transcribe(samples, sampling_rate=44100).segments[0].confidence

    stream = asr.stream(sampling_rate=48000)
    for samples in microphone:
        for event in stream.feed(samples):  # Partial: CTC text so far; Segment: final text
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
Audio = str | PathLike | np.ndarray | Tensor  # file, or samples (N,): float from -1 to 1, or int16


def load(
    model_dir: str | PathLike, *, language: str | None = None, **options
) -> "SpeechRecognizer":
    """Load a trained model, on a GPU if there is one.

    Args:
      model_dir: directory written by export.py, or an experiment directory (--exp-dir).
      language: language of the transcripts, by default from model.json.
      options: fields of CheckpointConfig, SearchConfig and LongformConfig, with the names, meanings
        and defaults of transcribe.py's flags. For an experiment directory, the newest epochs are
        averaged unless `epoch`, `iter` or `checkpoint` is given.

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
    """Speech recognizer with a loaded model; `transcriber.stream` yields segments one by one."""

    def __init__(self, transcriber: Transcriber):
        self.transcriber = transcriber
        self._streamers: dict[Chunking | None, Streamer] = {}

    @property
    def language(self) -> str | None:
        """Language of the transcripts, if known."""
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
        """Transcribe one or several recordings of any length; several are batched together.

        Args:
          audio: a file in any format supported by soundfile or PyAV, an array or tensor of samples
            (N,), or a list of these.
          sampling_rate: sampling rate of arrays, in Hz.
          context: text for the LLM in addition to the audio, such as names; only for models trained
            with --use-context.
          hotwords: phrases to favor, such as names, instead of those given to `load`.

        Returns:
          A Transcript, or for a list of recordings a list of Transcripts. In a list, the transcript
          of an unreadable recording has an `error`, and the segments before the error.

        Raises:
          FileNotFoundError, InputError: a single recording cannot be read.
          InputError: the model does not support the context or a hotword, or an array has the wrong
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
        """Return a stream: `feed` it samples, then `finish` it; both methods return events.

        Args:
          sampling_rate: sampling rate of the samples, in Hz.
          context: see `transcribe`.
          chunk_size: for causal encoders, the delay of partial texts in frames of 20 ms; by default
            from model.json if the model uses chunks, else 32.
          left_context_frames: with `chunk_size`, number of frames of left context per chunk.

        Raises:
          InputError: the model has no CTC head or does not support the chunks or context, or the
            sampling rate is unsupported.
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
    """Return a recording's name and blocks of samples, for Transcriber."""
    if isinstance(audio, str | PathLike):
        return fspath(audio), audio_blocks(fspath(audio))
    if not isinstance(audio, np.ndarray | Tensor):
        raise TypeError(f"expected a path, an array or a tensor, got {type(audio).__name__}")
    if sampling_rate < 1 or sampling_rate != int(sampling_rate):
        raise InputError(f"sampling_rate is {sampling_rate}: expected a whole number of Hz")
    length = 10 * int(sampling_rate)
    blocks = (mono_samples(audio[i : i + length]) for i in range(0, len(audio), length))
    return "array", resampled(blocks, int(sampling_rate), "array")

"""LongformConfig: options for segmenting and batching recordings of any length."""

from dataclasses import dataclass
from functools import partial

from speechllm.cli import check_range, option

FORMAT_SUFFIXES = {"text": "txt", "json": "json", "srt": "srt", "vtt": "vtt", "ctm": "ctm"}
HOUR = 3600.0  # s
_option = partial(option, group="recordings")


@dataclass(frozen=True)
class LongformConfig:
    """Options of transcribe.py and serve.py; values out of range raise InputError."""

    max_segment_duration: float = _option(
        20.0, "maximum segment length in seconds; should not exceed the longest training utterance"
    )
    min_silence: float = _option(0.8, "seconds of silence that end a segment in a long recording")
    endpoint_silence: float = _option(0.8, "seconds of silence that end a phrase in a stream")
    max_duration: float = _option(200.0, "maximum seconds of audio per batch")
    dtype: str | None = _option(
        None, "precision of the model; auto: bfloat16 where it is faster",
        choices=("auto", "float32", "float16", "bfloat16"), unset="by --use-fp16 and --use-bf16",
    )  # fmt: skip

    def __post_init__(self):
        check_range("max_segment_duration", self.max_segment_duration, 3, HOUR)
        check_range("min_silence", self.min_silence, 0, HOUR, above=True)
        check_range("endpoint_silence", self.endpoint_silence, 0, HOUR, above=True)
        check_range("max_duration", self.max_duration, 0, 1000 * HOUR, above=True)

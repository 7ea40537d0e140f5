"""LLM-based speech recognition: Zipformer encoders, projectors and Qwen2.

    import speechllm

    asr = speechllm.load("models/mine")  # an exported model or an experiment directory
    transcript = asr.transcribe("talk.mp3")
    print(transcript.text, [(word.text, word.start, word.end) for word in transcript.words])

See speechllm.api. torch and other heavy libraries are imported only when these names are used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from speechllm.api import InputError, Partial, Segment, SpeechRecognizer, Transcript, Word, load

__all__ = ["InputError", "Partial", "Segment", "SpeechRecognizer", "Transcript", "Word", "load"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from speechllm import api

    return getattr(api, name)

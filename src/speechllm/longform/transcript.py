"""Transcription results: Transcript, its Segments and their Words."""

from dataclasses import dataclass

from speechllm.decoding.word_times import Word
from speechllm.scoring.wer import by_characters

NO_SPEECH = "no_speech"  # source of a segment without speech, or too short to recognize


@dataclass(frozen=True)
class Segment:
    """Independently recognized part of a recording; segments cover the whole recording.

    words: in order; empty without a CTC head and BPE model.
    confidence: 0 to 1, geometric mean of the LLM's token probabilities; 0 for a CTC text.
    source: "LLM", "CTC" or "no_speech", for which the text is empty.
    flags: signs of hallucination, see speechllm.decoding.hallucination; normally empty.
    """

    start: float
    end: float
    text: str
    words: tuple[Word, ...] = ()
    confidence: float = 0.0
    source: str = "LLM"
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Transcript:
    """Transcript of a recording.

    name: path of the recording; - for standard input.
    segments: in order; empty for an empty recording.
    error: why the recording, or part of it, could not be transcribed.
    """

    name: str
    duration: float
    segments: tuple[Segment, ...] = ()
    language: str | None = None
    error: str | None = None

    @property
    def text(self) -> str:
        """Text of all segments."""
        texts = (segment.text for segment in self.segments if segment.text)
        return word_separator(self.language).join(texts)

    @property
    def words(self) -> list[Word]:
        """Words of all segments."""
        return [word for segment in self.segments for word in segment.words]


def word_separator(language: str | None) -> str:
    """Return the string that separates words in a language."""
    return "" if by_characters(language) else " "

"""Results of a transcription: Transcript, its Segments and their Words."""

from dataclasses import dataclass

from speechllm.scoring.wer import by_characters

NO_SPEECH = "no_speech"  # source of a segment without speech, or too short to recognize


@dataclass(frozen=True)
class Word:
    """A word; times are in seconds of the recording.

    confidence: 0 to 1, the mean of the word's probability by CTC and by the LLM; the latter is the
      product over its tokens, as all of them must be right.
    """

    start: float
    end: float
    text: str
    confidence: float


@dataclass(frozen=True)
class Segment:
    """A part of a recording, recognized on its own; segments cover the whole recording.

    words: in order; empty without a CTC head and BPE model.
    confidence: 0 to 1, the LLM's geometric mean token probability; 0 for a text from CTC.
    source: "LLM", "CTC" or "no_speech" (then the text is empty).
    flags: signs of a hallucination, see speechllm.decoding.hallucination; normally empty.
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

    name: path of the recording, - for standard input.
    segments: in order; empty for an empty recording.
    error: why the recording, or the rest of it, could not be read.
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
    """Return the string between the words of a language."""
    return "" if by_characters(language) else " "

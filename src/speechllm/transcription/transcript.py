"""What is transcribed of a recording: words, segments, all of it."""

from dataclasses import dataclass

from speechllm.scoring import by_characters

NOBODY = "nobody"  # the source of a segment in which nothing is said, or that is too short to hear


@dataclass(frozen=True)
class Word:
    """A word from `start` to `end`, in seconds of the recording."""

    start: float
    end: float
    text: str
    confidence: float  # 0 to 1, see word_times


@dataclass(frozen=True)
class Segment:
    """A part of a recording that was recognized by itself; the parts make up the whole."""

    start: float  # s
    end: float
    text: str
    words: tuple[Word, ...] = ()  # where there is a CTC head
    confidence: float = 0.0  # 0 to 1: the LLM's mean probability of a token
    source: str = "LLM"  # or CTC, or NOBODY: then without text
    reasons: tuple[str, ...] = ()  # to distrust it, see guard


@dataclass(frozen=True)
class Transcript:
    """Of a recording; an empty one has no segments."""

    name: str
    seconds: float
    segments: tuple[Segment, ...] = ()
    language: str | None = None
    error: str | None = None  # why the recording, or the rest of it, could not be read

    @property
    def text(self) -> str:
        return separator(self.language).join(one.text for one in self.segments if one.text)


def separator(language: str | None) -> str:
    """What stands between the words of a language."""
    return "" if by_characters(language) else " "

"""Lower-casing, and text normalizers applied to references and hypotheses before scoring."""

import unicodedata
from collections.abc import Callable
from functools import cache


def lower_case(text: str) -> str:
    """Lower-case a transcript, for training and for scoring."""
    return text.lower()


def normalize_basic(text: str) -> str:
    """Apply NFKC, lower-case, and keep letters, marks, digits and apostrophes inside words."""
    text = unicodedata.normalize("NFKC", lower_case(text).translate(_APOSTROPHES)).lower()
    words = (word.strip("'") for word in "".join(map(_kept, text)).split())
    return " ".join(word for word in words if word)


def normalize_english(text: str) -> str:
    """Apply Whisper's English rules: digits, expanded contractions and titles, no fillers."""
    return _whisper_english()(lower_case(text)).strip()


NORMALIZERS: dict[str, Callable[[str], str]] = {
    "none": lower_case,
    "cased": str,  # for models trained with --lowercase false
    "basic": normalize_basic,
    "english": normalize_english,
}

# Characters typed as apostrophes, replaced before NFKC, which would decompose the acute accent.
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u00b4`", "'"))


@cache
def _kept(character: str) -> str:
    category = unicodedata.category(character)
    if category[0] in "LMN" or character == "'":
        return character
    return "" if category == "Cf" else " "  # soft hyphens etc. occur inside words


@cache
def _whisper_english() -> Callable[[str], str]:
    # Imported here: importing transformers takes seconds, and only this normalizer needs it.
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    # Left empty: Whisper's British-to-American table is not part of transformers.
    return EnglishTextNormalizer({})

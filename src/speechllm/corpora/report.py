"""What a prepared corpus holds and what was left out of it, as JSON and as text."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from lhotse.cut import Cut

from speechllm.corpora.audio import AudioFile
from speechllm.cut_faults import Fault, counted, first_reasons
from speechllm.cut_files import read_cuts
from speechllm.features import has_perturbed_speed

SHOWN = 50  # faults and speakers in a text; the JSON has all


def corpus_report(
    source: str, splits: Mapping[str, Path], files: Iterable[AudioFile], faults: list[Fault]
) -> dict:
    """What report.json holds.

      splits: of each utterances, hours, speakers, seconds (quantiles), and cuts with speed copies
      shared_speakers: who is in several splits, and in which
      languages: utterances of each
      text: words, different_words, characters (count of each), and how many utterances have_digits,
        have_punctuation, have_upper_case and have_lower_case
      audio: files, rates (Hz) and channels with their numbers of files, copies
      left_out: counts by reason, and id, reason and sentence of each utterance

    Args:
      splits: cut file of each.
      files: of the utterances that are used.
    """
    splits_of, languages, text = defaultdict(set), Counter(), _Text()
    statistics = {}
    for split, path in splits.items():
        cuts = list(map(_brief, read_cuts(path)))
        originals = [cut for cut in cuts if not cut["is_copy"]]
        statistics[split] = _split_statistics(originals, cuts)
        for cut in originals:
            splits_of[cut["speaker"]].add(split)
            languages[cut["language"] or "unknown"] += 1
            text.add(cut["text"])
    return {
        "source": source,
        "splits": statistics,
        "shared_speakers": {
            speaker: sorted(their) for speaker, their in splits_of.items() if len(their) > 1
        },
        "languages": dict(languages),
        "text": text.as_dict(),
        "audio": _audio(list(files)),
        "left_out": {
            "counts": first_reasons([fault] for fault in faults),
            "utterances": [fault._asdict() for fault in faults],
        },
    }


def report_text(report: Mapping) -> str:
    """The report for people."""
    lines = [
        f"{'split':<12} {'utterances':>10} {'hours':>8} {'speakers':>8}  "
        "seconds: shortest, median, longest; with speed copies"
    ]
    for split, one in report["splits"].items():
        lines.append(
            f"{split:<12} {one['utterances']:>10} {one['hours']:>8.2f} {one['speakers']:>8}  "
            f"{', '.join(f'{value:.1f}' for value in one['seconds'].values())}; "
            f"{one['cuts']} cuts, {one['cuts_hours']:.2f} hours"
        )
    lines += [_audio_text(report["audio"]), *_text_lines(report["text"])]
    languages = (f"{language} {count}" for language, count in report["languages"].items())
    lines.append(f"languages: {', '.join(languages)}")
    if shared := report["shared_speakers"]:
        named = (f"{speaker} ({', '.join(their)})" for speaker, their in shared.items())
        lines.append(f"{len(shared)} speakers are in several splits: {shown(named, '; ')}")
    left_out = report["left_out"]
    if left_out["utterances"]:
        sentences = (fault["sentence"] for fault in left_out["utterances"])
        lines += [
            f"left out {len(left_out['utterances'])} utterances ({counted(left_out['counts'])}):",
            f"  {shown(sentences, chr(10) + '  ')}",
        ]
    else:
        lines.append("left out: nothing")
    return "\n".join(lines) + "\n"


def shown(texts: Iterable[str], between: str) -> str:
    """The first of them, and how many more there are."""
    texts = list(texts)
    more = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return between.join(texts[:SHOWN] + more)


def _brief(cut: Cut) -> dict:
    """What the report needs: cuts with features would fill the memory."""
    supervision = cut.supervisions[0]
    return {
        "seconds": cut.duration,
        "is_copy": has_perturbed_speed(cut),
        "speaker": supervision.speaker,
        "language": supervision.language,
        "text": supervision.text,
    }


def _split_statistics(originals: list[dict], cuts: list[dict]) -> dict:
    seconds = np.array([cut["seconds"] for cut in originals])
    quantiles = np.quantile(seconds, [0, 0.5, 1]).round(3).tolist()
    return {
        "utterances": len(originals),
        "hours": round(seconds.sum() / 3600, 4),
        "speakers": len({cut["speaker"] for cut in originals}),
        "seconds": dict(zip(("shortest", "median", "longest"), quantiles, strict=True)),
        "cuts": len(cuts),
        "cuts_hours": round(sum(cut["seconds"] for cut in cuts) / 3600, 4),
    }


class _Text:
    """Counts what texts are made of."""

    KINDS = {
        "have_digits": lambda category: category[0] == "N",
        "have_punctuation": lambda category: category[0] in "PS",
        "have_upper_case": lambda category: category == "Lu",
        "have_lower_case": lambda category: category == "Ll",
    }

    def __init__(self):
        self.words, self.characters = Counter(), Counter()
        self.utterances = dict.fromkeys(self.KINDS, 0)

    def add(self, text: str) -> None:
        self.words.update(text.split())
        self.characters.update(text)
        categories = set(map(unicodedata.category, text))
        for kind, is_one in self.KINDS.items():
            self.utterances[kind] += any(map(is_one, categories))

    def as_dict(self) -> dict:
        return {
            "words": self.words.total(),
            "different_words": len(self.words),
            "characters": dict(self.characters.most_common()),
            **self.utterances,
        }


def _text_lines(text: Mapping) -> list[str]:
    kinds = (f"{text[kind]} {kind.replace('_', ' ')}" for kind in _Text.KINDS)
    characters = "".join(text["characters"])
    more = f" and {len(characters) - SHOWN} more" if len(characters) > SHOWN else ""
    return [
        f"text: {text['words']} words, {text['different_words']} different; of the utterances "
        + ", ".join(kinds),
        f"characters, {len(characters)}, the most frequent first: {characters[:SHOWN]!r}{more}",
    ]


def _audio(files: list[AudioFile]) -> dict:
    return {
        "files": len(files),
        "rates": {str(rate): n for rate, n in Counter(f.sampling_rate for f in files).items()},
        "channels": {str(count): n for count, n in Counter(f.channels for f in files).items()},
    }


def _audio_text(audio: Mapping) -> str:
    rates = ", ".join(f"{n} of {rate} Hz" for rate, n in audio["rates"].items())
    several = sum(n for count, n in audio["channels"].items() if count != "1")
    more = f", {several} with several channels" if several else ""
    return f"audio files: {rates}{more}"

#!/usr/bin/env python3
"""Tempt a trained model to loop and to invent, and show what the guard makes of it.

  python tests/provoke.py --table data/demo/corpus/transcripts.tsv --out exp/demo/provoked -- \
    --exp-dir exp/demo/llm_asr --epoch 12 --avg 6 --llm-path exp/demo/llm …

After `--` come decode.py's flags for the model and the search. Provocations are made out of nothing
and of clips of a corpus table (see local/prepare_corpus.py), --each of a kind: noise, tones and
silence; clips that are cut, joined, repeated, too fast, clipped, narrow or followed by silence;
other languages. They are decoded with each --guard. Writes to <out>

  wav/, provocations.tsv, fbank/     the provocations
  provocations.jsonl                 of each: what was said, and with each guard the text, the
                                     reasons to doubt it and the number of tokens

and prints a table and an example of each kind. Fails if what is no speech gets a text without a
flag, or if a hypothesis loops up to the token limit, guarded.
"""

import argparse
import json
import shutil
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path

import kaldialign
import numpy as np
import soundfile
from lhotse import Recording
from scipy.signal import resample_poly

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "local"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
import prepare_corpus
from make_spoken_corpus import SAMPLING_RATE, Espeak, Speaker, noise, place_in_room

import decode
from speechllm.cut_files import frames_needed
from speechllm.data import loader_options
from speechllm.decoding.draft import Hypothesis
from speechllm.decoding.recognizer import Recognition
from speechllm.decoding.test_set import decode_cuts
from speechllm.errors import InputError

GUARDS = ("off", "stop", "fallback")
LONGEST = 30  # seconds
NOTHING = "-"  # the text of what is no speech: a table has no empty ones
FOREIGN_KIND = "another language"
FOREIGN = {
    "de": (
        "die katze schläft auf dem sofa",
        "morgen fahren wir mit dem zug nach hamburg",
        "guten tag ich möchte gerne ein zimmer reservieren",
        "der zug hat heute leider zwanzig minuten verspätung",
    ),
    "fr": (
        "bonjour je voudrais un café s'il vous plaît",
        "la bibliothèque ferme à dix-huit heures",
        "nous partons demain matin pour la montagne",
        "il pleut beaucoup dans cette région",
    ),
    "es": (
        "mañana vamos a la playa con los niños",
        "el perro negro corre por el parque",
        "quisiera una mesa para cuatro personas",
        "el mercado abre a las ocho de la mañana",
    ),
}
Clip = tuple[np.ndarray, str]  # samples (n,) at 16 kHz, text


# ---- what is no speech: a generator of random numbers to samples


def some_seconds(rng: np.random.Generator) -> int:
    """A number of samples."""
    return int(SAMPLING_RATE * rng.choice([1, 2, 4, 8, 15]))


def white(rng: np.random.Generator) -> np.ndarray:
    return 10 ** rng.uniform(-2, -0.7) * noise(some_seconds(rng), pink=False, rng=rng)


def pink(rng: np.random.Generator) -> np.ndarray:
    return 10 ** rng.uniform(-2, -0.7) * noise(some_seconds(rng), pink=True, rng=rng)


def silence(rng: np.random.Generator) -> np.ndarray:
    return np.zeros(some_seconds(rng))


def almost_silence(rng: np.random.Generator) -> np.ndarray:
    return 1e-4 * noise(some_seconds(rng), pink=False, rng=rng)


def note(midi: int, num_samples: int, decay: float) -> np.ndarray:
    """A tone with five overtones that fades by `decay` nats a second."""
    time = np.arange(num_samples) / SAMPLING_RATE
    pitch = 440 * 2 ** ((midi - 69) / 12)
    wave = sum(np.sin(2 * np.pi * k * pitch * time) / k**1.5 for k in range(1, 7))
    return wave * np.exp(-decay * time)


def chords(rng: np.random.Generator) -> np.ndarray:
    """Major and minor triads of a second, struck or held."""
    decay, triads = rng.choice([0.0, 2.0]), ((0, 4, 7), (0, 3, 7))
    bars = [
        sum(note(root + step, SAMPLING_RATE, decay) for step in triads[rng.integers(2)])
        for root in rng.integers(48, 72, some_seconds(rng) // SAMPLING_RATE)
    ]
    return 0.05 * np.concatenate(bars)


def melody(rng: np.random.Generator) -> np.ndarray:
    """Four notes a second of a major scale, up and down by a step or two."""
    scale = [12 * octave + step for octave in (5, 6) for step in (0, 2, 4, 5, 7, 9, 11)]
    degrees = np.abs(np.cumsum(rng.integers(-2, 3, some_seconds(rng) // (SAMPLING_RATE // 4))))
    return 0.1 * np.concatenate(
        [note(scale[degree % 14], SAMPLING_RATE // 4, 3.0) for degree in degrees]
    )


NO_SPEECH = {
    "white noise": white,
    "pink noise": pink,
    "digital silence": silence,
    "almost silence": almost_silence,
    "chords": chords,
    "melody": melody,
}

# ---- what is made of the next clips


def joined(clips: Iterable[Clip]) -> Clip:
    audios, texts = zip(*clips)
    return np.concatenate(audios), " ".join(texts)


def cut_in_the_middle(clips: Iterator[Clip]) -> Clip:
    audio, _ = next(clips)
    return audio[: len(audio) // 2], NOTHING


def two_joined(clips: Iterator[Clip]) -> Clip:
    return joined(islice(clips, 2))


def ten_times_as_fast(clips: Iterator[Clip]) -> Clip:
    """Of six clips, so that enough of it is left to hear."""
    audio, text = joined(islice(clips, 6))
    return resample_poly(audio, 1, 10), text


def hard_clipped(clips: Iterator[Clip]) -> Clip:
    """At a tenth of the peak."""
    audio, text = next(clips)
    peak = np.abs(audio).max()
    return np.clip(10 * audio, -peak, peak), text


def from_8_khz(clips: Iterator[Clip]) -> Clip:
    audio, text = next(clips)
    return resample_poly(resample_poly(audio, 1, 2), 2, 1), text


def before_silence(clips: Iterator[Clip]) -> Clip:
    audio, text = next(clips)
    return np.pad(audio, (0, 10 * SAMPLING_RATE)), text


def repeated(clips: Iterator[Clip]) -> Clip:
    """Six times, or as often as the longest duration allows."""
    clip = next(clips)
    return joined([clip] * max(1, min(6, LONGEST * SAMPLING_RATE // len(clip[0]))))


OF_CLIPS = {
    "cut in the middle": cut_in_the_middle,
    "two joined": two_joined,
    "10 times as fast": ten_times_as_fast,
    "hard clipped": hard_clipped,
    "from 8 kHz": from_8_khz,
    "before 10 s of silence": before_silence,
    "repeated 6 times": repeated,
}


def foreign(number: int, espeak: Espeak, rng: np.random.Generator) -> Clip:
    language = list(FOREIGN)[number % len(FOREIGN)]
    text = FOREIGN[language][number // len(FOREIGN) % len(FOREIGN[language])]
    speaker = Speaker(language, rng.choice(["f2", "m3", "f4"]), 180, 50, 50)
    samples, _ = espeak.synthesize(speaker, text)
    speech = resample_poly(samples, SAMPLING_RATE, espeak.sampling_rate)
    return place_in_room(speech, rng)[0], text


def read_clip(row: prepare_corpus.Utterance) -> Clip:
    return Recording.from_file(row.path).resample(SAMPLING_RATE).load_audio()[0], row.text


def clips_of(table: Path, split: str) -> list[prepare_corpus.Utterance]:
    """Those of a split, or of the whole table where it has no such split.

    Raises:
      ValueError: there is none.
    """
    rows = [row for row in prepare_corpus.read_table(table) if not row.problem]
    rows = [row for row in rows if row.split == split] or rows
    if not rows:
        raise InputError(f"{table} has no clips")
    return rows


def provocations(
    rows: list[prepare_corpus.Utterance], each: int, seed: int
) -> Iterator[tuple[str, str, Clip]]:
    """Kind and id of every provocation, and what is heard."""
    espeak, rng = Espeak(), np.random.default_rng(seed)
    clips = map(read_clip, cycle(rng.permutation(rows)))
    makers = {kind: lambda i, make=make: (make(rng), NOTHING) for kind, make in NO_SPEECH.items()}
    makers |= {kind: lambda i, make=make: make(clips) for kind, make in OF_CLIPS.items()}
    makers[FOREIGN_KIND] = lambda i: foreign(i, espeak, rng)
    for kind, make in makers.items():
        for i in range(each):
            yield kind, f"{kind.replace(' ', '-')}-{i:02d}", make(i)


def write_corpus(found: Iterable[tuple[str, str, Clip]], out: Path) -> dict[str, dict]:
    """Audio, table, cuts and features; id -> kind and text.

    Raises:
      ValueError: in the way is what is no earlier result.
    """
    table_path = out / "provocations.tsv"
    if out.exists() and not table_path.is_file():
        raise InputError(f"{out} exists and was not made by this program: choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    (out / "wav").mkdir(parents=True)
    said = {}
    with table_path.open("w", encoding="utf-8") as table:
        print("utt_id", "text", "path", "split", sep="\t", file=table)
        for kind, name, (audio, text) in found:
            soundfile.write(out / f"wav/{name}.wav", audio, SAMPLING_RATE, subtype="PCM_16")
            print(name, text, f"wav/{name}.wav", "test", sep="\t", file=table)
            said[name] = {"kind": kind, "said": text}
    prepare_corpus.main([
        "--table", str(table_path), "--corpus", "provocations",
        "--manifest-dir", str(out / "fbank"), "--speed-perturb", "false", "--num-jobs", "1",
    ])  # fmt: skip
    return said


# ---- what is made of them


def decode_all(argv: list[str], manifest_dir: Path) -> tuple[dict[str, dict], int]:
    """id -> seconds, CTC text and, of each guard, the answer; the limit of tokens."""
    argv = [*argv, "--test-cuts", "provocations_cuts_test", "--manifest-dir", str(manifest_dir)]
    args = decode.read_flags(argv)
    (path,), decoder = decode.prepare(args)
    answers: dict[str, dict] = defaultdict(dict)
    for args.guard in GUARDS if decoder.recognizer(args).reader else GUARDS[:2]:
        for one in decode_cuts(
            path,
            decoder.recognizer(args),
            frames_needed(args.encoder_projector_ds_rate),
            **loader_options(args),
        ):
            answer = one.answer or Recognition("", Hypothesis())  # too short to hear
            ids = answer.hypothesis.ids
            answers[one.cut.id] |= {
                "seconds": one.cut.duration,
                "ctc_text": answer.ctc_text,
                args.guard: {
                    "text": answer.text,
                    "reasons": answer.reasons,
                    "source": answer.source,
                    "tokens": len(ids),
                    "repetitive": is_repetitive(ids),
                },
            }
    return answers, args.max_new_tokens


def is_repetitive(ids: list[int]) -> bool:
    """Whether fewer than half of the quadruples of tokens are different ones."""
    quadruples = list(zip(*(ids[i:] for i in range(4))))
    return len(set(quadruples)) < len(quadruples) / 2


def print_table(found: list[dict], limit: int) -> None:
    """How many texts are so with each guard, and the WER where a model could be right."""
    guards = [guard for guard in GUARDS if guard in found[0]]
    columns = {
        "empty": lambda one, answer: not answer["text"],
        "flagged": lambda one, answer: answer["reasons"],
        "changed": lambda one, answer: answer["text"] != one["off"]["text"],
        f"{limit} tokens": lambda one, answer: answer["tokens"] >= limit,
    }
    print(" " * 26 + "".join(f"{title:>{6 * len(guards)}}" for title in [*columns, "WER (%)"]))
    header = "".join(f"{guard[:5]:>6}" for guard in guards)
    print(f"{'kind':<22}{'n':>4}" + header * (len(columns) + 1))
    for kind, own in by_kind(found).items():
        cells = [
            str(sum(bool(is_so(one, one[guard])) for one in own))
            for is_so in columns.values()
            for guard in guards
        ]
        if own[0]["said"] != NOTHING and kind != FOREIGN_KIND:
            cells += [f"{word_error_rate(own, guard):.0f}" for guard in guards]
        print(f"{kind:<22}{len(own):>4}" + "".join(f"{cell:>6}" for cell in cells))


def word_error_rate(found: list[dict], guard: str) -> float:
    """Per cent."""
    pairs = [(one["said"].lower().split(), one[guard]["text"].lower().split()) for one in found]
    errors = sum(kaldialign.edit_distance(*pair)["total"] for pair in pairs)
    return 100 * errors / sum(len(said) for said, _ in pairs)


def print_examples(found: list[dict]) -> None:
    """Of each kind one that is flagged, if any, and says much."""
    for own in by_kind(found).values():
        one = max(own, key=lambda one: (bool(one["stop"]["reasons"]), len(one["off"]["text"])))
        print(
            f"\n{one['id']}, {one['seconds']:.1f} s, {', '.join(one['stop']['reasons']) or 'fine'}"
        )
        texts = {"said": one["said"], "CTC": one["ctc_text"]}
        texts |= {guard: one[guard]["text"] for guard in GUARDS if guard in one}
        for what, text in texts.items():
            print(f"  {what:<9}{text if text is None else textwrap.shorten(text, 90)}")


def by_kind(found: list[dict]) -> dict[str, list[dict]]:
    kinds = defaultdict(list)
    for one in found:
        kinds[one["kind"]].append(one)
    return kinds


def failures(found: list[dict], limit: int) -> list[str]:
    """What a guard let through, a line each."""
    lines = []
    for one in found:
        for guard in GUARDS[1:]:
            answer = one.get(guard)
            if not answer:
                continue
            if one["kind"] in NO_SPEECH and answer["text"] and not answer["reasons"]:
                lines.append(f"{one['id']}, --guard {guard}, invented: {answer['text']}")
            if answer["tokens"] >= limit and answer["repetitive"]:
                lines.append(f"{one['id']}, --guard {guard}, loops: {answer['text']}")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, required=True, help="of a corpus")
    parser.add_argument("--split", default="test", help="of which clips are taken")
    parser.add_argument("--each", type=int, default=6, help="provocations of a kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="a folder, made anew")
    parser.add_argument("decode_flags", nargs="+", help="of decode.py, after --")
    args = parser.parse_args(argv)
    try:
        rows = clips_of(args.table, args.split)
        said = write_corpus(provocations(rows, args.each, args.seed), args.out)
        answers, limit = decode_all(args.decode_flags, args.out / "fbank")
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None
    found = [{"id": name, **about, **answers[name]} for name, about in said.items()]
    with (args.out / "provocations.jsonl").open("w", encoding="utf-8") as file:
        for one in found:
            print(json.dumps(one, ensure_ascii=False), file=file)
    print_table(found, limit)
    print_examples(found)
    if lines := failures(found, limit):
        raise SystemExit("\n".join(["", "The guard let through:", *lines]))


if __name__ == "__main__":
    main()

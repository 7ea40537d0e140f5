"""A spoken corpus out of nothing: household commands and numbers, said by many espeak-ng voices.

  python local/make_spoken_corpus.py --out data/demo_corpus

Needs no audio, no network and no installed espeak: the package espeakng-loader brings the library.

Writes, at 16 kHz and 16 bit,

  <out>/wav/<speaker>/<utt_id>.flac
  <out>/transcripts.tsv    utt_id, speaker, split, text, path, duration_s: for prepare_corpus.py
  <out>/words.jsonl        {"utt_id": …, "words": [[word, start_s, end_s], …]}, as espeak timed them
  <out>/corpus.json        the arguments; a corpus made with the same ones is kept

No voice and no sentence of one split occurs in another. The same arguments give the same files.
"""

import argparse
import ctypes
import json
import logging
import math
import os
import random
import re
import shutil
import sys
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import espeakng_loader
import numpy as np
import soundfile
from scipy.signal import resample_poly

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from speechllm.errors import in_sentences
from speechllm.flags import Parser

logger = logging.getLogger(__name__)

SAMPLING_RATE = 16000  # Hz
MIN_DURATION = 0.5  # seconds
MAX_DURATION = 20.0  # seconds
SPLITS = ("train", "dev", "test")

# ---- what is said

GRAMMAR = {  # sixty words: what a tiny encoder can learn in a few minutes
    "sentence": (
        "{command}", "{command}", "please {command}", "{command} at {hour}", "call {digits}",
        "the number is {digits}", "{digits}", "{digits} {number}",
    ),
    "phrase": (  # heard in training only: with few words it is clear which sound is which
        "{digit}", "{digit} {digit}", "{number}", "{room} {appliance}", "turn {switch}", "stop",
        "please", "{move} the {opening}", "{appliance} {switch}", "at {hour}", "call {digit}",
        "{tens} minutes", "{tens} degrees", "the {room}", "set a timer", "the number is {digit}",
        "play music",
    ),
    "command": (
        "turn {switch} the {room} {appliance}",
        "turn the {room} {appliance} {switch}",
        "set the {room} heater to {number} degrees",
        "set a timer for {number} minutes",
        "{move} the {room} {opening}",
        "play music in the {room}",
        "stop the {room} {appliance}",
    ),
    "switch": ("on", "off"),
    "appliance": ("light", "heater", "fan", "radio", "television"),
    "room": ("kitchen", "bedroom", "bathroom", "office", "garage"),
    "move": ("open", "close"),
    "opening": ("door", "window"),
    "hour": ("{unit}", "ten", "eleven", "twelve"),
    "number": ("{tens}", "{tens} {unit}"),
    "unit": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "tens": ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"),
    "digits": ("{digit} {digit} {digit}", "{digit} {digit} {digit} {digit}"),
    "digit": ("zero", "{unit}", "{unit}", "{unit}", "{unit}", "{unit}", "{unit}"),
}  # fmt: skip


def expand(symbol: str, rng: random.Random) -> str:
    """A random text of a symbol of the grammar."""
    template = rng.choice(GRAMMAR[symbol])
    return re.sub(r"\{(\w+)\}", lambda inner: expand(inner[1], rng), template)


def draw_sentences(num_sentences: int, rng: random.Random) -> list[str]:
    """Different sentences of the grammar.

    Raises:
      ValueError: when so many are wanted that new ones are hardly found.
    """
    sentences: dict[str, None] = {}  # a set that keeps its order
    for _ in range(100 * num_sentences):
        sentences[expand("sentence", rng)] = None
        if len(sentences) == num_sentences:
            return list(sentences)
    raise ValueError(f"the grammar has no {num_sentences} sentences: ask for fewer utterances")


# ---- who says it

ACCENTS = ("en", "en-us", "en-gb-x-rp")
# espeak's voice variants without those that whisper, click, echo or sound like a robot; near copies
# of each other are in one split.
VARIANTS = {
    "train": (
        "f1", "f4", "m1", "m3", "m4", "m7", "m8", "Alicia", "Andrea", "Andy", "Denis", "Diogo",
        "Gene", "Gene2", "Henrique", "Hugo", "Marco", "Michael", "Mike", "mike2", "Nguyen", "adam",
        "anika", "antonio", "aunty", "benjamin", "boris", "david", "ed", "edward", "edward2",
        "gustave", "ian", "iven", "john", "kaukovalta", "klatt3", "klatt4", "klatt6", "marcelo",
        "max", "miguel", "norbert", "quincy", "robert", "sandro", "shelby", "steph", "steph2",
        "travis", "victor",
    ),
    "dev": ("f3", "m5", "Alex", "belinda", "michel", "rob"),
    "test": (
        "f2", "f5", "m2", "m6", "Annie", "Lee", "Mario", "Reed", "grandma", "linda", "pablo",
        "paul",
    ),
}  # fmt: skip
ACCENTS_PER_VARIANT = {"train": 2, "dev": 1, "test": 1}


@dataclass(frozen=True)
class Speaker:
    accent: str  # an espeak voice
    variant: str  # of that voice: formants, pitch, breath
    rate: int  # words a minute
    pitch: int  # 0–99
    pitch_range: int  # 0–99, 0 is monotonous

    @property
    def name(self) -> str:
        return f"{self.accent}-{self.variant}".lower()


@dataclass(frozen=True)
class Utterance:
    utt_id: str
    split: str
    speaker: Speaker
    text: str


def draw_speakers(split: str, rng: random.Random) -> list[Speaker]:
    """Every variant of the split with its accents, each with habits of its own, in random order."""
    speakers = [
        Speaker(accent, variant, rng.randint(170, 220), rng.randint(35, 65), rng.randint(30, 70))
        for variant in VARIANTS[split]
        for accent in rng.sample(ACCENTS, ACCENTS_PER_VARIANT[split])
    ]
    return rng.sample(speakers, len(speakers))


def plan_corpus(sizes: dict[str, int], seed: int) -> list[Utterance]:
    """Who says what: `sizes` utterances of each split, shared out evenly among its speakers.

    Every other utterance of the training split is a short phrase; phrases may repeat.
    """
    rng = random.Random(seed)
    sentences = iter(draw_sentences(sum(sizes.values()), rng))
    utterances = []
    for split, size in sizes.items():
        speakers = draw_speakers(split, rng)
        for index in range(size):
            speaker = speakers[index % len(speakers)]
            utt_id = f"{speaker.name}-{split}-{index:05d}"
            phrase = split == "train" and index % 2
            text = expand("phrase", rng) if phrase else next(sentences)
            utterances.append(Utterance(utt_id, split, speaker, text))
    return utterances


def check_disjoint(utterances: list[Utterance]) -> None:
    """No sentence, speaker or voice variant is in two splits.

    Raises:
      ValueError: naming one that is.
    """
    splits_of = defaultdict(set)
    for utterance in utterances:
        speaker = utterance.speaker
        for thing in (utterance.text, speaker.name, f"variant {speaker.variant}"):
            splits_of[thing].add(utterance.split)
    for thing, splits in splits_of.items():
        if len(splits) > 1:
            raise ValueError(f"{thing!r} is in several splits: {', '.join(sorted(splits))}")


# ---- how it is said


class EspeakEvent(ctypes.Structure):
    """espeak_EVENT of speak_lib.h, whose last field, a union, is read as a phoneme's name."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("phoneme", ctypes.c_char * 8),
    )


SYNTH_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(EspeakEvent)
)
WordTime = tuple[str, float, float]  # word, start and end in seconds


class Espeak:
    """espeak-ng in this process. It is not thread-safe, and a process should make one only."""

    # Constants of speak_lib.h
    SYNCHRONOUS, PHONEME_EVENTS, DONT_EXIT, UTF8, POS_CHARACTER = 2, 1, 0x8000, 1, 1
    LIST_TERMINATED, WORD, PHONEME = 0, 1, 7
    RATE, VOLUME, PITCH, RANGE = 1, 2, 3, 4

    def __init__(self):
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.library.espeak_Synth.argtypes = (
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint,
            ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
        )  # fmt: skip
        data_path = espeakng_loader.get_data_path().encode()
        self.sampling_rate = self.library.espeak_Initialize(
            self.SYNCHRONOUS, 0, data_path, self.PHONEME_EVENTS | self.DONT_EXIT
        )
        if self.sampling_rate <= 0:
            raise RuntimeError(f"espeak-ng did not start with the data in {data_path.decode()}")
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # breath is seeded with the time
        self._pieces: list[bytes] = []
        self._events: list[tuple[int, int, bytes]] = []  # type, sample, phoneme
        self._callback = SYNTH_CALLBACK(self._collect)  # espeak keeps no reference to it
        self.library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples, num_samples: int, events) -> int:
        if num_samples:
            self._pieces.append(ctypes.string_at(samples, 2 * num_samples))
        while events.contents.type != self.LIST_TERMINATED:
            event = events.contents
            self._events.append((event.type, event.sample, event.phoneme))
            events = ctypes.cast(
                ctypes.addressof(event) + ctypes.sizeof(event), ctypes.POINTER(EspeakEvent)
            )
        return 0  # go on

    def synthesize(self, speaker: Speaker, text: str) -> tuple[np.ndarray, list[WordTime]]:
        """Speech as (num_samples,) float64 in [-1, 1) at `sampling_rate`, and its words' times.

        A word ends where the next one or a pause begins.

        Raises:
          ValueError: if espeak does not know the voice, or hears other words than `text` has.
        """
        voice = f"{speaker.accent}+{speaker.variant}"
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice}")
        for parameter, value in (
            (self.RATE, speaker.rate),
            (self.VOLUME, 30),  # some variants clip at the usual 100
            (self.PITCH, speaker.pitch),
            (self.RANGE, speaker.pitch_range),
        ):
            self.library.espeak_SetParameter(parameter, value, 0)
        self._pieces, self._events = [], []
        # The dictionary joins pairs such as "in the" into one word, but not across a word joiner;
        # it changes no sound.
        spoken = "\u2060 ".join(text.split()).encode()
        self.library.espeak_Synth(
            spoken, len(spoken) + 1, 0, self.POS_CHARACTER, 0, self.UTF8, None, None
        )
        self.library.espeak_Synchronize()
        samples = np.frombuffer(b"".join(self._pieces), dtype=np.int16) / 32768
        return samples, self._word_times(text.split(), len(samples))

    def _word_times(self, words: list[str], num_samples: int) -> list[WordTime]:
        starts, ends = [], []
        for kind, sample, phoneme in self._events:
            is_word = kind == self.WORD
            if (is_word or phoneme.startswith(b"_")) and len(ends) < len(starts):
                ends.append(sample)
            if is_word:
                starts.append(sample)
        if len(ends) < len(starts):
            ends.append(num_samples)
        if len(starts) != len(words):
            raise ValueError(f"espeak-ng heard {len(starts)} words in {' '.join(words)!r}")
        rate = self.sampling_rate
        return [
            (word, start / rate, end / rate)
            for word, start, end in zip(words, starts, ends, strict=True)
        ]


def noise(num_samples: int, pink: bool, rng: np.random.Generator) -> np.ndarray:
    """White or pink (equal power an octave) noise of unit power, (num_samples,)."""
    white = rng.standard_normal(num_samples)
    if not pink:
        return white
    spectrum = np.fft.rfft(white)
    spectrum[0] = 0
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    coloured = np.fft.irfft(spectrum, num_samples)
    return coloured / coloured.std()


def place_in_room(speech: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Speech at 16 kHz with silence around it (up to 0.2 s, every third time up to 0.9 s, as where
    a recording is cut in a pause), a level, and noise 20–40 dB below it.

    Returns the audio, (num_samples,), at least MIN_DURATION long, and the seconds before speech.
    """
    longest = rng.choice([0.2, 0.2, 0.9])
    before, after = (int(SAMPLING_RATE * seconds) for seconds in rng.uniform(0.05, longest, size=2))
    after = max(after, int(SAMPLING_RATE * MIN_DURATION) - before - len(speech))
    peak = 10 ** (rng.uniform(-18, -3) / 20)
    audio = np.pad(speech * (peak / np.abs(speech).max()), (before, after))
    speech_power = np.mean(audio[before : before + len(speech)] ** 2)
    noise_power = speech_power / 10 ** (rng.uniform(20, 40) / 10)
    audio += np.sqrt(noise_power) * noise(len(audio), pink=rng.random() < 0.5, rng=rng)
    return audio, before / SAMPLING_RATE


# ---- the corpus


def write_corpus(out: Path, utterances: list[Utterance], seed: int) -> list[dict[str, str]]:
    """Speak the utterances into `out` (wav/, words.jsonl, transcripts.tsv); the table's rows.

    Raises:
      ValueError: naming an utterance that espeak cannot say or that lasts over MAX_DURATION.
    """
    espeak = Espeak()
    common = math.gcd(SAMPLING_RATE, espeak.sampling_rate)
    rows = []
    with (out / "words.jsonl").open("w", encoding="utf-8") as words_file:
        for index, utterance in enumerate(utterances):
            speaker = utterance.speaker
            path = Path("wav") / speaker.name / f"{utterance.utt_id}.flac"
            try:
                samples, words = espeak.synthesize(speaker, utterance.text)
            except ValueError as error:
                raise ValueError(f"{utterance.utt_id}: {error}") from error
            speech = resample_poly(samples, SAMPLING_RATE // common, espeak.sampling_rate // common)
            audio, before = place_in_room(speech, np.random.default_rng([seed, index]))
            duration = len(audio) / SAMPLING_RATE
            if duration > MAX_DURATION:
                raise ValueError(f"{utterance.utt_id} lasts {duration:.1f} s, over {MAX_DURATION}")
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(out / path, audio, SAMPLING_RATE, subtype="PCM_16")
            times = [[word, round(before + a, 3), round(before + b, 3)] for word, a, b in words]
            print(json.dumps({"utt_id": utterance.utt_id, "words": times}), file=words_file)
            rows.append(
                {
                    "utt_id": utterance.utt_id,
                    "speaker": speaker.name,
                    "split": utterance.split,
                    "text": utterance.text,
                    "path": path.as_posix(),
                    "duration_s": f"{duration:.3f}",
                }
            )
    lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    (out / "transcripts.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


def describe(rows: list[dict[str, str]]) -> list[str]:
    """A line for each split, and one on the words."""
    lines = []
    counts = {split: Counter() for split in SPLITS}
    for split in SPLITS:
        own = [row for row in rows if row["split"] == split]
        counts[split].update(word for row in own for word in row["text"].split())
        minutes = sum(float(row["duration_s"]) for row in own) / 60
        lines.append(
            f"{split}: {len(own)} utterances, {minutes:.1f} min, "
            f"{len({row['speaker'] for row in own})} speakers, {counts[split].total()} words"
        )
    for split in SPLITS[1:]:
        unseen = sorted(counts[split].keys() - counts["train"].keys())
        lines.append(
            f"{split}: {len(counts[split])} different words, {len(unseen)} not in train "
            f"(train has {len(counts['train'])}): {' '.join(unseen) or '-'}"
        )
    return lines


def is_complete(out: Path, arguments: dict[str, int]) -> bool:
    """Whether `out` holds the corpus of these arguments.

    Raises:
      ValueError: if it holds anything else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    stamp = out / "corpus.json"
    if not stamp.is_file():
        raise ValueError(f"{out} exists and is no corpus of this program: choose another --out")
    made_with = json.loads(stamp.read_text(encoding="utf-8"))
    if made_with != arguments:
        raise ValueError(
            f"{out} was made with {made_with}, not {arguments}: remove it or choose another --out"
        )
    return True


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--num-train", type=int, default=2000, help="utterances to train on")
    parser.add_argument("--num-dev", type=int, default=60, help="utterances to validate on")
    parser.add_argument("--num-test", type=int, default=120, help="utterances to test on")
    parser.add_argument("--seed", type=int, default=0, help="of sentences, speakers and noise")
    return parser


@in_sentences
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    sizes = {split: getattr(args, f"num_{split}") for split in SPLITS}
    for split, size in sizes.items():
        if size < 1:
            raise SystemExit(f"--num-{split} {size}: every split needs an utterance")
    if args.seed < 0:
        raise SystemExit(f"--seed {args.seed} is negative")
    arguments = {**{f"num_{split}": size for split, size in sizes.items()}, "seed": args.seed}
    unfinished = args.out.with_name(args.out.name + ".tmp")
    try:
        if is_complete(args.out, arguments):
            logger.info("%s is complete: kept", args.out)
            return
        utterances = plan_corpus(sizes, args.seed)
        check_disjoint(utterances)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        # espeak's flutter and breath go on from what the process said before: a new process is
        # what makes the same arguments give the same samples.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            rows = pool.submit(write_corpus, unfinished, utterances, args.seed).result()
    except ValueError as error:
        raise SystemExit(str(error)) from error
    (unfinished / "corpus.json").write_text(json.dumps(arguments) + "\n", encoding="utf-8")
    os.replace(unfinished, args.out)
    for line in describe(rows):
        logger.info(line)
    logger.info("wrote %s", args.out)


if __name__ == "__main__":
    main()


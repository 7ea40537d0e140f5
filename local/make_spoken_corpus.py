"""Synthesize a corpus of household commands and numbers with many espeak-ng voices.

  python local/make_spoken_corpus.py --out data/demo_corpus

Needs neither audio nor a network: the package espeakng-loader contains espeak-ng. Writes

  <out>/wav/<speaker>/<utt_id>.flac   16 kHz, 16 bit
  <out>/transcripts.tsv    utt_id, speaker, split, text, path, duration_s: for prepare_corpus.py
  <out>/words.jsonl        {"utt_id": …, "words": [[word, start_s, end_s], …]}, timed by espeak

The splits share no voices and no sentences. The output is reproducible.
"""

import ctypes
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

import _path  # noqa: F401
import numpy as np

from speechllm.cli import Parser, check_range
from speechllm.errors import InputError, exit_on_user_error
from speechllm.io import atomic_directory

SAMPLING_RATE = 16000  # Hz
SEED = 0

# ---- texts

GRAMMAR = {  # sixty words, few enough for a tiny encoder
    "sentence": (
        "{command}", "{command}", "please {command}", "{command} at {hour}", "call {digits}",
        "the number is {digits}", "{digits}", "{digits} {number}",
    ),
    "phrase": (  # only for training: short texts simplify alignment
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
    """Sample a text from a grammar symbol."""
    template = rng.choice(GRAMMAR[symbol])
    return re.sub(r"\{(\w+)\}", lambda inner: expand(inner[1], rng), template)


# ---- speakers

ACCENTS = ("en", "en-us", "en-gb-x-rp")
ACCENTS_PER_VARIANT = {"train": 2, "dev": 1, "test": 1}
# espeak's voice variants, except whispers, clicks, echoes and robots; similar ones share a split.
VARIANTS = {
    "train": (
        "f1 f4 m1 m3 m4 m7 m8 Alicia Andrea Andy Denis Diogo Gene Gene2 Henrique Hugo Marco "
        "Michael Mike mike2 Nguyen adam anika antonio aunty benjamin boris david ed edward "
        "edward2 gustave ian iven john kaukovalta klatt3 klatt4 klatt6 marcelo max miguel "
        "norbert quincy robert sandro shelby steph steph2 travis victor"
    ).split(),
    "dev": "f3 m5 Alex belinda michel rob".split(),
    "test": "f2 f5 m2 m6 Annie Lee Mario Reed grandma linda pablo paul".split(),
}


class Speaker(NamedTuple):
    """Accent, voice variant, rate in words per minute, pitch and pitch range (0–99)."""

    accent: str
    variant: str
    rate: int
    pitch: int
    pitch_range: int

    @property
    def name(self) -> str:
        return f"{self.accent}-{self.variant}".lower()


Utterance = tuple[str, str, Speaker, str]  # id, split, speaker, text


def draw_speakers(split: str, rng: random.Random) -> list[Speaker]:
    """Sample a split's speakers: accents and speaking styles for each variant, shuffled."""
    speakers = [
        Speaker(accent, variant, rng.randint(170, 220), rng.randint(35, 65), rng.randint(30, 70))
        for variant in VARIANTS[split]
        for accent in rng.sample(ACCENTS, ACCENTS_PER_VARIANT[split])
    ]
    return rng.sample(speakers, len(speakers))


def plan_corpus(sizes: dict[str, int]) -> list[Utterance]:
    """Sample `sizes[split]` utterances per split, evenly distributed over its speakers.

    Sentences are unique. Every second training utterance is a short phrase, which may be repeated.
    """
    rng = random.Random(SEED)
    sentences: dict[str, None] = {}  # an ordered set
    while len(sentences) < sum(sizes.values()):
        sentences[expand("sentence", rng)] = None
    unused = iter(sentences)
    utterances = []
    for split, size in sizes.items():
        speakers = draw_speakers(split, rng)
        for index in range(size):
            speaker = speakers[index % len(speakers)]
            is_phrase = split == "train" and index % 2
            text = expand("phrase", rng) if is_phrase else next(unused)
            utterances.append((f"{speaker.name}-{split}-{index:05d}", split, speaker, text))
    return utterances


# ---- audio

TimedWord = tuple[str, float, float]  # word, start and end in seconds


class EspeakEvent(ctypes.Structure):
    """espeak_EVENT in speak_lib.h; its last field, a union, is read as a phoneme name."""

    _fields_ = (
        ("type", ctypes.c_int), ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int), ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int), ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p), ("phoneme", ctypes.c_char * 8),
    )  # fmt: skip


# Constants in speak_lib.h
SYNCHRONOUS, PHONEME_EVENTS, DONT_EXIT, UTF8 = 2, 1, 0x8000, 1
LIST_TERMINATED, WORD = 0, 1  # event types
RATE, VOLUME, PITCH, RANGE = 1, 2, 3, 4


class Espeak:
    """espeak-ng synthesizer; at most one instance per process, not thread-safe."""

    def __init__(self):
        import espeakng_loader

        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        data_path = espeakng_loader.get_data_path().encode()
        flags = PHONEME_EVENTS | DONT_EXIT
        self.sampling_rate = self.library.espeak_Initialize(SYNCHRONOUS, 0, data_path, flags)
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # else breath noise varies
        event = ctypes.POINTER(EspeakEvent)
        kinds = (ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, event)
        self._callback = ctypes.CFUNCTYPE(*kinds)(self._collect)  # espeak keeps no reference
        self.library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples, num_samples: int, events) -> int:
        if num_samples:
            self._samples.append(ctypes.string_at(samples, 2 * num_samples))
        index = 0
        while (event := events[index]).type != LIST_TERMINATED:
            self._events.append((event.type, event.sample, event.phoneme))
            index += 1
        return 0  # continue

    def synthesize(self, speaker: Speaker, text: str) -> tuple[np.ndarray, list[TimedWord]]:
        """Return samples (N,), float64 in [-1, 1), at `sampling_rate`, and the timed words.

        Each word ends where the next word or a pause begins. An unknown voice raises InputError.
        """
        voice = f"{speaker.accent}+{speaker.variant}"
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise InputError(f"espeak-ng has no voice {voice}")
        for kind, value in (
            (RATE, speaker.rate), (VOLUME, 30),  # some variants clip at 100
            (PITCH, speaker.pitch), (RANGE, speaker.pitch_range),
        ):  # fmt: skip
            self.library.espeak_SetParameter(kind, value, 0)
        self._samples, self._events = [], []
        # Word joiners keep the dictionary from merging pairs such as "in the" into one word.
        spoken = "\u2060 ".join(text.split()).encode()
        size = ctypes.c_size_t(len(spoken) + 1)
        self.library.espeak_Synth(spoken, size, 0, 1, 0, UTF8, None, None)
        samples = np.frombuffer(b"".join(self._samples), dtype=np.int16) / 32768
        return samples, self._word_times(text.split(), len(samples))

    def _word_times(self, words: list[str], num_samples: int) -> list[TimedWord]:
        starts, ends = [], []
        for kind, sample, phoneme in [*self._events, (WORD, num_samples, b"")]:
            is_pause = phoneme.startswith(b"_")
            if (kind == WORD or is_pause) and len(ends) < len(starts):
                ends.append(sample)
            if kind == WORD:
                starts.append(sample)
        rate = self.sampling_rate
        return [(w, a / rate, b / rate) for w, a, b in zip(words, starts[:-1], ends, strict=True)]


def noise(num_samples: int, pink: bool, rng: np.random.Generator) -> np.ndarray:
    """Sample white or pink (equal power per octave) noise (num_samples,) with unit power."""
    white = rng.standard_normal(num_samples)
    if not pink:
        return white
    spectrum = np.fft.rfft(white)
    spectrum[0] = 0
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    pink_noise = np.fft.irfft(spectrum, num_samples)
    return pink_noise / pink_noise.std()


def place_in_room(speech: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Add silence (up to 0.2 s, in a third of cases up to 0.9 s), gain, and noise (20–40 dB SNR).

    Return 16 kHz samples (N,), at least 0.5 s, and the number of seconds before the speech.
    """
    longest = rng.choice([0.2, 0.2, 0.9])
    before, after = (int(SAMPLING_RATE * seconds) for seconds in rng.uniform(0.05, longest, size=2))
    after = max(after, SAMPLING_RATE // 2 - before - len(speech))
    peak = 10 ** (rng.uniform(-18, -3) / 20)
    audio = np.pad(speech * (peak / np.abs(speech).max()), (before, after))
    speech_power = np.mean(audio[before : before + len(speech)] ** 2)
    noise_power = speech_power / 10 ** (rng.uniform(20, 40) / 10)
    audio += np.sqrt(noise_power) * noise(len(audio), pink=rng.random() < 0.5, rng=rng)
    return audio, before / SAMPLING_RATE


# ---- files


def write_corpus(out: Path, utterances: list[Utterance]) -> None:
    """Synthesize the utterances; write wav/, words.jsonl and transcripts.tsv."""
    import soundfile
    from scipy.signal import resample_poly

    espeak = Espeak()
    rows, timings = ["utt_id\tspeaker\tsplit\ttext\tpath\tduration_s"], []
    for index, (name, split, speaker, text) in enumerate(utterances):
        samples, words = espeak.synthesize(speaker, text)
        speech = resample_poly(samples, SAMPLING_RATE, espeak.sampling_rate)
        audio, before = place_in_room(speech, np.random.default_rng([SEED, index]))
        path = Path("wav") / speaker.name / f"{name}.flac"
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(out / path, audio, SAMPLING_RATE, subtype="PCM_16")
        times = [[word, round(before + a, 3), round(before + b, 3)] for word, a, b in words]
        timings.append(json.dumps({"utt_id": name, "words": times}))
        seconds = f"{len(audio) / SAMPLING_RATE:.3f}"
        rows.append("\t".join([name, speaker.name, split, text, path.as_posix(), seconds]))
    (out / "transcripts.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (out / "words.jsonl").write_text("\n".join(timings) + "\n", encoding="utf-8")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="output directory")
    add("--num-train", type=int, default=2000, help="number of training utterances")
    add("--num-dev", type=int, default=60, help="number of validation utterances")
    add("--num-test", type=int, default=120, help="number of test utterances")
    args = parser.parse_args(argv)
    sizes = {split: getattr(args, f"num_{split}") for split in VARIANTS}
    for split, size in sizes.items():
        check_range(f"num_{split}", size, 1)
    if args.out.exists():
        raise InputError(f"{args.out} exists: remove it or choose another --out")
    with atomic_directory(args.out) as partial:
        write_corpus(partial, plan_corpus(sizes))
    print(f"wrote {sum(sizes.values())} utterances to {args.out}")


if __name__ == "__main__":
    main()

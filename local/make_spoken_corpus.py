"""Synthesize a corpus of household commands and numbers with many espeak-ng voices.

  python local/make_spoken_corpus.py --out data/demo_corpus

Needs no audio and no network: the package espeakng-loader contains espeak-ng. Writes

  <out>/wav/<speaker>/<utt_id>.flac   16 kHz, 16 bit
  <out>/transcripts.tsv    utt_id, speaker, split, text, path, duration_s: for prepare_corpus.py
  <out>/words.jsonl        {"utt_id": …, "words": [[word, start_s, end_s], …]}, espeak's timing

Voices and sentences of the splits are disjoint. The output is reproducible.
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
    "phrase": (  # for training only: short texts simplify alignment
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
    """Draw a text from a symbol of the grammar."""
    template = rng.choice(GRAMMAR[symbol])
    return re.sub(r"\{(\w+)\}", lambda inner: expand(inner[1], rng), template)


# ---- speakers

ACCENTS = ("en", "en-us", "en-gb-x-rp")
ACCENTS_PER_VARIANT = {"train": 2, "dev": 1, "test": 1}
# espeak's voice variants without whispers, clicks, echoes and robots; similar ones share a split.
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
    accent: str  # an espeak voice
    variant: str  # modifies formants, pitch and breath of the voice
    rate: int  # words per minute
    pitch: int  # 0–99
    pitch_range: int  # 0–99, 0 is monotonous

    @property
    def name(self) -> str:
        return f"{self.accent}-{self.variant}".lower()


Utterance = tuple[str, str, Speaker, str]  # id, split, speaker, text


def draw_speakers(split: str, rng: random.Random) -> list[Speaker]:
    """Draw accents and speaking styles for each variant of the split, in random order."""
    speakers = [
        Speaker(accent, variant, rng.randint(170, 220), rng.randint(35, 65), rng.randint(30, 70))
        for variant in VARIANTS[split]
        for accent in rng.sample(ACCENTS, ACCENTS_PER_VARIANT[split])
    ]
    return rng.sample(speakers, len(speakers))


def plan_corpus(sizes: dict[str, int]) -> list[Utterance]:
    """Draw `sizes` utterances of each split, evenly distributed over its speakers.

    Sentences are distinct. Every other training utterance is a short phrase, which may repeat.
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
    """espeak_EVENT of speak_lib.h; its last field, a union, is read as a phoneme's name."""

    _fields_ = (
        ("type", ctypes.c_int), ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int), ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int), ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p), ("phoneme", ctypes.c_char * 8),
    )  # fmt: skip


SYNTH_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(EspeakEvent)
)


class Espeak:
    """espeak-ng, at most one instance per process; not thread-safe."""

    # Constants of speak_lib.h
    SYNCHRONOUS, PHONEME_EVENTS, DONT_EXIT, UTF8, POS_CHARACTER = 2, 1, 0x8000, 1, 1
    LIST_TERMINATED, WORD = 0, 1
    RATE, VOLUME, PITCH, RANGE = 1, 2, 3, 4

    def __init__(self):
        import espeakng_loader

        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.library.espeak_Synth.argtypes = (
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint,
            ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
        )  # fmt: skip
        data_path = espeakng_loader.get_data_path().encode()
        flags = self.PHONEME_EVENTS | self.DONT_EXIT
        self.sampling_rate = self.library.espeak_Initialize(self.SYNCHRONOUS, 0, data_path, flags)
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # by default breath varies with time
        self._samples: list[bytes] = []
        self._events: list[tuple[int, int, bytes]] = []  # type, sample, phoneme
        self._callback = SYNTH_CALLBACK(self._collect)  # espeak keeps no reference
        self.library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples, num_samples: int, events) -> int:
        if num_samples:
            self._samples.append(ctypes.string_at(samples, 2 * num_samples))
        index = 0
        while (event := events[index]).type != self.LIST_TERMINATED:
            self._events.append((event.type, event.sample, event.phoneme))
            index += 1
        return 0  # continue

    def synthesize(self, speaker: Speaker, text: str) -> tuple[np.ndarray, list[TimedWord]]:
        """Synthesize a text.

        Returns:
          (num_samples,) float64 in [-1, 1) at `sampling_rate`; the words with their times, each
          ending where the next one or a pause begins.
        Raises:
          InputError: espeak lacks the voice.
        """
        voice = f"{speaker.accent}+{speaker.variant}"
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise InputError(f"espeak-ng has no voice {voice}")
        self.library.espeak_SetParameter(self.RATE, speaker.rate, 0)
        self.library.espeak_SetParameter(self.VOLUME, 30, 0)  # some variants clip at 100
        self.library.espeak_SetParameter(self.PITCH, speaker.pitch, 0)
        self.library.espeak_SetParameter(self.RANGE, speaker.pitch_range, 0)
        self._samples, self._events = [], []
        # A word joiner keeps the dictionary from merging pairs such as "in the" into one word.
        spoken = "\u2060 ".join(text.split()).encode()
        self.library.espeak_Synth(
            spoken, len(spoken) + 1, 0, self.POS_CHARACTER, 0, self.UTF8, None, None
        )
        self.library.espeak_Synchronize()
        samples = np.frombuffer(b"".join(self._samples), dtype=np.int16) / 32768
        return samples, self._word_times(text.split(), len(samples))

    def _word_times(self, words: list[str], num_samples: int) -> list[TimedWord]:
        starts, ends = [], []
        for kind, sample, phoneme in [*self._events, (self.WORD, num_samples, b"")]:
            is_word = kind == self.WORD
            if (is_word or phoneme.startswith(b"_")) and len(ends) < len(starts):
                ends.append(sample)
            if is_word:
                starts.append(sample)
        rate = self.sampling_rate
        return [(w, a / rate, b / rate) for w, a, b in zip(words, starts[:-1], ends, strict=True)]


def noise(num_samples: int, pink: bool, rng: np.random.Generator) -> np.ndarray:
    """Draw (num_samples,) white or pink (equal power per octave) noise of unit power."""
    white = rng.standard_normal(num_samples)
    if not pink:
        return white
    spectrum = np.fft.rfft(white)
    spectrum[0] = 0
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    coloured = np.fft.irfft(spectrum, num_samples)
    return coloured / coloured.std()


def place_in_room(speech: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Add silence (up to 0.2 s, every third time up to 0.9 s), gain, and noise 20–40 dB below.

    Returns:
      (num_samples,) at 16 kHz, at least 0.5 s; the seconds before the speech.
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
    add("--out", type=Path, required=True, help="directory to write")
    add("--num-train", type=int, default=2000, help="training utterances")
    add("--num-dev", type=int, default=60, help="validation utterances")
    add("--num-test", type=int, default=120, help="test utterances")
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

#!/usr/bin/env python3
"""Provoke repetitions and hallucinations in a trained model, and show the effect of --guard.

    python tests/provoke.py --cuts data/fbank/demo_cuts_test.jsonl.gz --out exp/provoked \\
      --exp-dir exp/demo/llm_asr

Takes decode.py's flags for the model and the search. Inputs, --each of every kind, are generated
(noise, tones, silence) or made from the utterances of a cut file: cut off, joined, repeated or
followed by silence. All are decoded with every --guard. Writes to <out>

    wav/                   the inputs
    provocations.jsonl     for each input its text, and for each guard the hypothesis, its flags and
                           the number of tokens

and prints a table. The exit code is 1 if an input without speech gets a
text without a flag, or if a guarded hypothesis repeats itself up to the token limit.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, groupby, islice, repeat
from operator import itemgetter
from pathlib import Path

import numpy as np
from benchmarks import measure  # noqa: F401, makes src/ and local/ importable
from make_spoken_corpus import SAMPLING_RATE, noise

from speechllm.cli import Parser, add_options, from_args
from speechllm.decoding.config import CheckpointConfig, SearchConfig
from speechllm.errors import exit_on_user_error
from speechllm.models.config import ModelConfig, model_config

GUARDS = ("off", "stop", "fallback")
NO_TEXT = "-"  # reference of an input without speech
Clip = tuple[np.ndarray, str]  # samples (n,) at 16 kHz, text


# ---- inputs without speech: number of samples, random generator -> samples


NO_SPEECH = {
    "white noise": lambda count, rng: 0.1 * noise(count, False, rng),
    "pink noise": lambda count, rng: 0.1 * noise(count, True, rng),
    "digital silence": lambda count, rng: np.zeros(count),
    "tone": lambda count, rng: 0.1 * np.sin(np.arange(count) * rng.uniform(0.05, 0.5)),
}

# ---- inputs made from the next utterances


def join(clips: Iterator[Clip], count: int) -> Clip:
    audios, texts = zip(*islice(clips, count))
    return np.concatenate(audios), " ".join(texts)


def cut_off(audio: np.ndarray, _) -> Clip:
    return audio[: len(audio) // 2], NO_TEXT


def before_silence(audio: np.ndarray, text: str) -> Clip:
    return np.pad(audio, (0, 10 * SAMPLING_RATE)), text


FROM_CLIPS = {
    "cut in the middle": lambda clips: cut_off(*next(clips)),
    "two joined": lambda clips: join(clips, 2),
    "before 10 s of silence": lambda clips: before_silence(*next(clips)),
    "repeated 4 times": lambda clips: join(repeat(next(clips)), 4),
}


def provocations(cuts: list, each: int, seed: int) -> Iterator[tuple[str, str, Clip]]:
    """Yield kind, id and clip of every input."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.array(cuts, dtype=object))
    clips = (
        (cut.resample(SAMPLING_RATE).load_audio()[0], cut.supervisions[0].text)
        for cut in cycle(order)
    )
    for kind in [*NO_SPEECH, *FROM_CLIPS]:
        for i in range(each):
            if kind in NO_SPEECH:
                count = int(SAMPLING_RATE * rng.choice([1, 2, 4, 8, 15]))
                clip = NO_SPEECH[kind](count, rng), NO_TEXT
            else:
                clip = FROM_CLIPS[kind](clips)
            yield kind, f"{kind.replace(' ', '-')}-{i:02d}", clip


# ---- decoding and the report


def write_clips(clips: Iterator[tuple[str, str, Clip]], folder: Path) -> list[dict]:
    """Write the audio; return kind, id, text, seconds and features of each input."""
    import soundfile
    import torch

    from speechllm.audio.fbank import fbank_extractor

    folder.mkdir(parents=True, exist_ok=True)
    fbank, found = fbank_extractor(), []
    for kind, name, (audio, text) in clips:
        path = folder / f"{name}.wav"
        soundfile.write(path, audio, SAMPLING_RATE, subtype="PCM_16")
        samples = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        features = fbank.extract(samples, SAMPLING_RATE)
        about = {"id": name, "kind": kind, "text": text, "seconds": len(audio) / SAMPLING_RATE}
        found.append({**about, "features": torch.as_tensor(features)})
    return found


def decode_all(found: list[dict], model, search: SearchConfig) -> None:
    """Add the CTC text and the result with each guard to each input; drop the features."""
    import torch

    has_ctc = model.recognizer(search).search.method != "greedy"
    recognizers = {
        guard: model.recognizer(replace(search, guard=guard))
        for guard in (GUARDS if has_ctc else GUARDS[:2])
    }
    for one in found:
        features = one.pop("features")
        batch = {"features": features[None], "feature_lens": torch.tensor([len(features)]),
                 "seconds": one["seconds"]}  # fmt: skip
        for guard, recognizer in recognizers.items():
            [(_, [recognition])] = recognizer([batch])
            ids = recognition.hypothesis.ids
            one["ctc_text"] = recognition.ctc_text
            one[guard] = {
                "text": recognition.text, "flags": recognition.flags,
                "source": recognition.source, "tokens": len(ids),
                "repetitive": is_repetitive(ids),
            }  # fmt: skip


def is_repetitive(ids: list[int]) -> bool:
    """Return whether fewer than half of the 4-grams are distinct."""
    ngrams = list(zip(*(ids[i:] for i in range(4))))
    return len(set(ngrams)) < len(ngrams) / 2


def print_table(found: list[dict], limit: int) -> None:
    """Print counts for each kind and guard."""
    print(f"{'kind':<26}{'guard':<10}{'n':>4}{'empty':>7}{'flagged':>9}{'at limit':>10}")
    for kind, group in groupby(found, key=itemgetter("kind")):
        own = list(group)
        for guard in GUARDS:
            results = [one[guard] for one in own if guard in one]
            empty = sum(not one["text"] for one in results)
            flagged = sum(bool(one["flags"]) for one in results)
            full = sum(one["tokens"] >= limit for one in results)
            print(f"{kind:<26}{guard:<10}{len(results):>4}{empty:>7}{flagged:>9}{full:>10}")


def failures(found: list[dict], limit: int) -> list[str]:
    """Return a line for each hallucination or repetition that a guard missed."""
    lines = []
    for one in found:
        for guard in GUARDS[1:]:
            if not (result := one.get(guard)):
                continue
            if one["kind"] in NO_SPEECH and result["text"] and not result["flags"]:
                lines.append(f"{one['id']}, --guard {guard}, hallucinated: {result['text']}")
            if result["tokens"] >= limit and result["repetitive"]:
                lines.append(f"{one['id']}, --guard {guard}, repeats: {result['text']}")
    return lines


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--cuts", type=Path, required=True, help="a cut file with audio and text")
    add("--each", type=int, default=6, help="inputs of each kind")
    add("--out", type=Path, required=True, help="folder for the inputs and the results")
    add("--seed", type=int, default=1)
    for config in (CheckpointConfig, SearchConfig, ModelConfig):
        add_options(parser, config, skip=("guard",))
    args = parser.parse_args(argv)
    from speechllm.data.manifests import read_cuts  # heavy imports come after the flags are read
    from speechllm.decoding.load import TrainedModel

    checkpoint, search = from_args(CheckpointConfig, args), from_args(SearchConfig, args)
    model = TrainedModel(model_config(args, checkpoint.exp_dir), checkpoint)
    clips = provocations(list(read_cuts(args.cuts)), args.each, args.seed)
    found = write_clips(clips, args.out / "wav")
    decode_all(found, model, search)
    with (args.out / "provocations.jsonl").open("w", encoding="utf-8") as file:
        for one in found:
            print(json.dumps(one, ensure_ascii=False), file=file)
    print_table(found, search.max_new_tokens)
    if lines := failures(found, search.max_new_tokens):
        raise SystemExit("\n".join(["", "The guard missed:", *lines]))


if __name__ == "__main__":
    main()

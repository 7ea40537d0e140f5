#!/usr/bin/env python3
"""Provoke repetitions and hallucinations in a trained model, and count them with every --guard.

    python tests/provoke.py --cuts data/fbank/demo_cuts_test.jsonl.gz --exp-dir exp/demo/llm_asr

Takes decode.py's flags for the model and the search. Inputs, --each of every kind, are generated
(noise, tones, silence) or made from the utterances of a cut file: cut off, joined, repeated or
followed by silence. The exit code is 1 if an input without speech gets a text without a flag, or if
a guarded hypothesis repeats itself up to the token limit.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
from benchmarks import measure  # noqa: F401, makes src/ and local/ importable
from make_spoken_corpus import SAMPLING_RATE, noise

from speechllm.cli import Parser, add_options, from_args
from speechllm.decoding.config import CheckpointConfig, SearchConfig
from speechllm.errors import exit_on_user_error
from speechllm.models.config import ModelConfig, model_config

GUARDS = ("off", "stop", "fallback")
SECONDS = (1, 2, 4, 8, 15)  # lengths of inputs without speech
NO_SPEECH = {  # number of samples, random generator -> samples
    "white noise": lambda count, rng: 0.1 * noise(count, False, rng),
    "pink noise": lambda count, rng: 0.1 * noise(count, True, rng),
    "digital silence": lambda count, rng: np.zeros(count),
    "tone": lambda count, rng: 0.1 * np.sin(np.arange(count) * rng.uniform(0.05, 0.5)),
}
SPEECH = {  # iterator of utterances -> samples
    "cut in the middle": lambda clips: np.array_split(next(clips), 2)[0],
    "two joined": lambda clips: np.concatenate([next(clips), next(clips)]),
    "before 10 s of silence": lambda clips: np.pad(next(clips), (0, 10 * SAMPLING_RATE)),
    "repeated 4 times": lambda clips: np.tile(next(clips), 4),
}


def provocations(cuts: list, each: int, seed: int) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Yield each kind with its inputs, samples (N,) at 16 kHz."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.array(cuts, dtype=object))
    clips = (cut.resample(SAMPLING_RATE).load_audio()[0] for cut in cycle(order))
    for kind, make in NO_SPEECH.items():
        yield kind, [make(SAMPLING_RATE * rng.choice(SECONDS), rng) for _ in range(each)]
    for kind, make in SPEECH.items():
        yield kind, [make(clips) for _ in range(each)]


def is_repetitive(ids: list[int]) -> bool:
    """Return whether fewer than half of the 4-grams are distinct."""
    ngrams = list(zip(*(ids[i:] for i in range(4))))
    return len(set(ngrams)) < len(ngrams) / 2


def count(kind: str, guard: str, found: list, limit: int) -> list[str]:
    """Print the counts of a kind and guard; return what the guard missed."""
    full = [one for one in found if len(one.hypothesis.ids) >= limit]
    empty, flagged = sum(not one.text for one in found), sum(bool(one.flags) for one in found)
    print(f"{kind:<26}{guard:<10}{len(found):>4}{empty:>7}{flagged:>9}{len(full):>10}")
    wrong = [one for one in full if is_repetitive(one.hypothesis.ids)]
    if kind in NO_SPEECH:
        wrong += [one for one in found if one.text and not one.flags]
    return [f"{kind}, --guard {guard}: {one.text}" for one in wrong if guard != "off"]


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--cuts", type=Path, required=True, help="a cut file with audio and text")
    add("--each", type=int, default=6, help="inputs of each kind")
    add("--seed", type=int, default=1)
    for config in (CheckpointConfig, SearchConfig, ModelConfig):
        add_options(parser, config, skip=("guard",))
    args = parser.parse_args(argv)
    import torch  # heavy imports come after the flags are read

    from speechllm.audio.fbank import fbank_extractor
    from speechllm.data.manifests import read_cuts
    from speechllm.decoding.load import TrainedModel

    checkpoint, search = from_args(CheckpointConfig, args), from_args(SearchConfig, args)
    model = TrainedModel(model_config(args, checkpoint.exp_dir), checkpoint)
    has_ctc = model.recognizer(search).search.method != "greedy"
    guards = GUARDS if has_ctc else GUARDS[:2]
    recognizers = {guard: model.recognizer(replace(search, guard=guard)) for guard in guards}
    fbank, missed = fbank_extractor(), []
    print(f"{'kind':<26}{'guard':<10}{'n':>4}{'empty':>7}{'flagged':>9}{'at limit':>10}")
    for kind, inputs in provocations(list(read_cuts(args.cuts)), args.each, args.seed):
        batches = []
        for samples in inputs:
            features = torch.as_tensor(fbank.extract(samples.astype(np.float32), SAMPLING_RATE))
            lens = torch.tensor([len(features)])
            batches.append({"features": features[None], "feature_lens": lens, "seconds": 1.0})
        for guard, recognizer in recognizers.items():
            found = [one for _, [one] in recognizer(batches)]
            missed += count(kind, guard, found, search.max_new_tokens)
    if missed:
        raise SystemExit("\n".join(["", "The guard missed:", *missed]))


if __name__ == "__main__":
    main()

"""Limits of batches, and the buckets they are drawn from."""

import random
import warnings

import pytest
import torch
from lhotse import CutSet, MonoCut, SupervisionSegment, load_manifest

from speechllm.data.length_limits import LLMPositions, TooManyPositions
from speechllm.data.sampler import BatchLimit, make_sampler, with_positions
from speechllm.data.validation import context_of
from speechllm.models.llm import load_llm
from speechllm.models.prompt import (
    build_chat_template,
    encode_contexts,
    encode_transcripts,
    training_ids,
)
from speechllm.models.speech_llm import expand_speech
from speechllm.models.zipformer.config import SIZES
from speechllm.models.zipformer.encoder import ZipformerEncoder


def cut_of(i: int, seconds: float, words: int = 5) -> MonoCut:
    """Return an utterance without audio: samplers need the manifest only."""
    text = " ".join(["word"] * words)
    supervision = SupervisionSegment(str(i), str(i), 0.0, seconds, text=text)
    return MonoCut(str(i), 0.0, seconds, 0, supervisions=[supervision])


def positions_of(cut) -> int:
    return round(cut.duration * 6) + len(cut.supervisions[0].text.split())


def corpus(size=2000, longest=20.0):
    """Return cuts of 1 to `longest` seconds; every hundredth has ten times as many words."""
    rng = random.Random(0)
    cuts = []
    for i in range(size):
        seconds = rng.uniform(1.0, longest)
        rate = rng.uniform(1.5, 3.5) * (10 if i % 100 == 0 else 1)
        cuts.append(cut_of(i, round(seconds, 2), max(1, round(seconds * rate))))
    return cuts


def batches_of(cuts, max_duration=100.0, max_batch_tokens=0, num_buckets=20, **options):
    limit = BatchLimit(max_duration, max_batch_tokens=max_batch_tokens)
    options = {"shuffle": True, "drop_last": False, "seed": 0, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lhotse prefers lazy cuts, these are few
        sampler = make_sampler(
            with_positions(CutSet.from_cuts(cuts), positions_of), limit,
            num_cuts=len(cuts), num_buckets=num_buckets, **options,
        )  # fmt: skip
        return [list(batch) for batch in sampler]


def ids_of(batches):
    return [[cut.id for cut in batch] for batch in batches]


def seconds_of(cut):
    return cut.duration


def padded(batch, length):
    return len(batch) * max(map(length, batch))


@pytest.mark.parametrize("num_buckets", [0, 2, 20])
@pytest.mark.parametrize("shuffle", [True, False])
def test_padded_batches_keep_both_limits(num_buckets, shuffle):
    batches = batches_of(corpus(), 100.0, 900, num_buckets, shuffle=shuffle)
    assert sorted(int(cut.id) for batch in batches for cut in batch) == list(range(2000))
    assert max(padded(batch, seconds_of) for batch in batches) <= 100.0
    assert max(padded(batch, positions_of) for batch in batches) <= 900


@pytest.mark.parametrize("num_buckets", [0, 4])
def test_cut_above_the_limit_is_a_batch_by_itself(num_buckets):
    cuts = [*corpus(100)[1:], cut_of(200, 5.0, 500)]
    batches = batches_of(cuts, 100.0, 400, num_buckets)
    assert ["200"] in ids_of(batches)
    rest = [batch for batch in batches if batch[0].id != "200"]
    assert max(padded(batch, positions_of) for batch in rest) <= 400


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("ds_rate", [4, 2])
@pytest.mark.parametrize("template", [(), ("write it", True), ("write it", False)])
def test_counted_positions_are_those_of_the_llm_input(
    tiny_corpus, tiny_llm_dir, encoder_size, n, ds_rate, template
):
    """Compared with encoder, prompt and merging."""
    _, tokenizer = load_llm(str(tiny_llm_dir))
    chat = build_chat_template(tokenizer, *template)
    encoder = ZipformerEncoder(SIZES[encoder_size]).eval()
    count = LLMPositions(tokenizer, chat, n, ds_rate)
    for cut in list(load_manifest(tiny_corpus / "tiny_cuts_train.jsonl.gz"))[:4]:
        cut.supervisions[0].text = "The Quick brown <speech> FOX"
        features = torch.from_numpy(cut.load_features())[None]
        with torch.no_grad():
            _, lens = encoder(features, torch.tensor([features.size(1)]))
        transcript = encode_transcripts(tokenizer, ["the quick brown <speech> fox"])
        contexts = encode_contexts(tokenizer, chat, [context_of(cut)])
        ids, labels = training_ids(chat, transcript, [n], contexts)
        counts = [[int(lens[0]) // ds_rate] * n]
        expanded, _, _ = expand_speech(ids, labels, counts, chat.speech, chat.pad)
        assert count(cut) == expanded.size(1) <= count.most(cut.duration)


def test_cuts_with_too_many_positions_or_a_wrong_context_are_errors(tiny_llm_dir):
    _, tokenizer = load_llm(str(tiny_llm_dir))
    count = LLMPositions(tokenizer, build_chat_template(tokenizer, use_context=True))
    cut = cut_of(1, 8.0)
    needed = count(cut)
    assert not TooManyPositions(count, needed)(cut)
    [error] = TooManyPositions(count, needed - 1)(cut)
    assert (error.reason, error.message) == (
        "positions",
        f"cut 1 of 8.0 s needs {needed} positions; the LLM has {needed - 1}",
    )
    [error] = TooManyPositions(count, needed, max_new_tokens=200)(cut)
    assert f"needs {count.before_text(8.0) + 200} positions" in error.message
    cut.supervisions[0].custom = {"context": 7}
    [error] = TooManyPositions(count, needed)(cut)
    assert error.reason == "malformed"

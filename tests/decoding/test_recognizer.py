"""The recognizer on small models: sources of a text, counts, and hearing ahead."""

import threading
from dataclasses import replace

import pytest
import sentencepiece
import torch
from naive import LENGTH, LENS

from speechllm.decoding.ctc_reader import CtcReader, Pieces
from speechllm.decoding.draft import verify_drafts
from speechllm.decoding.recognizer import Recognizer, one_ahead
from speechllm.decoding.search_options import SearchOptions
from speechllm.errors import InputError
from speechllm.llm import load_llm

PLAIN = SearchOptions(max_new_tokens=LENGTH, guard="off")


@pytest.fixture(scope="module")
def recognizer(model, tiny_llm_dir, tiny_encoder_dir):
    """A function from options to a recognizer, with a CTC head unless told otherwise."""
    _, tokenizer = load_llm(str(tiny_llm_dir))
    bpe = sentencepiece.SentencePieceProcessor(model_file=str(tiny_encoder_dir / "bpe.model"))
    reader = CtcReader(model, 0, Pieces(bpe))

    def make(reader=reader, **options):
        return Recognizer(
            model, tokenizer, reader, replace(PLAIN, **options), torch.device("cpu"), torch.float32
        )

    return make


@pytest.fixture(scope="module")
def batch(features):
    return {"features": features, "feature_lens": LENS, "seconds": LENS.sum().item() / 100}


def only(recognizer, batch):
    ((_, found),) = recognizer([batch])
    return found


def test_methods_agree(recognizer, batch, greedy):
    for method in ("greedy", "draft"):
        found = only(recognizer(method=method), batch)
        assert [one.hypothesis.ids for one in found] == greedy
        assert {one.source for one in found} == {"LLM"}
        assert [" ".join(word.word for word in one.words) for one in found] == [
            " ".join(one.text.split()) for one in found
        ]


@pytest.mark.parametrize("method", ["greedy", "draft", "beam"])
def test_contexts_of_different_lengths_in_a_batch(recognizer, model, batch, monkeypatch, method):
    """Each utterance is written as with its own context alone, and not as without."""
    contexts = ["the lazy dog one two three", "", "brown"]
    chat = replace(model.chat, instruction=(40, 41), use_context=True)
    recognizer = recognizer(method=method, beam_size=2 if method == "beam" else 1)
    without = only(recognizer, batch)
    monkeypatch.setattr(model, "chat", chat)
    together = only(recognizer, {**batch, "contexts": contexts})
    changed = 0
    for b, context in enumerate(contexts):
        lens = LENS[b : b + 1]
        alone = {"features": batch["features"][b : b + 1, :lens], "feature_lens": lens,
                 "seconds": 1.0, "contexts": [context]}  # fmt: skip
        (one,) = only(recognizer, alone)
        assert one.hypothesis.ids == together[b].hypothesis.ids
        changed += one.hypothesis.ids != without[b].hypothesis.ids
    assert changed


def test_what_ctc_is_sure_of_is_not_asked_of_the_llm(recognizer, batch):
    plain = only(recognizer(method="greedy"), batch)
    entropies = [reading.entropy for reading in recognizer().hear(batch).readings]
    between = sum(sorted(entropies)[:2]) / 2
    asking = recognizer(method="greedy", ctc_confident=between)
    found = only(asking, batch)
    for one, before, entropy in zip(found, plain, entropies, strict=True):
        if entropy < between:
            assert (one.source, one.text, one.hypothesis.passes) == ("CTC", one.ctc_text, 0)
        else:
            assert (one.source, one.text) == ("LLM", before.text)
    assert asking.stop_counting()["utterances taken from CTC"] == 1


def test_relaxed_acceptance_takes_probable_tokens_of_the_draft(model, features, greedy):
    """A wrong third token is taken up to the probability that the LLM gives it."""
    with torch.no_grad():
        embeds, mask, _ = model.prompt(features, LENS)
    drafts = [[*ids[:2], (ids[2] + 1) % 200, *ids[3:]] for ids in greedy]
    known = verify_drafts(model, embeds, mask, drafts, LENGTH + 1, accept=0.0)
    assert [h.ids[: len(draft)] for h, draft in zip(known, drafts)] == drafts
    for b, draft in enumerate(drafts):
        probability = torch.tensor(known[b].log_probs[2]).exp().item()
        for accept, third in ((0.99 * probability, draft[2]), (1.01 * probability, greedy[b][2])):
            found = verify_drafts(model, embeds, mask, drafts, LENGTH, accept)[b]
            assert found.ids[:2] == greedy[b][:2] and found.ids[2] == third


def test_counts(recognizer, batch):
    both = recognizer(method="draft")
    found = only(both, batch)
    counts = both.stop_counting()
    assert counts["LLM passes per utterance"] == sum(h.hypothesis.passes for h in found) / 3
    assert both.audio_seconds == pytest.approx(batch["seconds"])
    both.start_counting()
    assert both.stop_counting()["LLM passes per utterance"] == 0


@pytest.mark.parametrize(
    "options, flag",
    [
        ({"method": "draft"}, "--method draft"),
        ({"ctc_weight": 0.5}, "--ctc-weight"),
        ({"ctc_confident": 0.1}, "--ctc-confident"),
        ({"guard": "fallback"}, "--guard fallback"),
    ],
)
def test_what_needs_a_ctc_head_says_so(recognizer, options, flag):
    with pytest.raises(InputError, match=f"{flag}: no encoder has both"):
        recognizer(None, **options)


def test_one_ahead_makes_the_next_while_this_one_is_used():
    made = {n: threading.Event() for n in range(4)}

    def make(n):
        made[n].set()
        return 10 * n

    seen = []
    for n, value in one_ahead(make, range(4)):
        if n < 3:
            assert made[n + 1].wait(timeout=10)  # would hang, were it not made ahead
        if n < 2:
            assert not made[n + 2].is_set()
        seen.append((n, value))
    assert seen == [(n, 10 * n) for n in range(4)]


def test_one_ahead_passes_errors_on():
    with pytest.raises(ZeroDivisionError):
        list(one_ahead(lambda n: 1 // n, [1, 0]))

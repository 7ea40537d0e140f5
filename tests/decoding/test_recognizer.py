"""Recognizer on small models: methods, contexts, CTC bypass and counts."""

from dataclasses import replace

import pytest
from naive import LENS


@pytest.fixture(scope="module")
def batch(features):
    return {"features": features, "feature_lens": LENS, "seconds": LENS.sum().item() / 100}


def only(recognizer, batch):
    ((_, found),) = recognizer([batch])
    return found


def test_greedy_and_draft_agree(recognizer, batch, greedy):
    for method in ("greedy", "draft"):
        made = recognizer(method=method)
        found = only(made, batch)
        passes = made.stop_counting()["LLM forward passes per utterance"]
        assert passes == sum(one.hypothesis.passes for one in found) / 3
        assert made.audio_seconds == pytest.approx(batch["seconds"])
        assert [one.hypothesis.ids for one in found] == greedy
        assert {one.source for one in found} == {"LLM"}
        assert [" ".join(word.text for word in one.words) for one in found] == [
            " ".join(one.text.split()) for one in found
        ]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["greedy", "draft", "beam"])
def test_contexts_of_different_lengths_in_a_batch(recognizer, model, batch, monkeypatch, method):
    """Each utterance is decoded as alone with its context, and differently without."""
    contexts = ["the lazy dog one two three", "", "brown"]
    chat = replace(model.chat, instruction=(40, 41), use_context=True)
    recognizer = recognizer(method=method, beam_size=2 if method == "beam" else None)
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


def test_confident_ctc_texts_bypass_the_llm(recognizer, batch):
    plain = only(recognizer(method="greedy"), batch)
    entropies = [output.entropy for output in recognizer().encode(batch).ctc]
    between = sum(sorted(entropies)[:2]) / 2
    bypassing = recognizer(method="greedy", ctc_bypass_entropy=between)
    found = only(bypassing, batch)
    for one, before, entropy in zip(found, plain, entropies, strict=True):
        if entropy < between:
            assert (one.source, one.text, one.hypothesis.passes) == ("CTC", one.ctc_text, 0)
        else:
            assert (one.source, one.text) == ("LLM", before.text)
    assert bypassing.stop_counting()["utterances taken from CTC"] == 1

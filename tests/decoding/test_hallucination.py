"""Repetitions, flags, and decoding with a model that repeats itself."""

import math

import pytest
import torch
from naive import make_model

from speechllm.decoding.config import SearchConfig
from speechllm.decoding.ctc_decoder import ctc_outputs
from speechllm.decoding.hallucination import (
    MAX_PERIOD,
    find_repetition,
    hallucination_flags,
    spectral_variations,
)
from speechllm.decoding.recognizer import Recognizer
from speechllm.models.prompt import encode_transcripts

# ---- repetitions, with words instead of ids


def first_loop(text, ctc):
    """Return how many words there are when the repetition is found, and the kept ones."""
    words, ctc = text.split(), ctc and ctc.split()
    for n in range(len(words) + 1):
        keep = find_repetition(words[:n], ctc)
        if keep is not None:
            return n, " ".join(words[:keep])
    return None


@pytest.mark.parametrize("ctc_text", ["well yes", "", None])
@pytest.mark.parametrize("period", [1, 2, 5, 6, 7, 12, 13, MAX_PERIOD])
def test_a_loop_ends_after_one_copy(period, ctc_text):
    block = " ".join(f"w{i}" for i in range(period))
    found, kept = first_loop(f"well yes {block}" + f" {block}" * 200, ctc_text)
    assert kept == f"well yes {block}"
    least = 12 if ctc_text is not None else 24
    assert found == 2 + period + max(least, 2 * period)


@pytest.mark.parametrize(
    "ctc, kept",
    [
        ("so", "so it goes on"),
        ("so it goes on it goes on", "so it goes on it goes on"),
        ("so it goes only it goes on", "so it goes on"),  # not in a row
    ],
)
def test_copies_in_the_ctc_text_are_kept(ctc, kept):
    assert first_loop("so" + " it goes on" * 60, ctc)[1] == kept


@pytest.mark.parametrize(
    "text, ctc",
    [
        ("no " * 6, "no " * 6),
        ("one " * 20, "one wan " * 10),  # or predicts another word
        ("five five five one two one two one two one two", "five one"),
        ("let it be " * 8, None),
        (" ".join(f"page {n}" for n in range(100)), "page"),  # a number that changes
        ("", None),
    ],
)
def test_repetitions_of_people_are_not_loops(text, ctc):
    assert first_loop(text, ctc) is None


# ---- flags


@pytest.mark.parametrize(
    "flags, answer",
    [
        ([], {}),
        ([], {"ctc_text": None}),
        (["disagrees with CTC"], {"ctc_text": "the window is up"}),
        (["longer than CTC"], {"text": "a b c d e " * 9, "ctc_text": "a b c d e " * 6}),
        (["shorter than CTC"], {"text": "a b c d e " * 6, "ctc_text": "a b c d e " * 9}),
        (["faster than speech"], {"seconds": 0.5}),
        (["low probability"], {"log_probs": [-0.1, -0.2, -1.5]}),
        (["low probability"], {"log_probs": [math.nan]}),
        (["stationary sound"], {"variation": 0.8}),
        (
            ["disagrees with CTC", "longer than CTC", "faster than speech", "low probability"],
            {"seconds": 0.5, "ctc_text": "", "log_probs": [-2.0]},
        ),
    ],
)
def test_flags(flags, answer):
    fine = {
        "text": "turn on the light",
        "seconds": 4.0,
        "log_probs": [-0.1] * 5,
        "ctc_text": "turn on the light",
        "variation": 2.5,
    }
    assert hallucination_flags(**(fine | answer)) == flags


# ---- a model that repeats itself, by a table of bigrams

LIMIT = 60


class Bigrams(torch.nn.Module):
    """Replaces an LLM's head: the logits depend on the last token only."""

    def __init__(self, embeddings, logits):
        super().__init__()
        self.embeddings, self.logits = embeddings, logits

    def forward(self, hidden):
        distances = torch.cdist(hidden.reshape(-1, hidden.size(-1)), self.embeddings)
        return self.logits[distances.argmin(dim=1)].view(*hidden.shape[:-1], -1)


@pytest.fixture
def bigram_llm(tiny_llm_dir, tiny_encoder_dir, encoder_size, tiny_tokenizer):
    """Build a model from {token: {next token: logit}}; the prompt's end is \"\"."""

    def make(table):
        model = make_model(tiny_llm_dir, tiny_encoder_dir, encoder_size, 1)
        embeddings = model.llm.get_input_embeddings().weight.detach()
        ids = {"": model.chat.after[-1], "end": model.chat.end}
        ids |= zip("abc", sum(encode_transcripts(tiny_tokenizer, ["a", "b", "c"]), []))
        logits = torch.zeros(len(embeddings), len(embeddings))
        for token, following in table.items():
            for other, logit in following.items():
                logits[ids[token], ids[other]] = logit
        llm = model.llm.get_base_model()
        llm.lm_head = Bigrams(embeddings, logits)
        llm.get_decoder().register_forward_hook(return_embeddings, with_kwargs=True)
        return model

    return make


def return_embeddings(decoder, _args, kwargs, output):
    embeds = kwargs["inputs_embeds"]
    if embeds is None:
        embeds = decoder.embed_tokens(kwargs["input_ids"])
    output.last_hidden_state = embeds
    return output


LOOP = {"": {"a": 20}, "a": {"b": 20}, "b": {"c": 20}, "c": {"b": 20}}  # abcbcbc…
TEMPTED = LOOP | {"c": {"b": 20, "end": 19.9}}  # greedy search continues, beam search ends


@pytest.fixture
def recognize(bigram_llm, pieces, tiny_tokenizer, features):
    """Recognize an utterance with a table, a CTC text or None, and search options."""

    def make(table, ctc_text, contrast=1.0, **options):
        search = SearchConfig(**{"max_new_tokens": LIMIT, "method": "greedy"} | options)
        decoder = None if ctc_text is None else FixedCtc(ctc_text, pieces)
        search = search.resolve(ctc_text is not None)
        models = bigram_llm(table), tiny_tokenizer, decoder
        recognizer = Recognizer(*models, search, torch.device("cpu"), torch.float32)
        batch = {"features": contrast * features[:1], "feature_lens": torch.tensor([160]),
                 "seconds": 1.6}  # fmt: skip
        ((_, (recognition,)),) = recognizer([batch])
        flagged = recognizer.stop_counting().get("utterances flagged by the guard", 0)
        assert flagged == bool(recognition.flags)
        return recognition

    return make


class FixedCtc:
    """Replaces a CtcDecoder: always outputs one text, with one spike per piece."""

    encoder = 0

    def __init__(self, text, pieces):
        ids = [i for piece in pieces.encode(text) for i in (piece, 0)] or [0]
        log_probs = torch.full((len(ids), pieces.bpe.vocab_size()), -12.0)
        log_probs[range(len(ids)), ids] = 0.0
        log_probs, lens = log_probs.log_softmax(dim=1)[None], torch.tensor([len(ids)])
        (self.output,), self.tokenizer = ctc_outputs(log_probs, lens, pieces), pieces

    def __call__(self, encoder_out, lens):
        return [self.output]


METHODS = [{"method": "greedy"}, {"method": "draft"}, {"method": "beam", "beam_size": 3}]


@pytest.mark.slow
@pytest.mark.parametrize("search", METHODS)
def test_without_guard_the_loop_reaches_the_limit(recognize, search):
    answer = recognize(LOOP, "abc", guard="off", **search)
    assert answer.text == "a" + "bc" * 29 + "b" and answer.flags == []
    assert len(answer.hypothesis.ids) == LIMIT


@pytest.mark.parametrize("search", METHODS[:2])
@pytest.mark.parametrize("ctc_text", ["", "abc", "abcbcbcbc"])
def test_as_many_copies_are_kept_as_in_the_ctc_text(recognize, search, ctc_text):
    answer = recognize(LOOP, ctc_text, **search)
    assert answer.text == max("abc", ctc_text, key=len)
    assert answer.flags[0] == "repetition" and answer.source == "LLM"
    assert answer.hypothesis.passes < LIMIT / 2
    assert len(answer.hypothesis.log_probs) == len(answer.hypothesis.ids)
    assert [word.text for word in answer.words] == answer.text.split()


@pytest.mark.slow
@pytest.mark.parametrize("ctc_weight", [0.0, 0.3])
@pytest.mark.parametrize("end", [19.9, 18.0])
def test_beam_search_returns_no_loop(recognize, end, ctc_weight):
    """With the cheaper continuation, the longest one without a repetition is most probable."""
    table = LOOP | {"c": {"b": 20, "end": end}}
    search = {"method": "beam", "beam_size": 4, "nbest": 4, "ctc_weight": ctc_weight}
    answer = recognize(table, "abc", **search)
    assert "repetition" not in answer.flags and len(answer.nbest) == 4
    assert all(len(one.text) <= 2 + 12 + 1 for one in answer.nbest)
    unguarded = recognize(table, "abc", guard="off", **search)
    assert max(len(one.text) for one in unguarded.nbest) == (LIMIT if end < 19 else 9)


def test_beam_search_cuts_the_loop_if_there_is_nothing_else(recognize):
    answer = recognize(LOOP, "abc", method="beam", beam_size=4, nbest=4)
    assert answer.text == "abc" and answer.flags == ["repetition"] and len(answer.nbest) == 1
    assert answer.hypothesis.passes < LIMIT / 2


def test_fallback_uses_beam_search(recognize):
    answer = recognize(TEMPTED, "abc", guard="fallback")
    assert (answer.text, answer.source, answer.replaced_text) == ("abc", "LLM", "abc")
    assert answer.flags == ["repetition"]


def test_fallback_uses_the_ctc_text_if_beam_search_is_flagged(recognize):
    answer = recognize(LOOP, "caca", guard="fallback")
    assert (answer.text, answer.source, answer.replaced_text) == ("caca", "CTC", "abc")
    assert answer.flags[0] == "repetition"


def test_fallback_works_with_relaxed_acceptance_of_drafts(recognize):
    options = {"guard": "fallback", "method": "draft", "draft_accept_prob": 0.5}
    answer = recognize(LOOP, "caca", **options)
    assert (answer.text, answer.source) == ("caca", "CTC")


def test_spectral_variation_is_the_deviation_over_time_without_padding():
    torch.manual_seed(0)
    features, lens = 3 + 2 * torch.randn(3, 400, 80), torch.tensor([400, 201, 30])
    features[2, :30] = 5.0  # stationary
    for row, n in zip(features, lens):
        row[n:] = -15.9
    found = spectral_variations(features, lens)
    assert found == [pytest.approx(x, abs=0.1) for x in (2.0, 2.0, 0.0)]
    for b, n in enumerate(lens):
        alone = spectral_variations(features[b : b + 1, :n], lens[b : b + 1])
        assert alone == [pytest.approx(found[b], abs=1e-5)]


@pytest.mark.slow
@pytest.mark.parametrize("ctc_text", ["abc", None])
def test_text_of_a_stationary_sound_is_flagged(recognize, ctc_text):
    table = LOOP | {"c": {"end": 20}}
    assert recognize(table, ctc_text).flags == []
    assert recognize(table, ctc_text, contrast=0.5).flags == ["stationary sound"]
    assert recognize(table, ctc_text, contrast=0.5, guard="off").flags == []
    if ctc_text:
        taken = recognize(LOOP, ctc_text, contrast=0.5, ctc_bypass_entropy=1.0)
        assert (taken.source, taken.flags) == ("CTC", ["stationary sound"])

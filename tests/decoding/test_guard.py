"""What is a loop and what is not, what is doubted, and what becomes of a model that loops."""

import math

import pytest
import torch
from naive import make_model
from sentencepiece import SentencePieceProcessor

from speechllm.decoding.ctc_reader import CtcReading, Pieces
from speechllm.decoding.guard import LONGEST_PERIOD, doubts, find_loop, variation
from speechllm.decoding.recognizer import Recognizer
from speechllm.decoding.search_options import SearchOptions
from speechllm.prompt import encode_transcripts

# ---- loops; words take the place of ids


def first_loop(said, heard):
    """(how many words are written when the loop is found, what is kept of them)."""
    words, heard = said.split(), heard and heard.split()
    for n in range(len(words) + 1):
        keep = find_loop(words[:n], heard)
        if keep is not None:
            return n, " ".join(words[:keep])
    return None


@pytest.mark.parametrize("heard", ["well yes", "", None])
@pytest.mark.parametrize("period", range(1, LONGEST_PERIOD + 1))
def test_a_loop_is_ended_after_a_right_beginning(period, heard):
    block = " ".join(f"w{i}" for i in range(period))
    found, kept = first_loop(f"well yes {block}" + f" {block}" * 200, heard)
    assert kept == f"well yes {block}"
    least = 12 if heard is not None else 24
    assert found == 2 + period + max(least, 2 * period)


@pytest.mark.parametrize(
    "heard, kept",
    [
        ("so", "so it goes on"),
        ("so it goes on", "so it goes on"),
        ("so it goes on it goes on", "so it goes on it goes on"),
        ("so it goes on it goes", "so it goes on it goes"),
        ("it goes on it goes on it goes on", "so it goes on it goes on it goes on"),
        ("so it goes only it goes on", "so it goes on"),  # not in a row
    ],
)
def test_what_ctc_heard_is_kept(heard, kept):
    assert first_loop("so" + " it goes on" * 60, heard)[1] == kept


def test_what_is_kept_does_not_depend_on_when_the_loop_is_found():
    said = ("so" + " it goes on" * 60).split()
    assert {find_loop(said[:n], ["so"]) for n in range(16, 181)} == {4}
    assert {find_loop(said[:n], None) for n in range(28, 181)} == {4}


def test_a_loop_is_ended_although_ctc_heard_as_much_of_something_else():
    noise = " ".join(f"n{i % 7}{i}" for i in range(100))
    assert first_loop("so" + " it goes on" * 60, noise) == (28, "so it goes on")


@pytest.mark.parametrize(
    "said, heard",
    [
        ("no " * 6, "no " * 6),
        ("no " * 6, "no"),
        ("no " * 6, None),
        ("one " * 60, "one " * 60),
        ("one " * 60, "one " * 50),  # CTC drops some
        ("one " * 20, "one wan " * 10),  # or hears another word
        ("five five five one two one two one two one two", "five one"),
        ("zero zero zero zero zero zero zero zero zero zero", None),
        ("m i s s i s s i p p i", "m i s i p i"),
        ("w w w w w w dot a a a a a a dot c o m", None),
        ("let it be " * 8, "let it be " * 8),
        ("let it be " * 8, None),
        (" ".join(f"page {n}" for n in range(100)), "page"),  # a number that changes
        (" ".join(f"page {n}" for n in range(100)), None),
        ("so it goes on " * 3, "so it goes on " * 3),
        ("", "anything"),
        ("", None),
    ],
)
def test_no_loop(said, heard):
    assert first_loop(said, heard) is None


# ---- doubts


@pytest.mark.parametrize(
    "reasons, answer",
    [
        ([], {}),
        ([], {"text": "Turn on, the LIGHT!"}),
        ([], {"text": "turn on light"}),
        ([], {"ctc_text": "turnon the ligh"}),
        ([], {"ctc_text": None}),
        (["disagrees with CTC"], {"ctc_text": "the window is up"}),
        (["disagrees with CTC"], {"text": "e", "ctc_text": ""}),
        (["disagrees with CTC"], {"text": "", "ctc_text": "turn"}),
        ([], {"text": "", "ctc_text": ""}),
        (["longer than CTC"], {"text": "a b c d e " * 9, "ctc_text": "a b c d e " * 6}),
        (["shorter than CTC"], {"text": "a b c d e " * 6, "ctc_text": "a b c d e " * 9}),
        ([], {"text": "a b c d e " * 7, "ctc_text": "a b c d e " * 6}),
        (["faster than speech"], {"seconds": 0.5}),
        (["improbable"], {"log_probs": [-0.1, -0.2, -1.5]}),
        ([], {"log_probs": [-0.1, -0.2, -1.1]}),
        ([], {"log_probs": []}),
        (["steady sound"], {"variation": 0.8}),
        ([], {"variation": 0.8, "text": "", "ctc_text": ""}),
        (
            ["disagrees with CTC", "longer than CTC", "faster than speech", "improbable"],
            {"seconds": 0.5, "ctc_text": "", "log_probs": [-2.0]},
        ),
    ],
)
def test_doubts(reasons, answer):
    fine = {
        "text": "turn on the light",
        "seconds": 4.0,
        "log_probs": [-0.1] * 5,
        "ctc_text": "turn on the light",
        "variation": 2.5,
    }
    assert doubts(**(fine | answer)) == reasons


def test_variation_is_over_time():
    steady = torch.linspace(-5, 5, 80).repeat(50, 1)
    assert variation(steady) == 0
    changing = torch.tensor([1.0, -1.0]).repeat(25)[:, None] * torch.ones(80)
    assert variation(steady + 3 * changing) == pytest.approx(3)
    assert variation(steady[:1]) == 0


# ---- a model that loops: by a table, whatever it hears

LIMIT = 60


class Bigrams(torch.nn.Module):
    """In place of an LLM's head: logits by the last token alone."""

    def __init__(self, embeddings, logits):
        super().__init__()
        self.embeddings, self.logits = embeddings, logits

    def forward(self, hidden):
        distances = torch.cdist(hidden.reshape(-1, hidden.size(-1)), self.embeddings)
        return self.logits[distances.argmin(dim=1)].view(*hidden.shape[:-1], -1)


@pytest.fixture
def llm_that_writes(tiny_llm_dir, tiny_encoder_dir, encoder_size, tiny_tokenizer):
    """Makes a model of {token: {next token: logit}}, which has the prompt's end as \"\"."""

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
        llm.get_decoder().register_forward_hook(leave_the_embeddings, with_kwargs=True)
        return model

    return make


def leave_the_embeddings(decoder, _args, kwargs, output):
    embeds = kwargs["inputs_embeds"]
    if embeds is None:
        embeds = decoder.embed_tokens(kwargs["input_ids"])
    output.last_hidden_state = embeds
    return output


LOOP = {"": {"a": 20}, "a": {"b": 20}, "b": {"c": 20}, "c": {"b": 20}}  # abcbcbc…
TEMPTED = LOOP | {"c": {"b": 20, "end": 19.9}}  # greedy search goes on, beam search does not


@pytest.fixture
def pieces(tiny_encoder_dir):
    return Pieces(SentencePieceProcessor(model_file=str(tiny_encoder_dir / "bpe.model")))


@pytest.fixture
def recognize(llm_that_writes, pieces, tiny_tokenizer, features):
    """Makes a table, a CTC text or None, and options to the recognition of one utterance."""

    def make(table, heard, contrast=1.0, **options):
        options = SearchOptions(**{"max_new_tokens": LIMIT, "method": "greedy"} | options)
        reader = None if heard is None else lambda _: [reading(heard, pieces)]
        recognizer = Recognizer(
            llm_that_writes(table),
            tiny_tokenizer,
            reader,
            options,
            torch.device("cpu"),
            torch.float32,
        )
        batch = {
            "features": contrast * features[:1],
            "feature_lens": torch.tensor([160]),
            "seconds": 1.6,
        }
        ((_, (recognition,)),) = recognizer([batch])
        flagged = recognizer.stop_counting().get("utterances flagged by the guard", 0)
        assert flagged == bool(recognition.reasons)
        return recognition

    return make


def reading(text, pieces):
    """Of a CTC head that is sure."""
    ids = [i for piece in pieces.encode(text) for i in (piece, 0)] or [0]
    log_probs = torch.full((len(ids), pieces.bpe.vocab_size()), -12.0)
    log_probs[range(len(ids)), ids] = 0.0
    return CtcReading(log_probs.log_softmax(dim=1), pieces)


METHODS = [{"method": "greedy"}, {"method": "draft"}, {"method": "beam", "beam_size": 3}]


@pytest.mark.parametrize("search", METHODS)
def test_without_a_guard_it_loops_to_the_limit(recognize, search):
    answer = recognize(LOOP, "abc", guard="off", **search)
    assert answer.text == "a" + "bc" * 29 + "b" and answer.reasons == []
    assert len(answer.hypothesis.ids) == LIMIT


@pytest.mark.parametrize("search", METHODS[:2])
@pytest.mark.parametrize("heard", ["", "a", "abc", "abcbcb", "abcbcbcbc"])
def test_as_many_copies_are_kept_as_ctc_heard(recognize, search, heard):
    answer = recognize(LOOP, heard, **search)
    assert answer.text == max("abc", heard, key=len)
    assert answer.reasons[0] == "loop" and answer.source == "LLM"
    assert answer.hypothesis.passes < LIMIT / 2
    assert len(answer.hypothesis.log_probs) == len(answer.hypothesis.ids)
    assert [word.word for word in answer.words] == answer.text.split()


def test_a_loop_is_ended_without_ctc(recognize):
    answer = recognize(LOOP, None)
    assert answer.text == "abc" and answer.reasons == ["loop"]
    assert answer.hypothesis.passes == 1 + 2 + 24


def test_what_ctc_heard_too_is_no_loop(recognize):
    heard = "a" + "bc" * 29 + "b"
    answer = recognize(LOOP, heard, method="draft")
    assert answer.text == heard and "loop" not in answer.reasons


@pytest.mark.parametrize("ctc_weight", [0.0, 0.3])
@pytest.mark.parametrize("end", [19.9, 18.0])
def test_beam_search_returns_no_loop(recognize, end, ctc_weight):
    """With the lower price of going on, the longest hypothesis without a loop is most probable."""
    table = LOOP | {"c": {"b": 20, "end": end}}
    search = {"method": "beam", "beam_size": 4, "nbest": 4, "ctc_weight": ctc_weight}
    answer = recognize(table, "abc", **search)
    assert "loop" not in answer.reasons and len(answer.nbest) == 4
    assert all(len(one.text) <= 2 + 12 + 1 for one in answer.nbest)
    unguarded = recognize(table, "abc", guard="off", **search)
    assert max(len(one.text) for one in unguarded.nbest) == (LIMIT if end < 19 else 9)


def test_beam_search_ends_where_there_is_nothing_but_a_loop(recognize):
    answer = recognize(LOOP, "abc", method="beam", beam_size=4, nbest=4)
    assert answer.text == "abc" and answer.reasons == ["loop"] and len(answer.nbest) == 1
    assert answer.hypothesis.passes < LIMIT / 2


def test_fallback_takes_what_beam_search_finds(recognize):
    answer = recognize(TEMPTED, "abc", guard="fallback")
    assert (answer.text, answer.source, answer.replaced) == ("abc", "LLM", "abc")
    assert answer.reasons == ["loop"]


def test_fallback_takes_the_ctc_text_where_beam_search_finds_nothing_better(recognize):
    answer = recognize(LOOP, "caca", guard="fallback")
    assert (answer.text, answer.source, answer.replaced) == ("caca", "CTC", "abc")
    assert answer.reasons[0] == "loop"


def test_fallback_leaves_what_is_not_doubted(recognize):
    table = LOOP | {"c": {"end": 20}}
    with_it, without = (recognize(table, "abc", guard=guard) for guard in ("fallback", "off"))
    assert with_it.text == without.text == "abc"
    assert with_it.reasons == [] and with_it.replaced is None
    assert with_it.hypothesis.passes == without.hypothesis.passes


@pytest.mark.parametrize("guard", ["stop", "fallback"])
def test_of_what_ctc_does_not_hear_nothing_is_said_without_a_flag(recognize, guard):
    answer = recognize(LOOP | {"c": {"end": 20}}, "", guard=guard)
    assert answer.reasons == ["disagrees with CTC"]
    assert answer.text == ("abc" if guard == "stop" else "")


@pytest.mark.parametrize("heard", ["abc", None])
def test_what_is_said_of_a_steady_sound_is_flagged(recognize, heard):
    table = LOOP | {"c": {"end": 20}}
    assert recognize(table, heard).reasons == []
    assert recognize(table, heard, contrast=0.5).reasons == ["steady sound"]
    assert recognize(table, heard, contrast=0.5, guard="off").reasons == []


def test_what_is_taken_from_ctc_is_doubted_too(recognize):
    taken = {"heard": "abc", "ctc_confident": 1.0}
    assert recognize(LOOP, **taken).reasons == []
    answer = recognize(LOOP, **taken, contrast=0.5)
    assert (answer.source, answer.reasons) == ("CTC", ["steady sound"])


def test_what_is_not_a_number_is_flagged():
    assert doubts("a b", 1.0, [math.nan, math.nan], "a b", 2.0) == ["improbable"]

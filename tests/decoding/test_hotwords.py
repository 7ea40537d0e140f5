"""Hotwords: prefix tree, CTC word spotting, correction of hypotheses, and the recognizer."""

import pytest
import sentencepiece
import torch
from naive import LENGTH, LENS

from speechllm.decoding.beam import beam_search
from speechllm.decoding.correction import Correction, correct
from speechllm.decoding.ctc_decoder import BpeTokenizer, ctc_outputs
from speechllm.decoding.hotwords import (
    IMPOSSIBLE,
    Hotwords,
    _spot,
    read_hotwords,
    spot_hotwords,
)
from speechllm.decoding.hypothesis import Hypothesis
from speechllm.decoding.prefix_tree import PrefixTree
from speechllm.decoding.word_times import ctc_best_paths
from speechllm.errors import InputError
from speechllm.training.ctc_training import train_bpe

TREE = PrefixTree([[1, 2], [1, 2, 3], [4]], bonus=2.0)


@pytest.mark.parametrize(
    "ids, score",
    [
        ([], 0), ([1], 0), ([1, 5], 0), ([1, 2], 4), ([1, 2, 3], 6), ([1, 2, 5], 4), ([1, 2, 4], 6),
        ([1, 1, 2], 4), ([5, 4, 4], 4), ([2, 3], 0),
    ],
)  # fmt: skip
def test_only_complete_phrases_keep_their_bonus(ids, score):
    assert TREE.score(ids) == score
    added = 0.0
    for position, token in enumerate([*ids, 9]):  # 9 ends every match
        tokens, other = TREE.next_scores(ids[:position])
        added += tokens.get(token, other)
    assert added == score


@pytest.mark.parametrize("bonus", [0.0, 50.0])
def test_beam_search_adds_the_bonus(model, features, bonus):
    with torch.no_grad():
        embeds, mask, _ = model.prompt(features, LENS)
        plain = beam_search(model, embeds, mask, 2, LENGTH)
        trees = [PrefixTree([[40, 41]], bonus), None, None]
        found = beam_search(model, embeds, mask, 2, LENGTH, trees=trees)
    ids = [[one.ids for one in nbest] for nbest in found]
    assert ids[1:] == [[one.ids for one in nbest] for nbest in plain[1:]]
    assert (ids[0] == [one.ids for one in plain[0]]) == (bonus == 0)
    if bonus:
        assert ids[0][0][:2] == [40, 41] and found[0][0].bonus >= 2 * bonus


# ---- spotting


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A BPE model of the words one, two, three."""
    path = tmp_path_factory.mktemp("bpe") / "bpe.model"
    path.write_bytes(train_bpe(["ONE TWO THREE", "TWO ONE", "THREE THREE TWO", "ONE"], 20))
    return BpeTokenizer(sentencepiece.SentencePieceProcessor(model_file=str(path)))


def output(bpe, words, others=(), share=0.0):
    """Posteriors of words with blanks between them; `others` get a share in the same frames."""
    size, rows = bpe.bpe.vocab_size(), []
    for word, other in zip(words, others or words, strict=True):
        pieces, alternatives = bpe.encode(word), bpe.encode(other)
        width = max(len(pieces), len(alternatives))
        for i in range(width):
            probs = torch.full((size,), 1e-6)
            probs[pieces[i] if i < len(pieces) else 0] += 1 - share
            probs[alternatives[i] if i < len(alternatives) else 0] += share
            blank = torch.full((size,), 1e-6)
            blank[0] = 1.0
            rows += [probs, blank]
    probs = torch.stack(rows)
    log_probs = (probs / probs.sum(dim=1, keepdim=True)).log()
    return ctc_outputs(log_probs[None], torch.tensor([len(rows)]), bpe)[0]


def test_spotted_phrases_were_possible(bpe, tokenizer):
    hotwords = Hotwords(["two", "three", "one three"], tokenizer, bpe)
    outputs = [output(bpe, ["one", "two"]), output(bpe, ["two"]), output(bpe, ["one"])]
    found = spot_hotwords(outputs, [hotwords, None, hotwords])
    assert [[one.hotword.text for one in spotted] for spotted in found] == [["two"], [], []]
    likely = output(bpe, ["one", "two"], ["one", "three"], share=0.3)
    (spotted,) = spot_hotwords([likely], [hotwords])
    assert {one.hotword.text for one in spotted} == {"two", "three", "one three"}
    starts = {one.hotword.text: one.start for one in spotted}
    assert starts["one three"] < starts["three"] == starts["two"]


def test_spotting_equals_the_best_path_in_any_window():
    torch.manual_seed(0)
    log_probs = torch.randn(2, 9, 4).mul(3).log_softmax(dim=2)
    ratios = log_probs - log_probs.max(dim=2, keepdim=True).values
    ratios[1, 6:] = IMPOSSIBLE
    phrases = [[1], [2, 2], [1, 2, 3], [3, 1, 1]]
    pieces = torch.tensor([ids + [-1] * (3 - len(ids)) for ids in phrases]).repeat(2, 1)
    lens = torch.tensor(list(map(len, phrases))).repeat(2)
    utterances = torch.tensor([0] * 4 + [1] * 4)
    scores, starts, ends = _spot(ratios, utterances, pieces, lens)

    def score(window, ids):
        [path] = ctc_best_paths([window.numpy()], [ids])
        return sum(float(row[ids[k] if k >= 0 else 0]) for row, k in zip(window, path))

    for row, (b, frames) in enumerate([(0, 9)] * 4 + [(1, 6)] * 4):
        ids = phrases[row % 4]
        windows = [(i, j) for i in range(frames) for j in range(i + 1, frames + 1)]
        needed = len(ids) + sum(a == c for a, c in zip(ids, ids[1:]))
        best = max(score(ratios[b, i:j], ids) for i, j in windows if j - i >= needed)
        assert float(scores[row]) == pytest.approx(best, abs=1e-4)
        inside = ratios[b, starts[row] : ends[row] + 1]
        assert score(inside, ids) == pytest.approx(best, abs=1e-4)


# ---- correction


def corrected(tokenizer, ctc, text, phrases, score, costs):
    """Return the text that a hypothesis becomes; `costs` are the LLM's for each text."""
    (spotted,) = spot_hotwords([ctc], [Hotwords(phrases, tokenizer, ctc.tokenizer)])
    tree = PrefixTree((ids for one in spotted for ids in one.hotword.tokens), score)

    def made(text):
        ids = tokenizer.encode(text, add_special_tokens=False)
        return Hypothesis(ids, [-float(costs.get(text, 0))], text=text)

    one = Correction(made(text), ctc, spotted, tree)
    correct([one], lambda rows, texts: list(map(made, texts)))
    return one.hypothesis.text


@pytest.mark.parametrize(
    "text, phrases, cost, expected",
    [
        ("one two", ["three"], 0, "one three"),  # the CTC head prefers two by 0.8 nats
        ("one two", ["three"], 90, "one two"),
        ("one two", ["one three"], 0, "one three"),
        ("one two", ["two one"], 0, "one two"),  # not spoken
        ("one two", ["two", "three"], 0, "one two"),  # both have the bonus
        ("one", ["two"], 0, "one two"),
        ("two", ["one", "two"], 0, "one two"),
        ("", ["one"], 0, "one"),
    ],
)
def test_a_phrase_replaces_the_words_at_its_time(bpe, tokenizer, text, phrases, cost, expected):
    ctc = output(bpe, ["one", "two"], ["one", "three"], share=0.3)
    costs = {"one three": cost}
    assert corrected(tokenizer, ctc, text, phrases, 9.0, costs) == expected


def test_without_a_bonus_only_the_scores_count(bpe, tokenizer):
    ctc = output(bpe, ["one", "two"], ["one", "three"], share=0.3)
    for text, expected in (("one two", "one two"), ("one three", "one two")):
        assert corrected(tokenizer, ctc, text, ["two", "three"], 0.0, {}) == expected


# ---- recognizer and input


def texts(recognizer, features, **entries):
    batch = {"features": features, "feature_lens": LENS, "seconds": 1.0, **entries}
    ((_, found),) = recognizer([batch])
    return [one.text for one in found]


@pytest.mark.slow
def test_hotwords_with_and_without_drafts(recognizer, features):
    options = dict(hotword=("C  a b",), hotword_score=200.0)
    greedy = texts(recognizer(method="greedy", **options), features)
    plain = texts(recognizer(method="greedy"), features)
    assert greedy == texts(recognizer(method="draft", **options), features) != plain
    assert all("c a b" in text for text in greedy)
    override = recognizer(method="greedy", **options)
    lists = [None, override.tokenize_hotwords(["b b"]), None]
    changed = texts(override, features, hotwords=lists)
    assert [changed[0], changed[2]] == [greedy[0], greedy[2]] and "b b" in changed[1]


def test_without_a_ctc_head_the_beam_uses_all_hotwords(recognizer, features):
    found = recognizer(ctc_decoder=None, hotword=("c a b",), hotword_score=50.0)
    assert found.search.method == "beam"
    assert all("c a b" in text for text in texts(found, features))
    with pytest.raises(InputError, match="hotwords without --method beam"):
        recognizer(ctc_decoder=None, method="greedy", hotword=("c a b",))


@pytest.mark.parametrize("phrase", ["", "  ", "7"])
def test_a_phrase_without_tokens_is_refused(recognizer, phrase):
    with pytest.raises(InputError, match=f"hotword '{phrase.strip()}' cannot be tokenized"):
        recognizer(hotword=("a", phrase))


@pytest.mark.parametrize(
    "content, message", [(b"", "no phrases"), (b" \n", "no phrases"), (b"\xff", "not UTF-8")]
)
def test_a_file_without_phrases_is_refused(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=f"a.txt.*{message}"):
        read_hotwords(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match="b.txt does not exist"):
        read_hotwords(tmp_path / "b.txt")

"""A test set through a recognizer that says what it heard."""

import pytest
from lhotse import CutSet, load_manifest

from speechllm.decoding.test_set import decode_cuts, results, set_name

OPTIONS = {"max_duration": 100.0, "num_workers": 0}


@pytest.fixture
def echo():
    """Answers each batch with the reference in capitals and an exclamation mark."""

    def recognize(batches):
        for batch in batches:
            recognize.batches.append(batch["ids"])
            yield batch, [text.upper() + "!" for text in batch["texts"]]

    recognize.batches = []
    return recognize


@pytest.fixture
def cuts(tiny_corpus):
    return list(load_manifest(tiny_corpus / "tiny_cuts_dev.jsonl.gz"))


def write(cuts, tmp_path):
    path = tmp_path / "tiny_cuts_test-x.jsonl.gz"
    CutSet.from_cuts(cuts).to_file(path)
    return path


def decode(path, recognize, normalize="none", **options):
    decoded = decode_cuts(path, recognize, **OPTIONS | options)
    return results(decoded, [one.answer or "" for one in decoded], normalize)


def shortened(cut, seconds):
    cut = cut.truncate(duration=seconds).with_id(f"{cut.id}-short")
    cut.supervisions[0].duration = seconds
    return cut


def test_every_cut_once_in_lower_case(cuts, echo, tmp_path):
    cuts[0].supervisions[0].text = "Four SEVEN"
    found = decode(write(cuts, tmp_path), echo)
    words = {cut.id: cut.supervisions[0].text.lower().split() for cut in cuts}
    assert sorted(found) == sorted((i, w, [*w[:-1], w[-1] + "!"]) for i, w in words.items())
    assert len(found) == len(cuts) == 5


@pytest.mark.parametrize("max_duration, batches", [(1.0, 5), (100.0, 1)])
def test_max_duration_makes_batches(cuts, echo, tmp_path, max_duration, batches):
    decode(write(cuts, tmp_path), echo, max_duration=max_duration)
    assert len(echo.batches) == batches


def test_a_cut_too_short_to_hear_stays_with_an_empty_hypothesis(cuts, echo, tmp_path, caplog):
    short, long = shortened(cuts[1], 0.20), shortened(cuts[2], 0.21)
    path = write([cuts[0], short, long], tmp_path)
    found = {i: (reference, hypothesis) for i, reference, hypothesis in decode(path, echo)}
    assert set(found) == {cuts[0].id, short.id, long.id}
    assert found[short.id] == (cuts[1].supervisions[0].text.split(), [])
    assert found[long.id][1]
    assert sorted(i for ids in echo.batches for i in ids) == sorted([cuts[0].id, long.id])
    assert "1 cuts are too short to hear" in caplog.text and short.id in caplog.text


def test_only_cuts_that_are_too_short(cuts, echo, tmp_path):
    short = shortened(cuts[1], 0.1)
    words = cuts[1].supervisions[0].text.split()
    assert decode(write([short], tmp_path), echo) == [(short.id, words, [])]
    assert echo.batches == []


def test_normalization_is_for_both_sides(cuts, echo, tmp_path):
    cuts[0].supervisions[0].text = "Dr. Who's colour, isn't it?"
    path = write(cuts[:1], tmp_path)
    _, reference, hypothesis = decode(path, echo)[0]
    assert reference != hypothesis
    _, reference, hypothesis = decode(path, echo, "english")[0]
    assert reference == hypothesis
    assert "isn't" not in reference


def test_an_empty_reference_is_allowed(cuts, echo, tmp_path):
    cuts[0].supervisions[0].text = ""
    assert decode(write(cuts[:1], tmp_path), echo) == [(cuts[0].id, [], ["!"])]


def test_on_the_fly_features(cuts, echo, tmp_path):
    cuts = [cut.drop_features() for cut in cuts]
    path = write(cuts, tmp_path)
    with pytest.raises(ValueError, match="has no features"):
        decode(path, echo)
    assert len(decode(path, echo, on_the_fly_feats=True)) == 5


@pytest.mark.parametrize(
    "name, expected",
    [
        ("librispeech_cuts_test-clean.jsonl.gz", "librispeech_test_clean"),
        ("an4_cuts_dev.jsonl.gz", "an4_dev"),
        ("mine.jsonl.gz", "mine"),
    ],
)
def test_set_names(tmp_path, name, expected):
    assert set_name(tmp_path / name) == expected

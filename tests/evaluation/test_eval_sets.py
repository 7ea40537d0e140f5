"""Test sets: every cut is recognized once, invalid and short cuts get empty hypotheses."""

import pytest
from lhotse import CutSet, load_manifest

from speechllm.data.config import DataConfig
from speechllm.errors import InputError
from speechllm.evaluation.eval_sets import (
    decode_shard,
    merge_results,
    read_eval_set,
    read_eval_sets,
    score_cuts,
)


@pytest.fixture
def echo():
    """Recognize each batch as its reference in capitals with an exclamation mark."""

    def recognize(batches):
        for batch in batches:
            recognize.batches.append(batch["cut_ids"])
            cuts = [recognize.cuts[cut_id] for cut_id in batch["cut_ids"]]
            yield batch, [cut.supervisions[0].text.upper() + "!" for cut in cuts]

    recognize.batches, recognize.cuts = [], {}
    return recognize


@pytest.fixture
def cuts(tiny_corpus):
    return list(load_manifest(tiny_corpus / "tiny_cuts_dev.jsonl.gz"))


def write(cuts, tmp_path):
    path = tmp_path / "tiny_cuts_test-x.jsonl.gz"
    CutSet.from_cuts(cuts).to_file(path)
    return path


def decode(path, recognize, normalize="none", **options):
    """(id, reference, hypothesis) of every cut."""
    config = DataConfig(**{"max_duration": 100.0, "num_workers": 0} | options)
    eval_set = read_eval_set(path, not config.on_the_fly_feats)
    recognize.cuts = {cut.id: cut for cut in eval_set.cuts}
    decoded = merge_results(eval_set, decode_shard(eval_set, recognize, config))
    scored = score_cuts(decoded, [one.result or "" for one in decoded], normalize)
    return [(one.id, one.ref, one.hyp) for one in scored]


def shortened(cut, seconds):
    cut = cut.truncate(duration=seconds).with_id(f"{cut.id}-short")
    cut.supervisions[0].duration = seconds
    return cut


def test_every_cut_is_recognized_once_and_lower_cased(cuts, echo, tmp_path):
    cuts[0].supervisions[0].text = "Four SEVEN"
    found = decode(write(cuts, tmp_path), echo)
    words = {cut.id: cut.supervisions[0].text.lower().split() for cut in cuts}
    assert sorted(found) == sorted((i, w, [*w[:-1], w[-1] + "!"]) for i, w in words.items())
    assert len(found) == len(cuts) == 5


def test_too_short_cuts_get_empty_hypotheses(cuts, echo, tmp_path, caplog):
    short, long = shortened(cuts[1], 0.20), shortened(cuts[2], 0.21)
    path = write([cuts[0], short, long], tmp_path)
    found = {i: (reference, hypothesis) for i, reference, hypothesis in decode(path, echo)}
    assert set(found) == {cuts[0].id, short.id, long.id}
    assert found[short.id] == (cuts[1].supervisions[0].text.split(), [])
    assert found[long.id][1]
    assert sorted(i for ids in echo.batches for i in ids) == sorted([cuts[0].id, long.id])
    assert "1 cuts are too short to decode" in caplog.text and short.id in caplog.text


def test_sets_with_the_same_result_names_are_rejected(cuts, tmp_path):
    write(cuts, tmp_path)
    with pytest.raises(InputError, match="two sets would write the same result files"):
        read_eval_sets("tiny_cuts_test-x,tiny_cuts_test-x", DataConfig(manifest_dir=tmp_path))

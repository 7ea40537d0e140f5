"""What a batch holds, and what it does without."""

import warnings

import pytest
import torch
from lhotse import load_manifest
from tiny_batches import all_ids, ids_of, musan, path_of, train_batches

from speechllm import cut_files
from speechllm.datasets import with_speech


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_is_what_the_legend_says(tiny_corpus, num_workers):
    cuts = {cut.id: cut for cut in load_manifest(path_of(tiny_corpus))}
    batches = train_batches(path_of(tiny_corpus), num_workers=num_workers)
    assert all_ids(batches) == sorted(cuts)
    for batch in batches:
        assert set(batch) == {"features", "feature_lens", "texts", "ids", "seconds", "bad"}
        assert batch["bad"] == []
        size, frames, dim = batch["features"].shape
        assert (size, dim) == (len(batch["ids"]), 80) == (len(batch["texts"]), 80)
        assert batch["features"].dtype == torch.float32
        assert batch["feature_lens"].dtype == torch.int64
        assert batch["feature_lens"].max() == frames
        assert batch["seconds"] == pytest.approx(batch["feature_lens"].sum() / 100)
        for cut_id, text, length, row in zip(
            batch["ids"], batch["texts"], batch["feature_lens"], batch["features"]
        ):
            assert text == cuts[cut_id].supervisions[0].text
            assert length == cuts[cut_id].num_frames
            assert torch.equal(row[:length], torch.from_numpy(cuts[cut_id].load_features()))
            assert (row[length:] < -15).all()  # padded with the logarithm of next to nothing


def test_contexts_come_when_they_are_asked_for(tiny_corpus):
    cuts = {cut.id: cut for cut in load_manifest(path_of(tiny_corpus))}
    for batch in train_batches(path_of(tiny_corpus), use_context=True):
        for cut_id, context in zip(batch["ids"], batch["contexts"], strict=True):
            odd = int(cut_id.removeprefix("train-")) % 2
            assert context == (cuts[cut_id].supervisions[0].text.split()[0] if odd else "")


def test_the_context_of_a_joined_cut_has_each_text_once(tiny_corpus):
    a, b, c = list(load_manifest(path_of(tiny_corpus)))[1:6:2]
    c.supervisions[0].custom = a.supervisions[0].custom
    contexts = [cut.supervisions[0].custom["context"] for cut in (a, b)]
    assert cut_files.context_of(a.append(b).append(c)) == " ".join(contexts)
    a.supervisions[0].custom = {"context": ["one"]}
    with pytest.raises(ValueError, match=r"cut train-1 has a context that is no text: \['one'\]"):
        cut_files.context_of(a)


def test_joined_cuts_have_their_texts_one_after_the_other(tiny_corpus):
    path = path_of(tiny_corpus)
    texts = {cut.id: cut.supervisions[0].text for cut in load_manifest(path)}
    options = {"max_duration": 40.0, "concatenate_cuts": True, "gap": 0.1}
    [apart], [joined] = train_batches(path, max_duration=40.0), train_batches(path, **options)
    assert joined["features"].size(0) < apart["features"].size(0) == 12
    assert joined["features"].size(1) == apart["features"].size(1)  # as long as the longest
    assert sorted(" ".join(joined["texts"]).split()) == sorted(" ".join(texts.values()).split())
    row = joined["texts"].index(f"{texts['train-1']} {texts['train-0']}")
    assert joined["feature_lens"][row] == 215 + 10 + 40
    for cut_id, start, frames in (("train-1", 0, 215), ("train-0", 225, 40)):
        part = joined["features"][row, start : start + frames]
        alone = apart["features"][apart["ids"].index(cut_id), :frames]
        torch.testing.assert_close(part, alone, rtol=0, atol=1e-3)


def test_features_on_the_fly_are_those_stored(tiny_corpus):
    path = path_of(tiny_corpus)
    stored, computed = train_batches(path), train_batches(path, on_the_fly_feats=True)
    assert ids_of(stored) == ids_of(computed)
    for a, b in zip(stored, computed):
        assert torch.equal(a["feature_lens"], b["feature_lens"])
        assert not torch.equal(a["features"], b["features"])
        for length, x, y in zip(a["feature_lens"], a["features"], b["features"]):
            torch.testing.assert_close(x[:length], y[:length], rtol=0, atol=1 / 64)  # lilcom's step


# What cannot be read


def broken(tiny_corpus, tmp_path, *places):
    """The training cuts, of which some have features that are gone."""
    cuts = load_manifest(path_of(tiny_corpus)).to_eager()
    for place in places:
        cuts[place].features.storage_path = "gone.lca"
    cuts.to_file(tmp_path / "broken.jsonl.gz")
    return tmp_path / "broken.jsonl.gz"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_utterances_that_cannot_be_read_are_left_out_of_their_batch(
    tiny_corpus, tmp_path, num_workers
):
    path = broken(tiny_corpus, tmp_path, 2, 7)
    batches = train_batches(path, num_workers=num_workers, max_duration=100.0)
    assert all_ids(batches) == sorted(f"train-{i}" for i in range(12) if i not in (2, 7))
    bad = [fault for batch in batches for fault in batch["bad"]]
    assert sorted((f.id, f.reason) for f in bad) == [
        ("train-2", "unreadable-features"), ("train-7", "unreadable-features"),
    ]  # fmt: skip
    assert all("gone.lca" in fault.sentence for fault in bad)


def test_a_batch_of_bad_utterances_alone_is_silence(tiny_corpus, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = train_batches(broken(tiny_corpus, tmp_path, 3), max_duration=1.0)
    [silent] = [batch for batch in batches if not batch["ids"]]
    assert silent["features"].shape == (1, 100, 80) and not silent["features"].any()
    assert silent["feature_lens"].tolist() == [100]
    assert (silent["texts"], silent["seconds"]) == ([""], 0.0)
    assert [fault.id for fault in silent["bad"]] == ["train-3"]
    bad = []
    assert len(list(with_speech(batches, bad))) == len(batches) - 1
    assert bad == silent["bad"]


def test_broken_noise_is_not_the_utterances_fault(tiny_corpus):
    noise = musan(tiny_corpus)
    for cut in noise:
        cut.features.storage_path = "gone.lca"
    batches = train_batches(path_of(tiny_corpus), musan_cuts=noise)
    assert all_ids(batches) == [f"train-{i}" for i in sorted(range(12), key=str)]
    ids = {fault.id for batch in batches for fault in batch["bad"]}
    assert ids and all(name.startswith("noise") for name in ids)


def test_a_joined_utterance_is_left_out_without_its_neighbours(tiny_corpus, tmp_path):
    options = {"concatenate_cuts": True, "gap": 0.1, "max_duration": 100.0}
    whole = train_batches(path_of(tiny_corpus), **options)
    batches = train_batches(broken(tiny_corpus, tmp_path, 3), **options)
    words = " ".join(text for batch in batches for text in batch["texts"]).split()
    every = " ".join(text for batch in whole for text in batch["texts"]).split()
    lost = load_manifest(path_of(tiny_corpus))[3].supervisions[0].text.split()
    assert sorted(words + lost) == sorted(every)

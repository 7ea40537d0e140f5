"""Content of batches, and batches with utterances that cannot be read."""

import warnings

import pytest
import soundfile
import torch
from lhotse import load_manifest
from tiny_batches import all_ids, cut_file, eval_batches, ids_of, musan, train_batches

from speechllm.data.dataset import TextOptions, usable_batches
from speechllm.data.validation import header_errors
from speechllm.models.prompt import IGNORED, ChatTokenizer, build_chat_template, training_ids


@pytest.fixture(scope="module")
def tokenizer(tiny_llm_dir):
    from speechllm.models.llm import load_llm

    return load_llm(str(tiny_llm_dir))[1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batch_has_the_documented_entries(tiny_corpus, num_workers):
    cuts = {cut.id: cut for cut in load_manifest(cut_file(tiny_corpus))}
    batches = train_batches(cut_file(tiny_corpus), num_workers=num_workers)
    assert all_ids(batches) == sorted(cuts)
    for batch in batches:
        assert set(batch) == {"features", "feature_lens", "texts", "cut_ids", "seconds", "invalid"}
        assert batch["invalid"] == []
        size, frames, dim = batch["features"].shape
        assert (size, size, dim) == (len(batch["cut_ids"]), len(batch["texts"]), 80)
        assert batch["features"].dtype == torch.float32
        assert batch["feature_lens"].dtype == torch.int64
        assert batch["feature_lens"].max() == frames
        assert batch["seconds"] == pytest.approx(batch["feature_lens"].sum() / 100)
        for cut_id, text, length, row in zip(
            batch["cut_ids"], batch["texts"], batch["feature_lens"], batch["features"]
        ):
            assert text == cuts[cut_id].supervisions[0].text
            assert length == cuts[cut_id].num_frames
            assert torch.equal(row[:length], torch.from_numpy(cuts[cut_id].load_features()))
            assert (row[length:] < -15).all()  # padded with the logarithm of nearly zero


def test_contexts_are_in_the_batch_with_use_context(tiny_corpus):
    cuts = {cut.id: cut for cut in load_manifest(cut_file(tiny_corpus))}
    for batch in train_batches(cut_file(tiny_corpus), text=TextOptions(use_context=True)):
        for cut_id, context in zip(batch["cut_ids"], batch["contexts"], strict=True):
            odd = int(cut_id.removeprefix("train-")) % 2
            assert context == (cuts[cut_id].supervisions[0].text.split()[0] if odd else "")


def test_concatenated_cuts_have_their_texts_in_order(tiny_corpus):
    path = cut_file(tiny_corpus)
    texts = {cut.id: cut.supervisions[0].text for cut in load_manifest(path)}
    options = {"max_duration": 40.0, "concatenate_cuts": True, "gap": 0.1}
    [single], [joined] = train_batches(path, max_duration=40.0), train_batches(path, **options)
    assert joined["features"].size(0) < single["features"].size(0) == 12
    assert joined["features"].size(1) == single["features"].size(1)  # as long as the longest
    assert sorted(" ".join(joined["texts"]).split()) == sorted(" ".join(texts.values()).split())
    row = joined["texts"].index(f"{texts['train-1']} {texts['train-0']}")
    assert joined["feature_lens"][row] == 215 + 10 + 40
    for cut_id, start, frames in (("train-1", 0, 215), ("train-0", 225, 40)):
        part = joined["features"][row, start : start + frames]
        alone = single["features"][single["cut_ids"].index(cut_id), :frames]
        torch.testing.assert_close(part, alone, rtol=0, atol=1e-3)


def test_features_computed_on_the_fly_equal_stored_ones(tiny_corpus):
    path = cut_file(tiny_corpus)
    stored, computed = train_batches(path), train_batches(path, on_the_fly_feats=True)
    assert ids_of(stored) == ids_of(computed)
    for a, b in zip(stored, computed):
        assert torch.equal(a["feature_lens"], b["feature_lens"])
        assert not torch.equal(a["features"], b["features"])
        for length, x, y in zip(a["feature_lens"], a["features"], b["features"]):
            torch.testing.assert_close(x[:length], y[:length], rtol=0, atol=1 / 64)  # lilcom's step


# ---- token ids


@pytest.mark.parametrize("template", [("", False), ("Write it down.", True)])
@pytest.mark.parametrize("sample", [False, True])
def test_token_ids_and_labels_are_those_of_the_prompt(tiny_corpus, tokenizer, template, sample):
    chat = build_chat_template(tokenizer, *template)
    options = TextOptions(template[1], ChatTokenizer(tokenizer, chat, 2))
    if sample:
        batches = train_batches(cut_file(tiny_corpus), text=options, num_workers=1)
    else:
        cuts = load_manifest(cut_file(tiny_corpus))
        batches = eval_batches(cuts, text=options, num_workers=1)
    for batch in batches:
        encoders, contexts = batch["encoders"], None
        if not sample:
            assert encoders == [[0, 1]] * len(batch["texts"])
        if template[1]:
            texts = [f" {context}" if context else "" for context in batch["contexts"]]
            contexts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        transcripts = [tokenizer.encode(text, add_special_tokens=False) for text in batch["texts"]]
        ids, labels = training_ids(chat, transcripts, [*map(len, encoders)], contexts)
        assert torch.equal(batch["input_ids"], ids) and torch.equal(batch["labels"], labels)
        assert batch["num_tokens"] == (labels != IGNORED).sum()


# ---- unreadable utterances


@pytest.mark.parametrize(("step", "share", "rate", "reasons"), [
    (1, 1, 16000, []), (2, 1, 8000, ["sampling-rate", "wrong-length"]),
    (1, 0.5, 16000, ["wrong-length"]),
])  # fmt: skip
def test_headers_of_speed_perturbed_audio_are_checked(
    tiny_corpus, tmp_path, step, share, rate, reasons
):
    cut = load_manifest(cut_file(tiny_corpus))[0].drop_features()
    samples = cut.load_audio()[0]
    cut.recording.sources[0].source = str(tmp_path / "a.wav")
    soundfile.write(tmp_path / "a.wav", samples[: int(share * len(samples)) : step], rate)
    assert [error.reason for error in header_errors(cut.perturb_speed(0.9))] == reasons


def with_missing_features(tiny_corpus, tmp_path, *numbers):
    """Write the training cuts to a new cut file; some have features that are missing."""
    cuts = load_manifest(cut_file(tiny_corpus)).to_eager()
    for number in numbers:
        cuts[number].features.storage_path = "missing.lca"
    cuts.to_file(tmp_path / "cuts.jsonl.gz")
    return tmp_path / "cuts.jsonl.gz"


def test_batch_of_invalid_utterances_is_silence(tiny_corpus, tmp_path, tokenizer):
    chat = build_chat_template(tokenizer, use_context=True)
    text = TextOptions(True, ChatTokenizer(tokenizer, chat, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = with_missing_features(tiny_corpus, tmp_path, 3)
        batches = train_batches(path, text=text, max_duration=1.0)
    [silent] = [batch for batch in batches if not batch["cut_ids"]]
    assert silent["features"].shape == (1, 100, 80) and not silent["features"].any()
    assert silent["feature_lens"].tolist() == [100]
    assert (silent["texts"], silent["contexts"], silent["seconds"]) == ([""], [""], 0.0)
    assert silent["input_ids"].tolist() == [[*chat.prompt(2), chat.end]]
    assert [error.id for error in silent["invalid"]] == ["train-3"]
    invalid = []
    assert len(list(usable_batches(batches, invalid))) == len(batches) - 1
    assert invalid == silent["invalid"]


def test_damaged_noise_is_reported_and_utterances_are_kept(tiny_corpus, tmp_path):
    noise = load_manifest(tiny_corpus / "musan_cuts.jsonl.gz").to_eager()
    for cut in list(noise)[1:]:  # the scan reads the first
        cut.features.storage_path = "missing.lca"
    noise.to_file(tmp_path / "musan_cuts.jsonl.gz")
    batches = train_batches(cut_file(tiny_corpus), **musan(tmp_path))
    assert all_ids(batches) == sorted(f"train-{i}" for i in range(12))
    ids = {error.id for batch in batches for error in batch["invalid"]}
    assert ids and all(name.startswith("noise") for name in ids)

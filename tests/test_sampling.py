"""What a batch may hold, and the buckets it is drawn from."""

import random
import warnings

import pytest
import torch
from lhotse import CutSet, MonoCut, SupervisionSegment, load_manifest

from speechllm import cut_files
from speechllm.llm import load_llm
from speechllm.model import expand_speech
from speechllm.prompt import chat_ids, encode_contexts, encode_transcripts, training_ids
from speechllm.sampling import BatchLimit, LLMPositions, make_sampler, with_positions
from speechllm.zipformer import SIZES, ZipformerEncoder


def cut_of(i: int, seconds: float, words: int = 5) -> MonoCut:
    """An utterance without audio: samplers look at the manifest alone."""
    text = " ".join(["word"] * words)
    supervision = SupervisionSegment(str(i), str(i), 0.0, seconds, text=text)
    return MonoCut(str(i), 0.0, seconds, 0, supervisions=[supervision])


def positions_of(cut) -> int:
    return round(cut.duration * 6) + len(cut.supervisions[0].text.split())


def corpus(size=2000, longest=20.0):
    """Durations of 1 to `longest` seconds; every hundredth is said ten times as fast."""
    rng = random.Random(0)
    cuts = []
    for i in range(size):
        seconds = rng.uniform(1.0, longest)
        rate = rng.uniform(1.5, 3.5) * (10 if i % 100 == 0 else 1)
        cuts.append(cut_of(i, round(seconds, 2), max(1, round(seconds * rate))))
    return cuts


def batches_of(cuts, max_duration=100.0, max_tokens=0, num_buckets=20, **options):
    limit = BatchLimit(max_duration, max_tokens=max_tokens)
    options = {"shuffle": True, "drop_last": False, "seed": 0, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lhotse prefers lazy cuts, these are few
        sampler = make_sampler(
            with_positions(CutSet.from_cuts(cuts), positions_of), limit,
            num_cuts=len(cuts), num_buckets=num_buckets, **options,
        )  # fmt: skip
        return [list(batch) for batch in sampler]


def padded(batch, length):
    return len(batch) * max(map(length, batch))


def fill(batches, length, limit):
    return sum(padded(batch, length) for batch in batches) / (len(batches) * limit)


def seconds_of(cut):
    return cut.duration


@pytest.mark.parametrize("num_buckets", [0, 2, 20])
@pytest.mark.parametrize("shuffle", [True, False])
def test_no_batch_goes_beyond_either_limit(num_buckets, shuffle):
    batches = batches_of(corpus(), 100.0, 900, num_buckets, shuffle=shuffle)
    assert sorted(int(cut.id) for batch in batches for cut in batch) == list(range(2000))
    assert max(padded(batch, seconds_of) for batch in batches) <= 100.0
    assert max(padded(batch, positions_of) for batch in batches) <= 900


@pytest.mark.parametrize("num_buckets", [2, 20])
def test_seconds_alone_are_kept_too(num_buckets):
    batches = batches_of(corpus(), 100.0, 0, num_buckets)
    assert 80.0 < max(padded(batch, seconds_of) for batch in batches) <= 100.0


def test_the_tighter_limit_decides():
    assert fill(batches_of(corpus(), 100.0, 100_000), seconds_of, 100.0) > 0.8
    assert fill(batches_of(corpus(), 100_000.0, 900), positions_of, 900) > 0.8
    by_seconds = [[cut.id for cut in batch] for batch in batches_of(corpus(), 100.0)]
    loose = batches_of(corpus(), 100.0, 100_000)
    assert by_seconds == [[cut.id for cut in batch] for batch in loose]


def test_what_is_too_long_by_itself_is_a_batch_of_its_own():
    cuts = [*corpus(100)[1:], cut_of(200, 5.0, 500)]
    for num_buckets in (0, 4):
        batches = batches_of(cuts, 100.0, 400, num_buckets)
        assert ["200"] in [[cut.id for cut in batch] for batch in batches]
        rest = [batch for batch in batches if batch[0].id != "200"]
        assert max(padded(batch, positions_of) for batch in rest) <= 400


def test_rare_long_texts_do_not_make_the_batches_of_others_small():
    usual = [cut for cut in corpus(5000, longest=10.0) if int(cut.id) % 100]
    rare = [cut_of(5000 + i, 5.0, 1000) for i in range(4)]
    without = batches_of(usual, 100.0, 1200)
    assert len(batches_of([*usual, *rare], 100.0, 1200)) < 1.02 * len(without) + len(rare)


def test_a_corpus_sorted_by_duration_does_not_lead_beyond_the_limit():
    """Buckets are estimated from the first 10,000: the longer ones share the last bucket."""
    cuts = sorted(corpus(12_000), key=seconds_of)
    assert max(padded(batch, seconds_of) for batch in batches_of(cuts)) <= 100.0


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("ds_rate", [4, 2])
@pytest.mark.parametrize("asked", [(), ("write it", True), ("write it", False)])
def test_positions_are_those_the_llm_is_given(
    tiny_corpus, tiny_llm_dir, encoder_size, n, ds_rate, asked
):
    """Against encoder, prompt and merging themselves."""
    _, tokenizer = load_llm(str(tiny_llm_dir))
    chat = chat_ids(tokenizer, *asked)
    encoder = ZipformerEncoder(SIZES[encoder_size]).eval()
    count = LLMPositions(tokenizer, chat, n, ds_rate)
    for cut in load_manifest(tiny_corpus / "tiny_cuts_train.jsonl.gz"):
        cut.supervisions[0].text = "The Quick brown <speech> FOX"
        features = torch.from_numpy(cut.load_features())[None]
        with torch.no_grad():
            _, lens = encoder(features, torch.tensor([features.size(1)]))
        transcript = encode_transcripts(tokenizer, ["the quick brown <speech> fox"])
        contexts = encode_contexts(tokenizer, chat, [cut_files.context_of(cut)])
        ids, labels = training_ids(chat, transcript, [n], contexts)
        counts = [[int(lens[0]) // ds_rate] * n]
        expanded, _, _ = expand_speech(ids, labels, counts, chat.speech, chat.pad)
        assert count(cut) == expanded.size(1)


def test_positions_are_counted_once_a_cut():
    seen = []

    def count(cut):
        seen.append(cut.id)
        return 1

    [cut] = with_positions(CutSet.from_cuts([cut_of(1, 2.0)]), count)
    limit = BatchLimit(100.0, max_tokens=10)
    assert [limit.measure_length(cut) for _ in range(3)] == [10.0] * 3
    assert seen == ["1"]


def test_speech_embeddings_are_6_25_a_second():
    assert cut_files.speech_embeddings(10_000) == 624
    for ds_rate in (1, 2, 4, 5):
        fewest = cut_files.frames_needed(ds_rate)
        counts = [cut_files.speech_embeddings(frames, ds_rate) for frames in (fewest - 1, fewest)]
        assert counts == [0, 1]

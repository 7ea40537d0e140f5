"""A synthesized corpus: texts, speakers, espeak's audio and word times, files."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile

pytest.importorskip("espeakng_loader", reason="espeakng-loader is not installed")

import make_spoken_corpus as spoken

from speechllm.errors import InputError

SMALL = "--num-train 6 --num-dev 2 --num-test 2"


@pytest.fixture(scope="module")
def espeak():
    return spoken.Espeak()


def make(out):
    """Run the program; espeak's breath depends on what its process synthesized before."""
    command = [sys.executable, spoken.__file__, "--out", out, *SMALL.split()]
    subprocess.run(command, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make(tmp_path_factory.mktemp("corpora") / "new" / "demo")


def contents(corpus):
    paths = [path for path in corpus.rglob("*") if path.is_file()]
    return {str(path.relative_to(corpus)): path.read_bytes() for path in paths}


def test_splits_share_words_but_neither_voices_nor_sentences():
    utterances = spoken.plan_corpus({"train": 1200, "dev": 60, "test": 120})
    assert len({utt_id for utt_id, *_ in utterances}) == 1380
    split_of, words = {}, {"train": set(), "dev": set(), "test": set()}
    for _, split, speaker, text in utterances:
        words[split].update(text.split())
        for key in (text, speaker.name, f"variant {speaker.variant}"):
            assert split_of.setdefault(key, split) == split
    assert words["dev"] | words["test"] <= words["train"]


def test_espeak_has_every_accent_and_variant(espeak):
    for variants in spoken.VARIANTS.values():
        for variant in variants:
            for accent in spoken.ACCENTS:
                samples, _ = espeak.synthesize(spoken.Speaker(accent, variant, 160, 50, 50), "yes")
                assert 0.01 < np.abs(samples).max() < 0.99, variant  # neither silent nor clipped
    with pytest.raises(InputError, match=r"no voice xx\+f2"):
        espeak.synthesize(spoken.Speaker("xx", "f2", 160, 50, 50), "yes")


@pytest.mark.slow
def test_table_and_word_times_describe_the_audio(corpus):
    with (corpus / "transcripts.tsv").open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    assert [row["split"] for row in rows] == ["train"] * 6 + ["dev"] * 2 + ["test"] * 2
    lines = map(json.loads, (corpus / "words.jsonl").read_text(encoding="utf-8").splitlines())
    words_of = {line["utt_id"]: line["words"] for line in lines}
    for row in rows:
        assert row["path"] == f"wav/{row['speaker']}/{row['utt_id']}.flac"
        audio, rate = soundfile.read(corpus / row["path"])
        assert rate == 16000 and float(row["duration_s"]) == pytest.approx(len(audio) / rate, 1e-2)
        words = words_of[row["utt_id"]]
        assert [word for word, _, _ in words] == row["text"].split()
        start, end = int(words[0][1] * rate), int((words[-1][2] + 0.05) * rate)
        silence = np.concatenate([audio[:start], audio[end:]])
        assert np.mean(audio[start:end] ** 2) > 30 * np.mean(silence**2)


@pytest.mark.slow
def test_output_is_reproducible(corpus, tmp_path):
    assert contents(make(tmp_path / "again")) == contents(corpus)

"""A spoken corpus: grammar, speakers, espeak's audio and word times, a small one's files."""

import csv
import json
import random
import re
import shutil

import numpy as np
import pytest
import soundfile

pytest.importorskip("espeakng_loader", reason="espeakng-loader is not installed")

import make_spoken_corpus as spoken

SIZES = {"train": 6, "dev": 2, "test": 2}
SMALL = "--num-train 6 --num-dev 2 --num-test 2"
SPEAKER = spoken.Speaker("en-us", "f2", rate=160, pitch=50, pitch_range=50)


@pytest.fixture(scope="module")
def espeak():
    return spoken.Espeak()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpora") / "new" / "demo"
    spoken.main(["--out", str(out), *SMALL.split()])
    return out


def read_table(corpus):
    with (corpus / "transcripts.tsv").open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


def read_words(corpus):
    lines = (corpus / "words.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["utt_id"]: row["words"] for row in map(json.loads, lines)}


def contents(corpus):
    return {
        str(path.relative_to(corpus)): path.read_bytes()
        for path in corpus.rglob("*")
        if path.is_file() and path.name != "corpus.json"
    }


def power_above(samples, rate, hertz):
    spectrum = np.abs(np.fft.rfft(samples)) ** 2
    return spectrum[np.fft.rfftfreq(len(samples), 1 / rate) > hertz].sum()


# ---- what is said


def test_sentences_are_different_lower_case_words():
    sentences = spoken.draw_sentences(2000, random.Random(0))
    assert len(set(sentences)) == 2000
    assert all(re.fullmatch(r"[a-z]+( [a-z]+)+", sentence) for sentence in sentences)
    assert len({word for sentence in sentences for word in sentence.split()}) < 400
    assert max(len(sentence.split()) for sentence in sentences) <= 15


def test_an_exhausted_grammar_is_an_error(monkeypatch):
    monkeypatch.setattr(spoken, "GRAMMAR", {"sentence": ("yes", "no")})
    assert sorted(spoken.draw_sentences(2, random.Random(0))) == ["no", "yes"]
    with pytest.raises(ValueError, match="no 3 sentences"):
        spoken.draw_sentences(3, random.Random(0))


# ---- who says it


def test_splits_of_the_usual_size_share_no_voice_and_no_sentence_but_the_words():
    utterances = spoken.plan_corpus({"train": 1200, "dev": 60, "test": 120}, seed=0)
    spoken.check_disjoint(utterances)
    assert len({utterance.utt_id for utterance in utterances}) == 1380
    words = {split: set() for split in spoken.SPLITS}
    for utterance in utterances:
        words[utterance.split].update(utterance.text.split())
    assert words["dev"] | words["test"] <= words["train"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"text": "turn on the light"}, "'turn on the light' is in several splits: dev, train"),
        ({"speaker": SPEAKER}, "'en-us-f2' is in several splits"),
        ({"speaker": spoken.Speaker("en", "f2", 160, 50, 50)}, "'variant f2' is in several splits"),
    ],
)
def test_a_shared_voice_or_sentence_is_an_error(change, named):
    first = spoken.Utterance("a", "train", SPEAKER, "turn on the light")
    other = {"speaker": spoken.Speaker("en", "m1", 160, 50, 50), "text": "call anna", **change}
    with pytest.raises(ValueError, match=named):
        spoken.check_disjoint([first, spoken.Utterance("b", "dev", **other)])


def test_espeak_knows_every_accent_and_variant(espeak):
    for accent in spoken.ACCENTS:
        espeak.synthesize(spoken.Speaker(accent, "m1", 160, 50, 50), "yes")
    for variants in spoken.VARIANTS.values():
        for variant in variants:
            samples, _ = espeak.synthesize(spoken.Speaker("en", variant, 160, 50, 50), "yes")
            assert 0.01 < np.abs(samples).max() < 0.99, variant  # neither silent nor clipped


# ---- how it is said


def test_every_word_has_its_time(espeak):
    text = "put it in the oven for the night"  # espeak's dictionary joins "in the" and "for the"
    samples, words = espeak.synthesize(SPEAKER, text)
    assert [word for word, _, _ in words] == text.split()
    times = [time for _, start, end in words for time in (start, end)]
    assert times == sorted(times)
    assert all(end - start > 0.03 for _, start, end in words)
    assert words[0][1] < 0.05
    assert words[-1][2] <= len(samples) / espeak.sampling_rate


def test_word_times_are_where_the_sound_is(espeak):
    samples, words = espeak.synthesize(SPEAKER, "one six one six")
    rate = espeak.sampling_rate
    for word, start, _ in words:
        if word == "six":  # the hiss of its s begins here
            onset, window = int(start * rate), int(0.05 * rate)
            hiss = power_above(samples[onset + window : onset + 2 * window], rate, 4000)
            assert hiss > 30 * power_above(samples[onset - window : onset], rate, 4000)


@pytest.mark.parametrize(
    ("habit", "value"), [("rate", 120), ("pitch", 80), ("pitch_range", 0), ("accent", "en-029")]
)
def test_every_habit_is_heard(espeak, habit, value):
    other = spoken.Speaker(**{**vars(SPEAKER), habit: value})
    text = "what time is it in tokyo"
    usual, changed = (espeak.synthesize(speaker, text)[0] for speaker in (SPEAKER, other))
    assert len(usual) != len(changed) or np.abs(usual - changed).max() > 0.05
    if habit == "rate":
        assert len(changed) > 1.2 * len(usual)


def test_an_unknown_voice_and_words_unheard_are_errors(espeak):
    with pytest.raises(ValueError, match=r"no voice xx\+f2"):
        espeak.synthesize(spoken.Speaker("xx", "f2", 160, 50, 50), "yes")
    with pytest.raises(ValueError, match=r"heard 1 words in 'yes …'"):
        espeak.synthesize(SPEAKER, "yes …")


def test_pink_noise_has_equal_power_in_every_octave():
    rng = np.random.default_rng(0)

    def octave_powers(pink):
        samples = spoken.noise(1 << 16, pink, rng)
        assert np.mean(samples**2) == pytest.approx(1, abs=0.05)
        return [
            power_above(samples, 16000, f) - power_above(samples, 16000, 2 * f)
            for f in (500, 1000, 2000)
        ]

    low, _, high = octave_powers(pink=True)
    assert high / low == pytest.approx(1, abs=0.2)
    low, _, high = octave_powers(pink=False)
    assert high / low == pytest.approx(4, abs=0.5)


def test_a_room_adds_silence_and_noise_20_to_40_db_below():
    speech = np.sin(np.arange(4000))  # a quarter of a second
    starts = []
    for seed in range(60):
        audio, before = spoken.place_in_room(speech, np.random.default_rng(seed))
        assert len(audio) >= spoken.MIN_DURATION * 16000 - 2
        starts.append(before)
        start = round(before * 16000)
        silence = np.concatenate([audio[:start], audio[start + 4000 :]])
        snr = 10 * np.log10(np.mean(audio[start : start + 4000] ** 2) / np.mean(silence**2))
        assert 18 < snr < 42
        assert 10 ** (-18 / 20) * 0.9 < np.abs(audio).max() < 0.9
    assert 0.05 <= min(starts) and 0.6 < max(starts) <= 0.9
    assert np.median(starts) < 0.2  # most begin at once


# ---- the corpus


def test_the_table_tells_what_is_there(corpus):
    rows = read_table(corpus)
    assert [row["split"] for row in rows] == ["train"] * 6 + ["dev"] * 2 + ["test"] * 2
    planned = spoken.plan_corpus(SIZES, seed=0)
    assert [row["text"] for row in rows] == [utterance.text for utterance in planned]
    for row in rows:
        info = soundfile.info(corpus / row["path"])
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        assert row["path"] == f"wav/{row['speaker']}/{row['utt_id']}.flac"
        assert float(row["duration_s"]) == pytest.approx(info.duration, abs=1e-3)
        assert spoken.MIN_DURATION <= info.duration <= spoken.MAX_DURATION
    assert [path.name for path in corpus.parent.iterdir()] == ["demo"]  # nothing half-written


def test_words_lie_where_the_file_is_loud(corpus):
    words_of = read_words(corpus)
    for row in read_table(corpus):
        audio, rate = soundfile.read(corpus / row["path"])
        words = words_of[row["utt_id"]]
        assert [word for word, _, _ in words] == row["text"].split()
        start, end = int(words[0][1] * rate), int((words[-1][2] + 0.05) * rate)
        silence = np.concatenate([audio[:start], audio[end:]])
        assert np.mean(audio[start:end] ** 2) > 30 * np.mean(silence**2)


def test_the_same_arguments_give_the_same_files(corpus, tmp_path):
    spoken.main(["--out", str(tmp_path / "again"), *SMALL.split()])
    assert contents(tmp_path / "again") == contents(corpus)
    spoken.main(["--out", str(tmp_path / "other"), *SMALL.split(), "--seed", "1"])
    assert contents(tmp_path / "other") != contents(corpus)


def test_a_complete_corpus_is_kept_and_an_interrupted_one_replaced(corpus, tmp_path, caplog):
    caplog.set_level("INFO")
    out, unfinished = tmp_path / "demo", tmp_path / "demo.tmp"
    shutil.copytree(corpus, out)
    before = (out / "transcripts.tsv").stat().st_mtime_ns
    spoken.main(["--out", str(out), *SMALL.split()])
    assert "complete: kept" in caplog.text
    assert (out / "transcripts.tsv").stat().st_mtime_ns == before

    out.rename(unfinished)
    (unfinished / "wav" / "left-over.flac").touch()
    spoken.main(["--out", str(out), *SMALL.split()])
    assert contents(out) == contents(corpus)
    assert not unfinished.exists()


def test_another_corpus_is_not_overwritten(corpus, tmp_path):
    for flags in ("--num-train 7", "--num-dev 3", "--num-test 3", "--seed 2"):
        with pytest.raises(
            SystemExit, match="was made with .*'num_train': 6.*choose another --out"
        ):
            spoken.main(["--out", str(corpus), *SMALL.split(), *flags.split()])
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(SystemExit, match="is no corpus of this program"):
        spoken.main(["--out", str(tmp_path), *SMALL.split()])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [("--num-dev 0", "--num-dev 0: every split"), ("--seed -1", "--seed -1 is negative")],
)
def test_unusable_flags_are_refused_in_a_sentence(tmp_path, flags, sentence):
    with pytest.raises(SystemExit, match=sentence):
        spoken.main(["--out", str(tmp_path / "demo"), *flags.split()])


def test_too_long_an_utterance_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(spoken, "MAX_DURATION", 2.0)
    long = spoken.Utterance("long-one", "train", SPEAKER, "one two three four " * 4)
    with pytest.raises(ValueError, match=r"long-one lasts \d+\.\d s"):
        spoken.write_corpus(tmp_path, [long], seed=0)


def test_the_summary_counts_minutes_speakers_and_unseen_words():
    def row(split, speaker, text):
        return {"split": split, "speaker": speaker, "text": text, "duration_s": "30.0"}

    rows = [
        row("train", "a", "turn on the lamp"),
        row("train", "b", "turn off the lamp"),
        row("dev", "c", "turn on"),
        row("test", "d", "turn up the lamp"),
    ]
    assert spoken.describe(rows) == [
        "train: 2 utterances, 1.0 min, 2 speakers, 8 words",
        "dev: 1 utterances, 0.5 min, 1 speakers, 2 words",
        "test: 1 utterances, 0.5 min, 1 speakers, 4 words",
        "dev: 2 different words, 0 not in train (train has 5): -",
        "test: 4 different words, 1 not in train (train has 5): up",
    ]

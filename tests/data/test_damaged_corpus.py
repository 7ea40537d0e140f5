"""Utterances that are damaged in many ways.

Each utterance gets every kind of damage. For each damaged utterance validate_manifest.py
prints the reason, training skips it with that reason and no other utterance, and decoding scores it
as deletions, or decodes it if only its text is damaged.
"""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import validate_manifest
from hostile_cuts import set_in, write_lines
from lhotse import NumpyFilesWriter, Recording, SupervisionSegment
from sounds import noise

from speechllm.audio.fbank import fbank_extractor
from speechllm.data.config import DataConfig, TrainDataConfig
from speechllm.data.manifests import scan_manifests
from speechllm.errors import InputError
from speechllm.evaluation.eval_sets import decode_shard, merge_results, read_eval_set, score_cuts
from speechllm.training.data import scan_training_data
from speechllm.training.loader import TrainLoader

EACH = 4  # utterances
TEXT_ONLY = ("long-text", "not-unicode", "no-text")  # the audio can be decoded


# ---- damage: functions of the cut as JSON, of the bytes of its file, or of its samples


def text(value):
    return set_in("supervisions", 0, "text", value=value)


def stereo(cut):
    cut.update(type="MultiCut", channel=[0, 1])
    cut["recording"]["channel_ids"] = cut["recording"]["sources"][0]["channels"] = [0, 1]
    cut["supervisions"][0]["channel"] = [0, 1]


MANIFEST = {  # manifests of corpora with features or audio
    "no text": (text(None), "no-text"),
    "no supervision": (set_in("supervisions", value=[]), "no-text"),
    "thousands of words": (text("HELLO " * 3000), "long-text"),
    "replacement character": (text("CAF\ufffd"), "not-unicode"),
    "nul": (text("A\0"), "not-unicode"),
    "number as text": (text(7), "malformed"),
    "duration nan": (set_in("duration", value=float("nan")), "malformed"),
    "supervision too early": (
        set_in("supervisions", 0, "start", value=-1.0),
        "supervision-outside",
    ),
    "supervision too long": (
        set_in("supervisions", 0, "duration", value=99.0),
        "supervision-outside",
    ),
}
FEATURES = {
    "features gone": (lambda cut: cut.pop("features"), "no-features"),
    "40 dimensions": (set_in("features", "num_features", value=40), "feature-dim"),
    "12.5 ms": (set_in("features", "frame_shift", value=0.0125), "frame-shift"),
    "frames too few": (set_in("features", "num_frames", value=9), "wrong-length"),
    "unknown storage": (set_in("features", "storage_key", value="gone.npy"), "unreadable-features"),
}
FILES = {
    "missing": None,
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "random": lambda data: np.random.default_rng(0).bytes(len(data)),
}
FEATURE_FILES = {name: (damage, "unreadable-features") for name, damage in FILES.items()} | {
    "header alone": (lambda data: data[:64], "unreadable-features"),
    "json": (lambda data: b"{}", "unreadable-features"),
}
FEATURE_VALUES = {
    "one nan": (lambda f: np.where(np.arange(f.size).reshape(f.shape) == 99, np.nan, f),
                "not-finite"),
    "infinite": (lambda f: f + np.inf, "not-finite"),
    "fewer dimensions": (lambda f: f[:, :40], "wrong-length"),
    "half the frames": (lambda f: f[: len(f) // 2], "wrong-length"),
}  # fmt: skip
AUDIO = {
    "recording gone": (lambda cut: cut.pop("recording"), "no-audio"),
    "8 kHz": (set_in("recording", "sampling_rate", value=8000), "sampling-rate"),
    "two channels": (stereo, "channels"),
    "file elsewhere": (
        set_in("recording", "sources", 0, "source", value="gone.wav"), "unreadable-audio"),
    "too few samples": (set_in("recording", "num_samples", value=9), "malformed"),
}  # fmt: skip
AUDIO_FILES = {name: (damage, "unreadable-audio") for name, damage in FILES.items()} | {
    "truncated": (FILES["truncated"], "unreadable-audio|wrong-length"),
    "header alone": (lambda data: data[:44], "unreadable-audio|wrong-length"),
    "text": (lambda data: b"no audio at all", "unreadable-audio"),
    "rate in the header": (lambda data: data[:24] + b"\x40\x1f" + data[26:], "sampling-rate"),
}
AUDIO_VALUES = {
    "8 kHz file": (lambda samples: (samples[::2], 8000), "sampling-rate"),
    "half the samples": (lambda samples: (samples[: len(samples) // 2], 16000), "wrong-length"),
    "one nan": (lambda samples: (np.append(samples[:-1], np.nan), 16000), "not-finite"),
    "infinite": (lambda samples: (np.append(samples[:-1], np.inf), 16000), "not-finite"),
}


# ---- the corpus


@pytest.fixture(scope="module")
def utterances() -> list[tuple[str, str, np.ndarray]]:
    """Id, text and samples of short recordings."""
    return [(f"u{i}", f"NUMBER {i}", noise(1.0 + 0.2 * i)[:, 0]) for i in range(EACH)]


class Corpus:
    """Damaged and intact cuts with their own audio or feature files, and the expected reasons."""

    def __init__(self, folder: Path, utterances, with_features: bool):
        self.folder, self.utterances, self.with_features = folder, utterances, with_features
        self.lines, self.reasons = [], {}

    def add(self, kind: str, number: int, change=None, reason="", spoil=None, values=None):
        """Add a cut of an utterance with a damage of its JSON, its file, or the file's values."""
        name, words, samples = self.utterances[number]
        cut_id, wav = f"{name} {kind}", self.folder / f"{len(self.lines)}.wav"
        soundfile.write(wav, samples, 16000)
        cut = Recording.from_file(wav, recording_id=cut_id).to_cut().with_id(cut_id)
        cut.supervisions = [SupervisionSegment(cut_id, cut_id, 0.0, cut.duration, text=words)]
        if self.with_features:
            with NumpyFilesWriter(self.folder / "feats") as writer:
                cut = cut.compute_and_store_features(fbank_extractor(), writer)
            file = Path(cut.features.storage_path) / cut.features.storage_key
            if values:
                np.save(file, values(np.load(file)))
        else:
            file = wav
            if values:
                soundfile.write(wav, *values(samples), subtype="FLOAT")
        line = cut.to_dict()
        if spoil:
            file.write_bytes(spoil(file.read_bytes()))
        elif reason and not (change or values):
            file.unlink()
        if change:
            change(line)
        self.lines.append(line)
        if reason:
            self.reasons[line["id"]] = reason

    def add_damage(self, manifests: dict, files: dict, values: dict) -> "Corpus":
        for number in range(EACH):
            self.add("intact", number)
            for kind, (change, reason) in manifests.items():
                self.add(kind, number, change=change, reason=reason)
            for kind, (spoil, reason) in files.items():
                self.add(f"file {kind}", number, spoil=spoil, reason=reason)
            for kind, (function, reason) in values.items():
                self.add(f"values {kind}", number, values=function, reason=reason)
        return self

    def write(self) -> Path:
        return write_lines(self.folder / "an4_cuts_damaged.jsonl.gz", self.lines)


@pytest.fixture(scope="module", params=["features", "audio"])
def corpus(request, utterances, tmp_path_factory) -> tuple[Path, dict[str, str], dict]:
    """The cut file, the expected reasons by id, and options of the loader."""
    made = Corpus(tmp_path_factory.mktemp(request.param), utterances, request.param == "features")
    if made.with_features:
        made.add_damage(MANIFEST | FEATURES, FEATURE_FILES, FEATURE_VALUES)
    else:
        made.add_damage(MANIFEST | AUDIO, AUDIO_FILES, AUDIO_VALUES)
    return made.write(), made.reasons, {"on_the_fly_feats": request.param == "audio"}


def assert_reasons(found: dict[str, str], expected: dict[str, str]) -> None:
    """Check that the ids are equal, each with one of the possible reasons."""
    wrong = {
        name: (found.get(name), expected.get(name))
        for name in found.keys() | expected.keys()
        if found.get(name) not in expected.get(name, "").split("|")
    }
    assert wrong == {}


def test_validate_manifest_finds_exactly_the_damage(corpus, capsys):
    path, reasons, options = corpus
    with pytest.raises(SystemExit):
        validate_manifest.main([
            str(path), "--read", "all", "--json", "true",
            "--on-the-fly-feats", str(options["on_the_fly_feats"]),
        ])  # fmt: skip
    found = {}
    for line in capsys.readouterr().out.splitlines():
        problem = json.loads(line)
        assert problem["message"] and "\n" not in problem["message"]
        found.setdefault(problem["id"], problem["reason"])
    assert_reasons(found, reasons)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_skips_exactly_the_damage(corpus, num_workers):
    path, reasons, options = corpus
    config = TrainDataConfig(
        train_cuts=str(path), valid_cuts=str(path), max_duration=9.0, min_duration=0.0,
        num_workers=num_workers, drop_last=False, enable_musan=False, enable_spec_aug=False,
        **options,
    )  # fmt: skip
    data = scan_training_data(config)
    found = {errors[0].id: errors[0].reason for errors in data.train.invalid_cuts}
    batches = list(TrainLoader(data)(1))
    for batch in batches:
        assert batch["features"].isfinite().all()
        assert len(batch["texts"]) == batch["features"].size(0) == max(1, len(batch["cut_ids"]))
        found |= {error.id: error.reason for error in batch["invalid"]}
    assert_reasons(found, reasons)
    used = Counter(cut_id for batch in batches for cut_id in batch["cut_ids"])
    assert len(used) == EACH and set(used.values()) == {1}
    assert all(cut_id.endswith(" intact") for cut_id in used)


def test_decoding_scores_unusable_cuts_as_deletions(corpus):
    path, reasons, options = corpus

    def echo(batches):
        for batch in batches:
            yield batch, [text.upper() + " AND MORE" for text in batch["texts"]]

    cuts = read_eval_set(path, not options["on_the_fly_feats"])
    data = DataConfig(max_duration=9.0, num_workers=0, **options)
    decoded = merge_results(cuts, decode_shard(cuts, echo, data))
    assert [one.cut.id for one in decoded] == [
        json.loads(line)["id"] for line in gzip.open(path, "rt")
    ]
    texts = [one.result or "" for one in decoded]
    for one, scored in zip(decoded, score_cuts(decoded, texts), strict=True):
        reference, hypothesis = scored.ref, scored.hyp
        kind = reasons.get(one.cut.id, "")
        if kind in TEXT_ONLY and all(isinstance(s.text, str) for s in one.cut.supervisions):
            kind = "" if one.cut.supervisions else kind
        if kind:
            assert one.error and one.error.reason in kind.split("|"), one.cut.id
            assert hypothesis == []
        else:
            assert one.error is None and hypothesis[-2:] == ["and", "more"]
            assert hypothesis[:-2] == reference or "?" in " ".join(reference)


# ---- files


@pytest.fixture(scope="module")
def good(utterances, tmp_path_factory):
    corpus = Corpus(tmp_path_factory.mktemp("good"), utterances, with_features=True)
    for number in range(EACH):
        corpus.add("intact", number)
    return corpus.write()


CUT_FILES = {
    "empty": lambda whole: b"",
    "not gzip": lambda whole: gzip.decompress(whole),
    "cut off in the middle": lambda whole: whole[: len(whole) // 2],
    "garbage among the lines": lambda whole: gzip.compress(
        gzip.decompress(whole).replace(b"\n", b"\n{{\n", 1)),
    "not UTF-8": lambda whole: gzip.compress(b"\xff\xfe\n" + gzip.decompress(whole)),
    "a list": lambda whole: gzip.compress(b"[1, 2]\n"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CUT_FILES)
def test_an_unreadable_cut_file_is_an_error_everywhere(good, tmp_path, capsys, kind):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(CUT_FILES[kind](good.read_bytes()))
    with pytest.raises(SystemExit):
        validate_manifest.main([str(path), "--json", "true"])
    problems = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert problems and {problem["reason"] for problem in problems} == {"not-a-cut"}
    for read in (lambda: scan_manifests([path], tolerate=True), lambda: read_eval_set(path)):
        with pytest.raises(InputError) as error:
            read()
        assert str(error.value).startswith(f"{path} cannot be read beyond cut ")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("", "invalid-id"), (7, "invalid-id"), ("a\nb", "invalid-id"), (None, "duplicate-id")],
)
def test_unusable_ids_are_skipped_in_training_and_an_error_in_decoding(
    good, tmp_path, capsys, name, reason
):
    lines = [json.loads(line) for line in gzip.open(good, "rt")]
    lines[3]["id"] = lines[0]["id"] if name is None else name
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    with pytest.raises(SystemExit):
        validate_manifest.main([str(path), "--json", "true"])
    [problem] = map(json.loads, capsys.readouterr().out.splitlines())
    assert (problem["line"], problem["reason"]) == (4, reason)
    statistics = scan_manifests([path], tolerate=True)
    assert [*statistics.errors[path]] == [3] and statistics.kept == EACH - 1
    with pytest.raises(InputError, match=problem["message"].replace("\\", ".")):
        read_eval_set(path)

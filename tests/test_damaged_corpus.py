"""Real recordings, damaged in many ways: what is said of each, who goes on without it, and how.

Every kind of damage is done to several utterances of AN4. For each damaged utterance
validate_manifest.py gives the reason, training leaves out that utterance alone with that reason,
and decoding scores it as deletions, or decodes it where only its text is damaged.
"""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import validate_manifest
from lhotse import NumpyFilesWriter, Recording, SupervisionSegment

from speechllm.cut_files import check_cuts, cuts_within
from speechllm.data import training_loader
from speechllm.decoding.test_set import decode_cuts, results
from speechllm.features import fbank_extractor

EACH = 6  # utterances
TEXT_ONLY = ("long-text", "not-unicode", "no-text")  # with a reference that can be compared with


# ---- damage: a function of the cut as JSON, and of the bytes of its file where it has one


def put(*keys, value):
    def change(cut):
        for key in keys[:-1]:
            cut = cut[key]
        cut[keys[-1]] = value

    return change


def text(value):
    return put("supervisions", 0, "text", value=value)


def stereo(cut):
    cut.update(type="MultiCut", channel=[0, 1])
    cut["recording"]["channel_ids"] = cut["recording"]["sources"][0]["channels"] = [0, 1]
    cut["supervisions"][0]["channel"] = [0, 1]


MANIFEST = {  # damage of both kinds of corpora
    "no text": (text(None), "no-text"),
    "empty text": (text(""), "no-text"),
    "blank text": (text(" \u3000\n"), "no-text"),
    "no supervision": (put("supervisions", value=[]), "no-text"),
    "thousands of words": (text("HELLO " * 3000), "long-text"),
    "half a surrogate pair": (text("SAY \ud83d"), "not-unicode"),
    "replacement character": (text("CAF\ufffd"), "not-unicode"),
    "number as text": (text(7), "malformed"),
    "list as text": (text(["A"]), "malformed"),
    "no duration": (put("duration", value=0.0), "malformed"),
    "negative duration": (put("duration", value=-1.0), "malformed"),
    "duration nan": (put("duration", value=float("nan")), "malformed"),
    "duration in words": (put("duration", value="long"), "malformed"),
    "supervision too early": (put("supervisions", 0, "start", value=-1.0), "supervision-outside"),
    "supervision too long": (put("supervisions", 0, "duration", value=99.0), "supervision-outside"),
    "supervision of another": (put("supervisions", 0, "recording_id", value="x"), "malformed"),
}
FEATURES = {
    "features gone": (lambda cut: cut.pop("features"), "no-features"),
    "40 dimensions": (put("features", "num_features", value=40), "feature-dim"),
    "12.5 ms": (put("features", "frame_shift", value=0.0125), "frame-shift"),
    "frames too few": (put("features", "num_frames", value=9), "wrong-length"),
    "features later": (put("features", "start", value=0.5), "wrong-length"),
    "another channel": (put("features", "channels", value=3), "malformed"),
    "unknown storage": (put("features", "storage_key", value="gone.npy"), "unreadable-features"),
}
FILES = {
    "missing": None,
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "zeroed": lambda data: bytes(len(data)),
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
    "a vector": (lambda f: f[0], "unreadable-features|wrong-length"),
    "strings": (lambda f: np.full(f.shape, "x"), "unreadable-features|not-finite|wrong-length"),
}  # fmt: skip
AUDIO = {
    "recording gone": (lambda cut: cut.pop("recording"), "no-audio"),
    "8 kHz": (put("recording", "sampling_rate", value=8000), "sampling-rate"),
    "two channels": (stereo, "channels"),
    "file elsewhere": (
        put("recording", "sources", 0, "source", value="gone.wav"), "unreadable-audio"),
    "too few samples": (put("recording", "num_samples", value=9), "malformed"),
}  # fmt: skip
AUDIO_FILES = {name: (damage, "unreadable-audio") for name, damage in FILES.items()} | {
    "truncated": (FILES["truncated"], "unreadable-audio|wrong-length"),
    "header alone": (lambda data: data[:44], "unreadable-audio|wrong-length"),
    "text": (lambda data: b"no audio at all", "unreadable-audio"),
    "rate in the header": (lambda data: data[:24] + b"\x40\x1f" + data[26:], "sampling-rate"),
}
AUDIO_VALUES = {
    "8 kHz file": (lambda samples: (samples[::2], 8000), "sampling-rate"),
    "two channels in the file": (lambda samples: (np.stack([samples] * 2, 1), 16000), "channels"),
    "half the samples": (lambda samples: (samples[: len(samples) // 2], 16000), "wrong-length"),
    "0.4 s too few": (lambda samples: (samples[:-6400], 16000), "wrong-length"),
    "one nan": (lambda samples: (np.append(samples[:-1], np.nan), 16000), "not-finite"),
    "infinite": (lambda samples: (np.append(samples[:-1], np.inf), 16000), "not-finite"),
}


# ---- the corpus


@pytest.fixture(scope="module")
def utterances(shared) -> list[tuple[str, str, np.ndarray]]:
    """Id, text and samples of short recordings."""
    lines = (shared / "corpora/an4/transcripts.tsv").read_text().splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    rows = [row for row in rows if 0.9 < float(row[5]) < 2.0][: EACH]
    files = [shared / "corpora/an4" / row[4] for row in rows]
    return [(row[0], row[3], soundfile.read(file)[0]) for row, file in zip(rows, files)]


class Corpus:
    """Damaged and whole cuts with files of their own, and what should be said of them."""

    def __init__(self, folder: Path, utterances):
        self.folder, self.utterances = folder, utterances
        self.lines, self.reasons = [], {}

    def add(self, kind: str, number: int, change=None, reason="", spoil=None, values=None):
        name, words, samples = self.utterances[number]
        cut_id = f"{name} {kind}"
        wav = self.folder / f"{len(self.lines)}.wav"
        rate = 16000
        if values:
            samples, rate = values(samples)
        soundfile.write(wav, samples, rate, subtype="FLOAT" if values else "PCM_16")
        whole = self.utterances[number][2]
        cut = Recording.from_file(wav, recording_id=cut_id).to_cut()
        if values:  # the manifest is of what was there before
            before = self.folder / "before.wav"
            soundfile.write(before, whole, 16000)
            cut = Recording.from_file(before, recording_id=cut_id).to_cut()
            cut.recording.sources[0].source = str(wav)
        cut.id = cut_id
        cut.supervisions = [SupervisionSegment(cut_id, cut_id, 0.0, cut.duration, text=words)]
        self.finish(cut.to_dict(), wav, change, spoil, reason, is_written=bool(values))

    def finish(self, line: dict, file: Path, change, spoil, reason, is_written):
        if reason and not (spoil or change or is_written):
            file.unlink()
        if spoil:
            file.write_bytes(spoil(file.read_bytes()))
        if change:
            change(line)
        self.lines.append(line)
        if reason:
            self.reasons[line["id"]] = reason

    def write(self) -> Path:
        path = self.folder / "an4_cuts_damaged.jsonl.gz"
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.lines)
        return path


class FeatureCorpus(Corpus):
    """The same with stored features."""

    def add(self, kind, number, change=None, reason="", spoil=None, values=None):
        name, words, samples = self.utterances[number]
        cut_id = f"{name} {kind}"
        wav = self.folder / "x.wav"
        soundfile.write(wav, samples, 16000)
        cut = Recording.from_file(wav, recording_id=cut_id).to_cut().with_id(cut_id)
        cut.supervisions = [SupervisionSegment(cut_id, cut_id, 0.0, cut.duration, text=words)]
        with NumpyFilesWriter(self.folder / "feats") as writer:
            cut = cut.compute_and_store_features(fbank_extractor(), writer)
        file = Path(cut.features.storage_path) / cut.features.storage_key
        if values:
            np.save(file, values(np.load(file)))
        self.finish(cut.to_dict(), file, change, spoil, reason, is_written=bool(values))


def damaged(corpus: Corpus, manifests: dict, files: dict, values: dict) -> Corpus:
    for number in range(EACH):
        corpus.add("whole", number)
        for kind, (change, reason) in manifests.items():
            corpus.add(kind, number, change=change, reason=reason)
        for kind, (spoil, reason) in files.items():
            corpus.add(f"file {kind}", number, spoil=spoil, reason=reason)
        for kind, (function, reason) in values.items():
            corpus.add(f"values {kind}", number, values=function, reason=reason)
    return corpus


@pytest.fixture(scope="module", params=["features", "audio"])
def corpus(request, utterances, tmp_path_factory) -> tuple[Path, dict[str, str], dict]:
    """The cut file, the reason of every damaged id, and options of what reads it."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "features":
        made = damaged(FeatureCorpus(folder, utterances), MANIFEST | FEATURES, FEATURE_FILES,
                       FEATURE_VALUES)  # fmt: skip
    else:
        made = Corpus(folder, utterances)
        made = damaged(made, MANIFEST | AUDIO, AUDIO_FILES, AUDIO_VALUES)
    return made.write(), made.reasons, {"on_the_fly_feats": request.param == "audio"}


def as_expected(found: dict[str, str], expected: dict[str, str]) -> bool:
    """The same ids, each with one of its possible reasons."""
    wrong = {
        name: (found.get(name), expected.get(name))
        for name in found.keys() | expected.keys()
        if found.get(name) not in expected.get(name, "").split("|")
    }
    assert wrong == {}
    return True


def test_there_are_more_than_two_hundred():
    kinds = 2 * len(MANIFEST) + sum(
        map(len, (FEATURES, FEATURE_FILES, FEATURE_VALUES, AUDIO, AUDIO_FILES, AUDIO_VALUES))
    )
    assert kinds * EACH > 200


def test_validate_manifest_names_every_one(corpus, capsys):
    path, reasons, options = corpus
    with pytest.raises(SystemExit):
        validate_manifest.main([
            str(path), "--read", "all", "--json", "true",
            "--on-the-fly-feats", str(options["on_the_fly_feats"]),
        ])  # fmt: skip
    found = {}
    for line in capsys.readouterr().out.splitlines():
        problem = json.loads(line)
        assert problem["sentence"] and "\n" not in problem["sentence"]
        found.setdefault(problem["id"], problem["reason"])
    assert as_expected(found, reasons)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_leaves_out_exactly_these(corpus, num_workers):
    path, reasons, options = corpus
    need_features = not options["on_the_fly_feats"]
    statistics = check_cuts([path], tolerate=True, need_features=need_features)
    found = {faults[0].id: faults[0].reason for faults in statistics.bad_cuts}
    batches = list(training_loader(
        cuts_within([path], bad=statistics.bad), max_duration=9.0, num_cuts=statistics.kept,
        num_workers=num_workers, drop_last=False, enable_spec_aug=False, **options,
    ))  # fmt: skip
    for batch in batches:
        assert batch["features"].isfinite().all()
        assert len(batch["texts"]) == batch["features"].size(0) == max(1, len(batch["ids"]))
        found |= {fault.id: fault.reason for fault in batch["bad"]}
    assert as_expected(found, reasons)
    used = Counter(cut_id for batch in batches for cut_id in batch["ids"])
    assert len(used) == EACH and set(used.values()) == {1}
    assert all(cut_id.endswith(" whole") for cut_id in used)


def test_decoding_drops_none_and_scores_them_as_deletions(corpus):
    path, reasons, options = corpus

    def echo(batches):
        for batch in batches:
            yield batch, [text.upper() + " AND MORE" for text in batch["texts"]]

    decoded = decode_cuts(path, echo, max_duration=9.0, num_workers=0, **options)
    assert [one.cut.id for one in decoded] == [
        json.loads(line)["id"] for line in gzip.open(path, "rt")
    ]
    texts = [one.answer or "" for one in decoded]
    for one, (_, reference, hypothesis) in zip(decoded, results(decoded, texts), strict=True):
        kind = reasons.get(one.cut.id, "")
        if kind in TEXT_ONLY and all(isinstance(s.text, str) for s in one.cut.supervisions):
            kind = "" if one.cut.supervisions else kind
        if kind:
            assert one.fault and one.fault.reason in kind.split("|"), one.cut.id
            assert hypothesis == []
        else:
            assert one.fault is None and hypothesis[-2:] == ["and", "more"]
            assert hypothesis[:-2] == reference or "?" in " ".join(reference)


# ---- files


@pytest.fixture(scope="module")
def good(utterances, tmp_path_factory):
    corpus = FeatureCorpus(tmp_path_factory.mktemp("good"), utterances)
    for number in range(EACH):
        corpus.add("whole", number)
    return corpus.write()


def recordings(text: bytes) -> bytes:
    lines = [json.loads(line) for line in text.splitlines()]
    return b"".join(
        json.dumps({"id": line["id"], "sources": [], "sampling_rate": 16000, "num_samples": 9,
                    "duration": 1.0, "channel_ids": [0]}).encode() + b"\n"
        for line in lines
    )  # fmt: skip


FILES = {
    "empty": lambda whole: b"",
    "empty inside": lambda whole: gzip.compress(b""),
    "no gzip": lambda whole: gzip.decompress(whole),
    "cut off in the middle": lambda whole: whole[: len(whole) // 2],
    "cut off at the end": lambda whole: whole[:-5],
    "a bit of the check sum": lambda whole: whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:],
    "garbage among the lines": lambda whole: gzip.compress(
        gzip.decompress(whole).replace(b"\n", b"\n{{\n", 1)),
    "no UTF-8": lambda whole: gzip.compress(b"\xff\xfe\n" + gzip.decompress(whole)),
    "recordings": lambda whole: gzip.compress(recordings(gzip.decompress(whole))),
    "other JSON": lambda whole: gzip.compress(b'{"audio": "a.wav", "text": "a"}\n'),
    "a list": lambda whole: gzip.compress(b"[1, 2]\n"),
    "random": lambda whole: np.random.default_rng(0).bytes(len(whole)),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_cannot_be_read_stops_all_with_a_sentence(good, tmp_path, capsys, kind):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(FILES[kind](good.read_bytes()))
    with pytest.raises(SystemExit):
        validate_manifest.main([str(path), "--json", "true"])
    problems = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert problems and {problem["reason"] for problem in problems} == {"no-cut"}
    for read in (
        lambda: check_cuts([path], tolerate=True),
        lambda: decode_cuts(path, iter, max_duration=9.0, num_workers=0),
    ):
        with pytest.raises(ValueError) as error:
            read()
        assert str(error.value).startswith(f"{path} cannot be read beyond cut ")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "reason"), [("", "bad-id"), (7, "bad-id"), ("a\nb", "bad-id"), (None, "duplicate-id")]
)
def test_ids_that_results_cannot_have(good, tmp_path, capsys, name, reason):
    lines = [json.loads(line) for line in gzip.open(good, "rt")]
    lines[3]["id"] = lines[0]["id"] if name is None else name
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    with pytest.raises(SystemExit):
        validate_manifest.main([str(path), "--json", "true"])
    [problem] = map(json.loads, capsys.readouterr().out.splitlines())
    assert (problem["line"], problem["reason"]) == (4, reason)
    statistics = check_cuts([path], tolerate=True)
    assert [*statistics.bad[path]] == [3] and statistics.kept == EACH - 1
    with pytest.raises(ValueError, match=problem["sentence"].replace("\\", ".")):
        decode_cuts(path, iter, max_duration=9.0, num_workers=0)

"""Manifest lines that execute a command, or read by other means, when their data is loaded."""

import gzip
import json
from pathlib import Path


def recording(kind: str, source: str) -> dict:
    source = {"type": kind, "channels": [0], "source": source}
    return {
        "id": "r", "sources": [source], "sampling_rate": 16000, "num_samples": 16000,
        "duration": 1.0, "channel_ids": [0],
    }  # fmt: skip


def stored(storage_type: str, path: str, key: str = "0,1") -> dict:
    return {
        "type": "fbank", "num_frames": 100, "num_features": 80, "frame_shift": 0.01, "start": 0,
        "sampling_rate": 16000, "duration": 1.0, "storage_type": storage_type, "channels": 0,
        "storage_path": path, "storage_key": key, "recording_id": "r",
    }  # fmt: skip


def cut_of(**fields) -> dict:
    supervision = {
        "id": "s", "recording_id": "r", "start": 0.0, "duration": 1.0, "channel": 0, "text": "one",
    }  # fmt: skip
    return {
        "type": "MonoCut", "id": "cut-7", "start": 0.0, "duration": 1.0, "channel": 0,
        "supervisions": [supervision], **fields,
    }  # fmt: skip


def hostile_cuts(canary) -> dict[str, tuple[dict, str]]:
    """Map each attack to a cut and the error message."""
    run = f"mkdir {canary}"
    good, bad = recording("file", "/x.wav"), recording("command", run)
    from_command = f"its audio comes from a command, '{run}'"
    array = {"storage_type": "memory_raw", "storage_path": "", "storage_key": "x", "shape": [2]}
    reverb = {"name": "ReverbWithImpulseResponse", "kwargs": {"rir": bad, "rir_channels": [0]}}
    speech = cut_of()["supervisions"][0]
    runs_pipe = f"it would run 'pipe:{run}'"
    return {
        "command": (cut_of(recording=bad), from_command),
        "pipe": (cut_of(recording=recording("url", f"pipe:{run}")), runs_pipe),
        "shell in a name": (
            cut_of(recording=recording("file", f"/x;{run};.SPH")),
            f"its file name '/x;{run};.SPH' would reach a shell",
        ),
        "hdfs": (
            cut_of(recording=recording("url", "hdfs:///x.wav")), "it would read from hdfs://, "
        ),
        "features of a pipe": (
            cut_of(recording=good, features=stored("lilcom_files", f"pipe:{run} #")),
            f"it would run 'pipe:{run} #'",
        ),
        "features' key": (
            cut_of(recording=good, features=stored("lilcom_files", ".", f"pipe:{run}")), runs_pipe
        ),
        "kaldi": (
            cut_of(recording=good, features=stored("kaldiio", "feats.scp", f"{run} |")),
            "its data is stored as 'kaldiio'",
        ),
        "custom array": (
            cut_of(recording=good, custom={"x": array}),
            "its data is stored as 'memory_raw'",
        ),
        "of a supervision": (
            cut_of(recording=good, supervisions=[speech | {"custom": {"far": bad}}]), from_command
        ),
        "transform": (cut_of(recording=good | {"transforms": [reverb]}), from_command),
        "track": (
            {"type": "MixedCut", "id": "cut-7",
             "tracks": [{"type": "MonoCut", "cut": cut_of(recording=good), "offset": 0.0},
                        {"type": "MonoCut", "cut": cut_of(recording=bad), "offset": 1.0}]},
            from_command,
        ),
    }  # fmt: skip


def set_in(*keys, value):
    """Return a change of a cut's JSON: the value of a nested field."""

    def change(cut):
        for key in keys[:-1]:
            cut = cut[key]
        cut[keys[-1]] = value

    return change


def write_lines(path: Path, lines: list[dict]) -> Path:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


def edit(path: Path, **changes) -> None:
    """Apply `id=function` to the JSON of the cuts in a file."""
    with gzip.open(path, "rt") as file:
        cuts = [json.loads(line) for line in file]
    for cut in cuts:
        changes.get(cut["id"], lambda cut: None)(cut)
    write_lines(path, cuts)

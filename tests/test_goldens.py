"""check_goldens.py passes for the golden files, and fails after any small change to them."""

import json
import shutil

import check_goldens
import pytest
import torch
from golden_files import GOLDENS, SHARED_GOLDENS, golden_path

RESULTS = ("results-sample.json", "recogs-sample.txt", "errs-sample.txt")


@pytest.fixture
def check(capsys):
    """Return a function: folder -> exit status and output of check_goldens.py."""

    def run(folder):
        with pytest.raises(SystemExit) as exit:
            check_goldens.main([str(folder)])
        return exit.value.code, capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    "folder, count",
    [(GOLDENS, 5), pytest.param(SHARED_GOLDENS, 9, marks=[pytest.mark.shared, pytest.mark.slow])],
    ids=["tests", "shared"],
)
def test_all_golden_files_agree(check, folder, count):
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    status, output = check(folder)
    assert status == 0
    assert output.count(" ok\n") == count and output.endswith(f"{count} of {count} files agree\n")


def added(value, *path):
    """Return a change that adds `value` to the number, or a tensor's first element, at `path`."""

    def change(golden):
        for key in path[:-1]:
            golden = golden[key]
        if torch.is_tensor(golden[path[-1]]):
            golden[path[-1]][(0,) * golden[path[-1]].ndim] += value
        else:
            golden[path[-1]] += value

    return change


SMALL = 2e-3
CHANGES = {
    "zipformer_tiny.pt": [
        added(SMALL, "alone", 2, "encoder_out"),
        added(SMALL, "stack_outputs_first", 1),
    ],
    "causal_zipformer_tiny.pt": [
        added(SMALL, "masked", 1, "encoder_out", 2),
        added(SMALL, "streaming", 0, "encoder_out", 0),
    ],
    "zipformer_medium_keys.json": [
        lambda golden: golden["parameters"].pop("encoder_embed.conv.0.bias")
    ],
    "speech_llm_baseline.pt": [
        added(SMALL, "batch_loss"),
        added(SMALL, "alone", 1, "label_logits"),
        added(SMALL, "alone", 0, "speech_features", 0),
        added(1, "alone", 0, "generated"),
        added(1, "alone", 0, "generated_beam4"),
        added(1, "labels"),
    ],
    "speech_llm_mose.pt": [
        added(SMALL, "alone", 1, "speech_features", 1),
        lambda golden: golden["pretrained"].reverse(),
    ],
    "scaled_adam.pt": [
        lambda golden: added(SMALL, next(iter(golden["init"])))(
            golden["trajectory"][max(golden["trajectory"])]
        ),
        added(0.001, "lr"),
    ],
}
CASES = [
    pytest.param(name, change, marks=[] if (GOLDENS / name).exists() else pytest.mark.shared)
    for name in CHANGES
    for change in CHANGES[name]
]


@pytest.mark.slow
@pytest.mark.parametrize("name, change", CASES)
def test_a_small_change_is_detected(check, tmp_path, name, change):
    path = golden_path(name)
    if name.endswith(".json"):
        golden = json.loads(path.read_text())
        change(golden)
        (tmp_path / name).write_text(json.dumps(golden))
    else:
        golden = torch.load(path, weights_only=True)
        change(golden)
        torch.save(golden, tmp_path / name)
    status, output = check(tmp_path)
    assert status == 1
    assert output.startswith(f"{name}: ") and "FAILED" in output
    assert output.endswith("0 of 1 files agree\n")


def test_a_changed_letter_and_a_damaged_file_are_detected(check, tmp_path):
    for name in RESULTS:
        shutil.copy(GOLDENS / name, tmp_path)
    assert check(tmp_path)[0] == 0
    (tmp_path / "zipformer_other.pt").write_bytes(b"nothing")
    status, output = check(tmp_path)
    assert status == 1 and output.endswith("1 of 2 files agree\n")
    path = tmp_path / "errs-sample.txt"
    path.write_text(path.read_text().replace("stew", "stem", 1))
    status, output = check(tmp_path)
    assert status == 1 and output.endswith("0 of 2 files agree\n")


def test_a_folder_without_golden_files_fails(check, tmp_path):
    assert check(tmp_path)[0] == 1
    with pytest.raises(SystemExit, match="usage: check_goldens.py DIR; .* is not a directory"):
        check_goldens.main([str(tmp_path / "none")])

"""tests/check_goldens.py agrees with the golden files, and disagrees with any change to them."""

import json
import shutil

import check_goldens
import pytest
import torch


@pytest.fixture
def verdict(capsys):
    """The exit status for a folder, and what is printed."""

    def run(folder):
        with pytest.raises(SystemExit) as exit:
            check_goldens.main([str(folder)])
        return exit.value.code, capsys.readouterr().out

    return run


def test_all_golden_files_agree(shared, verdict):
    status, said = verdict(shared / "goldens")
    assert status == 0
    assert said.count(" ok\n") == 7 and said.endswith("7 of 7 files agree\n")


def added(value, *path):
    """A change: `value` added to the first number of the tensor (or to the number) at `path`."""

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
        added(SMALL, "alone", 0, "encoder_out"),
        added(SMALL, "alone", 2, "embed"),
        added(SMALL, "stack_outputs_first", 1),
        added(1, "encoder_out_lens"),
        added(0.05, "state_dict", "encoder.encoders.0.layers.0.norm.bias"),
    ],
    "zipformer_medium_keys.json": [
        added(1, "parameters", "encoder_embed.conv.0.bias", 0),
        lambda golden: golden["parameters"].pop("encoder_embed.conv.0.bias"),
        lambda golden: golden["buffers"].update(mean=[80]),
    ],
    "speech_llm_baseline.pt": [
        added(SMALL, "batch_loss"),
        added(SMALL, "alone", 1, "label_logits"),
        added(SMALL, "alone", 0, "loss"),
        added(SMALL, "alone", 0, "speech_features", 0),
        added(1, "alone", 1, "num_prompt_embeds"),
        added(1, "alone", 0, "generated"),
        added(1, "alone", 0, "generated_beam4"),
        added(1, "input_ids"),
        added(1, "labels"),
        added(0.1, "checkpoint", "model", "encoder_projector.proj.3.bias"),
        lambda golden: golden["checkpoint"]["model"].pop("encoder_projector.proj.3.bias"),
    ],
    "speech_llm_mose.pt": [
        added(SMALL, "batch_loss"),
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


@pytest.mark.parametrize(
    "name, change", [(name, change) for name in CHANGES for change in CHANGES[name]]
)
def test_a_small_change_is_noticed(shared, verdict, tmp_path, name, change):
    path = shared / "goldens" / name
    if name.endswith(".json"):
        golden = json.loads(path.read_text())
        change(golden)
        (tmp_path / name).write_text(json.dumps(golden))
    else:
        golden = torch.load(path, weights_only=True)
        change(golden)
        torch.save(golden, tmp_path / name)
    status, said = verdict(tmp_path)
    assert status == 1
    assert said.startswith(f"{name}: ") and "FAILED" in said
    assert said.endswith("0 of 1 files agree\n")


@pytest.mark.parametrize("changed", ["recogs-sample.txt", "errs-sample.txt", "results-sample.json"])
def test_a_changed_letter_is_noticed(shared, verdict, tmp_path, changed):
    for name in ("results-sample.json", "recogs-sample.txt", "errs-sample.txt"):
        shutil.copy(shared / "goldens" / name, tmp_path)
    assert verdict(tmp_path)[0] == 0
    text = (tmp_path / changed).read_text()
    assert "stew" in text
    (tmp_path / changed).write_text(text.replace("stew", "stem", 1))
    status, said = verdict(tmp_path)
    assert status == 1 and "FAILED" in said


def test_a_damaged_file_does_not_hide_the_others(shared, verdict, tmp_path):
    shutil.copy(shared / "goldens" / "zipformer_medium_keys.json", tmp_path)
    (tmp_path / "zipformer_other.pt").write_bytes(b"nothing")
    status, said = verdict(tmp_path)
    assert status == 1 and said.endswith("1 of 2 files agree\n")


def test_a_folder_without_golden_files_is_no_success(verdict, tmp_path):
    assert verdict(tmp_path)[0] == 1
    with pytest.raises(SystemExit, match="usage: check_goldens.py DIR; .* is no folder"):
        check_goldens.main([str(tmp_path / "none")])

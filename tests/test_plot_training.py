"""plot_training.py: curves from tensorboard files, the figure and the page."""

import pytest
from parsed_html import outside, parsed

import plot_training
from speechllm.training.metrics import TensorBoard


def write(exp_dir, values, purge_step=None):
    """Write values by step and name as the training loop does."""
    folder = exp_dir / "tensorboard"
    before = set(folder.glob("*"))
    board = TensorBoard(folder, True, purge_step)
    for step, named in values.items():
        board.add("train/", named, step)
    board.close()
    (file,) = set(folder.glob("*")) - before
    file.rename(folder / f"events.out.tfevents.{1000 + len(before)}.x")  # as if a second later


LOSSES = {
    step: {"tot_loss": 4 / step, "current_loss": 5 / step, "tot_acc": 1 - 1 / step,
           "learning_rate": 0.1 / step, "audio_seconds_per_second": 100.0 + step}
    for step in (1, 2, 4, 5)
}  # fmt: skip
VALID = {0: {"valid_loss": 6.0, "valid_acc": 0.1}, 4: {"valid_loss": 2.0, "valid_acc": 0.5},
         5: {"valid_loss": 3.0, "valid_acc": 0.25}}  # fmt: skip


@pytest.fixture
def exp(tmp_path):
    write(tmp_path / "exp", LOSSES)
    write(tmp_path / "exp", VALID)
    return tmp_path / "exp"


def test_a_resumed_training_is_one_curve(tmp_path):
    """Killed after step 5, resumed from 3, and so on: lost steps are not drawn."""
    from speechllm.reports.training_curves import read_curves  # imports matplotlib

    write(tmp_path, {i: {"tot_loss": 1.0, "valid_loss": 1.0} for i in (1, 3, 5)})
    write(tmp_path, {i: {"tot_loss": 2.0} for i in (4, 6)}, purge_step=4)
    write(tmp_path, {i: {"tot_loss": 3.0} for i in (6, 8)}, purge_step=6)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3
    curves = read_curves(tmp_path)
    assert curves["tot_loss"] == [(1, 1.0), (3, 1.0), (4, 2.0), (6, 3.0), (8, 3.0)]
    assert curves["valid_loss"] == [(1, 1.0), (3, 1.0)]


@pytest.mark.slow
def test_html(exp, tmp_path, capsys):
    out = tmp_path / "new" / "x.html"
    plot_training.main([str(exp), "--out", str(out)])
    assert capsys.readouterr().out == f"Wrote {out}\n"
    page = parsed(out.read_text(encoding="utf-8"))
    (svg,) = page.all("svg")
    assert {"loss", "accuracy", "learning rate"} <= {text.text for text in svg.all("text")}
    assert outside(page) == [] and not page.all("script")
    plot_training.main([str(exp), "--out", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_folder_names_are_escaped(tmp_path):
    names = ["<script>alert(1)<", "a&b", "--><b>c"]
    for name in names:
        write(tmp_path / name, LOSSES)
    out = tmp_path / "x.html"
    plot_training.main([*(str(tmp_path / name) for name in names), "--out", str(out)])
    page = parsed(out.read_text(encoding="utf-8"))
    assert not page.all("script") and not page.all("b")
    labels = {text.text for text in page.all("svg")[0].all("text")}
    assert {str(tmp_path / name) for name in names} <= labels


def test_user_errors(exp, tmp_path):
    (tmp_path / "empty" / "tensorboard").mkdir(parents=True)
    TensorBoard(tmp_path / "begun" / "tensorboard", True).close()
    for argv, sentence in (
        ((exp, "--out", "x.pdf"), "--out x.pdf must end in .html or .png"),
        ((tmp_path / "none", "--out", "x.png"), "none/tensorboard has no events"),
        ((exp, tmp_path / "empty", "--out", "x.png"), "empty/tensorboard has no events"),
        ((tmp_path / "begun", "--out", "x.png"), "begun/tensorboard has no values yet"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            plot_training.main(list(map(str, argv)))

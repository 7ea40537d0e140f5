"""Curves of trainings from tensorboard's files, and what is drawn of them."""

import math

import pytest
from parsed_html import outside, parsed

import plot_training
from plot_training import one_curve, plot, read_curves, rows
from speechllm.training.metrics import TensorBoard


def write(exp_dir, values, purge_step=None):
    """From steps to values by name, as the training loop writes them."""
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
    write(tmp_path / "exp", {1: {"epoch": 1}, 4: {"epoch": 2}})
    return tmp_path / "exp"


def test_curves(exp):
    curves = read_curves(exp)
    assert curves["tot_loss"] == [(1, 4.0), (2, 2.0), (4, 1.0), (5, pytest.approx(0.8))]
    assert curves["valid_loss"] == [(0, 6.0), (4, 2.0), (5, 3.0)]
    assert curves["epoch"] == [(1, 1.0), (4, 2.0)]


def test_a_resumed_training_is_one_curve(tmp_path):
    """Killed after step 5, resumed from 3, and so on: what was lost is not drawn."""
    write(tmp_path, {i: {"tot_loss": 1.0, "valid_loss": 1.0} for i in (1, 3, 5)})
    write(tmp_path, {i: {"tot_loss": 2.0} for i in (4, 6)}, purge_step=4)
    write(tmp_path, {i: {"tot_loss": 3.0} for i in (6, 8)}, purge_step=6)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3
    curves = read_curves(tmp_path)
    assert curves["tot_loss"] == [(1, 1.0), (3, 1.0), (4, 2.0), (6, 3.0), (8, 3.0)]
    assert curves["valid_loss"] == [(1, 1.0), (3, 1.0)]


def test_a_training_that_began_anew_is_the_new_one():
    assert one_curve([(1, 0.1), (2, 0.2), (3, 0.3), (1, 0.4), (2, 0.5)]) == [(1, 0.4), (2, 0.5)]
    assert one_curve([(1, 0.1), (2, 0.2), (2, 0.3)]) == [(1, 0.1), (2, 0.3)]


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_what_is_drawn(exp):
    drawn = panels(plot({"exp": read_curves(exp)}))
    assert list(drawn) == ["loss", "accuracy", "learning rate", "audio seconds per second"]
    loss, speed = drawn["loss"], drawn["audio seconds per second"]
    lines = dict(zip([t.get_text() for t in loss.get_legend().get_texts()], loss.lines))
    assert list(lines) == ["tot", "valid", "current"]
    assert list(lines["valid"].get_xdata()) == [0, 4, 5]
    assert list(lines["valid"].get_ydata()) == [6, 2, 3]
    assert loss.get_yscale() == "log" and speed.get_yscale() == "linear"
    assert list(speed.lines[0].get_ydata()) == [101, 102, 104, 105]


def test_several_trainings_are_told_apart(exp):
    curves = read_curves(exp)
    names = ["_one", "$two$", "three"]
    three = {**dict.fromkeys(names[:2], curves), "three": {"grad_norm": [(1, 2.0)]}}
    figure = plot(three)
    drawn = panels(figure)
    legend = [text.get_text() for text in drawn["learning rate"].get_legend().get_texts()]
    assert legend == names[:2]
    assert len({line.get_color() for line in drawn["learning rate"].lines}) == 2
    assert [text.get_text() for text in drawn["gradient norm"].get_legend().get_texts()] == [
        "three"
    ]
    assert "_one valid" in [text.get_text() for text in drawn["loss"].get_legend().get_texts()]
    texts = [text.text for text in parsed(plot_training.svg(figure)).all("text")]
    assert "$two$" in texts


def test_table(exp):
    broken = {"tot_loss": [(1, 2.0)], "valid_loss": [(0, math.nan)]}
    names, first, second = rows({"exp": read_curves(exp), "broken": broken})
    assert dict(zip(names, first)) == {
        "training": "exp", "epoch": "2", "loss": "0.8000", "accuracy": "80.00%",
        "best validation loss": "2.0000 after 4", "best validation accuracy": "50.00% after 4",
        "learning rate": "2.00e-02", "audio s/s": "105.0",
    }  # fmt: skip
    assert second == ["broken", "-", "2.0000", "-", "-", "-", "-", "-"]


def test_wer_of_a_pretraining(tmp_path):
    write(tmp_path, {1: {"valid_wer": 90.0}, 2: {"valid_wer": 30.0}, 3: {"valid_wer": 40.0}})
    curves = read_curves(tmp_path)
    assert list(panels(plot({"x": curves}))) == ["WER %"]
    assert rows({"x": curves})[1] == ["x", "30.00 after 2"]


def test_html(exp, tmp_path, capsys):
    out = tmp_path / "new" / "x.html"
    plot_training.main([str(exp), "--out", str(out)])
    assert capsys.readouterr().out == f"Written: {out}\n"
    page = parsed(out.read_text(encoding="utf-8"))
    assert page.all("table")[0].rows()[1][:3] == [str(exp), "2", "0.8000"]
    (svg,) = page.all("svg")
    assert {"loss", "accuracy", "learning rate"} <= {text.text for text in svg.all("text")}
    assert outside(page) == [] and not page.all("script")
    again = tmp_path / "again.html"
    plot_training.main([str(exp), "--out", str(again)])
    assert again.read_bytes() == out.read_bytes()


def test_png(exp, tmp_path):
    plot_training.main([str(exp), "--out", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_names_of_folders_stay_text(tmp_path):
    names = ["<script>alert(1)<", "a&b", "--><b>c"]
    for name in names:
        write(tmp_path / name, LOSSES)
    out = tmp_path / "x.html"
    plot_training.main([*(str(tmp_path / name) for name in names), "--out", str(out)])
    page = parsed(out.read_text(encoding="utf-8"))
    assert not page.all("script") and not page.all("b")
    labels = {text.text for text in page.all("svg")[0].all("text")}
    assert {str(tmp_path / name) for name in names} <= labels
    assert [row[0] for row in page.all("table")[0].rows()[1:]] == [str(tmp_path / n) for n in names]


def test_mistakes_are_said(exp, tmp_path):
    (tmp_path / "empty" / "tensorboard").mkdir(parents=True)
    TensorBoard(tmp_path / "begun" / "tensorboard", True).close()
    for argv, sentence in (
        ((exp, "--out", "x.pdf"), "--out x.pdf: it is a page"),
        ((tmp_path / "none", "--out", "x.png"), "none/tensorboard has no events"),
        ((exp, tmp_path / "empty", "--out", "x.png"), "empty/tensorboard has no events"),
        ((tmp_path / "begun", "--out", "x.png"), "begun/tensorboard has no values yet"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            plot_training.main(list(map(str, argv)))

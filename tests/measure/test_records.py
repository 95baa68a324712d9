"""The library in a notebook: `kd.runs`, its pandas frames, `kd.results`, and the plots as functions."""

from __future__ import annotations

import json
import shutil

import pytest

import kd
from kd.measure.compare import compare
from kd.report import plots
from kd.util.errors import UserError


@pytest.fixture
def folder(runs, teacher_run, tmp_path):
    """A folder of runs: one finished, one that is not, one below another folder, and one that is damaged."""
    for run, name in ((runs[0], "alone"), (runs[1], "begun"), (runs[2], "more/kd"), (runs[3], "torn")):
        shutil.copytree(run, tmp_path / "runs" / name)
    (tmp_path / "runs/begun/summary.json").unlink()
    (tmp_path / "runs/torn/config.yaml").write_text("data: 1\n")
    (tmp_path / "runs/alone/wandb").mkdir()
    (tmp_path / "runs/alone/wandb/config.yaml").write_text("wandb_version: 1\n")  # is no run
    return tmp_path / "runs"


def logged(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_frame_has_one_row_a_run(folder, capsys):
    found = kd.runs(folder)
    assert [run.name for run in found] == [str(folder / name) for name in ("alone", "begun", "more/kd")]
    (message,) = capsys.readouterr().out.splitlines()
    assert message.startswith("left out: ")
    assert "torn" in message
    frame = found.frame().set_index("run")
    for run in found:
        row, epochs = frame.loc[run.name], [line for line in logged(run.folder) if "epoch/loss" in line]
        accuracies = [line["val/accuracy"] for line in epochs]
        assert (row["epochs_done"], row["last_val_accuracy"]) == (2, accuracies[-1])
        assert row["best_val_accuracy"] == max(accuracies)
        assert accuracies[int(row["best_epoch"]) - 1] == max(accuracies)
        assert row["network"] == "mnist_student"
        assert row["source"] == "digits"
    summary = json.loads((folder / "more/kd/summary.json").read_text())
    row = frame.loc[str(folder / "more/kd")]
    for name in ("test_accuracy", "test_nll", "num_params", "multiply_adds", "seconds"):
        assert row[name] == summary[name]
    assert row["objective"].startswith("0.9 * KL(temperature=4.0")
    assert list(frame["finished"]) == [True, False, True]
    assert frame["test_accuracy"].isna().tolist() == [False, True, False]


def test_curves_hold_every_logged_number(folder):
    found = kd.runs(folder)
    curves = found.curves()
    for run in found:
        mine = curves[curves["run"] == run.name]
        for line in logged(run.folder):
            at = mine[mine["step"] == line["step"]]
            for name in line.keys() - {"step", "epoch"}:
                assert line[name] in at[at["metric"] == name]["value"].tolist()
        assert len(mine) == sum(len(line.keys() - {"step", "epoch"}) for line in logged(run.folder))


def test_a_line_that_is_being_written_is_left_out_and_a_damaged_one_is_named(folder):
    file = folder / "begun/metrics.jsonl"
    whole = logged(folder / "begun")
    file.write_text(file.read_text() + '{"step": 9, "los')
    assert kd.runs(folder)[1].metrics == whole
    file.write_text('{"step":\n' + file.read_text())
    with pytest.raises(UserError, match=r"line 1 of metrics\.jsonl"):
        _ = kd.runs(folder)[1].metrics


def test_mistakes_name_their_remedy(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        kd.runs(tmp_path / "nowhere")
    with pytest.raises(UserError, match="--report FOLDER"):
        kd.results(tmp_path)
    (tmp_path / "results.json").write_text('{"runs": []}')
    with pytest.raises(UserError, match="holds no results"):
        kd.results(tmp_path)


def test_learning_curves_draw_what_was_logged(runs):
    found = kd.runs(runs[0].parent)
    upper, lower = kd.plots.learning_curves(found).axes
    for axes, key in ((upper, "val/accuracy"), (lower, "epoch/loss")):
        drawn = [list(map(tuple, line.get_xydata())) for line in axes.lines]
        assert drawn == [[(line["epoch"], line[key]) for line in logged(run) if "epoch/loss" in line] for run in runs]
        assert axes.lines[0].get_color() == axes.lines[1].get_color() != axes.lines[2].get_color()
    (legend,) = kd.plots.learning_curves(found).legends
    assert [text.get_text() for text in legend.get_texts()] == ["alone*", "kd*"]


def test_learning_curves_of_epochs_of_different_lengths_are_drawn_against_the_step(folder):
    file = folder / "more/kd/metrics.jsonl"
    rows = [{**line, "step": 10 * line["step"]} for line in logged(folder / "more/kd")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    upper, lower = kd.plots.learning_curves(kd.runs(folder)).axes
    assert lower.get_xlabel() == "step"
    drawn = [list(map(tuple, line.get_xydata())) for line in upper.lines]
    names = ("alone", "begun", "more/kd")
    assert sorted(drawn) == sorted(
        [(line["step"], line["val/accuracy"]) for line in logged(folder / name) if "epoch/loss" in line]
        for name in names
    )


def test_accuracy_against_cost_marks_the_front(runs, teacher_run):
    rows = [kd.measure.records.Record(run).row for run in (teacher_run, *runs)]
    axes = plots.accuracy_against_cost(rows, "num_params").axes[0]
    points = {round(bar.lines[0].get_ydata()[0], 6) for bar in axes.containers}
    means = [rows[0]["top1"], (rows[1]["top1"] + rows[2]["top1"]) / 2, (rows[3]["top1"] + rows[4]["top1"]) / 2]
    assert points == {round(mean, 6) for mean in means}
    front = set(map(tuple, axes.lines[0].get_xydata()))
    best = max(means[1:])
    expected = {(rows[1]["num_params"], best)} | ({(rows[0]["num_params"], means[0])} if means[0] > best else set())
    assert front == expected
    assert axes.get_xlabel() == "parameters (log scale)"


@pytest.mark.slow
def test_plots_take_saved_results(call, runs, tmp_path):
    result = call("evaluate", runs[0], runs[2], "--latency", "false", "--json", tmp_path / "r.json")
    assert result.status == 0, result.err
    saved = kd.results(tmp_path / "r.json")
    rows, groups = saved["runs"], saved["groups"]
    assert groups == json.loads(json.dumps(compare(rows)))
    gains = plots.class_gains(rows, groups).axes[0]
    (marks,) = [line for line in gains.lines if line.get_marker() == "o"]
    assert list(marks.get_xdata()) == [
        rows[1]["per_class"][name] - rows[0]["per_class"][name] for name in rows[0]["per_class"]
    ]
    cells = plots.confusion(rows[0]).axes[0].texts
    assert sorted(int(text.get_text()) for text in cells) == sorted(
        n for line in rows[0]["confusion"] for n in line if n
    )
    for panel, row in zip(plots.reliability(rows).axes, rows, strict=True):
        bins = [(part["confidence"], part["accuracy"]) for part in row["reliability"] if part["count"]]
        assert [tuple(place) for place in panel.collections[-1].get_offsets()] == bins
    shown = plots.reliability(rows)._repr_png_()  # by a notebook
    assert shown[:4] == b"\x89PNG"
    assert shown == plots.png(plots.reliability(rows))


def test_more_than_twenty_classes_are_shown_by_their_most_frequent_mistakes():
    names = [f"class {i}" for i in range(30)]
    confused = [{"label": names[i], "predicted": names[i + 1], "count": 29 - i} for i in range(25)]
    row = {"run": "runs/x", "per_class": dict.fromkeys(names, 50.0), "confusion": None, "confused": confused}
    axes = plots.confusion(row).axes[0]
    assert [bar.get_width() for bar in axes.containers[0]][::-1] == [29 - i for i in range(20)]
    assert axes.get_yticklabels()[-1].get_text() == "class 0 → class 1"
    assert plots.most_unlike([{"a": 1.0, "b": -3.0, "c": None}, {"a": 0.0, "b": 0.0, "c": 2.0}], 2) == ["b", "c"]


def test_names_are_shortened_by_the_folder_they_share():
    assert plots.short_names(["runs/x/a", "runs/x/b*"]) == ["a", "b*"]
    assert plots.short_names(["runs/x/a"]) == ["a"]
    assert plots.short_names(["runs/x/a", "other/b"]) == ["runs/x/a", "other/b"]
    assert plots.short_names(["/runs/a", "runs/a"]) == ["/runs/a", "runs/a"]

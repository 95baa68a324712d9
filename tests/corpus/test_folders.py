"""Run folders that are strange, damaged, foreign or gone: only what is a run's own is deleted, and no run is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import assert_one_line
from refusing import (  # noqa: F401 (fixtures)
    NOTES,
    QUICK,
    _one_thread,
    contents,
    during,
    finished,
    losses,
    out,
    refused,
    runs,
    stopped,
    teacher,
    train,
)

import kd.run.folder
from kd.train.checkpoint import Progress, checkpoints, load_newest, save_checkpoint

pytestmark = pytest.mark.first_tier(1, every=5)

# Checkpoints


def flip(file: Path) -> None:
    """Damage a file by one bit."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_damaged_checkpoints_do_not_push_out_new_ones(tmp_path, capsys):
    """They counted among the newest two, so that each new one was deleted as it was written."""
    for step in (8, 9):
        flip(save_checkpoint(tmp_path, Progress(step=step), {}) / "state.json")
    assert load_newest(tmp_path) is None
    assert capsys.readouterr().out.count("is damaged") == 2
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, Progress(step=step), {})
        assert load_newest(tmp_path)[0].step == step
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000003", "step_00000002"]
    assert (tmp_path / "damaged_step_00000009").is_dir()


def test_the_checkpoint_just_written_is_never_deleted(tmp_path):
    for step in (8, 9, 1):
        saved = save_checkpoint(tmp_path, Progress(step=step), {})
    assert saved.is_dir()
    assert len(checkpoints(tmp_path)) == 2


def test_folders_of_the_users_own_beside_checkpoints_are_let_be(tmp_path):
    names = ("step_best", "step_keep", "step_000000010", "notes.tmp-1")
    for name in names:
        (tmp_path / name).mkdir()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, Progress(step=step), {})
    assert load_newest(tmp_path)[0].step == 3
    assert all((tmp_path / name).is_dir() for name in names)


# What --overwrite true deletes


@pytest.mark.parametrize("field", ["teacher", "init_from", "weights"])
@pytest.mark.parametrize("linked", [False, True])
def test_what_a_run_begins_with_is_not_overwritten(train, teacher, tmp_path, field, linked):
    before = contents(teacher)
    (tmp_path / "link").symlink_to(teacher)
    given = teacher / "model.safetensors" if field == "weights" else teacher
    place = tmp_path / "link" if linked else teacher
    script = "distill" if field == "teacher" else "train_teacher"
    more = () if field == "teacher" else ("--model", "mnist_teacher")
    result = train(f"--{field}", given, *more, "--output_dir", place, "--overwrite", "true", script=script)
    assert_one_line(result, str(place), field, "--overwrite true would delete", "another output_dir")
    assert contents(teacher) == before


def test_a_folder_with_a_config_of_another_program_is_not_overwritten(train, tmp_path):
    folder = tmp_path / "foreign"
    for name in ("config.yaml", "model.safetensors", "checkpoints/best.pt", "export/model.bin", "wandb/notes"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("optimizer: {lr: 1}\n")
    before = contents(folder)
    assert_one_line(train("--output_dir", folder, "--overwrite", "true"), str(folder), "is no run's config")
    assert contents(folder) == before


def test_overwrite_lets_be_what_a_run_did_not_write(train, finished):
    own = ["checkpoints/step_00000099/x", "wandb/offline-run-20260101_000000-abcd/x", "export/onnx/model.onnx"]
    users = ["checkpoints/step_best/x", "wandb/notes", "tensorboard/mine/x", "export/phone/x", "notes.txt"]
    for name in own + users:
        (finished / name).parent.mkdir(parents=True, exist_ok=True)
        (finished / name).write_bytes(NOTES)
    assert train("--seed", 3, "--overwrite", "true").status == 0
    assert not any((finished / name).exists() for name in own)
    assert all((finished / name).read_bytes() == NOTES for name in users)


def test_overwrite_does_not_follow_links(train, finished, tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_bytes(NOTES)
    for name in ("export/onnx", "checkpoints/step_00000009", "wandb/run-1"):
        (finished / name).parent.mkdir(exist_ok=True)
        (finished / name).symlink_to(tmp_path / "victim")
    assert train("--seed", 3, "--overwrite", "true").status == 0
    assert (tmp_path / "victim" / "file").read_bytes() == NOTES
    assert not (finished / "export").exists()


@pytest.fixture
def cohort(finished, runs) -> Path:
    """The finished run with what one of another network beside it would have left: `peer2`, and its record."""
    config = yaml.safe_load((finished / "config.yaml").read_text())
    for name, network in (("peer2", {"network": "peer2"}), ("mine", {})):
        shutil.copytree(runs / "teacher", finished / name, ignore=shutil.ignore_patterns(".*"))
        (finished / name / "config.yaml").write_text(yaml.safe_dump({**config, **network}))
    (finished / "peer2/export/onnx").mkdir(parents=True)
    return finished


@pytest.mark.parametrize("kept", [["peer2"], [], ["mine"], ["../teacher"], ["a\0b"], 5, None])
def test_networks_that_a_run_kept_are_overwritten_whatever_its_record_says(train, cohort, teacher, kept):
    inputs = json.loads((cohort / "inputs.json").read_text())
    (cohort / "inputs.json").write_text(json.dumps({**inputs, "kept": kept}))
    before = [contents(folder) for folder in (cohort / "mine", teacher)]
    result = train("--seed", 3, "--overwrite", "true")
    assert result.status == 0, result.err
    assert not (cohort / "peer2").exists()
    assert [contents(folder) for folder in (cohort / "mine", teacher)] == before


def test_networks_that_a_run_kept_are_known_after_a_kill(train, cohort, monkeypatch):
    delete = kd.run.folder.delete

    def killed(path, inside):
        if path == cohort / "peer2/config.yaml":
            raise KeyboardInterrupt
        delete(path, inside)

    with monkeypatch.context() as patched:
        patched.setattr(kd.run.folder, "delete", killed)
        assert train("--seed", 3, "--overwrite", "true").status == 130
    assert not (cohort / "inputs.json").exists()
    assert train("--seed", 3, "--overwrite", "true").status == 0
    assert not (cohort / "peer2").exists()


TERMS = losses(("Term", {"student": "peer*", "loss": {"class_path": "CrossEntropy"}}))
COHORT = ("--learner", "Cohort", "--losses", TERMS, "--overwrite", "true")


@pytest.mark.parametrize("kind", ["a file", "a folder", "another run"])
def test_what_has_the_name_of_a_network_to_keep_is_noticed_before_training(train, finished, runs, monkeypatch, kind):
    if kind == "a file":
        (finished / "peer2").write_bytes(NOTES)
    else:
        shutil.copytree(runs / "student", finished / "peer2", ignore=shutil.ignore_patterns(".*"))
    if kind == "a folder":
        (finished / "peer2/config.yaml").unlink()
    before = contents(finished)
    with monkeypatch.context() as patched:
        patched.setattr("kd.train.fit.take_step", None)
        assert_one_line(train(*COHORT), str(finished / "peer2"), "is something else", "move it")
    assert contents(finished) == before


@pytest.mark.parametrize("at", ["config.yaml", "model.safetensors"])
def test_a_network_whose_writing_was_cut_short_is_written_again(train, finished, monkeypatch, at):
    write = kd.run.folder.write_atomic

    def killed(path, content):
        if path == finished / "peer2" / at:
            path.with_name(f".{at}.tmp").write_bytes(content[:9])
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(kd.run.folder, "write_atomic", killed)
        assert train(*COHORT).status == 130
    result = train(*COHORT)
    assert result.status == 0, result.err
    assert (finished / "peer2/summary.json").is_file()


def test_a_damaged_record_is_overwritten(train, finished):
    (finished / "inputs.json").write_text("{")
    assert_one_line(train("--max_steps", 3), "inputs.json", "train it again with --overwrite true")
    assert train("--max_steps", 3, "--overwrite", "true").status == 0


# --overwrite true again


def test_what_a_killed_job_began_by_overwriting_resumes(train, finished, stopped):
    """As a job that SLURM queues again: it began from the start each time."""
    stopped("--seed", 3, "--overwrite", "true")
    result = train("--seed", 3, "--overwrite", "true", "--max_steps", 4)
    assert result.status == 0, result.err
    assert "is not deleted again" in result.out
    assert "resuming after step 2" in result.out


def test_a_finished_run_is_overwritten_again(train, finished):
    for _ in range(2):
        result = train("--overwrite", "true")
        assert result.status == 0, result.err
        assert "resuming" not in result.out
        assert "not deleted" not in result.out


@pytest.mark.parametrize("change", [("--seed", 4), ()])
def test_an_unfinished_run_that_was_not_begun_by_this_command_is_overwritten(train, stopped, change):
    stopped(*(("--overwrite", "true") if change else ()))
    result = train("--overwrite", "true", "--max_steps", 4, *change)
    assert result.status == 0, result.err
    assert "resuming" not in result.out


def test_a_run_that_was_deleted_in_part_does_not_go_on(train, finished, stopped, monkeypatch):
    """Killed while it deletes: what is left of the earlier run is not taken for the new one's."""
    stopped("--overwrite", "true")
    (finished / "summary.json").write_text("{}")
    delete, calls = kd.run.folder.delete, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 7:  # the record of how it began, the results, but not the checkpoints
            raise KeyboardInterrupt
        delete(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(kd.run.folder, "delete", killed)
        assert train("--overwrite", "true", "--max_steps", 4).status == 130
    assert not (finished / "summary.json").exists()
    assert checkpoints(finished / "checkpoints")
    result = train("--overwrite", "true", "--max_steps", 4)
    assert result.status == 0, result.err
    assert "resuming" not in result.out


# A refusal leaves nothing


def test_a_refusal_leaves_no_folder(train, tmp_path):
    assert_one_line(train("--model", "mnist_studnt", "--output_dir", tmp_path / "a" / "b" / "c"))
    assert not (tmp_path / "a").exists()


def test_a_refusal_leaves_no_lock(train, out, finished):
    (finished / ".lock").unlink(missing_ok=True)
    assert_one_line(train("--seed", 3), "another config")
    assert sorted(path.name for path in out.iterdir() if path.name[0] == ".") == [".notes"]
    (finished / ".lock").touch()
    assert_one_line(train("--seed", 3), "another config")
    assert (finished / ".lock").exists()


@pytest.mark.parametrize("place", ["/proc/none/x", "file/x/y", "loop/x"])
@pytest.mark.parametrize("flag", ["--output_dir", "--data.cache_dir"])
def test_a_folder_that_cannot_be_made(train, tmp_path, place, flag):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    place = tmp_path / place
    assert_one_line(train(flag, place, "--data.source", "digits", "--overwrite", "true"), str(place).split("/")[1])


# Folders in folders


def test_no_run_writes_in_the_folder_of_a_live_one_or_around_it(train, tmp_path):
    for live, other, words in (("run", "run/peer2/x", "lies in"), ("group/run", "group", "holds")):
        with kd.run.folder.Run(str(tmp_path / live), {}, False, True):
            assert_one_line(train("--output_dir", tmp_path / other), words, str(tmp_path / live), "in use by process")
        assert not (tmp_path / "run").exists()
        assert not (tmp_path / "group").exists()
    (tmp_path / "run").mkdir()
    for name in (".owner", ".lock"):  # of a run that was killed
        (tmp_path / "run" / name).touch()
    result = train("--output_dir", tmp_path / "run/peer2")
    assert result.status == 0, result.err


# A folder that vanishes while it is written to


@pytest.mark.parametrize("gone", ["the folder", "its files"])
@pytest.mark.parametrize("every", [1, 1000])
def test_an_output_folder_that_is_deleted_during_the_run(train, out, during, gone, every):
    """It ended with status 0 and without config.yaml and metrics.jsonl."""

    def vanish() -> None:
        for path in [out] if gone == "the folder" else [path for path in out.iterdir() if path.name[0] != "."]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    during(vanish)
    result = train("--max_steps", 4, "--checkpoint_every", every)
    assert_one_line(result, str(out), "was deleted while the run wrote to it", "metrics.jsonl")


# evaluate.py


@pytest.mark.parametrize("name", ["config.json", "config.yaml", "summary.json", "model.safetensors", "inputs.json"])
def test_results_are_not_written_over_a_runs_files(call, teacher, name):
    before = contents(teacher)
    result = call("evaluate", teacher, "--json", teacher / name, "--latency", "false")
    assert_one_line(result, str(teacher / name), "a run's file", "another")
    assert contents(teacher) == before


@pytest.mark.parametrize("flag", ["--json", "--report"])
def test_a_place_for_results_is_tried_before_anything_is_measured(call, teacher, tmp_path, flag):
    (tmp_path / "file").touch()
    result = call("evaluate", teacher, flag, tmp_path / "file" / "x", "--latency", "false")
    assert_one_line(result, str(tmp_path / "file"))
    assert "measure" not in result.err


def test_an_export_is_not_written_over_a_run(call, runs, teacher):
    before = contents(teacher)
    result = call("kd.tools.export.command", runs / "student", "--to", "safetensors", "--out", teacher, "--overwrite")
    assert_one_line(result, str(teacher / "model.safetensors"), "a run's file")
    assert contents(teacher) == before

"""Run folders that are strange, damaged, foreign or gone: only what is a run's own is deleted, and no run is lost."""

from __future__ import annotations

from pathlib import Path

from refusing import _one_thread, contents, finished, out, refused, runs, teacher, train  # noqa: F401 (fixtures)

from kd.train.checkpoint import Progress, checkpoints, load_newest, save_checkpoint

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

"""Deleting goes no further than the folder that it is given."""

from __future__ import annotations

import pytest

from kd.util.files import delete, write_atomic


@pytest.fixture
def folders(tmp_path):
    """`run`, in which something may be deleted, and beside it `victim`."""
    for name in ("run", "victim"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("kept")
    return tmp_path / "run", tmp_path / "victim"


@pytest.mark.parametrize("path", ["../victim", "x/../../victim", "..", ".", "link/file"])
def test_nothing_outside_is_deleted(folders, path):
    run, victim = folders
    (run / "link").symlink_to(victim)
    (run / "x").mkdir()
    with pytest.raises(ValueError, match="does not lie in"):
        delete(run / path, run)
    assert (victim / "file").read_text() == "kept"
    assert (run / "file").read_text() == "kept"


def test_files_folders_and_links_are_deleted(folders):
    run, victim = folders
    (run / "link").symlink_to(victim)
    (run / "a" / "b").mkdir(parents=True)
    for name in ("link", "a", "file", "absent"):
        delete(run / name, run)
    assert not list(run.iterdir())
    assert (victim / "file").read_text() == "kept"


def test_what_is_written_does_not_follow_a_link_in_the_place_of_what_is_renamed(folders):
    run, victim = folders
    (run / ".file.tmp").symlink_to(victim / "file")
    write_atomic(run / "file", b"new")
    assert (run / "file").read_bytes() == b"new"
    assert not (run / "file").is_symlink()
    assert (victim / "file").read_text() == "kept"

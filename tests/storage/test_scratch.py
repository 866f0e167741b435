"""Folders of dead owners are removed, and no others."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dist_tl.storage.scratch import MARKER, ScratchFolder, remove_stale

OWNER = """
import sys, time
from dist_tl.storage.scratch import ScratchFolder
folder = ScratchFolder("mine-", parent=sys.argv[1])
(folder.path / "data").write_text("x")
print(folder.path, flush=True)
time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path):
    """A program with a folder."""
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        program.folder = Path(program.stdout.readline().strip())
        yield program
        program.kill()


def test_the_folder_of_a_live_owner_stays_and_that_of_a_killed_one_goes(owner, tmp_path):
    remove_stale("mine-", parent=str(tmp_path))
    assert (owner.folder / "data").exists()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    seen = []
    remove_stale("mine-", parent=str(tmp_path), before=seen.append)
    assert seen == [owner.folder]
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_owner_is_alive(owner, tmp_path):
    owner.send_signal(signal.SIGSTOP)
    remove_stale("mine-", parent=str(tmp_path))
    assert (owner.folder / "data").exists()


def test_an_owner_never_removes_its_own_folder_as_stale(tmp_path):
    folder = ScratchFolder("mine-", parent=str(tmp_path))
    remove_stale("mine-", parent=str(tmp_path))
    assert folder.path.exists()
    assert (folder.path / MARKER).read_text() == f"{os.getpid()}\n"
    folder.remove()
    folder.remove()
    assert not folder.path.exists()


def test_folders_that_are_not_ours_stay(owner, tmp_path, monkeypatch):
    (tmp_path / "mine-but-made-by-another-program").mkdir()
    (tmp_path / "mine-is-a-file").touch()
    (tmp_path / "mine-is-a-link").symlink_to(owner.folder)
    owner.kill()
    owner.wait()
    uid = os.getuid()
    monkeypatch.setattr("os.getuid", lambda: uid + 1)
    remove_stale("mine-", parent=str(tmp_path))
    assert owner.folder.exists(), "it belongs to another user"
    monkeypatch.undo()
    remove_stale("yours-", parent=str(tmp_path))
    assert owner.folder.exists(), "it has another purpose"
    remove_stale("mine-", parent=str(tmp_path))
    assert not owner.folder.exists()
    assert len(list(tmp_path.iterdir())) == 3


def test_only_its_user_can_read_the_folder(tmp_path):
    folder = ScratchFolder("mine-", parent=str(tmp_path))
    assert folder.path.stat().st_mode & 0o777 == 0o700

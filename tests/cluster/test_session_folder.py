"""The folder of a private cluster is in TMPDIR, unless Ray's sockets would not fit there."""

import socket
import stat
import tempfile

import pytest

from dist_tl.cli.doctor import _temporary_folder as examine_temporary_folder
from dist_tl.cluster import session_folder
from dist_tl.cluster.session_folder import PREFIX, session_parent
from dist_tl.errors import WorkerError
from dist_tl.storage.scratch import ScratchFolder


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """TMPDIR and the only other folder; 20 bytes more than their parent are short enough."""
    monkeypatch.setattr(session_folder, "MAX_PARENT_BYTES", len(str(tmp_path)) + 20)
    monkeypatch.setattr(session_folder, "_OTHER_PARENTS", (str(tmp_path / "other"),))
    monkeypatch.setattr(tempfile, "tempdir", None)

    def make(name, other=True):
        (tmp_path / name).mkdir()
        if other:
            (tmp_path / "other").mkdir()
        monkeypatch.setenv("TMPDIR", str(tmp_path / name))
        return tmp_path / name, tmp_path / "other"

    return make


def test_the_folder_is_private_and_in_tmpdir(folders):
    tmpdir, _ = folders("mine")
    folder = ScratchFolder(PREFIX, parent=str(session_parent())).path
    assert folder.parent == tmpdir
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    check = examine_temporary_folder()
    assert (check.state, check.finding.split(",")[0]) == ("ok", str(tmpdir))


def test_a_tmpdir_that_is_too_long_for_sockets_is_not_used(folders):
    tmpdir, other = folders("x" * 20)
    assert session_parent() == other
    check = examine_temporary_folder()
    assert check.state == "note"
    assert f"{tmpdir}, " in check.finding
    assert f"too long for Ray's sockets, which will be in {other}" in check.finding


def test_without_any_folder_the_error_says_what_to_set(folders):
    folders("x" * 20, other=False)
    with pytest.raises(WorkerError, match=r"at most \d+ bytes; .* set TMPDIR"):
        session_parent()
    assert examine_temporary_folder().state == "fails"


def test_a_tmpdir_that_cannot_be_written_to_is_told(folders, tmp_path, monkeypatch):
    folders("mine")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    check = examine_temporary_folder()
    assert check.state != "ok"
    assert f"TMPDIR is {tmp_path / 'missing'}, which" in check.finding


def test_the_longest_path_that_is_allowed_is_the_longest_that_a_socket_can_have():
    parent = "/" + "p" * (session_folder.MAX_PARENT_BYTES - 1)
    with socket.socket(socket.AF_UNIX) as one, pytest.raises(FileNotFoundError):
        one.bind(parent + session_folder._LONGEST)
    with socket.socket(socket.AF_UNIX) as one, pytest.raises(OSError, match="path too long"):
        one.bind(parent + "p" + session_folder._LONGEST)

"""Contents of input files: manifests, pinned places, and the cache of hashes."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from dist_tl import contents
from dist_tl.config import fingerprint
from dist_tl.contents import (
    check_pin,
    differing_files,
    digest_of,
    manifest_of,
    pinned,
    relative_to,
    split_pin,
    without_places,
)
from dist_tl.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "data"
    (folder / "cat").mkdir(parents=True)
    for name in ("cat/1.png", "cat/2.png", "note.txt"):
        (folder / name).write_text(name)
        os.utime(folder / name, (1e9, 1e9))
    return relative_to(folder, sorted(p for p in folder.rglob("*") if p.is_file()))


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that are read to be hashed."""
    read, digest = [], hashlib.file_digest

    def counted(file, name):
        read.append(os.path.basename(file.name))
        return digest(file, name)

    monkeypatch.setattr(contents.hashlib, "file_digest", counted)
    return read


def test_a_manifest_has_size_and_sha256_of_each_file(files):
    manifest = manifest_of(files)
    assert manifest["cat/1.png"] == (9, hashlib.sha256(b"cat/1.png").hexdigest())
    assert list(manifest) == ["cat/1.png", "cat/2.png", "note.txt"]
    assert manifest_of({}) == {}


def test_only_changed_files_are_read_again(files, hashed):
    first = manifest_of(files)
    assert len(hashed) == 3
    assert manifest_of(files) == first
    assert len(hashed) == 3
    files["cat/2.png"].write_text("other pix")  # of the same size
    assert digest_of(manifest_of(files)) != digest_of(first)
    assert hashed[3:] == ["2.png"]


@pytest.mark.parametrize("change", ["replaced", "moved time stamp", "damaged cache"])
def test_the_cache_never_gives_the_hash_of_another_file(files, cache, change):
    before, path = manifest_of(files), files["cat/1.png"]
    stamp = path.stat().st_mtime_ns
    if change == "replaced":  # with the same size and time stamp, but another inode
        other = path.with_suffix(".new")
        other.write_text("cat/X.png")
        os.utime(other, ns=(stamp, stamp))
        other.rename(path)
    elif change == "moved time stamp":
        path.write_text("cat/X.png")
        os.utime(path, ns=(stamp + 1, stamp + 1))
    else:
        [stored] = (cache / "dist_tl" / "hashes").iterdir()
        stored.write_bytes(b"{")
    assert (manifest_of(files) == before) == (change == "damaged cache")


def test_a_file_that_has_just_been_written_is_not_cached(files, hashed):
    """It may change again within the resolution of its time stamp."""
    now = time.time()
    os.utime(files["cat/1.png"], (now, now))
    manifest_of(files)
    manifest_of(files)
    assert hashed.count("1.png") == 2
    assert hashed.count("2.png") == 1


@pytest.mark.parametrize("home", ["/proc/nothing", "~nobody-here/cache"])
def test_without_a_writable_cache_everything_is_hashed(files, hashed, monkeypatch, home):
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    assert manifest_of(files) == manifest_of(files)
    assert len(hashed) == 6


@pytest.mark.parametrize(
    ("place", "path", "digest"),
    [
        ("data", "data", ""),
        ("data#sha256=0123456789abcdef", "data", "0123456789abcdef"),
        (
            "s3://a/hub#sha256=0123456789abcdef/experts/x",
            "s3://a/hub/experts/x",
            "0123456789abcdef",
        ),
        ("a#b", "a#b", ""),
        ("a#sha256=xyz", "a#sha256=xyz", ""),
    ],
)
def test_a_pin_is_split_from_its_place(place, path, digest):
    assert split_pin(place) == (path, digest)


def test_a_fingerprint_has_the_content_of_a_pinned_place_and_not_the_path():
    digest = "0" * 16
    here, there = ({"path": pinned(place, digest), "size": 8} for place in ("/a/ü", 'b/"c"'))
    assert fingerprint(here) == fingerprint(there)
    assert fingerprint(here) != fingerprint({**here, "path": pinned("/a/ü", "1" * 16)})
    assert fingerprint(here) != fingerprint({**here, "size": 9})
    assert fingerprint({"path": "/a"}) != fingerprint({"path": "/b"})
    parts = [pinned(place, digest) + part for place in ("x", "y") for part in ("/1", "/2")]
    assert len({fingerprint({"path": part}) for part in parts}) == 2
    text = json.dumps({"a": 'say "no"', "path": pinned("x", digest), "b": "#sha256=0"})
    assert json.loads(without_places(text)) == {
        "a": 'say "no"',
        "path": f"sha256={digest}",
        "b": "#sha256=0",
    }


def test_a_changed_file_behind_a_pin_is_a_named_error(files, tmp_path):
    place = pinned(str(tmp_path / "data"), digest_of(manifest_of(files)))
    check_pin(place, files)
    check_pin("unpinned", {})
    files["note.txt"].write_text("changed")
    with pytest.raises(DataError, match=r"data has changed since the run started: .* restore"):
        check_pin(place, files)
    files["note.txt"].unlink()
    with pytest.raises(DataError, match=r"note.txt cannot be read"):
        check_pin(place, files)


def test_differing_files_are_named_and_counted():
    old = {str(i): (1, "a") for i in range(9)}
    new = {**dict.fromkeys(old, (1, "b")), "x": (1, "a")}
    del new["0"]
    expected = "x is new, 0 is gone, 1 differs, 2 differs, 3 differs and 5 more"
    assert differing_files(old, new) == expected
    assert differing_files(old, old) == ""


@pytest.mark.parametrize("folder", [".", "data", "/data", "data/x/.."])
def test_names_are_relative_to_their_folder(folder):
    paths = [Path(f"{folder}/a/1.png"), Path(f"{folder}/2.png")]
    assert list(relative_to(Path(folder), paths)) == ["a/1.png", "2.png"]

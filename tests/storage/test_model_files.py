"""Files of a model: their digests, and pinned places."""

import hashlib
import subprocess

import pytest

from dist_tl.contents import digest_of, pinned
from dist_tl.errors import ConfigError, DamagedError, DataError
from dist_tl.storage.model_files import (
    SUMS,
    model_manifest,
    read_all_files,
    read_model_files,
    read_named_files,
    write_manifest,
    write_model_files,
)
from dist_tl.storage.objects import ObjectStore

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "experts/a/config.json": b"a",
    "experts/a/model.safetensors": b"more weights",
    "README.md": b"a card",
}
MODEL = "stages/a/model"


@pytest.fixture
def store(tmp_path):
    store = ObjectStore(tmp_path / "run")
    write_model_files(store, MODEL, FILES)
    return store


def test_the_digests_are_those_that_sha256sum_checks(store, tmp_path):
    for folder in (MODEL, f"{MODEL}/experts/a"):
        command = ["sha256sum", "--check", "--strict", SUMS]
        done = subprocess.run(command, cwd=tmp_path / "run" / folder, capture_output=True)
        assert done.returncode == 0, done.stderr


def test_files_are_read_back_whole_and_one_by_one(store):
    assert read_all_files(store, MODEL) == FILES
    assert set(read_model_files(store, MODEL)) == {"config.json", "model.safetensors"}
    assert read_named_files(store, f"{MODEL}/experts/a", ["config.json"]) == {"config.json": b"a"}


@pytest.mark.parametrize("name", ["model.safetensors", "experts/a/config.json", SUMS])
@pytest.mark.parametrize("damage", [b"", b"{}", b"wEights", None])
def test_a_damaged_file_of_a_run_names_its_stage(store, name, damage):
    folder, _, file = f"{MODEL}/{name}".rpartition("/")
    store.delete(f"{folder}/{file}") if damage is None else store.write(f"{folder}/{file}", damage)
    if name == SUMS and damage is None:
        return  # nothing to compare with; the files are right
    wanted = "config.json" if file == SUMS else file
    with pytest.raises(DamagedError, match=r"is damaged: .*start the same job again") as raised:
        read_named_files(store, folder, [wanted])
    assert raised.value.marker == "stages/a/result.json"
    with pytest.raises(DamagedError):
        read_all_files(store, MODEL) if damage is not None else read_named_files(
            store, folder, [wanted]
        )


def test_a_damaged_folder_outside_of_the_run_has_no_marker(store, tmp_path):
    folder = tmp_path / "run" / MODEL
    (folder / "config.json").write_bytes(b"{ }")
    with pytest.raises(DamagedError, match="copy the folder again") as raised:
        read_model_files(ObjectStore(tmp_path / "other"), str(folder))
    assert raised.value.marker == ""


def test_a_folder_without_digests_is_read_as_it_is(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    assert read_model_files(ObjectStore(tmp_path), ".") == {
        "config.json": b"x",
        "model.safetensors": b"x",
    }
    with pytest.raises(ConfigError, match="no model at"):
        read_named_files(ObjectStore(tmp_path), ".", ["hub.json"])


@pytest.mark.parametrize("place", ["local", "remote"])
def test_a_pinned_model_that_changes_is_refused_by_name(store, tmp_path, place):
    url = str(tmp_path / "run" / MODEL) if place == "local" else "memory://pinned-models"
    write_model_files(ObjectStore(url), "hub", FILES)
    run, folder = ObjectStore(tmp_path / "user"), f"{url}/hub"
    manifest = model_manifest(run, folder)
    assert manifest["experts/a/config.json"] == (1, hashlib.sha256(b"a").hexdigest())
    assert set(manifest) == {name for name in FILES if name != "README.md"}
    write_manifest(run, manifest)
    location = pinned(folder, digest_of(manifest))
    assert read_model_files(run, location)["config.json"] == b"{}"
    assert read_model_files(run, f"{location}/experts/a")["config.json"] == b"a"
    write_model_files(ObjectStore(url), "hub", {**FILES, "experts/a/config.json": b"b"})
    assert read_model_files(run, location)["config.json"] == b"{}"
    with pytest.raises(DataError, match=r"config.json has changed since the run started"):
        read_model_files(run, f"{location}/experts/a")

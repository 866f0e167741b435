"""Guarantees that hold for every kind of store."""

import json
import os
import pickle
import threading

import pytest

from dist_tl.errors import ConfigError, StorageError
from dist_tl.storage.objects import ObjectStore, StoreProbe


@pytest.mark.parametrize("data", [b"", b"\x00\xff" * 3, bytes(range(256)) * 5000])
def test_a_written_object_can_be_read_back(store, data):
    assert store.write("a/b/c.bin", data) is True
    assert store.read("a/b/c.bin") == data
    assert store.size("a/b/c.bin") == len(data)
    assert store.exists("a/b/c.bin")


def test_reading_a_missing_object_returns_none_or_raises_with_its_key(store):
    store.write("there", b"x")
    assert store.read_or_none("not/there") is None
    assert not store.exists("not/there")
    for read in (store.read, store.size, store.read_json):
        with pytest.raises(StorageError, match=r"no object .*not/there"):
            read("not/there")


def test_a_new_store_is_empty(store):
    assert store.list() == []
    assert store.read_or_none("x") is None
    store.delete("x")
    store.delete_all("x")


def test_a_folder_is_not_an_object(store):
    store.write("a/b", b"x")
    assert not store.exists("a")
    assert store.read_or_none("a") is None


def test_a_second_write_overwrites_but_a_create_only_write_does_not(store):
    store.write("k", b"one")
    assert store.write("k", b"two") is True
    assert store.write("k", b"three", create_only=True) is False
    assert store.read("k") == b"two"
    assert store.write("fresh", b"four", create_only=True) is True
    assert store.read("fresh") == b"four"


def test_list_returns_sorted_relative_keys_of_all_folders(store):
    for key in ("b/2", "a", "b/10", "b/c/d/e", "bb/1"):
        store.write(key, b"x")
    assert store.list() == ["a", "b/10", "b/2", "b/c/d/e", "bb/1"]
    assert store.list("b") == store.list("b/") == ["b/10", "b/2", "b/c/d/e"]
    assert store.list("a") == []
    assert store.list("nowhere") == []


def test_a_listing_is_never_stale(store):
    for i in range(3):
        store.write(f"x/{i}", b"")
        assert len(store.list("x")) == i + 1
    store.delete("x/1")
    assert store.list("x") == ["x/0", "x/2"]


def test_deleting_a_folder_keeps_folders_with_the_same_name_prefix(store):
    for key in ("m/seed1/a", "m/seed1/b/c", "m/seed10/a", "m/seed1.json"):
        store.write(key, b"x")
    store.delete_all("m/seed1")
    assert store.list() == ["m/seed1.json", "m/seed10/a"]
    store.write("m/seed1/a", b"again")
    assert store.read("m/seed1/a") == b"again"


def test_delete_is_idempotent(store):
    store.write("k", b"x")
    store.delete("k")
    store.delete("k")
    assert not store.exists("k")


def test_a_child_is_the_folder_of_that_name(store):
    child = store.child("stages/one")
    child.write("shards/0.tar", b"x")
    assert store.read("stages/one/shards/0.tar") == b"x"
    assert child.list() == ["shards/0.tar"]
    assert child.url == f"{store.url}/stages/one"


def test_files_are_uploaded_and_downloaded_unchanged(store, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(300_000))
    store.put_file(source, "deep/copy")
    store.get_file("deep/copy", tmp_path / "new" / "back")
    assert (tmp_path / "new" / "back").read_bytes() == source.read_bytes()


def test_a_failed_download_keeps_the_old_file(store, tmp_path):
    store.write("there", b"x")
    kept = tmp_path / "out" / "kept"
    kept.parent.mkdir()
    kept.write_bytes(b"old")
    with pytest.raises(StorageError, match="not-there"):
        store.get_file("not-there", kept)
    assert [path.name for path in kept.parent.iterdir()] == ["kept"]
    assert kept.read_bytes() == b"old"


def test_uploading_a_file_that_does_not_exist_is_an_error(store, tmp_path):
    with pytest.raises(StorageError, match="absent"):
        store.put_file(tmp_path / "absent", "k")
    assert store.list() == []


def test_json_keeps_its_value_and_order(store):
    value = {"z": 1, "a": [1.5, None, "ü"], "n": {"b": True}}
    assert store.write_json("v.json", value) is True
    assert store.read_json("v.json") == value
    assert list(store.read_json("v.json")) == ["z", "a", "n"]
    assert store.write_json("v.json", {}, create_only=True) is False


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b""])
def test_damaged_json_is_a_storage_error_with_the_address(store, data):
    store.write("v.json", data)
    with pytest.raises(StorageError, match=r"v\.json is not JSON"):
        store.read_json("v.json")


def test_a_pickled_store_has_the_same_url_and_is_small(store):
    store.write("k", b"x")
    unpickled = pickle.loads(pickle.dumps(store))  # noqa: S301
    assert unpickled.read("k") == b"x"
    assert unpickled.url == store.url
    assert len(pickle.dumps(store)) < 500


def test_many_threads_share_one_store(store):
    failures = []

    def work(i):
        try:
            store.write(f"t/{i}", str(i).encode() * 100)
            assert store.read(f"t/{i}") == str(i).encode() * 100
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(store.list("t")) == 16


def test_a_probe_reports_create_only_support_and_leaves_no_object(store, request):
    probe = store.probe()
    supported = request.node.callspec.params["store"] != "embedded"
    assert (probe.writable, probe.create_only) == (True, supported)
    assert bool(probe.note) != supported
    assert store.list() == []
    assert isinstance(probe, StoreProbe)


BAD_KEYS = ["", "/a", "a/", "a//b", ".", "a/./b", "../a", "a/../../b", "a\\b", "a*", "a?", "a\nb"]


@pytest.mark.parametrize("key", [*BAD_KEYS, "a/.tmp-1", ".rclone_temp_put_x"])
def test_keys_that_are_invalid_in_some_store_are_rejected_by_all(tmp_path, key):
    store = ObjectStore(tmp_path)
    for use in (store.read, store.exists, store.size, store.delete, store.delete_all, store.child):
        if use == store.delete_all and key == "a/":
            continue
        with pytest.raises(ValueError, match=r"expected|reserved"):
            use(key)
    with pytest.raises(ValueError, match=r"expected|reserved"):
        store.write(key, b"x")


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:secret@bucket/x",
        "s3://AKIA:se/cr/et@bucket/x",
        "s3://secret@bucket",
        "http://user:secret@host/x",
        "file://user:secret@/x",
    ],
)
def test_credentials_in_the_url_are_rejected_and_not_repeated(url):
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY") as caught:
        ObjectStore(url)
    assert "secret@" not in str(caught.value)
    assert "se/cr" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", "s3://", "s3:///", "nonsense://x", "s3://b/a//c", "s3://b/../c"]
)
def test_an_invalid_url_is_a_config_error(url):
    with pytest.raises(ConfigError, match="expected"):
        ObjectStore(url)


def test_an_at_sign_in_a_folder_name_is_not_a_login():
    assert ObjectStore("s3://bucket/mail@home").url == "s3://bucket/mail@home"


def test_relative_paths_are_resolved_when_the_store_is_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = ObjectStore("runs/a")
    assert store.url == f"{tmp_path}/runs/a"
    assert ObjectStore("file://runs/a").url == store.url
    assert ObjectStore(f"file://{tmp_path}/runs/a/").url == store.url


def test_writing_nan_as_json_is_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"Out of range|JSON"):
        ObjectStore(tmp_path).write_json("k", float("nan"))
    assert ObjectStore(tmp_path).list() == []


def test_json_files_end_with_a_newline(tmp_path):
    ObjectStore(tmp_path).write_json("k.json", {"a": 1})
    assert (tmp_path / "k.json").read_text() == json.dumps({"a": 1}, indent=2) + "\n"

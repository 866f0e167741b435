"""Sealed records and tensors: whatever was altered is told apart from what was written."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError, DamagedError, DamagedShardError
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import read_record, seal, unseal, write_record
from dist_tl.storage.tensors import read_tensors, write_tensors


class Note(StrictModel):
    text: str
    number: float = 0.1


@pytest.fixture
def store(tmp_path):
    return ObjectStore(tmp_path)


def test_a_record_is_json_and_survives(store):
    write_record(store, "a/note.json", Note(text="grüße"))
    assert read_record(store, "a/note.json", Note, remedy="") == Note(text="grüße")
    assert json.loads(store.read("a/note.json"))["text"] == "grüße"
    assert read_record(store, "a/other.json", Note, remedy="") is None


def test_no_bit_of_a_record_can_change_unnoticed(store):
    write_record(store, "note.json", Note(text="x"))
    data = store.read("note.json")
    for place in range(8 * len(data)):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError, match="not the record that was written"):
            unseal(bytes(changed))


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"text": "x"}'])
def test_another_object_is_a_named_error_with_its_remedy(store, data):
    store.write("stages/a/result.json", data)
    with pytest.raises(DamagedError, match=r"a/result.json is damaged: .*; do that") as raised:
        read_record(store, "stages/a/result.json", Note, remedy="do that")
    assert raised.value.marker == "stages/a/result.json"


def test_a_record_of_another_version_is_no_damage(store):
    """It must not be made again, but read by the version that wrote it."""
    store.write("note.json", seal('{"other": 1}'))
    with pytest.raises(ConfigError, match=r"(?s)written by another version.*other"):
        read_record(store, "note.json", Note, remedy="")


@pytest.mark.parametrize("text", ["[]", "{}", "1", ""])
def test_only_an_object_with_a_key_is_sealed(text):
    with pytest.raises(ValueError, match="expected a JSON object with a key"):
        seal(text)


def test_tensors_survive_with_their_metadata_in_a_plain_safetensors_file(store, tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}
    write_tensors(store, "t.safetensors", tensors, {"title": "x"})
    for loaded in (read_tensors(store, "t.safetensors"), load_file(tmp_path / "t.safetensors")):
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert file.metadata()["title"] == "x"


def test_no_byte_of_a_tensor_file_can_change_unnoticed(store):
    key = "stages/a/features.safetensors"
    write_tensors(store, key, {"a": torch.arange(8.0)})
    data = store.read(key)
    for place in range(len(data)):
        store.write(key, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(DamagedError, match="start the same job again"):
            read_tensors(store, key)
    for damaged in (b"", data[:-1], data + b"x"):
        store.write(key, damaged)
        with pytest.raises(DamagedError):
            read_tensors(store, key)
    store.delete(key)
    with pytest.raises(DamagedError, match="it is missing") as raised:
        read_tensors(store, key)
    assert raised.value.marker == "stages/a/result.json"


def test_damage_survives_pickling_with_its_marker():
    import pickle

    for kind in (DamagedError, DamagedShardError):
        error = pickle.loads(pickle.dumps(kind.of("what", "stages/a/result.json")))  # noqa: S301
        assert (type(error), str(error), error.marker) == (kind, "what", "stages/a/result.json")


@pytest.mark.parametrize(
    ("key", "marker"),
    [
        ("stages/a/shards/000003.tar", "stages/a/entries/000003.json"),
        ("stages/a/entries/000003.json", "stages/a/entries/000003.json"),
        ("stages/a/manifest.json", "stages/a/manifest.json"),
        ("stages/a/conditions.safetensors", "stages/a/manifest.json"),
        ("stages/a/model/config.json", "stages/a/result.json"),
        ("stages/a/metrics.jsonl", "stages/a/result.json"),
        ("stages/a/result.json", "stages/a/result.json"),
        (
            "stages/a/checkpoints/step-00000002/attempt-000001/rank-00000.json",
            "stages/a/checkpoints/step-00000002/COMMIT",
        ),
        ("gallery.safetensors", "results.json"),
        ("models/a-seed0/config.json", "results.json"),
        ("results.json", "results.json"),
        ("job.json", "job.json"),
        ("scale.json", "scale.json"),
    ],
)
def test_every_object_has_a_marker(key, marker):
    assert layout.marker_of(key) == marker

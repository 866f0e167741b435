"""The manifest of a stage and the entries of its shards: conflicts and damage."""

import pytest

from dist_tl.errors import ConfigError, DamagedShardError, ShardError
from dist_tl.shards.manifest import (
    StageManifest,
    check_entry,
    committed_indices,
    open_stage,
    read_entry,
    read_manifest,
)
from dist_tl.storage.layout import entry_key, manifest_key
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import seal, write_record


@pytest.fixture
def manifest(stage):
    return StageManifest(
        plan=stage.plan(),
        kind="pp",
        condition="uniform",
        image_shape=(3, 4, 5),
        num_classes=10,
        generator="g" * 16,
        created_by={"torch": "2.13"},
    )


def test_opening_a_stage_again_returns_the_first_manifest(store, manifest):
    assert read_manifest(store, "pp") is None
    assert open_stage(store, manifest) == manifest
    upgraded = manifest.model_copy(update={"created_by": {"torch": "2.14"}})
    assert upgraded.fingerprint == manifest.fingerprint
    assert open_stage(store, upgraded) == manifest
    assert read_manifest(store, "pp") == manifest


def test_the_error_of_another_generator_or_plan_names_the_fields(store, stage, manifest):
    open_stage(store, manifest)
    other = manifest.model_copy(update={"generator": "h", "plan": stage.plan(seed=8)})
    assert other.fingerprint != manifest.fingerprint
    with pytest.raises(ConfigError, match=r"generator, plan\.seed differ"):
        open_stage(store, other)
    assert read_manifest(store, "pp") == manifest


def test_a_manifest_written_concurrently_is_compared_too(store, manifest):
    class RacingStore(ObjectStore):
        """A store to which another process writes after the first read."""

        was_read = False

        def read_or_none(self, key):
            if not self.was_read:
                self.was_read = True
                write_record(store, key, manifest)
                return None
            return super().read_or_none(key)

    with pytest.raises(ConfigError, match="kind differ"):
        open_stage(RacingStore(store.url), manifest.model_copy(update={"kind": "p_ssl"}))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"format_version": 1}', b"\xff"])
def test_the_error_of_a_damaged_manifest_names_it(store, data):
    store.write(manifest_key("pp"), data)
    with pytest.raises(ShardError, match=r"manifest\.json"):
        read_manifest(store, "pp")


def test_a_manifest_of_a_later_format_is_rejected(store, manifest):
    later = manifest.model_copy(update={"format_version": 2})
    write_record(store, manifest_key("pp"), later)
    with pytest.raises(ShardError, match="format 2, this version reads 1"):
        read_manifest(store, "pp")


def test_entries_exist_for_committed_shards_only(store, stage):
    plan = stage.plan()
    stage.write(store, plan, indices={0, 3})
    assert committed_indices(store, "pp") == {0, 3}
    assert read_entry(store, "pp", 1) is None
    entry = read_entry(store, "pp", 3)
    assert entry is not None
    assert entry.index == 3


@pytest.mark.parametrize("data", [b"", b"{", b"7", b"{}", b'{"index": -1}'])
def test_the_error_of_a_damaged_entry_names_it(store, data):
    store.write(entry_key("pp", 4), data)
    with pytest.raises(DamagedShardError, match=r"000004\.json is damaged") as raised:
        read_entry(store, "pp", 4)
    assert raised.value.marker == entry_key("pp", 4)


def test_an_entry_of_another_version_is_no_damage(store):
    store.write(entry_key("pp", 4), seal('{"index": -1}'))
    with pytest.raises(ShardError, match="another version of dist_tl wrote it") as raised:
        read_entry(store, "pp", 4)
    assert not isinstance(raised.value, DamagedShardError)


def test_an_entry_of_another_job_is_rejected(store, stage):
    plan = stage.plan()
    stage.write(store, plan, indices={0})
    entry = read_entry(store, "pp", 0)
    assert entry is not None
    assert check_entry(entry, plan) == entry
    with pytest.raises(ShardError, match="another order"):
        check_entry(entry, stage.plan(seed=8))

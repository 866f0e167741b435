"""Writing shards: deterministic bytes, and nothing visible before the entry."""

import hashlib
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from webdataset.compat import WebDataset

from dist_tl.errors import DamagedShardError, ShardError, StorageError
from dist_tl.shards.manifest import read_entry
from dist_tl.shards.order import orders
from dist_tl.shards.reader import read_shard, verify_shard
from dist_tl.shards.writer import ShardConfig, commit_shard, pack_shard, write_shard
from dist_tl.storage.layout import entry_key, shard_key
from dist_tl.storage.objects import ObjectStore


class RecordingStore(ObjectStore):
    """A store that records writes and fails on given keys."""

    def __init__(self, url, fail_on=()):
        super().__init__(url)
        self.written, self.fail_on = [], fail_on

    def write(self, key, data, *, create_only=False):
        if key in self.fail_on:
            raise StorageError("connection lost")
        self.written.append((key, create_only))
        return super().write(key, data, create_only=create_only)


def test_packing_twice_gives_the_same_bytes(stage):
    order = stage.plan().order(1)
    first = pack_shard(order, stage.samples(order))
    time.sleep(1.1)  # longer than the resolution of a tar's time stamps
    assert pack_shard(order, iter(stage.samples(order))).data == first.data


def test_the_bytes_of_a_shard_never_change(stage):
    order = stage.plan().order(1)
    soft = np.array([0.25, 0.75], np.float32)
    packed = pack_shard(order, stage.samples(order, soft=soft))
    assert packed.sha256.startswith("940c35ac0c521cefdd5e33e3dcc6d695a1b7a591")
    assert packed.sha256 == hashlib.sha256(packed.data).hexdigest()


def test_another_process_with_another_hash_seed_packs_the_same_bytes(stage):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from conftest import Stage\n"
        "from dist_tl.shards.writer import pack_shard\n"
        "order = Stage().plan().order(1)\n"
        "print(pack_shard(order, Stage().samples(order)).sha256)\n"
    )
    folder = str(Path(__file__).parent)
    run = subprocess.run(
        [sys.executable, "-c", code, folder],
        env={"PYTHONHASHSEED": "4242", "OMP_NUM_THREADS": "1", "TZ": "Asia/Tokyo"},
        capture_output=True,
        text=True,
        check=True,
    )
    order = stage.plan().order(1)
    assert run.stdout.strip() == pack_shard(order, stage.samples(order)).sha256


def test_written_shards_can_be_read(store, stage):
    plan = stage.plan(num_samples=10)
    stage.write(store, plan)
    for order in orders(plan):
        entry = verify_shard(store, plan, order.index)
        assert entry is not None
        assert (entry.samples, entry.order) == (order.num_samples, order.digest)
        assert entry.bytes == store.size(entry.key)
        read = read_shard(store, "pp", order.index)
        for sample, expected in zip(read, stage.samples(order), strict=True):
            np.testing.assert_array_equal(sample.image, expected.image)
            assert replace(sample, image=expected.image) == expected
    assert plan.shard_size(2) == 2


@pytest.mark.parametrize("format", ["png", "npy"])
def test_webdataset_can_read_the_shards(tmp_path, stage, format):
    plan = stage.plan(format=format)
    order = plan.order(0)
    soft = np.array([0.25, 0.75], np.float32)
    write_shard(order, stage.samples(order, soft=soft), ObjectStore(tmp_path))
    dataset = WebDataset(str(tmp_path / shard_key("pp", 0)), shardshuffle=False, empty_check=False)
    # webdataset annotates `decode` as FluidInterface, which lacks __iter__; it returns a pipeline.
    samples = list(dataset.decode("rgb8"))  # pyright: ignore[reportArgumentType]
    assert [int(sample["__key__"]) for sample in samples] == list(order.numbers)
    for sample, expected in zip(samples, stage.samples(order), strict=True):
        np.testing.assert_array_equal(sample[format], expected.image)
        assert sample["cls"] == expected.label
        assert sample["json"] == expected.provenance
        np.testing.assert_array_equal(sample["soft.npy"], soft)


def test_the_tar_is_written_before_the_create_only_entry(tmp_path, stage):
    store, order = RecordingStore(tmp_path), stage.plan().order(0)
    write_shard(order, stage.samples(order), store)
    assert store.written == [(shard_key("pp", 0), False), (entry_key("pp", 0), True)]


def test_a_crash_between_tar_and_entry_leaves_no_shard_and_can_be_retried(tmp_path, stage):
    order = stage.plan().order(0)
    failing = RecordingStore(tmp_path, fail_on=[entry_key("pp", 0)])
    with pytest.raises(StorageError):
        write_shard(order, stage.samples(order), failing)
    store = ObjectStore(tmp_path)
    assert store.exists(shard_key("pp", 0))
    assert read_entry(store, "pp", 0) is None
    with pytest.raises(ShardError, match="not committed"):
        read_shard(store, "pp", 0)
    write_shard(order, stage.samples(order), store, attempt=1)
    entry = read_entry(store, "pp", 0)
    assert entry is not None
    assert entry.attempt == 1


def test_a_second_attempt_returns_the_entry_and_writes_nothing(tmp_path, stage):
    store, order = RecordingStore(tmp_path), stage.plan().order(0)
    first = write_shard(order, stage.samples(order), store)
    store.written.clear()
    assert write_shard(order, stage.samples(order), store, attempt=1) == first
    assert store.written == []


def test_the_first_entry_of_two_concurrent_attempts_is_kept(tmp_path, stage):
    order = stage.plan().order(0)
    packed = pack_shard(order, stage.samples(order))
    other = ObjectStore(tmp_path)

    class RacingStore(RecordingStore):
        def write(self, key, data, *, create_only=False):
            if key == entry_key("pp", 0):
                commit_shard(packed, other, seconds=1, attempt=5)
            return super().write(key, data, create_only=create_only)

    entry = commit_shard(packed, RacingStore(tmp_path), seconds=2, attempt=6)
    assert entry.attempt == 5
    assert read_entry(other, "pp", 0) == entry


def test_different_bytes_for_the_same_order_are_an_error_and_change_nothing(store, stage):
    order = stage.plan().order(0)
    write_shard(order, stage.samples(order), store)
    before = store.read(shard_key("pp", 0))
    with pytest.raises(ShardError, match="not deterministic across these devices"):
        write_shard(order, stage.samples(order, label=3), store)
    assert store.read(shard_key("pp", 0)) == before


def test_a_shard_of_another_job_is_an_error(store, stage):
    order = stage.plan().order(0)
    write_shard(order, stage.samples(order), store)
    other = stage.plan(seed=8).order(0)
    with pytest.raises(ShardError, match="another order"):
        write_shard(other, stage.samples(other), store)


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_a_damaged_shard_is_detected_and_made_again_exactly(store, stage, damage):
    plan = stage.plan()
    order, key = plan.order(0), shard_key("pp", 0)
    entry = write_shard(order, stage.samples(order), store)
    intact = store.read(key)
    store.delete(key)
    if damage == "truncated":
        store.write(key, intact[:-10])
    if damage == "altered":
        store.write(key, intact.replace(b"PNG", b"GNP", 1))
    with pytest.raises(DamagedShardError, match=r"shard 0 of stage 'pp'") as raised:
        verify_shard(store, plan, 0)
    store.delete(raised.value.marker)
    assert write_shard(order, stage.samples(order), store).sha256 == entry.sha256
    assert store.read(key) == intact
    assert verify_shard(store, plan, 0) is not None


def test_samples_that_do_not_match_the_order_are_rejected(store, stage):
    order = stage.plan().order(1)
    samples = stage.samples(order)
    for wrong, message in [
        (samples[:-1], "sample 7 and all later ones are missing"),
        (samples[::-1], "expected sample 4, got 7"),
        ([*samples, stage.sample(8)], "expected sample None, got 8"),
        ([], "sample 4 and all later ones are missing"),
        ([*samples[:-1], replace(samples[-1], label=None)], "sample 7: expected image"),
        ([*samples[:-1], replace(samples[-1], image=np.zeros((1, 1, 3), np.uint8))], "sample 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_shard(order, wrong, store)
    assert store.list() == []


def test_the_entry_includes_the_time_to_generate_the_samples(store, stage):
    order = stage.plan().order(0)

    def slowly():
        for sample in stage.samples(order):
            time.sleep(0.03)
            yield sample

    entry = write_shard(order, slowly(), store)
    assert 0.12 <= entry.seconds < 10
    assert abs(entry.committed_at - time.time()) < 10


def test_a_shard_config_creates_a_plan():
    config = ShardConfig(samples_per_shard=10, lanes=3, window=2, format="npy")
    plan = config.plan(stage="pp", purpose="noise", num_samples=95, seed=1, fingerprint="f")
    assert (plan.num_shards, plan.lanes, plan.window) == (10, 3, 2)
    assert plan.order(9).num_samples == 5
    assert plan.order(9).format == "npy"

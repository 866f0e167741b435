"""Checkpoints exist once COMMIT is written, list their files, and are rejected if they differ."""

import json
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional

from dist_tl.errors import CheckpointError, CheckpointMismatchError, StorageError
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import seal
from dist_tl.train.checkpoints import CheckpointConfig, Checkpoints, TrainState
from dist_tl.train.engine import Engine, EngineConfig, OptimizerConfig

STAGE = "scratch-seed0"
METRICS = b'{"step": 1, "loss": 0.5}\n'


def new_engine(*, seed=0, width=7, zero_stage=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))
    config = EngineConfig(zero_stage=zero_stage)
    return Engine(module, config, OptimizerConfig(), batch_per_rank=4, num_steps=9)


def take_step(engine):
    inputs = torch.linspace(-1, 1, 20).view(4, 5) + engine.num_updates
    loss = functional.cross_entropy(engine.module(inputs), torch.tensor([0, 1, 2, 0]))
    engine.backward(loss)
    engine.step()


def weights_of(engine):
    return torch.cat([fragment.master for fragment in engine.fragments]).tolist()


def checkpoints_in(store, *, keep=2, every_steps=1, rank=0, world_size=1, fingerprint="f" * 16):
    config = CheckpointConfig(every_steps=every_steps, keep=keep)
    return Checkpoints(
        store, STAGE, config, fingerprint=fingerprint, rank=rank, world_size=world_size
    )


def committed_steps(store):
    keys = store.list(layout.checkpoints_prefix(STAGE))
    return [layout.parse_checkpoint_step(key) for key in keys if key.endswith("/COMMIT")]


def files_of(store, step):
    return store.list(layout.checkpoint_prefix(STAGE, step))


@pytest.fixture
def store(tmp_path):
    return ObjectStore(tmp_path / "run")


@pytest.fixture
def engine(alone):
    engine = new_engine()
    yield engine
    engine.close()


@pytest.fixture
def other(alone):
    """An engine with other weights, to restore checkpoints into."""
    engine = new_engine(seed=1)
    yield engine
    engine.close()


def save_steps(engine, checkpoints, *steps):
    """Saves a checkpoint at each step; returns the weights by step."""
    saved = {}
    for step in steps:
        take_step(engine)
        checkpoints.save(engine, TrainState(step, step), METRICS)
        saved[step] = weights_of(engine)
    return saved


class DyingStore(ObjectStore):
    """Raises before it writes a key with the suffix `dies_at`, or before it deletes a folder."""

    dies_at = "/COMMIT"
    dies_deleting = False

    def write(self, key, data, *, create_only=False):
        if not self.dies_deleting and key.endswith(self.dies_at):
            raise StorageError("the machine died")
        return super().write(key, data, create_only=create_only)

    def delete_all(self, prefix):
        if self.dies_deleting:
            raise StorageError("the machine died")
        super().delete_all(prefix)


# Commit and restore.


def test_a_stage_without_checkpoints_starts_at_step_0(store, engine):
    before = weights_of(engine)
    assert checkpoints_in(store).restore(engine) == TrainState(0, 0)
    assert weights_of(engine) == before


def test_the_last_committed_checkpoint_is_restored_with_its_cursor(store, engine, other):
    saved = save_steps(engine, checkpoints_in(store), 1, 2)
    take_step(engine)
    checkpoints_in(store).save(engine, TrainState(3, 7))
    assert checkpoints_in(store).restore(other) == TrainState(3, 7)
    assert weights_of(other) == weights_of(engine) != saved[2]
    assert other.num_updates == 3


@pytest.mark.parametrize("dies_at", ["/COMMIT", ".json", ".safetensors"])
def test_a_crash_before_commit_leaves_the_previous_checkpoint(store, engine, other, dies_at):
    saved = save_steps(engine, checkpoints_in(store), 4)
    dying = DyingStore(store.url)
    dying.dies_at = dies_at
    with pytest.raises(StorageError, match="died"):
        save_steps(engine, checkpoints_in(dying), 5)
    assert committed_steps(store) == [4]
    assert checkpoints_in(store).restore(other) == TrainState(4, 4)
    assert weights_of(other) == saved[4]


def test_files_without_commit_are_ignored_and_removed_by_the_next_save(store, engine, other):
    with pytest.raises(StorageError):
        save_steps(engine, checkpoints_in(DyingStore(store.url)), 5)
    assert len(files_of(store, 5)) == 3
    assert checkpoints_in(store).restore(other) == TrainState(0, 0)
    save_steps(other, checkpoints_in(store), 3)
    assert files_of(store, 5) == []
    assert committed_steps(store) == [3]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_latest_checkpoints_are_kept(store, engine, keep):
    save_steps(engine, checkpoints_in(store, keep=keep), *range(10, 15))
    kept = list(range(10, 15))[-keep:]
    assert committed_steps(store) == kept
    prefix = layout.checkpoints_prefix(STAGE)
    assert {layout.parse_checkpoint_step(key) for key in store.list(prefix)} == set(kept)


def test_commit_is_deleted_first_when_a_checkpoint_is_removed(store, engine):
    """An interrupted removal must not leave an incomplete checkpoint that looks committed."""
    save_steps(engine, checkpoints_in(store, keep=1), 1)
    dying = DyingStore(store.url)
    dying.dies_deleting = True
    with pytest.raises(StorageError):
        save_steps(engine, checkpoints_in(dying, keep=1), 2)
    assert committed_steps(store) == [2]
    assert len(files_of(store, 1)) == 3


def test_clearing_removes_all_checkpoints_of_this_stage_only(store, engine):
    other_key = layout.commit_key("another", 1)
    store.write(other_key, b"{}")
    checkpoints = checkpoints_in(store)
    save_steps(engine, checkpoints, 1, 2)
    checkpoints.clear()
    assert store.list("stages") == [other_key]


def test_a_step_can_be_saved_twice(store, engine, other):
    saved = save_steps(engine, checkpoints_in(store), 1)
    checkpoints_in(store).save(engine, TrainState(1, 1))
    checkpoints_in(store).restore(other)
    assert weights_of(other) == saved[1]


def test_saves_are_due_at_multiples_of_every_steps_and_never_if_disabled(store):
    assert [step for step in range(1, 8) if checkpoints_in(store, every_steps=3).is_due(step)] == [
        3,
        6,
    ]
    assert not any(checkpoints_in(store, every_steps=0).is_due(step) for step in range(1, 8))


def test_the_time_that_saves_block_training_is_counted(store, engine):
    checkpoints = checkpoints_in(store)
    save_steps(engine, checkpoints, 1)
    once = checkpoints.seconds_blocked
    save_steps(engine, checkpoints, 2)
    assert 0 < once < checkpoints.seconds_blocked < 60


# Rejected checkpoints.


@pytest.mark.parametrize("suffix", [".safetensors", ".json", ".jsonl"])
@pytest.mark.parametrize("damage", ["altered", "cut", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(store, engine, other, suffix, damage):
    saved = save_steps(engine, checkpoints_in(store), 1, 2)
    [key] = [key for key in files_of(store, 2) if key.endswith(suffix)]
    data = bytearray(store.read(key))
    data[-1] ^= 1
    store.delete(key)
    if damage != "missing":
        store.write(key, bytes(data) if damage == "altered" else bytes(data[:-1]))
    checkpoints = checkpoints_in(store)
    assert checkpoints.restore(other) == TrainState(1, 1)
    assert weights_of(other) == saved[1]
    assert checkpoints.restored_metrics == METRICS
    [note] = checkpoints.notes
    assert f"{key} is" in note
    assert "the checkpoint at step 2 is removed" in note
    assert committed_steps(store) == [1]
    assert files_of(store, 2) == []


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"format": 1}', b"\xff\xfe", b""])
def test_a_damaged_commit_falls_back_to_the_one_before(store, engine, other, damage):
    saved = save_steps(engine, checkpoints_in(store), 1, 2)
    store.write(layout.commit_key(STAGE, 2), damage)
    assert checkpoints_in(store).restore(other) == TrainState(1, 1)
    assert weights_of(other) == saved[1]
    store.write(layout.commit_key(STAGE, 1), damage)
    assert checkpoints_in(store).restore(other) == TrainState(0, 0)


@pytest.mark.parametrize("place", range(90, 400, 31))
def test_no_digit_of_a_commit_can_change_unnoticed(store, engine, other, place):
    """A changed cursor once made a resumed stage read batches again."""
    save_steps(engine, checkpoints_in(store), 1, 2)
    key = layout.commit_key(STAGE, 2)
    data = bytearray(store.read(key))
    data[place] ^= 1
    store.write(key, bytes(data))
    assert checkpoints_in(store).restore(other) == TrainState(1, 1)


def test_a_commit_of_another_version_is_rejected_by_name(store, engine, other):
    save_steps(engine, checkpoints_in(store), 1)
    store.write(layout.commit_key(STAGE, 1), seal('{"format": 2}'))
    with pytest.raises(CheckpointError, match="step-00000001/COMMIT"):
        checkpoints_in(store).restore(other)


def test_a_checkpoint_of_another_world_size_is_rejected_with_both_sizes(store, engine, other):
    save_steps(engine, checkpoints_in(store), 1)
    with pytest.raises(CheckpointMismatchError, match=r"made by 1 workers, this job has 4; .*=1"):
        checkpoints_in(store, world_size=4).restore(other)


def test_a_checkpoint_of_another_specification_is_rejected_with_both_fingerprints(
    store, engine, other
):
    save_steps(engine, checkpoints_in(store), 1)
    with pytest.raises(CheckpointMismatchError, match=rf"\({'f' * 16}, this one is {'e' * 16}\)"):
        checkpoints_in(store, fingerprint="e" * 16).restore(other)


def test_a_checkpoint_of_another_network_is_rejected(store, engine):
    save_steps(engine, checkpoints_in(store), 1)
    wider = new_engine(width=8)
    with pytest.raises(CheckpointMismatchError, match="sharded differently"):
        checkpoints_in(store).restore(wider)
    wider.close()


# Two ranks.


def save_on(rank, world_size, url, zero_stage):
    store = ObjectStore(url)
    engine = new_engine(zero_stage=zero_stage)
    take_step(engine)
    checkpoints = checkpoints_in(store, rank=rank, world_size=world_size)
    checkpoints.save(engine, TrainState(1, 1))
    committed_after = committed_steps(store)
    engine.close()
    return committed_after


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_every_rank_writes_its_own_files_and_commit_lists_them_all(two_ranks, store, zero_stage):
    assert two_ranks(save_on, store.url, zero_stage) == [[1], [1]]
    folder = layout.checkpoint_prefix(STAGE, 1)
    written = {key.removeprefix(f"{folder}/") for key in files_of(store, 1)}
    own = {f"rank-{rank:05d}.{kind}" for rank in (0, 1) for kind in ("json", "safetensors")}
    own.add("metrics.jsonl")
    assert written == {"COMMIT", *own}
    commit = store.read_json(layout.commit_key(STAGE, 1))
    assert {record["key"] for record in commit["files"]} == {f"{folder}/{name}" for name in own}
    assert {r["key"]: r["bytes"] for r in commit["files"]} == {
        f"{folder}/{name}": store.size(f"{folder}/{name}") for name in own
    }
    assert commit["world_size"] == 2


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_the_files_of_all_ranks_cover_every_parameter_exactly_once(two_ranks, store, zero_stage):
    two_ranks(save_on, store.url, zero_stage)
    held = Counter()
    for rank in (0, 1):
        index = json.loads(store.read(layout.rank_state_key(STAGE, 1, rank)))
        for name, part in index["slices"].items():
            elements = range(part["offset"], part["offset"] + part["length"])
            held.update((name, element) for element in elements)
    sizes = {"0.weight": 35, "0.bias": 7, "2.weight": 21, "2.bias": 3}
    assert held == Counter((name, i) for name, size in sizes.items() for i in range(size))


def restore_on(rank, world_size, url):
    engine = new_engine(seed=1)
    try:
        return str(checkpoints_in(ObjectStore(url), rank=rank, world_size=2).restore(engine))
    except CheckpointError as error:
        return f"rejected: {error}"
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["COMMIT", "rank-00000.json", "rank-00001.safetensors"])
def test_all_ranks_fall_back_together(two_ranks, store, name):
    """If only one rank fell back, the others would wait for it."""
    two_ranks(save_on, store.url, 1)
    assert two_ranks(restore_on, store.url) == ["TrainState(step=1, cursor=1)"] * 2
    store.write(f"{layout.checkpoint_prefix(STAGE, 1)}/{name}", b"{")
    assert two_ranks(restore_on, store.url) == ["TrainState(step=0, cursor=0)"] * 2


def metrics_after_restoring(rank, world_size, url):
    engine = new_engine(seed=1)
    checkpoints = checkpoints_in(ObjectStore(url), rank=rank, world_size=2)
    checkpoints.restore(engine)
    engine.close()
    return checkpoints.restored_metrics


def save_with_metrics(rank, world_size, url):
    engine = new_engine(zero_stage=1)
    take_step(engine)
    checkpoints = checkpoints_in(ObjectStore(url), rank=rank, world_size=world_size)
    checkpoints.save(engine, TrainState(1, 1), METRICS)
    engine.close()


def test_a_checkpoint_that_another_rank_drops_leaves_no_metrics(two_ranks, store):
    """Otherwise a stage that begins again would log its first steps twice."""
    two_ranks(save_with_metrics, store.url)
    assert two_ranks(metrics_after_restoring, store.url) == [METRICS, b""]
    store.write(layout.rank_tensors_key(STAGE, 1, 1), b"{")
    assert two_ranks(metrics_after_restoring, store.url) == [b"", b""]

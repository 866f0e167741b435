"""Feeds: images and views of every step, independent of the number of ranks."""

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dist_tl.datasets.images import LabelledImages, to_float
from dist_tl.datasets.views import Views, ViewsConfig
from dist_tl.errors import ConfigError
from dist_tl.shards.order import DataOrder, ShardPlan, orders
from dist_tl.shards.sample import PseudoSample
from dist_tl.shards.stream import ShardStream
from dist_tl.shards.writer import write_shard
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.feeds import Feed, MemoryRows, ShardRows, own_lanes

CPU = torch.device("cpu")


def images_of(numbers):
    """A unique 8x8 grey image for each number."""
    rows = [np.random.default_rng(number).integers(0, 256, (8, 8, 1)) for number in numbers]
    return np.array(rows, dtype=np.uint8).reshape(-1, 8, 8, 1)


def data_of(size):
    labels = np.arange(size, dtype=np.int64) % 3
    return LabelledImages(images_of(range(size)), labels, ("a", "b", "c"))


def memory_rows(size=22, *, batch_size=8, lanes=4, rank=0, world_size=1, seed=5, **fields):
    return MemoryRows(
        data_of(size),
        batch_size=batch_size,
        num_lanes=lanes,
        lanes=own_lanes(lanes, rank, world_size),
        seed=seed,
        **fields,
    )


def steps_of(rows, count, *, cursor=0):
    return list(itertools.islice(rows.read_from(cursor), count))


def numbers_of(step):
    return [int(number) for lane in step for number in lane.numbers]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A store with a stage of 44 labelled samples and one of 44 unlabelled ones."""
    store = ObjectStore(tmp_path_factory.mktemp("shards"))
    plans = SimpleNamespace(store=store)
    for kind in ("labelled", "soft"):
        plan = ShardPlan(
            stage=kind,
            fingerprint="f" * 16,
            purpose="test",
            seed=3,
            num_samples=44,
            samples_per_shard=3,
            lanes=4,
            window=2,
        )
        for order in orders(plan):
            images = images_of(order.numbers)
            one = {"label": 1} if kind == "labelled" else {"soft": np.float32([0.5, 0.5])}
            numbered = zip(order.numbers, images, strict=True)
            write_shard(order, [PseudoSample(n, image, **one) for n, image in numbered], store)
        setattr(plans, kind, plan)
    return plans


def shard_rows(shards, kind, *, batch_size=8, rank=0, world_size=1, seed=5):
    plan = getattr(shards, kind)
    return ShardRows(
        ShardStream(
            shards.store,
            plan,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            timeout_s=20.0,
            decode_threads=1,
        )
    )


def feed_of(labelled, unlabelled=None, *, accumulation=1, seed=9):
    views = Views(ViewsConfig(kind="digits"))
    return Feed(labelled, unlabelled, views, accumulation=accumulation, seed=seed, device=CPU)


# Rows in memory.


@pytest.mark.parametrize("size", [5, 8, 22, 64])
def test_an_epoch_drops_no_row_and_repeats_none(size):
    """Also if the batch is larger than the data or does not divide it."""
    steps = steps_of(memory_rows(size), 3 * size)
    numbers = [number for step in steps for number in numbers_of(step)]
    epochs = [numbers[i : i + size] for i in range(0, 10 * size, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10


def test_rows_hold_the_images_and_labels_of_their_numbers():
    for lane in steps_of(memory_rows(), 1)[0]:
        np.testing.assert_array_equal(lane.images, images_of(lane.numbers))
        np.testing.assert_array_equal(lane.labels, lane.numbers % 3)


def test_seed_and_purpose_determine_the_order():
    def read(**fields):
        return [numbers_of(step) for step in steps_of(memory_rows(**fields), 6)]

    assert read() == read()
    assert read() != read(seed=6)
    assert read() != read(purpose="unlabelled order")


@pytest.mark.parametrize("cursor", [1, 5, 40])
def test_reading_from_a_cursor_equals_skipping_to_it(shards, cursor):
    """Also for a reader that has read other steps before."""
    for make in (memory_rows, lambda: shard_rows(shards, "labelled")):
        rows = make()
        skipped = [numbers_of(step) for step in steps_of(rows, cursor + 3)][cursor:]
        assert [numbers_of(step) for step in steps_of(make(), 3, cursor=cursor)] == skipped
        assert [numbers_of(step) for step in steps_of(rows, 3, cursor=cursor)] == skipped


def test_an_empty_data_set_is_rejected():
    with pytest.raises(ConfigError, match="at least one training image"):
        memory_rows(0)


@pytest.mark.parametrize(
    ("batch_size", "named"), [(9, [8, 12]), (3, [4]), (0, [4]), (21, [20, 24])]
)
def test_an_indivisible_batch_is_rejected_with_valid_sizes(batch_size, named):
    with pytest.raises(ConfigError) as error:
        memory_rows(batch_size=batch_size)
    sizes = re.search(r"use a batch of (.*)", str(error.value))[1]
    assert [int(size) for size in sizes.split(" or ")] == named
    for size in named:
        steps_of(memory_rows(batch_size=size), 1)


@pytest.mark.parametrize(("lanes", "world_size"), [(8, 3), (4, 8), (6, 4)])
def test_indivisible_lanes_are_rejected_with_valid_numbers(lanes, world_size):
    with pytest.raises(ConfigError, match=f"{lanes} lanes .* {world_size} workers") as error:
        own_lanes(lanes, 0, world_size)
    workers, more = re.search(r"in \[(.*)\], or lanes=(\d+)", str(error.value)).groups()
    for count in map(int, workers.split(", ")):
        assert len(own_lanes(lanes, 0, count)) == lanes // count
    assert len(own_lanes(int(more), 0, world_size)) == int(more) // world_size


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_lane_belongs_to_one_rank(world_size):
    lanes = [lane for rank in range(world_size) for lane in own_lanes(8, rank, world_size)]
    assert lanes == list(range(8))


# Rows of shards.


def test_rows_of_shards_follow_the_data_order(shards):
    for step, lanes in enumerate(steps_of(shard_rows(shards, "labelled"), 14)):
        expected = DataOrder(shards.labelled, seed=5).batch_numbers(step, 8)
        assert numbers_of(lanes) == expected.tolist()
        for lane in lanes:
            np.testing.assert_array_equal(lane.images, images_of(lane.numbers))
            assert set(lane.labels.tolist()) == {1}


def test_shards_without_labels_are_rejected_as_labelled_rows(shards):
    feed = feed_of(shard_rows(shards, "soft"))
    with pytest.raises(ConfigError, match="no class labels"):
        next(feed.read_from(0))


# Batches.


def global_steps(make_rows, make_unlabelled, world_size, count=7, cursor=0):
    """Returns the batches of all ranks per step, concatenated in the order of the lanes."""
    readings = []
    for rank in range(world_size):
        labelled = make_rows(rank=rank, world_size=world_size)
        unlabelled = make_unlabelled(rank=rank, world_size=world_size)
        readings.append(feed_of(labelled, unlabelled).read_from(cursor))
    steps = []
    for _ in range(count):
        parts = [next(reading) for reading in readings]
        assert all(len(part) == 1 for part in parts)
        batches = [part[0] for part in parts]
        tensors = [
            torch.cat([getattr(batch, name) for batch in batches])
            for name in ("images", "labels", "weak", "strong")
        ]
        numbers = [number for batch in batches for number in batch.numbers]
        lanes = [lane for batch in batches for lane in batch.lanes]
        steps.append((*tensors, torch.tensor(numbers), torch.tensor(lanes)))
    for reading in readings:
        reading.close()
    return steps


def memory_unlabelled(**fields):
    return memory_rows(31, purpose="unlabelled order", **fields)


def equal(one, two):
    return all(
        torch.equal(a, b)
        for step, other in zip(one, two, strict=True)
        for a, b in zip(step, other, strict=True)
    )


@pytest.mark.parametrize("source", ["memory", "shards"])
def test_images_views_and_labels_do_not_depend_on_the_number_of_ranks(shards, source):
    def labelled(**fields):
        return (
            memory_rows(**fields)
            if source == "memory"
            else shard_rows(shards, "labelled", **fields)
        )

    def unlabelled(**fields):
        return (
            memory_unlabelled(**fields)
            if source == "memory"
            else shard_rows(shards, "soft", **fields)
        )

    alone = global_steps(labelled, unlabelled, 1)
    assert equal(global_steps(labelled, unlabelled, 2), alone)
    assert equal(global_steps(labelled, unlabelled, 4), alone)


def test_batches_from_a_cursor_equal_those_after_skipping(shards):
    def unlabelled(**fields):
        return shard_rows(shards, "soft", **fields)

    from_start = global_steps(memory_rows, unlabelled, 1, count=9)
    assert equal(global_steps(memory_rows, unlabelled, 1, count=4, cursor=5), from_start[5:])


def test_a_batch_holds_weak_views_of_its_rows_and_two_views_of_the_unlabelled():
    rows, unlabelled = memory_rows(), memory_unlabelled()
    views = Views(ViewsConfig(kind="none"))
    feed = Feed(rows, unlabelled, views, accumulation=1, seed=0, device=CPU)
    [batch] = next(feed.read_from(4))
    numbers = numbers_of(next(memory_rows().read_from(4)))
    torch.testing.assert_close(batch.images, to_float(images_of(numbers)))
    assert batch.labels.tolist() == [number % 3 for number in numbers]
    assert batch.labels.dtype == torch.int64
    assert list(batch.numbers) == numbers_of(next(memory_unlabelled().read_from(4)))
    assert torch.equal(batch.weak, batch.strong)
    torch.testing.assert_close(batch.weak, to_float(images_of(batch.numbers)))
    assert batch.lanes == (0, 1, 2, 3)


def test_views_change_from_step_to_step_and_with_the_seed():
    rows = MemoryRows(data_of(1), batch_size=1, num_lanes=1, lanes=range(1), seed=0)
    seen = [
        batch.images
        for seed in range(4)
        for [batch] in itertools.islice(feed_of(rows, seed=seed).read_from(0), 12)
    ]
    assert len({tuple(image.flatten().tolist()) for image in seen}) > 4
    [one], [two] = next(feed_of(rows).read_from(3)), next(feed_of(rows).read_from(3))
    assert torch.equal(one.images, two.images)


def test_lanes_draw_independent_views():
    def twelve_times(**fields):
        return memory_rows(1, batch_size=12, lanes=12, **fields)

    [batch] = next(feed_of(twelve_times(), twelve_times()).read_from(0))
    for views in (batch.images, batch.weak, batch.strong):
        assert len({tuple(view.flatten().tolist()) for view in views}) > 2
    assert not torch.equal(batch.images, batch.weak)


def test_unlabelled_rows_do_not_change_the_labelled_batches():
    with_them = feed_of(memory_rows(), memory_unlabelled()).read_from(0)
    without = feed_of(memory_rows()).read_from(0)
    for _ in range(6):
        [one], [two] = next(with_them), next(without)
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.labels, two.labels)
        assert two.weak is None
        assert two.strong is None
        assert two.numbers == ()


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_concatenate_to_the_batch(accumulation):
    [full] = next(feed_of(memory_rows(), memory_unlabelled()).read_from(2))
    feed = feed_of(memory_rows(), memory_unlabelled(), accumulation=accumulation)
    parts = next(feed.read_from(2))
    assert len(parts) == accumulation
    for name in ("images", "labels", "weak", "strong"):
        together = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(together, getattr(full, name))
    assert sum((part.numbers for part in parts), ()) == full.numbers
    assert sum((part.lanes for part in parts), ()) == full.lanes


def test_unlabelled_rows_may_have_another_number_of_lanes(shards):
    """No row is lost if the shards have more lanes than the stage."""
    rows = memory_rows(batch_size=8, lanes=2)
    [batch] = next(feed_of(rows, shard_rows(shards, "soft", batch_size=16)).read_from(0))
    expected = DataOrder(shards.soft, seed=5).batch_numbers(0, 16)
    assert list(batch.numbers) == expected.tolist()
    assert len(batch.weak) == 16


def test_lanes_not_divisible_by_micro_batches_are_rejected():
    message = r"4 lanes per worker .* 3 micro-batches; .* workers \* 3"
    with pytest.raises(ConfigError, match=message):
        next(feed_of(memory_rows(), accumulation=3).read_from(0))


def test_seconds_starved_sums_both_kinds_of_rows():
    waits = [SimpleNamespace(seconds_starved=seconds) for seconds in (1.5, 2.0)]
    assert feed_of(*waits).seconds_starved == 3.5
    assert feed_of(waits[0]).seconds_starved == 1.5
    assert feed_of(memory_rows()).seconds_starved == 0.0

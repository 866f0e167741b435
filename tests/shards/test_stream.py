"""The stream of batches: right samples, in time, for any number of ranks, from any cursor."""

import gc
import itertools
import threading
import time

import numpy as np
import pytest

from dist_tl.errors import ConfigError, ShardError, ShardTimeoutError
from dist_tl.shards.manifest import committed_indices
from dist_tl.shards.order import DataOrder
from dist_tl.shards.reader import DecodedShard
from dist_tl.shards.stream import ShardStream
from dist_tl.shards.writer import write_shard
from dist_tl.storage.layout import entry_key, shard_key
from dist_tl.storage.objects import ObjectStore

POLL = {"poll_s": (0.002, 0.01)}
FAST = {"timeout_s": 20.0, **POLL}


def batches_of(stream, cursor, count):
    reading = stream.read_from(cursor)
    batches = [batch for batch, _ in itertools.islice(reading, count)]
    reading.close()
    return batches


def threads_of_streams():
    return [thread for thread in threading.enumerate() if thread.name.startswith("shards-")]


@pytest.fixture(autouse=True)
def no_thread_is_left_behind():
    yield
    assert threads_of_streams() == []


@pytest.fixture
def store(tmp_path):
    return ObjectStore(tmp_path / "run")


@pytest.fixture
def plan(stage):
    return stage.plan(num_samples=46, samples_per_shard=4, lanes=4, window=2)


@pytest.fixture
def written(store, stage, plan):
    stage.write(store, plan)
    return store


def test_batches_hold_what_the_order_says_and_what_the_samples_are(written, stage, plan):
    stream = ShardStream(written, plan, batch_size=8, **FAST)
    for step, batch in enumerate(batches_of(stream, 0, 20)):
        numbers = DataOrder(plan).batch_numbers(step, 8)
        np.testing.assert_array_equal(batch.numbers, numbers)
        for row, number in enumerate(numbers.tolist()):
            np.testing.assert_array_equal(batch.images[row], stage.sample(number).image)
            assert batch.labels[row] == stage.sample(number).label
        assert batch.soft is None
        assert batch.lanes == (slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8))
        assert (batch.numbers.dtype, batch.labels.dtype) == (np.int64, np.int64)


def test_soft_labels_come_along(store, stage):
    plan = stage.plan(num_samples=8)
    for index in range(2):
        order = plan.order(index)
        rows = [
            stage.sample(n, label=None, soft=np.array([n, -n], np.float32)) for n in order.numbers
        ]
        write_shard(order, rows, store)
    [batch] = batches_of(ShardStream(store, plan, batch_size=4, **FAST), 0, 1)
    assert batch.labels is None
    assert batch.soft.dtype == np.float32
    np.testing.assert_array_equal(batch.soft[:, 0], batch.numbers)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_batches_of_one_rank_alone(written, plan, world_size):
    alone = batches_of(ShardStream(written, plan, batch_size=8, **FAST), 0, 14)
    parts = [
        batches_of(
            ShardStream(written, plan, batch_size=8, rank=rank, world_size=world_size, **FAST),
            0,
            14,
        )
        for rank in range(world_size)
    ]
    for step, batch in enumerate(alone):
        for name in ("numbers", "images", "labels"):
            together = np.concatenate([getattr(part[step], name) for part in parts])
            np.testing.assert_array_equal(together, getattr(batch, name))


def test_ranks_fetch_disjoint_shards(written, plan):
    streams = [
        ShardStream(written, plan, batch_size=8, rank=rank, world_size=2, prefetch_shards=1, **FAST)
        for rank in range(2)
    ]
    seen = [{int(n) // 4 for b in batches_of(s, 0, 5) for n in b.numbers} for s in streams]
    assert seen[0].isdisjoint(seen[1])


@pytest.mark.parametrize("cursor", [1, 5, 6, 11, 200])
def test_resuming_at_a_cursor_equals_continuing(written, plan, cursor):
    stream = ShardStream(written, plan, batch_size=8, **FAST)
    resumed = batches_of(ShardStream(written, plan, batch_size=8, **FAST), cursor, 3)
    for batch, again in zip(batches_of(stream, 0, cursor + 3)[cursor:], resumed, strict=True):
        np.testing.assert_array_equal(batch.numbers, again.numbers)
        np.testing.assert_array_equal(batch.images, again.images)


def test_the_cursor_counts_batches(written, plan):
    reading = ShardStream(written, plan, batch_size=8, **FAST).read_from(7)
    assert [cursor for _, cursor in itertools.islice(reading, 3)] == [8, 9, 10]
    reading.close()


def test_another_seed_reads_the_same_samples_in_another_order(written, plan):
    one = batches_of(ShardStream(written, plan, batch_size=8, **FAST), 0, 5)
    two = batches_of(ShardStream(written, plan, batch_size=8, seed=99, **FAST), 0, 5)
    one, two = (np.concatenate([batch.numbers for batch in run]) for run in (one, two))
    assert one.tolist() != two.tolist()
    assert len(set(one.tolist()) & set(two.tolist())) > 20


def test_training_starts_before_later_shards_exist(store, stage, plan):
    go_on = threading.Event()

    def write_slowly():
        stage.write(store, plan, indices=range(8))
        go_on.wait(20)
        stage.write(store, plan, indices=range(8, plan.num_shards))

    writer = threading.Thread(target=write_slowly)
    writer.start()
    reading = ShardStream(store, plan, batch_size=8, **FAST).read_from(0)
    first = [next(reading)[0] for _ in range(4)]
    committed = committed_indices(store, "pp")
    go_on.set()
    later = [next(reading)[0] for _ in range(2)]
    writer.join()
    reading.close()
    assert committed == set(range(8))
    again = batches_of(ShardStream(store, plan, batch_size=8, **FAST), 0, 6)
    for batch, expected in zip(first + later, again, strict=True):
        np.testing.assert_array_equal(batch.numbers, expected.numbers)
        np.testing.assert_array_equal(batch.images, expected.images)


def test_order_of_arrival_does_not_matter(store, stage, plan):
    def write_backwards():
        for index in reversed(range(plan.num_shards)):
            stage.write(store, plan, indices=[index])

    writer = threading.Thread(target=write_backwards)
    writer.start()
    batches = batches_of(ShardStream(store, plan, batch_size=8, decode_threads=2, **FAST), 0, 6)
    writer.join()
    expected = [DataOrder(plan).batch_numbers(step, 8).tolist() for step in range(6)]
    assert [batch.numbers.tolist() for batch in batches] == expected


def test_a_shard_that_never_comes_is_named_with_what_is_there(store, stage, plan):
    stage.write(store, plan, indices={0, 2, 3, 4, 5, 6, 7})
    stream = ShardStream(store, plan, batch_size=8, timeout_s=0.3, **POLL)
    started = time.monotonic()
    with pytest.raises(
        ShardTimeoutError,
        match=r"shard 1 of stage 'pp' was not committed within 0\.3 s \(7 of 12 shards are\)",
    ):
        next(stream.read_from(0))
    assert time.monotonic() - started < 5
    assert stream.figures.seconds_starved >= 0.3


def test_a_slow_consumer_is_not_mistaken_for_slow_generators(store, stage, plan):
    """Prefetching may wait for long where generators are held back; only the consumer counts."""
    stage.write(store, plan, indices=range(8))
    stream = ShardStream(store, plan, batch_size=8, timeout_s=1.0, **POLL)
    reading = stream.read_from(0)
    next(reading)
    time.sleep(1.3)
    stage.write(store, plan)
    assert next(itertools.islice(reading, 4, None))[1] == 6
    reading.close()


def test_a_crash_between_tar_and_entry_is_waited_out(store, stage, plan):
    stage.write(store, plan)
    store.delete(entry_key("pp", 3))
    stream = ShardStream(store, plan, batch_size=8, timeout_s=0.2, **POLL)
    with pytest.raises(ShardTimeoutError, match="shard 3 "):
        next(stream.read_from(0))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-700], "bytes, its entry says"),
        (lambda data: data[: 512 * 6], "bytes, its entry says"),  # two whole samples
        (lambda data: data[:600] + bytes([data[600] ^ 1]) + data[601:], "altered"),
        (lambda data: None, "lost"),
    ],
)
def test_a_damaged_shard_stops_the_stream_with_its_name_and_the_remedy(
    written, plan, damage, words
):
    data = damage(written.read(shard_key("pp", 2)))
    written.delete(shard_key("pp", 2))
    if data is not None:
        written.write(shard_key("pp", 2), data)
    stream = ShardStream(written, plan, batch_size=8, **FAST)
    with pytest.raises(ShardError, match=rf"shard 2 of stage 'pp'.*{words}.*repair"):
        next(stream.read_from(0))


def test_shards_of_another_job_are_refused(written, stage, plan):
    other = plan.model_copy(update={"fingerprint": "another"})
    with pytest.raises(ShardError, match="another order"):
        next(ShardStream(written, other, batch_size=8, **FAST).read_from(0))


def test_later_epochs_come_from_memory(written, plan):
    stream = ShardStream(written, plan, batch_size=8, **FAST)
    batches_of(stream, 0, 60)
    assert stream.figures.shards_read == plan.num_shards
    assert stream.figures.bytes_read == sum(
        written.size(shard_key("pp", index)) for index in range(plan.num_shards)
    )
    assert stream.figures.memory_hits > plan.num_shards


def test_a_small_memory_fetches_again_and_reads_the_same(written, plan):
    large = ShardStream(written, plan, batch_size=8, **FAST)
    small = ShardStream(written, plan, batch_size=8, memory_bytes=600, **FAST)
    for one, two in zip(batches_of(large, 0, 30), batches_of(small, 0, 30), strict=True):
        np.testing.assert_array_equal(one.images, two.images)
    assert small.figures.shards_read > large.figures.shards_read


def test_ranks_of_a_node_share_a_folder_of_tars(written, plan, tmp_path):
    options = {"cache_folder": tmp_path / "near", "memory_bytes": 0, **FAST}
    first = ShardStream(written, plan, batch_size=8, **options)
    before = batches_of(first, 0, 12)
    broken = sorted((tmp_path / "near").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:-1])
    second = ShardStream(written, plan, batch_size=8, **options)
    for one, two in zip(before, batches_of(second, 0, 12), strict=True):
        np.testing.assert_array_equal(one.images, two.images)
    assert second.figures.shards_read == 1
    assert second.figures.disk_hits >= plan.num_shards - 1


def test_prefetching_works_ahead_up_to_its_limit(written, plan):
    stream = ShardStream(written, plan, batch_size=4, prefetch_shards=2, **FAST)
    reading = stream.read_from(0)
    next(reading)
    deadline = time.monotonic() + 10
    # Two shards of each of four lanes are open; two more come without being asked for.
    while stream.figures.shards_read < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert stream.figures.shards_read == 10
    reading.close()


def test_shards_that_were_read_are_let_go_of(written, plan):
    def shards_in_memory():
        gc.collect()
        return sum(type(thing) is DecodedShard for thing in gc.get_objects())

    before = shards_in_memory()
    stream = ShardStream(written, plan, batch_size=8, memory_bytes=0, **FAST)
    reading = stream.read_from(0)
    for _ in range(40):
        next(reading)
    alive = shards_in_memory() - before
    reading.close()
    # Per lane at most the end of one window and the next; then what is prefetched or decoded.
    assert alive <= plan.lanes * plan.window * 2 + 4 + 4


def test_closing_drops_what_is_still_to_be_fetched(tmp_path, stage):
    plan = stage.plan(num_samples=40, samples_per_shard=1, lanes=20)
    stage.write(ObjectStore(tmp_path), plan)

    class Slow(ObjectStore):
        reads = 0

        def read_or_none(self, key):
            self.reads += 1
            time.sleep(0.05)
            return super().read_or_none(key)

    store = Slow(tmp_path)
    loader = ShardStream(store, plan, batch_size=20, decode_threads=1, timeout_s=0.1, **POLL)
    with pytest.raises(ShardTimeoutError):
        next(loader.read_from(0))
    assert store.reads < 12


def test_position_follows_the_slowest_lane_through_epoch_zero(written, plan):
    stream = ShardStream(written, plan, batch_size=8, **FAST)
    assert stream.position == 0
    batches_of(stream, 0, 4)  # 8 samples of each lane: the first window of two shards
    assert stream.position == 8
    batches_of(stream, 0, 6)
    assert stream.position == plan.num_shards


def test_closing_releases_a_consumer_that_waits(store, plan):
    stream = ShardStream(store, plan, batch_size=8, timeout_s=60.0, **POLL)
    ended = []

    def consume():
        ended.append(list(stream.read_from(0)))

    consumer = threading.Thread(target=consume)
    consumer.start()
    time.sleep(0.1)
    stream.close()
    consumer.join(5)
    assert ended == [[]]


def test_closing_from_another_thread_ends_a_reading_between_batches(written, plan):
    stream = ShardStream(written, plan, batch_size=8, memory_bytes=0, **FAST)
    reading = stream.read_from(0)
    next(reading)
    closer = threading.Thread(target=stream.close)
    closer.start()
    closer.join()
    assert len(list(reading)) < 12  # what was already loaded may still come


def test_position_is_known_when_a_resumed_reading_waits(store, plan):
    stream = ShardStream(store, plan, batch_size=8, timeout_s=0.1, **POLL)
    with pytest.raises(ShardTimeoutError):
        next(stream.read_from(4))
    assert stream.position == 8


def test_a_consumer_that_fails_leaves_no_threads(written, plan):
    def train():
        for _ in ShardStream(written, plan, batch_size=8, **FAST).read_from(0):
            raise KeyError("a bug in the training step")

    with pytest.raises(KeyError):
        train()


def test_figures_tell_first_batch_and_starvation(store, stage, plan):
    stream = ShardStream(store, plan, batch_size=8, **FAST)
    assert stream.figures.first_batch_s is None
    timer = threading.Timer(0.3, stage.write, (store, plan))
    timer.start()
    batches_of(stream, 0, 2)
    timer.join()
    figures = stream.figures
    assert 0.25 < figures.seconds_starved < 10
    assert figures.first_batch_s >= 0.25
    assert figures.batches == 2


def test_batches_may_be_written_to_without_harming_the_cache(written, plan):
    stream = ShardStream(written, plan, batch_size=8, **FAST)
    [batch] = batches_of(stream, 0, 1)
    kept = batch.images.copy()
    batch.images[:] = 0
    [again] = batches_of(stream, 0, 1)
    np.testing.assert_array_equal(again.images, kept)


def test_sizes_that_do_not_fit_are_refused_before_anything_starts(store, plan):
    with pytest.raises(ConfigError, match="use 2 or 4 ranks"):
        ShardStream(store, plan, batch_size=8, rank=0, world_size=3)
    with pytest.raises(ConfigError, match="use a batch of 8 or 12"):
        ShardStream(store, plan, batch_size=10)
    with pytest.raises(ConfigError, match=r"rank in 0\.\.1"):
        ShardStream(store, plan, batch_size=8, rank=2, world_size=2)
    with pytest.raises(ValueError, match="cursor >= 0"):
        next(ShardStream(store, plan, batch_size=8).read_from(-1))

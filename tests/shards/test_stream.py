"""The stream of batches: correct samples for all ranks and cursors, timeouts, caches."""

import gc
import itertools
import threading
import time

import numpy as np
import pytest

from dist_tl.errors import ConfigError, DamagedShardError, ShardError, ShardTimeoutError
from dist_tl.shards.manifest import committed_indices
from dist_tl.shards.order import DataOrder
from dist_tl.shards.reader import DecodedShard
from dist_tl.shards.stream import ShardStream
from dist_tl.shards.writer import write_shard
from dist_tl.storage.layout import entry_key, shard_key
from dist_tl.storage.objects import ObjectStore


def stream_of(store, plan, *, batch_size=8, timeout_s=20.0, **options):
    """Returns a stream that polls fast."""
    options = {"poll_s": (0.002, 0.01), **options}
    return ShardStream(store, plan, batch_size=batch_size, timeout_s=timeout_s, **options)


def batches_of(stream, cursor, count):
    reading = stream.read_from(cursor)
    batches = [batch for batch, _ in itertools.islice(reading, count)]
    reading.close()
    return batches


def threads_of_streams():
    return [thread for thread in threading.enumerate() if thread.name.startswith("shards-")]


@pytest.fixture(autouse=True)
def no_leftover_threads():
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


def test_batches_match_the_data_order_and_the_samples(written, stage, plan):
    stream = stream_of(written, plan)
    for step, batch in enumerate(batches_of(stream, 0, 20)):
        numbers = DataOrder(plan).batch_numbers(step, 8)
        np.testing.assert_array_equal(batch.numbers, numbers)
        assert batch.labels is not None
        for row, number in enumerate(numbers.tolist()):
            np.testing.assert_array_equal(batch.images[row], stage.sample(number).image)
            assert batch.labels[row] == stage.sample(number).label
        assert batch.soft is None
        assert batch.lanes == (slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8))
        assert (batch.numbers.dtype, batch.labels.dtype) == (np.int64, np.int64)


def test_soft_labels_are_included(store, stage):
    plan = stage.plan(num_samples=8)
    for index in range(2):
        order = plan.order(index)
        rows = [
            stage.sample(n, label=None, soft=np.array([n, -n], np.float32)) for n in order.numbers
        ]
        write_shard(order, rows, store)
    [batch] = batches_of(stream_of(store, plan, batch_size=4), 0, 1)
    assert batch.labels is None
    assert batch.soft is not None
    assert batch.soft.dtype == np.float32
    np.testing.assert_array_equal(batch.soft[:, 0], batch.numbers)


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_together_read_the_batches_of_a_single_rank(written, plan, world_size):
    single = batches_of(stream_of(written, plan), 0, 14)
    parts = [
        batches_of(stream_of(written, plan, rank=rank, world_size=world_size), 0, 14)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(single):
        for name in ("numbers", "images", "labels"):
            together = np.concatenate([getattr(part[step], name) for part in parts])
            np.testing.assert_array_equal(together, getattr(batch, name))


def test_ranks_fetch_disjoint_shards(written, plan):
    streams = [
        stream_of(written, plan, rank=rank, world_size=2, prefetch_shards=1) for rank in range(2)
    ]
    shards = [{int(n) // 4 for b in batches_of(s, 0, 5) for n in b.numbers} for s in streams]
    assert shards[0].isdisjoint(shards[1])


@pytest.mark.parametrize("cursor", [1, 5, 6, 11, 200])
def test_resuming_at_a_cursor_equals_continuing(written, plan, cursor):
    stream = stream_of(written, plan)
    resumed = batches_of(stream_of(written, plan), cursor, 3)
    for batch, again in zip(batches_of(stream, 0, cursor + 3)[cursor:], resumed, strict=True):
        np.testing.assert_array_equal(batch.numbers, again.numbers)
        np.testing.assert_array_equal(batch.images, again.images)


def test_the_cursor_counts_batches(written, plan):
    reading = stream_of(written, plan).read_from(7)
    assert [cursor for _, cursor in itertools.islice(reading, 3)] == [8, 9, 10]
    reading.close()


def test_another_seed_reads_the_same_samples_in_another_order(written, plan):
    one = batches_of(stream_of(written, plan), 0, 5)
    two = batches_of(stream_of(written, plan, seed=99), 0, 5)
    one, two = (np.concatenate([batch.numbers for batch in run]) for run in (one, two))
    assert one.tolist() != two.tolist()
    assert len(set(one.tolist()) & set(two.tolist())) > 20


def test_training_starts_before_later_shards_exist(store, stage, plan):
    proceed = threading.Event()

    def write_slowly():
        stage.write(store, plan, indices=range(8))
        proceed.wait(20)
        stage.write(store, plan, indices=range(8, plan.num_shards))

    writer = threading.Thread(target=write_slowly)
    writer.start()
    reading = stream_of(store, plan).read_from(0)
    first = [next(reading)[0] for _ in range(4)]
    committed = committed_indices(store, "pp")
    proceed.set()
    later = [next(reading)[0] for _ in range(2)]
    writer.join()
    reading.close()
    assert committed == set(range(8))
    again = batches_of(stream_of(store, plan), 0, 6)
    for batch, expected in zip(first + later, again, strict=True):
        np.testing.assert_array_equal(batch.numbers, expected.numbers)
        np.testing.assert_array_equal(batch.images, expected.images)


def test_the_order_of_commits_does_not_matter(store, stage, plan):
    def write_backwards():
        for index in reversed(range(plan.num_shards)):
            stage.write(store, plan, indices=[index])

    writer = threading.Thread(target=write_backwards)
    writer.start()
    batches = batches_of(stream_of(store, plan, decode_threads=2), 0, 6)
    writer.join()
    expected = [DataOrder(plan).batch_numbers(step, 8).tolist() for step in range(6)]
    assert [batch.numbers.tolist() for batch in batches] == expected


def test_the_timeout_error_names_the_shard_and_the_number_committed(store, stage, plan):
    stage.write(store, plan, indices={0, 2, 3, 4, 5, 6, 7})
    stream = stream_of(store, plan, timeout_s=0.3)
    started = time.monotonic()
    with pytest.raises(
        ShardTimeoutError,
        match=r"shard 1 of stage 'pp' was not committed within 0\.3 s \(7 of 12 shards are\)",
    ):
        next(stream.read_from(0))
    assert time.monotonic() - started < 5
    assert stream.figures.seconds_starved >= 0.3


def test_a_slow_consumer_does_not_cause_a_timeout(store, stage, plan):
    """Prefetching may wait long for throttled generators; only the consumer's wait is limited."""
    stage.write(store, plan, indices=range(8))
    stream = stream_of(store, plan, timeout_s=1.0)
    reading = stream.read_from(0)
    next(reading)
    time.sleep(1.3)
    stage.write(store, plan)
    assert next(itertools.islice(reading, 4, None))[1] == 6
    reading.close()


def test_a_tar_without_an_entry_is_not_read(store, stage, plan):
    stage.write(store, plan)
    store.delete(entry_key("pp", 3))
    stream = stream_of(store, plan, timeout_s=0.2)
    with pytest.raises(ShardTimeoutError, match="shard 3 "):
        next(stream.read_from(0))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-700], "bytes, its entry says"),
        (lambda data: data[: 512 * 6], "bytes, its entry says"),  # two whole samples
        (lambda data: data[:600] + bytes([data[600] ^ 1]) + data[601:], "altered"),
        (lambda data: None, "is missing"),
    ],
)
def test_the_error_of_a_damaged_shard_names_it_and_the_remedy(written, plan, damage, message):
    data = damage(written.read(shard_key("pp", 2)))
    written.delete(shard_key("pp", 2))
    if data is not None:
        written.write(shard_key("pp", 2), data)
    stream = stream_of(written, plan)
    with pytest.raises(DamagedShardError, match=rf"shard 2 of stage 'pp'.*{message}") as raised:
        next(stream.read_from(0))
    assert raised.value.marker == entry_key("pp", 2)


def test_shards_of_another_job_are_rejected(written, stage, plan):
    other = plan.model_copy(update={"fingerprint": "another"})
    with pytest.raises(ShardError, match="another order"):
        next(stream_of(written, other).read_from(0))


def test_later_epochs_are_read_from_memory(written, plan):
    stream = stream_of(written, plan)
    batches_of(stream, 0, 60)
    assert stream.figures.shards_read == plan.num_shards
    assert stream.figures.bytes_read == sum(
        written.size(shard_key("pp", index)) for index in range(plan.num_shards)
    )
    assert stream.figures.memory_hits > plan.num_shards


def test_a_small_memory_cache_refetches_shards_and_yields_the_same_batches(written, plan):
    large = stream_of(written, plan)
    small = stream_of(written, plan, memory_bytes=600)
    for one, two in zip(batches_of(large, 0, 30), batches_of(small, 0, 30), strict=True):
        np.testing.assert_array_equal(one.images, two.images)
    assert small.figures.shards_read > large.figures.shards_read


def test_ranks_of_a_node_share_a_cache_folder(written, plan, tmp_path):
    options = {"cache_folder": tmp_path / "cache", "memory_bytes": 0}
    first = stream_of(written, plan, **options)
    before = batches_of(first, 0, 12)
    damaged = sorted((tmp_path / "cache").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    second = stream_of(written, plan, **options)
    for one, two in zip(before, batches_of(second, 0, 12), strict=True):
        np.testing.assert_array_equal(one.images, two.images)
    assert second.figures.shards_read == 1
    assert second.figures.disk_hits >= plan.num_shards - 1


def test_prefetching_stops_at_its_limit(written, plan):
    stream = stream_of(written, plan, batch_size=4, prefetch_shards=2)
    reading = stream.read_from(0)
    next(reading)
    deadline = time.monotonic() + 10
    # Two shards of each of four lanes are open; two more are prefetched.
    while stream.figures.shards_read < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert stream.figures.shards_read == 10
    reading.close()


def test_consumed_shards_are_released(written, plan):
    def shards_in_memory():
        gc.collect()
        return sum(type(item) is DecodedShard for item in gc.get_objects())

    before = shards_in_memory()
    stream = stream_of(written, plan, memory_bytes=0)
    reading = stream.read_from(0)
    for _ in range(40):
        next(reading)
    alive = shards_in_memory() - before
    reading.close()
    # Per lane at most two windows, plus prefetched shards and shards being decoded.
    assert alive <= plan.lanes * plan.window * 2 + 4 + 4


def test_closing_drops_pending_requests(tmp_path, stage):
    plan = stage.plan(num_samples=40, samples_per_shard=1, lanes=20)
    stage.write(ObjectStore(tmp_path), plan)

    class SlowStore(ObjectStore):
        reads = 0

        def read_or_none(self, key):
            self.reads += 1
            time.sleep(0.05)
            return super().read_or_none(key)

    store = SlowStore(tmp_path)
    stream = stream_of(store, plan, batch_size=20, decode_threads=1, timeout_s=0.1)
    with pytest.raises(ShardTimeoutError):
        next(stream.read_from(0))
    assert store.reads < 12


def test_position_follows_the_slowest_lane_through_epoch_zero(written, plan):
    stream = stream_of(written, plan)
    assert stream.position == 0
    batches_of(stream, 0, 4)  # 8 samples of each lane: the first window of two shards
    assert stream.position == 8
    batches_of(stream, 0, 6)
    assert stream.position == plan.num_shards


def test_closing_releases_a_waiting_consumer(store, plan):
    stream = stream_of(store, plan, timeout_s=60.0)
    ended = []

    def consume():
        ended.append(list(stream.read_from(0)))

    consumer = threading.Thread(target=consume)
    consumer.start()
    time.sleep(0.1)
    stream.close()
    consumer.join(5)
    assert ended == [[]]


def test_closing_from_another_thread_ends_a_pass_between_batches(written, plan):
    stream = stream_of(written, plan, memory_bytes=0)
    reading = stream.read_from(0)
    next(reading)
    closer = threading.Thread(target=stream.close)
    closer.start()
    closer.join()
    assert len(list(reading)) < 12  # loaded batches may still be yielded


def test_position_is_known_while_a_resumed_pass_waits(store, plan):
    stream = stream_of(store, plan, timeout_s=0.1)
    with pytest.raises(ShardTimeoutError):
        next(stream.read_from(4))
    assert stream.position == 8


def test_a_failed_consumer_leaves_no_threads(written, plan):
    def train():
        for _ in stream_of(written, plan).read_from(0):
            raise KeyError("a bug in the training step")

    with pytest.raises(KeyError):
        train()


def test_figures_include_the_first_batch_and_starvation(store, stage, plan):
    stream = stream_of(store, plan)
    assert stream.figures.first_batch_s is None
    timer = threading.Timer(0.3, stage.write, (store, plan))
    timer.start()
    batches_of(stream, 0, 2)
    timer.join()
    figures = stream.figures
    assert 0.25 < figures.seconds_starved < 10
    assert figures.first_batch_s is not None
    assert figures.first_batch_s >= 0.25
    assert figures.batches == 2


def test_writing_to_a_batch_does_not_change_the_cache(written, plan):
    stream = stream_of(written, plan)
    [batch] = batches_of(stream, 0, 1)
    kept = batch.images.copy()
    batch.images[:] = 0
    [again] = batches_of(stream, 0, 1)
    np.testing.assert_array_equal(again.images, kept)


def test_invalid_sizes_are_rejected_before_the_start(store, plan):
    with pytest.raises(ConfigError, match="use 2 or 4 ranks"):
        ShardStream(store, plan, batch_size=8, rank=0, world_size=3)
    with pytest.raises(ConfigError, match="use a batch of 8 or 12"):
        ShardStream(store, plan, batch_size=10)
    with pytest.raises(ConfigError, match=r"rank in 0\.\.1"):
        ShardStream(store, plan, batch_size=8, rank=2, world_size=2)
    with pytest.raises(ValueError, match="cursor >= 0"):
        next(ShardStream(store, plan, batch_size=8).read_from(-1))

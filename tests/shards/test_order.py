"""The data order: no sample dropped or repeated, and independent of the number of ranks."""

import itertools
import re
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dist_tl.errors import ConfigError
from dist_tl.shards.order import DataOrder, ShardPlan, check_sizes, orders, rank_lanes

PLANS = st.builds(
    lambda num, size, lanes, window, seed: plan_of(num, size, lanes, window, seed),
    st.integers(1, 70),
    st.integers(1, 7),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 3),
).filter(lambda plan: plan.lanes <= plan.num_shards)


def plan_of(num_samples, samples_per_shard, lanes, window, seed=0, **fields):
    return ShardPlan(
        stage="pp",
        purpose="test",
        fingerprint="f",
        seed=seed,
        num_samples=num_samples,
        samples_per_shard=samples_per_shard,
        lanes=lanes,
        window=window,
        **fields,
    )


def all_rows(plan, lane):
    shards = range(lane, plan.num_shards, plan.lanes)
    return sorted((shard, row) for shard in shards for row in range(plan.shard_size(shard)))


def as_pairs(rows):
    return [tuple(row) for row in rows.tolist()]


@settings(deadline=None)
@given(PLANS)
def test_the_shards_of_a_plan_contain_every_sample_once(plan):
    numbers = [number for order in orders(plan) for number in order.numbers]
    assert numbers == list(range(plan.num_samples))


@settings(deadline=None)
@given(PLANS, st.integers(0, 3))
def test_a_lane_drops_and_repeats_no_sample_in_any_epoch(plan, epoch):
    order = DataOrder(plan)
    for lane in range(plan.lanes):
        length = order.lane_length(lane)
        rows = order.lane_samples(lane, epoch * length, length)
        assert sorted(as_pairs(rows)) == all_rows(plan, lane)


@settings(deadline=None)
@given(PLANS, st.integers(1, 4), st.integers(0, 40), st.data())
def test_the_global_batch_is_independent_of_the_number_of_ranks(plan, share, step, data):
    world_size = data.draw(st.sampled_from([n for n in range(1, 7) if plan.lanes % n == 0]))
    order, batch_size = DataOrder(plan), share * plan.lanes
    parts = [
        order.batch(step, batch_size, lanes=rank_lanes(plan.lanes, rank, world_size))
        for rank in range(world_size)
    ]
    together = np.concatenate([rows for part in parts for rows in part])
    np.testing.assert_array_equal(together, np.concatenate(order.batch(step, batch_size)))
    assert len(together) == batch_size


@settings(deadline=None)
@given(PLANS, st.integers(0, 200), st.integers(0, 20))
def test_seeking_equals_reading_from_the_start(plan, position, count):
    for lane in range(plan.lanes):
        after_seek = DataOrder(plan).lane_samples(lane, position, count)
        from_start = DataOrder(plan).lane_samples(lane, 0, position + count)[position:]
        np.testing.assert_array_equal(after_seek, from_start)


@settings(deadline=None)
@given(PLANS, st.integers(0, 3))
def test_windows_are_consecutive_shards_of_one_epoch_shuffled_within_themselves(plan, epoch):
    order = DataOrder(plan)
    for lane in range(plan.lanes):
        start, length = epoch * order.lane_length(lane), order.lane_length(lane)
        windows = list(
            itertools.takewhile(lambda w, e=epoch: w.epoch == e, order.windows(lane, start))
        )
        assert [w.start for w in windows] == [start] + [w.stop for w in windows[:-1]]
        assert windows[-1].stop == start + length
        assert all(len(w.shards) == plan.window for w in windows[:-1])
        assert sorted(shard for w in windows for shard in w.shards) == list(
            range(lane, plan.num_shards, plan.lanes)
        )
        for window in windows:
            rows = order.lane_samples(lane, window.start, window.stop - window.start)
            expected = [(s, r) for s in window.shards for r in range(plan.shard_size(s))]
            assert sorted(as_pairs(rows)) == sorted(expected)


@settings(deadline=None)
@given(PLANS)
def test_epoch_zero_reads_shards_in_the_order_of_their_generation(plan):
    order = DataOrder(plan)
    for lane in range(plan.lanes):
        windows = itertools.takewhile(lambda w: w.epoch == 0, order.windows(lane, 0))
        shards = [shard for window in windows for shard in window.shards]
        assert shards == list(range(lane, plan.num_shards, plan.lanes))


@settings(deadline=None)
@given(PLANS, st.integers(1, 3), st.integers(0, 30))
def test_windows_needed_follows_the_order_in_which_batches_open_windows(plan, share, step):
    order, batch_size = DataOrder(plan), share * plan.lanes
    opened = []
    for later in range(step, step + 6):
        for lane in range(plan.lanes):
            for window, _, _ in order.lane_windows(lane, later * share, share):
                if window not in opened:
                    opened.append(window)
    needed = list(itertools.islice(order.windows_needed(step, batch_size), len(opened)))
    first_step = {window: max(step, window.start // share) for window in set(opened) | set(needed)}
    assert [first_step[w] for w in needed] == [first_step[w] for w in opened]
    last = first_step[opened[-1]]
    assert {w for w in opened if first_step[w] < last} == {
        w for w in needed if first_step[w] < last
    }


@settings(deadline=None, max_examples=600)
@given(PLANS, st.integers(1, 30), st.integers(0, 12))
def test_a_batch_needs_no_shard_beyond_the_reach_of_epoch_zero(plan, share, step):
    order, batch_size = DataOrder(plan), share * plan.lanes
    unread = [
        order.window_at(lane, step * share).shards[0]
        for lane in range(plan.lanes)
        if step * share < order.lane_length(lane)
    ]
    made = min(unread, default=plan.num_shards) + order.reach(batch_size)
    for lane in range(plan.lanes):
        for window, _, _ in order.lane_windows(lane, step * share, share):
            assert max(window.shards) < made


def test_later_epochs_and_other_lanes_and_seeds_are_shuffled_differently():
    plan = plan_of(400, 2, 2, 5)
    order = DataOrder(plan)
    length = order.lane_length(0)
    epochs = [as_pairs(order.lane_samples(0, epoch * length, length)) for epoch in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    rows_of_lanes = [order.lane_samples(lane, 0, length)[:, 1].tolist() for lane in (0, 1)]
    assert rows_of_lanes[0] != rows_of_lanes[1]
    other = DataOrder(plan, seed=1).lane_samples(0, 0, length)
    assert as_pairs(other) != epochs[0]


def test_a_single_sample_is_repeated_forever():
    order = DataOrder(plan_of(1, 10, 1, 3))
    assert as_pairs(np.concatenate(order.batch(5, 4))) == [(0, 0)] * 4


def test_the_order_of_a_plan_never_changes():
    """Cursors and seeds of stored runs are valid only if these numbers stay the same."""
    order = DataOrder(plan_of(22, 3, 2, 2, seed=5, first_sample=100))
    assert order.batch_numbers(0, 8).tolist() == [108, 107, 106, 102, 109, 103, 105, 110]
    assert order.batch_numbers(7, 8).tolist() == [108, 107, 120, 119, 105, 109, 109, 117]
    assert [o.digest for o in orders(order.plan)][-1] == "782401b919c5efaf"


def test_sample_numbers_count_from_the_first_of_the_stage():
    plan = plan_of(22, 3, 2, 2, first_sample=1000)
    order = DataOrder(plan)
    read = np.concatenate([order.batch_numbers(step, 2) for step in range(10)])
    assert set(read.tolist()) < set(range(1000, 1022))
    assert next(orders(plan)).numbers == range(1000, 1003)


def test_seeking_far_into_a_large_stage_is_fast():
    plan = plan_of(10**9 + 7, 1000, 64, 4)
    order = DataOrder(plan)
    started = time.perf_counter()
    rows = order.batch(10**9, 512)
    assert sum(map(len, rows)) == 512
    assert time.perf_counter() - started < 5.0


def suggested_sizes(plan, batch_size, world_size, pattern):
    with pytest.raises(ConfigError) as error:
        check_sizes(plan, batch_size=batch_size, world_size=world_size)
    match = re.search(pattern, str(error.value))
    assert match is not None
    return [int(n) for n in re.findall(r"\d+", match[1])]


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 200))
def test_suggested_batch_sizes_are_valid_and_the_nearest(lanes, batch_size):
    assume(batch_size % lanes)
    plan = plan_of(1000, 1, lanes, 1)
    suggested = suggested_sizes(plan, batch_size, 1, "use a batch of (.*)")
    assert len(suggested) == (1 if batch_size < lanes else 2)
    for size in suggested:
        check_sizes(plan, batch_size=size, world_size=1)
        assert abs(size - batch_size) < lanes


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 60))
def test_suggested_ranks_and_lanes_are_valid(lanes, world_size):
    assume(lanes % world_size)
    plan = plan_of(1000, 1, lanes, 1)
    for ranks in suggested_sizes(plan, lanes, world_size, "use (.*) ranks,"):
        check_sizes(plan, batch_size=lanes, world_size=ranks)
    for others in suggested_sizes(plan, lanes, world_size, "ranks, or (.*) lanes"):
        check_sizes(plan_of(1000, 1, others, 1), batch_size=others, world_size=world_size)


@pytest.mark.parametrize(
    ("lanes", "ranks", "batch", "message"),
    [
        (8, 3, 24, "use 2 or 4 ranks, or 6 or 9 lanes"),
        (8, 16, 16, "use 8 ranks, or 16 lanes"),
        (8, 2, 100, "use a batch of 96 or 104"),
        (8, 2, 5, "use a batch of 8"),
        (8, 0, 8, "expected batch_size and world_size >= 1"),
    ],
)
def test_errors_of_invalid_sizes_suggest_valid_sizes(lanes, ranks, batch, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_sizes(plan_of(1000, 1, lanes, 1), batch_size=batch, world_size=ranks)


def test_more_lanes_than_shards_are_rejected_with_two_remedies():
    with pytest.raises(ConfigError, match="at most 3 lanes, or at most 33 samples per shard"):
        DataOrder(plan_of(100, 40, 4, 1))
    DataOrder(plan_of(100, 40, 3, 1))
    DataOrder(plan_of(100, 33, 4, 1))
    with pytest.raises(ConfigError, match="at least 4 samples"):
        DataOrder(plan_of(3, 1, 4, 1))


def test_invalid_positions_and_shards_are_rejected():
    plan = plan_of(10, 3, 2, 1)
    with pytest.raises(ValueError, match=r"0\.\.3, got 4"):
        plan.order(4)
    with pytest.raises(ValueError, match="no position"):
        DataOrder(plan).window_at(0, -1)
    with pytest.raises(ValueError, match="no position"):
        DataOrder(plan).window_at(2, 0)


def test_the_digest_of_an_order_ignores_only_the_reading_order():
    plan = plan_of(10, 3, 2, 1)
    shuffled = plan.model_copy(update={"lanes": 1, "window": 3})
    assert [o.digest for o in orders(plan)] == [o.digest for o in orders(shuffled)]
    for change in ({"seed": 9}, {"fingerprint": "g"}, {"format": "npy"}, {"purpose": "x"}):
        assert plan.model_copy(update=change).order(0).digest != plan.order(0).digest

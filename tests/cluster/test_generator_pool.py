"""The generator pool writes the same bytes as a plain loop, even if workers die."""

import os

import pytest
import ray
from small_stages import (
    contents,
    generating_stage,
    make_shards,
    wait_until,
    workers_named,
)

from dist_tl.cluster import generators
from dist_tl.cluster.config import GeneratorsConfig
from dist_tl.cluster.generators import GeneratorPool
from dist_tl.errors import ConfigError, WorkerError
from dist_tl.shards.manifest import committed_indices, read_entry
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("one_thread")]


def open_pool(store, *, positions=None, **config):
    """A pool of one worker; readers report no positions."""
    config = GeneratorsConfig(**{"min": 1, "max": 1, "cpus": 0.5, **config})
    return GeneratorPool(config, store.url, positions=lambda: dict(positions or {}))


def finish(pool, progress):
    def is_done():
        pool.check()
        return progress.done

    wait_until(is_done)


def shards(store, name="pp"):
    return contents(store, f"{layout.stage_prefix(name)}/shards")


@pytest.fixture
def plain_shards(tmp_path):
    """Generates the shards of the same stage in a plain loop in this process."""

    def make(**fields):
        store = ObjectStore(tmp_path / "plain")
        spec = generating_stage(store, **fields)
        make_shards(store, spec, range(spec.plan().num_shards))
        return shards(store, spec.name)

    return make


# With Ray processes.


@pytest.mark.ray
def test_a_pool_with_a_killed_worker_and_new_bounds_writes_the_bytes_of_a_plain_loop(
    ray_local, store, plain_shards
):
    slow = {"num_shards": 60, "num_steps": 10}
    spec = generating_stage(store, **slow)
    with open_pool(store, min=3, max=3) as pool:
        progress = pool.add(spec, batch_size=4)
        wait_until(lambda: len(workers_named("GeneratorActor")) == 3 and progress.committed > 3)
        wait_until(lambda: workers_named("GeneratorActor.fulfil"))[0].kill()
        pool.scale(1, 1)
        wait_until(lambda: len(workers_named("GeneratorActor")) == 1)
        assert not progress.done, "scaled too late to test anything"
        finish(pool, progress)
        assert progress.committed == 60
        wait_until(lambda: not workers_named("GeneratorActor"))
    assert shards(store) == plain_shards(**slow)
    assert progress.bytes == sum(map(len, shards(store).values()))


@pytest.mark.ray
def test_a_named_error_of_a_worker_reaches_the_driver_unwrapped(ray_local, store):
    spec = generating_stage(store)
    store.delete(f"generator/{layout.MODEL_TENSORS}")
    with open_pool(store) as pool:
        progress = pool.add(spec, batch_size=4)
        with pytest.raises(ConfigError, match=r"model\.safetensors not found") as caught:
            finish(pool, progress)
    assert type(caught.value) is ConfigError  # not Ray's imitation of it


class DiesOnOpen:
    def open(self):
        os._exit(1)


@pytest.mark.ray
def test_workers_that_die_during_start_up_are_delayed_and_end_the_job(
    ray_local, store, monkeypatch
):
    monkeypatch.setattr(generators, "MAX_PAUSE_S", 0.2)
    worker = ray.remote(DiesOnOpen).options(num_cpus=0.1, max_restarts=0, max_task_retries=0)
    monkeypatch.setattr(GeneratorPool, "_new_worker", lambda self: worker.remote())
    spec = generating_stage(store, num_shards=3)
    with open_pool(store, max_restarts=2) as pool:
        progress = pool.add(spec, batch_size=4)
        with pytest.raises(WorkerError, match="lost for good"):
            finish(pool, progress)


@pytest.mark.ray
def test_a_worker_that_dies_too_often_ends_the_job_with_a_remedy(ray_local, store):
    spec = generating_stage(store, num_shards=3, num_steps=500)
    with open_pool(store, max_restarts=0) as pool:
        progress = pool.add(spec, batch_size=4)
        [victim] = wait_until(lambda: workers_named("GeneratorActor.fulfil"))
        victim.kill()
        with pytest.raises(WorkerError, match="start the same job again"):
            finish(pool, progress)


# With threads: the decisions of the pool.


@pytest.mark.parametrize("workers", [1, 3])
def test_a_pool_of_any_size_writes_the_bytes_of_a_plain_loop(threads, store, plain_shards, workers):
    with open_pool(store, min=workers, max=workers) as pool:
        progress = pool.add(generating_stage(store, num_shards=7), batch_size=4)
        finish(pool, progress)
    assert threads.most == workers
    assert shards(store) == plain_shards(num_shards=7)


def test_no_worker_runs_without_work(threads, store):
    with open_pool(store, min=2, max=2) as pool:
        pool.wait(0.2)
        assert (pool.num_workers, threads.alive) == (0, 0)
        finish(pool, pool.add(generating_stage(store, num_shards=2), batch_size=4))
        wait_until(lambda: (pool.num_workers, threads.alive) == (0, 0), timeout_s=5)


def test_no_worker_outlives_the_pool(threads, store):
    with open_pool(store, min=2, max=2) as pool:
        pool.add(generating_stage(store, num_shards=100), batch_size=4)
        wait_until(lambda: threads.alive == 2)
    assert threads.alive == 0


def test_the_pool_stays_within_its_window_ahead_of_the_readers(threads, store):
    spec, positions = generating_stage(store, num_shards=16), {}
    with open_pool(store, positions=positions, window=5) as pool:
        progress = pool.add(spec, batch_size=4)
        for position, horizon in [(0, 5), (3, 8), (4, 9)]:
            positions["pp"] = position
            wait_until(lambda horizon=horizon: progress.committed == horizon)
            pool.wait(0.3)
            assert committed_indices(store, "pp") == set(range(horizon))
        pool.release()
        finish(pool, progress)


def test_a_window_smaller_than_a_batch_is_widened_to_the_reach_of_the_batch(threads, store):
    with open_pool(store, window=1) as pool:
        progress = pool.add(generating_stage(store, num_shards=16), batch_size=12)
        wait_until(lambda: progress.committed >= 4)  # the batch spans at most four shards


def test_restarted_readers_get_the_shards_after_the_last_committed_one(threads, store):
    spec = generating_stage(store, num_shards=16)
    make_shards(store, spec, range(10))
    with open_pool(store, window=5) as pool:  # no reader has reported shard 9 yet
        progress = pool.add(spec, batch_size=4)
        wait_until(lambda: progress.committed >= 12)


def test_committed_shards_are_not_generated_again(threads, store, plain_shards):
    spec = generating_stage(store)
    make_shards(store, spec, [0, 1, 4])
    before = {index: read_entry(store, "pp", index) for index in (0, 1, 4)}
    with open_pool(store) as pool:
        progress = pool.add(spec, batch_size=4)
        assert progress.committed == 3
        assert progress.todo == [2, 3, 5]
        finish(pool, progress)
        assert progress.committed == 6
    assert {index: read_entry(store, "pp", index) for index in (0, 1, 4)} == before
    assert shards(store) == plain_shards()


def test_a_finished_stage_starts_no_worker(threads, store):
    spec = generating_stage(store)
    make_shards(store, spec, range(6))
    with open_pool(store) as pool:
        assert pool.add(spec, batch_size=4).done
        pool.wait(0.2)
        assert threads.alive == 0


def test_stages_are_generated_in_the_order_of_adding(threads, store):
    first, second = (generating_stage(store, name, num_shards=4) for name in ("first", "second"))
    with open_pool(store) as pool:
        earlier, later = (pool.add(spec, batch_size=4) for spec in (first, second))
        finish(pool, later)
        assert earlier.last_commit_at <= later.first_commit_at


def test_a_stage_with_a_full_window_does_not_block_the_next(threads, store):
    first, second = (generating_stage(store, name, num_shards=9) for name in ("first", "second"))
    with open_pool(store, window=4) as pool:
        held, progress = (pool.add(spec, batch_size=4) for spec in (first, second))
        wait_until(lambda: (held.committed, progress.committed) == (4, 4))


def test_the_pool_grows_to_its_maximum_while_readers_wait(threads, store):
    with open_pool(store, min=1, max=3) as pool:
        pool.add(generating_stage(store, num_shards=100), batch_size=4)
        wait_until(lambda: threads.alive == 3)


def test_the_pool_shrinks_to_its_minimum_while_the_backlog_is_large(threads, store, monkeypatch):
    monkeypatch.setattr(generators, "IDLE_S", 0.2)
    with open_pool(store, min=1, max=2, window=6, low_backlog=4) as pool:
        progress = pool.add(generating_stage(store, num_shards=16), batch_size=4)
        wait_until(lambda: (progress.committed, threads.alive) == (6, 1))
        assert threads.most == 2


def test_a_running_pool_can_be_scaled(threads, store):
    with open_pool(store) as pool:
        progress = pool.add(generating_stage(store, num_shards=200), batch_size=4)
        for workers in (1, 3, 2):
            pool.scale(workers, workers)
            wait_until(lambda workers=workers: threads.alive == workers, timeout_s=5)
        assert not progress.done


def test_a_pool_scaled_to_zero_pauses_and_resumes(threads, store):
    with open_pool(store) as pool:
        progress = pool.add(generating_stage(store, num_shards=30), batch_size=4)
        wait_until(lambda: progress.committed >= 1)
        pool.scale(0, 0)
        wait_until(lambda: threads.alive == 0)
        assert not progress.done
        pool.scale(1, 1)
        finish(pool, progress)

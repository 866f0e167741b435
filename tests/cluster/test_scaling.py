"""A word in the run's store changes the size of a running pool; nodes that go hand orders back."""

import pytest
from small_stages import contents, generating_stage, make_shards, wait_until

from dist_tl.cluster import generators
from dist_tl.cluster.config import GeneratorsConfig
from dist_tl.cluster.generators import DRAINING, GeneratorActor, GeneratorPool
from dist_tl.cluster.scaling import Bounds, Scale, parse_sizes, read_scale, write_scale
from dist_tl.errors import ConfigError
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize(
    ("text", "bounds"),
    [("generators=4", (4, 4)), ("generators=1..8", (1, 8)), ("generators=0", (0, 0))],
)
def test_sizes_are_read(text, bounds):
    assert parse_sizes([text]) == {"generators": Bounds(min=bounds[0], max=bounds[1])}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("generators", "generators=N or generators=MIN..MAX"),
        ("generators=-1", "generators=N"),
        ("generators=4..2", "MIN <= MAX"),
        ("experts=2", "generators=N"),
        ("trainers=4", "fixed size"),
    ],
)
def test_other_sizes_are_refused_with_what_would_do(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_sizes([text])


def test_what_was_said_is_kept_and_a_damaged_word_is_a_named_error(store):
    assert read_scale(store) is None
    scale = Scale(generators=Bounds(min=1, max=3))
    write_scale(store, scale)
    assert read_scale(store) == scale
    store.write(layout.SCALE, b"{")
    with pytest.raises(ConfigError, match=r"scale.json is damaged"):
        read_scale(store)


def test_a_running_pool_obeys(threads, store, monkeypatch):
    monkeypatch.setattr(generators, "ASK_EVERY_S", 0.1)
    config = GeneratorsConfig(min=1, max=1, cpus=0.5)
    with GeneratorPool(config, store.url, positions=dict) as pool:
        pool.add(generating_stage(store, num_shards=300), batch_size=4)
        wait_until(lambda: threads.alive == 1)
        for low, high in ((3, 3), (1, 1)):
            write_scale(ObjectStore(store.url), Scale(generators=Bounds(min=low, max=high)))
            wait_until(lambda low=low: threads.alive == low, timeout_s=10)


def test_a_worker_whose_node_goes_hands_its_order_back(store, tmp_path, monkeypatch):
    sign = tmp_path / "draining"
    monkeypatch.setenv(DRAINING, str(sign))
    spec, actor = generating_stage(store, num_shards=2), GeneratorActor(store.url, 1)
    assert not actor.is_leaving()
    assert actor.fulfil(spec, 0).index == 0
    sign.touch()
    assert actor.is_leaving()
    assert actor.fulfil(spec, 1) is None
    assert len(store.list(layout.entries_prefix(spec.name))) == 1


class LeavesOnce(GeneratorActor):
    """Its node is drained while it has its third order."""

    left = False

    def fulfil(self, spec, index):
        if index == 2 and not LeavesOnce.left:
            LeavesOnce.left = True
            return None
        return super().fulfil(spec, index)


def test_an_order_that_was_handed_back_is_done_by_another(threads, store, monkeypatch):
    monkeypatch.setattr(generators, "GeneratorActor", LeavesOnce)
    with GeneratorPool(GeneratorsConfig(cpus=0.5), store.url, positions=dict) as pool:
        progress = pool.add(generating_stage(store, num_shards=6), batch_size=4)
        wait_until(lambda: pool.check() or progress.done)
    assert LeavesOnce.left
    spec = progress.spec
    other = ObjectStore(f"{store.url}-plain")
    generating_stage(other, num_shards=6)
    make_shards(other, spec, range(6))
    prefix = f"{layout.stage_prefix(spec.name)}/shards"
    assert contents(store, prefix) == contents(other, prefix)

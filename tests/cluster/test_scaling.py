"""Scaling overrides resize a running pool; workers on draining nodes return their shards."""

import pytest
from small_stages import contents, generating_stage, make_shards, wait_until

from dist_tl.cluster import generators
from dist_tl.cluster.config import GeneratorsConfig
from dist_tl.cluster.generators import DRAINING, GeneratorActor, GeneratorPool
from dist_tl.cluster.scaling import Bounds, Scale, parse_sizes, read_scale, write_scale
from dist_tl.errors import ConfigError, DamagedError
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize(
    ("text", "bounds"),
    [("generators=4", (4, 4)), ("generators=1..8", (1, 8)), ("generators=0", (0, 0))],
)
def test_sizes_are_parsed(text, bounds):
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
def test_invalid_sizes_are_rejected_with_the_expected_form(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_sizes([text])


def test_an_override_is_stored_and_a_damaged_one_is_a_named_error(store):
    assert read_scale(store) is None
    scale = Scale(generators=Bounds(min=1, max=3))
    write_scale(store, scale)
    assert read_scale(store) == scale
    store.write(layout.SCALE, b"{")
    with pytest.raises(DamagedError, match=r"scale.json is damaged"):
        read_scale(store)


def test_a_running_pool_applies_an_override(threads, store, monkeypatch):
    monkeypatch.setattr(generators, "OVERRIDE_POLL_S", 0.1)
    config = GeneratorsConfig(min=1, max=1, cpus=0.5)
    with GeneratorPool(config, store.url, positions=dict) as pool:
        pool.add(generating_stage(store, num_shards=300), batch_size=4)
        wait_until(lambda: threads.alive == 1)
        for low, high in ((3, 3), (1, 1)):
            write_scale(ObjectStore(store.url), Scale(generators=Bounds(min=low, max=high)))
            wait_until(lambda low=low: threads.alive == low, timeout_s=10)


def test_a_worker_on_a_draining_node_returns_its_shard(store, tmp_path, monkeypatch):
    marker = tmp_path / "draining"
    monkeypatch.setenv(DRAINING, str(marker))
    spec, actor = generating_stage(store, num_shards=2), GeneratorActor(store.url, 1)
    assert not actor.is_draining()
    assert actor.fulfil(spec, 0).index == 0
    marker.touch()
    assert actor.is_draining()
    assert actor.fulfil(spec, 1) is None
    assert len(store.list(layout.entries_prefix(spec.name))) == 1


class DrainsOnce(GeneratorActor):
    """Its node starts to drain when it gets its third shard."""

    drained = False

    def fulfil(self, spec, index):
        if index == 2 and not DrainsOnce.drained:
            DrainsOnce.drained = True
            return None
        return super().fulfil(spec, index)


def test_another_worker_generates_a_returned_shard(threads, store, monkeypatch):
    monkeypatch.setattr(generators, "GeneratorActor", DrainsOnce)
    with GeneratorPool(GeneratorsConfig(cpus=0.5), store.url, positions=dict) as pool:
        progress = pool.add(generating_stage(store, num_shards=6), batch_size=4)
        wait_until(lambda: pool.check() or progress.done)
    assert DrainsOnce.drained
    spec = progress.spec
    other = ObjectStore(f"{store.url}-plain")
    generating_stage(other, num_shards=6)
    make_shards(other, spec, range(6))
    prefix = f"{layout.stage_prefix(spec.name)}/shards"
    assert contents(store, prefix) == contents(other, prefix)

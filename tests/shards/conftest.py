"""Small stages of pseudo samples, with pixels and labels derived from their numbers."""

import hashlib

import numpy as np
import pytest

from dist_tl.shards.manifest import ShardEntry
from dist_tl.shards.order import ShardPlan, orders
from dist_tl.shards.sample import PseudoSample
from dist_tl.shards.writer import write_shard
from dist_tl.storage.layout import entry_key, shard_key
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import write_record


class Stage:
    """Builds plans, samples and shards for the tests."""

    shape = (4, 5, 3)

    def plan(self, num_samples=24, samples_per_shard=4, lanes=2, window=1, **fields):
        return ShardPlan(
            stage=fields.pop("stage", "pp"),
            purpose="test",
            fingerprint="f" * 16,
            seed=fields.pop("seed", 7),
            num_samples=num_samples,
            samples_per_shard=samples_per_shard,
            lanes=lanes,
            window=window,
            **fields,
        )

    def sample(self, number, **fields):
        rng = np.random.default_rng(number)
        image = rng.integers(0, 256, self.shape, dtype=np.uint8)
        fields.setdefault("label", number % 10)
        return PseudoSample(number, image, provenance={"target": number, "kind": "soft"}, **fields)

    def samples(self, order, **fields):
        return [self.sample(number, **fields) for number in order.numbers]

    def write(self, store, plan, indices=None):
        for order in orders(plan):
            if indices is None or order.index in indices:
                write_shard(order, self.samples(order), store)

    def commit_bytes(self, store, plan, index, data):
        """Commits any bytes as a shard, like a hostile or broken writer."""
        order = plan.order(index)
        entry = ShardEntry(
            index=index,
            key=shard_key(plan.stage, index),
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
            samples=order.num_samples,
            order=order.digest,
            seconds=0,
            host="elsewhere",
            committed_at=0,
        )
        store.write(shard_key(plan.stage, index), data)
        write_record(store, entry_key(plan.stage, index), entry)


@pytest.fixture
def stage():
    return Stage()


@pytest.fixture(params=["folder", "memory"])
def store(request, tmp_path):
    if request.param == "folder":
        return ObjectStore(tmp_path / "run")
    return ObjectStore(f"memory://{tmp_path.name}-{abs(hash(str(tmp_path)))}")

"""Stages that train on pseudo samples, also while these are still being generated."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from dist_tl.errors import ConfigError, ShardTimeoutError
from dist_tl.methods.pseudo.conditions import ConditionConfig
from dist_tl.methods.pseudo.p_ssl import PSSLConfig
from dist_tl.models.generators.config import StoredDiffusionConfig
from dist_tl.shards.drawing import ByClass, ByTarget, GenerateSpec, draw_samples
from dist_tl.shards.order import DataOrder, orders
from dist_tl.shards.writer import ShardConfig, write_shard
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.loop import read_rows
from dist_tl.train.objectives import PSSLSpec
from dist_tl.train.stage import run_stage

K = 3


class Painter:
    """A generator of noisy images that are dark, grey or bright by class."""

    num_classes, image_shape = K, (1, 8, 8)

    def sample(self, condition, *, rng):
        noise = torch.stack([torch.randn(self.image_shape, generator=g) for g in rng])
        grey = condition @ torch.linspace(-0.6, 0.6, K)
        return grey[:, None, None, None] + 0.2 * noise


Q = torch.randn(5, K, generator=torch.Generator().manual_seed(0)).softmax(dim=1)


def generate_spec(draw=None, *, num_samples=48, window=1, name="pp-shards"):
    return GenerateSpec(
        name=name,
        seed=4,
        generator=StoredDiffusionConfig(path="unused"),
        generator_fingerprint="g" * 16,
        num_classes=K,
        image_shape=(1, 8, 8),
        draw=draw or ByClass(),
        num_samples=num_samples,
        batch_size=4,
        shards=ShardConfig(samples_per_shard=4, lanes=4, window=window),
    )


P_SSL = generate_spec(ByTarget(condition=ConditionConfig()), name="p_ssl-shards-seed0")


def make_shards(store, spec, indices=None):
    for order in orders(spec.plan()):
        if indices is None or order.index in indices:
            write_shard(order, draw_samples(order, spec, Painter(), Q), store)


class Killed(BaseException):
    """The machine died."""


def run_on(rank, world_size, spec, url, killed_after=None, log_every=1):
    def on_progress(step, loss, shard):
        if step == killed_after:
            raise Killed

    try:
        return run_stage(
            spec,
            ObjectStore(url),
            rank=rank,
            world_size=world_size,
            on_progress=on_progress,
            log_every=log_every,
        )
    except Killed:
        return None


def curve_in(url, spec):
    rows = read_rows(ObjectStore(url).read(layout.metrics_key(spec.name)))
    timed = {"time", "elapsed_s", "starved_s"}
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def model_in(url, spec):
    return ObjectStore(url).read(f"{layout.stage_model_prefix(spec.name)}/model.safetensors")


@pytest.fixture
def run_url(tmp_path):
    """Returns the URL of a named run."""
    return lambda name: str(tmp_path / name)


@pytest.fixture
def pp_stage(stage_spec):
    """Builds a stage of pseudo pre-training on the shards of a generate stage."""

    def make(generate, **fields):
        fields.setdefault("evaluate", None)
        return stage_spec(name="pp-trunk-seed0", labelled=generate.plan(), **fields)

    return make


@pytest.fixture
def p_ssl_stage(stage_spec):
    """Builds a stage of P-SSL on digits and the shards of a generate stage."""

    def make(generate, *, weight=1.0, **fields):
        config = PSSLConfig(weight=weight, threshold=0.3)
        return stage_spec(
            objective=PSSLSpec(p_ssl=config),
            unlabelled=generate.plan(),
            unlabelled_batch_size=8,
            **fields,
        )

    return make


# Pseudo pre-training.


def test_a_network_learns_the_classes_of_the_pseudo_samples(alone, pp_stage, run_url):
    make_shards(ObjectStore(run_url("run")), generate_spec())
    spec = pp_stage(generate_spec(), steps=30, every_steps=0)
    result = run_on(0, 1, spec, run_url("run"))
    assert result.final_loss < 0.5 < 0.9 < curve_in(run_url("run"), spec)[0]["loss"]
    assert result.samples == 240


@pytest.mark.parametrize("window", [1, 2])
def test_the_first_epoch_of_stored_samples_has_the_curve_of_fresh_ones(
    alone, pp_stage, run_url, window
):
    """Fresh: exactly as many samples as the steps consume. Stored: more; those are the first.

    Exact if complete windows are read: if the stage ends inside the last window of a lane, the
    window is shuffled over fewer samples.
    """
    fresh = generate_spec(num_samples=64, window=window)
    stored = generate_spec(num_samples=100, window=window)
    curves = {}
    for name, generate in (("fresh", fresh), ("stored", stored)):
        make_shards(ObjectStore(run_url(name)), generate)
        spec = pp_stage(generate, steps=8)
        run_on(0, 1, spec, run_url(name))
        curves[name] = curve_in(run_url(name), spec)
    assert len(curves["fresh"]) == 8
    assert curves["stored"] == curves["fresh"]
    read = DataOrder(stored.plan(), seed=11)
    seen = np.concatenate([read.batch_numbers(step, 8) for step in range(8)])
    assert sorted(seen.tolist()) == list(range(64))


def test_one_and_two_workers_train_on_the_same_pseudo_samples(alone, two_ranks, pp_stage, run_url):
    spec = pp_stage(generate_spec(), norm="group")
    for name in ("one", "two"):
        make_shards(ObjectStore(run_url(name)), generate_spec())
    run_on(0, 1, spec, run_url("one"))
    two_ranks(run_on, spec, run_url("two"))
    one, two = (curve_in(run_url(name), spec) for name in ("one", "two"))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-4)


def test_shards_without_labels_are_rejected_for_pre_training(alone, pp_stage, run_url):
    make_shards(ObjectStore(run_url("run")), P_SSL)
    with pytest.raises(ConfigError, match="no class labels"):
        run_on(0, 1, pp_stage(P_SSL), run_url("run"))


def test_a_missing_shard_is_a_named_error_and_leaves_no_result_or_thread(alone, pp_stage, run_url):
    store = ObjectStore(run_url("run"))
    make_shards(store, generate_spec(), indices=range(7))
    spec = pp_stage(generate_spec(), shard_timeout_s=0.3)
    with pytest.raises(ShardTimeoutError, match="shard 7 of stage 'pp-shards'"):
        run_on(0, 1, spec, run_url("run"))
    assert not store.exists(layout.result_key(spec.name))
    assert [t for t in threading.enumerate() if t.name.startswith("shards-")] == []


def test_a_stage_without_generators_resumes_once_they_are_back(alone, pp_stage, run_url):
    store = ObjectStore(run_url("broken"))
    make_shards(store, generate_spec(), indices=range(10))
    spec = pp_stage(generate_spec(), shard_timeout_s=0.3)
    with pytest.raises(ShardTimeoutError):
        run_on(0, 1, spec, run_url("broken"))
    for name in ("broken", "uninterrupted"):
        make_shards(ObjectStore(run_url(name)), generate_spec())
        run_on(0, 1, spec, run_url(name))
    assert model_in(run_url("broken"), spec) == model_in(run_url("uninterrupted"), spec)
    assert curve_in(run_url("broken"), spec) == curve_in(run_url("uninterrupted"), spec)


def test_throttled_generators_and_trainers_do_not_deadlock(alone, pp_stage, run_url):
    """Generators stay within a window ahead of the readers, so readers must report their
    position even between two losses."""
    store, positions = ObjectStore(run_url("run")), [0]
    generate = generate_spec(num_samples=160)
    spec = pp_stage(generate, steps=20, every_steps=0, shard_timeout_s=20.0)
    window = 2 * DataOrder(generate.plan()).reach(spec.batch_size)
    done = threading.Event()

    def generate_shards():
        for order in orders(generate.plan()):
            while order.index >= positions[-1] + window:
                if done.wait(0.005):
                    return
            write_shard(order, draw_samples(order, generate, Painter(), Q), store)

    with ThreadPoolExecutor(1) as generators:
        making = generators.submit(generate_shards)
        try:
            run_stage(
                spec,
                store,
                rank=0,
                world_size=1,
                on_progress=lambda step, loss, shard: positions.append(shard),
                log_every=1000,
            )
        finally:
            done.set()
        making.result()
    assert positions == sorted(positions)
    assert positions[-1] == generate.plan().num_shards


def test_time_spent_waiting_for_shards_is_reported(alone, pp_stage, run_url):
    store = ObjectStore(run_url("run"))
    make_shards(store, generate_spec(), indices=range(4))

    def make_the_rest():
        time.sleep(0.5)
        make_shards(store, generate_spec())

    with ThreadPoolExecutor(1) as generators:
        generators.submit(make_the_rest)
        result = run_on(0, 1, pp_stage(generate_spec()), run_url("run"))
    assert 0.1 < result.seconds_starved < 20


# P-SSL.


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_killed_p_ssl_stage_resumes_to_identical_results(ranks, p_ssl_stage, run_url, zero_stage):
    """One cursor determines both streams, labelled and unlabelled."""
    spec = p_ssl_stage(P_SSL, engine={"zero_stage": zero_stage})
    for name in ("uninterrupted", "killed"):
        make_shards(ObjectStore(run_url(name)), P_SSL)
    ranks(run_on, spec, run_url("uninterrupted"))
    assert set(ranks(run_on, spec, run_url("killed"), 5)) == {None}
    ranks(run_on, spec, run_url("killed"))
    assert model_in(run_url("killed"), spec) == model_in(run_url("uninterrupted"), spec)
    assert curve_in(run_url("killed"), spec) == curve_in(run_url("uninterrupted"), spec)
    assert {"loss_supervised", "loss_unsupervised", "unmasked"} < set(
        curve_in(run_url("uninterrupted"), spec)[0]
    )


def test_the_loss_is_the_weighted_sum_of_its_parts(alone, p_ssl_stage, run_url):
    store = ObjectStore(run_url("run"))
    make_shards(store, P_SSL)
    for weight in (0.5, 2.0):
        spec = p_ssl_stage(P_SSL, weight=weight, steps=1, name=f"w{weight}")
        run_on(0, 1, spec, run_url("run"))
        [row] = curve_in(run_url("run"), spec)
        parts = row["loss_supervised"] + weight * row["loss_unsupervised"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
        assert row["loss_unsupervised"] > 0


def test_pseudo_samples_with_zero_weight_do_not_change_training_bit_for_bit(
    alone, p_ssl_stage, stage_spec, run_url
):
    make_shards(ObjectStore(run_url("zero")), P_SSL)
    zero = p_ssl_stage(P_SSL, weight=0.0)
    run_on(0, 1, zero, run_url("zero"))
    run_on(0, 1, stage_spec(), run_url("supervised"))
    assert model_in(run_url("zero"), zero) == model_in(run_url("supervised"), stage_spec())

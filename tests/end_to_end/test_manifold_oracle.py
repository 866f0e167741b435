"""The oracle: through the whole distributed path to a number that is known in advance.

Ray actors write samples of the hidden manifold model as shards to S3; two sharded trainers learn
the source network from them, hand its first layer over, and fit the target's readout from further
shards. The errors must be those that theory computes, and the readouts those that solve the
convex problem exactly. Then the same with faults planted, which the oracle must see.
"""

import manifold_oracle as oracle
import numpy as np
import pytest
import torch
from rank_processes import TwoRanks

from dist_tl.datasets.views import ViewsConfig
from dist_tl.jobs.run import open_store
from dist_tl.jobs.spec import TrainingJobConfig
from dist_tl.jobs.workers import open_workers
from dist_tl.methods.hidden_manifold.gaussian_model import (
    binned_moments,
    hidden_features,
    random_feature_covariances,
)
from dist_tl.methods.hidden_manifold.mixture import solve_mixture
from dist_tl.methods.hidden_manifold.moments import MomentSums
from dist_tl.methods.hidden_manifold.saddle_point import solve, spectrum
from dist_tl.models.files import load_network
from dist_tl.shards.drawing import draw_samples, open_generate_stage, open_generator
from dist_tl.shards.loader import ShardLoader
from dist_tl.shards.manifest import read_manifest
from dist_tl.shards.writer import write_shard
from dist_tl.storage import layout
from dist_tl.storage.attempts import begin_attempt
from dist_tl.storage.model_files import read_model_files
from dist_tl.storage.objects import ObjectStore
from dist_tl.telemetry import SilentProgress
from dist_tl.train import feeds, objectives
from dist_tl.train.checkpoints import CheckpointConfig
from dist_tl.train.engine import EngineConfig, OptimizerConfig
from dist_tl.train.models import NewNetwork, PretrainedTrunk, Readout
from dist_tl.train.objectives import ReadoutSpec, SupervisedSpec
from dist_tl.train.spec import StageSpec
from dist_tl.train.stage import run_stage

pytestmark = [pytest.mark.timeout(900)]

SIZES = (200, 800)
DRAWS = 10
SOURCE = "oracle-source"
FRESH = NewNetwork(network=oracle.NETWORK, num_classes=2)
TRANSFERRED = PretrainedTrunk(model=layout.stage_model_prefix(SOURCE), num_classes=2)


def stage(name, model, objective, shards, *, steps, batch_size, rate, schedule):
    optimizer = OptimizerConfig(learning_rate=rate, weight_decay=0.0, warmup=0.0, schedule=schedule)
    return StageSpec(
        name=name,
        seed=3,
        model=model,
        objective=objective,
        image_shape=oracle.SHAPE,
        labelled=shards.plan(),
        views=ViewsConfig(kind="none"),
        steps=steps,
        batch_size=batch_size,
        lanes=2,
        optimizer=optimizer,
        engine=EngineConfig(clip_norm=0.0),
        checkpoints=CheckpointConfig(every_steps=500),
    )


def source_stage(shards):
    return stage(
        SOURCE,
        FRESH,
        SupervisedSpec(),
        shards,
        steps=930,
        batch_size=256,
        rate=2e-3,
        schedule="constant",
    )


def readout_stage(name, trunk, shards):
    objective = ReadoutSpec(penalty=oracle.PENALTY, num_rows=shards.num_samples)
    model = Readout(trunk=trunk)
    return stage(
        name,
        model,
        objective,
        shards,
        steps=300,
        batch_size=shards.num_samples,
        rate=4e-3,
        schedule="cosine",
    )


def target_shards(size, draw):
    name = f"oracle-n{size}-draw{draw}"
    return oracle.shards_of(name, "target", size, seed=100 + draw, per_shard=size // 4)


def trained(store, name):
    network = load_network(read_model_files(store, layout.stage_model_prefix(name)))
    return oracle.readout_of(network)


class Fitted:
    """The readouts of one arm and size, by draw, with the feature map that they share."""

    def __init__(self, store, arm, size, suffix=""):
        names = [f"{arm}-n{size}-draw{draw}{suffix}" for draw in range(DRAWS)]
        parts = [trained(store, name) for name in names]
        self.readouts = torch.stack([readout for readout, _ in parts])
        self.weights = parts[0][1]
        assert all(torch.equal(weights, self.weights) for _, weights in parts)
        self.errors = oracle.error_of(self.readouts, self.weights)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The store after everything went through generators, shards and two trainers."""
    job = TrainingJobConfig(
        kind="oracle",
        run=str(tmp_path_factory.mktemp("oracle") / "run"),
        store="embedded",
        lanes=2,
        session={"num_cpus": 6},
    )
    source = oracle.shards_of("source-shards", "source", 8000, seed=1, per_shard=500)
    targets = {(n, d): target_shards(n, d) for n in SIZES for d in range(DRAWS)}
    with (
        open_store(job) as store,
        open_workers(job, begin_attempt(store), SilentProgress()) as workers,
    ):
        for shards in (source, *targets.values()):
            open_generate_stage(store, shards, None, created_by={})
            workers.generate(shards, batch_size=max(256, shards.num_samples))
        alone = {}
        workers.train([source_stage(source)])
        for (size, draw), shards in targets.items():
            if draw < 2:  # one rank must find what two find; a few draws tell
                alone[size, draw] = f"alone-{size}-{draw}"
                spec = readout_stage(f"random-n{size}-draw{draw}-alone", FRESH, shards)
                workers.start_trials(alone[size, draw], [spec])
        for name, trunk in (("random", FRESH), ("transferred", TRANSFERRED)):
            workers.train(
                [readout_stage(f"{name}-n{n}-draw{d}", trunk, s) for (n, d), s in targets.items()]
            )
        for ticket in alone.values():
            workers.trial_results(ticket)
        workers.finish_generation()
        yield store


def theory(arm, size, weights):
    alpha, task = size / oracle.HIDDEN, oracle.target_task()
    if arm == "random":
        law = random_feature_covariances(task, weights, "tanh")
        found = spectrum(law.psi_dd, law.phi_dK, law.omega_KK, task.teacher_d)
        return solve(found, alpha=alpha, lam=oracle.PENALTY, loss="logistic").error
    bins = binned_moments(
        task, weights, "tanh", num_samples=100_000, seed=oracle.TASK_SEED, purpose="oracle bins"
    )
    return solve_mixture(
        bins.p_B, bins.mu_BK, bins.cov_BKK, alpha=alpha, lam=oracle.PENALTY, loss="logistic"
    ).error


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("arm", "margin"), [("random", 0.005), ("transferred", 0.003)])
def test_the_error_is_the_one_that_theory_computes(path, arm, margin, size):
    fitted = Fitted(path, arm, size)
    mean, error = np.mean(fitted.errors), np.std(fitted.errors, ddof=1) / DRAWS**0.5
    expected = theory(arm, size, fitted.weights)
    assert abs(mean - expected) <= (3 * error if arm == "random" else 0) + margin, (mean, expected)


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("arm", ["random", "transferred"])
def test_every_readout_is_the_exact_optimum_of_its_samples(path, arm, size):
    fitted = Fitted(path, arm, size)
    for draw, readout in enumerate(fitted.readouts):
        exact = oracle.optimum(path, target_shards(size, draw), fitted.weights)
        assert oracle.relative_gap(readout, exact) < 1e-3


@pytest.mark.ray
@pytest.mark.s3
def test_the_source_network_learnt_its_task_and_transfer_pays(path):
    transferred, random = (Fitted(path, arm, 200) for arm in ("transferred", "random"))
    assert np.mean(transferred.errors) < 0.08
    assert np.mean(random.errors) - np.mean(transferred.errors) > 0.15


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.parametrize("size", SIZES)
def test_one_rank_finds_what_two_find(path, size):
    for draw in range(2):
        one, _ = trained(path, f"random-n{size}-draw{draw}-alone")
        two, _ = trained(path, f"random-n{size}-draw{draw}")
        assert oracle.relative_gap(one, two) < 1e-3


@pytest.mark.ray
@pytest.mark.s3
def test_moments_summed_from_shards_are_those_of_the_samples(path):
    shards = target_shards(800, 0)
    generator = open_generator(path, shards.generator)
    weights = Fitted(path, "random", 800).weights
    x, y = oracle.stored_samples(path, shards)
    assert generator.image_shape == oracle.SHAPE
    parts = []
    for rows in torch.arange(800).split(200):
        sums = MomentSums.zeros(latent=0, hidden=oracle.HIDDEN)
        sums.add(hidden_features(weights, x[rows], "tanh"), None, y[rows])
        parts.append(sums)
    whole = MomentSums.zeros(latent=0, hidden=oracle.HIDDEN)
    whole.add(hidden_features(weights, x, "tanh"), None, y)
    merged = MomentSums.merge(parts)
    torch.testing.assert_close(merged.sum_vv_KK, whole.sum_vv_KK, rtol=1e-12, atol=1e-9)
    assert merged.count == 800
    assert 0.4 < float((y > 0).double().mean()) < 0.6


# Planted faults: the readout of 200 samples on two ranks, without Ray.


def rolled_labels(rank, monkeypatch):
    """Labels one sample late: a wrong order of what belongs together."""
    read = feeds.ShardRows.read_from

    def shifted(self, cursor):
        for lanes in read(self, cursor):
            yield [feeds.LaneRows(r.lane, r.images, np.roll(r.labels, 1), r.numbers) for r in lanes]

    monkeypatch.setattr(feeds.ShardRows, "read_from", shifted)


def lost_shard(rank, monkeypatch):
    """The first shard of every lane is read in place of its second."""
    load = ShardLoader._load
    monkeypatch.setattr(
        ShardLoader, "_load", lambda self, index: load(self, index if index < 2 else index - 2)
    )


def doubled_batch(rank, monkeypatch):
    """The first half of every batch is seen twice, the second not at all."""
    read = feeds.ShardRows.read_from

    def twice(self, cursor):
        for lanes in read(self, cursor):
            yield [half_twice(rows) for rows in lanes]

    monkeypatch.setattr(feeds.ShardRows, "read_from", twice)


def half_twice(rows):
    kept = np.tile(np.arange(len(rows.numbers) // 2), 2)
    return feeds.LaneRows(rows.lane, rows.images[kept], rows.labels[kept], rows.numbers[kept])


def summed_gradients(rank, monkeypatch):
    """The ranks' gradients of the data are added up instead of averaged."""
    fit = objectives.ReadoutFit.__call__

    def doubled(self, module, batch, step):
        loss, figures = fit(self, module, batch, step)
        return loss + objectives.supervised(module, batch, step)[0], figures

    monkeypatch.setattr(objectives.ReadoutFit, "__call__", doubled)


def lonely_gradients(rank, monkeypatch):
    """The second rank's gradient is lost in the average."""
    fit = objectives.ReadoutFit.__call__

    def only_first(self, module, batch, step):
        loss, figures = fit(self, module, batch, step)
        return (loss * 2 if rank == 0 else loss * 0), figures

    monkeypatch.setattr(objectives.ReadoutFit, "__call__", only_first)


FAULTS = {
    "none": None,
    "wrong order": rolled_labels,
    "lost shard": lost_shard,
    "doubled batch": doubled_batch,
    "summed gradients": summed_gradients,
    "lost gradients": lonely_gradients,
}


def fit_with(rank, world_size, url, fault):
    store, shards = ObjectStore(url), target_shards(200, 0)
    spec = readout_stage(f"planted-{fault.replace(' ', '-')}", FRESH, shards)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if FAULTS[fault] is not None:
            FAULTS[fault](rank, monkeypatch)
        run_stage(spec, store, rank=rank, world_size=world_size)
    return spec.name


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Two ranks, and a store with the samples that all faults are tried on."""
    folder = tmp_path_factory.mktemp("planted")
    store, shards = ObjectStore(str(folder / "store")), target_shards(200, 0)
    open_generate_stage(store, shards, None, created_by={})
    generator = open_generator(store, shards.generator)
    write_all(store, shards, generator)
    assert read_manifest(store, shards.name) is not None
    ranks = TwoRanks(folder)
    yield store, shards, ranks
    ranks.close()


def write_all(store, shards, generator):
    plan = shards.plan()
    for index in range(plan.num_shards):
        order = plan.order(index)
        write_shard(order, draw_samples(order, shards, generator, None), store)


def lands(planted, fault):
    """Whether what two ranks fitted is the exact optimum of the samples in the shards."""
    store, shards, ranks = planted
    name = ranks(fit_with, store.url, fault)[0]
    readout, weights = trained(store, name)
    gap = oracle.relative_gap(readout, oracle.optimum(store, shards, weights))
    slope = oracle.gradient_norm(readout, weights, store, shards)
    return gap < 1e-3, gap, slope


def test_without_a_fault_the_oracle_is_content(planted):
    content, gap, slope = lands(planted, "none")
    assert content, gap
    assert slope < 1e-2


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "none"])
def test_the_oracle_sees_a_planted_fault(planted, fault):
    content, gap, slope = lands(planted, fault)
    assert not content, gap
    assert gap > 0.02
    assert slope > 0.1

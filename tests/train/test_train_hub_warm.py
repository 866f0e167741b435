"""The tasks and stages of a hub job with a warm start, run one by one in this process."""

import pytest
import torch

from dist_tl.datasets.images import to_float
from dist_tl.jobs.hub.plan import plan as plan_hub
from dist_tl.jobs.hub.spec import HubJob
from dist_tl.jobs.hub.tasks import compute_features, evaluate, measure_time, write_rows
from dist_tl.methods.hub.pathway import Paths
from dist_tl.models.files import load_network
from dist_tl.shards.manifest import committed_indices, open_stage
from dist_tl.shards.reader import read_shard
from dist_tl.storage import layout
from dist_tl.storage.model_files import read_model_files
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.hub_model import load_hub
from dist_tl.train.models import build_model
from dist_tl.train.rows import load_rows
from dist_tl.train.stage import run_stage

DIGITS = {"source": "digits", "classes": [0, 1, 2], "views": {"kind": "digits"}}
NETWORK = {"kind": "resnet", "width": 4, "blocks": [1]}
OPTIMIZER = {"learning_rate": 0.01}
JOB = {
    "kind": "hub",
    "run": "run",
    "lanes": 4,
    "seeds": 1,
    "hub": [
        {
            "name": "turned",
            "train": {
                "data": {**DIGITS, "part": {"index": 0, "of": 2}, "domain": {"rotate": 90}},
                "network": NETWORK,
                "training": {"steps": 3, "batch_size": 8},
            },
        },
        {
            "name": "large",
            "inputs": {"resize": 10},
            "train": {
                "data": {**DIGITS, "part": {"index": 0, "of": 2}, "size": 10},
                "network": NETWORK,
                "training": {"steps": 3, "batch_size": 8},
            },
        },
    ],
    "target": {
        "data": {
            "source": "mixture",
            "views": {"kind": "digits"},
            "domains": {
                "straight": {**DIGITS, "part": {"index": 1, "of": 4}},
                "turned": {**DIGITS, "part": {"index": 3, "of": 4}, "domain": {"rotate": 90}},
            },
        },
        "labels_per_class": 8,
        "training": {"steps": 2, "batch_size": 8, "optimizer": OPTIMIZER},
    },
    "warm_start": {
        "training": {"steps": 40, "batch_size": 8, "optimizer": {"learning_rate": 0.05}},
        "samples_per_shard": 5,
    },
    "router": {"kind": "resnet", "width": 2, "blocks": [1], "norm": "group"},
    "arms": [
        "best_single",
        "ensemble",
        "distilled",
        {"name": "hub_k1", "routes": {"k": 1}},
        {"name": "random_k1", "routes": {"k": 1, "by": "random"}},
    ],
}


@pytest.fixture(scope="module")
def job():
    return HubJob.model_validate(JOB)


@pytest.fixture(scope="module")
def plan(job, alone, tmp_path_factory):
    """After the experts' own trainings, their features, and the shards of rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    plan = plan_hub(job, ObjectStore(tmp_path_factory.mktemp("run")))
    for spec in plan.pretraining():
        run_stage(spec, plan.store, rank=0, world_size=1)
    for task in plan.features_tasks():
        compute_features(task.inputs, plan.store)
    for manifest in plan.manifests():
        open_stage(plan.store, manifest)
    for task in plan.rows_tasks():
        write_rows(task.inputs, plan.store)
    torch.set_num_threads(before)
    return plan


def train(plan, specs):
    return [run_stage(spec, plan.store, rank=0, world_size=1) for spec in specs]


def test_rows_are_images_and_the_features_of_every_expert(plan):
    [name, pick] = [task.inputs.rows for task in plan.rows_tasks()]
    data, shards = load_rows(plan.cached_rows()[name]), plan.shards(name)
    assert len(committed_indices(plan.store, shards.stage)) == 5  # of 24 rows
    samples = [
        sample
        for index in range(shards.num_shards)
        for sample in read_shard(plan.store, shards.stage, index)
    ]
    assert [sample.label for sample in samples] == data.labels.tolist()
    rows = torch.stack([torch.tensor(sample.image).flatten() for sample in samples])
    assert torch.equal(rows[:, :64], to_float(data.images).flatten(1))
    offset = 64
    for single in plan.singles(0):
        network = build_model(
            single.model.model_copy(update={"warm": None}),
            plan.store,
            image_shape=(1, 8, 8),
            seed=0,
        ).eval()
        with torch.no_grad():
            features = network.features(data.tensor())
        width = features.shape[1]
        torch.testing.assert_close(rows[:, offset : offset + width], features)
        offset += width
    assert offset == rows.shape[1]
    kept = load_rows(plan.cached_rows()[pick])
    assert len(kept) == 18  # one of four folds is held out
    assert {i.tobytes() for i in kept.images} < {i.tobytes() for i in data.images}


def test_arms_begin_with_the_result_of_the_warm_start(plan):
    starts = {spec.name: spec for spec in plan.warm_starts(0)}
    assert set(starts) == {
        f"warm-{name}-seed0"
        for name in (
            "single-turned",
            "single-large",
            "pick-turned",
            "pick-large",
            "hub_k1",
            "random_k1",
        )
    }
    train(plan, starts.values())
    single, arm = plan.singles(0)[0], plan.arms(0, best="turned")[1]
    x = load_rows(plan.rows(0, "train")).tensor()
    labels = torch.from_numpy(load_rows(plan.rows(0, "train")).labels)
    for spec in (single, arm):
        cold = spec.model_copy(update={"model": spec.model.model_copy(update={"warm": None})})
        losses = []
        for one in (spec, cold):
            module = build_model(one.model, plan.store, image_shape=(1, 8, 8), seed=one.seed)
            with torch.no_grad():
                logits = module.eval()(x)
            losses.append(torch.nn.functional.cross_entropy(logits, labels).item())
        assert losses[0] < losses[1] - 0.05


def test_all_arms_are_trained_evaluated_and_timed(plan):
    """The results of a hub are those of the stored hub on the test rows."""
    train(plan, [*plan.warm_starts(0), *plan.singles(0, pick=True), *plan.singles(0)])
    specs = plan.arms(0, best="large")
    results = dict(zip((spec.name for spec in specs), train(plan, specs), strict=True))
    answers = {task.name: evaluate(task.inputs, plan.store) for task in plan.evaluation_tasks()}
    assert set(answers) == {
        "evaluate-ensemble-seed0",
        "evaluate-hub_k1-seed0",
        "evaluate-random_k1-seed0",
    }
    for name in ("hub_k1", "random_k1"):
        found = answers[f"evaluate-{name}-seed0"]
        assert found.predictions == results[f"{name}-seed0"].predictions
        assert found.correct == results[f"{name}-seed0"].correct
        assert all(sum(weight > 0 for weight in row) == 1 for row in found.weights)
        hub = load_hub(plan.store, layout.stage_model_prefix(f"{name}-seed0"))
        with torch.no_grad():
            paths = Paths(*hub(load_rows(plan.rows(0, "test")).tensor(), detailed=True))
        assert torch.equal(torch.tensor(found.weights), paths.weight_BM)

    members = [
        load_network(read_model_files(plan.store, layout.stage_model_prefix(spec.name))).eval()
        for spec in plan.singles(0)
    ]
    with torch.no_grad():
        x = load_rows(plan.rows(0, "test")).tensor()
        mean = sum(member(x).softmax(dim=1) for member in members) / 2
    assert answers["evaluate-ensemble-seed0"].predictions == tuple(mean.argmax(dim=1).tolist())

    student = load_network(
        read_model_files(plan.store, layout.stage_model_prefix("distilled-seed0"))
    )
    assert student.config.kind == "adapted"  # the architecture of the best one, `large`
    times = measure_time(plan.timing_task("large").inputs, plan.store)
    assert set(times.microseconds) == {arm.name for arm in plan.job.arms}
    assert set(times.multiply_adds) == {"best_single", "distilled"}
    assert all(time > 0 for time in times.microseconds.values())

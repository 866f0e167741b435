"""A hub from its experts' training to its answers, as a user runs it: killed and resumed."""

import json
import time

import numpy as np
import pytest
import torch
import yaml
from test_transfer_job import finish, start, wait_for

from dist_tl.datasets.digits import DigitsConfig
from dist_tl.datasets.spec import load_images
from dist_tl.shards.manifest import StageManifest, open_stage
from dist_tl.shards.order import ShardPlan
from dist_tl.shards.reader import read_shard
from dist_tl.shards.sample import PseudoSample
from dist_tl.shards.writer import write_shard
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.hub_model import load_hub

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(600)]
TRAINING = {"steps": 12, "batch_size": 16, "optimizer": {"learning_rate": 3e-3}}
CLASSES = ["1", "2", "3"]


def expert(name, network, **domain):
    data = {"source": "digits", "classes": CLASSES, "limit": 120, "domain": domain}
    return {"name": name, "train": {"data": data, "network": network, "training": TRAINING}}


def job_file(folder):
    domains = {
        "plain": {"source": "digits", "classes": CLASSES, "limit": 90},
        "inverted": {
            "source": "digits",
            "classes": CLASSES,
            "limit": 90,
            "domain": {"invert": True},
        },
    }
    job = {
        "kind": "hub",
        "run": str(folder / "run"),
        "store": "embedded",
        "seeds": 1,
        "lanes": 2,
        "hub": [
            expert("plain", {"kind": "resnet", "width": 4, "blocks": [1]}),
            expert("inverted", {"kind": "resnet", "width": 8, "blocks": [1]}, invert=True),
            expert("noisy", {"kind": "perceptron", "hidden": 20}, noise=0.2),
        ],
        "target": {
            "data": {"source": "mixture", "domains": domains},
            "labels_per_class": 8,
            "training": TRAINING,
        },
        "router": {"kind": "resnet", "width": 4, "blocks": [1], "norm": "group"},
        "warm_start": {"training": TRAINING, "samples_per_shard": 6},
        "arms": [
            "best_single",
            "ensemble",
            "distilled",
            {"name": "hub_k2", "routes": {"k": 2}},
            {"name": "random_k2", "routes": {"k": 2, "by": "random"}},
        ],
        "checkpoints": {"every_steps": 5},
        "engine": {"zero_stage": 3},
        "session": {"num_cpus": 4},
    }
    path = folder / "hub.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A run that was killed in the middle of training its hub and resumed."""
    folder = tmp_path_factory.mktemp("hub")
    job = job_file(folder)
    process = start(job)
    wait_for(folder / "run" / layout.commit_key("hub_k2-seed0", 5), process)
    process.kill()
    process.wait()
    return folder / "run", finish(start(job))


def test_every_arm_is_scored_routes_and_costs_are_told(hub):
    run, results = hub
    arms = {score["arm"] for score in results["scores"]}
    assert {"best_single", "ensemble", "distilled", "hub_k2", "random_k2"} <= arms
    assert {"single plain", "single inverted", "single noisy"} <= arms
    titles = [heat_map["title"] for heat_map in results["heat_maps"]]
    assert any("domain" in title for title in titles)
    for heat_map in results["heat_maps"]:
        for row in heat_map["values"]:
            assert sum(row) == pytest.approx(200, abs=0.1), "k = 2 experts for every image"
    costs = {row[0]: float(row[1]) for row in results["tables"][0]["rows"]}
    assert costs["hub_k2"] < costs["ensemble"]
    page = (run / layout.REPORT).read_text()
    assert "the experts that hub_k2 sends them through" in page
    assert "Accuracy against cost" in page


def test_an_exported_hub_gives_the_score_in_the_table(hub):
    run, results = hub
    [score] = [s for s in results["scores"] if s["arm"] == "hub_k2"]
    model = load_hub(ObjectStore(run / layout.model_prefix("hub_k2", 0)), ".")
    assert list(model.experts) == ["plain", "inverted", "noisy"]
    card = (run / layout.model_prefix("hub_k2", 0) / layout.MODEL_CARD).read_text()
    assert f"{score['correct']} of {score['total']}" in card


def predict_job(folder, run, name, **fields):
    job = {
        "kind": "predict",
        "run": str(folder / name),
        "model": str(run / layout.model_prefix("hub_k2", 0)),
        "experts": {"max": 2, "routers": 2, "cpus": 0.5, "router_cpus": 0.5},
        "session": {"num_cpus": 6},
        **fields,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A stage of unlabelled shards, as another run would have made it."""
    store = ObjectStore(tmp_path_factory.mktemp("inputs") / "run")
    images = load_images(DigitsConfig(limit=200)).images
    plan = ShardPlan(
        stage="pool",
        fingerprint="0",
        purpose="pool",
        seed=0,
        num_samples=len(images),
        samples_per_shard=16,
        lanes=1,
        window=1,
    )
    manifest = StageManifest(
        plan=plan,
        kind="pool",
        condition="none",
        image_shape=(1, 8, 8),
        num_classes=10,
        generator="none",
    )
    open_stage(store, manifest)
    for index in range(plan.num_shards):
        order = plan.order(index)
        write_shard(order, (PseudoSample(number=n, image=images[n]) for n in order.numbers), store)
    return store, images


def answers(run, num_shards):
    store = ObjectStore(run)
    return [s for i in range(num_shards) for s in read_shard(store, "predictions", i)]


def test_shards_are_answered_once_each_as_by_the_hub_in_one_piece(hub, inputs, tmp_path):
    run, _ = hub
    store, images = inputs
    job = predict_job(tmp_path, run, "answers", shards={"run": store.url, "stage": "pool"})
    process = start(job)
    wait_for(tmp_path / "answers/stages/predictions/entries/000001.json", process)
    process.kill()
    process.wait()
    results = finish(start(job))
    assert results["verdict"].startswith("200 samples predicted, each exactly once, in 13 shards")
    found = answers(tmp_path / "answers", 13)
    assert [sample.number for sample in found] == list(range(200))
    model = load_hub(ObjectStore(run / layout.model_prefix("hub_k2", 0)), ".")
    with torch.no_grad():
        expected = model(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1)
    mine = np.stack([sample.image.ravel() for sample in found])
    assert np.allclose(mine, expected.numpy(), atol=1e-5)
    assert all("truth" not in sample.provenance for sample in found)


def test_labelled_data_is_answered_and_counted(hub, tmp_path):
    run, _ = hub
    data = {"source": "digits", "classes": CLASSES, "limit": 90}
    job = predict_job(tmp_path, run, "labelled", data=data, samples_per_shard=32)
    results = finish(start(job))
    assert "of those with labels are right" in results["verdict"]
    used = {row[0]: int(row[1]) for row in results["tables"][0]["rows"]}
    assert sum(used.values()) == 2 * 90
    began = time.monotonic()
    again = finish(start(job))
    assert time.monotonic() - began < 30, "what is done is only shown"
    assert json.dumps(again["tables"]) == json.dumps(results["tables"])

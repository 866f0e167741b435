"""Which data sets and models a job names, found by the types of its fields."""

from pathlib import Path
from typing import Annotated

import pytest
import yaml
from pydantic import Field

from dist_tl.config import NamesModel, StrictModel, validate
from dist_tl.datasets.digits import DigitsConfig
from dist_tl.datasets.spec import DataConfig
from dist_tl.jobs.job_file import read_job
from dist_tl.jobs.places import data_sets, models
from dist_tl.jobs.predict.spec import PredictJob
from dist_tl.jobs.spec import JobConfig, ModelPlace

PRESETS = sorted((Path(__file__).parents[2] / "launch" / "presets").glob("*.yaml"))
BUDGET = {"steps": 1, "batch_size": 8}
TARGET = {"data": {"source": "digits"}, "labels_per_class": 1, "training": BUDGET}


def job_of(tmp_path, **fields):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"run": "run", **fields}))
    return read_job(path)


class Inner(StrictModel):
    data: DataConfig
    models: tuple[ModelPlace, ...] = ()


class UnknownJob(JobConfig):
    """A kind of job that nothing knows."""

    first: DataConfig
    inner: Inner
    several: dict[str, Inner] = Field(default_factory=dict)
    hub_name: Annotated[str, NamesModel()] | None = None
    name: str = "no place"


def test_a_new_kind_of_job_needs_no_code_for_its_data_and_models():
    job = UnknownJob(
        kind="unknown",
        run="run",
        first=DigitsConfig(),
        inner=Inner(data=DigitsConfig(limit=10), models=("a", "s3://b/c")),
        several={"x": Inner(data=DigitsConfig(limit=20))},
    )
    assert data_sets(job) == {
        "first": DigitsConfig(),
        "inner.data": DigitsConfig(limit=10),
        "several.x.data": DigitsConfig(limit=20),
    }
    assert models(job) == {"inner.models.0": "./a", "inner.models.1": "s3://b/c"}
    named = job.model_copy(update={"hub_name": "owner/name"})
    assert models(named)["hub_name"] == "owner/name"


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_data_source_of_a_preset_is_found_once(preset):
    def sources(node):
        if isinstance(node, list):
            return sum(map(sources, node))
        if not isinstance(node, dict):
            return 0
        own = isinstance(node.get("source"), str)
        return 1 if own else sum(map(sources, node.values()))

    job = read_job(preset)
    assert len(data_sets(job)) == sources(yaml.safe_load(preset.read_text()))


def test_models_of_every_kind_of_place_are_found(tmp_path):
    arms = {"network": {"kind": "perceptron", "hidden": 4}}
    transfer = job_of(
        tmp_path,
        kind="transfer",
        source={"classifier": "runs/c", "generator": {"kind": "diffusion", "path": "/g"}},
        target={**TARGET, **arms},
        arms=["scratch"],
        session={"num_cpus": 9},
    )
    assert models(transfer) == {"source.classifier": "./runs/c", "source.generator.path": "/g"}
    pretrained = {"kind": "transformers", "path": "owner/net", "head": "fresh"}
    hub = job_of(
        tmp_path,
        kind="hub",
        hub=[{"name": "a", "model": "m"}, {"name": "b", "network": pretrained}],
        target=TARGET,
        router={"kind": "perceptron", "hidden": 4},
        arms=["best_single"],
        session={"num_cpus": 9},
    )
    assert models(hub) == {"hub.0.model": "./m", "hub.1.network.path": "owner/net"}
    predict = PredictJob(kind="predict", run="run", model="/h", data=DigitsConfig())
    assert models(predict) == {"model": "/h"}


def test_a_relative_generator_is_a_folder_and_not_a_key_of_the_run():
    from dist_tl.jobs.source.spec import SourceAssets

    data = {"classifier": "c", "generator": {"kind": "diffusion", "path": "g"}}
    assets = validate(SourceAssets, data, source="test")
    assert (assets.classifier, assets.generator.path) == ("./c", "./g")

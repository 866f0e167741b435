"""Jobs and options shared by the tests of deployment."""

from pathlib import Path

import pytest

from dist_tl.deploy.manifests import render
from dist_tl.deploy.options import KubeOptions
from dist_tl.jobs.job_file import read_job

PRESETS = Path(__file__).parents[2] / "launch" / "presets"


@pytest.fixture
def job_of():
    def read(preset, *overrides):
        store = (f"run=s3://bucket/runs/{preset}", "store=direct")
        return read_job(PRESETS / f"{preset}.yaml", (*store, *overrides))

    return read


@pytest.fixture
def predict_job(tmp_path):
    def read(*overrides):
        path = tmp_path / "predict.yaml"
        path.write_text(
            "kind: predict\nrun: s3://bucket/runs/answers\n"
            "model: s3://bucket/runs/hub/models/hub_k2-seed0\ndata: {source: digits}\n"
        )
        return read_job(path, overrides)

    return read


@pytest.fixture
def options():
    def make(**changes):
        return KubeOptions(**{"image": "registry.example/dist-tl:1", "credentials": "s3"} | changes)

    return make


@pytest.fixture
def rendered(job_of, options):
    def make(preset="digits", *overrides, attempt=1, **changes):
        return render(job_of(preset, *overrides), options(**changes), attempt=attempt)

    return make

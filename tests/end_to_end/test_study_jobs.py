"""Manifold and forecast jobs as a user runs them: whole, interrupted, with one CPU or several."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(400)]

MANIFOLD = {
    "kind": "manifold",
    "store": "embedded",
    "model": {"source_latent": 20, "target_latent": 20, "inputs": 80},
    "hidden": 40,
    "source_samples": 1500,
    "arms": ["transferred", "random", "two_layer", "fine_tuned"],
    "samples": [20, 80],
    "lambdas": [0.01, 1.0],
    "instances": 2,
    "draws": 2,
    "moment_samples": 10_000,
    "moment_tasks": 2,
    "test_samples": 4000,
    "sweeps": [{"knob": "teacher_corr", "values": [1, 0.5, 0]}],
    "grid": {
        "x": {"knob": "teacher_corr", "values": [0, 1]},
        "y": {"knob": "feature_corr", "values": [0, 1]},
    },
}
FORECAST = {
    "kind": "forecast",
    "data": {"source": "digits", "part": {"index": 1, "of": 2}},
    "teacher": {
        "data": {"source": "digits", "part": {"index": 0, "of": 2}},
        "network": {"kind": "resnet", "width": 8, "blocks": [1, 1]},
        "training": {"steps": 20, "batch_size": 32},
    },
    "maps": [{"kind": "pixels"}, {"kind": "random"}, {"kind": "network", "name": "last"}],
    "components": 20,
    "labelled": 150,
    "samples": [20, 100],
    "checked": [20, 50],
    "bootstrap": 3,
    "draws": 10,
}


def start(folder, job, verb="run", **changes):
    content = {**job, "run": str(folder / "run"), **changes}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(content))
    return subprocess.Popen(
        [sys.executable, "-m", "dist_tl", verb, str(path), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))},
        start_new_session=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out)


def measured(results):
    return {key: results[key] for key in ("tables", "charts", "heat_maps", "verdict", "findings")}


@pytest.fixture(scope="module")
def manifold(tmp_path_factory):
    """A run on three CPUs, and its folder."""
    folder = tmp_path_factory.mktemp("manifold")
    return folder, finish(start(folder, MANIFOLD, session={"num_cpus": 3}))


def test_a_manifold_run_tells_claims_errors_and_the_map(manifold):
    folder, results = manifold
    titles = [table["title"] for table in results["tables"]]
    assert titles[:2] == ["Claims", "Test error, simulated and computed"]
    errors = {(row[0], row[1]): row for row in results["tables"][1]["rows"]}
    assert float(errors["transferred features", "20"][2].split()[0]) < float(
        errors["random features", "20"][2].split()[0]
    )
    assert errors["fine-tuned", "80"][3] == ""
    assert [len(m["values"]) for m in results["heat_maps"]] == [2, 2]
    page = (folder / "run" / "report.html").read_text()
    assert "Gain of transferred over random features at n = 20" in page
    assert "trained from scratch" in page


def test_one_cpu_and_an_interruption_change_nothing(manifold, tmp_path):
    process = start(tmp_path, MANIFOLD, session={"num_cpus": 1})
    deadline = time.monotonic() + 120
    marker = "stages/cell-*/result.json"
    while not list((tmp_path / "run").glob(marker)):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    results = (tmp_path / "run").glob("stages/*/result.json")
    done = {path: path.stat().st_mtime_ns for path in results}
    again = finish(start(tmp_path, MANIFOLD, session={"num_cpus": 1}))
    assert measured(again) == measured(manifold[1])
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())


def test_a_forecast_tells_what_each_map_needs_and_how_far_it_is_off(tmp_path):
    results = finish(start(tmp_path, FORECAST, verb="forecast"))
    needed, checks = results["tables"]
    assert [row[0] for row in needed["rows"]] == ["pixels", "random", "last"]
    assert len(checks["rows"]) == 6
    gaps = [abs(float(row[4])) for row in checks["rows"] if row[0] in ("pixels", "random")]
    assert max(gaps) < 25
    assert Path(tmp_path / "run" / "report.html").exists()


def test_a_forecast_of_another_kind_of_job_is_refused(tmp_path):
    process = start(tmp_path, MANIFOLD, verb="forecast")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "expected forecast, got manifold" in " ".join(err.split())


def test_too_few_labels_for_so_many_components_stop_the_forecast(tmp_path):
    process = start(
        tmp_path,
        {**FORECAST, "components": 60, "teacher": None},
        verb="forecast",
        maps=[{"kind": "pixels"}],
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "principal components" in " ".join(err.split())

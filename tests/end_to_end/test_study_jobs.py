"""Manifold and forecast jobs as a user runs them: whole, interrupted, with one CPU or several."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
import webdataset
import yaml

from dist_tl.models.files import load_network
from dist_tl.storage import layout

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

TEACHER = {
    "data": {"source": "digits", "classes": ["0", "1", "2"]},
    "network": {"kind": "resnet", "width": 8, "blocks": [1, 1]},
    "training": {"steps": 30, "batch_size": 32},
}
LAYER_SEARCH = {
    "kind": "layer_search",
    "store": "embedded",
    "teacher": TEACHER,
    "data": {"source": "digits", "classes": ["5", "6", "7", "8", "9"]},
    "held_out": {"data": {"source": "digits", "classes": ["3", "4"]}, "episodes": 20},
    "episodes": {"ways": 3, "shots": [1, 3], "queries": 5, "count": 30},
    "search": {"permutations": 5},
    "export_shots": 4,
    "rows_per_task": 300,
    "episodes_per_task": 7,
    "trained": {
        "episodes": 2,
        "network": {"kind": "resnet", "width": 4, "blocks": [1]},
        "training": {"steps": 3, "batch_size": 8},
    },
}
GEOMETRY = {
    "kind": "geometric_labels",
    "store": "embedded",
    "seeds": 2,
    "lanes": 2,
    "extractor": TEACHER,
    "anchors": {"count": 6},
    "pool": {"source": "digits", "part": {"index": 1, "of": 3}, "views": {"kind": "digits"}},
    "m": 2,
    "rare": {"min_count": 5},
    "arms": ["scratch", "g2l_near_max", "g2l_far_min", "nearest_m", "kmeans", "random_labels"],
    "network": {"kind": "resnet", "width": 4, "blocks": [1], "norm": "group"},
    "pretraining": {"steps": 8, "batch_size": 16},
    "target": {
        "data": {"source": "digits", "part": {"index": 2, "of": 3}},
        "labels_per_class": 3,
    },
    "fine_tuning": {"steps": 6, "batch_size": 16},
    "rates": [1e-3, 3e-3],
    "pairs": {"sources": [["0", "1", "2"], ["3", "4", "5"]], "targets": [["6", "7"], ["8", "9"]]},
    "samples_per_shard": 50,
    "rows_per_task": 250,
}


def job_file(folder, job, **changes):
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({**job, "run": str(folder / "run"), **changes}))
    return path


def start(folder, job, verb="run", **changes):
    return subprocess.Popen(
        [sys.executable, "-m", "dist_tl", verb, str(job_file(folder, job, **changes)), "--json"],
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


def test_one_cpu_and_sigterm_change_nothing(manifold, tmp_path):
    process = start(tmp_path, MANIFOLD, session={"num_cpus": 1})
    deadline = time.monotonic() + 120
    marker = "stages/cell-*/result.json"
    while not list((tmp_path / "run").glob(marker)):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143, told
    assert "the same command resumes" in told
    assert "SIGTERM" not in told, "Ray dumps no stack"
    results = (tmp_path / "run").glob("stages/*/result.json")
    done = {path: path.stat().st_mtime_ns for path in results}
    again = finish(start(tmp_path, MANIFOLD, session={"num_cpus": 1}))
    assert measured(again) == measured(manifold[1])
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())


@pytest.fixture(scope="module")
def layer_search(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layer_search")
    results = finish(start(folder, LAYER_SEARCH, session={"num_cpus": 3}))
    return {**results, "folder": folder / "run"}


def test_a_layer_search_tells_accuracies_gains_and_what_was_chosen(layer_search):
    accuracy, gain = layer_search["tables"]
    arms = [row[0] for row in accuracy["rows"]]
    assert arms[0] == "penultimate"
    assert {"selected", "all layers together", "trained from scratch", "oracle (diagnostic)"} < {
        *arms
    }
    assert [row[0] for row in gain["rows"]] == arms[1:]
    [chosen] = layer_search["heat_maps"]
    assert chosen["y"] == ["1", "3"]
    assert any("held_out_classes" in finding for finding in layer_search["findings"])


def test_what_was_selected_is_a_model_that_loads(layer_search):
    for name in ("selected-k4", "selected-k4-fine_tuned"):
        folder = layer_search["folder"] / layout.model_prefix(name, 0)
        network = load_network({file.name: file.read_bytes() for file in folder.iterdir()})
        assert network.num_classes == 5
        assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
    assert any("Exported for all classes at K = 4" in line for line in layer_search["findings"])


def test_killed_workers_one_cpu_and_other_batches_change_nothing(layer_search, tmp_path):
    process = start(tmp_path, LAYER_SEARCH, session={"num_cpus": 1}, episodes_per_task=5)
    killed, deadline = set(), time.monotonic() + 120
    while process.poll() is None and len(killed) < 3:
        assert time.monotonic() < deadline
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                # A worker at a task bears its name.
                if child.pid not in killed and "ray::_run_one" in " ".join(child.cmdline()):
                    child.kill()
                    killed.add(child.pid)
                    break
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.3)
    assert killed
    assert measured(finish(process)) == measured(layer_search)


@pytest.fixture(scope="module")
def geometry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("geometry")
    return folder / "run", finish(start(folder, GEOMETRY, session={"num_cpus": 4}))


def test_geometric_labels_are_compared_and_the_forecast_told(geometry):
    _, results = geometry
    arms, labels, pairs = results["tables"]
    assert [row[0] for row in arms["rows"]] == GEOMETRY["arms"]
    assert {row[0] for row in labels["rows"]} == {"g2l_near_max", "g2l_far_min", "nearest_m"}
    assert len(pairs["rows"]) == 4
    assert "cannot be told" in results["verdict"] or "than" in results["verdict"]


def test_the_random_arm_has_the_histogram_of_the_geometric_one(geometry):
    run, _ = geometry
    counts = {}
    for arm in ("g2l_near_max", "random_labels"):
        files = sorted((run / "stages" / f"shards-{arm}" / "shards").glob("*.tar"))
        labels = [
            int(s["cls"]) for f in files for s in webdataset.WebDataset(str(f), shardshuffle=False)
        ]
        counts[arm] = np.bincount(labels).tolist()
    assert counts["random_labels"] == counts["g2l_near_max"]
    assert min(counts["g2l_near_max"]) >= 5


def test_chunks_and_cpus_change_no_label_and_no_result(geometry, tmp_path):
    run, results = geometry
    job = {**GEOMETRY, "rows_per_task": 1000}
    again = finish(start(tmp_path, job, session={"num_cpus": 6}))
    assert measured(again) == measured(results)
    for shard in sorted((run / "stages").glob("shards-*/shards/*.tar")):
        other = tmp_path / "run" / shard.relative_to(run)
        assert other.read_bytes() == shard.read_bytes()

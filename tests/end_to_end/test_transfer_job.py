"""A whole transfer job as a user runs it: undisturbed, killed, interrupted, with one worker or two.

The job is small but real: source images in a folder, a diffusion generator, Ray actors, S3 on
loopback, two DeepSpeed ranks.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from dist_tl.models.files import load_network
from dist_tl.storage import layout
from dist_tl.storage.scratch import MARKER

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(600)]
SOURCE_CLASSES = 4
ANOTHER_STORE = {
    "FSSPEC_S3_ENDPOINT_URL": "http://127.0.0.1:1",
    "FSSPEC_S3_KEY": "somebody-elses",
    "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
    "AWS_PROFILE": "no-such-profile",
    "AWS_CA_BUNDLE": "/no/such/file",
    "HTTP_PROXY": "http://127.0.0.1:1",
    "http_proxy": "http://127.0.0.1:1",
}


def write_source_folder(folder):
    digits = load_digits()
    for label in range(SOURCE_CLASSES):
        place = folder / str(label)
        place.mkdir(parents=True)
        for i, image in enumerate(digits.images[digits.target == label][:40]):
            Image.fromarray((image * 255 / 16).astype(np.uint8)).save(place / f"{i:03d}.png")


def job_file(folder, source_folder, name, **changes):
    training = {"steps": 12, "batch_size": 16, "optimizer": {"learning_rate": 3e-3}}
    job = {
        "kind": "transfer",
        "run": str(folder / name),
        "store": "embedded",
        "seeds": 2,
        "lanes": 2,
        "source": {
            "data": {"source": "folder", "path": str(source_folder), "views": {"kind": "digits"}},
            "holdout_folds": 4,
            "classifier": {"kind": "resnet", "width": 8, "blocks": [1]},
            "classifier_training": training,
            "generator": {"channels": [8], "num_steps": 2},
            "generator_training": training,
        },
        "target": {
            "data": {"source": "digits", "classes": ["5", "6", "7"]},
            "labels_per_class": 3,
            "network": {"kind": "resnet", "width": 4, "blocks": [1], "norm": "group"},
            "training": training,
        },
        "arms": ["scratch", "distillation", "pp", "p_ssl", "pp_p_ssl", "real_source"],
        "pp": {"samples": 512, "training": {**training, "steps": 40}},
        "p_ssl": {"samples": 64, "loss": {"lambda_guard": {"folds": 2}}},
        "shards": {"samples_per_shard": 16, "lanes": 2},
        # Fewer than the 32 shards of pp: generators must wait for the trainers to read.
        "generators": {"window": 4},
        "checkpoints": {"every_steps": 5},
        "session": {"num_cpus": 4},
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def start(job, *overrides, temporary=None):
    """Starts the command for a user who has a cluster of his own, and another S3 store.

    Args:
        temporary: used as the temporary folder, to see what is left there.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "dist_tl", "run", str(job), *overrides, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))},
            **ANOTHER_STORE,
            **({} if temporary is None else {"TMPDIR": str(temporary)}),
        },
        start_new_session=True,
    )


def finish(process):
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-4000:]
    return json.loads(out)


def wait_for(path, process, timeout_s=300):
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.05)


def family(process):
    return psutil.Process(process.pid).children(recursive=True)


def is_dead(process):
    try:
        # Orphans stay zombies where the machine's first process does not reap them.
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def all_gone(processes, timeout_s):
    deadline = time.monotonic() + timeout_s
    while not all(is_dead(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def session_folders(process):
    """The folders of private Ray clusters that a command opened; sockets need short paths."""
    markers = Path("/tmp").glob(f"dtl-*/{MARKER}")
    return [marker.parent for marker in markers if marker.read_text() == f"{process.pid}\n"]


def shared_memory():
    """What Ray's object store and torch have in shared memory; others name theirs otherwise."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("plasma", "torch_"))}


@pytest.fixture
def temporary(tmp_path_factory):
    """A temporary folder of one test, with a short path, as sockets need."""
    return tmp_path_factory.mktemp("t")


def scores(results):
    return {(s["arm"], s["seed"]): s["correct"] for s in results["scores"]}


def losses(run, stage):
    lines = (Path(run) / layout.metrics_key(stage)).read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def digests(run, pattern):
    """Hashes of a run's files; the names of the files that make the results."""
    files = sorted(Path(run).glob(pattern))
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_source_folder(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, source_folder):
    folder, temporary = tmp_path_factory.mktemp("undisturbed"), tmp_path_factory.mktemp("t")
    before = shared_memory()
    process = start(job_file(folder, source_folder, "run"), temporary=temporary)
    results = finish(process)
    left = [*temporary.iterdir(), *session_folders(process), *(shared_memory() - before)]
    assert left == [], "a finished run leaves nothing"
    return folder / "run", results


def test_every_arm_and_seed_is_scored_and_the_page_is_made(undisturbed):
    run, results = undisturbed
    arms = {s["arm"] for s in results["scores"]}
    assert {"scratch", "distillation", "pp", "p_ssl", "pp_p_ssl", "real_source"} <= arms
    assert {"p_ssl unguarded", "pp_p_ssl unguarded"} <= arms
    assert all({s["seed"] for s in results["scores"] if s["arm"] == a} == {0, 1} for a in arms)
    assert results["quality"]["samples"] == 512
    assert results["peak_memory_bytes"] > 0
    assert "<html" in (run / layout.REPORT).read_text()


def test_training_begins_before_the_last_shard_is_committed(undisturbed):
    _, results = undisturbed
    assert results["overlap"]["pp-trunk-seed0"] > 0


def test_shards_are_plain_webdataset_tars_and_their_labels_are_source_classes(undisturbed):
    run, _ = undisturbed
    tars = sorted(str(tar) for tar in (run / "stages/pp-shards/shards").glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert len(samples) == 512
    assert {sample["cls"] for sample in samples} == set(range(SOURCE_CLASSES))


def test_an_exported_model_loads_and_gives_the_score_in_the_table(undisturbed):
    run, results = undisturbed
    folder = run / layout.model_prefix("pp", 1)
    names = (layout.MODEL_TENSORS, layout.MODEL_CONFIG)
    network = load_network({name: (folder / name).read_bytes() for name in names})
    assert network.num_classes == 3
    [score] = [s for s in results["scores"] if (s["arm"], s["seed"]) == ("pp", 1)]
    assert f"{score['correct']} of {score['total']}" in (folder / layout.MODEL_CARD).read_text()


def test_no_credentials_are_written(undisturbed):
    run, _ = undisturbed
    for path in run.rglob("*"):
        if path.is_file() and path.suffix in {".json", ".jsonl", ".html", ".md"}:
            text = path.read_text()
            assert "AWS_SECRET" not in text
            assert "DIST_TL_EMBEDDED" not in text
            assert "secret_access_key" not in text.lower()


def test_killed_and_without_its_source_data_a_run_ends_as_if_undisturbed(
    undisturbed, source_folder, tmp_path, temporary
):
    """kill -9 after the source phase, source data deleted, a flipped bit; then the same command."""
    kept = tmp_path / "source"
    shutil.copytree(source_folder, kept)
    # The folder's path is part of the job, so the undisturbed run's folder must be the one read.
    job = job_file(tmp_path, source_folder, "run")
    before = shared_memory()
    process = start(job, temporary=temporary)
    wait_for(tmp_path / "run" / layout.result_key("pp-trunk-seed0"), process)
    children, folders = family(process), session_folders(process)
    process.kill()
    process.wait()
    assert all_gone(children, 30), "killing the command must end everything it started"
    assert len(folders) == 1
    assert [*temporary.iterdir()], "the embedded server's folder stays until the next start"
    shutil.rmtree(source_folder)
    damaged = tmp_path / "run" / layout.shard_key("pp-shards", 3)
    data = bytearray(damaged.read_bytes())
    data[700] ^= 1
    damaged.write_bytes(bytes(data))
    try:
        process = start(job, temporary=temporary)
        out, err = process.communicate(timeout=500)
        assert process.returncode == 0, err[-4000:]
        results = json.loads(out)
        assert "shard 3 of stage 'pp-shards'" in " ".join(err.split())
        assert "it is made again" in " ".join(err.split())
    finally:
        shutil.copytree(kept, source_folder)
    assert [*temporary.iterdir(), *(shared_memory() - before)] == []
    assert not folders[0].exists()
    assert not list((tmp_path / "run").glob("stages/*/checkpoints"))
    run, expected = undisturbed
    assert scores(results) == scores(expected)
    for pattern in ("models/*/model.safetensors", "stages/*/shards/*.tar"):
        assert digests(tmp_path / "run", pattern) == digests(run, pattern)
    assert losses(tmp_path / "run", "pp_p_ssl-seed1") == losses(run, "pp_p_ssl-seed1")


def test_ctrl_c_stops_in_ten_seconds_and_one_worker_sees_what_two_see(
    undisturbed, source_folder, tmp_path, temporary
):
    job = job_file(tmp_path, source_folder, "run", seeds=1, arms=["scratch", "pp"], p_ssl=None)
    process = start(job, "trainers.workers=1", temporary=temporary)
    wait_for(tmp_path / "run" / layout.result_key("source-classifier"), process)
    children = family(process)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - began < 10
    assert "the same command resumes" in err
    assert all_gone(children, 10), "Ctrl-C must leave nothing behind"
    assert [*temporary.iterdir(), *session_folders(process)] == []

    finish(start(job, "trainers.workers=1"))
    run, _ = undisturbed
    for stage in ("source-classifier", "scratch-seed0"):
        one, two = losses(tmp_path / "run", stage), losses(run, stage)
        assert one.keys() == two.keys()
        # Other samples would differ in the first digit; batch-norm statistics are per worker.
        first = min(one)
        assert one[first] == pytest.approx(two[first], rel=0.05)
    one, two = (losses(r, "scratch-seed0") for r in (tmp_path / "run", run))
    assert list(one.values()) == pytest.approx(list(two.values()), rel=1e-3)


def test_another_job_in_the_same_folder_is_refused_by_the_names_of_its_fields(
    undisturbed, source_folder
):
    run, _ = undisturbed
    job = run.parent / "run.yaml"
    process = start(job, "target.labels_per_class=2")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "target.labels_per_class" in err


def test_a_second_start_takes_the_run_over_and_the_first_stops(
    undisturbed, source_folder, tmp_path
):
    job = job_file(tmp_path, source_folder, "run", seeds=1, arms=["scratch", "pp"], p_ssl=None)
    first = start(job, "pp.training.steps=400")
    wait_for(tmp_path / "run" / layout.commit_key("pp-trunk-seed0", 5), first)
    second = start(job, "pp.training.steps=400")
    _, err = first.communicate(timeout=120)
    assert first.returncode == 3
    assert "attempt 2 of this run was started" in " ".join(err.split())
    results = finish(second)
    assert {s["arm"] for s in results["scores"]} == {"scratch", "pp"}
    run, _ = undisturbed
    mine, theirs = (losses(r, "pp-trunk-seed0") for r in (tmp_path / "run", run))
    assert len(mine) == 400
    # The same first samples: warm-up is as long a share of another length, so not for ever.
    assert mine[1] == theirs[1]
    marks = (tmp_path / "run" / "attempts").iterdir()
    assert sorted(path.name[:6] for path in marks) == ["000001", "000002"]

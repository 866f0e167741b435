"""A job on a cluster of several Ray nodes: submitted, scaled, and nodes killed under it.

What it computes is compared bit for bit with the same job on one machine where nothing happened.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from networks import open_network
from ray_nodes import RayNodes
from test_transfer_job import write_source_folder

from dist_tl.shards.manifest import read_manifest
from dist_tl.shards.reader import verify_shard
from dist_tl.storage import layout
from dist_tl.storage.attempts import latest_attempt
from dist_tl.storage.embedded import EmbeddedS3
from dist_tl.storage.objects import ObjectStore

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(900)]
TRUNK, SHARDS = "pp-trunk-seed0", "pp-shards"
STEPS = 2400  # long enough for all that happens meanwhile


def job_file(folder, source_folder):
    training = {"steps": 12, "batch_size": 16, "optimizer": {"learning_rate": 3e-3}}
    job = {
        "kind": "transfer",
        "run": "overridden",
        "seeds": 1,
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
            "network": {"kind": "resnet", "width": 16, "blocks": [1, 1], "norm": "group"},
            "training": training,
        },
        "arms": ["scratch", "pp"],
        "pp": {"samples": 16 * STEPS, "training": {**training, "steps": STEPS}},
        "shards": {"samples_per_shard": 64, "lanes": 2},
        "generators": {"min": 1, "max": 1, "window": 8, "cpus": 0.5},
        "trainers": {"cpus": 0.5},
        "checkpoints": {"every_steps": 200},
        "session": {"num_cpus": 4},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


class Cluster:
    """The nodes, the store, and the command with the cluster's environment."""

    def __init__(self, nodes, bucket, folder, network):
        self.nodes, self.folder, self.network = nodes, folder, network
        self.run = f"{bucket}/several"
        self.alone = f"{bucket}/alone"

    def command(self, *arguments, **options):
        return subprocess.run(
            [*self.nodes.inside(), sys.executable, "-m", "dist_tl", *arguments],
            capture_output=True,
            text=True,
            env=options.pop("env", self.nodes.environment),
            timeout=600,
            **options,
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, s3_environment):
    folder = tmp_path_factory.mktemp("nodes")
    with (
        tempfile.TemporaryDirectory(prefix="dtn-", dir="/tmp") as short,
        EmbeddedS3(str(folder / "store")) as server,
        open_network() as network,
        RayNodes(Path(short), network, s3_environment(server)[0]) as nodes,
        pytest.MonkeyPatch.context() as patch,
    ):
        variables, bucket = s3_environment(server)
        for key, value in variables.items():
            patch.setenv(key, value)
        nodes.add("trainers-a", "trainers", 4)
        nodes.add("trainers-b", "trainers", 4)
        # Room for two workers, so that a third has to go to another node; where nodes share a disk
        # they unpack and delete each other's working directories, so there it stays, and no
        # generator node is lost.
        nodes.add("generators-a", "generators", 4 if network.is_one else 1)
        yield Cluster(nodes, bucket, folder, network)


@pytest.fixture(scope="module")
def job(cluster):
    source = cluster.folder / "source"
    write_source_folder(source)
    return job_file(cluster.folder, source)


def losses(run, stage):
    """The curve so far."""
    data = ObjectStore(run).read_or_none(layout.metrics_key(stage)) or b""
    return {row["step"]: row["loss"] for row in map(json.loads, data.splitlines())}


def wait_until(true, what, timeout_s=90):
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def entries(run):
    return len(ObjectStore(run).list(f"stages/{SHARDS}/entries"))


def test_bad_ways_of_handing_in_are_named_errors(cluster, job):
    refused = cluster.command(
        "submit", str(job), "--address", "http://127.0.0.1:1", f"run={cluster.run}"
    )
    assert refused.returncode == 2
    assert "nothing listens at http://127.0.0.1:1;" in refused.stderr
    token = cluster.folder / "wrong"
    token.write_text("0" * 64)
    wrong = {**cluster.nodes.environment, "RAY_AUTH_TOKEN_PATH": str(token)}
    refused = cluster.command(
        "submit", str(job), "--address", cluster.nodes.address, f"run={cluster.run}", env=wrong
    )
    assert refused.returncode == 2
    assert "rejected the token" in refused.stderr
    assert "0000" not in refused.stderr
    refused = cluster.command(
        "submit", str(job), "--address", cluster.nodes.address, "run=runs/here"
    )
    assert refused.returncode == 2
    assert "store: the cluster must reach the run" in refused.stderr
    joined = {**cluster.nodes.environment, "RAY_ADDRESS": cluster.nodes.gcs}
    refused = cluster.command("run", str(job), f"run={cluster.run}-joined", env=joined)
    assert refused.returncode == 2
    assert "session.roles: the nodes of this cluster have roles" in refused.stderr
    refused = cluster.command("status", cluster.run)
    assert refused.returncode == 2
    assert "contains no run" in refused.stderr


def test_scaled_and_with_nodes_killed_the_job_ends_with_the_very_numbers(cluster, job):
    nodes, run = cluster.nodes, cluster.run
    handed_in = cluster.command(
        "submit",
        str(job),
        "--address",
        nodes.address,
        "--detach",
        f"run={run}",
        "session.roles=true",
        # Other sizes than alone: neither changes what is computed.
        "trainers.cpus=1",
    )
    assert handed_in.returncode == 0, handed_in.stderr
    again = cluster.command("submit", str(job), "--address", nodes.address, f"run={run}")
    assert again.returncode == 2, again.stdout[-3000:]
    assert "is still running" in again.stderr

    wait_until(lambda: losses(run, TRUNK), "the trunk did not begin")
    assert nodes.actors("GeneratorActor") == ["generators-a"]
    scaled = cluster.command("scale", run, "generators=3")
    assert scaled.returncode == 0, scaled.stderr
    third = "generators-a" if cluster.network.is_one else "generators-b"
    if third == "generators-b":
        nodes.add(third, "generators", 4)
    wait_until(lambda: len(nodes.actors("GeneratorActor")) == 3, "the pool did not grow")
    assert nodes.actors("GeneratorActor") == ["generators-a", "generators-a", third]
    workers = nodes.actors("RayTrainWorker")
    assert len(workers) == 2
    assert set(workers) <= {"trainers-a", "trainers-b"}

    told = nodes.metrics()
    for name in ("shards_committed_total", "backlog_shards", "generator_workers", "step_seconds"):
        values = re.findall(rf'ray_dist_tl_{name}{{.*run="{run}".*}} (\S+)', told)
        assert any(float(value) > 0 for value in values), (name, values)

    before = entries(run)
    if third == "generators-b":
        nodes.kill(third)
    wait_until(lambda: entries(run) > before + 4, "the pool stopped with its node")
    assert cluster.command("scale", run, "generators=1..1").returncode == 0
    wait_until(lambda: len(nodes.actors("GeneratorActor")) == 1, "the pool did not shrink")

    assert ObjectStore(run).read_or_none(layout.RESULTS) is None, "too late to kill a trainer"
    nodes.kill(workers[0])
    followed = cluster.command("logs", run, "-f")
    assert followed.returncode == 0, followed.stdout[-3000:] + followed.stderr[-3000:]
    status = cluster.command("status", run)
    assert "done" in status.stdout
    assert "SUCCEEDED" in status.stdout

    alone = cluster.command("run", str(job), f"run={cluster.alone}", "--json", "session.roles=true")
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert losses(run, TRUNK) == losses(cluster.alone, TRUNK)
    assert len(losses(run, TRUNK)) == STEPS
    mine = json.loads(ObjectStore(run).read(layout.RESULTS))
    theirs = json.loads(alone.stdout)
    assert [s["correct"] for s in mine["scores"]] == [s["correct"] for s in theirs["scores"]]
    plan = read_manifest(ObjectStore(run), SHARDS).plan
    for index in range(plan.num_shards):
        ours = verify_shard(ObjectStore(run), plan, index)
        assert ours.sha256 == verify_shard(ObjectStore(cluster.alone), plan, index).sha256
    assert latest_attempt(ObjectStore(run)) == 1

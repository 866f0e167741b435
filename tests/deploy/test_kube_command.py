"""`dist-tl` commands on Kubernetes: real client, real S3, fake API server."""

import json
from pathlib import Path

import pytest
import yaml
from fake_kube_api import FakeKubeApi, until

pytest.importorskip("kubernetes", reason="pip install 'dist_tl[kube]'")

from dist_tl.cli import endings
from dist_tl.deploy import kube as kube_module
from dist_tl.report.results import JobRecord
from dist_tl.storage import layout
from dist_tl.storage.embedded import EmbeddedS3
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import write_record

pytestmark = pytest.mark.s3
PRESETS = Path(__file__).parents[2] / "launch" / "presets"
FAILED = "Job entrypoint command failed with exit code 3, last available logs:\n exit code 3"


@pytest.fixture
def api(monkeypatch, tmp_path):
    server = FakeKubeApi()
    for name in ("dist-tl-head", "dist-tl-worker", "dist-tl-submitter"):
        server.put("serviceaccounts", name)
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "config")))
    quick = {"poll_s": 0.02, "wait_s": 5.0}
    monkeypatch.setattr(kube_module.Kube.__init__, "__kwdefaults__", quick)
    yield server
    server.close()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory, s3_environment):
    with (
        EmbeddedS3(str(tmp_path_factory.mktemp("store"))) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        variables, url = s3_environment(server)
        for key, value in variables.items():
            patch.setenv(key, value)
        yield url


@pytest.fixture
def options(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("image: registry.example/dist-tl:1\ngenerators: {workers_per_pod: 2}\n")
    return path


@pytest.fixture
def command(command):
    """The command fixture, with standard error joined into one line."""

    def run(*words):
        code, out, err = command(*words)
        return code, out, " ".join(err.split())

    return run


@pytest.fixture
def submit(command, options):
    def submit_digits(run, *words):
        overrides = (f"run={run}", "store=direct", "generators.min=1", "generators.max=2")
        job = PRESETS / "digits.yaml"
        return command("submit", job, "--kube", "--options", options, *words, *overrides)

    return submit_digits


def begin(run):
    """Writes what a job stores as soon as it runs."""
    job = {"kind": "transfer", "generators": {}}
    record = JobRecord(job=job, fingerprint="f", versions={})
    write_record(ObjectStore(run), layout.JOB, record)


def bounds(group):
    return group["minReplicas"], group["maxReplicas"]


def generators_of(api, name, later=False):
    """Returns the generator group of the current cluster, or with `later` of the next one."""
    spec = api.get("rayclusters", f"{name}-abcde")["spec"]
    if later:
        spec = api.get("rayjobs", name)["spec"]["rayClusterSpec"]
    groups = spec["workerGroupSpecs"]
    return next(group for group in groups if group["groupName"] == "generators")


def test_a_job_is_submitted_scaled_monitored_and_stopped(api, bucket, command, submit):
    run = f"{bucket}/birds"
    api.deletion_s = 0.05
    code, out, err = submit(run, "--detach")
    assert (code, out) == (0, "")
    assert "submitted RayJob birds to namespace science" in err
    api.start_cluster("birds")
    api.set_status("birds", "Running", "RUNNING")
    begin(run)
    code, _, err = submit(run)
    assert code == endings.BAD_INPUT
    assert "birds (Running: RUNNING); stop it" in err

    assert bounds(generators_of(api, "birds")) == (1, 1)
    code, _, err = command("scale", run, "generators=3..5")
    assert code == 0, err
    assert bounds(generators_of(api, "birds")) == (2, 3), "two workers per pod"
    assert bounds(generators_of(api, "birds", later=True)) == (2, 3)

    api.add_pod("birds", "trainers")
    api.add_pod("birds", "submitter").write("step 1", "step 2")
    code, out, _ = command("status", run)
    assert code == 0
    assert "generators scaled to 3..5" in out
    assert "kubernetes: birds Running RUNNING (" in out
    assert "trainers 1 Running" in out
    assert json.loads(command("status", run, "--json")[1])["cluster"].startswith(
        "kubernetes: birds"
    )
    code, out, _ = command("logs", run)
    assert (code, out.split("\n")[:2]) == (0, ["step 1", "step 2"])

    code, _, err = command("stop", run)
    assert code == 0, err
    assert api.names("rayjobs") == []
    code, out, _ = command("status", run)
    assert code == 0, "the status comes from the store"
    assert "no RayJob of run" in out
    code, _, err = command("scale", run, "generators=7")
    assert code == endings.BAD_INPUT
    assert "stored for later attempts of the run, but the pods were not scaled" in err
    assert command("scale", run, "generators=3..5")[0] == endings.BAD_INPUT
    code, out, _ = submit(run, "--dry-run")
    [ray_job] = [m for m in yaml.safe_load_all(out) if m["kind"] == "RayJob"]
    groups = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [bounds(g) for g in groups if g["groupName"] == "generators"] == [(2, 3)]


def test_without_detach_submit_follows_and_returns_the_exit_code(api, bucket, submit):
    def run_job(name):
        api.start_cluster(name)
        log = api.add_pod(name, "submitter")
        log.write("one", "two")
        log.close()
        api.get("pods", f"{name}-submitter")["status"]["phase"] = "Failed"
        api.set_status(name, "Failed", "FAILED", message=FAILED)

    api.on_ray_job = run_job
    code, out, err = submit(f"{bucket}/fish")
    assert code == endings.FAILED
    assert out.split("\n")[:2] == ["one", "two"]
    assert "submitted fish to namespace science" in err
    kept = json.loads(ObjectStore(f"{bucket}/fish").read(layout.SUBMISSION))
    assert (kept["name"], kept["namespace"], kept["generators_per_pod"]) == ("fish", "science", 2)


def test_a_rejected_submission_is_not_recorded_in_the_run(api, bucket, submit):
    api.forbidden.add(("create", "rayjobs"))
    code, _, err = submit(f"{bucket}/mice")
    assert code == endings.BAD_INPUT
    assert "no permission to create rayjobs" in err
    assert ObjectStore(f"{bucket}/mice").read_or_none(layout.SUBMISSION) is None


def test_ctrl_c_leaves_the_job_running(api, bucket, submit, monkeypatch):
    def interrupt(*_, **__):
        until(lambda: api.names("rayjobs"))
        raise KeyboardInterrupt

    monkeypatch.setattr(kube_module.Kube, "follow", interrupt)
    code, _, err = submit(f"{bucket}/newts")
    assert code == endings.INTERRUPTED
    assert "the job keeps running; follow it with" in err
    assert "stopped" not in err
    assert api.names("rayjobs") == ["newts"]


def test_the_scale_is_kept_when_a_lost_head_is_replaced(api, bucket, command, submit, monkeypatch):
    run = f"{bucket}/owls"
    api.deletion_s = 0.05

    def run_job(name):
        api.start_cluster(name)
        if name == "owls":
            begin(run)
            assert command("scale", run, "generators=4")[0] == 0
            api.set_status(name, "Failed", "RUNNING", reason="JobStatusCheckTimeoutExceeded")
        else:
            api.set_status(name, "Complete", "SUCCEEDED")

    api.on_ray_job = run_job
    code, _, err = submit(run)
    assert code == 0, err
    assert bounds(generators_of(api, "owls--2")) == (2, 2)


def test_a_job_starts_although_its_store_is_unreachable_from_here(
    api, command, submit, monkeypatch, options
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    for name in ("dist-tl-head", "dist-tl-worker", "dist-tl-submitter"):
        api.objects["serviceaccounts", "zoo", name] = api.get("serviceaccounts", name)
    options.write_text(f"namespace: zoo\n{options.read_text()}")  # differs from that of the context
    run = "s3://inside/eels"
    code, _, err = submit(run, "--detach")
    assert code == 0
    assert "unreachable from this machine" in err
    assert "add --kube --namespace zoo" in err
    code, _, err = command("status", run, "--kube")
    assert code == endings.BAD_INPUT
    assert "namespace science" in err
    code, out, _ = command("status", run, "--kube", "--namespace", "zoo", "--json")
    assert code == 0
    assert json.loads(out) == {"run": run, "cluster": "eels New"}
    assert command("stop", run, "--kube", "-n", "zoo")[0] == 0
    assert ("rayjobs", "zoo", "eels") not in api.objects

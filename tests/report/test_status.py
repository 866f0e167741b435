"""Status of a run, read from its store only."""

import time

import pytest

from dist_tl.cluster.scaling import Bounds, Scale, write_scale
from dist_tl.deploy.submissions import Submission, read_submission, write_submission
from dist_tl.errors import ConfigError, DamagedError
from dist_tl.report.results import JobRecord, StudyResults, write_results
from dist_tl.report.status import age, check_has_generators, run_status
from dist_tl.shards.manifest import StageManifest, open_stage
from dist_tl.shards.order import ShardPlan
from dist_tl.storage import layout
from dist_tl.storage.attempts import begin_attempt
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import write_record

RESULTS = StudyResults(
    run="r",
    kind="source",
    fingerprint="f",
    stages=(),
    versions={},
    wall_seconds=1.0,
    peak_memory_bytes=1,
    findings=(),
    verdict="none",
)


def write_job(store, job):
    write_record(store, layout.JOB, JobRecord(job=job, fingerprint="f", versions={}))


@pytest.fixture
def store(tmp_path):
    store = ObjectStore(tmp_path / "run")
    write_job(store, {"kind": "transfer"})
    return store


def shards(store, done):
    plan = ShardPlan(
        stage="pp-shards",
        fingerprint="0",
        purpose="p",
        seed=0,
        num_samples=40,
        samples_per_shard=10,
        lanes=1,
        window=1,
    )
    manifest = StageManifest(
        plan=plan,
        kind="pp",
        condition="none",
        image_shape=(1, 2, 2),
        num_classes=2,
        generator="g",
    )
    open_stage(store, manifest)
    for index in range(done):
        store.write(layout.entry_key("pp-shards", index), b"{}")


def stages(store):
    return {row.stage: (row.state, row.progress) for row in run_status(store).stages}


def test_a_folder_without_a_run_raises_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"contains no run \(no job.json\)"):
        run_status(ObjectStore(tmp_path / "nowhere"))


def test_a_run_that_has_just_started(store):
    status = run_status(store)
    assert (status.kind, status.state, status.attempts, status.stages) == (
        "transfer",
        "unfinished",
        0,
        (),
    )


def test_status_reports_the_progress_of_each_stage(store):
    shards(store, 3)
    store.write(layout.metrics_key("begun"), b"")
    store.write(
        layout.metrics_key("trunk"), b'{"step": 1, "loss": 2.0}\n{"step": 7, "loss": 0.5}\n'
    )
    store.write(layout.commit_key("trunk", 5), b"{}")
    store.write(layout.rank_tensors_key("trunk", 6, 0, 2), b"")  # not committed
    store.write(layout.result_key("done"), b"{}")
    assert stages(store) == {
        "pp-shards": ("shards", "3 of 4 shards"),
        "begun": ("training", "checkpoint at step 0"),
        "trunk": ("training", "step 7, loss 0.500, checkpoint at step 5"),
        "done": ("done", ""),
    }
    shards(store, 4)
    write_results(store, RESULTS)
    assert stages(store)["pp-shards"] == ("done", "4 of 4 shards")
    assert run_status(store).state == "done"


def test_a_source_job_is_done_once_it_has_results_like_any_other(store):
    write_job(store, {"kind": "source"})
    store.write(layout.result_key("source"), b"{}")
    assert run_status(store).state == "unfinished"
    write_results(store, RESULTS)
    assert run_status(store).state == "done"


def test_only_runs_with_generators_can_be_scaled(store):
    with pytest.raises(ConfigError, match="is of kind transfer and has no generators to scale"):
        check_has_generators(store)
    write_job(store, {"kind": "transfer", "generators": {}})
    check_has_generators(store)


def test_status_reports_attempts_and_scale(store):
    begin_attempt(store)
    begin_attempt(store)
    write_scale(store, Scale(generators=Bounds(min=1, max=4)))
    status = run_status(store)
    assert status.attempts == 2
    assert status.last_host
    assert time.time() - status.last_started < 60
    assert status.generators == Bounds(min=1, max=4)


def test_the_submission_is_stored_without_secrets(store):
    assert read_submission(store) is None
    submission = Submission(backend="ray", name="run--1", address="http://127.0.0.1:8265")
    write_submission(store, submission)
    assert read_submission(store) == submission
    assert b"token" not in store.read(layout.SUBMISSION)
    store.write(layout.SUBMISSION, b"[]")
    with pytest.raises(DamagedError, match=r"submission.json is damaged"):
        read_submission(store)


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3 seconds"), (200, "3 minutes"), (9500, "3 hours"), (1e6, "12 days")]
)
def test_age_uses_the_largest_fitting_unit(seconds, text):
    assert age(time.time() - seconds) == f"{text} ago"

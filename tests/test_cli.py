"""The command: help that teaches, refusals that say what to do, JSON that programs can read."""

import json
import os
import subprocess
import sys

import pytest
import yaml

import dist_tl.jobs.run
from dist_tl.cli import doctor, endings
from dist_tl.errors import ConfigError, DataError, StorageError
from dist_tl.report.results import JobRecord
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import write_record

TRAINING = {"steps": 4, "batch_size": 8}
RESNET = {"kind": "resnet", "width": 4, "blocks": [1], "norm": "group"}


@pytest.fixture
def job(tmp_path):
    """Writes a small job file with changes; returns its path."""

    def write(**changes):
        content = {
            "kind": "transfer",
            "run": str(tmp_path / "run"),
            "seeds": 1,
            "lanes": 2,
            "source": {
                "data": {"source": "digits", "part": {"index": 0, "of": 2}, "limit": 100},
                "classifier": RESNET,
                "classifier_training": TRAINING,
                "generator": {"channels": [8]},
                "generator_training": TRAINING,
            },
            "target": {
                "data": {"source": "digits", "part": {"index": 1, "of": 2}},
                "labels_per_class": 2,
                "network": RESNET,
                "training": TRAINING,
            },
            "arms": ["scratch", "pp"],
            "pp": {"samples": 32, "training": TRAINING},
            "shards": {"samples_per_shard": 8, "lanes": 2},
            **changes,
        }
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def nothing_starts(monkeypatch, tmp_path):
    """Whoever would run a job, or leave a file, fails the test."""

    def forbidden(*_):
        raise AssertionError("a job was started")

    monkeypatch.setattr(dist_tl.jobs.run, "run_job", forbidden)
    yield
    assert not (tmp_path / "run").exists()


# Help.


def test_help_teaches_the_verbs_overrides_and_exit_codes(command):
    code, out, _ = command("--help")
    assert code == 0
    for verb in ("plan", "run", "report", "doctor"):
        assert f"dist-tl {verb}" in out
    assert "target.labels_per_class=10" in out
    for meaning in ("0 done", "2 bad input", "3 failed and can be resumed", "130", "143"):
        assert meaning in out


def test_the_bare_command_shows_its_help(command):
    code, out, err = command()
    assert "dist-tl plan JOB.yaml" in out + err
    assert code in (0, endings.BAD_INPUT)


@pytest.mark.parametrize(
    ("verb", "lessons"),
    [
        ("plan", ["JOB.yaml", "KEY=VALUE", "trainers.workers=1", "--json", "Starts nothing"]),
        ("run", ["JOB.yaml", "KEY=VALUE", "--json", "resumes from what is committed", "Ctrl-C"]),
        ("report", ["RUN", "--markdown", "--json"]),
        ("doctor", ["--store", "s3://", "--json"]),
    ],
)
def test_each_verb_explains_itself(command, verb, lessons):
    code, out, _ = command(verb, "--help")
    assert code == 0
    for lesson in lessons:
        assert lesson in out


# Refusals.


@pytest.mark.parametrize("verb", ["plan", "run"])
@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        (
            "target.labels_per_clas=3",
            "labels_per_clas: unknown key; did you mean 'labels_per_class'",
        ),
        (
            "target.labels_per_class=many",
            "target.labels_per_class: Input should be a valid integer",
        ),
        (
            "kind=transmute",
            "kind: expected one of transfer, hub, predict, layer_search, geometric_labels, ",
        ),
        ("lanes=3", "3 lanes cannot be divided among 2 workers"),
        ("seed", "expected key=value"),
    ],
)
def test_a_job_that_cannot_work_is_refused_before_anything_starts(
    command, job, nothing_starts, verb, override, complaint
):
    code, out, err = command(verb, job(), override)
    assert code == endings.BAD_INPUT == 2
    assert complaint in err
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_missing_job_file_is_refused(command, nothing_starts, tmp_path, verb):
    code, _, err = command(verb, tmp_path / "absent.yaml")
    assert code == endings.BAD_INPUT
    assert "absent.yaml" in err
    assert "No such file" in err


@pytest.mark.parametrize("words", [["fly"], ["plan"], ["run", "--fast", "job.yaml"]])
def test_a_command_that_does_not_exist_is_refused(command, words):
    code, _, err = command(*words)
    assert code == endings.BAD_INPUT
    assert "Traceback" not in err


def test_an_unfinished_run_has_no_report(command, tmp_path):
    code, _, err = command("report", tmp_path)
    assert code in (endings.BAD_INPUT, endings.FAILED)
    assert "Traceback" not in err
    assert "results.json" in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("token=abc is wrong"), 2),
        (DataError("token=abc is wrong"), 2),
        (StorageError("token=abc is wrong"), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_ends_a_run_decides_the_exit_code_and_shows_no_secret(
    command, job, monkeypatch, error, code
):
    def fail(*_):
        raise error

    monkeypatch.setattr(dist_tl.jobs.run, "run_job", fail)
    found, _, err = command("run", job())
    assert found == code
    assert "abc" not in err
    assert ("the same command resumes" in err) == (code != 2)


# What programs read.


def test_a_plan_is_readable_by_programs_and_leaves_nothing_behind(command, job, nothing_starts):
    code, out, _ = command("plan", job(), "--json", "pp.samples=48")
    plan = json.loads(out)
    assert code == 0
    assert [(row["shards"], row["samples"]) for row in plan["generate"]] == [(6, 48)]
    assert {row["steps"] for row in plan["train"]} == {4}


def test_a_plan_shows_tables_to_people(command, job, nothing_starts):
    code, out, _ = command("plan", job())
    assert code == 0
    assert "pp-shards" in out
    assert "2 x 1 CPU" in out


def test_the_doctor_is_readable_by_programs(command):
    code, out, _ = command("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)}
    known = {"machine", "temporary folder", "torch", "ray", "deepspeed", "embedded S3"}
    assert known <= set(checks)
    failed = [name for name, check in checks.items() if check["state"] == "fails"]
    assert code == (endings.FAILED if failed else 0)


@pytest.mark.parametrize(
    ("value", "state", "lesson"),
    [("0", "ok", "127.0.0.1 and with a token"), ("1", "note", "listens on all interfaces")],
)
def test_the_doctor_says_who_can_reach_a_private_cluster(monkeypatch, value, state, lesson):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", value)
    check = doctor._ray_address()
    assert (check.name, check.state) == ("Ray cluster", state)
    assert lesson in check.finding


def test_the_doctor_names_a_setting_that_makes_the_store_fail(command, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    _, out, _ = command("doctor", "--json", "--store", "s3://bucket/run")
    [check] = [check for check in json.loads(out) if check["name"] == "store"]
    assert check["state"] == "fails"
    assert "AWS_PROFILE is 'no-such-profile'" in check["finding"]


def test_the_doctor_says_why_a_store_refuses(command, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    code, out, _ = command("doctor", "--json", "--store", tmp_path / "file" / "run")
    [check] = [check for check in json.loads(out) if check["name"] == "store"]
    assert (code, check["state"]) == (endings.FAILED, "fails")


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "dist_tl", "plan", "absent.yaml"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == endings.BAD_INPUT
    assert "cannot read the job file absent.yaml" in done.stderr
    assert done.stdout == ""


# Jobs on other machines.


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("submit", "{job}"), "exactly one of --kube and --address"),
        (("submit", "{job}", "--kube", "--address", "http://a:1"), "exactly one of"),
        (("submit", "{job}", "--kube"), "expected --options FILE"),
        (("submit", "{job}", "--kube", "--options", "nowhere.yaml"), "nowhere.yaml"),
        (("submit", "{job}", "--address", "127.0.0.1:8265"), "expected the URL of Ray's dashboard"),
        (("submit", "{job}", "--address", "http://me:word@a:1"), "a URL without a login"),
        (("submit", "{job}", "--address", "http://127.0.0.1:99999"), "is not a URL"),
        (("submit", "{job}", "--address", "http://[::1"), "is not a URL"),
        (("submit", "{job}", "--address", "http://a:1", "run=runs/x"), "must reach the run"),
        (
            ("submit", "{job}", "--address", "http://a:1", "run=s3://k:" + 20 * "s" + "@b/r"),
            "expected no secret in a job",
        ),
        (("status", "{run}"), "contains no run"),
        (("logs", "{run}"), "was not submitted"),
        (("stop", "{run}"), "was not submitted"),
        (("scale", "{run}", "generators=two"), "generators=N or generators=MIN..MAX"),
        (("scale", "{run}", "generators=2"), "contains no run"),
    ],
)
def test_verbs_for_other_machines_refuse_what_cannot_work(
    command, job, nothing_starts, tmp_path, words, complaint
):
    places = {"{job}": str(job()), "{run}": str(tmp_path / "nowhere")}
    code, out, err = command(*[places.get(word, word) for word in words])
    assert code == endings.BAD_INPUT
    assert complaint in " ".join(err.split())
    assert out == ""


def test_a_dry_run_prints_what_kubernetes_would_be_given(command, job, nothing_starts, tmp_path):
    options = tmp_path / "options.yaml"
    options.write_text("image: example/dist-tl:1\n")
    where = ("run=s3://bucket/runs/birds", "store=direct")
    code, out, _ = command("submit", job(), "--kube", "--options", options, "--dry-run", *where)
    assert code == 0
    kinds = [manifest["kind"] for manifest in yaml.safe_load_all(out)]
    assert kinds[:2] == ["ConfigMap", "RayJob"]
    assert "    kind: transfer" in out, "the job stands there as it is"
    code, out, _ = command("plan", job(), "--kube", "--options", options, *where)
    assert code == 0
    assert "generators" in out
    assert "Pods (Kubernetes)" in out
    code, out, _ = command("plan", job(), "--kube", "--options", options, "--json", *where)
    assert [row["group"] for row in json.loads(out)["pods"]][:2] == ["head", "trainers"]
    code, _, err = command("plan", job(), "--kube", "--json", *where)
    assert code == endings.BAD_INPUT, "checked, not left out"
    assert "expected --options FILE" in err


def test_a_dry_run_prints_what_a_ray_cluster_would_be_given(command, job, nothing_starts):
    code, out, _ = command(
        "submit", job(), "--address", "http://nowhere:1", "--dry-run", "session.roles=true"
    )
    assert code == 0
    assert out.startswith("# python -m dist_tl run job.yaml")
    assert yaml.safe_load(out)["session"]["roles"] is True


def test_scaling_leaves_a_word_in_the_run(command, tmp_path):
    record = JobRecord(job={"kind": "transfer", "generators": {}}, fingerprint="f", versions={})
    write_record(ObjectStore(tmp_path / "run"), "job.json", record)
    code, _, err = command("scale", tmp_path / "run", "generators=1..8")
    assert code == 0
    assert "1 to 8" in err
    written = json.loads((tmp_path / "run" / "scale.json").read_text())
    assert written["generators"] == {"min": 1, "max": 8}
    code, out, _ = command("status", tmp_path / "run", "--json")
    assert code == 0
    assert json.loads(out)["generators"] == {"min": 1, "max": 8}

"""Job kinds: the same files in every folder, and a new kind that every verb runs."""

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from pydantic import Field

from dist_tl.cluster.config import Task, TrialsConfig
from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError
from dist_tl.jobs import kinds
from dist_tl.jobs.kinds import KINDS, JobKind
from dist_tl.jobs.plan import TaskRow, plan_table
from dist_tl.jobs.spec import JobConfig
from dist_tl.report.results import Study, Table
from dist_tl.storage import layout

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGE = ROOT / "dist_tl"
JOBS = PACKAGE / "jobs"
PRESETS = sorted((ROOT / "launch" / "presets").glob("*.yaml"))
USUAL_FILES = {"__init__", "spec", "plan", "tasks", "run", "results", "exports"}
OTHER_FILES = {
    "hub": {"cost"},
    "geometric_labels": {"labelling", "pairs"},
    "manifold": {"claims", "curves"},
}
LIMIT = 100


# The folders.


def functions(path):
    return {
        node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
    }


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def imported_kinds(path):
    names = [name.split(".") for name in imported_modules(path)]
    return {name[2] for name in names if name[:2] == ["dist_tl", "jobs"] and name[2:]} & set(KINDS)


def test_every_folder_is_a_kind_and_every_kind_a_folder():
    folders = {path.name for path in JOBS.iterdir() if (path / "__init__.py").exists()}
    assert folders == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_has_the_file_names_and_functions_of_its_siblings(kind):
    files = {path.stem for path in (JOBS / kind).glob("*.py")}
    assert {"spec", "plan", "run", "results"} <= files
    assert files - USUAL_FILES == OTHER_FILES.get(kind, set())
    for name in ("plan", "run", "results"):
        assert name in functions(JOBS / kind / f"{name}.py")
    exports = KINDS[kind].export is not kinds._exports_nothing
    assert exports == ("exports" in files)
    assert not exports or "export" in functions(JOBS / kind / "exports.py")


@pytest.mark.parametrize("kind", KINDS)
def test_the_specification_of_a_kind_is_in_its_folder(kind):
    spec = KINDS[kind].spec()
    assert issubclass(spec, JobConfig)
    assert spec.__module__ == f"dist_tl.jobs.{kind}.spec"


def test_kinds_import_no_other_kind_except_transfer_its_source():
    pairs = {
        (kind, other)
        for kind in KINDS
        for path in (JOBS / kind).glob("*.py")
        for other in imported_kinds(path) - {kind}
    }
    assert pairs == {("transfer", "source")}


def test_nothing_outside_jobs_knows_the_kinds():
    classes = [kind.spec().__name__ for kind in KINDS.values()]
    names = re.compile(rf"\b({'|'.join(classes)})\b")
    for path in PACKAGE.rglob("*.py"):
        if JOBS not in path.parents:
            assert not names.search(path.read_text()), path
            assert not imported_kinds(path), path


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("import dist_tl.jobs.kinds", ("torch", "ray", "deepspeed")),
        (
            "from dist_tl.jobs.job_file import read_job; [read_job(p) for p in sys.argv[1:]]",
            ("ray", "deepspeed"),
        ),
    ],
    ids=["the table of kinds", "job files"],
)
def test_heavy_frameworks_are_imported_on_first_use(code, forbidden):
    code = f"import sys; {code}; print(sorted({set(forbidden)} & set(sys.modules)))"
    words = [sys.executable, "-c", code, *map(str, PRESETS)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


# A new kind.


class ToyJob(JobConfig):
    """Squares numbers."""

    numbers: tuple[int, ...] = Field(min_length=1)
    trials: TrialsConfig = Field(default_factory=TrialsConfig)


class SquareInputs(StrictModel):
    number: int


class SquareOutput(StrictModel):
    square: int


@dataclass(frozen=True)
class ToyPlan:
    job: ToyJob

    def tasks(self):
        return [Task(f"square-{n}", SquareInputs(number=n)) for n in self.job.numbers]

    def table(self):
        row = TaskRow(phase="squares", tasks=len(self.tasks()), work="one multiplication")
        return plan_table(self.job, tasks=[row])


def plan(job, store):
    if max(job.numbers) > LIMIT:
        raise ConfigError(f"numbers: expected at most {LIMIT}, got {max(job.numbers)}")
    return ToyPlan(job)


def square(inputs, store):
    store.write(f"calls/{inputs.number}-{len(store.list('calls'))}", b"")
    return SquareOutput(square=inputs.number**2)


def run(plan, workers):
    outputs = workers.run_tasks("squares", square, plan.tasks(), SquareOutput)
    return dict(zip(plan.job.numbers, (output.square for output in outputs), strict=True))


def results(outcome):
    rows = tuple((str(number), str(value)) for number, value in outcome.items())
    table = Table(title="Squares", header=("number", "square"), rows=rows)
    verdict = f"The squares sum to {sum(outcome.values())}."
    return Study(verdict=verdict, findings=("Squares are never negative.",), tables=(table,))


def export(outcome, store):
    store.write("models/squares.json", json.dumps(outcome).encode())


@pytest.fixture
def toy_job(monkeypatch, tmp_path):
    """The file of a job of kind `toy`, which exists for one test."""
    functions = {"plan": plan, "run": run, "results": results, "export": export}
    toy = JobKind(summary="squares of numbers", spec=lambda: ToyJob, **functions)
    monkeypatch.setitem(KINDS, "toy", toy)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Ray's workers find `square` by the module of this file.
    paths = [str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    path = tmp_path / "toy.yaml"
    session = {"num_cpus": 2, "object_store_mb": 80}
    job = {"kind": "toy", "run": str(tmp_path / "run"), "numbers": [3, 4], "session": session}
    path.write_text(yaml.safe_dump(job))
    return path


def test_a_new_kind_is_planned_without_writing_anything(command, toy_job, tmp_path):
    code, out, err = command("plan", toy_job)
    assert code == 0, err
    assert "squares" in out
    assert "one multiplication" in out
    code, out, err = command("plan", toy_job, "--json", "numbers=[1]")
    assert code == 0, err
    [row] = json.loads(out)["tasks"]
    assert row == {"phase": "squares", "tasks": 1, "work": "one multiplication"}
    assert json.loads(out)["actors"] == {"trials": "as CPUs allow x 1 CPU"}
    assert not (tmp_path / "run").exists()


@pytest.mark.ray
def test_a_new_kind_is_run_once_then_shown_reported_and_watched(command, toy_job, tmp_path):
    folder = tmp_path / "run"
    code, out, err = command("run", toy_job, "--json")
    assert code == 0, err
    first = json.loads(out)
    assert (first["kind"], first["verdict"]) == ("toy", "The squares sum to 25.")
    assert [(stage["name"], stage["figures"]["tasks"]) for stage in first["stages"]] == [
        ("squares", 2.0)
    ]
    assert json.loads((folder / "models" / "squares.json").read_text()) == {"3": 9, "4": 16}

    code, out, err = command("run", toy_job, "--json")
    assert (code, json.loads(out)) == (0, first), err
    assert len(list((folder / layout.ATTEMPTS).iterdir())) == 1
    assert len(list((folder / "calls").iterdir())) == 2, "no task ran again"

    (folder / layout.REPORT).unlink()
    code, out, err = command("report", folder)
    assert code == 0, err
    assert "The squares sum to 25." in out
    assert "Squares are never negative." in (folder / layout.REPORT).read_text()

    code, out, err = command("status", folder, "--json")
    assert code == 0, err
    status = json.loads(out)
    assert (status["kind"], status["state"], status["attempts"]) == ("toy", "done", 1)
    states = {row["stage"]: row["state"] for row in status["stages"]}
    assert states == {"square-3": "done", "square-4": "done"}

    code, out, err = command("run", toy_job, "numbers=[5]")
    assert (code, out) == (2, "")
    assert "holds another job: numbers differ" in err


def test_a_new_kind_is_submitted_to_a_ray_cluster(command, toy_job):
    words = ("--address", "http://nowhere:1", "--dry-run", "run=s3://bucket/toy")
    code, out, err = command("submit", toy_job, *words)
    assert code == 0, err
    job = yaml.safe_load(out)
    assert (job["kind"], job["numbers"]) == ("toy", [3, 4])


def test_a_new_kind_is_submitted_to_kubernetes(command, toy_job, tmp_path):
    pytest.importorskip("kubernetes", reason="pip install 'dist_tl[kube]'")
    options = tmp_path / "options.yaml"
    options.write_text("image: example/dist-tl:1\n")
    words = ("--kube", "--options", options, "--dry-run", "run=s3://bucket/toy")
    code, out, err = command("submit", toy_job, *words)
    assert code == 0, err
    manifests = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(out)}
    [text] = manifests["ConfigMap"]["data"].values()
    assert yaml.safe_load(text)["numbers"] == [3, 4]
    groups = manifests["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == ["trainers"]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("numbers=[]", "numbers: "),
        ("number=[1]", "number: unknown key; did you mean 'numbers'"),
        (f"numbers=[1, {LIMIT + 1}]", f"numbers: expected at most {LIMIT}, got {LIMIT + 1}"),
        ("kind=toys", "kind: expected one of transfer, "),
    ],
    ids=["value", "key", "plan", "kind"],
)
def test_a_bad_job_of_a_new_kind_ends_before_an_attempt_is_recorded(
    command, toy_job, tmp_path, override, complaint
):
    code, out, err = command("run", toy_job, override)
    assert (code, out) == (2, "")
    assert complaint in err
    assert "Traceback" not in err
    written = {str(path.relative_to(tmp_path)) for path in (tmp_path / "run").rglob("*.json")}
    assert written == set()


@pytest.mark.parametrize("verb", [(), ("plan",), ("run",), ("submit",)])
def test_help_lists_a_new_kind(command, toy_job, verb):
    code, out, _ = command(*verb, "--help")
    assert code == 0
    assert "toy (squares of numbers)" in " ".join(out.replace("│", " ").split())

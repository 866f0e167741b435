"""What a manifold or forecast job may say, and the tasks that follow from it."""

import pytest

from dist_tl.errors import ConfigError
from dist_tl.jobs.job_file import read_job
from dist_tl.jobs.manifold.plan import ManifoldPlan, moment_parts
from dist_tl.jobs.manifold.spec import ManifoldJob
from dist_tl.jobs.plan import plan_job

PRESETS = ("manifold", "manifold_phase", "forecast", "layer_search", "geometric_labels")


def job_file(tmp_path, text):
    path = tmp_path / "job.yaml"
    path.write_text(f"run: {tmp_path}/run\n{text}")
    return path


def manifold(**changes):
    return ManifoldJob(kind="manifold", run="somewhere", **changes)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_planned(name):
    table = plan_job(read_job(f"launch/presets/{name}.yaml"))
    assert table.tasks
    assert all(row.tasks > 0 for row in table.tasks)


def test_cells_are_listed_once_and_the_base_first():
    job = manifold(
        sweeps=[
            {"knob": "teacher_corr", "values": (1, 0.5)},
            {"knob": "feature_corr", "values": (1, 0.5)},
        ]
    )
    assert [cell.name for cell in job.cells()] == [
        "ds100-dt100-f1-s0-t1",
        "ds100-dt100-f1-s0-t0.5",
        "ds100-dt100-f0.5-s0-t1",
    ]
    assert [cell.is_matched for cell in job.cells()] == [True, False, False]


def test_a_grid_has_a_row_for_each_value_of_y():
    job = manifold(
        grid={
            "x": {"knob": "teacher_corr", "values": (0, 1)},
            "y": {"knob": "feature_corr", "values": (0, 0.5, 1)},
        }
    )
    rows = job.gridded()
    assert [[c.value("teacher_corr") for c in row] for row in rows] == [[0, 1]] * 3
    assert [row[0].value("feature_corr") for row in rows] == [0, 0.5, 1]


def test_sources_do_not_depend_on_knobs_and_baselines_not_on_sources():
    plan = ManifoldPlan(
        manifold(
            instances=2,
            sweeps=[
                {"knob": "teacher_corr", "values": (1, 0.5, 0)},
                {"knob": "source_latent", "values": (50, 100)},
            ],
        )
    )
    assert len(plan.sources()) == 4
    assert len(plan.baselines()) == 2
    assert len(plan.cells()) == 8
    names = [t.name for t in (*plan.sources(), *plan.moments(), *plan.baselines(), *plan.cells())]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 80


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_moment_tasks_share_every_chunk_once(tasks):
    plan = ManifoldPlan(manifold(moment_samples=30_000, moment_tasks=tasks, instances=1))
    parts = moment_parts(plan.job)
    assert [task.inputs.part for task in plan.moments()] == list(range(len(parts)))
    chunks = [chunk for part in parts for chunk in part]
    assert sum(size for _, size in chunks) == 30_000
    assert [index for index, _ in chunks] == list(range(len(chunks)))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sweeps: [{knob: teacher_corr, values: [1.5]}]", "teacher_corr"),
        ("sweeps: [{knob: source_latent, values: [10.5]}]", "whole number"),
        ("model: {knobs: {feature_corr: -0.1}}", "feature_corr"),
        ("samples: [0, 10]", "samples"),
        ("lambdas: [0.0, 0.01]", "lambdas"),
        ("reported_lambda: 0.5", "reported_lambda"),
        ("arms: [random]", "transferred"),
        ("model: {input_activation: relu}", "mean 0"),
        ("model: {latent: 5}", "source_latent|target_latent|latent"),
    ],
)
def test_a_manifold_job_that_cannot_work_says_why(tmp_path, text, told):
    with pytest.raises(ConfigError, match=told):
        read_job(job_file(tmp_path, f"kind: manifold\n{text}\n"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("maps: [{kind: network, name: last}]", "teacher"),
        ("maps: [{kind: pixels}, {kind: random, name: pixels}]", "every name once"),
        ("maps: [{kind: pixels}]\nchecked: [100]", "third"),
        ("maps: [{kind: pixels}]\nlambdas: [0.0]", "lambdas"),
        ("maps: []", "maps"),
    ],
)
def test_a_forecast_that_cannot_work_says_why(tmp_path, text, told):
    with pytest.raises(ConfigError, match=told):
        read_job(job_file(tmp_path, f"kind: forecast\ndata: {{source: digits}}\n{text}\n"))

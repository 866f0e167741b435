"""Independent tasks: outputs are returned in order and never computed again."""

import os

import pytest
from pydantic import Field

from dist_tl.cluster.config import Task, TrialsConfig
from dist_tl.cluster.tasks import read_output, run_tasks
from dist_tl.config import StrictModel
from dist_tl.errors import CheckpointMismatchError, ConfigError, SupersededError, WorkerError
from dist_tl.storage.attempts import begin_attempt
from dist_tl.storage.objects import ObjectStore

pytestmark = pytest.mark.ray


class Inputs(StrictModel):
    number: int
    trouble: str = Field(default="", description="Failure of the first try.")


class Output(StrictModel):
    square: int


def square(inputs, store):
    tries = len(store.list(f"tries/{inputs.number}"))
    store.write(f"tries/{inputs.number}/{tries}", b"")
    if inputs.trouble == "killed" and tries == 0:
        os._exit(1)
    if inputs.trouble == "named error":
        raise ConfigError("expected better")
    if inputs.trouble == "unnamed error":
        1 / 0  # noqa: B018
    return Output(square=inputs.number**2)


def tasks(count, **trouble):
    return [Task(f"square-{i}", Inputs(number=i, **trouble)) for i in range(count)]


@pytest.fixture
def store(ray_local, tmp_path):
    return ObjectStore(tmp_path)


def run(store, inputs, **options):
    return run_tasks(square, inputs, Output, store, config=TrialsConfig(), **options)


def test_outputs_are_in_the_order_of_the_tasks(store):
    calls = []
    outputs = run(store, tasks(12), on_done=lambda done, total, name: calls.append((done, total)))
    assert [output.square for output in outputs] == [i**2 for i in range(12)]
    assert calls == [(i + 1, 12) for i in range(12)]


def test_no_tasks_need_no_cluster(store):
    assert run(store, []) == []


def test_a_finished_task_is_read_and_not_run_again(store):
    run(store, tasks(2))
    assert [output.square for output in run(store, tasks(4))] == [0, 1, 4, 9]
    assert [len(store.list(f"tries/{i}")) for i in range(4)] == [1, 1, 1, 1]


def test_a_task_whose_worker_is_killed_is_retried(store):
    assert [output.square for output in run(store, tasks(3, trouble="killed"))] == [0, 1, 4]
    assert [len(store.list(f"tries/{i}")) for i in range(3)] == [2, 2, 2]


def test_a_named_error_reaches_the_caller_and_stores_no_output(store):
    inputs = tasks(1, trouble="named error")
    with pytest.raises(ConfigError, match="expected better"):
        run(store, inputs)
    assert read_output(store, inputs[0], Output) is None


def test_a_superseded_attempt_stores_nothing(store):
    first, second = begin_attempt(store), begin_attempt(store)
    inputs = tasks(2)
    with pytest.raises(SupersededError, match="attempt 2"):
        run(store, inputs, attempt=first.number)
    assert [read_output(store, task, Output) for task in inputs] == [None, None]
    assert run(store, inputs, attempt=second.number)[1].square == 1


def test_an_unnamed_error_is_wrapped_and_shown(store):
    with pytest.raises(WorkerError, match=r"ZeroDivisionError[\s\S]*in square"):
        run(store, tasks(1, trouble="unnamed error"))


def test_a_stored_output_of_other_inputs_is_rejected(store):
    run(store, tasks(1))
    with pytest.raises(CheckpointMismatchError, match="square-0"):
        run(store, [Task("square-0", Inputs(number=7))])

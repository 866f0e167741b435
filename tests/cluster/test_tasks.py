"""Independent tasks: their answers come once, in order, and are not computed again."""

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
    trouble: str = Field(default="", description="What happens on the first attempt.")


class Output(StrictModel):
    square: int


def square(inputs, store):
    tries = len(store.list(f"tries/{inputs.number}"))
    store.write(f"tries/{inputs.number}/{tries}", b"")
    if inputs.trouble == "killed" and tries == 0:
        os._exit(1)
    if inputs.trouble == "named error":
        raise ConfigError("expected better")
    if inputs.trouble == "a mistake":
        1 / 0  # noqa: B018
    return Output(square=inputs.number**2)


def tasks(count, **trouble):
    return [Task(f"square-{i}", Inputs(number=i, **trouble)) for i in range(count)]


@pytest.fixture
def store(ray_local, tmp_path):
    return ObjectStore(tmp_path)


def run(store, inputs, **options):
    return run_tasks(square, inputs, Output, store, config=TrialsConfig(), **options)


def test_answers_come_in_the_order_of_the_tasks(store):
    told = []
    answers = run(store, tasks(12), on_done=lambda done, total, name: told.append((done, total)))
    assert [answer.square for answer in answers] == [i**2 for i in range(12)]
    assert told == [(i + 1, 12) for i in range(12)]


def test_no_tasks_need_no_cluster(store):
    assert run(store, []) == []


def test_what_is_done_is_read_and_not_run_again(store):
    run(store, tasks(2))
    assert [answer.square for answer in run(store, tasks(4))] == [0, 1, 4, 9]
    assert [len(store.list(f"tries/{i}")) for i in range(4)] == [1, 1, 1, 1]


def test_a_task_whose_worker_is_killed_is_run_again(store):
    assert [answer.square for answer in run(store, tasks(3, trouble="killed"))] == [0, 1, 4]
    assert [len(store.list(f"tries/{i}")) for i in range(3)] == [2, 2, 2]


def test_a_named_error_reaches_the_caller_and_leaves_no_answer(store):
    inputs = tasks(1, trouble="named error")
    with pytest.raises(ConfigError, match="expected better"):
        run(store, inputs)
    assert read_output(store, inputs[0], Output) is None


def test_nothing_is_stored_after_a_later_start_has_the_run(store):
    first, second = begin_attempt(store), begin_attempt(store)
    inputs = tasks(2)
    with pytest.raises(SupersededError, match="attempt 2"):
        run(store, inputs, attempt=first.number)
    assert [read_output(store, task, Output) for task in inputs] == [None, None]
    assert run(store, inputs, attempt=second.number)[1].square == 1


def test_an_unnamed_error_is_named_and_shown(store):
    with pytest.raises(WorkerError, match=r"ZeroDivisionError[\s\S]*in square"):
        run(store, tasks(1, trouble="a mistake"))


def test_an_answer_to_another_question_is_refused(store):
    run(store, tasks(1))
    with pytest.raises(CheckpointMismatchError, match="square-0"):
        run(store, [Task("square-0", Inputs(number=7))])

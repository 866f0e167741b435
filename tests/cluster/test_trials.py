"""Trials: parallel stages equal sequential ones, and named errors reach the driver."""

import pytest
import ray
from small_stages import contents, training_stage, wait_until, workers_named

from dist_tl import errors
from dist_tl.cluster.config import TrialsConfig
from dist_tl.cluster.trials import Trials
from dist_tl.errors import ConfigError, DistTLError, SupersededError, WorkerError
from dist_tl.storage import layout
from dist_tl.storage.attempts import begin_attempt
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.checkpoints import CheckpointConfig
from dist_tl.train.engine import join_group
from dist_tl.train.models import PretrainedTrunk
from dist_tl.train.stage import run_stage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180), pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def run_sequentially(tmp_path):
    """Runs stages in sequence in this process; returns their predictions and models."""

    def run(specs):
        join_group(0, 1)
        store = ObjectStore(tmp_path / "plain")
        results = [run_stage(spec, store, rank=0, world_size=1) for spec in specs]
        return [result.predictions for result in results], models(store, specs)

    return run


def models(store, specs):
    return [contents(store, layout.stage_model_prefix(spec.name)) for spec in specs]


def test_parallel_trials_equal_sequential_stages(ray_local, store, run_sequentially):
    specs = [training_stage(f"trial-{seed}", seed=seed) for seed in range(4)]
    trials = Trials(TrialsConfig(cpus=0.5), store.url)
    refs = [trials.start(specs[:2]), trials.start(specs[2:])]
    results = [result for ref in refs for result in trials.results(ref)]
    predictions, plain_models = run_sequentially(specs)
    assert [result.name for result in results] == [spec.name for spec in specs]
    assert [result.predictions for result in results] == predictions
    assert models(store, specs) == plain_models
    assert len({result.predictions for result in results}) == 4, "seeds change the result"


def test_a_trial_whose_worker_is_killed_resumes_in_another(ray_local, store, run_sequentially):
    spec = training_stage("killed", steps=300, checkpoints=CheckpointConfig(every_steps=20))
    trials = Trials(TrialsConfig(cpus=0.5), store.url)
    ref, polls = trials.start([spec]), []
    wait_until(lambda: store.list(layout.checkpoints_prefix(spec.name)))
    [victim] = workers_named("_run_alone")
    victim.kill()
    [result] = trials.results(ref, on_poll=lambda: polls.append(1))
    assert polls, "on_poll is called during the wait"
    assert ([result.predictions], models(store, [spec])) == run_sequentially([spec])


def test_a_named_error_of_a_trial_reaches_the_driver_unwrapped(ray_local, store):
    missing = training_stage(
        "orphan", model=PretrainedTrunk(model="stages/none/model", num_classes=10)
    )
    trials = Trials(TrialsConfig(cpus=0.5), store.url)
    with pytest.raises(ConfigError, match="no model at") as caught:
        trials.results(trials.start([missing]))
    assert type(caught.value) is ConfigError  # not Ray's imitation of it


def test_a_trial_of_a_superseded_attempt_commits_nothing(ray_local, store):
    first, _ = begin_attempt(store), begin_attempt(store)
    trials = Trials(TrialsConfig(cpus=0.5), store.url, attempt=first.number)
    spec = training_stage("late", steps=2)
    with pytest.raises(SupersededError, match="attempt 2"):
        trials.results(trials.start([spec]))
    assert not store.exists(layout.result_key("late"))


def test_a_trial_that_dies_too_often_ends_the_job_with_a_remedy(ray_local, store):
    spec = training_stage("doomed", steps=3000)
    trials = Trials(TrialsConfig(cpus=0.5, max_retries=0), store.url)
    ref = trials.start([spec])
    [victim] = wait_until(lambda: workers_named("_run_alone"))
    victim.kill()
    with pytest.raises(WorkerError, match="start the same job again"):
        trials.results(ref)


@ray.remote(num_cpus=0)
def fail_with(name):
    raise getattr(errors, name)(f"{name}: expected 3, got 4")


def test_every_named_error_can_be_passed_through_ray(ray_local):
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    for kind, ref in [(kind, fail_with.remote(kind.__name__)) for kind in kinds]:
        with pytest.raises(DistTLError) as caught:
            ray.get(ref)
        assert type(caught.value.cause) is kind
        assert str(caught.value.cause) == f"{kind.__name__}: expected 3, got 4"

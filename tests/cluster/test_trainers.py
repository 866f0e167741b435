"""The trainers' worker group: trains stages, survives killed workers, stops on named errors.

All tests share one group, since its start takes longer than its stages; the last test ends it.
"""

import json
import time

import pytest
from small_stages import contents, training_stage, workers_named

from dist_tl.cluster.config import TrainersConfig
from dist_tl.cluster.mailbox import open_mailbox, read_positions
from dist_tl.cluster.trainers import TrainerGroup
from dist_tl.errors import NonFiniteLossError, NumericsError
from dist_tl.storage import layout
from dist_tl.storage.attempts import begin_attempt
from dist_tl.storage.model_files import SUMS
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.checkpoints import CheckpointConfig
from dist_tl.train.engine import OptimizerConfig
from dist_tl.train.spec import read_result

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]
KILLED_AFTER = 60


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return ObjectStore(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="module")
def mailbox(ray_local):
    return open_mailbox()


@pytest.fixture(scope="module")
def group(store, mailbox):
    config = TrainersConfig(workers=2, cpus=0.5)
    with TrainerGroup(config, begin_attempt(store), mailbox) as group:
        yield group


@pytest.fixture(scope="module")
def undisturbed(group, store):
    """A long stage with checkpoints, and its result."""
    spec = long_stage("undisturbed")
    return group.wait(group.post(spec))


def long_stage(name):
    return training_stage(name, steps=240, checkpoints=CheckpointConfig(every_steps=20))


def test_a_stage_is_trained_by_all_workers_and_its_result_is_stored(store, undisturbed):
    assert undisturbed == read_result(store, long_stage("undisturbed"))
    assert (undisturbed.world_size, undisturbed.steps) == (2, 240)
    assert undisturbed.accuracy > 0.25, "ten classes: chance is 0.1"
    assert set(contents(store, layout.stage_model_prefix("undisturbed"))) == {
        layout.MODEL_TENSORS,
        layout.MODEL_CONFIG,
        SUMS,
    }


def test_stages_are_trained_in_the_order_of_posting(group, store, undisturbed):
    indices = [group.post(training_stage(name)) for name in ("second", "third")]
    third, second = group.wait(indices[1]), group.wait(indices[0])
    assert (second.name, third.name) == ("second", "third")
    assert second.ended <= third.started


def test_a_killed_worker_does_not_change_a_bit_of_the_weights(group, store, undisturbed):
    spec, killed = long_stage("disturbed"), []

    def kill_one(snapshot):
        if not killed and snapshot.step.get(spec.name, 0) >= KILLED_AFTER:
            victim = workers_named("RayTrainWorker")[-1]
            victim.kill()
            killed.append((time.time(), victim.pid))

    result = group.wait(group.post(spec), on_poll=kill_one)
    [(killed_at, pid)] = killed
    rows = [
        json.loads(line) for line in store.read(layout.metrics_key(spec.name)).decode().splitlines()
    ]
    assert [row["step"] for row in rows] == list(range(1, 241)), "no row is lost or duplicated"
    before = [row["step"] for row in rows if row["time"] < killed_at]
    assert 20 <= len(before) < 240, "it had to resume from a checkpoint"
    assert pid not in {worker.pid for worker in workers_named("RayTrainWorker")}
    assert model(store, "disturbed") == model(store, "undisturbed")
    assert result.predictions == undisturbed.predictions
    assert result.final_loss == undisturbed.final_loss


def model(store, stage):
    return contents(store, layout.stage_model_prefix(stage))


def test_a_group_that_reads_no_shards_reports_no_positions(mailbox, undisturbed):
    assert read_positions(mailbox) == {}


def test_a_named_error_of_a_worker_reaches_the_driver_unwrapped_and_ends_the_group(group):
    doomed = training_stage("doomed", steps=30, optimizer=OptimizerConfig(learning_rate=1e30))
    index, next_index = group.post(doomed), group.post(training_stage("never"))
    with pytest.raises(NonFiniteLossError, match="stage doomed") as caught:
        group.wait(index)
    assert type(caught.value) is NonFiniteLossError  # not Ray's imitation of it
    with pytest.raises(NumericsError):
        group.wait(next_index)

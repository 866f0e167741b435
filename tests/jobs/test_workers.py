"""Finished stages are read and not repeated, and nothing of their training is kept."""

from types import SimpleNamespace

import pytest

from dist_tl.datasets.digits import DigitsConfig
from dist_tl.jobs.source.spec import SourceJob
from dist_tl.jobs.workers import Workers
from dist_tl.models.resnet import ResNetConfig
from dist_tl.storage import layout
from dist_tl.storage.attempts import begin_attempt
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import write_record
from dist_tl.telemetry import SilentProgress
from dist_tl.train.checkpoints import CheckpointConfig
from dist_tl.train.engine import EngineConfig, OptimizerConfig
from dist_tl.train.models import NewNetwork
from dist_tl.train.objectives import SupervisedSpec
from dist_tl.train.rows import RowsSpec
from dist_tl.train.spec import StageResult, StageSpec

DIGITS = DigitsConfig(limit=20)
STAGE = StageSpec(
    name="scratch-seed0",
    seed=3,
    model=NewNetwork(network=ResNetConfig(width=4, blocks=(1,), norm="group"), num_classes=10),
    objective=SupervisedSpec(),
    image_shape=(1, 8, 8),
    labelled=RowsSpec(data=DIGITS),
    views=DIGITS.views,
    steps=8,
    batch_size=8,
    lanes=2,
    optimizer=OptimizerConfig(),
    engine=EngineConfig(),
    checkpoints=CheckpointConfig(),
)
RESULT = StageResult(
    name=STAGE.name,
    fingerprint=STAGE.fingerprint,
    world_size=1,
    started=1.0,
    first_step_at=1.5,
    ended=2.0,
    seconds=1.0,
    steps=8,
    samples=64,
    seconds_starved=0.0,
    seconds_saving=0.0,
    final_loss=0.5,
)


@pytest.fixture
def workers(tmp_path):
    """The workers of a second attempt; its trainers would fail if they got a stage."""
    job = SourceJob.model_construct()
    session = SimpleNamespace(roles=False, check=lambda: None)
    attempt = begin_attempt(ObjectStore(tmp_path / "run"))
    return Workers(job, attempt, SilentProgress(), session, trainers=SimpleNamespace())


def test_a_finished_stage_loses_the_checkpoints_that_a_killed_run_left(workers):
    store = workers.store
    write_record(store, layout.result_key(STAGE.name), RESULT)
    for key in (
        layout.commit_key(STAGE.name, 4),
        layout.rank_tensors_key(STAGE.name, 4, 0, 1),
        layout.rank_tensors_key(STAGE.name, 6, 0, 1),  # without COMMIT
        layout.commit_key("another-stage", 4),
    ):
        store.write(key, b"x")
    assert workers.train([STAGE]) == [RESULT]
    assert store.list("stages") == [
        layout.commit_key("another-stage", 4),
        layout.result_key(STAGE.name),
    ]

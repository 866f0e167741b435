"""Stages: stored files, resuming, determinism, and independence of the test rows."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dist_tl.datasets.images import LabelledImages
from dist_tl.errors import (
    CheckpointMismatchError,
    ConfigError,
    NonFiniteLossError,
    NumericsError,
    SupersededError,
)
from dist_tl.methods.pseudo.distillation import DistillationConfig
from dist_tl.methods.pseudo.p_ssl import PSSLConfig
from dist_tl.models.files import load_network
from dist_tl.storage import layout
from dist_tl.storage.attempts import begin_attempt
from dist_tl.storage.model_files import FILES
from dist_tl.storage.objects import ObjectStore
from dist_tl.train import rows as rows_module
from dist_tl.train import stage as stage_module
from dist_tl.train.engine import OptimizerConfig
from dist_tl.train.loop import read_rows
from dist_tl.train.models import build_model, load_classifier, model_files
from dist_tl.train.objectives import DiffusionSpec, DistillationSpec, PSSLSpec
from dist_tl.train.rows import load_rows
from dist_tl.train.spec import read_result
from dist_tl.train.stage import run_stage


class Killed(BaseException):
    """The machine died."""


def run_on(rank, world_size, spec, url, killed_after=None):
    """Runs a stage; returns None if the machine dies after step `killed_after`."""

    def on_progress(step, loss, shard):
        if step == killed_after:
            raise Killed

    try:
        return run_stage(
            spec,
            ObjectStore(url),
            rank=rank,
            world_size=world_size,
            on_progress=on_progress,
            log_every=1,
        )
    except Killed:
        return None


def run_alone(spec, url, **fields):
    return run_on(0, 1, spec, url, **fields)


def model_in(url, spec):
    """Returns the bytes of the stored model by file name."""
    store = ObjectStore(url)
    return {name: store.read(f"{layout.stage_model_prefix(spec.name)}/{name}") for name in FILES}


def curve_in(url, spec):
    """Returns step and figures of every metric row, without times."""
    rows = read_rows(ObjectStore(url).read(layout.metrics_key(spec.name)))
    timed = {"time", "elapsed_s", "starved_s"}
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def losses_in(url, spec):
    return [row["loss"] for row in curve_in(url, spec)]


@pytest.fixture
def run_url(tmp_path):
    """Returns the URL of a named run."""
    return lambda name: str(tmp_path / name)


# Stored files and results.


class WritingStore(ObjectStore):
    """Records the order in which keys are written."""

    def __init__(self, url):
        super().__init__(url)
        self.written = []

    def write(self, key, data, *, create_only=False):
        self.written.append(key)
        return super().write(key, data, create_only=create_only)


def test_a_stage_stores_model_and_metrics_and_last_its_result(alone, stage_spec, run_url):
    store, spec = WritingStore(run_url("run")), stage_spec()
    result = run_stage(spec, store, rank=0, world_size=1)
    prefix = layout.stage_prefix(spec.name)
    assert store.written.index(f"{prefix}/result.json") == len(store.written) - 1
    assert store.list() == [
        f"{prefix}/metrics.jsonl",
        f"{prefix}/model/SHA256SUMS",
        f"{prefix}/model/config.json",
        f"{prefix}/model/model.safetensors",
        f"{prefix}/result.json",
    ]
    assert read_result(store, spec) == result
    assert (result.steps, result.samples, result.world_size) == (6, 48, 1)
    assert [row["step"] for row in curve_in(store.url, spec)] == list(range(1, 7))
    assert result.final_loss == losses_in(store.url, spec)[-1]
    assert result.started <= result.first_step_at <= result.ended


class KilledBeforeClearing(WritingStore):
    """Dies when the checkpoints of a stage with a result are to be removed."""

    def delete_all(self, prefix):
        if self.written[-1].endswith("result.json"):
            raise Killed
        super().delete_all(prefix)


def test_checkpoints_that_a_kill_after_the_result_left_go_with_the_next_start(
    alone, stage_spec, run_url
):
    store, spec = KilledBeforeClearing(run_url("run")), stage_spec(every_steps=2)
    with pytest.raises(Killed):
        run_stage(spec, store, rank=0, world_size=1)
    assert store.list(layout.checkpoints_prefix(spec.name))
    result = run_alone(spec, store.url)
    assert result == read_result(store, spec)
    assert store.list(layout.checkpoints_prefix(spec.name)) == []
    assert not (Path(store.url) / layout.checkpoints_prefix(spec.name)).exists()


def test_the_result_equals_the_predictions_of_the_stored_model(
    ranks, stage_spec, part_of_digits, run_url
):
    """Also if the batch norm of every rank has seen its own share of the batches."""
    spec = stage_spec(steps=25, every_steps=0)
    results = ranks(run_on, spec, run_url("run"))
    test = load_rows(part_of_digits("test"))
    network = load_network(model_in(run_url("run"), spec)).eval()
    with torch.no_grad():
        predictions = network(test.tensor()).argmax(dim=1).numpy()
    for result in results:
        assert result.predictions == tuple(predictions.tolist())
        assert result.correct == tuple((predictions == test.labels).tolist())
        assert result.accuracy == pytest.approx((predictions == test.labels).mean())
        assert result.last_step_correct == ()
        assert len(set(result.predictions)) == 3


def test_a_network_learns_digits(alone, stage_spec, run_url):
    result = run_alone(stage_spec(steps=40, every_steps=0), run_url("run"))
    assert result.accuracy > 0.8


def test_without_evaluation_rows_there_are_no_predictions(alone, stage_spec, run_url):
    result = run_alone(stage_spec(evaluate=None, steps=1), run_url("run"))
    assert result.predictions == result.correct == ()
    assert result.accuracy == 0.0


def test_the_average_is_stored_and_both_models_are_evaluated(alone, stage_spec, run_url):
    spec = stage_spec(ema_decay=0.999, steps=12)
    result = run_alone(spec, run_url("average"))
    run_alone(stage_spec(steps=12), run_url("last"))
    average, last = (load_network(model_in(run_url(name), spec)) for name in ("average", "last"))
    assert not torch.equal(average.head.weight, last.head.weight)
    assert torch.equal(average.trunk.norm.running_mean, last.trunk.norm.running_mean)
    assert len(result.last_step_correct) == len(result.correct) > 0
    last_result = read_result(ObjectStore(run_url("last")), stage_spec(steps=12))
    assert result.last_step_correct == last_result.correct


def test_a_finished_stage_returns_at_once(alone, stage_spec, run_url, monkeypatch):
    result = run_alone(stage_spec(), run_url("run"))
    monkeypatch.setattr(stage_module, "Engine", lambda *_, **__: pytest.fail("trained again"))
    assert run_alone(stage_spec(), run_url("run")) == result


def test_the_result_of_another_specification_is_rejected(alone, stage_spec, run_url):
    run_alone(stage_spec(steps=1), run_url("run"))
    with pytest.raises(CheckpointMismatchError, match="scratch-seed0 was done by another job"):
        run_alone(stage_spec(steps=2), run_url("run"))


def test_the_checkpoint_interval_does_not_change_the_fingerprint(stage_spec):
    spec = stage_spec()
    assert stage_spec(every_steps=1).fingerprint == spec.fingerprint
    for change in ({"seed": 12}, {"steps": 7}, {"lanes": 2}, {"engine": {"precision": "bf16"}}):
        assert stage_spec(**change).fingerprint != spec.fingerprint


# Resuming.


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_killed_stage_resumes_to_identical_results(ranks, stage_spec, run_url, zero_stage):
    """Killed before the first checkpoint, between two, and in the last steps."""
    spec = stage_spec(ema_decay=0.9, engine={"zero_stage": zero_stage})
    [uninterrupted, *_] = ranks(run_on, spec, run_url("uninterrupted"))
    for step in (1, 3, 5):
        assert set(ranks(run_on, spec, run_url("killed"), step)) == {None}
    [resumed, *_] = ranks(run_on, spec, run_url("killed"))
    assert model_in(run_url("killed"), spec) == model_in(run_url("uninterrupted"), spec)
    assert curve_in(run_url("killed"), spec) == curve_in(run_url("uninterrupted"), spec)
    for field in ("predictions", "last_step_correct", "final_loss", "samples", "fingerprint"):
        assert getattr(resumed, field) == getattr(uninterrupted, field)


def test_seconds_sum_all_attempts_without_the_time_between(alone, stage_spec, run_url):
    began = time.time()
    run_alone(stage_spec(), run_url("run"), killed_after=5)
    worked = time.time() - began
    kept = read_rows(ObjectStore(run_url("run")).read(layout.metrics_key("scratch-seed0")))
    time.sleep(0.4)
    result = run_alone(stage_spec(), run_url("run"))
    last_attempt = result.ended - result.started
    [before] = [row["elapsed_s"] for row in kept if row["step"] == 4]
    assert result.seconds == pytest.approx(last_attempt + before)
    assert 0 < before <= worked


def with_dropout(*arguments, **fields):
    network = build_model(*arguments, **fields)
    network.trunk = nn.Sequential(network.trunk, nn.Dropout(0.5))
    return network


def test_dropout_depends_on_the_seed_and_not_on_earlier_work(
    alone, stage_spec, run_url, monkeypatch
):
    monkeypatch.setattr(stage_module, "build_model", with_dropout)
    models = {}
    for name, past, seed in (("one", 1, 11), ("again", 2, 11), ("other", 1, 12)):
        torch.manual_seed(past)
        before = torch.get_rng_state()
        run_alone(stage_spec(seed=seed), run_url(name))
        assert torch.equal(torch.get_rng_state(), before)
        models[name] = model_in(run_url(name), stage_spec())
    assert models["one"] == models["again"] != models["other"]
    monkeypatch.undo()
    run_alone(stage_spec(), run_url("none"))
    assert model_in(run_url("none"), stage_spec()) != models["one"]


def test_a_killed_stage_with_dropout_resumes_to_identical_results(
    alone, stage_spec, run_url, monkeypatch
):
    monkeypatch.setattr(stage_module, "build_model", with_dropout)
    run_alone(stage_spec(), run_url("uninterrupted"))
    run_alone(stage_spec(), run_url("killed"), killed_after=5)
    run_alone(stage_spec(), run_url("killed"))
    assert curve_in(run_url("killed"), stage_spec()) == curve_in(
        run_url("uninterrupted"), stage_spec()
    )


# Invariance.


def test_the_zero_stage_does_not_change_a_bit_of_the_model(two_ranks, stage_spec, run_url):
    models = []
    for zero_stage in (0, 1, 2, 3):
        spec = stage_spec(engine={"zero_stage": zero_stage, "clip_norm": 0.0}, steps=3)
        two_ranks(run_on, spec, run_url(f"zero{zero_stage}"))
        models.append(model_in(run_url(f"zero{zero_stage}"), spec))
    assert models.count(models[0]) == 4


def test_one_and_two_workers_have_the_same_losses(alone, two_ranks, stage_spec, run_url):
    """With group norm, which does not depend on the other samples of the rank's batch."""
    spec = stage_spec(norm="group")
    run_alone(spec, run_url("one"))
    two_ranks(run_on, spec, run_url("two"))
    assert losses_in(run_url("two"), spec) == pytest.approx(
        losses_in(run_url("one"), spec), rel=1e-4
    )
    other = stage_spec(norm="group", seed=12)
    run_alone(other, run_url("other"))
    assert losses_in(run_url("other"), other) != pytest.approx(
        losses_in(run_url("one"), spec), rel=1e-2
    )


def test_accumulated_micro_batches_train_like_full_batches(alone, stage_spec, run_url):
    full = stage_spec(norm="group")
    parts = stage_spec(norm="group", engine={"accumulation": 4})
    run_alone(full, run_url("full"))
    run_alone(parts, run_url("parts"))
    assert losses_in(run_url("parts"), parts) == pytest.approx(
        losses_in(run_url("full"), full), rel=1e-4
    )


@pytest.mark.parametrize("engine", [{}, {"zero_stage": 3, "precision": "bf16"}])
def test_p_ssl_with_zero_weight_is_supervised_training_bit_for_bit(
    alone, stage_spec, part_of_digits, run_url, engine
):
    """The model file holds both weights and batch-norm statistics."""
    objective = PSSLSpec(p_ssl=PSSLConfig(weight=0.0))
    unlabelled = {"unlabelled": part_of_digits("pool"), "unlabelled_batch_size": 8}
    p_ssl = stage_spec(objective=objective, engine=engine, **unlabelled)
    supervised = stage_spec(engine=engine)
    run_alone(p_ssl, run_url("p_ssl"))
    run_alone(supervised, run_url("supervised"))
    assert model_in(run_url("p_ssl"), p_ssl) == model_in(run_url("supervised"), supervised)
    weighty = stage_spec(objective=PSSLSpec(p_ssl=PSSLConfig(weight=1.0)), **unlabelled)
    result = run_alone(weighty, run_url("weighty"))
    assert model_in(run_url("weighty"), weighty) != model_in(run_url("supervised"), supervised)
    assert result.samples == 96


def inverted(data, rows):
    return replace(data, images=np.where(rows[:, None, None, None], 255 - data.images, data.images))


def mislabelled(data, rows):
    return replace(data, labels=np.where(rows, (data.labels + 1) % 3, data.labels))


@pytest.mark.parametrize("part", ["test", "train"])
def test_only_rows_of_the_train_part_can_change_the_model(
    alone, stage_spec, part_of_digits, run_url, monkeypatch, part
):
    """Wrong pixels and labels in the test part change only the reported figures."""
    spec = stage_spec(steps=25, every_steps=0)
    clean = run_alone(spec, run_url("clean"))
    load, subset = rows_module._load, LabelledImages.subset
    chosen = {image.tobytes() for image in load_rows(part_of_digits(part)).images}
    wrong = {(255 - np.frombuffer(image, np.uint8)).tobytes() for image in chosen}

    def is_in(data, images):
        return np.array([image.tobytes() in images for image in data.images])

    def load_inverted(config):
        data = load(config)
        return inverted(data, is_in(data, chosen))

    def subset_mislabelled(data, indices):
        # After the split, which is stratified and so may depend on all labels.
        return subset(mislabelled(data, is_in(data, wrong)), indices)

    monkeypatch.setattr(rows_module, "_load", load_inverted)
    monkeypatch.setattr(LabelledImages, "subset", subset_mislabelled)
    dirty = run_alone(spec, run_url("dirty"))
    blind = part == "test"
    assert (model_in(run_url("dirty"), spec) == model_in(run_url("clean"), spec)) is blind
    assert (curve_in(run_url("dirty"), spec) == curve_in(run_url("clean"), spec)) is blind
    assert dirty.predictions != clean.predictions
    assert dirty.accuracy < clean.accuracy - 0.3


# Failures.


def committed_in(url):
    return [key for key in ObjectStore(url).list() if key.endswith(("COMMIT", "result.json"))]


def test_a_diverging_loss_is_a_named_error_and_nothing_is_committed_after_it(
    alone, stage_spec, run_url
):
    spec = stage_spec(optimizer=OptimizerConfig(learning_rate=1e30, warmup=0.0), every_steps=1)
    with pytest.raises(NonFiniteLossError, match=r"stage scratch-seed0: the loss is nan at step 2"):
        run_alone(spec, run_url("run"))
    assert committed_in(run_url("run")) == [layout.commit_key(spec.name, 1)]
    assert [row["step"] for row in curve_in(run_url("run"), spec)] == [1]


@pytest.mark.parametrize("steps", [1, 6])
def test_diverging_weights_are_a_named_error_and_never_committed(alone, stage_spec, run_url, steps):
    """The loss is finite, since it precedes the update of the weights."""
    optimizer = OptimizerConfig(learning_rate=3e38, weight_decay=1.0, beta1=0.0, warmup=0.0)
    spec = stage_spec(optimizer=optimizer, every_steps=1, steps=steps)
    with pytest.raises(NumericsError, match="stage scratch-seed0: step 1 left weights that are"):
        run_alone(spec, run_url("run"))
    assert committed_in(run_url("run")) == []


def test_a_failed_stage_does_not_change_the_next_one(alone, stage_spec, run_url):
    run_alone(stage_spec(), run_url("before"))
    diverging = stage_spec(
        name="diverging",
        optimizer=OptimizerConfig(learning_rate=1e30, warmup=0.0),
        engine={"zero_stage": 3},
    )
    with pytest.raises(NonFiniteLossError):
        run_alone(diverging, run_url("after"))
    run_alone(stage_spec(), run_url("after"))
    assert model_in(run_url("after"), stage_spec()) == model_in(run_url("before"), stage_spec())


def test_an_indivisible_batch_is_rejected(alone, stage_spec, run_url):
    with pytest.raises(ConfigError, match="use a batch of 8 or 12"):
        run_alone(stage_spec(batch_size=10), run_url("run"))


# Teachers and generators.


def test_a_teacher_is_unchanged_and_not_in_the_optimizer(alone, stage_spec, run_url, monkeypatch):
    url = run_url("run")
    run_alone(stage_spec(name="teacher", steps=2), url)
    seen = {}

    def recorded_engine(module, *arguments, **fields):
        seen["engine"] = engine = ENGINE(module, *arguments, **fields)
        return engine

    def recorded_teacher(*arguments, **fields):
        seen["teacher"] = load_classifier(*arguments, **fields)
        return seen["teacher"]

    ENGINE = stage_module.Engine
    monkeypatch.setattr(stage_module, "Engine", recorded_engine)
    monkeypatch.setattr(stage_module, "load_classifier", recorded_teacher)
    teacher = layout.stage_model_prefix("teacher")
    objective = DistillationSpec(distillation=DistillationConfig(), teacher=teacher)
    spec = stage_spec(name="student", objective=objective)
    stored = model_in(url, spec.model_copy(update={"name": "teacher"}))
    run_alone(spec, url)

    assert model_files(seen["teacher"]) == stored
    assert model_in(url, spec.model_copy(update={"name": "teacher"})) == stored
    student = dict(seen["engine"].module.named_parameters())
    assert {fragment.name for fragment in seen["engine"].fragments} == set(student)
    held = sum(fragment.master.numel() for fragment in seen["engine"].fragments)
    assert held == sum(parameter.numel() for parameter in student.values())
    run_alone(stage_spec(name="alone"), run_url("other"))
    assert model_in(url, spec) != model_in(run_url("other"), stage_spec(name="alone"))


class Mean(nn.Module):
    """Stands in for a generator; learns the mean image of every class."""

    def __init__(self, **_):
        super().__init__()
        self.images = nn.Embedding(3, 64)
        nn.init.zeros_(self.images.weight)

    def forward(self, images, labels, *, rng):
        noise = 0.1 * torch.randn(images.shape, generator=rng)
        return (self.images(labels).view_as(images) - images - noise).square().mean()

    def to_files(self):
        return dict.fromkeys(FILES, self.images.weight.detach().numpy().tobytes())


def run_mean(rank, world_size, spec, url):
    stage_module.build_model, original = (lambda *_, **fields: Mean()), stage_module.build_model
    try:
        return run_on(rank, world_size, spec, url)
    finally:
        stage_module.build_model = original


def test_a_generator_trains_the_same_on_one_and_two_ranks(alone, two_ranks, stage_spec, run_url):
    spec = stage_spec(
        objective=DiffusionSpec(),
        evaluate=None,
        ema_decay=0.5,
        steps=20,
        optimizer=OptimizerConfig(learning_rate=0.1),
        engine={"zero_stage": 3},
    )
    result = run_mean(0, 1, spec, run_url("one"))
    assert result.final_loss < 0.7 * losses_in(run_url("one"), spec)[0]
    two_ranks(run_mean, spec, run_url("two"))
    assert losses_in(run_url("two"), spec) == pytest.approx(
        losses_in(run_url("one"), spec), rel=1e-4
    )


# Superseded attempts.


def test_a_superseded_attempt_commits_nothing(alone, stage_spec, run_url):
    spec, store = stage_spec(), ObjectStore(run_url("run"))
    attempt = begin_attempt(store)
    later = []

    def supersede(step, loss, shard):
        if step == 3 and not later:
            later.append(begin_attempt(store))

    with pytest.raises(SupersededError, match="attempt 2"):
        run_stage(
            spec,
            store,
            rank=0,
            world_size=1,
            on_progress=supersede,
            log_every=1,
            attempt=attempt,
        )
    commits = [key for key in store.list() if key.endswith("COMMIT")]
    assert commits == [layout.commit_key(spec.name, 2)]
    assert read_result(store, spec) is None
    run_stage(spec, store, rank=0, world_size=1, attempt=later[0])
    run_alone(spec, run_url("never superseded"))
    assert model_in(run_url("run"), spec) == model_in(run_url("never superseded"), spec)

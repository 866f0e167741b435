"""A stage from its specification to its result: complete, resumable, blind to the test rows."""

import time
from dataclasses import replace

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
    """The machine went away."""


def run_on(rank, world_size, spec, url, killed_after=None):
    """Run a stage; `killed_after`: the step after which the machine goes away, once."""

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
    """The bytes of the stored model, by file name."""
    store = ObjectStore(url)
    return {name: store.read(f"{layout.stage_model_prefix(spec.name)}/{name}") for name in FILES}


def curve_in(url, spec):
    """Step and figures of every metric row, without the times."""
    rows = read_rows(ObjectStore(url).read(layout.metrics_key(spec.name)))
    timed = {"time", "elapsed_s", "starved_s"}
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def losses_in(url, spec):
    return [row["loss"] for row in curve_in(url, spec)]


@pytest.fixture
def place(tmp_path):
    """Places of runs that know nothing of each other, by name."""
    return lambda name: str(tmp_path / name)


# What a stage leaves.


class WritingStore(ObjectStore):
    """Remembers in which order keys were written."""

    def __init__(self, url):
        super().__init__(url)
        self.written = []

    def write(self, key, data, *, create_only=False):
        self.written.append(key)
        return super().write(key, data, create_only=create_only)


def test_a_stage_leaves_its_model_its_metrics_and_last_its_result(alone, stage_spec, place):
    store, spec = WritingStore(place("run")), stage_spec()
    result = run_stage(spec, store, rank=0, world_size=1)
    prefix = layout.stage_prefix(spec.name)
    assert store.written.index(f"{prefix}/result.json") == len(store.written) - 1
    assert store.list() == [
        f"{prefix}/metrics.jsonl",
        f"{prefix}/model/config.json",
        f"{prefix}/model/model.safetensors",
        f"{prefix}/result.json",
    ]
    assert read_result(store, spec) == result
    assert (result.steps, result.samples, result.world_size) == (6, 48, 1)
    assert [row["step"] for row in curve_in(store.url, spec)] == list(range(1, 7))
    assert result.final_loss == losses_in(store.url, spec)[-1]
    assert result.started <= result.first_step_at <= result.ended


def test_what_is_reported_is_what_the_stored_model_says(ranks, stage_spec, part_of_digits, place):
    """Also where every rank's batch norm has seen its own share of the batches."""
    spec = stage_spec(steps=25, every_steps=0)
    results = ranks(run_on, spec, place("run"))
    test = load_rows(part_of_digits("test"))
    network = load_network(model_in(place("run"), spec)).eval()
    with torch.no_grad():
        predictions = network(test.tensor()).argmax(dim=1).numpy()
    for result in results:
        assert result.predictions == tuple(predictions.tolist())
        assert result.correct == tuple((predictions == test.labels).tolist())
        assert result.accuracy == pytest.approx((predictions == test.labels).mean())
        assert result.last_step_correct == ()
        assert len(set(result.predictions)) == 3


def test_a_network_learns_digits(alone, stage_spec, place):
    result = run_alone(stage_spec(steps=40, every_steps=0), place("run"))
    assert result.accuracy > 0.8


def test_nothing_is_predicted_where_nothing_is_to_be_evaluated(alone, stage_spec, place):
    result = run_alone(stage_spec(evaluate=None, steps=1), place("run"))
    assert result.predictions == result.correct == ()
    assert result.accuracy == 0.0


def test_the_average_is_stored_and_both_models_are_judged(alone, stage_spec, place):
    spec = stage_spec(ema_decay=0.999, steps=12)
    result = run_alone(spec, place("average"))
    run_alone(stage_spec(steps=12), place("last"))
    average, last = (load_network(model_in(place(name), spec)) for name in ("average", "last"))
    assert not torch.equal(average.head.weight, last.head.weight)
    assert torch.equal(average.trunk.norm.running_mean, last.trunk.norm.running_mean)
    assert len(result.last_step_correct) == len(result.correct) > 0
    last_result = read_result(ObjectStore(place("last")), stage_spec(steps=12))
    assert result.last_step_correct == last_result.correct


def test_a_done_stage_returns_at_once(alone, stage_spec, place, monkeypatch):
    result = run_alone(stage_spec(), place("run"))
    monkeypatch.setattr(stage_module, "Engine", lambda *_, **__: pytest.fail("trained again"))
    assert run_alone(stage_spec(), place("run")) == result


def test_the_result_of_another_specification_is_refused(alone, stage_spec, place):
    run_alone(stage_spec(steps=1), place("run"))
    with pytest.raises(CheckpointMismatchError, match="scratch-seed0 was done by another job"):
        run_alone(stage_spec(steps=2), place("run"))


def test_how_often_a_stage_saves_does_not_change_what_it_is(stage_spec):
    spec = stage_spec()
    assert stage_spec(every_steps=1).fingerprint == spec.fingerprint
    for change in ({"seed": 12}, {"steps": 7}, {"lanes": 2}, {"engine": {"precision": "bf16"}}):
        assert stage_spec(**change).fingerprint != spec.fingerprint


# Stopping and going on.


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_killed_stage_goes_on_to_the_very_same_end(ranks, stage_spec, place, zero_stage):
    """Killed before its first checkpoint, between two, and in its last steps."""
    spec = stage_spec(ema_decay=0.9, engine={"zero_stage": zero_stage})
    [whole, *_] = ranks(run_on, spec, place("whole"))
    for step in (1, 3, 5):
        assert set(ranks(run_on, spec, place("killed"), step)) == {None}
    [resumed, *_] = ranks(run_on, spec, place("killed"))
    assert model_in(place("killed"), spec) == model_in(place("whole"), spec)
    assert curve_in(place("killed"), spec) == curve_in(place("whole"), spec)
    for field in ("predictions", "last_step_correct", "final_loss", "samples", "fingerprint"):
        assert getattr(resumed, field) == getattr(whole, field)


def test_seconds_are_those_of_all_attempts_without_the_time_between(alone, stage_spec, place):
    began = time.time()
    run_alone(stage_spec(), place("run"), killed_after=5)
    worked = time.time() - began
    kept = read_rows(ObjectStore(place("run")).read(layout.metrics_key("scratch-seed0")))
    time.sleep(0.4)
    result = run_alone(stage_spec(), place("run"))
    last_attempt = result.ended - result.started
    [before] = [row["elapsed_s"] for row in kept if row["step"] == 4]
    assert result.seconds == pytest.approx(last_attempt + before)
    assert 0 < before <= worked


def with_dropout(*arguments, **fields):
    network = build_model(*arguments, **fields)
    network.trunk = nn.Sequential(network.trunk, nn.Dropout(0.5))
    return network


def test_dropout_follows_from_the_seed_and_not_from_the_past(alone, stage_spec, place, monkeypatch):
    monkeypatch.setattr(stage_module, "build_model", with_dropout)
    models = {}
    for name, past, seed in (("one", 1, 11), ("again", 2, 11), ("other", 1, 12)):
        torch.manual_seed(past)
        before = torch.get_rng_state()
        run_alone(stage_spec(seed=seed), place(name))
        assert torch.equal(torch.get_rng_state(), before)
        models[name] = model_in(place(name), stage_spec())
    assert models["one"] == models["again"] != models["other"]
    monkeypatch.undo()
    run_alone(stage_spec(), place("none"))
    assert model_in(place("none"), stage_spec()) != models["one"]


def test_a_killed_stage_with_dropout_goes_on_to_the_very_same_end(
    alone, stage_spec, place, monkeypatch
):
    monkeypatch.setattr(stage_module, "build_model", with_dropout)
    run_alone(stage_spec(), place("whole"))
    run_alone(stage_spec(), place("killed"), killed_after=5)
    run_alone(stage_spec(), place("killed"))
    assert curve_in(place("killed"), stage_spec()) == curve_in(place("whole"), stage_spec())


# What must not matter.


def test_the_zero_stage_does_not_change_a_bit_of_the_model(two_ranks, stage_spec, place):
    models = []
    for zero_stage in (0, 1, 2, 3):
        spec = stage_spec(engine={"zero_stage": zero_stage, "clip_norm": 0.0}, steps=3)
        two_ranks(run_on, spec, place(f"zero{zero_stage}"))
        models.append(model_in(place(f"zero{zero_stage}"), spec))
    assert models.count(models[0]) == 4


def test_one_worker_and_two_see_the_same_at_every_step(alone, two_ranks, stage_spec, place):
    """With group norm, whose result does not depend on what else is in a rank's batch."""
    spec = stage_spec(norm="group")
    run_alone(spec, place("one"))
    two_ranks(run_on, spec, place("two"))
    assert losses_in(place("two"), spec) == pytest.approx(losses_in(place("one"), spec), rel=1e-4)
    other = stage_spec(norm="group", seed=12)
    run_alone(other, place("other"))
    assert losses_in(place("other"), other) != pytest.approx(
        losses_in(place("one"), spec), rel=1e-2
    )


def test_accumulated_micro_batches_train_like_whole_batches(alone, stage_spec, place):
    whole = stage_spec(norm="group")
    parts = stage_spec(norm="group", engine={"accumulation": 4})
    run_alone(whole, place("whole"))
    run_alone(parts, place("parts"))
    assert losses_in(place("parts"), parts) == pytest.approx(
        losses_in(place("whole"), whole), rel=1e-4
    )


@pytest.mark.parametrize("engine", [{}, {"zero_stage": 3, "precision": "bf16"}])
def test_p_ssl_without_weight_is_supervised_training_bit_for_bit(
    alone, stage_spec, part_of_digits, place, engine
):
    """Weights and batch-norm statistics: both are in the model's file."""
    objective = PSSLSpec(p_ssl=PSSLConfig(weight=0.0))
    unlabelled = {"unlabelled": part_of_digits("pool"), "unlabelled_batch_size": 8}
    p_ssl = stage_spec(objective=objective, engine=engine, **unlabelled)
    supervised = stage_spec(engine=engine)
    run_alone(p_ssl, place("p_ssl"))
    run_alone(supervised, place("supervised"))
    assert model_in(place("p_ssl"), p_ssl) == model_in(place("supervised"), supervised)
    weighty = stage_spec(objective=PSSLSpec(p_ssl=PSSLConfig(weight=1.0)), **unlabelled)
    result = run_alone(weighty, place("weighty"))
    assert model_in(place("weighty"), weighty) != model_in(place("supervised"), supervised)
    assert result.samples == 96


def inverted(data, rows):
    return replace(data, images=np.where(rows[:, None, None, None], 255 - data.images, data.images))


def mislabelled(data, rows):
    return replace(data, labels=np.where(rows, (data.labels + 1) % 3, data.labels))


@pytest.mark.parametrize("part", ["test", "train"])
def test_only_rows_of_the_train_part_can_change_the_model(
    alone, stage_spec, part_of_digits, place, monkeypatch, part
):
    """With pixels and labels of the test part wrong, only the reported figures notice."""
    spec = stage_spec(steps=25, every_steps=0)
    clean = run_alone(spec, place("clean"))
    load, subset = rows_module._load, LabelledImages.subset
    chosen = {image.tobytes() for image in load_rows(part_of_digits(part)).images}
    wrong = {(255 - np.frombuffer(image, np.uint8)).tobytes() for image in chosen}

    def is_in(data, images):
        return np.array([image.tobytes() in images for image in data.images])

    def load_inverted(config):
        data = load(config)
        return inverted(data, is_in(data, chosen))

    def subset_mislabelled(data, indices):
        # After the split, which must deal labels out evenly and so may look at all of them.
        return subset(mislabelled(data, is_in(data, wrong)), indices)

    monkeypatch.setattr(rows_module, "_load", load_inverted)
    monkeypatch.setattr(LabelledImages, "subset", subset_mislabelled)
    dirty = run_alone(spec, place("dirty"))
    blind = part == "test"
    assert (model_in(place("dirty"), spec) == model_in(place("clean"), spec)) is blind
    assert (curve_in(place("dirty"), spec) == curve_in(place("clean"), spec)) is blind
    assert dirty.predictions != clean.predictions
    assert dirty.accuracy < clean.accuracy - 0.3


# What ends a stage.


def committed_in(url):
    return [key for key in ObjectStore(url).list() if key.endswith(("COMMIT", "result.json"))]


def test_a_loss_that_explodes_is_named_and_nothing_is_committed_after_it(alone, stage_spec, place):
    spec = stage_spec(optimizer=OptimizerConfig(learning_rate=1e30, warmup=0.0), every_steps=1)
    with pytest.raises(NonFiniteLossError, match=r"stage scratch-seed0: the loss is nan at step 2"):
        run_alone(spec, place("run"))
    assert committed_in(place("run")) == [layout.commit_key(spec.name, 1)]
    assert [row["step"] for row in curve_in(place("run"), spec)] == [1]


@pytest.mark.parametrize("steps", [1, 6])
def test_weights_that_explode_are_named_and_never_committed(alone, stage_spec, place, steps):
    """The loss is that of the weights before the step, and finite."""
    optimizer = OptimizerConfig(learning_rate=3e38, weight_decay=1.0, beta1=0.0, warmup=0.0)
    spec = stage_spec(optimizer=optimizer, every_steps=1, steps=steps)
    with pytest.raises(NumericsError, match="stage scratch-seed0: step 1 left weights that are"):
        run_alone(spec, place("run"))
    assert committed_in(place("run")) == []


def test_after_a_failure_the_next_stage_trains_as_if_nothing_had_been(alone, stage_spec, place):
    run_alone(stage_spec(), place("before"))
    exploding = stage_spec(
        name="exploding",
        optimizer=OptimizerConfig(learning_rate=1e30, warmup=0.0),
        engine={"zero_stage": 3},
    )
    with pytest.raises(NonFiniteLossError):
        run_alone(exploding, place("after"))
    run_alone(stage_spec(), place("after"))
    assert model_in(place("after"), stage_spec()) == model_in(place("before"), stage_spec())


def test_a_batch_that_the_lanes_cannot_share_is_refused(alone, stage_spec, place):
    with pytest.raises(ConfigError, match="use a batch of 8 or 12"):
        run_alone(stage_spec(batch_size=10), place("run"))


# Teachers and generators.


def test_a_teacher_is_not_touched_and_no_optimizer_knows_it(alone, stage_spec, place, monkeypatch):
    url = place("run")
    run_alone(stage_spec(name="teacher", steps=2), url)
    seen = {}

    def remembered_engine(module, *arguments, **fields):
        seen["engine"] = engine = ENGINE(module, *arguments, **fields)
        return engine

    def remembered_teacher(*arguments, **fields):
        seen["teacher"] = load_classifier(*arguments, **fields)
        return seen["teacher"]

    ENGINE = stage_module.Engine
    monkeypatch.setattr(stage_module, "Engine", remembered_engine)
    monkeypatch.setattr(stage_module, "load_classifier", remembered_teacher)
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
    run_alone(stage_spec(name="alone"), place("other"))
    assert model_in(url, spec) != model_in(place("other"), stage_spec(name="alone"))


class Mean(nn.Module):
    """Stands in for a generator: it learns the mean image of every class."""

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


def test_a_generator_is_trained_like_a_network_and_ranks_do_not_matter(
    alone, two_ranks, stage_spec, place
):
    spec = stage_spec(
        objective=DiffusionSpec(),
        evaluate=None,
        ema_decay=0.5,
        steps=20,
        optimizer=OptimizerConfig(learning_rate=0.1),
        engine={"zero_stage": 3},
    )
    result = run_mean(0, 1, spec, place("one"))
    assert result.final_loss < 0.7 * losses_in(place("one"), spec)[0]
    two_ranks(run_mean, spec, place("two"))
    assert losses_in(place("two"), spec) == pytest.approx(losses_in(place("one"), spec), rel=1e-4)


# A later start of the run.


def test_nothing_is_committed_once_a_later_start_has_the_run(alone, stage_spec, place):
    spec, store = stage_spec(), ObjectStore(place("run"))
    attempt = begin_attempt(store)
    taken = []

    def take_over(step, loss, shard):
        if step == 3 and not taken:
            taken.append(begin_attempt(store))

    with pytest.raises(SupersededError, match="attempt 2"):
        run_stage(
            spec,
            store,
            rank=0,
            world_size=1,
            on_progress=take_over,
            log_every=1,
            attempt=attempt,
        )
    commits = [key for key in store.list() if key.endswith("COMMIT")]
    assert commits == [layout.commit_key(spec.name, 2)]
    assert read_result(store, spec) is None
    run_stage(spec, store, rank=0, world_size=1, attempt=taken[0])
    run_alone(spec, place("never taken over"))
    assert model_in(place("run"), spec) == model_in(place("never taken over"), spec)

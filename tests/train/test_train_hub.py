"""Training of a hub: independent of ranks and interruptions; frozen statistics stay frozen."""

from unittest import mock

import pytest
import torch
from small_hubs import (
    CLASSES,
    EXPERTS,
    assert_equal_states,
    build,
    new_hub,
    perturbed,
    pretrained,
    put,
    source,
    state_of,
    warm_start_files,
)
from test_train_stage import losses_in, run_on

from dist_tl.errors import CheckpointMismatchError
from dist_tl.methods.hub.losses import HubLossConfig
from dist_tl.models.files import load_network
from dist_tl.storage import layout
from dist_tl.storage.model_files import read_model_files
from dist_tl.storage.objects import ObjectStore
from dist_tl.train import objectives
from dist_tl.train.hub_model import NewExpert, load_expert, load_hub
from dist_tl.train.objectives import HubSpec, SupervisedSpec
from dist_tl.train.rows import load_rows


@pytest.fixture
def hub_stage(stage_spec):
    """Builds the specification of a stage that trains a hub with the task loss only."""

    def make(model, **fields):
        loss = HubLossConfig(explore=0.0, exploit=0.0)
        fields = {"name": "hub-seed0", "objective": HubSpec(loss=loss), **fields}
        return stage_spec(model=model, **fields)

    return make


def hub_in(url, spec):
    """Returns the stored files by name."""
    store, prefix = ObjectStore(url), layout.stage_model_prefix(spec.name)
    return {key.removeprefix(f"{prefix}/"): store.read(key) for key in store.list(prefix)}


# Ranks.


def routes_on(rank, world_size, spec, url):
    """Runs a stage; returns the set of experts that this rank's samples chose, by step."""
    chosen, hub_loss = [], objectives.hub_loss

    def recorded(logits, expert_logits, active_BM, *rest):
        chosen.append(set(active_BM.any(dim=0).nonzero().flatten().tolist()))
        return hub_loss(logits, expert_logits, active_BM, *rest)

    with mock.patch.object(objectives, "hub_loss", recorded):
        run_on(rank, world_size, spec, url)
    return chosen


@pytest.mark.parametrize("by", ["input", "static", "random"])
def test_ranks_that_use_different_experts_train_the_same_at_every_zero_stage(
    alone, two_ranks, hub_stage, run_url, by
):
    """Noise is drawn per lane, so the same samples choose the same experts on any rank."""
    model = new_hub(k=1, by=by)
    one = hub_stage(model, batch_size=4)
    one_rank = routes_on(0, 1, one, run_url("one"))
    expected = state_of(load_hub(ObjectStore(run_url("one")), "stages/hub-seed0/model"))
    states = []
    for zero_stage in range(4):
        spec = hub_stage(model, batch_size=4, engine={"zero_stage": zero_stage})
        url = run_url(f"zero{zero_stage}")
        left, right = two_ranks(routes_on, spec, url)
        assert [a | b for a, b in zip(left, right, strict=True)] == one_rank
        assert any(a != b for a, b in zip(left, right, strict=True))
        assert losses_in(url, spec) == pytest.approx(losses_in(run_url("one"), one), rel=1e-4)
        weights = state_of(load_hub(ObjectStore(url), "stages/hub-seed0/model"))
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], atol=2e-3, rtol=0, msg=name)
            torch.testing.assert_close(value, (states or [weights])[0][name], msg=name)
        states.append(weights)


def test_routes_without_noise_are_the_same_on_one_and_two_ranks(
    alone, two_ranks, hub_stage, run_url
):
    model = new_hub(k=2, noise=False, warm="warm")
    urls = [run_url("one"), run_url("two")]
    warm = build(new_hub(k=2, noise=False), urls[0])
    perturbed(warm)
    for url in urls:
        put(ObjectStore(url), "warm", warm_start_files(warm))
    spec = hub_stage(model)
    one_rank = routes_on(0, 1, spec, urls[0])
    left, right = two_ranks(routes_on, spec, urls[1])
    assert [a | b for a, b in zip(left, right, strict=True)] == one_rank
    assert any(a != b for a, b in zip(left, right, strict=True))
    assert losses_in(urls[1], spec) == pytest.approx(losses_in(urls[0], spec), rel=1e-4)


# Resuming.


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_killed_hub_stage_resumes_to_identical_files(ranks, hub_stage, run_url, zero_stage):
    loss = HubSpec(loss=HubLossConfig())
    spec = hub_stage(new_hub(k=2), objective=loss, engine={"zero_stage": zero_stage})
    [uninterrupted, *_] = ranks(run_on, spec, run_url("uninterrupted"))
    assert set(ranks(run_on, spec, run_url("killed"), 3)) == {None}
    [resumed, *_] = ranks(run_on, spec, run_url("killed"))
    assert hub_in(run_url("killed"), spec) == hub_in(run_url("uninterrupted"), spec)
    assert resumed.predictions == uninterrupted.predictions
    assert resumed.final_loss == uninterrupted.final_loss


@pytest.mark.parametrize(
    "experts", [("wide", "plain", "deep"), ("plain", "wide"), ("plain", "wide", "wide2")]
)
def test_another_order_or_set_of_experts_cannot_resume(alone, hub_stage, run_url, experts):
    url = run_url("run")
    run_on(0, 1, hub_stage(new_hub(k=2)), url, 3)
    sources = tuple(source(n, model=f"experts/{n.removesuffix('2')}") for n in experts)
    with pytest.raises(CheckpointMismatchError, match="another job"):
        run_on(0, 1, hub_stage(new_hub(k=2, sources=sources)), url)


def test_the_result_equals_the_predictions_of_the_stored_hub(
    ranks, hub_stage, part_of_digits, run_url
):
    spec, url = hub_stage(new_hub(k=2)), run_url("run")
    [result, *_] = ranks(run_on, spec, url)
    hub = load_hub(ObjectStore(url), layout.stage_model_prefix(spec.name))
    with torch.no_grad():
        predictions = hub(load_rows(part_of_digits("test")).tensor()).argmax(dim=1)
    assert result.predictions == tuple(predictions.tolist())


# Running statistics.


def statistics(store, location):
    network = load_network(read_model_files(store, location))
    return {name: b for name, b in network.named_buffers() if "running" in name}


@pytest.mark.parametrize("engine", [{}, {"zero_stage": 3, "precision": "bf16"}])
def test_frozen_statistics_equal_those_of_the_expert_files_bit_for_bit(
    ranks, hub_stage, run_url, engine
):
    url = run_url("run", norm="batch")
    spec = hub_stage(new_hub(k=1), engine=engine, ema_decay=0.5)
    ranks(run_on, spec, url)
    store, model = ObjectStore(url), layout.stage_model_prefix(spec.name)
    for name in EXPERTS:
        before = statistics(store, f"experts/{name}")
        assert before
        assert_equal_states(statistics(store, f"{model}/experts/{name}"), before)
        trained, old = load_expert(store, model, name), pretrained(name, norm="batch")
        assert not torch.equal(trained.trunk.norm.weight, old.trunk.norm.weight)


def test_trained_statistics_change(alone, hub_stage, run_url):
    url = run_url("run", norm="batch")
    spec = hub_stage(new_hub(k=3, batchnorm="train"))
    run_on(0, 1, spec, url)
    store = ObjectStore(url)
    before = statistics(store, "experts/plain")
    after = statistics(store, f"{layout.stage_model_prefix(spec.name)}/experts/plain")
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("by", ["input", "static", "random"])
def test_a_hub_learns_in_bfloat16_with_accumulated_micro_batches(ranks, hub_stage, run_url, by):
    engine = {"precision": "bf16", "zero_stage": 3, "accumulation": 2}
    fields = {"batch_size": 16, "steps": 30, "every_steps": 0, "engine": engine}
    spec = hub_stage(new_hub(k=2, by=by), objective=HubSpec(loss=HubLossConfig()), **fields)
    url = run_url("run")
    ranks(run_on, spec, url)
    losses = losses_in(url, spec)
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_the_hub_objective_and_the_hub_model_require_each_other(hub_stage):
    with pytest.raises(ValueError, match="objective hub requires a model of kind hub"):
        hub_stage(new_hub(k=1), objective=SupervisedSpec())
    with pytest.raises(ValueError, match="objective hub requires a model of kind hub"):
        hub_stage(NewExpert(expert=source("plain"), num_classes=CLASSES))

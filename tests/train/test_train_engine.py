"""The engine trains the same, bit for bit, at every ZeRO stage and after a restore."""

import hashlib
import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from dist_tl.errors import CheckpointMismatchError, ConfigError
from dist_tl.storage.objects import ObjectStore
from dist_tl.train import engine as engine_module
from dist_tl.train.checkpoints import CheckpointConfig, Checkpoints, TrainState
from dist_tl.train.engine import (
    Engine,
    EngineConfig,
    OptimizerConfig,
    join_group,
    learning_rate,
)

STEPS, SAVED = 5, 3
OPTIMIZER = OptimizerConfig(learning_rate=3e-2, weight_decay=0.1, warmup=0.4)
STAGES = [0, 1, 2, 3]


def network(seed=0, *, plain=False):
    """Odd sizes, not divisible by the world size; batch norm and dropout unless `plain`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle = [] if plain else [nn.BatchNorm2d(7), nn.Dropout(0.2)]
        return nn.Sequential(nn.Conv2d(1, 7, 3), *middle, nn.ReLU(), nn.Flatten(), nn.Linear(28, 5))


def batch(step, rank, size=6):
    rng = torch.Generator().manual_seed(100 * step + rank)
    labels = torch.randint(0, 5, (size,), generator=rng)
    return torch.randn(size, 1, 4, 4, generator=rng) + labels[:, None, None, None], labels


def engine_of(module, *, ema_decay=None, batch_per_rank=6, **config):
    return Engine(
        module,
        EngineConfig(**config),
        OPTIMIZER,
        batch_per_rank=batch_per_rank,
        num_steps=STEPS,
        ema_decay=ema_decay,
    )


def train(engine, first, last, rank):
    losses = []
    for step in range(first, last):
        images, labels = batch(step, rank)
        with engine.autocast():
            loss = functional.cross_entropy(engine.module(images).float(), labels)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def digests(tensors):
    return {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in tensors.items()}


def checkpoints_in(url, rank, world_size):
    config = CheckpointConfig(every_steps=SAVED)
    return Checkpoints(
        ObjectStore(url), "s", config, fingerprint="f", rank=rank, world_size=world_size
    )


# Resuming.


def continue_and_resume(rank, world_size, url, zero_stage, precision, offload):
    """Returns losses and state of the last steps, uninterrupted and after a restore."""
    config = {"zero_stage": zero_stage, "precision": precision, "offload": offload}
    checkpoints = checkpoints_in(url, rank, world_size)
    torch.manual_seed(rank)
    engine = engine_of(network(), ema_decay=0.9, **config)
    train(engine, 0, SAVED, rank)
    checkpoints.save(engine, TrainState(SAVED, SAVED))
    continued = train(engine, SAVED, STEPS, rank), digests(engine.local_state())
    engine.close()

    torch.manual_seed(99)
    engine = engine_of(network(seed=1), ema_decay=0.9, **config)
    state = checkpoints.restore(engine)
    resumed = train(engine, state.cursor, STEPS, rank), digests(engine.local_state())
    engine.close()
    return continued, resumed, (state.step, state.cursor)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", STAGES)
def test_a_restored_run_equals_an_uninterrupted_one(ranks, tmp_path, zero_stage, precision):
    """Weights, moments, average, buffers, dropout and later losses are equal bit for bit."""
    for continued, resumed, state in ranks(
        continue_and_resume, str(tmp_path), zero_stage, precision, "none"
    ):
        assert state == (SAVED, SAVED)
        assert resumed == continued


def test_a_restored_run_with_offloaded_moments_equals_an_uninterrupted_one(ranks, tmp_path):
    for zero_stage in (1, 2, 3):
        url = f"{tmp_path}/{zero_stage}"
        for continued, resumed, _ in ranks(continue_and_resume, url, zero_stage, "fp32", "cpu"):
            assert resumed == continued


def names_in_state(rank, world_size, zero_stage):
    engine = engine_of(network(), ema_decay=0.9, zero_stage=zero_stage)
    train(engine, 0, 1, rank)
    names = sorted(engine.local_state())
    engine.close()
    return names


def test_the_state_holds_weights_moments_average_buffers_and_generator(alone):
    parameters = [name for name, _ in network().named_parameters()]
    buffers = [name for name, _ in network().named_buffers()]
    kinds = ("ema", "exp_avg", "exp_avg_sq", "master")
    expected = [f"{kind}/{name}" for kind in kinds for name in parameters]
    expected += [f"buffer/{name}" for name in buffers] + ["rng/cpu"]
    assert names_in_state(0, 1, 1) == sorted(expected)


class PartlyIdle(nn.Module):
    """A frozen layer, an unused layer, and a non-persistent buffer."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.frozen = nn.Linear(16, 9).requires_grad_(False)
            self.head = nn.Linear(9, 5)
            self.idle = nn.Linear(3, 3)
            self.register_buffer("passing", torch.full((2,), 0.1), persistent=False)

    def forward(self, images):
        return self.head(functional.relu(self.frozen(images.flatten(1))))


def train_partly_idle(rank, world_size, zero_stage):
    engine = engine_of(PartlyIdle(), zero_stage=zero_stage)
    assert torch.equal(engine.full_weights()["frozen.weight"], PartlyIdle().frozen.weight)
    train(engine, 0, 2, rank)
    state, weights = engine.local_state(), engine.full_weights()
    continued = train(engine, 2, 4, rank)
    engine.close()
    engine = engine_of(PartlyIdle(), zero_stage=zero_stage)
    engine.load_local_state(state, num_updates=2)
    resumed = train(engine, 2, 4, rank)
    engine.close()
    return {name: values.flatten().tolist() for name, values in weights.items()}, continued, resumed


@pytest.mark.parametrize("zero_stage", STAGES)
def test_frozen_and_unused_parameters_are_kept_and_restored(ranks, zero_stage):
    before = PartlyIdle()
    for weights, continued, resumed in ranks(train_partly_idle, zero_stage):
        assert weights["frozen.weight"] == before.frozen.weight.flatten().tolist()
        assert weights["frozen.bias"] == before.frozen.bias.tolist()
        assert weights["passing"] == before.passing.tolist()
        assert weights["head.bias"] != before.head.bias.tolist()
        assert weights["idle.bias"] == before.idle.bias.tolist()
        assert resumed == continued


def test_a_state_of_another_network_is_rejected(alone):
    engine = engine_of(network())
    train(engine, 0, 1, 0)
    state = engine.local_state()
    with pytest.raises(CheckpointMismatchError, match=r"63 numbers for master/0\.weight.*4 numb"):
        engine.load_local_state({**state, "master/0.weight": torch.zeros(4)}, num_updates=1)
    engine.close()
    averaging = engine_of(network(), ema_decay=0.9)
    with pytest.raises(CheckpointMismatchError, match=r"ema/0\.weight, the checkpoint holds noth"):
        averaging.load_local_state(state, num_updates=1)
    averaging.close()


# Comparison with a plain torch loop.


def compare_with_plain_torch(rank, world_size, zero_stage, precision, clip_norm):
    """Returns losses and weight difference of the engine and a plain torch loop."""
    torch.manual_seed(rank)
    config = {"zero_stage": zero_stage, "precision": precision, "clip_norm": clip_norm}
    engine = engine_of(network(), **config)
    losses = train(engine, 0, STEPS, rank)
    weights = [engine.full_weights()[name] for name, _ in network().named_parameters()]
    engine.close()

    torch.manual_seed(rank)
    module = network()
    spread = DistributedDataParallel(module) if world_size > 1 else module
    decayed = [p for p in module.parameters() if p.ndim > 1]
    spared = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    plain = []
    for step in range(STEPS):
        images, labels = batch(step, rank)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = functional.cross_entropy(spread(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        if clip_norm:
            nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIMIZER, step, STEPS)
        optimizer.step()
        plain.append(loss.item())
    difference = max(
        (weight - parameter.detach()).abs().max().item()
        for weight, parameter in zip(weights, module.parameters(), strict=True)
    )
    return losses, plain, difference


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", STAGES)
def test_training_equals_a_plain_torch_loop_bit_for_bit(ranks, zero_stage, precision):
    for losses, plain, difference in ranks(compare_with_plain_torch, zero_stage, precision, 0.0):
        assert losses == plain
        assert difference == 0.0


@pytest.mark.parametrize("zero_stage", STAGES)
def test_clipping_equals_plain_torch_up_to_rounding(two_ranks, zero_stage):
    for losses, plain, _ in two_ranks(compare_with_plain_torch, zero_stage, "fp32", 0.05):
        assert losses == pytest.approx(plain, rel=1e-5)


def with_small_buckets(config, batch_per_rank):
    """Small buckets: gradients are reduced during the backward pass, as in a large model."""
    settings = deepspeed_config(config, batch_per_rank)
    settings["zero_optimization"]["reduce_bucket_size"] = 8
    return settings


deepspeed_config = engine_module._deepspeed_config


def losses_of_micro_batches(rank, world_size, zero_stage, offload, accumulation):
    config = {"zero_stage": zero_stage, "offload": offload, "accumulation": accumulation}
    with mock.patch.object(engine_module, "_deepspeed_config", with_small_buckets):
        engine = engine_of(network(plain=True), **config)
    losses = []
    for step in range(STEPS):
        parts = []
        for images, labels in zip(*(t.chunk(accumulation) for t in batch(step, rank)), strict=True):
            loss = functional.cross_entropy(engine.module(images), labels)
            engine.backward(loss)
            engine.step()
            parts.append(loss.item())
        losses.append(sum(parts) / len(parts))
    updates = engine.num_updates
    engine.close()
    return losses, updates


@pytest.mark.parametrize(
    ("zero_stage", "offload"),
    [*((stage, "none") for stage in STAGES), *((stage, "cpu") for stage in STAGES[1:])],
)
def test_two_accumulated_halves_equal_one_full_batch(two_ranks, zero_stage, offload):
    whole = two_ranks(losses_of_micro_batches, zero_stage, "none", 1)
    halves = two_ranks(losses_of_micro_batches, zero_stage, offload, 2)
    for (one, updates), (two, updates_of_two) in zip(whole, halves, strict=True):
        assert two == pytest.approx(one, rel=1e-4)
        assert updates == updates_of_two == STEPS
        assert one[-1] < 0.9 * one[0]


def test_bf16_changes_the_arithmetic_and_not_the_weights(alone):
    engine = engine_of(network(), precision="bf16")
    with engine.autocast():
        assert engine.module(batch(0, 0)[0]).dtype == torch.bfloat16
    assert {f.master.dtype for f in engine.fragments} == {torch.float32}
    assert {p.dtype for p in engine.module.parameters()} == {torch.float32}
    engine.close()


# Gathering the full model.


def gather(rank, world_size, zero_stage):
    """Returns the weights of `full_weights` and of the forward pass, and the buffers."""
    import deepspeed

    engine = engine_of(network(), zero_stage=zero_stage)
    train(engine, 0, 2, rank)
    weights = {name: t.flatten().tolist() for name, t in engine.full_weights().items()}
    used = {}
    for name, parameter in engine.module.named_parameters():
        sharded = [parameter] if zero_stage == 3 else []
        with deepspeed.zero.GatheredParameters(sharded):
            used[name] = parameter.detach().flatten().tolist()
    buffers = {name: t.flatten().tolist() for name, t in engine.module.named_buffers()}
    engine.close()
    return weights, used, buffers


@pytest.mark.parametrize("zero_stage", STAGES)
def test_full_weights_equal_the_forward_weights_and_buffers_are_means_over_ranks(ranks, zero_stage):
    """The model is the same on every rank, although each rank normalises its own share."""
    results = ranks(gather, zero_stage)
    seen = [torch.tensor(buffers["1.running_mean"]) for _, _, buffers in results]
    for weights, used, buffers in results:
        assert weights == results[0][0]
        assert {name: weights[name] for name in used} == used
        torch.testing.assert_close(
            torch.tensor(weights["1.running_mean"]), torch.stack(seen).mean(dim=0)
        )
        assert weights["1.num_batches_tracked"] == buffers["1.num_batches_tracked"] == [2]
    assert len({tuple(mean.tolist()) for mean in seen}) == len(results)


def average_on(rank, world_size, zero_stage, decay):
    engine = engine_of(network(), zero_stage=zero_stage, ema_decay=decay)
    names = [name for name, _ in engine.module.named_parameters()]
    weights = engine.full_weights()
    expected = {name: weights[name] for name in names}
    for step in range(STEPS):
        train(engine, step, step + 1, rank)
        share = min(decay, (1 + step + 1) / (10 + step + 1))
        last = engine.full_weights()
        expected = {n: share * expected[n] + (1 - share) * last[n] for n in names}
    averaged = engine.full_weights(averaged=True)
    engine.close()
    far = max((averaged[n] - last[n]).abs().max().item() for n in names)
    off = max((averaged[n] - expected[n]).abs().max().item() for n in names)
    return off, far


@pytest.mark.parametrize("zero_stage", STAGES)
def test_the_average_follows_its_recurrence(two_ranks, zero_stage):
    """e <- d e + (1 - d) w with d = min(decay, (1 + t) / (10 + t)) after step t."""
    for off, far in two_ranks(average_on, zero_stage, 0.28):  # the ramp exceeds it at step 3
        assert off < 1e-6
        assert far > 1e-3


def check_finite_on(rank, world_size, zero_stage):
    engine = engine_of(network(), zero_stage=zero_stage)
    before = engine.is_finite()
    if rank == world_size - 1:
        engine.fragments[-1].master[-1] = math.inf
    after = engine.is_finite()
    engine.close()
    return before, after


@pytest.mark.parametrize("zero_stage", STAGES)
def test_all_ranks_detect_a_non_finite_weight_on_one_rank(two_ranks, zero_stage):
    assert two_ranks(check_finite_on, zero_stage) == [(True, False), (True, False)]


# Learning rate, configuration, groups.


def test_the_learning_rate_rises_linearly_and_falls_by_a_half_cosine():
    config = OptimizerConfig(learning_rate=2.0, warmup=0.2)
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[6] == pytest.approx(1.0)
    assert rates[4] + rates[8] == pytest.approx(2.0)
    assert rates[9] == pytest.approx(1.0 + math.cos(math.pi * 7 / 8))
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_a_constant_schedule_is_constant_and_no_warmup_starts_at_the_peak():
    constant = OptimizerConfig(learning_rate=2.0, warmup=0.0, schedule="constant")
    assert {learning_rate(constant, step, 7) for step in range(7)} == {2.0}
    assert learning_rate(OptimizerConfig(learning_rate=2.0, warmup=0.0), 0, 7) == 2.0


@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_a_stage_of_one_step_uses_the_peak_learning_rate(warmup):
    assert learning_rate(OptimizerConfig(learning_rate=2.0, warmup=warmup), 0, 1) == 2.0


def test_offload_without_sharding_is_rejected():
    with pytest.raises(ValidationError, match="offload cpu needs zero_stage >= 1, got 0"):
        EngineConfig(zero_stage=0, offload="cpu")


def test_ranks_without_a_rendezvous_are_rejected(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match="2 ranks need a rendezvous"):
        join_group(0, 2)

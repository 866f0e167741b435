"""The hub as a module: sparse dispatch equals dense compute; idle experts do not change."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from dist_tl.methods.hub.dispatch import place, sub_batches
from dist_tl.methods.hub.losses import HubLossConfig, hub_loss
from dist_tl.methods.hub.pathway import HubPathway, Paths, Preference, combine
from dist_tl.methods.hub.routes import RouteConfig, choose

CLASSES, SHAPE = 3, (1, 2, 2)


def mlp(outputs, seed, hidden=6):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def hub(m=4, *, k=2, **fields):
    by = fields.get("by", "input")
    routers = {"input": mlp(2 * m, 99), "static": Preference(m), "random": None}
    experts = {f"expert{i}": mlp(CLASSES, i, hidden=5 + i) for i in range(m)}
    return HubPathway(experts, routers[by], num_classes=CLASSES, routes=RouteConfig(k=k, **fields))


def images(rows=24, seed=5):
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed))


def noise(rows=24, m=4, seed=6):
    return torch.randn(rows, m, generator=torch.Generator().manual_seed(seed))


def labels(rows=24):
    return torch.arange(rows) % CLASSES


def dense(module, x, draws=None):
    """Runs every expert on every sample, then masks."""
    routes = choose(module.route_logits(x, draws), module.routes)
    every = torch.stack([expert(x) for expert in module.experts.values()], dim=1)
    return combine(module.aggregator, torch.where(routes.active_BM[..., None], every, 0.0), routes)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("k", [1, 2, 4])
def test_sparse_dispatch_equals_dense_compute_and_mask_in_outputs_and_gradients(k):
    sparse, other = hub(k=k), hub(k=k)
    x, draws = images(), noise()
    left, right = sparse(x, draws), dense(other, x, draws)
    assert torch.allclose(left, right, atol=1e-6)
    functional.cross_entropy(left, labels()).backward()
    functional.cross_entropy(right, labels()).backward()
    theirs = gradients(other)
    for name, gradient in gradients(sparse).items():
        assert torch.allclose(gradient, theirs[name], atol=1e-6), name


def test_the_order_of_samples_does_not_matter():
    module, x, draws = hub(), images(), noise()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(module(x, draws)[order], module(x[order], draws[order]), atol=1e-6)


def test_evaluation_is_deterministic_and_training_depends_on_the_noise():
    module, x = hub(), images()
    active = [Paths(*module(x, noise(seed=s), detailed=True)).active_BM for s in (1, 1, 2)]
    assert torch.equal(active[0], active[1])
    assert not torch.equal(active[0], active[2])
    module.eval()
    assert torch.equal(module(x), module(x))


def test_without_noise_training_equals_evaluation():
    module, x = hub(noise=False), images()
    assert torch.equal(module(x, noise()), module.eval()(x))


def test_all_experts_with_equal_logits_and_the_first_aggregator_are_their_mean():
    module, x = hub(k=4), images()
    for p in module.router.parameters():
        nn.init.zeros_(p)
    mean = torch.stack([expert(x) for expert in module.experts.values()]).mean(dim=0)
    assert torch.allclose(module.eval()(x), mean, atol=1e-6)


def test_an_idle_expert_is_never_called_in_evaluation_and_gets_zero_gradient_in_training():
    module, x = hub(k=1), images()
    nn.init.zeros_(module.router[3].weight)
    module.router[3].bias.data = torch.tensor([9.0, 0, 0, 0, 0, 0, 0, 0])
    calls = dict.fromkeys(module.experts, 0)
    for name, expert in module.experts.items():
        expert.register_forward_pre_hook(
            lambda m, inputs, name=name: calls.update({name: calls[name] + len(inputs[0])})
        )
    module.eval()(x)
    assert calls == {"expert0": 24, "expert1": 0, "expert2": 0, "expert3": 0}
    module.train()
    paths = Paths(*module(x, torch.zeros(24, 4), detailed=True))
    loss, _ = hub_loss(*paths[:3], paths.p_BM, labels(), HubLossConfig())
    loss.backward()
    assert calls["expert3"] == 1  # one blank sample keeps collectives matched
    idle = [p.grad for p in module.experts["expert3"].parameters()]
    assert all(g is not None and (g == 0).all() for g in idle)
    assert all(torch.isfinite(g).all() for g in gradients(module).values())


def test_each_loss_has_gradients_for_its_parameters():
    module, x = hub(), images()
    paths = Paths(*module(x, noise(), detailed=True))
    for config, silent in (
        (HubLossConfig(explore=0, exploit=1), ("router", "aggregator")),
        (HubLossConfig(explore=1, exploit=0), ("experts", "aggregator")),
    ):
        module.zero_grad()
        loss, _ = hub_loss(*paths[:3], paths.p_BM, labels(), config)
        task = functional.cross_entropy(paths.logits_BC, labels())
        (loss - task).backward(retain_graph=True)
        for name, gradient in gradients(module).items():
            if name.startswith(silent):
                assert gradient.abs().max() < 1e-6, name
        assert any(g.abs().max() > 1e-4 for g in gradients(module).values())


def test_one_sample_and_none_work():
    module = hub().eval()
    assert module(images(1)).shape == (1, CLASSES)
    assert module(images(0)).shape == (0, CLASSES)


def test_a_hub_of_one_with_a_fixed_aggregator_is_fine_tuning_with_a_scaled_loss():
    module, alone, x = hub(1, k=1), None, images()
    alone = copy.deepcopy(module.experts["expert0"])
    paths = Paths(*module(x, noise(m=1), detailed=True))
    assert torch.allclose(paths.logits_BC, alone(x), atol=1e-6)
    loss, _ = hub_loss(*paths[:3], paths.p_BM, labels(), HubLossConfig(explore=0.3, exploit=0.1))
    loss.backward()
    (1.1 * functional.cross_entropy(alone(x), labels())).backward()
    theirs = gradients(alone)
    for name, gradient in gradients(module.experts["expert0"]).items():
        assert torch.allclose(gradient, theirs[name], atol=1e-6), name


@pytest.mark.parametrize("by", ["static", "random"])
def test_the_controls_do_not_depend_on_the_input(by):
    module = hub(by=by).eval()
    paths = Paths(*module(images(), detailed=True))
    assert (paths.active_BM.sum(dim=1) == 2).all()
    if by == "static":
        assert (paths.active_BM == paths.active_BM[0]).all()
    else:
        assert set(paths.weight_BM.unique().tolist()) == {0.0, 0.5}


def with_batchnorm(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))


def batchnorm_hub(kind, k=1):
    experts = {f"expert{i}": with_batchnorm(i) for i in range(2)}
    return HubPathway(
        experts, mlp(4, 9), num_classes=CLASSES, routes=RouteConfig(k=k), batchnorm=kind
    )


def statistics(module):
    return {n: b.clone() for n, b in module.experts.named_buffers()}


def test_frozen_statistics_do_not_change_and_single_samples_work():
    module = batchnorm_hub("frozen")
    before = statistics(module)
    module.train()(images(1), noise(1, 2))
    module(images(), noise(24, 2)).sum().backward()
    assert all(torch.equal(before[n], b) for n, b in statistics(module).items())
    assert module.experts["expert0"][2].weight.grad is not None


def test_running_statistics_change_with_large_sub_batches_only():
    module = batchnorm_hub("train", k=2)
    before = statistics(module)
    module.train()(images(4), noise(4, 2))
    assert all(torch.equal(before[n], b) for n, b in statistics(module).items())
    module(images(24), noise(24, 2))
    assert not any(torch.equal(before[n], b) for n, b in statistics(module).items())


def test_more_active_experts_than_experts_are_rejected():
    with pytest.raises(ValueError, match="at most 4 experts, got 5"):
        hub(k=5)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_batches_cover_every_pair_once_and_outputs_are_merged_correctly(size):
    active = noise(17, 3) > 0
    active[:, 1] = False
    batches = sub_batches(active, size)
    pairs = [(int(row), b.expert) for b in batches for row in b.rows_S]
    assert sorted(pairs) == [tuple(pair) for pair in active.nonzero().tolist()]
    assert max(len(b.rows_S) for b in batches) <= size
    outputs = [(b, b.rows_S[:, None] * torch.ones(2) + 100 * b.expert) for b in batches]
    placed = place(reversed(outputs), 17, 3, 2)
    expected = torch.arange(17)[:, None] + 100 * torch.arange(3)
    assert torch.equal(placed[..., 0], torch.where(active, expected, 0).float())


def test_logits_of_another_shape_are_rejected():
    [batch] = sub_batches(torch.ones(2, 1, dtype=torch.bool), 9)
    with pytest.raises(ValueError, match=r"expected \(2, 3\)"):
        place([(batch, torch.zeros(2, 4))], 2, 1, 3)

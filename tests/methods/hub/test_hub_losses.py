"""The losses in closed form, and their gradients."""

import math

import pytest
import torch
from torch.nn import functional

from dist_tl.methods.hub.losses import (
    HubLossConfig,
    exploitation_loss,
    exploration_loss,
    hub_loss,
)


def test_exploration_is_0_at_even_usage_and_log_m_at_collapse():
    assert exploration_loss(torch.full((6, 4), 0.25)).item() == pytest.approx(0.0, abs=1e-6)
    collapsed = torch.eye(4)[[2] * 6]
    assert exploration_loss(collapsed).item() == pytest.approx(math.log(4), abs=1e-6)


def test_sharp_but_balanced_routes_have_no_exploration_loss():
    assert exploration_loss(torch.eye(4)).item() == pytest.approx(0.0, abs=1e-6)


def test_exploration_lowers_the_over_used_expert():
    z = torch.tensor([[2.0, 0.0, 0.0]] * 5, requires_grad=True)
    exploration_loss(z.softmax(dim=1)).backward()
    assert (z.grad[:, 0] > 0).all()
    assert (z.grad[:, 1:] < 0).all()


def test_exploitation_ignores_inactive_experts_and_counts_idle_ones_as_0():
    logits = torch.tensor([[[2.0, 0.0], [9.0, -9.0]], [[float("nan"), 1.0], [0.0, 1.0]]])
    active = torch.tensor([[True, False], [False, False]])
    labels = torch.tensor([1, 0])
    expected = functional.cross_entropy(logits[:1, 0], labels[:1]) / 2
    assert torch.allclose(exploitation_loss(logits, active, labels), expected)


def test_the_gradient_off_the_route_is_0_even_where_the_logits_are_not_finite():
    logits = torch.zeros(2, 2, 3)
    logits[0, 1] = float("inf")
    logits.requires_grad_()
    active = torch.tensor([[True, False], [True, False]])
    exploitation_loss(torch.where(active[..., None], logits, 0.0), active, torch.tensor([0, 1]))
    loss = exploitation_loss(logits.nan_to_num(), active, torch.tensor([0, 1]))
    loss.backward()
    assert (logits.grad[:, 1] == 0).all()
    assert (logits.grad[:, 0] != 0).any()


def test_the_total_loss_is_the_weighted_sum_of_its_terms():
    g = torch.Generator().manual_seed(0)
    logits, experts = torch.randn(5, 3, generator=g), torch.randn(5, 2, 3, generator=g)
    active, p = torch.ones(5, 2, dtype=torch.bool), torch.rand(5, 2, generator=g).softmax(dim=1)
    labels = torch.tensor([0, 1, 2, 0, 1])
    config = HubLossConfig(explore=0.5, exploit=0.25)
    loss, parts = hub_loss(logits, experts, active, p, labels, config)
    expected = parts["task"] + 0.5 * parts["explore"] + 0.25 * parts["exploit"]
    assert torch.allclose(loss, expected)
    assert torch.allclose(parts["task"], functional.cross_entropy(logits, labels))

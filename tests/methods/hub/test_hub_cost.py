"""Measured multiply-adds equal the formula."""

import pytest
import torch
from torch import nn

from dist_tl.methods.hub.cost import multiply_adds, routed_multiply_adds
from dist_tl.methods.hub.pathway import HubPathway
from dist_tl.methods.hub.routes import RouteConfig


def test_a_convolution_and_a_linear_layer_equal_the_manual_count():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)
    )
    assert multiply_adds(network, (3, 4, 4)) == 8 * 3 * 9 * 16 + 8 * 16 * 5
    assert network.training


def mlp(outputs, hidden):
    return nn.Sequential(nn.Flatten(), nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_routed_hub_costs_its_router_its_active_experts_and_the_aggregator(k):
    shape = (1, 2, 2)
    experts = {f"expert{i}": mlp(3, 5 + i) for i in range(3)}
    router = mlp(6, 4)
    hub = HubPathway(experts, router, num_classes=3, routes=RouteConfig(k=k))
    nn.init.zeros_(router[3].weight)
    nn.init.zeros_(router[3].bias)  # ties: the first k experts are used
    counted = multiply_adds(hub, shape)
    costs = [multiply_adds(expert, shape) for expert in experts.values()]
    usage = [1.0] * k + [0.0] * (3 - k)
    assert counted == routed_multiply_adds(multiply_adds(router, shape), costs, usage, 3)
    parameters = sum(p.numel() for part in (*experts.values(), router) for p in part.parameters())
    aggregator = 3 * 3 * 3 + 3
    assert sum(p.numel() for p in hub.parameters()) == parameters + aggregator


def test_counting_does_not_change_the_module():
    network = mlp(3, 5)
    before = [p.clone() for p in network.parameters()]
    multiply_adds(network, (1, 2, 2))
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert all(p.grad is None for p in network.parameters())

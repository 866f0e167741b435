"""Routes and weights: exactly K experts per sample, and weights that train the router."""

import math

import pytest
import torch
from pydantic import ValidationError

from dist_tl.errors import NumericsError
from dist_tl.methods.hub.controls import chance_logits
from dist_tl.methods.hub.routes import MIN_SCALE, RouteConfig, choose, noisy_logits

ALL = [(1, "dense"), (2, "dense"), (2, "topk"), (5, "dense"), (5, "topk")]


def logits(rows=64, experts=5, seed=0):
    return torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("k", "gate"), ALL)
def test_exactly_k_experts_are_active_and_only_they_have_weight(k, gate):
    routes = choose(logits(), RouteConfig(k=k, gate=gate))
    assert (routes.active_BM.sum(dim=1) == k).all()
    assert (routes.weight_BM >= 0).all()
    assert (routes.weight_BM[~routes.active_BM] == 0).all()
    expected = routes.p_BM.max(dim=1).values if k == 1 else torch.ones(64)
    assert torch.allclose(routes.weight_BM.sum(dim=1), expected, atol=1e-6)


@pytest.mark.parametrize(("k", "gate"), ALL)
def test_permuting_the_hub_permutes_the_routes(k, gate):
    order = torch.tensor([3, 0, 4, 1, 2])
    config, z = RouteConfig(k=k, gate=gate), logits()
    for left, right in zip(choose(z, config), choose(z[:, order], config), strict=True):
        assert torch.allclose(left[:, order].float(), right.float(), atol=1e-7)


def test_the_largest_logits_win_and_ties_go_to_the_lowest_index():
    routes = choose(torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 2.0]]), RouteConfig(k=2))
    assert routes.active_BM.tolist() == [[False, True, True], [True, True, False]]


def test_for_several_experts_the_dense_gate_equals_the_softmax_over_the_chosen_ones():
    dense = choose(logits(), RouteConfig(k=3, gate="dense"))
    topk = choose(logits(), RouteConfig(k=3, gate="topk"))
    assert torch.allclose(dense.weight_BM, topk.weight_BM, atol=1e-6)


def test_a_softmax_over_one_expert_is_rejected_with_a_remedy():
    with pytest.raises(ValidationError, match=r"k = 1.*no gradient.*gate: dense"):
        RouteConfig(k=1, gate="topk")


def test_with_one_expert_the_dense_gate_trains_every_router_logit():
    z = logits().requires_grad_()
    choose(z, RouteConfig(k=1)).weight_BM.sum().backward()
    assert (z.grad.abs().sum(dim=0) > 0).all()


def test_more_active_experts_than_experts_are_rejected():
    with pytest.raises(ValueError, match="at most 5 experts, got 6"):
        RouteConfig(k=6).check(5)


def test_noise_is_scaled_by_the_input_and_never_vanishes():
    raw = torch.cat([logits(4, 3), torch.full((4, 3), -1e9)], dim=1)
    centre = noisy_logits(raw, None)
    noisy = noisy_logits(raw, torch.ones(4, 3))
    assert torch.equal(centre, raw[:, :3])
    assert torch.allclose(noisy - centre, torch.full((4, 3), MIN_SCALE), atol=1e-6)
    wide = noisy_logits(torch.cat([centre, torch.zeros(4, 3)], dim=1), torch.ones(4, 3))
    assert torch.allclose(wide - centre, torch.full((4, 3), math.log(2) + MIN_SCALE), atol=1e-6)


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(NumericsError, match="router"):
        noisy_logits(torch.tensor([[float("nan"), 0.0]]), None)


@pytest.mark.parametrize("k", [1, 2])
def test_a_missing_expert_has_no_weight_and_the_others_share_it(k):
    z = logits()
    routes = choose(z, RouteConfig(k=k), missing=frozenset({2}))
    assert not routes.active_BM[:, 2].any()
    assert (routes.active_BM.sum(dim=1) == k).all()
    rest = choose(z[:, [0, 1, 3, 4]], RouteConfig(k=k))
    assert torch.allclose(routes.weight_BM[:, [0, 1, 3, 4]], rest.weight_BM, atol=1e-7)


def test_too_few_available_experts_are_an_error():
    with pytest.raises(ValueError, match="1 experts are available, every sample needs 2"):
        choose(logits(experts=3), RouteConfig(k=2), missing=frozenset({0, 1}))


def test_random_routes_depend_on_the_image_only():
    images = torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    whole = chance_logits(images, 3)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    assert torch.equal(chance_logits(images[order], 3), whole[order])
    assert torch.equal(chance_logits(images[5:6], 3), whole[5:6])
    routes = choose(whole, RouteConfig(k=2, by="random"))
    assert set(routes.weight_BM.unique().tolist()) == {0.0, 0.5}
    assert chance_logits(images[:0], 3).shape == (0, 3)

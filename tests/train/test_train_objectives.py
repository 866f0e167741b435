"""Objectives pass batches to the losses of `methods` unchanged."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from dist_tl.methods.pseudo.distillation import DistillationConfig
from dist_tl.methods.pseudo.p_ssl import PSSLConfig, pssl_loss
from dist_tl.train.feeds import Batch
from dist_tl.train.objectives import (
    PSSL,
    Diffusion,
    Distillation,
    ReadoutFit,
    ReadoutSpec,
    supervised,
)


def batch_of(lanes=(0, 1), size=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    images, weak, strong = (torch.randn(size, 1, 4, 4, generator=rng) for _ in range(3))
    labels = torch.arange(size) % 3
    return Batch(images, labels, weak, strong, tuple(range(size)), lanes)


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3))


def test_the_supervised_objective_is_the_cross_entropy_of_the_labelled_rows():
    batch = batch_of()
    loss, figures = supervised(network(), batch, 0)
    expected = functional.cross_entropy(network()(batch.images), batch.labels)
    assert torch.equal(loss, expected)
    assert figures == {}


def test_p_ssl_warms_up_over_a_tenth_of_the_steps():
    config = PSSLConfig(weight=0.8, algorithm="entropy_min")
    objective, batch = PSSL(config, num_steps=40), batch_of()
    for step, weight in [(0, 0.2), (1, 0.4), (3, 0.8), (30, 0.8)]:
        loss, figures = objective(network(), batch, step)
        expected, _ = pssl_loss(
            network(),
            batch.images,
            batch.labels,
            batch.weak,
            batch.strong,
            weight=weight,
            algorithm="entropy_min",
        )
        assert torch.equal(loss, expected)
        assert set(figures) == {"loss_supervised", "loss_unsupervised", "unmasked"}


def test_p_ssl_passes_its_options_to_the_loss():
    options = {"algorithm": "uda", "batchnorm": "separate", "threshold": 0.1, "sharpening": 0.7}
    batch = batch_of()
    loss, _ = PSSL(PSSLConfig(weight=2.0, **options), num_steps=1)(network(), batch, 0)
    views = (batch.images, batch.labels, batch.weak, batch.strong)
    assert torch.equal(loss, pssl_loss(network(), *views, weight=2.0, **options)[0])
    assert not torch.equal(loss, pssl_loss(network(), *views, weight=2.0)[0])


@pytest.mark.parametrize("kind", ["soft_targets", "logit_matching"])
def test_a_teacher_is_frozen_in_eval_mode_and_gets_no_gradient(kind):
    teacher, student, batch = network(seed=1), network(), batch_of()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    objective = Distillation(DistillationConfig(kind=kind), teacher)
    loss, _ = objective(student, batch, 0)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_student_and_teacher_see_the_same_images():
    teacher, batch = network(seed=1), batch_of()
    objective = Distillation(DistillationConfig(kind="logit_matching"), teacher)
    student = network(seed=1).eval()
    assert objective(student, batch, 0)[0].item() == 0.0


class Denoiser(nn.Module):
    """Stands in for a diffusion model; its loss depends on the noise."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images, labels, *, rng):
        noise = torch.randn(images.shape, generator=rng)
        return (self.weight * noise - images).square().mean() + labels.sum()


def test_diffusion_noise_is_drawn_per_lane_independent_of_ranks():
    def part(lanes):
        full = batch_of(lanes=(0, 1, 2, 3))
        rows = slice(lanes[0] * 2, (lanes[-1] + 1) * 2)
        return Batch(full.images[rows], full.labels[rows], None, None, (), lanes)

    objective, module = Diffusion(seed=5), Denoiser()
    alone, _ = objective(module, part((0, 1, 2, 3)), 7)
    ranks = [objective(module, part(lanes), 7)[0] for lanes in ((0, 1), (2, 3))]
    torch.testing.assert_close(torch.stack(ranks).mean(), alone)
    assert objective(module, part((0, 1, 2, 3)), 7)[0] == alone
    assert objective(module, part((0, 1, 2, 3)), 8)[0] != alone
    assert Diffusion(seed=6)(module, part((0, 1, 2, 3)), 7)[0] != alone


def test_lanes_draw_independent_noise():
    images, labels = torch.zeros(4, 1, 4, 4), torch.zeros(4, dtype=torch.int64)
    losses = {
        Diffusion(seed=5)(Denoiser(), Batch(images, labels, None, None, (), (lane,)), 0)[0].item()
        for lane in range(6)
    }
    assert len(losses) == 6


def test_diffusion_calls_the_module_itself():
    """ZeRO-3 gathers weights in the hooks of a call."""
    called = []
    module = Denoiser()
    module.register_forward_pre_hook(lambda *_: called.append(1))
    Diffusion(seed=0)(module, batch_of(lanes=(0, 1)), 0)
    assert len(called) == 2


def test_the_readout_loss_is_proportional_to_the_summed_problem():
    torch.manual_seed(0)
    num, hidden, penalty = 12, 5, 0.7
    features = torch.randn(num, hidden)
    labels = torch.arange(num) % 2
    module = nn.Sequential()
    module.head = nn.Linear(hidden, 2, bias=False)
    batch = Batch(features, labels, None, None, (), (0,))
    loss, _ = ReadoutFit(ReadoutSpec(penalty=penalty, num_rows=num))(module, batch, 0)
    w = hidden**0.5 * (module.head.weight[1] - module.head.weight[0])
    margin = (2.0 * labels - 1) * (features @ w) / hidden**0.5
    summed = functional.softplus(-margin).sum() + penalty / 2 * w.square().sum()
    torch.testing.assert_close(loss * num, summed)

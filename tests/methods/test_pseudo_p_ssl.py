"""The P-SSL objective: weight 0 is supervised training; batch norm behaves as documented."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from dist_tl.config import validate
from dist_tl.errors import ConfigError, NumericsError
from dist_tl.methods.pseudo.conditions import ConditionConfig, draw_conditions, source_probabilities
from dist_tl.methods.pseudo.guard import GuardConfig
from dist_tl.methods.pseudo.losses import loss_weight, unsupervised_loss
from dist_tl.methods.pseudo.p_ssl import (
    PSSLConfig,
    frozen_running_statistics,
    pssl_loss,
    supervised_loss,
)

ALGORITHMS = ["uda", "fixmatch", "pseudo_label", "entropy_min"]


class SmallNet(nn.Module):
    def __init__(self, num_classes=3, norm=nn.BatchNorm2d, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            norm(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2),
            norm(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(8, num_classes)

    def forward(self, images):
        return self.head(self.trunk(images))


class Perceptron(nn.Module):
    def __init__(self, num_classes=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(36, 10), nn.GELU())
        self.head = nn.Linear(10, num_classes)

    def forward(self, images):
        return self.head(self.trunk(images))


def cumulative_norm(width):
    return nn.BatchNorm2d(width, momentum=None)


def tracked_instance_norm(width):
    return nn.InstanceNorm2d(width, affine=True, track_running_stats=True)


def no_norm(width):
    return nn.Identity()


def a_batch(num=6, num_pseudo=10, num_classes=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(num, 1, 6, 6, generator=rng)
    labels = torch.randint(num_classes, (num,), generator=rng)
    weak = 2 * torch.randn(num_pseudo, 1, 6, 6, generator=rng) + 1
    return images, labels, weak, weak + 0.3 * torch.randn(weak.shape, generator=rng)


def lowered_threshold(algorithm):
    """An untrained network never reaches the default confidence thresholds."""
    return {} if algorithm == "entropy_min" else {"threshold": 0.3}


def buffers_of(network):
    return {name: value.clone() for name, value in network.named_buffers()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def train(network, loss_of, num_steps=5):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for step in range(num_steps):
        optimizer.zero_grad()
        loss_of(network, a_batch(seed=step), step).backward()
        optimizer.step()
    return network.state_dict()


# Weight 0


@pytest.mark.parametrize("batchnorm", ["joint", "separate"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_weight_zero_is_supervised_training_bit_for_bit(batchnorm, algorithm):
    def with_weight_zero(network, batch, step):
        weight = loss_weight(step, weight=0.0, num_steps=5)
        options = {"algorithm": algorithm, "batchnorm": batchnorm}
        return pssl_loss(network, *batch, weight=weight, **options)[0]

    def supervised(network, batch, step):
        return functional.cross_entropy(network(batch[0]), batch[1])

    assert same(train(SmallNet(), with_weight_zero), train(SmallNet(), supervised))


def test_a_positive_weight_does_change_the_weights():
    def with_weight(network, batch, step):
        return pssl_loss(network, *batch, weight=0.5, batchnorm="separate", threshold=0.0)[0]

    def supervised(network, batch, step):
        return supervised_loss(network, *batch[:2])

    assert not same(train(SmallNet(), with_weight), train(SmallNet(), supervised))


def test_weight_zero_needs_no_pseudo_images_and_draws_nothing():
    images, labels, _, _ = a_batch()
    network, state = SmallNet(), torch.get_rng_state()
    loss, figures = pssl_loss(network, images, labels, None, None, weight=0.0)
    assert torch.equal(state, torch.get_rng_state())
    assert figures["loss_unsupervised"].item() == 0.0
    assert figures["unmasked"].item() == 0.0
    assert torch.equal(figures["loss_supervised"], loss.detach())


# Batch-norm


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, cumulative_norm, tracked_instance_norm])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_separate_changes_buffers_only_in_the_labelled_pass(norm, algorithm):
    network = SmallNet(norm=norm)
    reference = copy.deepcopy(network)
    batch = a_batch()
    loss, _ = pssl_loss(network, *batch, weight=0.7, algorithm=algorithm, batchnorm="separate")
    loss.backward()
    reference(batch[0])
    assert same(buffers_of(network), buffers_of(reference))


def test_joint_uses_the_statistics_of_all_images():
    network = SmallNet()
    reference = copy.deepcopy(network)
    batch = a_batch()
    pssl_loss(network, *batch, weight=0.7)
    images, _, weak, strong = batch
    reference(torch.cat([images, weak, strong]))
    assert same(buffers_of(network), buffers_of(reference))
    labelled_only = SmallNet()
    labelled_only(images)
    assert not same(buffers_of(network), buffers_of(labelled_only))


def test_a_frozen_pass_uses_batch_statistics_and_updates_none():
    network, images = SmallNet(), a_batch()[2]
    before = buffers_of(network)
    held = dict(network.named_buffers())
    with frozen_running_statistics(network):
        frozen = network(images)
    assert same(before, buffers_of(network))
    assert all(held[name] is buffer for name, buffer in network.named_buffers())
    assert torch.equal(frozen, copy.deepcopy(network)(images))
    assert not torch.equal(frozen, copy.deepcopy(network).eval()(images))


def test_statistics_are_restored_after_an_error():
    network = SmallNet()
    before = buffers_of(network)
    with pytest.raises(RuntimeError), frozen_running_statistics(network):
        network(a_batch()[0][:, :, :, :1])  # updates the first layer, then fails in the second
    assert same(before, buffers_of(network))


def test_separate_trains_through_a_labelled_pass_and_a_pseudo_pass():
    # Backward uses both graphs, so no buffer may be changed in place in between.
    network = SmallNet()
    loss, _ = pssl_loss(network, *a_batch(), weight=1.0, batchnorm="separate", threshold=0.0)
    loss.backward()
    assert all(weight.grad.isfinite().all() for weight in network.parameters())


@pytest.mark.parametrize("build", [Perceptron, lambda: SmallNet(norm=no_norm)])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_batch_norm_joint_and_separate_agree(build, algorithm):
    network, batch = build(), a_batch()
    options = {"weight": 0.7, "algorithm": algorithm, **lowered_threshold(algorithm)}
    gradients = []
    for batchnorm in ("joint", "separate"):
        network.zero_grad()
        pssl_loss(network, *batch, batchnorm=batchnorm, **options)[0].backward()
        gradients.append([weight.grad.clone() for weight in network.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


# The loss


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("batchnorm", ["joint", "separate"])
def test_the_loss_is_the_sum_of_its_two_parts(algorithm, batchnorm):
    network = Perceptron()
    images, labels, weak, strong = a_batch()
    options = {"algorithm": algorithm, **lowered_threshold(algorithm)}
    loss, figures = pssl_loss(
        network, images, labels, weak, strong, weight=0.7, batchnorm=batchnorm, **options
    )
    supervised = functional.cross_entropy(network(images), labels)
    unsupervised = unsupervised_loss(network(weak), network(strong), **options)
    assert unsupervised.item() > 0
    torch.testing.assert_close(loss, supervised + 0.7 * unsupervised)
    torch.testing.assert_close(figures["loss_supervised"], supervised.detach())
    torch.testing.assert_close(figures["loss_unsupervised"], unsupervised.detach())
    assert not any(figure.requires_grad for figure in figures.values())


@pytest.mark.parametrize(("algorithm", "views"), [("uda", 2), ("pseudo_label", 1)])
@pytest.mark.parametrize("batchnorm", ["joint", "separate"])
def test_passes_contain_only_the_images_that_the_loss_needs(algorithm, views, batchnorm):
    network, batch, sizes = Perceptron(), a_batch(num=5, num_pseudo=7), []
    network.register_forward_hook(lambda *call: sizes.append(len(call[2])))
    pssl_loss(network, *batch, weight=1.0, algorithm=algorithm, batchnorm=batchnorm)
    assert sizes == ([5 + 7 * views] if batchnorm == "joint" else [5] + [7] * views)


def test_the_weak_pass_of_separate_keeps_no_graph():
    network, graphs = SmallNet(), []
    network.register_forward_hook(lambda *call: graphs.append(call[2].requires_grad))
    pssl_loss(network, *a_batch(), weight=1.0, batchnorm="separate")
    assert graphs == [True, False, True]  # labelled, weak, strong


@pytest.mark.parametrize("num_classes", [3, 9])
@pytest.mark.parametrize("build", [Perceptron, SmallNet])
def test_fewer_or_more_source_than_target_classes_train_any_architecture(num_classes, build):
    source = SmallNet(num_classes=5, norm=no_norm)  # K = 5, C = 3 or 9
    before = {name: value.clone() for name, value in source.state_dict().items()}
    images, labels, _, _ = a_batch(num_classes=num_classes)
    q = source_probabilities(source, images)
    condition, _ = draw_conditions(
        q, ConditionConfig(), run_seed=0, purpose="p_ssl", sample_indices=range(8)
    )
    prototypes = torch.randn(5, 36, generator=torch.Generator().manual_seed(1))
    pseudo = (condition @ prototypes).reshape(8, 1, 6, 6)
    network = build(num_classes=num_classes)
    pssl_loss(network, images, labels, pseudo, pseudo + 0.1, weight=0.1)[0].backward()
    assert network.head.weight.grad.shape[0] == num_classes
    assert all(weight.grad.isfinite().all() for weight in network.parameters())
    assert same(before, source.state_dict())
    assert all(weight.grad is None for weight in source.parameters())


# Invalid arguments


def test_a_logit_that_is_not_finite_names_the_pseudo_sample():
    images, labels, weak, strong = a_batch(num_pseudo=3)
    weak[1] = float("nan")
    for batchnorm in ("joint", "separate"):
        with pytest.raises(NumericsError, match="pseudo sample 71 "):
            pssl_loss(
                Perceptron(), images, labels, weak, strong,
                weight=1.0, batchnorm=batchnorm, sample_indices=[70, 71, 72],
            )  # fmt: skip


def test_missing_views_and_views_of_another_size_are_rejected():
    images, labels, weak, strong = a_batch()
    with pytest.raises(ValueError, match="strong view"):
        pssl_loss(SmallNet(), images, labels, weak, None, weight=0.1)
    with pytest.raises(ValueError, match="weak view"):
        pssl_loss(SmallNet(), images, labels, weak[:, :, :4], strong, weight=0.1)
    with pytest.raises(ValueError, match="weight >= 0"):
        pssl_loss(SmallNet(), images, labels, weak, strong, weight=-0.1)


# Configuration


def test_the_defaults_are_those_measured_to_be_safe():
    config = PSSLConfig()
    assert (config.algorithm, config.weight, config.batchnorm) == ("uda", 0.1, "joint")
    assert config.condition.kind == "soft"
    assert config.lambda_guard == GuardConfig()


@pytest.mark.parametrize("off", ["off", False])  # YAML reads a bare off as false
def test_the_guard_can_be_switched_off(off):
    assert validate(PSSLConfig, {"lambda_guard": off}, source="job").lambda_guard == "off"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"weight": -0.1}, "weight"),
        ({"algorithm": "fixmatch", "sharpening": 0.4}, "belongs to uda"),
        ({"algorithm": "entropy_min", "threshold": 0.5}, "no threshold"),
        ({"lambda_guard": {"lambdas": [0.1, 1.0]}}, "expected 0"),
        ({"condition": {"k": 0}}, "condition.k"),
    ],
)
def test_invalid_settings_are_rejected(data, message):
    with pytest.raises(ConfigError, match=message):
        validate(PSSLConfig, data, source="job")

"""The unsupervised losses: closed forms, masks and gradients."""

import math

import pytest
import torch

from dist_tl.methods.pseudo.losses import loss_weight, unmasked_fraction, unsupervised_loss

ALGORITHMS = ["uda", "fixmatch", "pseudo_label", "entropy_min"]
MASKED = ["uda", "fixmatch", "pseudo_label"]


def logits_of(*rows):
    return torch.tensor(rows).log()


def mostly_unmasked(algorithm):
    """Options that mask some rows of two_views(), but less than half."""
    return {"algorithm": algorithm} | ({"threshold": 0.6} if algorithm in MASKED else {})


def two_views(num=6, num_classes=4, scale=3.0):
    rng = torch.Generator().manual_seed(0)
    weak = scale * torch.randn(num, num_classes, generator=rng)
    strong = torch.randn(num, num_classes, generator=rng)
    return weak.requires_grad_(), strong.requires_grad_()


# Values


def test_uda_is_the_divergence_from_the_sharpened_weak_view():
    weak, strong = [0.9, 0.1], [0.6, 0.4]
    sharp = [p**2.5 for p in weak]  # 1 / 0.4
    target = [p / sum(sharp) for p in sharp]
    expected = sum(t * math.log(t / s) for t, s in zip(target, strong, strict=True))
    loss = unsupervised_loss(logits_of(weak), logits_of(strong), algorithm="uda")
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_uda_without_sharpening_vanishes_for_equal_views_and_with_it_does_not():
    weak, _ = two_views()
    options = {"algorithm": "uda", "threshold": 0.0}
    assert unsupervised_loss(weak, weak, sharpening=1.0, **options).item() == pytest.approx(0.0)
    assert unsupervised_loss(weak, weak, **options).item() > 1e-3


def test_uda_with_a_vanishing_temperature_is_fixmatch():
    weak, strong = two_views()
    torch.testing.assert_close(
        unsupervised_loss(weak, strong, algorithm="uda", threshold=0.5, sharpening=1e-4),
        unsupervised_loss(weak, strong, algorithm="fixmatch", threshold=0.5),
    )


def test_fixmatch_trains_the_strong_view_on_the_weak_views_class():
    loss = unsupervised_loss(logits_of([0.01, 0.99]), logits_of([0.7, 0.3]), algorithm="fixmatch")
    assert loss.item() == pytest.approx(-math.log(0.3), rel=1e-5)


def test_pseudo_label_is_fixmatch_on_the_weak_view_itself():
    weak, _ = two_views()
    assert torch.equal(
        unsupervised_loss(weak, None, algorithm="pseudo_label", threshold=0.6),
        unsupervised_loss(weak, weak, algorithm="fixmatch", threshold=0.6),
    )


def test_entropy_min_is_the_mean_entropy():
    weak = logits_of([0.25] * 4, [0.5, 0.5, 1e-30, 1e-30])
    loss = unsupervised_loss(weak, None, algorithm="entropy_min")
    assert loss.item() == pytest.approx((math.log(4) + math.log(2)) / 2, rel=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_certain_predictions_are_finite_with_finite_gradients(algorithm):
    weak = torch.tensor([[1000.0, 0.0, 0.0]], requires_grad=True)
    strong = torch.tensor([[0.0, 500.0, 0.0]], requires_grad=True)
    loss = unsupervised_loss(weak, strong, algorithm=algorithm)
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad is None or x.grad.isfinite().all() for x in (weak, strong))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_half_precision_logits_are_raised_to_float32(algorithm):
    weak, strong = two_views()
    options = mostly_unmasked(algorithm)
    half = unsupervised_loss(weak.bfloat16(), strong.bfloat16(), **options)
    rounded = [x.bfloat16().float() for x in (weak, strong)]
    assert half.dtype == torch.float32
    assert torch.equal(half, unsupervised_loss(*rounded, **options))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_loss_does_not_depend_on_the_order_and_repetition_of_images(algorithm):
    weak, strong = two_views()
    options = mostly_unmasked(algorithm)
    once = unsupervised_loss(weak, strong, **options)
    assert once.item() > 0
    rows = torch.tensor([5, 3, 1, 0, 2, 4]).repeat(3)
    torch.testing.assert_close(unsupervised_loss(weak[rows], strong[rows], **options), once)


# Masks


@pytest.mark.parametrize("algorithm", MASKED)
def test_a_uniform_prediction_is_masked_to_zero(algorithm):
    _, strong = two_views()
    loss = unsupervised_loss(torch.zeros(6, 4), strong, algorithm=algorithm)
    assert loss.item() == 0.0
    assert unmasked_fraction(torch.zeros(6, 4), algorithm=algorithm).item() == 0.0


def test_masked_images_count_as_zero_in_the_mean():
    confident, unsure, strong = [0.01, 0.99], [0.5, 0.5], [0.7, 0.3]
    loss = unsupervised_loss(
        logits_of(confident, unsure, unsure),
        logits_of(strong, strong, strong),
        algorithm="fixmatch",
    )
    assert loss.item() == pytest.approx(-math.log(0.3) / 3, rel=1e-5)


@pytest.mark.parametrize(("algorithm", "kept"), [("uda", 0), ("fixmatch", 1), ("pseudo_label", 1)])
def test_a_confidence_equal_to_the_threshold_is_masked_by_uda_only(algorithm, kept):
    half = torch.zeros(1, 2)  # softmax is exactly one half
    assert unmasked_fraction(half, algorithm=algorithm, threshold=0.5).item() == kept
    loss = unsupervised_loss(half, torch.ones(1, 2), algorithm=algorithm, threshold=0.5)
    assert loss.item() == pytest.approx(kept * math.log(2))


@pytest.mark.parametrize(
    ("algorithm", "confidences", "expected"),
    [("uda", [0.79, 0.81, 0.96], 2 / 3), ("fixmatch", [0.79, 0.94, 0.96], 1 / 3)],
)
def test_default_thresholds_are_those_of_the_public_code(algorithm, confidences, expected):
    weak = logits_of(*([p, 1 - p] for p in confidences))
    assert unmasked_fraction(weak, algorithm=algorithm).item() == pytest.approx(expected)


def test_udas_mask_uses_the_unsharpened_prediction():
    weak = logits_of([0.7, 0.3])  # sharpened it would be 0.89
    assert unsupervised_loss(weak, torch.zeros(1, 2), algorithm="uda").item() == 0.0


def test_entropy_min_masks_nothing():
    assert unmasked_fraction(torch.zeros(3, 4), algorithm="entropy_min").item() == 1.0


# Gradients


@pytest.mark.parametrize("algorithm", ["uda", "fixmatch"])
def test_the_weak_view_gets_no_gradient_and_the_strong_one_does(algorithm):
    weak, strong = two_views()
    unsupervised_loss(weak, strong, algorithm=algorithm, threshold=0.3).backward()
    assert weak.grad is None
    assert strong.grad.abs().sum() > 0


@pytest.mark.parametrize("algorithm", ["pseudo_label", "entropy_min"])
def test_losses_of_one_view_train_the_weak_view_only(algorithm):
    weak, strong = two_views()
    unsupervised_loss(weak, strong, **mostly_unmasked(algorithm)).backward()
    assert weak.grad.abs().sum() > 0
    assert strong.grad is None


@pytest.mark.parametrize("algorithm", MASKED)
def test_masked_images_get_no_gradient(algorithm):
    weak = logits_of([0.99, 0.01], [0.5, 0.5]).requires_grad_()
    strong = torch.zeros(2, 2, requires_grad=True)
    unsupervised_loss(weak, strong, algorithm=algorithm).backward()
    grad = strong.grad if weak.grad is None else weak.grad
    assert grad[0].abs().sum() > 0
    assert grad[1].abs().sum() == 0


def test_entropys_gradient_agrees_with_finite_differences():
    weak = torch.tensor([[0.3, -0.2, 0.9]], dtype=torch.float32)
    leaf = weak.clone().requires_grad_()
    unsupervised_loss(leaf, None, algorithm="entropy_min").backward()
    for i in range(3):
        step = torch.zeros(1, 3)
        step[0, i] = 1e-2
        up = unsupervised_loss(weak + step, None, algorithm="entropy_min")
        down = unsupervised_loss(weak - step, None, algorithm="entropy_min")
        assert leaf.grad[0, i].item() == pytest.approx((up - down).item() / 2e-2, abs=1e-4)


# Invalid arguments


def test_views_that_do_not_match_are_rejected():
    with pytest.raises(ValueError, match="strong logits"):
        unsupervised_loss(torch.zeros(3, 2), torch.zeros(2, 2), algorithm="uda")
    with pytest.raises(ValueError, match="strong logits"):
        unsupervised_loss(torch.zeros(3, 2), None, algorithm="fixmatch")
    with pytest.raises(ValueError, match="U >= 1"):
        unsupervised_loss(torch.zeros(0, 2), torch.zeros(0, 2), algorithm="uda")


def test_options_of_another_algorithm_are_rejected():
    weak, strong = two_views()
    with pytest.raises(ValueError, match="belongs to uda"):
        unsupervised_loss(weak, strong, algorithm="fixmatch", sharpening=0.4)
    with pytest.raises(ValueError, match="no threshold"):
        unsupervised_loss(weak, None, algorithm="entropy_min", threshold=0.5)


# Warm-up


@pytest.mark.parametrize("num_steps", [1, 9, 10, 11, 30, 70, 200, 1001])
def test_warm_up_starts_above_zero_and_is_over_after_a_tenth_of_the_steps(num_steps):
    weights = [loss_weight(t, weight=0.3, num_steps=num_steps) for t in range(num_steps)]
    last_of_warm_up = -(-num_steps // 10) - 1
    assert weights[0] > 0
    assert all(w == 0.3 for w in weights[last_of_warm_up:])
    assert all(w < 0.3 for w in weights[:last_of_warm_up])
    assert weights == sorted(weights)


def test_warm_up_is_linear():
    weights = [loss_weight(t, weight=1.0, num_steps=40) for t in range(5)]
    assert weights == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_weight_of_zero_stays_zero():
    assert {loss_weight(t, weight=0.0, num_steps=20) for t in range(20)} == {0.0}


@pytest.mark.parametrize("arguments", [(-1, 0.1, 5), (0, -0.1, 5), (0, 0.1, 0)])
def test_negative_steps_or_weights_are_rejected(arguments):
    step, weight, num_steps = arguments
    with pytest.raises(ValueError, match="expected step"):
        loss_weight(step, weight=weight, num_steps=num_steps)

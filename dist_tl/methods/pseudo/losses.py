"""Unsupervised losses on pseudo samples: UDA, FixMatch, pseudo-labels, entropy minimisation.

Every loss compares views of the same images, in nats. Masked images count as zero, so that the
scale of a loss does not depend on their number. UDA's sharpening 0.4 and threshold 0.8 and
FixMatch's 0.95 are the CIFAR settings of their authors' code (google-research/uda,
google-research/fixmatch). With sharpening below 1, UDA's loss is positive even for equal views.

Shape suffixes: U = pseudo batch, C = target classes.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Algorithm = Literal["uda", "fixmatch", "pseudo_label", "entropy_min"]

THRESHOLDS: dict[Algorithm, float] = {"uda": 0.8, "fixmatch": 0.95, "pseudo_label": 0.95}
UDA_SHARPENING = 0.4
TWO_VIEWS: frozenset[Algorithm] = frozenset({"uda", "fixmatch"})


def unsupervised_loss(
    weak_logits_UC: Tensor,
    strong_logits_UC: Tensor | None,
    *,
    algorithm: Algorithm,
    threshold: float | None = None,
    sharpening: float | None = None,
) -> Tensor:
    """Returns the mean unsupervised loss over all U pseudo images, float32 scalar in nats.

    With p = softmax(weak) and sg the stop-gradient:

        uda           1[max p > threshold]   KL(sg softmax(weak / sharpening) || softmax(strong))
        fixmatch      1[max p >= threshold]  CE(argmax sg p, strong)
        pseudo_label  1[max p >= threshold]  CE(argmax sg p, weak)
        entropy_min   H(p)

    Args:
        strong_logits_UC: not used by pseudo_label and entropy_min, where it may be None.
        threshold: None: the algorithm's default; entropy_min has no threshold.
        sharpening: None: 0.4; for uda only.

    Raises:
        ValueError: the views do not match, or an option does not belong to the algorithm.
    """
    weak_UC = weak_logits_UC.float()
    if weak_UC.ndim != 2 or len(weak_UC) == 0 or weak_UC.shape[1] < 2:
        raise ValueError(f"expected weak logits (U >= 1, C >= 2), got {tuple(weak_UC.shape)}")
    if sharpening is not None and (algorithm != "uda" or sharpening <= 0):
        raise ValueError(f"sharpening > 0 belongs to uda; got {sharpening} for {algorithm}")
    if algorithm == "entropy_min":
        _reject_threshold(threshold)
        return _entropy(weak_UC).mean()
    mask_U = _mask(weak_UC, algorithm, threshold).float()
    if algorithm == "pseudo_label":
        return (mask_U * _cross_entropy_to_argmax(weak_UC, weak_UC)).mean()
    strong_UC = _matching(strong_logits_UC, weak_UC, algorithm)
    if algorithm == "fixmatch":
        return (mask_U * _cross_entropy_to_argmax(weak_UC, strong_UC)).mean()
    return (mask_U * _sharpened_divergence(weak_UC, strong_UC, sharpening)).mean()


def unmasked_fraction(
    weak_logits_UC: Tensor, *, algorithm: Algorithm, threshold: float | None = None
) -> Tensor:
    """Returns the share of pseudo images that are not masked, float32 scalar; 1 for entropy_min."""
    if algorithm == "entropy_min":
        _reject_threshold(threshold)
        return torch.ones((), device=weak_logits_UC.device)
    return _mask(weak_logits_UC.float(), algorithm, threshold).float().mean()


def loss_weight(step: int, *, weight: float, num_steps: int) -> float:
    """Returns the unsupervised weight at a step: linear warm-up over the first tenth of the steps.

    lambda_t = weight * min(1, (t + 1) / ceil(num_steps / 10)), t = 0, 1, ...

    Raises:
        ValueError: a negative step or weight, or no steps.
    """
    if step < 0 or num_steps < 1 or weight < 0:
        raise ValueError(
            f"expected step >= 0, num_steps >= 1 and weight >= 0, got {step}, {num_steps}, {weight}"
        )
    warm_up_steps = -(-num_steps // 10)  # the ceiling, exact in integers
    return weight * min(1.0, (step + 1) / warm_up_steps)


def _reject_threshold(threshold: float | None) -> None:
    if threshold is not None:
        raise ValueError(f"entropy_min has no threshold; got {threshold}")


def _mask(weak_UC: Tensor, algorithm: Algorithm, threshold: float | None) -> Tensor:
    limit = THRESHOLDS[algorithm] if threshold is None else threshold
    confidence_U = weak_UC.detach().softmax(dim=1).amax(dim=1)
    return confidence_U > limit if algorithm == "uda" else confidence_U >= limit


def _matching(strong_UC: Tensor | None, weak_UC: Tensor, algorithm: Algorithm) -> Tensor:
    if strong_UC is None or strong_UC.shape != weak_UC.shape:
        got = None if strong_UC is None else tuple(strong_UC.shape)
        raise ValueError(f"{algorithm} needs strong logits {tuple(weak_UC.shape)}, got {got}")
    return strong_UC.float()


def _entropy(logits_UC: Tensor) -> Tensor:
    log_p_UC = logits_UC.log_softmax(dim=1)
    return -(log_p_UC.exp() * log_p_UC).sum(dim=1)


def _cross_entropy_to_argmax(weak_UC: Tensor, logits_UC: Tensor) -> Tensor:
    return functional.cross_entropy(logits_UC, weak_UC.detach().argmax(dim=1), reduction="none")


def _sharpened_divergence(weak_UC: Tensor, strong_UC: Tensor, sharpening: float | None) -> Tensor:
    temperature = UDA_SHARPENING if sharpening is None else sharpening
    log_target_UC = (weak_UC.detach() / temperature).log_softmax(dim=1)
    log_ratio_UC = log_target_UC - strong_UC.log_softmax(dim=1)
    return (log_target_UC.exp() * log_ratio_UC).sum(dim=1)

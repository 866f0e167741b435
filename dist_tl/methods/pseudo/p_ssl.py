"""P-SSL: labelled target images and unlabelled pseudo samples in one loss.

    L = CE(f(x_B), y_B) + weight * l_u(f; pseudo_U)

Pseudo samples are not target images, and their effect on batch-norm statistics decides whether they
help or degrade a model; this module implements the two methods that work.

After Yamaguchi et al., arXiv:2204.12833.

Shape suffixes: B = labelled batch, U = pseudo batch, C = target classes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional

from dist_tl.config import StrictModel
from dist_tl.methods.pseudo.conditions import ConditionConfig, require_finite
from dist_tl.methods.pseudo.guard import GuardConfig
from dist_tl.methods.pseudo.losses import (
    TWO_VIEWS,
    Algorithm,
    unmasked_fraction,
    unsupervised_loss,
)

BatchNorm = Literal["joint", "separate"]


class PSSLConfig(StrictModel):
    """Use of pseudo samples in the training of the target network."""

    algorithm: Algorithm = Field(default="uda", description="The unsupervised loss.")
    weight: float = Field(
        default=0.1, ge=0, description="Weight lambda of the unsupervised loss; 0: off."
    )
    batchnorm: BatchNorm = Field(
        default="joint",
        description="joint: real and pseudo images in one pass, statistics of all images; "
        "separate: pseudo images in their own pass, running statistics unchanged.",
    )
    threshold: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Minimum confidence of a pseudo image; absent: the algorithm's default.",
    )
    sharpening: float | None = Field(
        default=None, gt=0, description="Temperature of UDA's target; absent: 0.4."
    )
    pseudo_per_labelled: int = Field(
        default=1, ge=1, description="Pseudo images per labelled image, U / B."
    )
    condition: ConditionConfig = Field(
        default_factory=ConditionConfig, description="Conditions of the generator."
    )
    lambda_guard: GuardConfig | Literal["off"] = Field(
        default_factory=GuardConfig,
        description="Cross-validation on the target labels that selects weight or 0; or off.",
    )

    @field_validator("lambda_guard", mode="before")
    @classmethod
    def _yaml_reads_off_as_false(cls, value: Any) -> Any:
        return "off" if value is False else value

    @model_validator(mode="after")
    def _options_belong_to_the_algorithm(self) -> "PSSLConfig":
        if self.sharpening is not None and self.algorithm != "uda":
            raise ValueError(f"sharpening belongs to uda; remove it for {self.algorithm}")
        if self.threshold is not None and self.algorithm == "entropy_min":
            raise ValueError("entropy_min has no threshold; remove it")
        return self


def supervised_loss(network: nn.Module, images_B: Tensor, labels_B: Tensor) -> Tensor:
    """Returns the mean cross-entropy in nats, float32: the loss of scratch training and of PP."""
    return functional.cross_entropy(network(images_B).float(), labels_B)


def pssl_loss(
    network: nn.Module,
    images_B: Tensor,
    labels_B: Tensor,
    weak_U: Tensor | None,
    strong_U: Tensor | None,
    *,
    weight: float,
    algorithm: Algorithm = "uda",
    batchnorm: BatchNorm = "joint",
    threshold: float | None = None,
    sharpening: float | None = None,
    sample_indices: Sequence[int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the P-SSL loss of one batch, a float32 scalar in nats, and its terms for logging.

    Weight 0 skips the pseudo branch: loss, gradients and buffers equal :func:`supervised_loss` bit
    for bit. With `batchnorm="separate"` pseudo images are normalised by their own batch statistics,
    and the weak pass of uda and fixmatch keeps no graph.

    Args:
        weak_U, strong_U: (U, channels, height, width) views of the same pseudo images, with the
            preprocessing of the real ones; strong_U is not used by pseudo_label and entropy_min,
            and neither view is used with weight 0.
        weight: lambda_t of :func:`~dist_tl.methods.pseudo.losses.loss_weight`.
        sample_indices: the pseudo samples' numbers, for messages.

    Returns:
        The loss, and detached float32 scalars "loss_supervised", "loss_unsupervised" (before the
        weight) and "unmasked" (share of pseudo images that are not masked).

    Raises:
        ValueError: weight < 0, or a view is missing or has another shape than the real images.
        NumericsError: a logit of a pseudo image is not finite; the message names the sample.
    """
    if weight < 0:
        raise ValueError(f"expected weight >= 0, got {weight}")
    if weight == 0:
        loss = supervised_loss(network, images_B, labels_B)
        return loss, _terms(loss, torch.zeros_like(loss), torch.zeros_like(loss))
    views = _views(images_B, weak_U, strong_U, algorithm)
    if batchnorm == "joint":
        logits_BC, *view_logits = _joint_pass(network, images_B, views)
    else:
        logits_BC = network(images_B)
        view_logits = _separate_passes(network, views)
    for logits_UC in view_logits:
        require_finite(logits_UC, name="logits of pseudo sample", sample_indices=sample_indices)
    weak_UC, strong_UC = view_logits[0], view_logits[-1]
    supervised = functional.cross_entropy(logits_BC.float(), labels_B)
    unsupervised = unsupervised_loss(
        weak_UC, strong_UC, algorithm=algorithm, threshold=threshold, sharpening=sharpening
    )
    unmasked = unmasked_fraction(weak_UC, algorithm=algorithm, threshold=threshold)
    return supervised + weight * unsupervised, _terms(supervised, unsupervised, unmasked)


@contextmanager
def frozen_running_statistics(network: nn.Module) -> Iterator[None]:
    """Makes normalisation layers use batch statistics without updating running statistics."""
    # The pass uses copies: restoring values in place would increment the version of tensors that
    # the labelled pass has saved for its backward pass.
    tracking = [part for part in network.modules() if "running_mean" in part._buffers]
    originals = [dict(part._buffers) for part in tracking]
    for part, buffers in zip(tracking, originals, strict=True):
        for name, buffer in buffers.items():
            part._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for part, buffers in zip(tracking, originals, strict=True):
            part._buffers.update(buffers)


def _views(
    images_B: Tensor, weak_U: Tensor | None, strong_U: Tensor | None, algorithm: Algorithm
) -> list[Tensor]:
    named = {"weak": weak_U, "strong": strong_U} if algorithm in TWO_VIEWS else {"weak": weak_U}
    shape = tuple(images_B.shape[1:])
    views: list[Tensor] = []
    for name, view in named.items():
        if view is None or tuple(view.shape[1:]) != shape:
            got = None if view is None else tuple(view.shape)
            raise ValueError(f"expected the {name} view of pseudo images (U, *{shape}), got {got}")
        views.append(view)
    return views


def _joint_pass(network: nn.Module, images_B: Tensor, views: list[Tensor]) -> tuple[Tensor, ...]:
    sizes = [len(images_B), *(len(view) for view in views)]
    return network(torch.cat([images_B, *views])).split(sizes)


def _separate_passes(network: nn.Module, views: list[Tensor]) -> list[Tensor]:
    with frozen_running_statistics(network):
        if len(views) == 1:
            return [network(views[0])]
        with torch.no_grad():
            weak_UC = network(views[0])
        return [weak_UC, network(views[1])]


def _terms(supervised: Tensor, unsupervised: Tensor, unmasked: Tensor) -> dict[str, Tensor]:
    return {
        "loss_supervised": supervised.detach(),
        "loss_unsupervised": unsupervised.detach(),
        "unmasked": unmasked.detach(),
    }

"""Training objectives: small classes around the losses in `methods`.

An objective maps (module, batch, step) to a mean loss and figures to log. It holds the other
inputs of the loss: a teacher, a schedule, a seed.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_tl.config import StrictModel
from dist_tl.methods.hub.losses import HubLossConfig, hub_loss
from dist_tl.methods.hub.pathway import Paths
from dist_tl.methods.pseudo.distillation import (
    DistillationConfig,
    logit_matching_loss,
    soft_targets_loss,
)
from dist_tl.methods.pseudo.losses import loss_weight
from dist_tl.methods.pseudo.p_ssl import PSSLConfig, pssl_loss, supervised_loss
from dist_tl.seeds import torch_rng
from dist_tl.train.feeds import Batch

Figures = dict[str, Tensor]
Objective = Callable[[nn.Module, Batch, int], tuple[Tensor, Figures]]


class SupervisedSpec(StrictModel):
    """Cross-entropy with the labels: scratch, fine-tuning and pseudo pre-training."""

    kind: Literal["supervised"] = "supervised"


class PSSLSpec(StrictModel):
    """P-SSL on labelled target images and unlabelled pseudo samples."""

    kind: Literal["p_ssl"] = "p_ssl"
    p_ssl: PSSLConfig


class DistillationSpec(StrictModel):
    """Distillation from the labels and a teacher's logits."""

    kind: Literal["distillation"] = "distillation"
    distillation: DistillationConfig
    teacher: str | tuple[str, ...] = Field(
        description="Location of the teacher's model files; several teachers are averaged."
    )


class DiffusionSpec(StrictModel):
    """Class-conditional denoising, which trains the demo's generator."""

    kind: Literal["diffusion"] = "diffusion"


class ReadoutSpec(StrictModel):
    """Penalised logistic regression of two classes on a frozen trunk: a convex problem.

    With w = sqrt(K) (h_1 - h_0), where h are the rows of the head and K is its input width, the
    minimised function is sum log(1 + exp(-y w.v / sqrt(K))) + (penalty / 2) |w|^2 with y = -1, +1.
    """

    kind: Literal["readout"] = "readout"
    penalty: float = Field(
        gt=0, description="Weight of the L2 penalty, relative to the loss summed over all rows."
    )
    num_rows: int = Field(ge=1, description="Number of rows in that sum.")


class HubSpec(StrictModel):
    """Task loss of the hub, exploration of all experts, and the experts' own loss."""

    kind: Literal["hub"] = "hub"
    loss: HubLossConfig


ObjectiveSpec = Annotated[
    SupervisedSpec | PSSLSpec | DistillationSpec | DiffusionSpec | ReadoutSpec | HubSpec,
    Field(discriminator="kind"),
]


def supervised(module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Figures]:
    """Returns the mean cross-entropy over the batch, in nats."""
    return supervised_loss(module, batch.images, batch.labels), {}


class ReadoutFit:
    """Loss of :class:`ReadoutSpec`. Weight decay in the optimizer would change the optimum."""

    def __init__(self, config: ReadoutSpec) -> None:
        self._config = config

    def __call__(self, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Figures]:
        fit = supervised_loss(module, batch.images, batch.labels)
        assert isinstance(module.head, nn.Linear), "a readout has a linear head"
        head_CK = module.head.weight
        weight_K = head_CK[1] - head_CK[0]
        penalty = self._config.penalty * len(weight_K) / (2 * self._config.num_rows)
        return fit + penalty * weight_K.square().sum(), {"fit": fit.detach()}


class PSSL:
    """P-SSL loss with a warm-up of its weight."""

    def __init__(self, config: PSSLConfig, num_steps: int) -> None:
        self._config, self._num_steps = config, num_steps

    def __call__(self, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Figures]:
        config = self._config
        return pssl_loss(
            module,
            batch.images,
            batch.labels,
            batch.weak,
            batch.strong,
            weight=loss_weight(step, weight=config.weight, num_steps=self._num_steps),
            algorithm=config.algorithm,
            batchnorm=config.batchnorm,
            threshold=config.threshold,
            sharpening=config.sharpening,
            sample_indices=batch.numbers,
        )


class Distillation:
    """Distillation; teacher and student see the same augmented images."""

    def __init__(self, config: DistillationConfig, teacher: nn.Module) -> None:
        self._config, self._teacher = config, teacher.eval().requires_grad_(False)

    def __call__(self, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Figures]:
        with torch.no_grad():
            teacher = self._teacher(batch.images)
        student = module(batch.images)
        if self._config.kind == "logit_matching":
            return logit_matching_loss(student, teacher), {}
        loss = soft_targets_loss(
            student,
            teacher,
            batch.labels,
            temperature=self._config.temperature,
            label_weight=self._config.label_weight,
        )
        return loss, {}


class Hub:
    """Hub-Pathway loss. Router noise is drawn per lane, independent of the world size."""

    def __init__(self, config: HubLossConfig, seed: int, num_experts: int) -> None:
        self._config, self._seed, self._num_experts = config, seed, num_experts

    def __call__(self, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Figures]:
        size = (len(batch.images) // len(batch.lanes), self._num_experts)
        draws = [
            torch.randn(size, generator=torch_rng(self._seed, "router noise", step, lane))
            for lane in batch.lanes
        ]
        noise = torch.cat(draws).to(batch.images.device)
        paths = Paths(*module(batch.images, noise, detailed=True))
        return hub_loss(
            paths.logits_BC,
            paths.expert_logits_BMC,
            paths.active_BM,
            paths.p_BM,
            batch.labels,
            self._config,
        )


class Diffusion:
    """Denoising loss. Noise and times are drawn per lane, independent of the world size."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Figures]:
        images = batch.images.chunk(len(batch.lanes))
        labels = batch.labels.chunk(len(batch.lanes))
        losses = [
            # A call, not a method: ZeRO-3 gathers the weights in the hooks of a call.
            module(x, y, rng=torch_rng(self._seed, "diffusion", step, lane))
            for x, y, lane in zip(images, labels, batch.lanes, strict=True)
        ]
        return torch.stack(losses).mean(), {}

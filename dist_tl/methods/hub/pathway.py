"""The hub as one module: router, experts with heads, sparse dispatch, aggregator.

After Hub-Pathway (see the package). Every sample passes through its K experts only. In training
each process calls all experts in the order of the hub, so that the collectives of sharded
parameters match: an expert without samples processes one blank sample of weight zero.

Shape suffixes: B = samples, M = experts, C = target classes, S = samples of one expert.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dist_tl.methods.hub.controls import chance_logits
from dist_tl.methods.hub.routes import RouteConfig, Routes, choose, noisy_logits

MIN_BATCHNORM_ROWS = 8
BatchNorm = Literal["frozen", "train"]


class Paths(NamedTuple):
    """Outputs of a forward pass for losses and reports.

    Attributes:
        logits_BC: the hub's logits.
        expert_logits_BMC: logits of each active expert; 0 for inactive experts.
        active_BM, weight_BM, p_BM: see :class:`Routes`.
    """

    logits_BC: Tensor
    expert_logits_BMC: Tensor
    active_BM: Tensor
    weight_BM: Tensor
    p_BM: Tensor


class Preference(nn.Module):
    """The router of the static control: equal logits for all inputs, initially 0."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2 * num_experts))

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits repeated for each image, (B, 2M)."""
        return self.logits.expand(len(images), -1)


class HubPathway(nn.Module):
    """logits = aggregator(weights x expert logits), experts chosen by input.

    Args:
        experts: experts by name, in the order of the hub; each maps images to logits (S, C).
        router: maps images to (B, 2M), centres and raw noise scales; None for random routes.
        num_classes: C.
        batchnorm: "frozen": experts use their running statistics; "train": they use and update the
            statistics of sub-batches of at least 8 samples.

    Raises:
        ValueError: more active experts per sample than experts, or a missing or unused router.
    """

    def __init__(
        self,
        experts: Mapping[str, nn.Module],
        router: nn.Module | None,
        *,
        num_classes: int,
        routes: RouteConfig,
        batchnorm: BatchNorm = "frozen",
    ) -> None:
        super().__init__()
        routes.check(len(experts))
        if (router is None) != (routes.by == "random"):
            raise ValueError(
                f"expected a router unless routes are random, got routes by {routes.by}"
            )
        self.experts = nn.ModuleDict(experts)
        self.router = router
        self.aggregator = sum_of_slots(len(experts), num_classes)
        self.num_classes, self.routes, self.batchnorm = num_classes, routes, batchnorm
        self.train()

    def train(self, mode: bool = True) -> "HubPathway":
        """Sets the mode; batch norm of the experts stays in eval mode if it is frozen."""
        super().train(mode)
        for expert in self.experts.values():
            _train_batchnorm(expert, mode and self.batchnorm == "train")
        return self

    def forward(
        self, images: Tensor, noise_BM: Tensor | None = None, *, detailed: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        """Returns logits (B, C), or with `detailed` the fields of :class:`Paths` as a plain tuple.

        Args:
            noise_BM: standard normal draws in training; None in evaluation.

        Raises:
            NumericsError: the router's logits are not finite.
        """
        routes = choose(self.route_logits(images, noise_BM), self.routes)
        expert_logits = [
            self._run(expert, images, routes.active_BM[:, i])
            for i, expert in enumerate(self.experts.values())
        ]
        expert_logits_BMC = torch.stack(expert_logits, dim=1)
        logits_BC = combine(self.aggregator, expert_logits_BMC, routes)
        if not detailed:
            return logits_BC
        # A plain tuple: DeepSpeed ZeRO-3 rebuilds outputs and does not support named tuples.
        return tuple(Paths(logits_BC, expert_logits_BMC, routes[1], routes[2], routes[0]))

    def route_logits(self, images: Tensor, noise_BM: Tensor | None = None) -> Tensor:
        """Returns the router's logits z (B, M), float32."""
        if self.router is None:
            return chance_logits(images, len(self.experts)) if noise_BM is None else noise_BM
        return noisy_logits(self.router(images), noise_BM if self.routes.noise else None)

    def _run(self, expert: nn.Module, images: Tensor, active_B: Tensor) -> Tensor:
        rows = active_B.nonzero().squeeze(1)
        if self.training and self.batchnorm == "train":
            _train_batchnorm(expert, len(rows) >= MIN_BATCHNORM_ROWS)
        if len(rows) == 0:
            return self._no_samples(expert, images)
        logits_SC = expert(images[rows]).float()
        return logits_SC.new_zeros(len(images), self.num_classes).index_copy(0, rows, logits_SC)

    def _no_samples(self, expert: nn.Module, images: Tensor) -> Tensor:
        zeros = images.new_zeros(len(images), self.num_classes, dtype=torch.float32)
        if not self.training:
            return zeros
        # Zero gradients instead of None: the same on one rank and on many.
        return zeros + 0.0 * expert(torch.zeros_like(images[:1])).float().sum()


def sum_of_slots(num_experts: int, num_classes: int) -> nn.Linear:
    """Returns the initial aggregator: the sum over experts of their logits."""
    aggregator = nn.Linear(num_experts * num_classes, num_classes)
    with torch.no_grad():
        aggregator.weight.copy_(torch.eye(num_classes).repeat(1, num_experts))
        aggregator.bias.zero_()
    return aggregator


def combine(aggregator: nn.Linear, expert_logits_BMC: Tensor, routes: Routes) -> Tensor:
    """Combines the experts' logits (B, M, C) to (B, C): A concat_i(w_i f_i)."""
    slots_BMC = expert_logits_BMC * routes.weight_BM[:, :, None]
    return aggregator(slots_BMC.flatten(1).to(aggregator.weight.dtype))


def _train_batchnorm(expert: nn.Module, mode: bool) -> None:
    for module in expert.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(mode)

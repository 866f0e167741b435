"""Routes and weights from router logits: the experts of a sample and their weights.

After Hub-Pathway (see the package). With the dense gate a weight is the expert's share of the
softmax over all experts, so that a single expert (k = 1) has a weight below 1 and the router
learns.

Shape suffixes: B = samples, M = experts in the hub, K = experts active per sample.
"""

from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from dist_tl.config import StrictModel
from dist_tl.errors import NumericsError

MIN_SCALE = 1e-2


class RouteConfig(StrictModel):
    """Number, selection and weighting of the experts of a sample."""

    k: int = Field(default=2, ge=1, description="Number of active experts per sample.")
    gate: Literal["dense", "topk"] = Field(
        default="dense",
        description="Softmax over all experts (dense) or active experts only (topk).",
    )
    by: Literal["input", "static", "random"] = Field(
        default="input",
        description="Route by input (a router), by one learned preference for all inputs (static), "
        "or at random with equal weights. The last two are controls.",
    )
    noise: bool = Field(
        default=True, description="Add learned noise to the router's logits in training."
    )

    @model_validator(mode="after")
    def _router_can_learn(self) -> Self:
        if self.gate == "topk" and self.k == 1:
            raise ValueError(
                "gate topk with k = 1: a softmax over one expert is always 1, so the router gets "
                "no gradient from the task; use gate: dense"
            )
        return self

    def check(self, num_experts: int) -> None:
        """Checks that the hub has at least `k` experts.

        Raises:
            ValueError: `k` exceeds the number of experts.
        """
        if self.k > num_experts:
            raise ValueError(f"k: expected at most {num_experts} experts, got {self.k}")


class Routes(NamedTuple):
    """Experts and weights of a batch.

    Attributes:
        p_BM: softmax of the logits, float32.
        active_BM: whether the expert processes the sample; K true entries per row.
        weight_BM: float32, exactly 0 for inactive experts.
    """

    p_BM: Tensor
    active_BM: Tensor
    weight_BM: Tensor


def noisy_logits(raw_B2M: Tensor, noise_BM: Tensor | None) -> Tensor:
    """Returns z = c + eta s with s = softplus(n) + 1e-2, or c without noise; float32 (B, M).

    Args:
        raw_B2M: the router's output, c and n concatenated.
        noise_BM: standard normal numbers; None in evaluation.

    Raises:
        NumericsError: a logit is not finite.
    """
    centre_BM, spread_BM = raw_B2M.float().chunk(2, dim=1)
    z_BM = centre_BM
    if noise_BM is not None:
        z_BM = centre_BM + noise_BM * (functional.softplus(spread_BM) + MIN_SCALE)
    if not bool(z_BM.isfinite().all()):
        raise NumericsError("the router's logits are not finite; lower the learning rate")
    return z_BM


def choose(z_BM: Tensor, config: RouteConfig, *, missing: frozenset[int] = frozenset()) -> Routes:
    """Routes every sample to the K experts of largest logits; ties go to the lowest index.

    Args:
        missing: unavailable experts; the others share their weight.

    Raises:
        ValueError: fewer than K experts are available.
    """
    if z_BM.shape[1] - len(missing) < config.k:
        raise ValueError(
            f"{z_BM.shape[1] - len(missing)} experts are available, every sample needs {config.k}"
        )
    if missing:
        missing_M = torch.zeros(z_BM.shape[1], dtype=torch.bool, device=z_BM.device)
        missing_M[list(missing)] = True
        z_BM = z_BM.masked_fill(missing_M, float("-inf"))
    p_BM = z_BM.softmax(dim=1)
    # A stable sort, so that ties go to the lowest index; topk guarantees no order.
    best_BK = z_BM.sort(dim=1, descending=True, stable=True).indices[:, : config.k]
    active_BM = torch.zeros_like(z_BM, dtype=torch.bool).scatter(1, best_BK, True)
    return Routes(p_BM, active_BM, _weights(z_BM, p_BM, active_BM, config))


def _weights(z_BM: Tensor, p_BM: Tensor, active_BM: Tensor, config: RouteConfig) -> Tensor:
    if config.by == "random":
        return active_BM.float() / config.k
    if config.gate == "topk":
        return z_BM.masked_fill(~active_BM, float("-inf")).softmax(dim=1)
    chosen_BM = p_BM * active_BM
    return chosen_BM if config.k == 1 else chosen_BM / chosen_BM.sum(dim=1, keepdim=True)

"""From router logits to routes and weights: which experts see a sample, and how much each counts.

After Hub-Pathway (see the package). With the dense gate a weight is the expert's share of the
softmax over all experts, so that one expert alone (k = 1) is still weighed, and the router learns.

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
    """How many experts see a sample, and what chooses and weighs them."""

    k: int = Field(default=2, ge=1, description="Experts active per sample.")
    gate: Literal["dense", "topk"] = Field(
        default="dense", description="Softmax over all experts, or over the chosen ones only."
    )
    by: Literal["input", "static", "random"] = Field(
        default="input",
        description="What decides: the input (a router), one learned preference for all inputs, or "
        "chance, with equal weights. The last two are controls.",
    )
    noise: bool = Field(
        default=True, description="Learned noise on the router's logits in training."
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
        """Refuse more active experts than there are.

        Raises:
            ValueError: `k` exceeds the hub.
        """
        if self.k > num_experts:
            raise ValueError(f"k: {self.k} of {num_experts} experts cannot be active at a time")


class Routes(NamedTuple):
    """Where samples go.

    Attributes:
        p_BM: softmax of the logits, float32.
        active_BM: whether the expert sees the sample; K a row.
        weight_BM: float32, exactly 0 where not active.
    """

    p_BM: Tensor
    active_BM: Tensor
    weight_BM: Tensor


def noisy_logits(raw_B2M: Tensor, noise_BM: Tensor | None) -> Tensor:
    """z = c + eta s with s = softplus(n) + 1e-2; c without noise. Float32 (B, M).

    Args:
        raw_B2M: the router's output, c and n side by side.
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
    """The K largest logits of every sample, ties to the lowest index, and their weights.

    Args:
        missing: experts that are lost; the others share their weight.

    Raises:
        ValueError: fewer than K experts are left.
    """
    if z_BM.shape[1] - len(missing) < config.k:
        raise ValueError(
            f"{z_BM.shape[1] - len(missing)} experts are left, {config.k} are needed for a sample"
        )
    if missing:
        lost_M = torch.zeros(z_BM.shape[1], dtype=torch.bool, device=z_BM.device)
        lost_M[list(missing)] = True
        z_BM = z_BM.masked_fill(lost_M, float("-inf"))
    p_BM = z_BM.softmax(dim=1)
    # Stable, so that equal logits go to the lowest index; topk promises no order.
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

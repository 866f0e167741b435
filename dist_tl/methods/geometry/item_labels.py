"""Mode A: each item is vertex 0 of a simplex that grows greedily through the anchors.

In each step all candidates share the content so far, so the candidate of extremal content is the
one of extremal height over the flat of the selected anchors: a pivot of a partial Cholesky
factorisation. No determinant is computed. The order of the selected anchors is the item's label.

After Kender et al., arXiv:2207.03554; the notes' Mode A.

Shape suffixes: N = items, M = anchors, D = feature width, m = length of a label.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError, NumericsError

TOLERANCE = 1e-7  # relative to the item's scale: heights up to this count as zero


class LabelConfig(StrictModel):
    """Construction of an item's label, a tuple of anchors."""

    m: int = Field(default=3, ge=1, description="Number of anchors in a label.")
    start: Literal["nearest", "farthest"] = Field(
        default="nearest", description="Selection of the first anchor."
    )
    grow: Literal["max", "min"] = Field(
        default="max", description="Maximise or minimise the content of each larger simplex."
    )
    factor: Literal["cholesky", "qr"] = Field(
        default="cholesky",
        description="qr is slower, and exact for small heights (grow: min).",
    )


@dataclass(frozen=True, eq=False)
class Anchors:
    """Centred anchor points.

    Attributes:
        origin_D: mean of the anchors; it is subtracted before computing distances, because large
            offsets cause cancellation.
        points_MD: centred anchors, float64.
        sq_dist_MM: squared distances between anchors.
    """

    origin_D: Tensor
    points_MD: Tensor
    sq_dist_MM: Tensor

    @classmethod
    def of(cls, points_MD: Tensor) -> "Anchors":
        """Builds anchors from points.

        Raises:
            ConfigError: no points, or two equal points.
            NumericsError: a coordinate is not finite.
        """
        points_MD = points_MD.double()
        if points_MD.ndim != 2 or len(points_MD) < 1:
            raise ConfigError(f"expected anchors (M, D), M >= 1, got {tuple(points_MD.shape)}")
        if not bool(points_MD.isfinite().all()):
            raise NumericsError(
                "an anchor is NaN or infinite; check the features that it is the mean of"
            )
        origin_D = points_MD.mean(dim=0)
        centred_MD = points_MD - origin_D
        sq_dist_MM = torch.cdist(
            centred_MD, centred_MD, compute_mode="donot_use_mm_for_euclid_dist"
        )
        sq_dist_MM = sq_dist_MM.square()
        _reject_duplicates(sq_dist_MM)
        return cls(origin_D, centred_MD, sq_dist_MM)


@dataclass(frozen=True, eq=False)
class ItemLabels:
    """Labels of N items.

    Attributes:
        tuples_Nm: int64 anchor indices, distinct within a row.
        heights_Nm: height of each anchor when selected, float64; for the first, its distance.
        degenerate_N: whether a height counts as zero, so that the selection is arbitrary.
        margin_N: smallest relative lead of the selected height over that of the next candidate.
    """

    tuples_Nm: Tensor
    heights_Nm: Tensor
    degenerate_N: Tensor
    margin_N: Tensor


def label_items(features_ND: Tensor, anchors: Anchors, config: LabelConfig) -> ItemLabels:
    """Labels every item independently.

    Raises:
        ConfigError: m exceeds the number of anchors.
        NumericsError: a feature is not finite; the message names the item.
    """
    count = len(anchors.points_MD)
    if config.m > count:
        raise ConfigError(f"labels: m = {config.m} exceeds the number of anchors, {count}")
    x_ND = features_ND.double() - anchors.origin_D
    finite_N = x_ND.isfinite().all(dim=1)
    if not bool(finite_N.all()):
        item = int((~finite_N).nonzero()[0])
        raise NumericsError(f"the feature of item {item} is NaN or infinite")
    sq_dist_NM = _sq_distances(x_ND, anchors.points_MD)
    if config.factor == "qr":
        return _grow(_QRHeights(x_ND, anchors.points_MD), sq_dist_NM, config)
    return _grow(_CholeskyHeights(sq_dist_NM, anchors.sq_dist_MM), sq_dist_NM, config)


def _sq_distances(x_ND: Tensor, a_MD: Tensor) -> Tensor:
    own_N, other_M = x_ND.square().sum(dim=1), a_MD.square().sum(dim=1)
    return (own_N[:, None] + other_M - 2 * x_ND @ a_MD.T).clamp_min(0.0)


def _grow(heights: "_Heights", sq_dist_NM: Tensor, config: LabelConfig) -> ItemLabels:
    count, width = sq_dist_NM.shape
    scale_N = sq_dist_NM.amax(dim=1).sqrt()
    used_NM = torch.zeros(count, width, dtype=torch.bool)
    degenerate_N = torch.zeros(count, dtype=torch.bool)
    margin_N = torch.full((count,), math.inf, dtype=torch.float64)
    picks, heights_picked = [], []
    for step in range(config.m):
        wants_max = (config.start == "farthest") if step == 0 else (config.grow == "max")
        height_NM = heights.squared().clamp_min(0.0).sqrt()
        flat_NM = height_NM <= TOLERANCE * scale_N[:, None] if step else torch.zeros_like(used_NM)
        pick_N, lead_N = _choose(height_NM, used_NM, flat_NM, wants_max)
        picked_N1 = pick_N[:, None]
        degenerate_N |= flat_NM.gather(1, picked_N1)[:, 0]
        picks.append(pick_N)
        heights_picked.append(height_NM.gather(1, picked_N1)[:, 0])
        margin_N = torch.minimum(margin_N, lead_N / scale_N.clamp_min(1e-300))
        used_NM.scatter_(1, picked_N1, True)
        heights.fix(pick_N, TOLERANCE * scale_N)
    return ItemLabels(
        torch.stack(picks, dim=1), torch.stack(heights_picked, dim=1), degenerate_N, margin_N
    )


def _choose(
    height_NM: Tensor, used_NM: Tensor, flat_NM: Tensor, wants_max: bool
) -> tuple[Tensor, Tensor]:
    """Returns the extremal unused anchor, ties to the lowest index, and its lead over the next.

    Flat candidates come last: for max they are the smallest, for min they are skipped while others
    remain. If only flat candidates remain, the lowest unused index is selected.
    """
    key_NM = height_NM if wants_max else -height_NM
    key_NM = key_NM.masked_fill(flat_NM, -1e300)
    key_NM = key_NM.masked_fill(used_NM, -math.inf)
    best_N1 = key_NM.amax(dim=1, keepdim=True)
    pick_N = (key_NM == best_N1).int().argmax(dim=1)  # the first of equal values
    rest_NM = key_NM.scatter(1, pick_N[:, None], -math.inf)
    lead_N = best_N1[:, 0] - rest_NM.amax(dim=1)
    return pick_N, torch.where(lead_N.isfinite(), lead_N, math.inf)


class _Heights:
    """Squared heights of all anchors over the flat of each item and its selected anchors."""

    def squared(self) -> Tensor:
        """Returns squared heights (N, M), float64."""
        raise NotImplementedError

    def fix(self, pick_N: Tensor, tolerance_N: Tensor) -> None:
        """Adds the selected anchors to the flats."""
        raise NotImplementedError


class _CholeskyHeights(_Heights):
    """Heights from distances only: one row of a Cholesky factor per step."""

    def __init__(self, sq_dist_NM: Tensor, anchors_MM: Tensor) -> None:
        self._sq_dist_NM, self._anchors_MM = sq_dist_NM, anchors_MM
        self._left_NM = sq_dist_NM.clone()
        self._rows: list[Tensor] = []

    def squared(self) -> Tensor:
        return self._left_NM

    def fix(self, pick_N: Tensor, tolerance_N: Tensor) -> None:
        picked_N1 = pick_N[:, None]
        own_N1 = self._sq_dist_NM.gather(1, picked_N1)
        row_NM = 0.5 * (own_N1 + self._sq_dist_NM - self._anchors_MM[pick_N])
        for earlier_NM in self._rows:
            row_NM = row_NM - earlier_NM.gather(1, picked_N1) * earlier_NM
        height_N1 = self._left_NM.gather(1, picked_N1).clamp_min(0.0).sqrt()
        steep_N1 = height_N1 > tolerance_N[:, None]
        row_NM = torch.where(steep_N1, row_NM / height_N1.clamp_min(1e-300), 0.0)
        self._rows.append(row_NM)
        self._left_NM = (self._left_NM - row_NM.square()).clamp_min(0.0)


class _QRHeights(_Heights):
    """Heights from differences by Gram-Schmidt, applied twice: exact but D times more costly."""

    def __init__(self, x_ND: Tensor, anchors_MD: Tensor) -> None:
        self._left_NMD = anchors_MD[None] - x_ND[:, None]

    def squared(self) -> Tensor:
        return self._left_NMD.square().sum(dim=2)

    def fix(self, pick_N: Tensor, tolerance_N: Tensor) -> None:
        index = pick_N[:, None, None].expand(-1, 1, self._left_NMD.shape[2])
        v_ND = self._left_NMD.gather(1, index)[:, 0]
        length_N1 = v_ND.norm(dim=1, keepdim=True)
        unit_ND = torch.where(
            length_N1 > tolerance_N[:, None], v_ND / length_N1.clamp_min(1e-300), 0.0
        )
        for _ in range(2):
            along_NM = (self._left_NMD @ unit_ND[:, :, None])[:, :, 0]
            self._left_NMD = self._left_NMD - along_NM[:, :, None] * unit_ND[:, None]


def _reject_duplicates(sq_dist_MM: Tensor) -> None:
    scale = float(sq_dist_MM.max())
    same = (sq_dist_MM <= (TOLERANCE**2) * scale).fill_diagonal_(False)
    if bool(same.any()):
        one, other = (int(i) for i in same.nonzero()[0])
        raise ConfigError(
            f"anchors {one} and {other} are equal; anchors must be distinct: remove one, or use "
            "other source sets"
        )

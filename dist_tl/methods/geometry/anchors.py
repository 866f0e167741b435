"""Mode B: selects anchors among points, greedily by maximum volume, as a map-reduce.

Every chunk stores its points' squared heights over the flat of the selected anchors, and its rows
of the Cholesky factor. In each step every chunk proposes one point, and all chunks receive the best
one; the anchors do not depend on the chunks. Equivalent to QR with column pivoting of the
differences to vertex 0, the point farthest from the mean.

After Kender et al., arXiv:2207.03554; the notes' Mode B.

Shape suffixes: N = points of a chunk, D = feature width, j = anchors selected so far.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_tl.errors import ConfigError, NumericsError
from dist_tl.methods.geometry.item_labels import TOLERANCE


@dataclass(frozen=True, eq=False)
class Proposal:
    """A chunk's best candidate: squared height, global index, point and row of the factor."""

    sq_height: float
    index: int
    point_D: Tensor
    factor_j: Tensor


class AnchorChunk:
    """The points of one chunk, with global indices starting at `first`."""

    def __init__(self, points_ND: Tensor, first: int) -> None:
        if not bool(points_ND.isfinite().all()):
            row = int((~points_ND.isfinite().all(dim=1)).nonzero()[0])
            raise NumericsError(f"the feature of item {first + row} is NaN or infinite")
        self._points_ND, self._first = points_ND.double(), first
        self._taken: list[int] = []

    def answer(self, name: str, *arguments: object) -> object:
        """Calls a method below by name, for chunks in other processes."""
        return getattr(self, name)(*arguments)

    def sums(self) -> tuple[int, Tensor]:
        """Returns the number of points and their sum, for the mean of all chunks."""
        return len(self._points_ND), self._points_ND.sum(dim=0)

    def farthest(self, mean_D: Tensor) -> Proposal:
        """Returns the point farthest from the mean, the candidate for vertex 0."""
        return self._best((self._points_ND - mean_D).square().sum(dim=1), self._points_ND[:, :0])

    def begin(self, vertex: Proposal) -> None:
        """Initialises all heights relative to vertex 0."""
        self._origin_D = vertex.point_D
        self._differences_ND = self._points_ND - self._origin_D
        self._left_N = self._differences_ND.square().sum(dim=1)
        self._factor_Nj = self._points_ND.new_zeros(len(self._points_ND), 0)
        self._exclude(vertex.index)

    def propose(self) -> Proposal:
        """Returns the point of largest height that is not selected yet."""
        return self._best(self._left_N, self._factor_Nj)

    def accept(self, chosen: Proposal) -> None:
        """Adds the selected point to the flat and updates all heights."""
        along_N = self._differences_ND @ (chosen.point_D - self._origin_D)
        along_N = along_N - self._factor_Nj @ chosen.factor_j
        column_N = along_N / math.sqrt(chosen.sq_height)
        self._factor_Nj = torch.cat([self._factor_Nj, column_N[:, None]], dim=1)
        self._left_N = (self._left_N - column_N.square()).clamp_min(0.0)
        self._exclude(chosen.index)

    def _exclude(self, index: int) -> None:
        row = index - self._first
        if 0 <= row < len(self._points_ND):
            self._taken.append(row)
        self._left_N[self._taken] = -math.inf

    def _best(self, value_N: Tensor, factor_Nj: Tensor) -> Proposal:
        best = float(value_N.max()) if len(value_N) else -math.inf
        if best == -math.inf:
            return Proposal(-math.inf, 2**62, torch.empty(0), torch.empty(0))
        row = int((value_N == best).int().argmax())
        return Proposal(best, self._first + row, self._points_ND[row], factor_Nj[row])


def choose(proposals: Sequence[Proposal]) -> Proposal:
    """Returns the proposal of largest height; ties go to the lowest index."""
    return max(proposals, key=lambda proposal: (proposal.sq_height, -proposal.index))


def choose_anchors(chunks: Sequence[AnchorChunk], m: int) -> list[int]:
    """Selects m anchors with all chunks in this process; returns global indices in order.

    Raises:
        ConfigError: fewer points than m, or m exceeds the affine rank of the points.
    """

    def call_all(name: str, *arguments: object) -> list:
        return [chunk.answer(name, *arguments) for chunk in chunks]

    return [proposal.index for proposal in drive_choice(call_all, m)]


def drive_choice(
    call_all: Callable[..., list], m: int, *, on_step: Callable[[int], None] = lambda step: None
) -> list[Proposal]:
    """Selects m anchors over chunks in any processes.

    Args:
        call_all: calls `AnchorChunk.answer` of every chunk with the given arguments and returns
            the results in a fixed order.
        on_step: called with the number of selected anchors before each further step.

    Raises:
        ConfigError: as :func:`choose_anchors`.
    """
    counts, sums = zip(*call_all("sums"), strict=True)
    if not 1 <= m <= sum(counts):
        raise ConfigError(f"anchors: expected 1 to {sum(counts)} (number of points), got {m}")
    vertex = choose(call_all("farthest", torch.stack(sums).sum(dim=0) / sum(counts)))
    call_all("begin", vertex)
    chosen, scale = [vertex], 0.0
    while len(chosen) < m:
        on_step(len(chosen))
        best = choose(call_all("propose"))
        scale = scale or math.sqrt(max(best.sq_height, 0.0))
        _check_height(best, scale, chosen=len(chosen), m=m)
        call_all("accept", best)
        chosen.append(best)
    return chosen


def _check_height(best: Proposal, scale: float, *, chosen: int, m: int) -> None:
    """Checks that a point lies off the flat of the selected anchors.

    Raises:
        ConfigError: none does; the message names the affine rank.
    """
    if not math.sqrt(max(best.sq_height, 0.0)) > TOLERANCE * scale:
        raise ConfigError(
            f"anchors: expected at most {chosen}, got {m}: all points lie in the flat of {chosen} "
            f"anchors; set {chosen} or fewer, or use features of more dimensions"
        )

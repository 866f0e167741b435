"""Mode B: choose anchors among points, greedily of maximum volume, as a map-reduce.

Every chunk keeps its points' squared heights over the flat of those chosen, and its rows of the
Cholesky factor. A step takes one proposal from each chunk, and gives one point back to all: the
same anchors for any cut into chunks. Equal to QR with column pivoting of the differences to
vertex 0, the point farthest from the mean.

After Kender et al., arXiv:2207.03554; the notes' Mode B.

Shape suffixes: N = points of a chunk, D = feature width, j = anchors chosen so far.
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
    """A chunk's best candidate: its squared height, its global index, its point and factor row."""

    sq_height: float
    index: int
    point_D: Tensor
    factor_j: Tensor


class AnchorChunk:
    """The points of one chunk; global indices from `first` on."""

    def __init__(self, points_ND: Tensor, first: int) -> None:
        if not bool(points_ND.isfinite().all()):
            row = int((~points_ND.isfinite().all(dim=1)).nonzero()[0])
            raise NumericsError(f"the feature of item {first + row} is NaN or infinite")
        self._points_ND, self._first = points_ND.double(), first
        self._taken: list[int] = []

    def answer(self, name: str, *arguments: object) -> object:
        """One of the methods below by its name, for chunks that are asked from afar."""
        return getattr(self, name)(*arguments)

    def sums(self) -> tuple[int, Tensor]:
        """Number of points and their sum, for the mean of all chunks."""
        return len(self._points_ND), self._points_ND.sum(dim=0)

    def farthest(self, mean_D: Tensor) -> Proposal:
        """The point farthest from the mean: the candidate for vertex 0."""
        return self._best((self._points_ND - mean_D).square().sum(dim=1), self._points_ND[:, :0])

    def begin(self, vertex: Proposal) -> None:
        """Measure all heights from vertex 0."""
        self._origin_D = vertex.point_D
        self._differences_ND = self._points_ND - self._origin_D
        self._left_N = self._differences_ND.square().sum(dim=1)
        self._factor_Nj = self._points_ND.new_zeros(len(self._points_ND), 0)
        self._exclude(vertex.index)

    def propose(self) -> Proposal:
        """The point of largest height that is not taken."""
        return self._best(self._left_N, self._factor_Nj)

    def accept(self, chosen: Proposal) -> None:
        """Take the chosen point into the flat."""
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
    """The largest height; of equal ones the lowest index."""
    return max(proposals, key=lambda proposal: (proposal.sq_height, -proposal.index))


def choose_anchors(chunks: Sequence[AnchorChunk], m: int) -> list[int]:
    """Global indices of m anchors in order of choice, with all chunks in this process.

    Raises:
        ConfigError: fewer points than m, or m above the affine rank of the points.
    """

    def everywhere(name: str, *arguments: object) -> list:
        return [chunk.answer(name, *arguments) for chunk in chunks]

    return [proposal.index for proposal in drive_choice(everywhere, m)]


def drive_choice(
    everywhere: Callable[..., list], m: int, *, on_step: Callable[[int], None] = lambda step: None
) -> list[Proposal]:
    """The choice of m anchors over chunks that may lie anywhere.

    Args:
        everywhere: calls `AnchorChunk.answer` of every chunk with its arguments; the answers, in
            any fixed order.
        on_step: told how many anchors are chosen, before each further one.

    Raises:
        ConfigError: as :func:`choose_anchors`.
    """
    counts, sums = zip(*everywhere("sums"), strict=True)
    if not 1 <= m <= sum(counts):
        raise ConfigError(f"anchors: expected 1 to {sum(counts)} (the points), got {m}")
    vertex = choose(everywhere("farthest", torch.stack(sums).sum(dim=0) / sum(counts)))
    everywhere("begin", vertex)
    chosen, scale = [vertex], 0.0
    while len(chosen) < m:
        on_step(len(chosen))
        found = choose(everywhere("propose"))
        scale = scale or math.sqrt(max(found.sq_height, 0.0))
        check_height(found, scale, chosen=len(chosen), wanted=m)
        everywhere("accept", found)
        chosen.append(found)
    return chosen


def check_height(found: Proposal, scale: float, *, chosen: int, wanted: int) -> None:
    """Refuse to go on where no point is off the flat of those chosen.

    Raises:
        ConfigError: naming the affine rank.
    """
    if not math.sqrt(max(found.sq_height, 0.0)) > TOLERANCE * scale:
        raise ConfigError(
            f"anchors: {wanted} are asked for, and all points lie in the flat of {chosen} of them; "
            f"ask for {chosen} or fewer, or for features of more dimensions"
        )

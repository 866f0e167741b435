"""Chooses anchors among points that are distributed over actors: one reduction per step.

Each actor keeps the heights and factor rows of its chunk. In a step every actor sends one proposal
and receives one point. The choice is deterministic, so a job that lost an actor can start again.
"""

from collections.abc import Callable, Sequence

import ray

from dist_tl.cluster.config import TrialsConfig
from dist_tl.cluster.outcomes import collect
from dist_tl.cluster.roles import start_actor
from dist_tl.methods.geometry.anchors import AnchorChunk, Proposal, drive_choice
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.tensors import read_tensors


class _Chunk:
    """Actor of one chunk of stored features."""

    def __init__(self, store_url: str, key: str, first: int) -> None:
        points_ND = read_tensors(ObjectStore(store_url), key)["features"]
        self._chunk = AnchorChunk(points_ND, first)

    def call(self, name: str, *arguments: object) -> object:
        return self._chunk.answer(name, *arguments)


def choose_anchors_on_ray(
    store_url: str,
    keys: Sequence[str],
    firsts: Sequence[int],
    m: int,
    config: TrialsConfig,
    *,
    on_step: Callable[[int], None] = lambda step: None,
) -> list[Proposal]:
    """Returns m anchors among the features stored under `keys`, in order of choice.

    Args:
        firsts: global index of the first point of each chunk.
        on_step: called with the number of anchors chosen so far.

    Raises:
        ConfigError: m exceeds the number of points or their affine rank.
        WorkerError: an actor was lost.
    """
    options = {"num_cpus": config.cpus / max(1, len(keys))}
    actors = [
        start_actor(_Chunk, options, store_url, key, first)
        for key, first in zip(keys, firsts, strict=True)
    ]

    def everywhere(name: str, *arguments: object) -> list:
        refs = [actor.call.remote(name, *arguments) for actor in actors]
        return collect(refs, "a chunk of the pool")

    try:
        return drive_choice(everywhere, m, on_step=on_step)
    finally:
        for actor in actors:
            ray.kill(actor)

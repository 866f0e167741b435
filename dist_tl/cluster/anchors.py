"""Anchors chosen among points that lie on many nodes: one reduction a step.

Each actor keeps its chunk's heights and factor rows; a step sends one proposal from each, and one
point back. A lost actor means starting again, with the same outcome: nothing is drawn.
"""

from collections.abc import Callable, Sequence

import ray
from safetensors.torch import load as load_tensors

from dist_tl.cluster.config import TrialsConfig
from dist_tl.cluster.outcomes import collect
from dist_tl.methods.geometry.anchors import AnchorChunk, Proposal, drive_choice
from dist_tl.storage.objects import ObjectStore


class _Chunk:
    """One chunk of stored features in a process of its own."""

    def __init__(self, store_url: str, key: str, first: int) -> None:
        points_ND = load_tensors(ObjectStore(store_url).read(key))["features"]
        self._chunk = AnchorChunk(points_ND, first)

    def answer(self, name: str, *arguments: object) -> object:
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
    """m anchors among the features stored under `keys`, in order of choice.

    Args:
        firsts: the global index of each chunk's first point.

    Raises:
        ConfigError: fewer points than m, or m above their affine rank.
        WorkerError: an actor was lost.
    """
    remote = ray.remote(_Chunk).options(num_cpus=config.cpus / max(1, len(keys)))
    actors = [remote.remote(store_url, key, first) for key, first in zip(keys, firsts, strict=True)]

    def everywhere(name: str, *arguments: object) -> list:
        inputs = [actor.answer.remote(name, *arguments) for actor in actors]
        return collect(inputs, "a chunk of the pool")

    try:
        return drive_choice(everywhere, m, on_step=on_step)
    finally:
        for actor in actors:
            ray.kill(actor)

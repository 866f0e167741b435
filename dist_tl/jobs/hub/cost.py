"""Counts parameters, multiply-adds and memory of every expert and hub before training."""

from collections.abc import Mapping
from typing import NamedTuple

from dist_tl.datasets.images import LabelledImages
from dist_tl.jobs.hub.spec import HubJob
from dist_tl.methods.hub.counting import part_costs
from dist_tl.models.networks import Network, build_network
from dist_tl.report.results import Table
from dist_tl.seeds import torch_rng

# Float32 numbers per parameter that every worker stores, and that all workers share, by ZeRO stage:
# weights, gradients, Adam's two moments, and from stage 1 on master weights.
ZERO_COPIES = {0: (4, 0), 1: (2, 3), 2: (1, 4), 3: (0, 5)}


class HubRow(NamedTuple):
    """Cost of an expert, the router, or a hub; multiply-adds of one image, bytes of one worker."""

    part: str
    parameters: int
    multiply_adds: float
    serving_bytes: int
    training_bytes: int


def hub_rows(
    job: HubJob, experts: Mapping[str, Network], target: LabelledImages
) -> tuple[HubRow, ...]:
    """Returns the costs of all experts, the router and all hubs."""
    router = build_network(
        job.router,
        num_classes=2 * len(experts),
        image_shape=target.image_shape,
        rng=torch_rng(0, "router"),
    )
    parts = part_costs(
        experts,
        router,
        {f"{arm.name} (k = {arm.routes.k})": arm.routes for arm in job.pathways()},
        image_shape=target.image_shape,
        num_classes=target.num_classes,
    )
    full, shared = ZERO_COPIES[job.engine.zero_stage]
    training = 4 * (full + shared / job.trainers.workers)
    return tuple(HubRow(*part, 4 * part[1], round(training * part[1])) for part in parts)


def cost_table(rows: tuple[HubRow, ...]) -> Table:
    """Formats :func:`hub_rows`."""
    header = ("part", "parameters", "million multiply-adds an image", "MB to serve")
    cells = (
        (part, f"{n:,}", f"{cost / 1e6:,.3f}", f"{serve / 1e6:,.1f}", f"{train / 1e6:,.1f}")
        for part, n, cost, serve, train in rows
    )
    return Table(
        title="Hub (counted)", header=(*header, "MB to train, a worker"), rows=tuple(cells)
    )

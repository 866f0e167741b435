"""Counts parameters and multiply-adds of a hub and its parts, in addition to those of a network.

Shape suffixes: M = experts, C = classes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from dist_tl.methods.hub.cost import multiply_adds, routed_multiply_adds
from dist_tl.methods.hub.pathway import HubPathway, Preference
from dist_tl.methods.hub.routes import RouteConfig


class PartCost(NamedTuple):
    """Cost of an expert, a router or a hub; multiply-adds of one image."""

    part: str
    parameters: int
    multiply_adds: float


def part_costs(
    experts: Mapping[str, nn.Module],
    router: nn.Module,
    hubs: Mapping[str, RouteConfig],
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
) -> list[PartCost]:
    """Counts all experts, the router, and hubs of all experts, each of which is used equally often.

    Args:
        router: the router of hubs with routes by input.
        hubs: routes by name of the hub.
    """
    networks, count = [*experts.values(), router], len(experts)
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
    costs = [multiply_adds(network, image_shape) for network in networks]
    parts = [PartCost(*part) for part in zip([*experts, "router"], sizes, costs, strict=True)]
    router_sizes = {"input": sizes[-1], "static": 2 * count, "random": 0}
    aggregator = (count * num_classes + 1) * num_classes
    for name, routes in hubs.items():
        size = sum(sizes[:-1]) + router_sizes[routes.by] + aggregator
        router_cost = costs[-1] if routes.by == "input" else 0
        usage = [routes.k / count] * count
        cost = routed_multiply_adds(router_cost, costs[:-1], usage, num_classes)
        parts.append(PartCost(name, size, cost))
    return parts


def hub_multiply_adds(
    hub: HubPathway, image_shape: tuple[int, int, int], usage: Sequence[float]
) -> float:
    """Mean multiply-adds of one image through a hub.

    Args:
        usage: share of the images that each expert receives, (M,).
    """
    router = hub.router
    routing = 0
    if router is not None and not isinstance(router, Preference):
        routing = multiply_adds(router, image_shape)
    experts = [multiply_adds(expert, image_shape) for expert in hub.experts.values()]
    return routed_multiply_adds(routing, experts, usage, hub.num_classes)

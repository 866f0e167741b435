"""Scheduling of actors: the nodes of their role, resources, and the node of the driver.

On a cluster with roles every node offers the Ray resource of one role, and an actor requests a
small amount of its role's resource. So generators never run on the trainers' nodes, and the nodes
of each role scale independently.
"""

from collections.abc import Mapping
from typing import Any, Literal, cast

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Role = Literal["generators", "trainers", "experts"]
ROLE_AMOUNT = 0.001


def role_resources(role: Role, *, enabled: bool) -> dict[str, float]:
    """Returns the Ray resources of a role; empty on a cluster without roles."""
    return {role: ROLE_AMOUNT} if enabled else {}


def on_driver_node() -> dict[str, Any]:
    """Returns the options of an actor on the driver's node that reserves no CPU.

    Other nodes may be removed at any time, for example a generator's.
    """
    node = ray.get_runtime_context().get_node_id()
    return {
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=node, soft=False),
    }


def actor_options(
    role: Role,
    *,
    enabled: bool,
    cpus: float,
    gpus: float,
    resources: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Returns the Ray options of an actor or a task.

    Args:
        enabled: whether the cluster's nodes have roles.
        resources: additional Ray resources.
    """
    return {
        "num_cpus": cpus,
        "num_gpus": gpus,
        "resources": {**role_resources(role, enabled=enabled), **(resources or {})},
    }


def start_actor(kind: type, options: Mapping[str, Any], *arguments: object) -> ActorHandle:
    """Starts an actor of class `kind` with Ray options; returns before it is scheduled."""
    # Ray's stub returns a union of the handle and the class itself.
    return cast(ActorHandle, ray.remote(kind).options(**options).remote(*arguments))

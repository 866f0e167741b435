"""Which nodes an actor may run on: those that offer the Ray resource of its role.

On a cluster whose nodes have roles every node offers one of these resources, and an actor asks for
a grain of its own. So generators never land on trainers' nodes, and each kind scales by itself.
"""

from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Role = Literal["generators", "trainers", "experts"]
GRAIN = 0.001


def role_resources(role: Role, *, enabled: bool) -> dict[str, float]:
    """The Ray resources that stand for a role; none on a cluster without roles."""
    return {role: GRAIN} if enabled else {}


def beside_driver() -> dict[str, Any]:
    """Options of an actor that lives and dies with the driver: on its node, for no CPU.

    Anywhere else a node that may go at any time, such as a generator's, would take it along.
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
    """Options of an actor or a task.

    Args:
        enabled: whether the cluster's nodes have roles.
        resources: further Ray resources to ask for.
    """
    return {
        "num_cpus": cpus,
        "num_gpus": gpus,
        "resources": {**role_resources(role, enabled=enabled), **(resources or {})},
    }

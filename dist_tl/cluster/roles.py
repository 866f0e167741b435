"""Which nodes an actor may run on: those that offer the Ray resource of its role.

On a cluster whose nodes have roles every node offers one of these resources, and an actor asks for
a grain of its own. So generators never land on trainers' nodes, and each kind scales by itself.
"""

from typing import Any, Literal

Role = Literal["generators", "trainers", "experts"]
GRAIN = 0.001


def role_resources(role: Role, *, enabled: bool) -> dict[str, float]:
    """The Ray resources that stand for a role; none on a cluster without roles."""
    return {role: GRAIN} if enabled else {}


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

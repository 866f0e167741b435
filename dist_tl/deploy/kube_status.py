"""How an attempt at a run stands, read from its RayJob and its pods. Pure."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime

from dist_tl.deploy.kube_api import Object
from dist_tl.deploy.kube_follow import state_of, status_of
from dist_tl.telemetry import redact


@dataclass(frozen=True)
class KubeStatus:
    """How an attempt stands.

    Attributes:
        state: of the RayJob: New, Initializing, Running, Complete, Failed, Suspended, Retrying, ...
        job_status: what Ray says of the driver: PENDING, RUNNING, SUCCEEDED, ...; may be empty.
        message: why it is so, may be empty.
        started: when the operator began with it.
        ended: when it was over.
        pods: component -> phase -> how many.
        waiting: why pods do not start, one line each.
    """

    state: str
    job_status: str
    message: str
    started: datetime | None
    ended: datetime | None
    pods: dict[str, dict[str, int]] = field(default_factory=dict)
    waiting: tuple[str, ...] = ()


def read_status(ray_job: Object, pods: list[Object]) -> KubeStatus:
    """What a RayJob and its pods say."""
    status = status_of(ray_job)
    return KubeStatus(
        state=state_of(ray_job).partition(":")[0],
        job_status=status.get("jobStatus", ""),
        message=redact(status.get("message", "")),
        started=_time(status.get("startTime")),
        ended=_time(status.get("endTime")),
        pods=_by_component(pods),
        waiting=tuple(line for pod in pods for line in _waits(pod)),
    )


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _by_component(pods: list[Object]) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    for pod in pods:
        labels = pod["metadata"].get("labels", {})
        component = labels.get("app.kubernetes.io/component", "other")
        found.setdefault(component, Counter())[pod["status"].get("phase", "Unknown")] += 1
    return {component: dict(phases) for component, phases in sorted(found.items())}


def _waits(pod: Object) -> list[str]:
    """Why a pod does not start, as its containers or the scheduler say."""
    name, status = pod["metadata"]["name"], pod["status"]
    said = [
        condition
        for condition in status.get("conditions", [])
        if condition.get("status") == "False" and condition.get("reason") == "Unschedulable"
    ]
    for container in [
        *status.get("initContainerStatuses", []),
        *status.get("containerStatuses", []),
    ]:
        waiting = container.get("state", {}).get("waiting")
        if waiting and waiting.get("reason") not in ("ContainerCreating", "PodInitializing"):
            said.append(waiting)
    return [
        f"{name}: {each.get('reason')}: {redact(each.get('message', ''))[:300]}" for each in said
    ]

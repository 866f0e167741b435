"""State of one attempt, read from its RayJob and its pods. Pure."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime

from dist_tl.deploy.kube_api import Object
from dist_tl.deploy.kube_follow import state_of, status_of
from dist_tl.telemetry import redact


@dataclass(frozen=True)
class KubeStatus:
    """State of one attempt.

    Attributes:
        state: RayJob state: New, Initializing, Running, Complete, Failed, Suspended, Retrying, ...
        job_status: Ray's status of the driver: PENDING, RUNNING, SUCCEEDED, ...; may be empty.
        message: reason for the state; may be empty.
        started: time at which the operator started the job.
        ended: time at which the job ended.
        pods: component -> phase -> number of pods.
        waiting: reasons why pods do not start, one line each.
    """

    state: str
    job_status: str
    message: str
    started: datetime | None
    ended: datetime | None
    pods: dict[str, dict[str, int]] = field(default_factory=dict)
    waiting: tuple[str, ...] = ()


def read_status(ray_job: Object, pods: list[Object]) -> KubeStatus:
    """Returns the status reported by a RayJob and its pods."""
    status = status_of(ray_job)
    return KubeStatus(
        state=state_of(ray_job).partition(":")[0],
        job_status=status.get("jobStatus", ""),
        message=redact(status.get("message", "")),
        started=_time(status.get("startTime")),
        ended=_time(status.get("endTime")),
        pods=_by_component(pods),
        waiting=tuple(line for pod in pods for line in _waiting_reasons(pod)),
    )


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _by_component(pods: list[Object]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for pod in pods:
        labels = pod["metadata"].get("labels", {})
        component = labels.get("app.kubernetes.io/component", "other")
        counts.setdefault(component, Counter())[pod["status"].get("phase", "Unknown")] += 1
    return {component: dict(phases) for component, phases in sorted(counts.items())}


def _waiting_reasons(pod: Object) -> list[str]:
    """Returns why a pod does not start, as reported by its containers or the scheduler."""
    name, status = pod["metadata"]["name"], pod["status"]
    reasons = [
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
            reasons.append(waiting)
    return [
        f"{name}: {reason.get('reason')}: {redact(reason.get('message', ''))[:300]}"
        for reason in reasons
    ]

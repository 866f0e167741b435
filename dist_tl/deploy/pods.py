"""Pod templates of one RayJob: head, workers and the pod that hands the job in. Pure.

All meet the restricted pod security standard, with a read-only root. KubeRay itself adds the
command, the probes, the token of Ray's authentication and the autoscaler's container.
"""

import json
from dataclasses import dataclass
from typing import Any

from dist_tl.deploy.groups import WorkerGroup
from dist_tl.deploy.options import KubeOptions, PlaceOptions, Toleration
from dist_tl.storage.attempts import SUBMISSION

JOB_FOLDER = "/etc/dist_tl"
HOME = "/home/dist_tl"
ROLE_AMOUNT = 1000  # of a role's resource in a pod; an actor asks for a thousandth
DRAINING_VARIABLE = "DIST_TL_DRAINING"
DRAINING_FILE = "/tmp/dist_tl-draining"  # there as soon as the pod is to end
DRAIN_MARGIN_S = 20  # left to Ray after the drain, before the pod is killed
SUBMITTER = {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "1Gi"}
ENVIRONMENT = {
    "HOME": HOME,
    "OMP_NUM_THREADS": "1",
    # A pod that vanished without a word is noticed in 44 s; Ray's defaults take 7 minutes.
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
}
PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}


@dataclass(frozen=True)
class PodContext:
    """What all pods of one RayJob share.

    Attributes:
        run: the run's name on Kubernetes, the same for all attempts at it.
        name: of the RayJob, and of the ConfigMap with its job file.
        options: how jobs run on this cluster.
        object_store_mb: Ray's shared memory in every pod.
        submission: a word of its own, so that its retries can be told from later submissions.
    """

    run: str
    name: str
    options: KubeOptions
    object_store_mb: int
    submission: str | None = None


def selector(context: PodContext, component: str) -> dict[str, str]:
    """What picks the pods of one component of one attempt."""
    return {
        "app.kubernetes.io/name": "dist-tl",
        "app.kubernetes.io/instance": context.name,
        "app.kubernetes.io/component": component,
    }


def labels(context: PodContext, component: str) -> dict[str, str]:
    """The selector, and the run that the attempt belongs to."""
    return {**selector(context, component), "app.kubernetes.io/part-of": context.run}


def mounts() -> list[dict[str, Any]]:
    """What must be writable under a read-only root."""
    return [{"name": "tmp", "mountPath": "/tmp"}, {"name": "home", "mountPath": HOME}]


def environment(more: dict[str, str] | None = None) -> list[dict[str, str]]:
    """What every container of ours is told."""
    return [{"name": key, "value": value} for key, value in (ENVIRONMENT | (more or {})).items()]


def container_security(options: KubeOptions) -> dict[str, Any]:
    """The restricted standard, for one container."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "runAsUser": options.run_as_user,
        "runAsGroup": options.run_as_user,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def equal(resources: dict[str, str]) -> dict[str, Any]:
    """Requests that equal limits: nothing is throttled or evicted for a neighbour's sake."""
    return {"requests": dict(resources), "limits": dict(resources)}


def start_params(context: PodContext, role: str | None = None) -> dict[str, str]:
    """Arguments of `ray start`, without a role those of the head."""
    store = {"object-store-memory": str(context.object_store_mb * 2**20)}
    if role is None:
        return {"dashboard-host": "0.0.0.0", "num-cpus": "0", **store}
    # KubeRay pastes the value into a shell command; Ray's autoscaler strips quotes and slashes.
    return {"resources": json.dumps(json.dumps({role: ROLE_AMOUNT})), **store}


def head_template(context: PodContext, *, has_job: bool) -> dict[str, Any]:
    """The head's pod; with a job, its file lies in JOB_FOLDER."""
    options, head = context.options, context.options.head
    container = _ray_container(context, "ray-head", _size(head, _number(head.cpus)))
    container["ports"] = [{"name": k, "containerPort": v} for k, v in PORTS.items()]
    spec = _spec(context, head, head.tolerations, head.shm_gb, options.head_account)
    if context.submission is not None:
        container["env"].append({"name": SUBMISSION, "value": context.submission})
    if has_job:
        job = {"name": "job", "mountPath": JOB_FOLDER, "readOnly": True}
        container["volumeMounts"].append(job)
        spec["volumes"].append({"name": "job", "configMap": {"name": context.name}})
    spec["containers"] = [container]
    return {"metadata": {"labels": _pod_labels(context, "head")}, "spec": spec}


def worker_template(context: PodContext, group: WorkerGroup) -> dict[str, Any]:
    """A pod of one role."""
    place = group.options
    size = _size(place, str(group.cpus))
    if group.gpus:
        size[place.gpu_resource] = str(group.gpus)
    container = _ray_container(context, "ray-worker", size)
    container["env"].append({"name": DRAINING_VARIABLE, "value": DRAINING_FILE})
    container["lifecycle"] = {"preStop": {"exec": {"command": _drain(place.grace_s)}}}
    account = context.options.worker_account
    spec = _spec(context, place, place.accepted(), place.shm_gb, account)
    spec["automountServiceAccountToken"] = False
    spec["terminationGracePeriodSeconds"] = place.grace_s
    spec["containers"] = [container]
    return {"metadata": {"labels": _pod_labels(context, group.name)}, "spec": spec}


def submitter_template(context: PodContext) -> dict[str, Any]:
    """The pod that hands the job to Ray and shows its log; it needs no rights and no secret."""
    options = context.options
    container = _container(context, "ray-job-submitter", SUBMITTER)
    spec = _spec(context, PlaceOptions(), (), None, options.submitter_account)
    spec["automountServiceAccountToken"] = False
    spec["containers"] = [container]
    return {"metadata": {"labels": labels(context, "submitter")}, "spec": spec}


def _pod_labels(context: PodContext, component: str) -> dict[str, str]:
    return context.options.pod_labels | labels(context, component)


def _drain(grace_s: int) -> list[str]:
    """Say so to the actors, let no more work in, wait until what runs is done and Ray has left."""
    seconds = grace_s - DRAIN_MARGIN_S
    script = (
        f"touch {DRAINING_FILE}; "
        "timeout 15 ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION "
        f"--reason-message 'pod ends' --deadline-remaining-seconds {seconds} || exit 0; "
        f"for i in $(seq {seconds}); do "
        "grep -qsx raylet /proc/[0-9]*/comm || exit 0; sleep 1; done"
    )
    return ["/bin/bash", "-c", script]


def _ray_container(context: PodContext, name: str, size: dict[str, str]) -> dict[str, Any]:
    container = _container(context, name, size)
    container["volumeMounts"] = [*mounts(), {"name": "shm", "mountPath": "/dev/shm"}]
    options = context.options
    env: dict[str, str] = {}
    if options.endpoint_url is not None:
        # Not every S3 sends the checksums that newer clients expect of AWS.
        env["AWS_ENDPOINT_URL"] = options.endpoint_url
        env["AWS_RESPONSE_CHECKSUM_VALIDATION"] = "when_required"
    container["env"] = environment({**env, **options.env})
    if options.credentials is not None:
        container["envFrom"] = [{"secretRef": {"name": options.credentials}}]
    return container


def _container(context: PodContext, name: str, size: dict[str, str]) -> dict[str, Any]:
    return {
        "name": name,
        "image": context.options.image,
        "imagePullPolicy": context.options.image_pull_policy,
        "env": environment(),
        "resources": equal(size),
        "securityContext": container_security(context.options),
        "volumeMounts": mounts(),
    }


def _spec(
    context: PodContext,
    place: PlaceOptions,
    tolerations: tuple[Toleration, ...],
    shm_gb: float | None,
    account: str | None,
) -> dict[str, Any]:
    options = context.options
    volumes: list[dict[str, Any]] = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "home", "emptyDir": {}},
    ]
    if shm_gb is not None:
        shared = {"medium": "Memory", "sizeLimit": _mebibytes(shm_gb)}
        volumes.append({"name": "shm", "emptyDir": shared})
    spec: dict[str, Any] = {
        # KubeRay replaces lost pods itself; with autoscaler v2 it refuses any other policy.
        "restartPolicy": "Never",
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": options.run_as_user,
            "runAsGroup": options.run_as_user,
            "fsGroup": options.run_as_user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": volumes,
    }
    if account is not None:
        spec["serviceAccountName"] = account
    if options.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in options.image_pull_secrets]
    if place.node_selector:
        spec["nodeSelector"] = dict(place.node_selector)
    if tolerations:
        spec["tolerations"] = [t.model_dump(exclude_none=True) for t in tolerations]
    if place.priority_class is not None:
        spec["priorityClassName"] = place.priority_class
    return spec


def _size(place: Any, cpus: str) -> dict[str, str]:
    return {
        "cpu": cpus,
        "memory": _mebibytes(place.memory_gb),
        "ephemeral-storage": _mebibytes(place.ephemeral_gb),
    }


def _mebibytes(gibibytes: float) -> str:
    whole, rest = divmod(round(gibibytes * 1024), 1024)
    return f"{whole}Gi" if not rest else f"{whole * 1024 + rest}Mi"


def _number(cpus: float) -> str:
    return str(int(cpus)) if cpus == int(cpus) else f"{round(cpus * 1000)}m"

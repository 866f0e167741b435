"""Pod templates of one RayJob: head, workers and submitter. Pure.

All of them meet the restricted pod security standard and have a read-only root file system. KubeRay
adds the command, the probes, the token of Ray's authentication and the autoscaler container.
"""

import json
from dataclasses import dataclass
from typing import Any

from dist_tl.deploy.groups import WorkerGroup
from dist_tl.deploy.options import (
    GroupOptions,
    HeadOptions,
    KubeOptions,
    PlacementOptions,
    Toleration,
)
from dist_tl.storage.attempts import SUBMISSION

JOB_FOLDER = "/etc/dist_tl"
HOME = "/home/dist_tl"
ROLE_AMOUNT = 1000  # amount of the role's Ray resource per pod
DRAINING_VARIABLE = "DIST_TL_DRAINING"
DRAINING_FILE = "/tmp/dist_tl-draining"  # created when the pod starts to terminate
DRAIN_MARGIN_S = 20  # time left for Ray to exit after the drain, before the pod is killed
SUBMITTER = {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "1Gi"}
ENVIRONMENT = {
    "HOME": HOME,
    "OMP_NUM_THREADS": "1",
    # A node that disappears is detected within 44 s; with Ray's defaults, after 7 minutes.
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
}
PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}


@dataclass(frozen=True)
class PodContext:
    """Settings shared by all pods of one RayJob.

    Attributes:
        run: name of the run on Kubernetes, the same for all attempts.
        name: name of the RayJob and of the ConfigMap with its job file.
        options: options of the cluster.
        object_store_mb: size of Ray's object store in every pod, MiB.
        submission: unique id that distinguishes retries of this RayJob from later submissions.
    """

    run: str
    name: str
    options: KubeOptions
    object_store_mb: int
    submission: str | None = None


def selector(context: PodContext, component: str) -> dict[str, str]:
    """Returns the labels that select the pods of one component of one attempt."""
    return {
        "app.kubernetes.io/name": "dist-tl",
        "app.kubernetes.io/instance": context.name,
        "app.kubernetes.io/component": component,
    }


def labels(context: PodContext, component: str) -> dict[str, str]:
    """Returns the selector labels plus the run that the attempt belongs to."""
    return {**selector(context, component), "app.kubernetes.io/part-of": context.run}


def mounts() -> list[dict[str, Any]]:
    """Returns the mounts of the folders that must be writable."""
    return [{"name": "tmp", "mountPath": "/tmp"}, {"name": "home", "mountPath": HOME}]


def environment(extra: dict[str, str] | None = None) -> list[dict[str, str]]:
    """Returns the environment variables of a container."""
    return [{"name": key, "value": value} for key, value in (ENVIRONMENT | (extra or {})).items()]


def container_security(options: KubeOptions) -> dict[str, Any]:
    """Returns a container security context that meets the restricted standard."""
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
    """Returns requests equal to limits, which gives pods the Guaranteed QoS class."""
    return {"requests": dict(resources), "limits": dict(resources)}


def start_params(context: PodContext, role: str | None = None) -> dict[str, str]:
    """Returns the arguments of `ray start` for a worker role, or for the head if role is None."""
    store = {"object-store-memory": str(context.object_store_mb * 2**20)}
    if role is None:
        return {"dashboard-host": "0.0.0.0", "num-cpus": "0", **store}
    # Doubly encoded: KubeRay inserts the value into a shell command, and Ray's autoscaler strips
    # quotes and backslashes.
    return {"resources": json.dumps(json.dumps({role: ROLE_AMOUNT})), **store}


def head_template(context: PodContext, *, has_job: bool) -> dict[str, Any]:
    """Returns the pod template of the head; with a job, mounts the job file in JOB_FOLDER."""
    options, head = context.options, context.options.head
    container = _ray_container(context, "ray-head", _size(head, _cpu_quantity(head.cpus)))
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
    """Returns the pod template of one role."""
    options = group.options
    size = _size(options, str(group.cpus))
    if group.gpus:
        size[options.gpu_resource] = str(group.gpus)
    container = _ray_container(context, "ray-worker", size)
    container["env"].append({"name": DRAINING_VARIABLE, "value": DRAINING_FILE})
    container["lifecycle"] = {"preStop": {"exec": {"command": _drain_command(options.grace_s)}}}
    account = context.options.worker_account
    spec = _spec(context, options, options.all_tolerations(), options.shm_gb, account)
    spec["automountServiceAccountToken"] = False
    spec["terminationGracePeriodSeconds"] = options.grace_s
    spec["containers"] = [container]
    return {"metadata": {"labels": _pod_labels(context, group.name)}, "spec": spec}


def submitter_template(context: PodContext) -> dict[str, Any]:
    """Returns the template of the pod that submits the job to Ray and prints its log.

    It needs no permissions and no secret.
    """
    options = context.options
    container = _container(context, "ray-job-submitter", SUBMITTER)
    spec = _spec(context, PlacementOptions(), (), None, options.submitter_account)
    spec["automountServiceAccountToken"] = False
    spec["containers"] = [container]
    return {"metadata": {"labels": labels(context, "submitter")}, "spec": spec}


def _pod_labels(context: PodContext, component: str) -> dict[str, str]:
    return context.options.pod_labels | labels(context, component)


def _drain_command(grace_s: int) -> list[str]:
    """Returns the preStop command: notifies the actors, drains the Ray node, waits for its exit."""
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
        # Not every S3-compatible store sends the checksums that newer clients expect from AWS.
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
    placement: PlacementOptions,
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
        shared = {"medium": "Memory", "sizeLimit": _quantity(shm_gb)}
        volumes.append({"name": "shm", "emptyDir": shared})
    spec: dict[str, Any] = {
        # KubeRay replaces lost pods itself; with autoscaler v2 it rejects any other policy.
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
    if placement.node_selector:
        spec["nodeSelector"] = dict(placement.node_selector)
    if tolerations:
        spec["tolerations"] = [t.model_dump(exclude_none=True) for t in tolerations]
    if placement.priority_class is not None:
        spec["priorityClassName"] = placement.priority_class
    return spec


def _size(options: HeadOptions | GroupOptions, cpus: str) -> dict[str, str]:
    return {
        "cpu": cpus,
        "memory": _quantity(options.memory_gb),
        "ephemeral-storage": _quantity(options.ephemeral_gb),
    }


def _quantity(gibibytes: float) -> str:
    whole, rest = divmod(round(gibibytes * 1024), 1024)
    return f"{whole}Gi" if not rest else f"{whole * 1024 + rest}Mi"


def _cpu_quantity(cpus: float) -> str:
    return str(int(cpus)) if cpus == int(cpus) else f"{round(cpus * 1000)}m"

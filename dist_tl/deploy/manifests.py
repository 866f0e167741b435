"""Renders Kubernetes manifests from a job and the options of a cluster. Pure and deterministic.

Not covered: submitting the manifests, and what the operator and the API server do with them.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from dist_tl.deploy.groups import WorkerGroup, worker_groups
from dist_tl.deploy.options import GroupOptions, HeadOptions, KubeOptions
from dist_tl.deploy.pods import (
    JOB_FOLDER,
    PodContext,
    container_security,
    environment,
    equal,
    head_template,
    labels,
    mounts,
    selector,
    start_params,
    submitter_template,
    worker_template,
)
from dist_tl.deploy.rules import MAX_JOB_NAME, check
from dist_tl.errors import ConfigError
from dist_tl.jobs.spec import JobConfig
from dist_tl.telemetry import redact

JOB_KEY = "job.yaml"
ENTRYPOINT = f"dist-tl run {JOB_FOLDER}/{JOB_KEY} session.roles=true"
RUN_ANNOTATION = "dist-tl/run"  # full run URL: two runs may share the last path component
MAX_ATTEMPT = 999
MAX_LABEL = MAX_JOB_NAME - len(f"--{MAX_ATTEMPT}")
AUTOSCALER = {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "1Gi"}
Manifest = dict[str, Any]


def run_label(job: JobConfig) -> str:
    """Returns the name of the run on Kubernetes: the last path component of `job.run` as a label.

    Raises:
        ConfigError: the component has no letters or digits, or is too long.
    """
    return label_of(job.run)


def label_of(run: str) -> str:
    """Returns the name on Kubernetes of the run at a URL, a DNS-1035 label.

    Raises:
        ConfigError: its last path component has no letters or digits, or is too long.
    """
    last = run.rstrip("/").rsplit("/", 1)[-1]
    label = re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")
    if not label:
        raise ConfigError(
            f"run: the last path component names the run on Kubernetes: expected letters a-z or "
            f"digits, got {redact(run)!r}; e.g. s3://bucket/runs/birds"
        )
    if not label[0].isalpha():
        label = f"run-{label}"
    if len(label) > MAX_LABEL:
        raise ConfigError(
            f"run: the last path component names the run on Kubernetes: expected at most "
            f"{MAX_LABEL} characters, got {len(label)} in {label!r}; choose a shorter one"
        )
    return label


def job_name(job: JobConfig, attempt: int = 1) -> str:
    """Returns the RayJob name of an attempt. Labels never contain "--", so names are unique.

    Raises:
        ConfigError: the run has no valid name on Kubernetes, or too many attempts exist.
    """
    if not 1 <= attempt <= MAX_ATTEMPT:
        raise ConfigError(
            f"attempt: expected 1 to {MAX_ATTEMPT}, got {attempt}; delete old RayJobs"
        )
    label = run_label(job)
    return label if attempt == 1 else f"{label}--{attempt}"


def render(
    job: JobConfig, options: KubeOptions, *, attempt: int = 1, submission: str | None = None
) -> list[Manifest]:
    """Returns the ConfigMap with the job file, the RayJob, and its disruption budgets.

    Args:
        attempt: attempt number of the run; part of the RayJob name.
        submission: unique id of the submission, by which the run recognises its retries.

    Raises:
        ConfigError: the job cannot run on several pods, or KubeRay would reject it.
    """
    _check_store(job)
    _check_shared_memory(job, options)
    _check_resources(job)
    context = PodContext(
        run_label(job),
        job_name(job, attempt),
        options,
        job.session.object_store_mb,
        submission,
    )
    groups = worker_groups(job, options)
    manifests = [
        _config_map(job, context),
        _ray_job(job, context, groups),
        _budget(context, "head", 1),
        *(_budget(context, g.name, g.min_pods) for g in groups if g.name == "trainers"),
    ]
    check(manifests, ray_version=options.ray_version)
    return manifests


class _Dumper(yaml.SafeDumper):
    """Writes multi-line strings, such as the job file, as literal blocks."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _block)


def as_yaml(manifests: list[Manifest]) -> str:
    """Returns the manifests as a YAML stream for `kubectl apply -f -`."""
    return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False)


def render_cluster(name: str, job: JobConfig, options: KubeOptions) -> Manifest:
    """Returns a RayCluster to which jobs like this one can be submitted with the Ray Jobs API.

    Raises:
        ConfigError: the job cannot run on several pods, or KubeRay would reject the cluster.
    """
    _check_store(job)
    _check_shared_memory(job, options)
    context = PodContext(name, name, options, job.session.object_store_mb)
    spec = _cluster_spec(context, worker_groups(job, options), has_job=False)
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _metadata(context, "cluster"),
        "spec": {"suspend": options.suspend, **spec},
    }
    check([manifest], ray_version=options.ray_version)
    return manifest


def _cluster_spec(context: PodContext, groups: list[WorkerGroup], *, has_job: bool) -> Manifest:
    """Returns the spec of a cluster with one head and autoscaled worker groups."""
    options = context.options
    return {
        "rayVersion": options.ray_version,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": options.idle_timeout_s,
            "imagePullPolicy": options.image_pull_policy,
            "env": environment(),
            "resources": equal(AUTOSCALER),
            "securityContext": container_security(options),
            "volumeMounts": mounts(),
        },
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "rayStartParams": start_params(context),
            "template": head_template(context, has_job=has_job),
        },
        "workerGroupSpecs": [_group(context, group) for group in groups],
    }


def _group(context: PodContext, group: WorkerGroup) -> Manifest:
    return {
        "groupName": group.name,
        "replicas": group.min_pods,
        "minReplicas": group.min_pods,
        "maxReplicas": group.max_pods,
        "numOfHosts": 1,
        "rayStartParams": start_params(context, group.name),
        "template": worker_template(context, group),
    }


def _ray_job(job: JobConfig, context: PodContext, groups: list[WorkerGroup]) -> Manifest:
    options = context.options
    metadata = _metadata(context, "job")
    metadata["annotations"] = {RUN_ANNOTATION: job.run}
    if options.queue is not None:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = options.queue
        # Kueue rejects autoscaling jobs without this annotation.
        metadata["annotations"]["kueue.x-k8s.io/elastic-job"] = "true"
    spec = {
        "entrypoint": ENTRYPOINT,
        "submissionMode": "K8sJobMode",
        "submitterConfig": {"backoffLimit": 3},
        "submitterPodTemplate": submitter_template(context),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": options.ttl_seconds_after_finished,
        "backoffLimit": options.backoff_limit,
        "suspend": options.suspend,
        "rayClusterSpec": _cluster_spec(context, groups, has_job=True),
    }
    if options.active_deadline_seconds is not None:
        spec["activeDeadlineSeconds"] = options.active_deadline_seconds
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def _config_map(job: JobConfig, context: PodContext) -> Manifest:
    text = yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, width=100)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(context, "job"),
        "data": {JOB_KEY: text},
    }


def _budget(context: PodContext, component: str, pods: int) -> Manifest:
    """Returns a budget that keeps node drains from evicting the head or the trainers."""
    metadata = _metadata(context, component)
    metadata["name"] = f"{context.name}-{component}"
    spec = {
        "minAvailable": pods,
        "selector": {"matchLabels": selector(context, component)},
    }
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata,
        "spec": spec,
    }


def _metadata(context: PodContext, component: str) -> Manifest:
    metadata: Manifest = {"name": context.name, "labels": labels(context, component)}
    if context.options.namespace is not None:
        metadata["namespace"] = context.options.namespace
    return metadata


def _check_store(job: JobConfig) -> None:
    protocol, separator, _ = job.run.partition("://")
    if job.store != "direct" or not separator or protocol in ("file", "memory"):
        raise ConfigError(
            "store: pods do not share a disk: expected store: direct and a run in an object store, "
            "got "
            f"store: {job.store} and run: {redact(job.run)}; e.g. "
            "run=s3://bucket/runs/birds store=direct"
        )
    check_no_secret(job)


def check_no_secret(job: JobConfig) -> None:
    """Checks that a job file, which anybody with access to the cluster can read, has no secret.

    Raises:
        ConfigError: it contains a secret.
    """
    _check_no_secret(job.model_dump(mode="json"), "")


def _check_no_secret(value: Any, path: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_no_secret(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _check_no_secret(inner, f"{path}.{i}")
    elif isinstance(value, str) and redact(value) != value:
        raise ConfigError(
            f"{path}: expected no secret in a job, got {redact(value)}; store it in a Secret and "
            "name the Secret in the options: credentials"
        )


def _check_resources(job: JobConfig) -> None:
    experts = getattr(job, "experts", None)
    if experts is not None and experts.resources:
        raise ConfigError(
            "experts.resources: expected none on Kubernetes, whose pods provide no custom Ray "
            f"resource except their role, got {', '.join(experts.resources)}; select nodes with "
            "experts.node_selector in the options"
        )


def _check_shared_memory(job: JobConfig, options: KubeOptions) -> None:
    needed = job.session.object_store_mb
    pods: dict[str, HeadOptions | GroupOptions] = {"head": options.head}
    pods |= {group.name: group.options for group in worker_groups(job, options)}
    for name, pod in pods.items():
        if pod.shm_gb * 1024 < needed:
            raise ConfigError(
                f"{name}.shm_gb: Ray's object store is in /dev/shm: expected at least "
                f"{needed / 1024:.3g} for session.object_store_mb {needed}, got {pod.shm_gb:g}"
            )

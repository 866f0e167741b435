"""Jobs on a Kubernetes cluster: submit, follow, inspect, scale and stop them.

Each attempt of a run is a RayJob. It owns the ConfigMap with the job file and the disruption
budgets, so deleting the RayJob deletes them too.
"""

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from dist_tl.deploy import kube_follow
from dist_tl.deploy.kube_api import (
    ACCOUNTS,
    BY_KIND,
    PODS,
    RAY_CLUSTERS,
    RAY_JOBS,
    SECRETS,
    AlreadyExistsError,
    ForbiddenError,
    KubeApi,
    Object,
    Resource,
    load_api,
)
from dist_tl.deploy.kube_follow import SubmitterLog, TextCallback, has_ended, lost_head, status_of
from dist_tl.deploy.kube_status import KubeStatus, read_status
from dist_tl.deploy.manifests import RUN_ANNOTATION, label_of, render
from dist_tl.deploy.options import KubeOptions
from dist_tl.errors import ConfigError, DistTLError, HeadLostError, WorkerError
from dist_tl.jobs.spec import JobConfig
from dist_tl.telemetry import redact

_NAME_LABEL = "app.kubernetes.io/name"
_DRIVER_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class KubeJob:
    """One attempt of a run.

    Attributes:
        namespace: namespace of the RayJob.
        name: name of the RayJob.
        attempt: attempt number, from 1.
    """

    namespace: str
    name: str
    attempt: int


def connect(namespace: str | None = None) -> "Kube":
    """Connects to the cluster of the current kubectl context, or to the one this process runs in.

    Args:
        namespace: namespace of the jobs; default: that of the context.

    Raises:
        ConfigError: the kubernetes package is missing, or there is no usable context.
    """
    return Kube(load_api(namespace))


class Kube:
    """Client for the jobs of one cluster.

    All methods raise ConfigError if the API server rejects the credentials or a permission is
    missing, and WorkerError if the API server does not respond.
    """

    def __init__(self, api: KubeApi, *, poll_s: float = 2.0, wait_s: float = 1200.0) -> None:
        """Polls every `poll_s` seconds; waits up to `wait_s` seconds for pods to terminate."""
        self._api, self._poll_s, self._wait_s = api, poll_s, wait_s

    @property
    def namespace(self) -> str:
        """Namespace used if the options name none."""
        return self._api.namespace

    def find(self, run: str, *, namespace: str | None = None) -> KubeJob:
        """Returns the latest attempt of a run.

        Raises:
            ConfigError: there is none, or another run uses the same name.
        """
        namespace = namespace or self.namespace
        self._check_operator()
        attempts = self._attempts(run, namespace)
        if not attempts:
            raise ConfigError(
                f"no RayJob of run {redact(run)} found in namespace {namespace}; submit it, or "
                "select another context or namespace"
            )
        number = max(attempts)
        return KubeJob(namespace, attempts[number]["metadata"]["name"], number)

    def submit(self, job: JobConfig, options: KubeOptions, *, take_over: bool = False) -> KubeJob:
        """Submits the next attempt of a run.

        Args:
            take_over: stop an active earlier attempt first and wait until its pods are gone.

        Raises:
            ConfigError: the cluster lacks a requirement of the job or rejects it, an earlier
                attempt is active, or another run uses the same name. Nothing was started or
                stopped.
            WorkerError: an earlier attempt does not terminate.
        """
        namespace = options.namespace or self.namespace
        self._check_operator()
        earlier = self._attempts(job.run, namespace)
        active = [ray_job for ray_job in earlier.values() if not has_ended(ray_job)]
        if active and not take_over:
            raise _still_active(active[-1], namespace)
        attempt = max(earlier, default=0) + 1
        manifests = render(job, options, attempt=attempt, submission=secrets.token_hex(8))
        for manifest in manifests:
            self._dry_run(manifest, namespace)
        self._check_references(options, namespace)
        for ray_job in earlier.values():
            self._ensure_stopped(ray_job, namespace)
        return KubeJob(namespace, self._create_all(manifests, namespace), attempt)

    def follow(
        self,
        job: KubeJob,
        *,
        on_line: TextCallback,
        on_state: TextCallback,
        poll_s: float | None = None,
    ) -> int:
        """Streams log lines and states of an attempt until it ends.

        Returns:
            The exit code of the driver; 3 if it is unknown.

        Raises:
            HeadLostError: the head was lost; submit again.
            JobDeletedError: the RayJob was deleted.
        """
        return kube_follow.follow(
            self._api,
            job.namespace,
            job.name,
            on_line=on_line,
            on_state=on_state,
            poll_s=self._poll_s if poll_s is None else poll_s,
        )

    def status(self, job: KubeJob) -> KubeStatus:
        """Returns the status of an attempt.

        Raises:
            ConfigError: the RayJob does not exist.
        """
        ray_job = self._get(job)
        pods = self._api.select(PODS, job.namespace, f"app.kubernetes.io/instance={job.name}")
        return read_status(ray_job, pods)

    def logs(self, job: KubeJob, follow: bool, on_line: TextCallback) -> None:
        """Prints the log of an attempt; with `follow`, streams it until the attempt ends.

        Raises:
            ConfigError: the RayJob does not exist.
            WorkerError: there is no log yet.
        """
        self._get(job)
        if follow:
            with suppress(HeadLostError):
                self.follow(job, on_line=on_line, on_state=lambda state: None)
            return
        log = SubmitterLog(self._api, job.namespace, job.name, poll_s=self._poll_s)
        if not log.read(on_line, follow=False):
            raise WorkerError(
                f"{job.name} has no log yet: its submitter pod has not started; see "
                "`dist-tl status`"
            )

    def stop(self, job: KubeJob) -> None:
        """Deletes an attempt and waits until its pods are gone; committed work is kept.

        Raises:
            WorkerError: the pods do not terminate.
        """
        self._delete_and_wait(RAY_JOBS, job.namespace, job.name)

    def scale(self, job: KubeJob, group: str, low: int, high: int) -> None:
        """Sets the minimum and maximum of a worker group, now and for retries of the attempt.

        Raises:
            ConfigError: the bounds are invalid, the group does not exist, or the attempt has ended.
        """
        if not 0 <= low <= high or high < 1:
            raise ConfigError(f"{group}: expected 0 <= low <= high and high > 0, got {low}..{high}")
        ray_job = self._get(job)
        if has_ended(ray_job):
            raise ConfigError(f"{job.name} has ended and cannot be scaled; submit it again")
        # The operator reads the spec of the RayJob only when it creates another cluster for it.
        spec = ray_job["spec"]["rayClusterSpec"]
        job_patch = _scale_patch(job, spec, group, low, high, prefix="/spec/rayClusterSpec")
        self._api.patch(RAY_JOBS, job.namespace, job.name, job_patch)
        name = status_of(ray_job).get("rayClusterName")
        if not name:
            return
        cluster = self._api.get(RAY_CLUSTERS, job.namespace, name)
        if cluster is not None:
            cluster_patch = _scale_patch(job, cluster["spec"], group, low, high)
            self._api.patch(RAY_CLUSTERS, job.namespace, name, cluster_patch)

    def _get(self, job: KubeJob) -> Object:
        ray_job = self._api.get(RAY_JOBS, job.namespace, job.name)
        if ray_job is None:
            raise ConfigError(
                f"RayJob {job.name} not found in namespace {job.namespace}; see "
                f"kubectl -n {job.namespace} get rayjobs"
            )
        return ray_job

    def _check_operator(self) -> None:
        if not self._api.served(RAY_JOBS):
            raise ConfigError(
                f"the KubeRay operator is not installed on {self._api.host}: its API serves no "
                "RayJobs; install the operator and its CRDs: k8s/README.md, section 1"
            )

    def _check_references(self, options: KubeOptions, namespace: str) -> None:
        """Checks that the Secrets and ServiceAccounts named in the options exist."""
        keys = [("credentials", options.credentials)]
        keys += [("image_pull_secrets", name) for name in options.image_pull_secrets]
        references = [(SECRETS, *key, "create it: k8s/README.md, section 3") for key in keys]
        for key in ("head_account", "worker_account", "submitter_account"):
            references.append((ACCOUNTS, key, getattr(options, key), "kubectl apply -k k8s/base"))
        for resource, key, name, remedy in references:
            # Without the permission to read them, a missing one shows when the pods start.
            with suppress(ForbiddenError):
                if name is not None and self._api.get(resource, namespace, name) is None:
                    raise ConfigError(
                        f'{key}: {resource} "{name}" not found in namespace {namespace}; {remedy}'
                    )

    def _attempts(self, run: str, namespace: str) -> dict[int, Object]:
        """Returns the RayJobs of a run by attempt number, in ascending order."""
        label = label_of(run)
        ray_jobs = self._api.select(RAY_JOBS, namespace, f"app.kubernetes.io/part-of={label}")
        attempts: dict[int, Object] = {}
        for ray_job in ray_jobs:
            name = ray_job["metadata"]["name"]
            other = ray_job["metadata"].get("annotations", {}).get(RUN_ANNOTATION)
            if other != run.rstrip("/"):
                raise ConfigError(
                    f"run: the name {label} of {redact(run)} is already used in namespace "
                    f"{namespace}, by RayJob {name} of {redact(str(other))}; change the last path "
                    "component"
                )
            number = name.removeprefix(label).removeprefix("--") or "1"
            attempts[int(number) if number.isdecimal() else 0] = ray_job
        return dict(sorted(attempts.items()))

    def _dry_run(self, manifest: Object, namespace: str) -> None:
        """Has the server check permissions, quota and schema before anything is changed."""
        resource = BY_KIND[manifest["kind"]]
        try:
            self._api.create(resource, namespace, manifest, dry_run=True)
        except AlreadyExistsError:
            if resource is RAY_JOBS:
                raise
        except ConfigError as error:
            # Some admission webhooks do not support dry runs; they decide at creation.
            if "does not support dry run" not in str(error):
                raise

    def _ensure_stopped(self, ray_job: Object, namespace: str) -> None:
        """Deletes an attempt that may still be running: two drivers must never write one run."""
        name, status = ray_job["metadata"]["name"], status_of(ray_job)
        if not has_ended(ray_job):
            self._delete_and_wait(RAY_JOBS, namespace, name)
        elif lost_head(ray_job) or status.get("jobStatus") not in _DRIVER_ENDED:
            # A head that the operator cannot reach may keep running until its cluster is deleted.
            cluster = status.get("rayClusterName")
            if cluster:
                self._delete_and_wait(RAY_CLUSTERS, namespace, cluster)

    def _delete_and_wait(self, resource: Resource, namespace: str, name: str) -> None:
        deadline = time.monotonic() + self._wait_s
        deleted = self._api.get(resource, namespace, name)
        if deleted is None:
            return
        self._api.delete(resource, namespace, name)
        while self._exists(resource, namespace, deleted):
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"{resource} {name} was not deleted within {self._wait_s:g} s; see "
                    f"kubectl -n {namespace} get pods, and check that the operator is running"
                )
            time.sleep(self._poll_s)

    def _exists(self, resource: Resource, namespace: str, known: Object) -> bool:
        current = self._api.get(resource, namespace, known["metadata"]["name"])
        if current is None:
            return False
        return current["metadata"].get("uid") == known["metadata"].get("uid")

    def _create_all(self, manifests: list[Object], namespace: str) -> str:
        """Creates the RayJob, then the other objects with the RayJob as owner; returns its name."""
        [ray_job] = [manifest for manifest in manifests if manifest["kind"] == "RayJob"]
        created = self._api.create(RAY_JOBS, namespace, ray_job)
        name, uid = created["metadata"]["name"], created["metadata"]["uid"]
        owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": name, "uid": uid}
        try:
            for manifest in manifests:
                if manifest is not ray_job:
                    metadata = {**manifest["metadata"], "ownerReferences": [owner]}
                    self._create_owned({**manifest, "metadata": metadata}, namespace)
        except BaseException:
            with suppress(DistTLError):
                self._api.delete(RAY_JOBS, namespace, name)
            raise
        return name

    def _create_owned(self, manifest: Object, namespace: str) -> None:
        resource, name = BY_KIND[manifest["kind"]], manifest["metadata"]["name"]
        try:
            self._api.create(resource, namespace, manifest)
        except AlreadyExistsError:
            # A leftover of a deleted RayJob of the same name, not garbage-collected yet.
            leftover = self._api.get(resource, namespace, name)
            if (
                leftover is not None
                and leftover["metadata"].get("labels", {}).get(_NAME_LABEL) != "dist-tl"
            ):
                raise
            self._delete_and_wait(resource, namespace, name)
            self._api.create(resource, namespace, manifest)


def follow_with_retries(
    kube: Kube,
    submitted: KubeJob,
    current_job: Callable[[], JobConfig],
    options: KubeOptions,
    *,
    max_attempts: int,
    on_line: TextCallback,
    on_state: TextCallback,
) -> int:
    """Follows a submitted job; resubmits it if its head is lost, up to `max_attempts` in total.

    Args:
        current_job: returns the job to resubmit, which `dist-tl scale` may have changed.

    Raises:
        ConfigError: as `Kube.submit`.
        HeadLostError: the last attempt lost its head.
        JobDeletedError: the RayJob was deleted.
        WorkerError: the API server does not respond.
    """
    if max_attempts < 1:
        raise ConfigError(f"max_attempts: expected at least 1, got {max_attempts}")
    for remaining in range(max_attempts - 1, -1, -1):
        on_state(f"submitted {submitted.name} to namespace {submitted.namespace}")
        try:
            return kube.follow(submitted, on_line=on_line, on_state=on_state)
        except HeadLostError as lost:
            if not remaining:
                raise
            on_state(f"{lost}: resubmitting, {remaining} of {max_attempts} attempts left")
            submitted = kube.submit(current_job(), options)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _scale_patch(
    job: KubeJob, spec: Object, group: str, low: int, high: int, prefix: str = "/spec"
) -> list[Object]:
    """Returns a JSON patch that sets the bounds of one worker group."""
    groups = spec.get("workerGroupSpecs", [])
    names = [worker_group["groupName"] for worker_group in groups]
    if group not in names:
        raise ConfigError(
            f"expected a worker group of {job.name} ({', '.join(names)}), got {group!r}"
        )
    index = names.index(group)
    pods = min(max(groups[index].get("replicas", low), low), high)
    path = f"{prefix}/workerGroupSpecs/{index}"
    patch: list[Object] = [{"op": "test", "path": f"{path}/groupName", "value": group}]
    for key, value in (("minReplicas", low), ("maxReplicas", high), ("replicas", pods)):
        patch.append({"op": "add", "path": f"{path}/{key}", "value": value})
    return patch


def _still_active(ray_job: Object, namespace: str) -> ConfigError:
    return ConfigError(
        f"an attempt of this run is still active in namespace {namespace}: "
        f"{ray_job['metadata']['name']} ({kube_follow.state_of(ray_job)}); stop it, wait for it, "
        "or submit with --take-over"
    )

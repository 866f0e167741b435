"""Jobs on a Kubernetes cluster: submit, follow, look at, scale and stop them.

An attempt at a run is a RayJob; the job's file and the budgets belong to it and go with it.
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
    AlreadyThere,
    KubeApi,
    NotAllowed,
    Object,
    Resource,
    load_api,
)
from dist_tl.deploy.kube_follow import SubmitterLog, Tell, has_ended, lost_its_head, status_of
from dist_tl.deploy.kube_status import KubeStatus, read_status
from dist_tl.deploy.manifests import RUN_ANNOTATION, label_of, render
from dist_tl.deploy.options import KubeOptions
from dist_tl.errors import ConfigError, DistTLError, HeadLostError, WorkerError
from dist_tl.jobs.spec import JobConfig
from dist_tl.telemetry import redact

_OURS = "app.kubernetes.io/name"
_ENDED_BY_ITSELF = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class KubeJob:
    """One attempt at a run.

    Attributes:
        namespace: where it is.
        name: of its RayJob.
        attempt: 1 for the first.
    """

    namespace: str
    name: str
    attempt: int


def connect(namespace: str | None = None) -> "Kube":
    """The cluster of the current context, or the one this runs in.

    Args:
        namespace: where jobs are looked for; absent: that of the context.

    Raises:
        ConfigError: the kubernetes package is missing, or there is no usable context.
    """
    return Kube(load_api(namespace))


class Kube:
    """Jobs of one cluster.

    Every method raises ConfigError where the credentials are refused or a right is missing, and
    WorkerError where the API server does not answer.
    """

    def __init__(self, api: KubeApi, *, poll_s: float = 2.0, wait_s: float = 1200.0) -> None:
        """Poll every `poll_s`; wait `wait_s` for pods to end, which their grace may take."""
        self._api, self._poll_s, self._wait_s = api, poll_s, wait_s

    @property
    def namespace(self) -> str:
        """Where jobs go whose options name no namespace."""
        return self._api.namespace

    def find(self, run: str, *, namespace: str | None = None) -> KubeJob:
        """The latest attempt at a run.

        Raises:
            ConfigError: there is none, or another run has its name.
        """
        namespace = namespace or self.namespace
        self._check_operator()
        attempts = self._attempts(run, namespace)
        if not attempts:
            raise ConfigError(
                f"expected a RayJob of {redact(run)} in namespace {namespace}, got none; submit "
                "it, or choose another context or namespace"
            )
        number = max(attempts)
        return KubeJob(namespace, attempts[number]["metadata"]["name"], number)

    def submit(self, job: JobConfig, options: KubeOptions, *, take_over: bool = False) -> KubeJob:
        """Hand in the next attempt at a run.

        Args:
            take_over: end an earlier attempt that still lives, and wait until it is gone.

        Raises:
            ConfigError: the cluster lacks what the job needs, refuses it, an earlier attempt is
                alive, or another run has its name. Nothing was started or ended.
            WorkerError: an earlier attempt does not end.
        """
        namespace = options.namespace or self.namespace
        self._check_operator()
        earlier = self._attempts(job.run, namespace)
        alive = [each for each in earlier.values() if not has_ended(each)]
        if alive and not take_over:
            raise _alive(alive[-1], namespace)
        attempt = max(earlier, default=0) + 1
        manifests = render(job, options, attempt=attempt, submission=secrets.token_hex(8))
        for manifest in manifests:
            self._rehearse(manifest, namespace)
        self._check_named(options, namespace)
        for each in earlier.values():
            self._make_sure_it_is_over(each, namespace)
        return KubeJob(namespace, self._apply(manifests, namespace), attempt)

    def follow(
        self, job: KubeJob, *, on_line: Tell, on_state: Tell, poll_s: float | None = None
    ) -> int:
        """Show log and states of an attempt until it ends; its exit code, 3 where none is known.

        Raises:
            HeadLost: it ended because its head did; submit again.
            JobDeleted: somebody deleted it.
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
        """How an attempt stands.

        Raises:
            ConfigError: it is gone.
        """
        ray_job = self._get(job)
        pods = self._api.select(PODS, job.namespace, f"app.kubernetes.io/instance={job.name}")
        return read_status(ray_job, pods)

    def logs(self, job: KubeJob, follow: bool, on_line: Tell) -> None:
        """Show the log of an attempt, with `follow` until it ends.

        Raises:
            ConfigError: it is gone.
            WorkerError: it has no log yet.
        """
        self._get(job)
        if follow:
            with suppress(HeadLostError):
                self.follow(job, on_line=on_line, on_state=lambda state: None)
            return
        log = SubmitterLog(self._api, job.namespace, job.name, poll_s=self._poll_s)
        if not log.read(on_line, follow=False):
            raise WorkerError(
                f"expected a log of {job.name}, got none: its submitter has not begun; see status"
            )

    def stop(self, job: KubeJob) -> None:
        """End an attempt and wait until its pods are gone; what was committed stays.

        Raises:
            WorkerError: the pods do not end.
        """
        self._remove(RAY_JOBS, job.namespace, job.name)

    def scale(self, job: KubeJob, group: str, low: int, high: int) -> None:
        """Set the bounds of a group of workers, now and for retries of the attempt.

        Raises:
            ConfigError: the bounds are none, there is no such group, or the attempt is over.
        """
        if not 0 <= low <= high or high < 1:
            raise ConfigError(f"{group}: expected 0 <= low <= high and high > 0, got {low}..{high}")
        ray_job = self._get(job)
        if has_ended(ray_job):
            raise ConfigError(f"expected a job that runs, got {job.name}, which is over; submit it")
        # The operator looks at the job's own spec only when it makes another cluster for it.
        spec = ray_job["spec"]["rayClusterSpec"]
        later = _bounds(job, spec, group, low, high, prefix="/spec/rayClusterSpec")
        self._api.patch(RAY_JOBS, job.namespace, job.name, later)
        name = status_of(ray_job).get("rayClusterName")
        cluster = self._api.get(RAY_CLUSTERS, job.namespace, name) if name else None
        if cluster is not None:
            now = _bounds(job, cluster["spec"], group, low, high)
            self._api.patch(RAY_CLUSTERS, job.namespace, name, now)

    def _get(self, job: KubeJob) -> Object:
        ray_job = self._api.get(RAY_JOBS, job.namespace, job.name)
        if ray_job is None:
            raise ConfigError(
                f"expected a RayJob {job.name} in namespace {job.namespace}, got none; see "
                f"kubectl -n {job.namespace} get rayjobs"
            )
        return ray_job

    def _check_operator(self) -> None:
        if not self._api.served(RAY_JOBS):
            raise ConfigError(
                f"expected the KubeRay operator on {self._api.host}, got no RayJobs; install it "
                "with its CRDs: k8s/README.md, The operator"
            )

    def _check_named(self, options: KubeOptions, namespace: str) -> None:
        keys = [("credentials", options.credentials)]
        keys += [("image_pull_secrets", name) for name in options.image_pull_secrets]
        wanted = [(SECRETS, *key, "make it: k8s/README.md, Namespace") for key in keys]
        for key in ("head_account", "worker_account", "submitter_account"):
            wanted.append((ACCOUNTS, key, getattr(options, key), "kubectl apply -k k8s/base"))
        for resource, key, name, remedy in wanted:
            # Without the right to look, the pods will tell.
            with suppress(NotAllowed):
                if name is not None and self._api.get(resource, namespace, name) is None:
                    raise ConfigError(
                        f"{key}: expected {name} among the {resource} of namespace {namespace}, "
                        f"got none; {remedy}"
                    )

    def _attempts(self, run: str, namespace: str) -> dict[int, Object]:
        """RayJobs of a run by number, the first one first."""
        label = label_of(run)
        found = self._api.select(RAY_JOBS, namespace, f"app.kubernetes.io/part-of={label}")
        attempts: dict[int, Object] = {}
        for ray_job in found:
            name = ray_job["metadata"]["name"]
            other = ray_job["metadata"].get("annotations", {}).get(RUN_ANNOTATION)
            if other != run.rstrip("/"):
                raise ConfigError(
                    f"run: {redact(run)} would be named {label} in namespace {namespace}, got "
                    f"RayJob {name} of {redact(str(other))}; choose another last part"
                )
            number = name.removeprefix(label).removeprefix("--") or "1"
            attempts[int(number) if number.isdecimal() else 0] = ray_job
        return dict(sorted(attempts.items()))

    def _rehearse(self, manifest: Object, namespace: str) -> None:
        """Have the server check rights, quota and schema before anything is changed."""
        resource = BY_KIND[manifest["kind"]]
        try:
            self._api.create(resource, namespace, manifest, dry_run=True)
        except AlreadyThere:
            if resource is RAY_JOBS:
                raise
        except ConfigError as error:
            # Some admission webhooks cannot rehearse; what they think is known when it counts.
            if "does not support dry run" not in str(error):
                raise

    def _make_sure_it_is_over(self, ray_job: Object, namespace: str) -> None:
        """Two drivers must never write one run."""
        name, status = ray_job["metadata"]["name"], status_of(ray_job)
        if not has_ended(ray_job):
            self._remove(RAY_JOBS, namespace, name)
        elif lost_its_head(ray_job) or status.get("jobStatus") not in _ENDED_BY_ITSELF:
            # Out of the operator's sight a head may live on, until its cluster is deleted.
            cluster = status.get("rayClusterName")
            if cluster:
                self._remove(RAY_CLUSTERS, namespace, cluster)

    def _remove(self, resource: Resource, namespace: str, name: str) -> None:
        until = time.monotonic() + self._wait_s
        found = self._api.get(resource, namespace, name)
        if found is None:
            return
        self._api.delete(resource, namespace, name)
        while self._is_there(resource, namespace, found):
            if time.monotonic() > until:
                raise WorkerError(
                    f"expected {resource} {name} to end within {self._wait_s:g} s, got pods that "
                    f"do not; see kubectl -n {namespace} get pods, and whether the operator runs"
                )
            time.sleep(self._poll_s)

    def _is_there(self, resource: Resource, namespace: str, known: Object) -> bool:
        found = self._api.get(resource, namespace, known["metadata"]["name"])
        return found is not None and found["metadata"].get("uid") == known["metadata"].get("uid")

    def _apply(self, manifests: list[Object], namespace: str) -> str:
        """Make the RayJob first and all else as its own, so that its end leaves nothing behind."""
        [ray_job] = [each for each in manifests if each["kind"] == "RayJob"]
        made = self._api.create(RAY_JOBS, namespace, ray_job)
        name, uid = made["metadata"]["name"], made["metadata"]["uid"]
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
        except AlreadyThere:
            # Of a deleted RayJob of that name, and not collected yet.
            left = self._api.get(resource, namespace, name)
            if left is not None and left["metadata"].get("labels", {}).get(_OURS) != "dist-tl":
                raise
            self._remove(resource, namespace, name)
            self._api.create(resource, namespace, manifest)


def follow_to_the_end(
    kube: Kube,
    made: KubeJob,
    job_now: Callable[[], JobConfig],
    options: KubeOptions,
    *,
    max_attempts: int,
    on_line: Tell,
    on_state: Tell,
) -> int:
    """Follow a job just handed in; where its head is lost, submit again, `max_attempts` in all.

    Args:
        job_now: the job as it should be handed in, which scaling may have changed meanwhile.

    Raises:
        ConfigError: as `Kube.submit`.
        HeadLost: of the last attempt.
        JobDeleted: somebody deleted the job.
        WorkerError: the API does not answer.
    """
    if max_attempts < 1:
        raise ConfigError(f"max_attempts: expected at least 1, got {max_attempts}")
    for left in range(max_attempts - 1, -1, -1):
        on_state(f"submitted {made.name} to namespace {made.namespace}")
        try:
            return kube.follow(made, on_line=on_line, on_state=on_state)
        except HeadLostError as lost:
            if not left:
                raise
            on_state(f"{lost}: doing so, {left} of {max_attempts} attempts left")
            made = kube.submit(job_now(), options)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _bounds(
    job: KubeJob, spec: Object, group: str, low: int, high: int, prefix: str = "/spec"
) -> list[Object]:
    """A JSON patch of one group of workers."""
    groups = spec.get("workerGroupSpecs", [])
    names = [each["groupName"] for each in groups]
    if group not in names:
        raise ConfigError(f"expected a group of {job.name} ({', '.join(names)}), got {group!r}")
    at = names.index(group)
    pods = min(max(groups[at].get("replicas", low), low), high)
    place = f"{prefix}/workerGroupSpecs/{at}"
    changes = [{"op": "test", "path": f"{place}/groupName", "value": group}]
    for key, value in (("minReplicas", low), ("maxReplicas", high), ("replicas", pods)):
        changes.append({"op": "add", "path": f"{place}/{key}", "value": value})
    return changes


def _alive(ray_job: Object, namespace: str) -> ConfigError:
    return ConfigError(
        f"expected no living attempt at this run in namespace {namespace}, got "
        f"{ray_job['metadata']['name']} ({kube_follow.state_of(ray_job)}); stop it, wait for it, "
        "or take it over"
    )

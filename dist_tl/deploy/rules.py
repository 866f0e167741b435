"""Validates manifests against the rules of the KubeRay operator before they are submitted.

Not covered: the schemas of the kinds; the API server enforces them and the tests check them.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from dist_tl.deploy.options import SECRET_NAME, installed_ray
from dist_tl.errors import ConfigError

# KubeRay appends 6 characters for the cluster and up to 10 for its services; a DNS label has 63.
MAX_JOB_NAME = 47
MAX_CLUSTER_NAME = 53
MAX_NAME = 63
MAX_CONFIG_BYTES = 1024 * 1024
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_NAME_LIMITS = {"RayJob": MAX_JOB_NAME, "RayCluster": MAX_CLUSTER_NAME}


def check(manifests: Sequence[dict[str, Any]], *, ray_version: str | None = None) -> None:
    """Checks that the operator would accept the manifests.

    Args:
        manifests: manifests of any kind; RayJobs and RayClusters are checked in detail.
        ray_version: Ray version of the image; default: the installed one.

    Raises:
        ConfigError: a field is invalid; the message names it, the expected and the actual value.
    """
    expected_ray = ray_version or installed_ray()
    for manifest in manifests:
        kind = manifest.get("kind", "manifest")
        _check_name(manifest, _NAME_LIMITS.get(kind, MAX_NAME))
        if kind == "RayJob":
            _check_job(manifest["spec"], "RayJob.spec")
            cluster = manifest["spec"]["rayClusterSpec"]
            _check_cluster(cluster, "RayJob.spec.rayClusterSpec", expected_ray)
        elif kind == "RayCluster":
            _check_cluster(manifest["spec"], "RayCluster.spec", expected_ray)
        elif kind == "ConfigMap":
            _check_size(manifest)
        elif kind == "Secret":
            _refuse("Secret", "no secret in the manifests", "one", "create it with kubectl")


def _check_name(manifest: dict[str, Any], longest: int) -> None:
    name = manifest.get("metadata", {}).get("name", "")
    path = f"{manifest.get('kind', 'manifest')}.metadata.name"
    if not _DNS_1035.fullmatch(name):
        _refuse(path, "a DNS-1035 label (a-z, 0-9 and -, starting with a letter)", repr(name))
    if len(name) > longest:
        _refuse(path, f"at most {longest} characters", f"{len(name)} in {name!r}")


def _check_job(spec: dict[str, Any], path: str) -> None:
    if not spec.get("entrypoint", "").strip():
        _refuse(f"{path}.entrypoint", "a command", "none")
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        _refuse(f"{path}.shutdownAfterJobFinishes", "true, required by suspend", "false")
    for key in ("backoffLimit", "ttlSecondsAfterFinished"):
        if spec.get(key, 0) < 0:
            _refuse(f"{path}.{key}", "0 or more", spec[key])
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        _refuse(
            f"{path}.shutdownAfterJobFinishes", "true, required by ttlSecondsAfterFinished", "false"
        )
    if spec.get("activeDeadlineSeconds", 1) < 1:
        _refuse(f"{path}.activeDeadlineSeconds", "1 or more", spec["activeDeadlineSeconds"])
    _check_pod(spec.get("submitterPodTemplate"), f"{path}.submitterPodTemplate")


def _check_cluster(spec: dict[str, Any], path: str, ray_version: str) -> None:
    if spec.get("rayVersion") != ray_version:
        _refuse(
            f"{path}.rayVersion",
            f"{ray_version}, the Ray version of the image",
            spec.get("rayVersion"),
            "rebuild the image or set ray_version",
        )
    _check_pod(spec["headGroupSpec"]["template"], f"{path}.headGroupSpec.template")
    if spec.get("enableInTreeAutoscaling"):
        _check_container(spec.get("autoscalerOptions", {}), f"{path}.autoscalerOptions")
    groups = spec.get("workerGroupSpecs", [])
    names = [group["groupName"] for group in groups]
    for i, group in enumerate(groups):
        _check_group(group, f"{path}.workerGroupSpecs[{i}]", names)
    _check_restarts(spec, path)
    _check_images(spec, path)


def _check_group(group: dict[str, Any], path: str, names: list[str]) -> None:
    name = group["groupName"]
    if not _DNS_1035.fullmatch(name) or len(name) > MAX_NAME:
        _refuse(
            f"{path}.groupName", f"a DNS-1035 label of at most {MAX_NAME} characters", repr(name)
        )
    if names.count(name) > 1:
        _refuse(f"{path}.groupName", "unique group names", repr(name))
    # The defaults of the API server.
    low, high = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
    if not 0 <= low <= high:
        _refuse(f"{path}.minReplicas", f"0 to maxReplicas ({high})", low)
    pods = group.get("replicas", low)
    if not low <= pods <= high:
        _refuse(f"{path}.replicas", f"{low} to {high}", pods)
    params = group.get("rayStartParams", {})
    if group.get("resources") and {"resources", "num-cpus", "num-gpus", "memory"} & set(params):
        _refuse(f"{path}.resources", "either resources or rayStartParams", "both")
    _check_pod(group["template"], f"{path}.template")


def _check_restarts(spec: dict[str, Any], path: str) -> None:
    is_v2 = spec.get("autoscalerOptions", {}).get("version") == "v2"
    if not (spec.get("enableInTreeAutoscaling") and is_v2):
        return
    for pod_path, template in _ray_pods(spec, path):
        policy = template["spec"].get("restartPolicy", "Never")
        if policy != "Never":
            _refuse(f"{pod_path}.spec.restartPolicy", "Never, with autoscaler v2", policy)


def _check_images(spec: dict[str, Any], path: str) -> None:
    """Checks that all Ray pods use one image: Ray and Python versions must match in a cluster."""
    images = {pod: t["spec"]["containers"][0]["image"] for pod, t in _ray_pods(spec, path)}
    head_image = next(iter(images.values()))
    for pod_path, image in images.items():
        if image != head_image:
            _refuse(f"{pod_path}.spec.containers[0].image", f"the head's, {head_image}", image)


def _ray_pods(spec: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield f"{path}.headGroupSpec.template", spec["headGroupSpec"]["template"]
    for i, group in enumerate(spec.get("workerGroupSpecs", [])):
        yield f"{path}.workerGroupSpecs[{i}].template", group["template"]


def _check_pod(template: dict[str, Any] | None, path: str) -> None:
    if template is None:
        return
    for i, container in enumerate(template["spec"]["containers"]):
        _check_container(container, f"{path}.spec.containers[{i}]")


def _check_container(container: dict[str, Any], path: str) -> None:
    resources = container.get("resources", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for key in sorted({"cpu", "memory", *requests, *limits}):
        if requests.get(key) is None or requests.get(key) != limits.get(key):
            _refuse(
                f"{path}.resources.requests.{key}",
                f"the value of the limit, {limits.get(key)}",
                requests.get(key),
            )
    for variable in container.get("env", []):
        if "value" in variable and SECRET_NAME.search(variable["name"]):
            _refuse(
                f"{path}.env.{variable['name']}",
                "a secret by reference",
                "its value",
                "store it in a Secret and name the Secret in credentials",
            )


def _check_size(manifest: dict[str, Any]) -> None:
    size = sum(len(text.encode()) for text in manifest.get("data", {}).values())
    if size >= MAX_CONFIG_BYTES:
        _refuse("ConfigMap.data", f"less than {MAX_CONFIG_BYTES} bytes", size, "shorten the job")


def _refuse(path: str, expected: str, got: object, remedy: str = "") -> None:
    raise ConfigError(f"{path}: expected {expected}, got {got}{'; ' if remedy else ''}{remedy}")

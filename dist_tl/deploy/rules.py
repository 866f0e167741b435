"""What KubeRay's operator and the API server would refuse, found before anything is handed in.

Not covered: the schemas of the kinds, which the API server holds and the tests check against.
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
    """Refuse manifests that would not run.

    Args:
        manifests: any kinds; RayJobs and RayClusters are looked at closely.
        ray_version: that of the image; absent: the one installed here.

    Raises:
        ConfigError: naming the field, what was expected, and what came.
    """
    wanted = ray_version or installed_ray()
    for manifest in manifests:
        kind = manifest.get("kind", "manifest")
        _check_name(manifest, _NAME_LIMITS.get(kind, MAX_NAME))
        if kind == "RayJob":
            _check_job(manifest["spec"], "RayJob.spec")
            cluster = manifest["spec"]["rayClusterSpec"]
            _check_cluster(cluster, "RayJob.spec.rayClusterSpec", wanted)
        elif kind == "RayCluster":
            _check_cluster(manifest["spec"], "RayCluster.spec", wanted)
        elif kind == "ConfigMap":
            _check_size(manifest)
        elif kind == "Secret":
            _refuse("Secret", "no secret among the manifests", "one", "make it with kubectl")


def _check_name(manifest: dict[str, Any], longest: int) -> None:
    name = manifest.get("metadata", {}).get("name", "")
    where = f"{manifest.get('kind', 'manifest')}.metadata.name"
    if not _DNS_1035.fullmatch(name):
        _refuse(where, "a DNS-1035 label (a-z, 0-9 and -, a letter first)", repr(name))
    if len(name) > longest:
        _refuse(where, f"at most {longest} characters", f"{len(name)} in {name!r}")


def _check_job(spec: dict[str, Any], where: str) -> None:
    if not spec.get("entrypoint", "").strip():
        _refuse(f"{where}.entrypoint", "a command", "none")
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        _refuse(f"{where}.shutdownAfterJobFinishes", "true, as suspend needs it", "false")
    for key in ("backoffLimit", "ttlSecondsAfterFinished"):
        if spec.get(key, 0) < 0:
            _refuse(f"{where}.{key}", "0 or more", spec[key])
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        _refuse(f"{where}.shutdownAfterJobFinishes", "true, as a time to live needs it", "false")
    if spec.get("activeDeadlineSeconds", 1) < 1:
        _refuse(f"{where}.activeDeadlineSeconds", "1 or more", spec["activeDeadlineSeconds"])
    _check_pod(spec.get("submitterPodTemplate"), f"{where}.submitterPodTemplate")


def _check_cluster(spec: dict[str, Any], where: str, ray_version: str) -> None:
    if spec.get("rayVersion") != ray_version:
        _refuse(
            f"{where}.rayVersion",
            f"{ray_version}, the version of the image",
            spec.get("rayVersion"),
            "build the image anew or give ray_version",
        )
    _check_pod(spec["headGroupSpec"]["template"], f"{where}.headGroupSpec.template")
    if spec.get("enableInTreeAutoscaling"):
        _check_container(spec.get("autoscalerOptions", {}), f"{where}.autoscalerOptions")
    groups = spec.get("workerGroupSpecs", [])
    names = [group["groupName"] for group in groups]
    for i, group in enumerate(groups):
        _check_group(group, f"{where}.workerGroupSpecs[{i}]", names)
    _check_restarts(spec, where)
    _check_images(spec, where)


def _check_group(group: dict[str, Any], where: str, names: list[str]) -> None:
    name = group["groupName"]
    if not _DNS_1035.fullmatch(name) or len(name) > MAX_NAME:
        _refuse(f"{where}.groupName", f"a DNS-1035 label of at most {MAX_NAME}", repr(name))
    if names.count(name) > 1:
        _refuse(f"{where}.groupName", "every name once", repr(name))
    # What the API server puts where nothing is said.
    least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
    if not 0 <= least <= most:
        _refuse(f"{where}.minReplicas", f"0 to maxReplicas ({most})", least)
    pods = group.get("replicas", least)
    if not least <= pods <= most:
        _refuse(f"{where}.replicas", f"{least} to {most}", pods)
    params = group.get("rayStartParams", {})
    if group.get("resources") and {"resources", "num-cpus", "num-gpus", "memory"} & set(params):
        _refuse(f"{where}.resources", "resources here or in rayStartParams", "both")
    _check_pod(group["template"], f"{where}.template")


def _check_restarts(spec: dict[str, Any], where: str) -> None:
    is_v2 = spec.get("autoscalerOptions", {}).get("version") == "v2"
    if not (spec.get("enableInTreeAutoscaling") and is_v2):
        return
    for place, template in _ray_pods(spec, where):
        policy = template["spec"].get("restartPolicy", "Never")
        if policy != "Never":
            _refuse(f"{place}.spec.restartPolicy", "Never, with autoscaler v2", policy)


def _check_images(spec: dict[str, Any], where: str) -> None:
    """Ray refuses to join nodes of different versions, and pickles nothing between Pythons."""
    images = {place: t["spec"]["containers"][0]["image"] for place, t in _ray_pods(spec, where)}
    first = next(iter(images.values()))
    for place, image in images.items():
        if image != first:
            _refuse(f"{place}.spec.containers[0].image", f"the head's, {first}", image)


def _ray_pods(spec: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield f"{where}.headGroupSpec.template", spec["headGroupSpec"]["template"]
    for i, group in enumerate(spec.get("workerGroupSpecs", [])):
        yield f"{where}.workerGroupSpecs[{i}].template", group["template"]


def _check_pod(template: dict[str, Any] | None, where: str) -> None:
    if template is None:
        return
    for i, container in enumerate(template["spec"]["containers"]):
        _check_container(container, f"{where}.spec.containers[{i}]")


def _check_container(container: dict[str, Any], where: str) -> None:
    resources = container.get("resources", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for key in sorted({"cpu", "memory", *requests, *limits}):
        if requests.get(key) is None or requests.get(key) != limits.get(key):
            _refuse(
                f"{where}.resources.requests.{key}",
                f"what the limit says, {limits.get(key)}",
                requests.get(key),
            )
    for variable in container.get("env", []):
        if "value" in variable and SECRET_NAME.search(variable["name"]):
            _refuse(
                f"{where}.env.{variable['name']}",
                "a secret by reference",
                "its value",
                "put it into a Secret and name that in credentials",
            )


def _check_size(manifest: dict[str, Any]) -> None:
    size = sum(len(text.encode()) for text in manifest.get("data", {}).values())
    if size >= MAX_CONFIG_BYTES:
        _refuse("ConfigMap.data", f"less than {MAX_CONFIG_BYTES} bytes", size, "shorten the job")


def _refuse(where: str, expected: str, got: object, remedy: str = "") -> None:
    raise ConfigError(f"{where}: expected {expected}, got {got}{'; ' if remedy else ''}{remedy}")

"""Faults planted into good manifests are found, by our rules or by the schemas."""

import pytest
from crd_schemas import problems

from dist_tl.deploy.rules import check
from dist_tl.errors import ConfigError


def changed(manifests, path, value):
    """The RayJob with one field set; numbers in the path are places in lists."""
    *way, last = path.split(".")
    place = manifests[1]
    for part in way:
        place = place[int(part)] if part.isdecimal() else place[part]
    place[int(last) if last.isdecimal() else last] = value
    return manifests


CLUSTER = "spec.rayClusterSpec"
GROUP = f"{CLUSTER}.workerGroupSpecs.1"
HEAD = f"{CLUSTER}.headGroupSpec.template.spec"
WORKER = f"{GROUP}.template.spec"
TRAINER = f"{CLUSTER}.workerGroupSpecs.0.template.spec"


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("metadata.name", "x" * 48, "RayJob.metadata.name: expected at most 47"),
        ("metadata.name", "7up", "DNS-1035"),
        ("metadata.name", "Birds", "DNS-1035"),
        ("spec.backoffLimit", -1, "backoffLimit"),
        ("spec.ttlSecondsAfterFinished", -1, "ttlSecondsAfterFinished"),
        ("spec.activeDeadlineSeconds", 0, "activeDeadlineSeconds"),
        ("spec.entrypoint", " ", "entrypoint"),
        ("spec.shutdownAfterJobFinishes", False, "shutdownAfterJobFinishes"),
        (f"{CLUSTER}.rayVersion", "2.9.0", r"rayClusterSpec.rayVersion: expected .* got 2.9.0"),
        (f"{GROUP}.minReplicas", 5, r"workerGroupSpecs\[1\].minReplicas: expected 0 to maxRep"),
        (f"{GROUP}.minReplicas", -1, "minReplicas"),
        (f"{GROUP}.replicas", 9, "replicas"),
        (f"{GROUP}.groupName", "trainers", "expected unique group names"),
        (f"{GROUP}.groupName", "x" * 64, "groupName"),
        (f"{GROUP}.groupName", "Big_Ones", "groupName"),
        (f"{GROUP}.resources", {"CPU": "1"}, "rayStartParams"),
        (f"{WORKER}.restartPolicy", "Always", "restartPolicy: expected Never"),
        (f"{HEAD}.restartPolicy", "Always", "restartPolicy: expected Never"),
        (f"{WORKER}.containers.0.resources.requests.memory", "1Gi", "requests.memory"),
        (f"{WORKER}.containers.0.resources.limits", {}, "requests.cpu"),
        (f"{CLUSTER}.autoscalerOptions.resources.requests.cpu", "1", "autoscalerOptions.resources"),
        (f"{TRAINER}.containers.0.image", "other:2", "image: expected the head's"),
        (
            f"{HEAD}.containers.0.env",
            [{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}],
            "AWS_SECRET_ACCESS_KEY: expected a secret by reference",
        ),
    ],
)
def test_what_kuberay_would_refuse_is_named(rendered, path, value, told):
    manifests = rendered()
    check(manifests)
    with pytest.raises(ConfigError, match=told):
        check(changed(manifests, path, value))


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("spec.entryPoint", "x", "entryPoint"),
        (f"{CLUSTER}.rayversion", "x", "rayversion"),
        (f"{GROUP}.minReplica", 1, "minReplica"),
        (f"{GROUP}.minReplicas", "1", "minReplicas"),
        (f"{WORKER}.containers.0.resources.limit", {}, "limit"),
        (f"{WORKER}.containers.0.imagePullPolice", "x", "imagePullPolice"),
        (f"{WORKER}.tolerations", [{"kee": "x"}], "kee"),
        (f"{CLUSTER}.autoscalerOptions.version", "v3", "v3"),
        (f"{CLUSTER}.authOptions.mode", "tokens", "tokens"),
        (f"{CLUSTER}.headGroupSpec.template.spec.containers.0.ports", [{"name": "a"}], "contain"),
    ],
)
def test_misspelt_fields_and_wrong_types_are_found_by_the_schemas(rendered, path, value, told):
    manifests = rendered()
    found = problems(changed(manifests, path, value)[1])
    assert any(told in line for line in found), found


def test_a_literal_secret_is_refused(rendered):
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3"}}
    with pytest.raises(ConfigError, match="no secret"):
        check([*rendered(), secret])


def test_a_job_that_fits_no_config_map_is_refused(rendered):
    manifests = rendered()
    manifests[0]["data"]["job.yaml"] = "x" * 2**20
    with pytest.raises(ConfigError, match="less than 1048576 bytes"):
        check(manifests)


def test_an_image_with_another_ray_is_accepted_where_it_is_named(rendered):
    check(rendered(ray_version="2.61.0"), ray_version="2.61.0")
    with pytest.raises(ConfigError, match="rayVersion"):
        check(rendered(ray_version="2.61.0"))

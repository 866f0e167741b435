"""Faults injected into valid manifests are detected, by our rules or by the schemas."""

import pytest
from crd_schemas import problems

from dist_tl.deploy.rules import check
from dist_tl.errors import ConfigError


def changed(manifests, path, value):
    """Sets one field of the RayJob; numbers in the path are list indices."""
    *parents, last = path.split(".")
    target = manifests[1]
    for part in parents:
        target = target[int(part)] if part.isdecimal() else target[part]
    target[int(last) if last.isdecimal() else last] = value
    return manifests


CLUSTER = "spec.rayClusterSpec"
GROUP = f"{CLUSTER}.workerGroupSpecs.1"
HEAD = f"{CLUSTER}.headGroupSpec.template.spec"
WORKER = f"{GROUP}.template.spec"
TRAINER = f"{CLUSTER}.workerGroupSpecs.0.template.spec"


@pytest.mark.parametrize(
    ("path", "value", "message"),
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
def test_manifests_that_kuberay_would_reject_are_detected(rendered, path, value, message):
    manifests = rendered()
    check(manifests)
    with pytest.raises(ConfigError, match=message):
        check(changed(manifests, path, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
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
def test_the_schemas_detect_misspelt_fields_and_wrong_types(rendered, path, value, message):
    manifests = rendered()
    found = problems(changed(manifests, path, value)[1])
    assert any(message in line for line in found), found


def test_a_literal_secret_is_rejected(rendered):
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3"}}
    with pytest.raises(ConfigError, match="no secret"):
        check([*rendered(), secret])


def test_a_job_too_large_for_a_config_map_is_rejected(rendered):
    manifests = rendered()
    manifests[0]["data"]["job.yaml"] = "x" * 2**20
    with pytest.raises(ConfigError, match="less than 1048576 bytes"):
        check(manifests)


def test_another_ray_version_is_accepted_if_given(rendered):
    check(rendered(ray_version="2.61.0"), ray_version="2.61.0")
    with pytest.raises(ConfigError, match="rayVersion"):
        check(rendered(ray_version="2.61.0"))

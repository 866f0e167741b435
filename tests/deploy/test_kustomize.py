"""The files in k8s/: the examples equal what `submit` renders, and the schemas accept everything.

DIST_TL_WRITE_K8S=1 rewrites k8s/base/rayjob.yaml and raycluster.yaml.
"""

import json
import os
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from crd_schemas import problems, templates_of

from dist_tl.deploy.manifests import JOB_KEY, render, render_cluster
from dist_tl.deploy.options import KubeOptions, read_options
from dist_tl.deploy.rules import check
from dist_tl.jobs.job_file import read_job

K8S = Path(__file__).parents[2] / "k8s"
FOLDERS = ("base", "overlays/dev", "overlays/gpu")
HEADER = "# Written by tests/deploy/test_kustomize.py from dist_tl/deploy; do not edit.\n"
METRICS = (
    "dist_tl_shards_committed_total",
    "dist_tl_backlog_shards",
    "dist_tl_generator_workers",
    "dist_tl_samples_total",
    "dist_tl_starved_seconds",
    "dist_tl_step_seconds",
    "dist_tl_save_blocked_seconds",
    "dist_tl_restarts_total",
)


@pytest.fixture(scope="module", params=FOLDERS)
def built(request):
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl on PATH to build the kustomizations")
    command = ["kubectl", "kustomize", str(K8S / request.param)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "kustomize printed a warning"
    return request.param, list(yaml.safe_load_all(done.stdout))


def of_kind(manifests, kind):
    return [m for m in manifests if m["kind"] == kind]


def ray_kinds(manifests):
    return of_kind(manifests, "RayJob") + of_kind(manifests, "RayCluster")


def examples():
    job = read_job(K8S / "base" / JOB_KEY)
    options = KubeOptions(image="dist-tl:dev", suspend=True)
    ray_job = [m for m in render(job, options) if m["kind"] != "ConfigMap"]
    return {"rayjob": ray_job, "raycluster": [render_cluster("interactive", job, options)]}


@pytest.mark.parametrize("name", ["rayjob", "raycluster"])
def test_the_examples_are_up_to_date(name):
    path, expected = K8S / "base" / f"{name}.yaml", examples()[name]
    if os.environ.get("DIST_TL_WRITE_K8S"):
        path.write_text(HEADER + yaml.safe_dump_all(expected, sort_keys=False, width=100))
    assert list(yaml.safe_load_all(path.read_text())) == expected, "DIST_TL_WRITE_K8S=1 rewrites it"


def test_the_schemas_accept_every_kustomization(built):
    _, manifests = built
    for manifest in manifests:
        assert problems(manifest) == []


def test_kuberay_accepts_every_kustomization(built):
    _, manifests = built
    check([m for m in manifests if m["kind"] in ("RayJob", "RayCluster", "ConfigMap", "Secret")])


def test_the_examples_are_suspended(built):
    _, manifests = built
    assert all(m["spec"]["suspend"] for m in ray_kinds(manifests))
    assert len(ray_kinds(manifests)) == 2


def test_the_groups_of_the_examples_fit_their_job(built, tmp_path):
    folder, manifests = built
    [config] = of_kind(manifests, "ConfigMap")
    path = tmp_path / JOB_KEY
    path.write_text(config["data"][JOB_KEY])
    job = read_job(path)
    for manifest in ray_kinds(manifests):
        spec = manifest["spec"]
        groups = {
            group["groupName"]: group
            for group in spec.get("rayClusterSpec", spec)["workerGroupSpecs"]
        }
        assert groups["trainers"]["minReplicas"] >= job.trainers.workers
        assert groups["generators"]["maxReplicas"] == job.generators.max
        for role, resources in (("trainers", job.trainers), ("generators", job.generators)):
            [container] = groups[role]["template"]["spec"]["containers"]
            limits = container["resources"]["limits"]
            assert float(limits["cpu"]) >= resources.cpus, folder
            assert float(limits.get("nvidia.com/gpu", 0)) >= resources.gpus, folder


def test_accounts_and_config_maps_of_pods_exist(built):
    _, manifests = built
    accounts = {m["metadata"]["name"] for m in of_kind(manifests, "ServiceAccount")}
    configs = {m["metadata"]["name"] for m in of_kind(manifests, "ConfigMap")}
    for manifest in ray_kinds(manifests):
        for template in templates_of(manifest).values():
            spec = template["spec"]
            assert spec["serviceAccountName"] in accounts
            used = {v["configMap"]["name"] for v in spec["volumes"] if "configMap" in v}
            assert used <= configs


def test_only_overlays_set_a_namespace(built):
    folder, manifests = built
    namespaces = {m["metadata"].get("namespace") for m in manifests if m["kind"] != "Namespace"}
    assert namespaces == ({None} if folder == "base" else {"dist-tl"})
    for namespace in of_kind(manifests, "Namespace"):
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_network_is_closed_by_default(built):
    _, manifests = built
    policies = {m["metadata"]["name"]: m["spec"] for m in of_kind(manifests, "NetworkPolicy")}
    denied = policies["dist-tl-deny"]
    assert denied["policyTypes"] == ["Ingress", "Egress"]
    assert not denied.keys() & {"ingress", "egress"}
    every_pod = denied["podSelector"]["matchLabels"].items()
    for manifest in ray_kinds(manifests):
        for template in templates_of(manifest).values():
            assert every_pod <= template["metadata"]["labels"].items()


def test_every_pod_meets_the_restricted_standard(built):
    _, manifests = built
    pods = [t["spec"] for m in ray_kinds(manifests) for t in templates_of(m).values()]
    pods += [m["spec"]["template"]["spec"] for m in of_kind(manifests, "StatefulSet")]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"] + pod.get("initContainers", []):
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["securityContext"]["readOnlyRootFilesystem"]


def test_roles_grant_no_wildcards_and_no_secrets(built):
    _, manifests = built
    for role in of_kind(manifests, "Role"):
        for rule in role["rules"]:
            assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
            assert "secrets" not in rule["resources"]
    assert not of_kind(manifests, "ClusterRole")


def test_no_file_contains_a_secret():
    literal = re.compile(
        r"(?i)(AKIA[0-9A-Z]{16}|-----BEGIN|(secret_access_key|password)\s*[:=]\s*[^\s$<{\"']{8,})"
    )
    for path in K8S.rglob("*"):
        if path.is_file():
            assert not literal.search(path.read_text()), path
            assert "kind: Secret" not in path.read_text()


def test_the_example_options_are_valid(job_of):
    options = read_options(K8S / "options.yaml")
    for manifest in render(job_of("digits"), options):
        assert problems(manifest) == []


def test_all_files_name_the_same_ray_version():
    text = "\n".join(path.read_text() for path in K8S.rglob("*") if path.is_file())
    named = re.findall(r"(?i)ray_?version\W{1,4}(\d+\.\d+\.\d+)", text)
    assert named
    assert set(named) == {version("ray")}


def test_the_image_runs_as_non_root_without_a_compiler():
    _, build, final = re.split(r"(?m)^FROM ", (K8S / "Dockerfile").read_text())
    assert "build-essential" in build
    assert "build-essential" not in final
    user = KubeOptions(image="x").run_as_user
    assert f"USER {user}:{user}" in final
    assert "wget" in final, "KubeRay's probes call it"


def test_the_dashboard_shows_every_metric():
    board = json.loads((K8S / "grafana" / "dist_tl.json").read_text())
    queries = " ".join(t["expr"] for panel in board["panels"] for t in panel.get("targets", []))
    for metric in METRICS:
        assert f"ray_{metric}" in queries
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    assert all(p["datasource"]["uid"] == "${datasource}" for p in board["panels"])

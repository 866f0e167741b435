"""Manifests rendered from jobs, checked with the schemas of KubeRay and Kubernetes."""

import copy
import json
from importlib.metadata import version

import pytest
from crd_schemas import problems, templates_of

from dist_tl.deploy.manifests import ENTRYPOINT, MAX_LABEL, render, run_label
from dist_tl.deploy.pods import ROLE_AMOUNT
from dist_tl.errors import ConfigError
from dist_tl.jobs.job_file import read_job

JOBS = (
    "digits",
    "digits_disjoint",
    "forecast",
    "geometric_labels",
    "hub",
    "layer_search",
    "manifold",
    "manifold_phase",
)
EVERYTHING = {
    "namespace": "science",
    "endpoint_url": "http://s3:9000",
    "env": {"AWS_REGION": "eu-west-1"},
    "pod_labels": {"azure.workload.identity/use": "true", "app.kubernetes.io/name": "mine"},
    "queue": "gpus",
    "suspend": True,
    "active_deadline_seconds": 3600,
    "image_pull_secrets": ("registry",),
    "head": {"priority_class": "high", "cpus": 1.5},
    "trainers": {"node_selector": {"disk": "fast"}},
    "generators": {"spot": True, "grace_s": 600, "priority_class": "low"},
}


def ray_job(manifests):
    [job] = [m for m in manifests if m["kind"] == "RayJob"]
    return job


def groups(manifests):
    specs = ray_job(manifests)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return {group["groupName"]: group for group in specs}


def containers(manifests):
    for component, template in templates_of(ray_job(manifests)).items():
        for container in template["spec"]["containers"]:
            yield component, container


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["defaults", "everything"])
@pytest.mark.parametrize("preset", ["digits", "hub", "layer_search"])
def test_manifests_satisfy_the_schemas(rendered, preset, changes):
    gpus = ("generators.gpus=0.5", "trainers.gpus=1") if preset == "digits" else ()
    for manifest in rendered(preset, *gpus, **changes):
        assert problems(manifest) == []


@pytest.mark.parametrize("preset", JOBS)
def test_the_config_map_contains_the_same_job(tmp_path, job_of, options, preset):
    job = job_of(preset)
    [config_map, *_] = render(job, options())
    path = tmp_path / "job.yaml"
    path.write_text(config_map["data"]["job.yaml"])
    assert read_job(path) == job


def test_a_predict_job_has_experts_and_no_budget_for_trainers(predict_job, options):
    manifests = render(predict_job(), options())
    assert [problems(manifest) for manifest in manifests] == [[]] * len(manifests)
    assert list(groups(manifests)) == ["experts"]
    budgets = [m for m in manifests if m["kind"] == "PodDisruptionBudget"]
    assert [m["metadata"]["name"] for m in budgets] == ["answers-head"]


def test_resources_of_single_experts_are_rejected(predict_job, options):
    """Pods provide only their role as a Ray resource: such an expert would stay pending."""
    job = predict_job("experts.resources={big: {v100: 1}}")
    with pytest.raises(ConfigError, match=r"experts.resources: expected none.*got big"):
        render(job, options())


def test_rendering_is_deterministic_and_shares_nothing(job_of, options):
    job, settings = job_of("digits"), options()
    first, again = render(job, settings), render(job, settings)
    assert json.dumps(first) == json.dumps(again)
    expected = copy.deepcopy(again)
    first[1]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].clear()
    assert render(job, settings) == expected


def test_the_head_runs_the_driver_and_no_actors(rendered):
    manifests = rendered()
    job = ray_job(manifests)
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert job["spec"]["entrypoint"] == ENTRYPOINT
    assert head["rayStartParams"]["num-cpus"] == "0"
    mounted = {m["name"]: m for m in head["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert mounted["job"]["readOnly"]
    assert mounted["job"]["mountPath"] in ENTRYPOINT


def test_rays_autoscaler_parses_the_groups(rendered):
    from ray.autoscaler._private.kuberay import autoscaling_config

    manifests = rendered("digits", "generators.gpus=1", "generators.max=6")
    spec = ray_job(manifests)["spec"]["rayClusterSpec"]
    read = autoscaling_config._generate_available_node_types_from_ray_cr_spec(spec)
    trainers, generators, head = (read[k] for k in ("trainers", "generators", "headgroup"))
    assert (trainers["min_workers"], trainers["max_workers"]) == (2, 2)
    assert (generators["min_workers"], generators["max_workers"]) == (1, 6)
    roles = {"trainers": ROLE_AMOUNT}, {"generators": ROLE_AMOUNT}
    for group, role, gpus in zip((trainers, generators), roles, ({}, {"GPU": 1}), strict=True):
        others = {k: v for k, v in group["resources"].items() if k not in ("CPU", "memory")}
        assert others == role | gpus
    assert head["resources"]["CPU"] == 0


def test_the_resource_survives_the_shell_as_json(rendered):
    import subprocess

    for name, group in groups(rendered()).items():
        command = f"printf %s --resources={group['rayStartParams']['resources']}"
        done = subprocess.run(["/bin/bash", "-c", command], capture_output=True, text=True)
        assert json.loads(done.stdout.removeprefix("--resources=")) == {name: ROLE_AMOUNT}


def test_requests_equal_limits_everywhere(rendered):
    for component, container in containers(rendered("digits", "trainers.gpus=1")):
        resources = container["resources"]
        assert resources["requests"] == resources["limits"], component
        assert {"cpu", "memory", "ephemeral-storage"} <= set(resources["limits"])
        assert ("nvidia.com/gpu" in resources["limits"]) == (component == "trainers")


def test_every_pod_meets_the_restricted_standard(rendered):
    manifests = rendered()
    for template in templates_of(ray_job(manifests)).values():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert all(set(v) & {"emptyDir", "configMap"} for v in pod["volumes"])
    autoscaler = ray_job(manifests)["spec"]["rayClusterSpec"]["autoscalerOptions"]
    for container in [autoscaler, *(c for _, c in containers(manifests))]:
        security = container["securityContext"]
        assert security["runAsUser"] > 0
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert {m["mountPath"] for m in container["volumeMounts"]} >= {"/tmp", "/home/dist_tl"}


def test_only_the_head_has_a_token_for_the_api_server(rendered):
    for component, template in templates_of(ray_job(rendered())).items():
        assert template["spec"].get("automountServiceAccountToken", True) == (component == "head")


def test_keepalive_and_thread_settings_reach_every_container(rendered):
    for _, container in containers(rendered()):
        env = {v["name"]: v["value"] for v in container["env"]}
        assert env["RAY_grpc_client_keepalive_time_ms"] == "10000"
        assert env["RAY_grpc_client_keepalive_timeout_ms"] == "5000"
        assert env["OMP_NUM_THREADS"] == "1"


def test_secrets_are_only_referenced_by_name(rendered):
    for component, container in containers(rendered(credentials="my-keys")):
        expected = [] if component == "submitter" else [{"secretRef": {"name": "my-keys"}}]
        assert container.get("envFrom", []) == expected
    for _, container in containers(rendered(credentials=None)):
        assert "envFrom" not in container


def test_generators_drain_and_tolerate_spot_nodes(rendered):
    pod = groups(rendered(**EVERYTHING))["generators"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 600
    assert pod["priorityClassName"] == "low"
    assert {t["key"] for t in pod["tolerations"]} >= {"cloud.google.com/gke-spot"}
    command = " ".join(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"])
    assert command.index("touch /tmp/dist_tl-draining") < command.index("ray drain-node")
    assert "--deadline-remaining-seconds 580" in command


def test_workers_know_the_path_of_the_draining_file(rendered):
    for component, container in containers(rendered()):
        env = {v["name"]: v["value"] for v in container["env"]}
        has_path = env.get("DIST_TL_DRAINING") == "/tmp/dist_tl-draining"
        assert has_path == (component not in ("head", "submitter")), component


def test_ray_version_and_token_authentication(rendered):
    cluster = ray_job(rendered())["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["autoscalerOptions"]["version"] == "v2"


def test_budgets_protect_head_and_trainers_from_node_drains(rendered):
    manifests = rendered("digits", "trainers.workers=4", "session.num_cpus=8")
    budgets = {m["metadata"]["name"]: m["spec"] for m in manifests[2:]}
    assert budgets["digits-head"]["minAvailable"] == 1
    assert budgets["digits-trainers"]["minAvailable"] == 4
    template = groups(manifests)["trainers"]["template"]
    expected = budgets["digits-trainers"]["selector"]["matchLabels"]
    assert expected.items() <= template["metadata"]["labels"].items()


def test_extra_labels_never_replace_ours(rendered):
    for component, template in templates_of(ray_job(rendered(**EVERYTHING))).items():
        labels = template["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == "dist-tl"
        assert ("azure.workload.identity/use" in labels) == (component != "submitter")


def test_a_queue_adds_the_label_of_kueue(rendered):
    metadata = ray_job(rendered(queue="gpus"))["metadata"]
    assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert "kueue.x-k8s.io/queue-name" not in ray_job(rendered())["metadata"]["labels"]


@pytest.mark.parametrize(
    ("run", "label"),
    [
        ("s3://b/runs/birds", "birds"),
        ("s3://b/My_Run.3/", "my-run-3"),
        ("s3://b/2026-11-21", "run-2026-11-21"),
        ("s3://b/a__b", "a-b"),
        (f"s3://b/{'x' * MAX_LABEL}", "x" * MAX_LABEL),
    ],
)
def test_a_run_is_named_after_its_last_path_component(job_of, run, label):
    assert run_label(job_of("digits", f"run={run}")) == label


@pytest.mark.parametrize("run", ["s3://b/___", f"s3://b/{'x' * (MAX_LABEL + 1)}"])
def test_a_run_without_a_valid_name_is_rejected(job_of, run):
    with pytest.raises(ConfigError, match=r"^run: "):
        run_label(job_of("digits", f"run={run}"))


def test_every_attempt_has_its_own_name(rendered):
    names = [ray_job(rendered(attempt=n))["metadata"]["name"] for n in (1, 2, 3)]
    assert names == ["digits", "digits--2", "digits--3"]
    all_labels = [ray_job(rendered(attempt=n))["metadata"]["labels"] for n in (1, 3)]
    assert {labels["app.kubernetes.io/part-of"] for labels in all_labels} == {"digits"}
    with pytest.raises(ConfigError, match="attempt"):
        rendered(attempt=0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("run=runs/here", "store=embedded"), "^store: .*store: embedded"),
        (("run=runs/here",), "^store: "),
        (("run=file:///runs/here",), "^store: "),
        (("run=s3://me:0123456789secret@b/runs/x",), r"^run: .*\*\*\*"),
        (("session.object_store_mb=4000",), "shm_gb"),
    ],
)
def test_a_job_that_cannot_run_on_pods_is_rejected_with_the_reason(rendered, overrides, message):
    with pytest.raises(ConfigError, match=message):
        rendered("digits", *overrides)

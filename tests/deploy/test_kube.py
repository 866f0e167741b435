"""Jobs submitted, followed, scaled and stopped: the real client against a fake API server."""

import socket
import threading
import time
from pathlib import Path

import pytest
from fake_kube_api import NAMESPACE, TOKEN, FakeKubeApi, until

pytest.importorskip("kubernetes", reason="pip install 'dist_tl[kube]'")

from dist_tl.deploy import kube_follow
from dist_tl.deploy.kube import Kube, KubeJob, connect, follow_with_retries
from dist_tl.deploy.kube_api import load_api
from dist_tl.errors import ConfigError, HeadLostError, JobDeletedError, WorkerError
from dist_tl.storage.attempts import SUBMISSION

FAILED = "Job entrypoint command failed with exit code {}, last available logs:\n exit code 7"
LOST = {"reason": "JobStatusCheckTimeoutExceeded", "message": "timed out"}


@pytest.fixture
def api(monkeypatch, tmp_path):
    server = FakeKubeApi()
    for name in ("dist-tl-head", "dist-tl-worker", "dist-tl-submitter"):
        server.put("serviceaccounts", name)
    server.put("secrets", "s3", data={"AWS_SECRET_ACCESS_KEY": "bm90IHlvdXJz"})
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "config")))
    monkeypatch.setattr(kube_follow, "DRAIN_S", 0.3)
    yield server
    server.close()


@pytest.fixture
def kube(api):
    return Kube(load_api(), poll_s=0.02, wait_s=2.0)


@pytest.fixture
def recorder():
    return Recorder()


class Recorder:
    def __init__(self):
        self.lines, self.states = [], []

    @property
    def callbacks(self):
        return {"on_line": self.lines.append, "on_state": self.states.append}


def operator_that_ends(api, state="Complete", job_status="SUCCEEDED", **more):
    """Returns an operator whose driver logs two lines and ends in the given state."""

    def run_job(name):
        api.set_status(name, "Initializing")
        api.start_cluster(name)
        log = api.add_pod(name, "submitter")
        log.write("one")
        api.set_status(name, "Running", "RUNNING")
        log.write("two")
        api.get("pods", f"{name}-submitter")["status"]["phase"] = "Succeeded"
        log.close()
        api.set_status(name, state, job_status, **more)

    return run_job


def creations(api, plural):
    return [q for method, path, q in api.requests if method == "POST" and path.endswith(plural)]


def test_submit_creates_the_ray_job_and_what_it_owns(api, kube, job_of, options):
    submitted = kube.submit(job_of("digits"), options())
    assert submitted == KubeJob(NAMESPACE, "digits", 1)
    owner = api.get("rayjobs", "digits")["metadata"]["uid"]
    for plural, names in (
        ("configmaps", ["digits"]),
        ("poddisruptionbudgets", ["digits-head", "digits-trainers"]),
    ):
        assert api.names(plural) == names
        for name in names:
            [reference] = api.get(plural, name)["metadata"]["ownerReferences"]
            assert reference["uid"] == owner
            assert reference["kind"] == "RayJob"


def test_every_manifest_is_dry_run_before_any_is_created(api, kube, job_of, options):
    kube.submit(job_of("digits"), options())
    for plural, times in (("rayjobs", 1), ("configmaps", 1), ("poddisruptionbudgets", 2)):
        dry_runs = [query.get("dryRun") for query in creations(api, plural)]
        assert dry_runs == ["All"] * times + [None] * times


def test_the_namespace_of_the_options_overrides_that_of_the_context(api, kube, job_of, options):
    for plural, name in (("secrets", "s3"), ("serviceaccounts", "dist-tl-head")):
        api.objects[plural, "other", name] = api.get(plural, name)
    other = options(namespace="other", worker_account=None, submitter_account=None)
    assert kube.submit(job_of("digits"), other).namespace == "other"
    assert kube.find("s3://bucket/runs/digits", namespace="other").name == "digits"


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        (("Complete", "SUCCEEDED"), 0),
        (("Failed", "FAILED", FAILED.format(2)), 2),
        (("Failed", "FAILED", FAILED.format(3)), 3),
        (("Failed", "FAILED", FAILED.format(-9)), 3),
        (("Failed", "FAILED", "no exit status given"), 3),
        (("Complete", "STOPPED"), 3),
        (("Failed", "SUCCEEDED", "the submitter broke"), 0),
    ],
)
def test_follow_returns_the_exit_code_of_the_driver(
    api, kube, recorder, job_of, options, ends, code
):
    if len(ends) == 3:
        ends, more = ends[:2], {"message": ends[2]}
    else:
        more = {}
    api.on_ray_job = operator_that_ends(api, *ends, **more)
    submitted = kube.submit(job_of("digits"), options())
    assert kube.follow(submitted, **recorder.callbacks) == code
    assert recorder.lines == ["one", "two"]
    assert recorder.states[-1].startswith(f"{ends[0]}: {ends[1]}")


def test_lines_are_streamed_and_each_state_is_reported_once(api, kube, recorder, job_of, options):
    submitted = kube.submit(job_of("digits"), options())
    log = api.add_pod("digits", "submitter", phase="Pending")
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(kube.follow(submitted, **recorder.callbacks))
    )
    thread.start()
    until(lambda: recorder.states == ["New"])
    api.set_status("digits", "Running", "RUNNING")
    api.get("pods", "digits-submitter")["status"]["phase"] = "Running"
    for i in range(20):
        log.write(f"line {i}")
        until(lambda i=i: recorder.lines[-1:] == [f"line {i}"])
    api.get("pods", "digits-submitter")["status"]["phase"] = "Succeeded"
    log.close()
    api.set_status("digits", "Complete", "SUCCEEDED")
    thread.join(5)
    assert codes == [0]
    assert recorder.states == ["New", "Running: RUNNING", "Complete: SUCCEEDED"]
    assert recorder.lines == [f"line {i}" for i in range(20)]


def test_a_broken_log_stream_resumes_without_repeated_lines(api, kube, recorder, job_of, options):
    submitted = kube.submit(job_of("digits"), options())
    log = api.add_pod("digits", "submitter")
    log.write(*(f"line {i}" for i in range(60)))
    log.breaks_at = 41
    api.set_status("digits", "Running", "RUNNING")
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(kube.follow(submitted, **recorder.callbacks))
    )
    thread.start()
    until(lambda: len(recorder.lines) == 60)
    log.close()
    api.set_status("digits", "Complete", "SUCCEEDED")
    thread.join(5)
    assert codes == [0]
    assert recorder.lines == [f"line {i}" for i in range(60)]
    assert log.opened >= 2


def test_the_logs_of_all_submitter_pods_are_read(api, kube, recorder, job_of, options):
    def run_job(name):
        for i in (1, 2):
            log = api.add_pod(name, "submitter", phase="Succeeded", name=f"{name}-{i}")
            log.write(f"of pod {i}")
            log.close()
        api.set_status(name, "Complete", "SUCCEEDED")

    api.on_ray_job = run_job
    kube.follow(kube.submit(job_of("digits"), options()), **recorder.callbacks)
    assert recorder.lines == ["of pod 1", "of pod 2"]


def test_without_permission_to_read_logs_the_job_is_still_followed(
    api, kube, recorder, job_of, options
):
    api.forbidden.add(("get", "pods/log"))
    submitted = kube.submit(job_of("digits"), options())
    api.add_pod("digits", "submitter")
    end = threading.Timer(0.3, api.set_status, ("digits", "Complete", "SUCCEEDED"))
    end.start()
    assert kube.follow(submitted, **recorder.callbacks) == 0
    assert any("no log" in state and "pods/log" in state for state in recorder.states)


def test_a_lost_head_raises_and_does_not_wait_for_its_log(api, kube, recorder, job_of, options):
    submitted = kube.submit(job_of("digits"), options())
    api.add_pod("digits", "submitter").write("last words")
    api.set_status("digits", "Failed", "RUNNING", **LOST)
    with pytest.raises(HeadLostError, match="digits"):
        kube.follow(submitted, **recorder.callbacks)
    assert recorder.lines == ["last words"]


def submit_and_follow(kube, job, options, recorder, *, attempts):
    submitted = kube.submit(job, options)
    return follow_with_retries(
        kube, submitted, lambda: job, options, max_attempts=attempts, **recorder.callbacks
    )


def test_after_a_lost_head_the_next_attempt_is_submitted(api, kube, recorder, job_of, options):
    api.deletion_s = 0.05
    found_clusters = []

    def run_job(name):
        if name == "digits":
            operator_that_ends(api, "Failed", "RUNNING", **LOST)(name)
        else:
            found_clusters.extend(api.names("rayclusters"))
            operator_that_ends(api)(name)

    api.on_ray_job = run_job
    code = submit_and_follow(kube, job_of("digits"), options(), recorder, attempts=3)
    assert code == 0
    assert api.names("rayjobs") == ["digits", "digits--2"]
    assert api.names("configmaps") == ["digits", "digits--2"]
    assert found_clusters == []  # the unreachable head may keep running: its cluster goes first
    assert any("head" in state and "attempts left" in state for state in recorder.states)
    assert "submitted digits--2 to namespace science" in recorder.states
    assert kube.find("s3://bucket/runs/digits").attempt == 2


def test_attempts_run_out(api, kube, recorder, job_of, options):
    api.on_ray_job = operator_that_ends(api, "Failed", "RUNNING", **LOST)
    with pytest.raises(HeadLostError):
        submit_and_follow(kube, job_of("digits"), options(), recorder, attempts=2)
    assert api.names("rayjobs") == ["digits", "digits--2"]
    submitted, job = KubeJob("science", "digits--2", 2), job_of("digits")
    with pytest.raises(ConfigError, match="max_attempts"):
        follow_with_retries(
            kube, submitted, lambda: job, options(), max_attempts=0, **recorder.callbacks
        )


def test_a_stopped_job_is_not_resubmitted(api, kube, recorder, job_of, options):
    api.deletion_s = 0.05
    api.on_ray_job = lambda name: api.set_status(name, "Running", "RUNNING")

    def stop():
        until(lambda: "Running: RUNNING" in recorder.states)
        kube.stop(kube.find("s3://bucket/runs/digits"))

    threading.Thread(target=stop).start()
    with pytest.raises(JobDeletedError, match="deleted"):
        submit_and_follow(kube, job_of("digits"), options(), recorder, attempts=3)
    assert api.names("rayjobs") == api.names("configmaps") == []


def submission_of(api, name):
    head = api.get("rayjobs", name)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"][
        "containers"
    ][0]
    return {each["name"]: each["value"] for each in head["env"]}[SUBMISSION]


def test_every_submission_has_an_id_of_its_own(api, kube, job_of, options):
    api.deletion_s = 0.05
    kube.submit(job_of("digits"), options())
    first = submission_of(api, "digits")
    kube.stop(kube.find("s3://bucket/runs/digits"))
    kube.submit(job_of("digits"), options())  # of the same name
    assert submission_of(api, "digits") != first


def test_submit_is_rejected_while_an_attempt_is_active(api, kube, job_of, options):
    kube.submit(job_of("digits"), options())
    api.set_status("digits", "Running", "RUNNING")
    with pytest.raises(ConfigError, match=r"digits \(Running: RUNNING\); stop it"):
        kube.submit(job_of("digits"), options())
    assert api.names("rayjobs") == ["digits"]


def test_take_over_waits_until_the_active_attempt_is_gone(api, kube, job_of, options):
    api.deletion_s = 0.1
    kube.submit(job_of("digits"), options())
    api.start_cluster("digits")
    seen = []
    api.on_ray_job = lambda name: seen.extend(api.names("rayclusters"))
    submitted = kube.submit(job_of("digits"), options(), take_over=True)
    assert submitted.name == "digits--2"
    until(lambda: api.names("rayjobs") == ["digits--2"])
    assert seen == []
    assert api.names("configmaps") == ["digits--2"]


def test_an_attempt_that_does_not_terminate_raises(api, kube, job_of, options):
    api.deletion_s = 60
    kube.submit(job_of("digits"), options())
    slow = Kube(load_api(), poll_s=0.02, wait_s=0.1)
    with pytest.raises(WorkerError, match=r"not deleted within 0\.1 s"):
        slow.submit(job_of("digits"), options(), take_over=True)
    assert len([q for q in creations(api, "rayjobs") if not q.get("dryRun")]) == 1


def test_ended_attempts_do_not_block_the_next_one(api, kube, job_of, options):
    for attempt in (1, 2, 3):
        submitted = kube.submit(job_of("digits"), options())
        assert submitted.attempt == attempt
        api.set_status(submitted.name, "Failed", "FAILED")


def test_two_runs_with_the_same_last_path_component_are_told_apart(api, kube, job_of, options):
    kube.submit(job_of("digits"), options())
    with pytest.raises(
        ConfigError, match=r"s3://bucket/runs/digits; change the last path component"
    ):
        kube.submit(job_of("digits", "run=s3://other/digits"), options(), take_over=True)
    with pytest.raises(ConfigError, match="last path component"):
        kube.find("s3://other/digits")


def test_leftovers_of_a_deleted_job_are_replaced(api, kube, job_of, options):
    labels = {"app.kubernetes.io/name": "dist-tl"}
    api.put("configmaps", "digits", metadata={"labels": labels}, data={"job.yaml": "old"})
    kube.submit(job_of("digits"), options())
    assert "kind: transfer" in api.get("configmaps", "digits")["data"]["job.yaml"]


def test_objects_of_others_are_not_touched_and_submit_cleans_up(api, kube, job_of, options):
    api.put("configmaps", "digits", data={"mine": "yes"})
    with pytest.raises(ConfigError, match="configmaps digits"):
        kube.submit(job_of("digits"), options())
    until(lambda: api.names("rayjobs") == [])
    assert api.get("configmaps", "digits")["data"] == {"mine": "yes"}


@pytest.mark.parametrize("plural", ["configmaps", "poddisruptionbudgets"])
def test_a_partly_failed_submit_cleans_up(api, kube, job_of, options, plural):
    api.failures["create", plural] = 500
    with pytest.raises(WorkerError, match="500: etcd is not well; try again"):
        kube.submit(job_of("digits"), options())
    until(lambda: not api.names("rayjobs") + api.names("configmaps"))
    assert kube.submit(job_of("digits"), options()).attempt == 1


def test_without_the_operator_the_error_says_what_to_install(api, kube, job_of, options):
    api.has_operator = False
    with pytest.raises(ConfigError, match=r"KubeRay operator.*k8s/README\.md"):
        kube.submit(job_of("digits"), options())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"credentials": "none-such"}, 'credentials: secrets "none-such" not found'),
        (
            {"image_pull_secrets": ("s3", "registry")},
            'image_pull_secrets: secrets "registry" not found',
        ),
        ({"head_account": "nobody"}, 'head_account: serviceaccounts "nobody" not found'),
        ({"worker_account": "nobody"}, 'worker_account: serviceaccounts "nobody" not found'),
    ],
)
def test_secrets_and_accounts_of_the_options_must_exist(
    api, kube, job_of, options, changes, message
):
    with pytest.raises(ConfigError, match=message):
        kube.submit(job_of("digits"), options(**changes))
    assert api.names("rayjobs") == []


def test_submit_works_without_permission_to_read_secrets(api, kube, job_of, options):
    api.forbidden |= {("get", "secrets"), ("get", "serviceaccounts")}
    assert kube.submit(job_of("digits"), options(credentials="none-such")).attempt == 1


@pytest.mark.parametrize(
    ("verb", "plural"),
    [
        ("list", "rayjobs"),
        ("create", "rayjobs"),
        ("create", "configmaps"),
        ("create", "poddisruptionbudgets"),
    ],
)
def test_a_missing_permission_is_reported_before_anything_is_created(
    api, kube, job_of, options, verb, plural
):
    api.forbidden.add((verb, plural))
    with pytest.raises(ConfigError, match=rf"no permission to {verb} {plural}.*dist-tl-client"):
        kube.submit(job_of("digits"), options())
    assert api.names("rayjobs") == api.names("configmaps") == []


def test_a_schema_error_is_reported_and_nothing_is_created(api, kube, job_of, options, monkeypatch):
    from dist_tl.deploy import kube as module

    def invalid(*args, **kwargs):
        *others, budget = render(*args, **kwargs)
        return [*others, {**budget, "surprise": 1}]

    pytest.importorskip("kubernetes_validate")
    render = module.render
    monkeypatch.setattr(module, "render", invalid)
    with pytest.raises(ConfigError, match=r"422.*surprise"):
        kube.submit(job_of("digits"), options())
    assert api.names("rayjobs") == []


def test_a_wrong_token_is_rejected_and_never_shown(api, tmp_path, monkeypatch, job_of, options):
    path = api.kubeconfig(tmp_path / "other", token="wrong-0123456789")
    monkeypatch.setenv("KUBECONFIG", str(path))
    with pytest.raises(ConfigError, match="rejected the credentials") as caught:
        connect().submit(job_of("digits"), options())
    assert "wrong-0123456789" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_closed_port_is_reported_at_once(api, tmp_path, monkeypatch, job_of, options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "other", url=url)))
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"no valid response.*127\.0\.0\.1"):
        connect().submit(job_of("digits"), options())
    assert time.monotonic() - began < 2


def test_a_server_that_accepts_but_never_responds_is_reported(
    api, tmp_path, monkeypatch, job_of, options
):
    from dist_tl.deploy import kube_api

    monkeypatch.setattr(kube_api, "CONNECT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "other", url=url)))
        began = time.monotonic()
        with pytest.raises(WorkerError, match="no valid response"):
            connect().submit(job_of("digits"), options())
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("url", ["https://no-such-host.invalid", "https://{}"])
def test_a_wrong_address_is_reported_without_client_internals(api, tmp_path, monkeypatch, url):
    url = url.format(api.url.removeprefix("http://"))  # TLS to a plain HTTP server
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "other", url=url)))
    with pytest.raises(WorkerError, match="no valid response") as caught:
        connect().find("s3://bucket/runs/digits")
    assert "0x" not in str(caught.value)
    assert "ConnectionPool" not in str(caught.value)


def test_following_survives_a_temporarily_unavailable_server(api, kube, recorder, job_of, options):
    submitted = kube.submit(job_of("digits"), options())
    api.failures["get", "rayjobs"] = 503
    end = threading.Timer(0.2, api.set_status, ("digits", "Complete", "SUCCEEDED"))
    end.start()
    assert kube.follow(submitted, **recorder.callbacks) == 0
    assert any("no response" in state for state in recorder.states)


def test_following_gives_up_after_patience_s(api, kube, recorder, job_of, options, monkeypatch):
    submitted = kube.submit(job_of("digits"), options())
    monkeypatch.setattr(kube_follow, "PATIENCE_S", 0.0)
    api.failures["get", "rayjobs"] = 503
    with pytest.raises(WorkerError, match="503"):
        kube.follow(submitted, **recorder.callbacks)


@pytest.mark.parametrize("text", ["", "clusters: 7", "{", "current-context: nowhere\n"])
def test_a_damaged_context_is_reported(tmp_path, monkeypatch, text):
    (tmp_path / "config").write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with pytest.raises(ConfigError, match="kubectl config"):
        connect()


def test_a_missing_context_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="kubectl config get-contexts"):
        connect()


def test_in_a_pod_its_service_account_is_used(tmp_path, monkeypatch):
    from kubernetes.config import incluster_config

    from dist_tl.deploy import kube_api

    for name in ("token", "ca.crt", "namespace"):
        (tmp_path / name).write_text("of-the-pod\n")
    monkeypatch.setattr(kube_api, "IN_CLUSTER", tmp_path)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setattr(kube_api, "KubeApi", lambda settings, namespace: (settings, namespace))
    configuration, namespace = load_api()
    assert (configuration.host, namespace) == ("https://10.0.0.1:443", "of-the-pod")
    assert load_api("mine")[1] == "mine"


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(ConfigError, match=r'pip install "dist_tl\[kube\]"'):
        connect()


def test_follow_returns_for_a_suspended_job_and_waits_for_a_queued_one(
    api, kube, recorder, job_of, options
):
    submitted = kube.submit(job_of("digits"), options(suspend=True))
    api.set_status("digits", "Suspended")
    assert kube.follow(submitted, **recorder.callbacks) == 3
    assert "Suspended: waiting to be resumed" in recorder.states

    queued = kube.submit(job_of("digits", "run=s3://bucket/queued"), options(queue="gpus"))
    api.set_status("queued", "Suspended")
    admit = threading.Timer(0.2, api.set_status, ("queued", "Complete", "SUCCEEDED"))
    admit.start()
    assert kube.follow(queued, **recorder.callbacks) == 0
    assert "Suspended: waiting in its queue" in recorder.states


def test_status_counts_pods_and_reports_why_they_wait(api, kube, job_of, options):
    submitted = kube.submit(job_of("digits"), options())
    assert kube.status(submitted).state == "New"
    api.set_status(
        "digits", "Running", "RUNNING", startTime="2026-01-01T00:00:00Z", message="token=abc"
    )
    api.add_pod("digits", "head")
    api.add_pod("digits", "trainers", name="a")
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    container = {
        "name": "it", "image": "x", "imageID": "", "ready": False, "restartCount": 0,
    }  # fmt: skip
    status = {"containerStatuses": [{**container, "state": waiting}]}
    api.add_pod("digits", "trainers", name="b", phase="Pending", **status)
    status = kube.status(submitted)
    assert (status.state, status.job_status, status.message) == ("Running", "RUNNING", "token=***")
    assert status.started.isoformat() == "2026-01-01T00:00:00+00:00"
    assert status.ended is None
    assert status.pods == {"head": {"Running": 1}, "trainers": {"Running": 1, "Pending": 1}}
    assert status.waiting == ("b: ImagePullBackOff: no such image",)
    with pytest.raises(ConfigError, match="get rayjobs"):
        kube.status(KubeJob(NAMESPACE, "none", 1))


def test_logs_with_and_without_follow(api, kube, recorder, job_of, options):
    submitted = kube.submit(job_of("digits"), options())
    with pytest.raises(WorkerError, match="has not started"):
        kube.logs(submitted, False, recorder.lines.append)
    log = api.add_pod("digits", "submitter")
    log.write("one", "two")
    kube.logs(submitted, False, recorder.lines.append)
    assert recorder.lines == ["one", "two"]
    threading.Timer(0.1, log.write, ("three",)).start()
    threading.Timer(0.2, log.close).start()
    threading.Timer(0.3, api.set_status, ("digits", "Failed", "RUNNING"), LOST).start()
    kube.logs(submitted, True, recorder.lines.append)
    assert recorder.lines == ["one", "two", "one", "two", "three"]


def test_stop_waits_until_everything_is_deleted(api, kube, job_of, options):
    api.deletion_s = 0.1
    submitted = kube.submit(job_of("digits"), options())
    api.start_cluster("digits")
    kube.stop(submitted)
    for plural in ("rayjobs", "rayclusters", "configmaps", "poddisruptionbudgets"):
        assert api.names(plural) == []
    kube.stop(submitted)


@pytest.mark.parametrize(("low", "high", "pods"), [(2, 5, 2), (0, 8, 1), (4, 4, 4), (0, 1, 1)])
def test_scale_sets_the_bounds_of_one_worker_group(api, kube, job_of, options, low, high, pods):
    submitted = kube.submit(job_of("digits"), options())
    api.start_cluster("digits")
    trainers, _ = api.get("rayclusters", "digits-abcde")["spec"]["workerGroupSpecs"]
    kube.scale(submitted, "generators", low, high)
    same, changed = api.get("rayclusters", "digits-abcde")["spec"]["workerGroupSpecs"]
    assert same == trainers
    assert (changed["minReplicas"], changed["maxReplicas"]) == (low, high)
    assert changed["replicas"] == pods


def test_scaling_without_a_cluster_applies_to_the_next_one(api, kube, job_of, options):
    submitted = kube.submit(job_of("digits"), options())
    kube.scale(submitted, "generators", 2, 5)
    api.start_cluster("digits")
    _, generators = api.get("rayclusters", "digits-abcde")["spec"]["workerGroupSpecs"]
    assert (generators["minReplicas"], generators["maxReplicas"]) == (2, 5)


def test_scale_rejects_invalid_requests(api, kube, job_of, options):
    submitted = kube.submit(job_of("digits"), options())
    api.start_cluster("digits")
    with pytest.raises(ConfigError, match=r"\(trainers, generators\), got 'experts'"):
        kube.scale(submitted, "experts", 1, 2)
    for low, high in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match="expected 0 <= low <= high"):
            kube.scale(submitted, "generators", low, high)
    api.forbidden.add(("patch", "rayclusters"))
    with pytest.raises(ConfigError, match="no permission to patch rayclusters"):
        kube.scale(submitted, "generators", 1, 2)
    api.set_status("digits", "Complete", "SUCCEEDED")
    with pytest.raises(ConfigError, match="has ended and cannot be scaled"):
        kube.scale(submitted, "generators", 1, 2)


def test_a_run_that_was_never_submitted_is_not_found(kube):
    with pytest.raises(ConfigError, match="submit it"):
        kube.find("s3://bucket/runs/none")


def test_the_client_role_grants_every_request_of_the_client():
    import yaml

    path = Path(__file__).parents[2] / "k8s" / "base" / "accounts.yaml"
    [role] = [m for m in yaml.safe_load_all(path.read_text()) if m["kind"] == "Role"]
    granted = {
        (verb, resource)
        for rule in role["rules"]
        for verb in rule["verbs"]
        for resource in rule["resources"]
    }
    needed = {(verb, "rayjobs") for verb in ("get", "list", "create", "patch", "delete")}
    needed |= {(verb, "rayclusters") for verb in ("get", "patch", "delete")}
    for plural in ("configmaps", "poddisruptionbudgets"):
        needed |= {(verb, plural) for verb in ("get", "create", "delete")}
    needed |= {("list", "pods"), ("get", "pods/log"), ("get", "serviceaccounts")}
    assert needed <= granted
    assert not {resource for _, resource in granted} & {"secrets"}

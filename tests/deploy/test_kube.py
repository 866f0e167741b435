"""Jobs handed in, followed, scaled and stopped: the real client against a server of API manners."""

import socket
import threading
import time
from pathlib import Path

import pytest
from stand_in_api import NAMESPACE, TOKEN, StandInApi, until

pytest.importorskip("kubernetes", reason="pip install 'dist_tl[kube]'")

from dist_tl.deploy import kube_follow
from dist_tl.deploy.kube import Kube, KubeJob, connect, follow_to_the_end
from dist_tl.deploy.kube_api import load_api
from dist_tl.errors import ConfigError, HeadLostError, JobDeletedError, WorkerError
from dist_tl.storage.attempts import SUBMISSION

FAILED = "Job entrypoint command failed with exit code {}, last available logs:\n exit code 7"
LOST = {"reason": "JobStatusCheckTimeoutExceeded", "message": "timed out"}


@pytest.fixture
def api(monkeypatch, tmp_path):
    server = StandInApi()
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
def told():
    return Told()


class Told:
    def __init__(self):
        self.lines, self.states = [], []

    @property
    def callbacks(self):
        return {"on_line": self.lines.append, "on_state": self.states.append}


def runs_and_ends(api, state="Complete", job_status="SUCCEEDED", **more):
    """An operator whose driver says two lines and ends so."""

    def play(name):
        api.set_status(name, "Initializing")
        api.start_cluster(name)
        log = api.add_pod(name, "submitter")
        log.say("one")
        api.set_status(name, "Running", "RUNNING")
        log.say("two")
        api.get("pods", f"{name}-submitter")["status"]["phase"] = "Succeeded"
        log.close()
        api.set_status(name, state, job_status, **more)

    return play


def creations(api, plural):
    return [q for method, path, q in api.requests if method == "POST" and path.endswith(plural)]


def test_a_job_is_made_of_what_the_server_takes(api, kube, job_of, options):
    made = kube.submit(job_of("digits"), options())
    assert made == KubeJob(NAMESPACE, "digits", 1)
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


def test_everything_is_rehearsed_before_anything_is_made(api, kube, job_of, options):
    kube.submit(job_of("digits"), options())
    for plural, times in (("rayjobs", 1), ("configmaps", 1), ("poddisruptionbudgets", 2)):
        inputs = [query.get("dryRun") for query in creations(api, plural)]
        assert inputs == ["All"] * times + [None] * times


def test_the_namespace_of_the_options_goes_before_that_of_the_context(api, kube, job_of, options):
    for plural, name in (("secrets", "s3"), ("serviceaccounts", "dist-tl-head")):
        api.objects[plural, "other", name] = api.get(plural, name)
    inputs = options(namespace="other", worker_account=None, submitter_account=None)
    assert kube.submit(job_of("digits"), inputs).namespace == "other"
    assert kube.find("s3://bucket/runs/digits", namespace="other").name == "digits"


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        (("Complete", "SUCCEEDED"), 0),
        (("Failed", "FAILED", FAILED.format(2)), 2),
        (("Failed", "FAILED", FAILED.format(3)), 3),
        (("Failed", "FAILED", FAILED.format(-9)), 3),
        (("Failed", "FAILED", "no word of a code"), 3),
        (("Complete", "STOPPED"), 3),
        (("Failed", "SUCCEEDED", "the submitter broke"), 0),
    ],
)
def test_the_code_is_that_of_the_driver(api, kube, told, job_of, options, ends, code):
    if len(ends) == 3:
        ends, more = ends[:2], {"message": ends[2]}
    else:
        more = {}
    api.on_ray_job = runs_and_ends(api, *ends, **more)
    made = kube.submit(job_of("digits"), options())
    assert kube.follow(made, **told.callbacks) == code
    assert told.lines == ["one", "two"]
    assert told.states[-1].startswith(f"{ends[0]}: {ends[1]}")


def test_lines_come_while_the_job_runs_and_states_once(api, kube, told, job_of, options):
    made = kube.submit(job_of("digits"), options())
    log = api.add_pod("digits", "submitter", phase="Pending")
    codes = []
    thread = threading.Thread(target=lambda: codes.append(kube.follow(made, **told.callbacks)))
    thread.start()
    until(lambda: told.states == ["New"])
    api.set_status("digits", "Running", "RUNNING")
    api.get("pods", "digits-submitter")["status"]["phase"] = "Running"
    for i in range(20):
        log.say(f"line {i}")
        until(lambda i=i: told.lines[-1:] == [f"line {i}"])
    api.get("pods", "digits-submitter")["status"]["phase"] = "Succeeded"
    log.close()
    api.set_status("digits", "Complete", "SUCCEEDED")
    thread.join(5)
    assert codes == [0]
    assert told.states == ["New", "Running: RUNNING", "Complete: SUCCEEDED"]
    assert told.lines == [f"line {i}" for i in range(20)]


def test_a_log_that_breaks_off_is_read_on_without_a_line_twice(api, kube, told, job_of, options):
    made = kube.submit(job_of("digits"), options())
    log = api.add_pod("digits", "submitter")
    log.say(*(f"line {i}" for i in range(60)))
    log.breaks_at = 41
    api.set_status("digits", "Running", "RUNNING")
    codes = []
    thread = threading.Thread(target=lambda: codes.append(kube.follow(made, **told.callbacks)))
    thread.start()
    until(lambda: len(told.lines) == 60)
    log.close()
    api.set_status("digits", "Complete", "SUCCEEDED")
    thread.join(5)
    assert codes == [0]
    assert told.lines == [f"line {i}" for i in range(60)]
    assert log.opened >= 2


def test_the_submitter_after_a_retry_is_read_too(api, kube, told, job_of, options):
    def play(name):
        for i in (1, 2):
            log = api.add_pod(name, "submitter", phase="Succeeded", name=f"{name}-{i}")
            log.say(f"of pod {i}")
            log.close()
        api.set_status(name, "Complete", "SUCCEEDED")

    api.on_ray_job = play
    kube.follow(kube.submit(job_of("digits"), options()), **told.callbacks)
    assert told.lines == ["of pod 1", "of pod 2"]


def test_a_missing_right_to_logs_is_said_and_the_job_followed(api, kube, told, job_of, options):
    api.forbidden.add(("get", "pods/log"))
    made = kube.submit(job_of("digits"), options())
    api.add_pod("digits", "submitter")
    end = threading.Timer(0.3, api.set_status, ("digits", "Complete", "SUCCEEDED"))
    end.start()
    assert kube.follow(made, **told.callbacks) == 0
    assert any("no log" in state and "pods/log" in state for state in told.states)


def test_a_lost_head_is_told_apart_and_does_not_wait_for_its_log(api, kube, told, job_of, options):
    made = kube.submit(job_of("digits"), options())
    api.add_pod("digits", "submitter").say("last words")
    api.set_status("digits", "Failed", "RUNNING", **LOST)
    with pytest.raises(HeadLostError, match="digits"):
        kube.follow(made, **told.callbacks)
    assert told.lines == ["last words"]


def hand_in_and_follow(kube, job, options, told, *, attempts):
    made = kube.submit(job, options)
    return follow_to_the_end(
        kube, made, lambda: job, options, max_attempts=attempts, **told.callbacks
    )


def test_a_lost_head_is_followed_by_the_next_attempt(api, kube, told, job_of, options):
    api.deletion_s = 0.05
    found_clusters = []

    def play(name):
        if name == "digits":
            runs_and_ends(api, "Failed", "RUNNING", **LOST)(name)
        else:
            found_clusters.extend(api.names("rayclusters"))
            runs_and_ends(api)(name)

    api.on_ray_job = play
    code = hand_in_and_follow(kube, job_of("digits"), options(), told, attempts=3)
    assert code == 0
    assert api.names("rayjobs") == ["digits", "digits--2"]
    assert api.names("configmaps") == ["digits", "digits--2"]
    assert found_clusters == []  # a head out of sight may live on: its cluster is ended first
    assert any("head" in state and "attempts left" in state for state in told.states)
    assert "submitted digits--2 to namespace science" in told.states
    assert kube.find("s3://bucket/runs/digits").attempt == 2


def test_attempts_run_out(api, kube, told, job_of, options):
    api.on_ray_job = runs_and_ends(api, "Failed", "RUNNING", **LOST)
    with pytest.raises(HeadLostError):
        hand_in_and_follow(kube, job_of("digits"), options(), told, attempts=2)
    assert api.names("rayjobs") == ["digits", "digits--2"]
    made, job = KubeJob("science", "digits--2", 2), job_of("digits")
    with pytest.raises(ConfigError, match="max_attempts"):
        follow_to_the_end(kube, made, lambda: job, options(), max_attempts=0, **told.callbacks)


def test_a_job_that_was_stopped_is_not_started_again(api, kube, told, job_of, options):
    api.deletion_s = 0.05
    api.on_ray_job = lambda name: api.set_status(name, "Running", "RUNNING")

    def stop():
        until(lambda: "Running: RUNNING" in told.states)
        kube.stop(kube.find("s3://bucket/runs/digits"))

    threading.Thread(target=stop).start()
    with pytest.raises(JobDeletedError, match="deleted"):
        hand_in_and_follow(kube, job_of("digits"), options(), told, attempts=3)
    assert api.names("rayjobs") == api.names("configmaps") == []


def submission_of(api, name):
    head = api.get("rayjobs", name)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"][
        "containers"
    ][0]
    return {each["name"]: each["value"] for each in head["env"]}[SUBMISSION]


def test_every_submission_has_a_word_that_its_retries_share(api, kube, job_of, options):
    api.deletion_s = 0.05
    kube.submit(job_of("digits"), options())
    first = submission_of(api, "digits")
    kube.stop(kube.find("s3://bucket/runs/digits"))
    kube.submit(job_of("digits"), options())  # of the same name
    assert submission_of(api, "digits") != first


def test_a_living_attempt_is_refused(api, kube, job_of, options):
    kube.submit(job_of("digits"), options())
    api.set_status("digits", "Running", "RUNNING")
    with pytest.raises(ConfigError, match=r"digits \(Running: RUNNING\); stop it"):
        kube.submit(job_of("digits"), options())
    assert api.names("rayjobs") == ["digits"]


def test_a_living_attempt_is_taken_over_once_it_is_gone(api, kube, job_of, options):
    api.deletion_s = 0.1
    kube.submit(job_of("digits"), options())
    api.start_cluster("digits")
    seen = []
    api.on_ray_job = lambda name: seen.extend(api.names("rayclusters"))
    made = kube.submit(job_of("digits"), options(), take_over=True)
    assert made.name == "digits--2"
    until(lambda: api.names("rayjobs") == ["digits--2"])
    assert seen == []
    assert api.names("configmaps") == ["digits--2"]


def test_an_attempt_that_does_not_end_is_said(api, kube, job_of, options):
    api.deletion_s = 60
    kube.submit(job_of("digits"), options())
    slow = Kube(load_api(), poll_s=0.02, wait_s=0.1)
    with pytest.raises(WorkerError, match=r"to end within 0\.1 s"):
        slow.submit(job_of("digits"), options(), take_over=True)
    assert len([q for q in creations(api, "rayjobs") if not q.get("dryRun")]) == 1


def test_an_attempt_that_ended_does_not_stand_in_the_way(api, kube, job_of, options):
    for attempt in (1, 2, 3):
        made = kube.submit(job_of("digits"), options())
        assert made.attempt == attempt
        api.set_status(made.name, "Failed", "FAILED")


def test_two_runs_of_one_name_do_not_mix(api, kube, job_of, options):
    kube.submit(job_of("digits"), options())
    with pytest.raises(ConfigError, match=r"s3://bucket/runs/digits; choose another last part"):
        kube.submit(job_of("digits", "run=s3://other/digits"), options(), take_over=True)
    with pytest.raises(ConfigError, match="last part"):
        kube.find("s3://other/digits")


def test_what_an_older_job_left_is_replaced(api, kube, job_of, options):
    labels = {"app.kubernetes.io/name": "dist-tl"}
    api.put("configmaps", "digits", metadata={"labels": labels}, data={"job.yaml": "old"})
    kube.submit(job_of("digits"), options())
    assert "kind: transfer" in api.get("configmaps", "digits")["data"]["job.yaml"]


def test_what_others_own_is_left_alone_and_nothing_stays_behind(api, kube, job_of, options):
    api.put("configmaps", "digits", data={"mine": "yes"})
    with pytest.raises(ConfigError, match="configmaps digits"):
        kube.submit(job_of("digits"), options())
    until(lambda: api.names("rayjobs") == [])
    assert api.get("configmaps", "digits")["data"] == {"mine": "yes"}


@pytest.mark.parametrize("plural", ["configmaps", "poddisruptionbudgets"])
def test_a_failure_in_between_leaves_nothing_behind(api, kube, job_of, options, plural):
    api.failures["create", plural] = 500
    with pytest.raises(WorkerError, match="500: etcd is not well; try again"):
        kube.submit(job_of("digits"), options())
    until(lambda: not api.names("rayjobs") + api.names("configmaps"))
    assert kube.submit(job_of("digits"), options()).attempt == 1


def test_a_cluster_without_the_operator_says_what_to_install(api, kube, job_of, options):
    api.has_operator = False
    with pytest.raises(ConfigError, match=r"KubeRay operator.*k8s/README\.md"):
        kube.submit(job_of("digits"), options())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"credentials": "none-such"}, "credentials: expected none-such among the secrets"),
        ({"image_pull_secrets": ("s3", "registry")}, "image_pull_secrets: expected registry"),
        ({"head_account": "nobody"}, "head_account: expected nobody"),
        ({"worker_account": "nobody"}, "worker_account: expected nobody"),
    ],
)
def test_what_the_options_name_must_be_there(api, kube, job_of, options, changes, named):
    with pytest.raises(ConfigError, match=named):
        kube.submit(job_of("digits"), options(**changes))
    assert api.names("rayjobs") == []


def test_who_may_not_look_at_secrets_may_submit(api, kube, job_of, options):
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
def test_a_missing_right_is_named_before_anything_is_made(api, kube, job_of, options, verb, plural):
    api.forbidden.add((verb, plural))
    with pytest.raises(ConfigError, match=rf"right to {verb} {plural}.*dist-tl-client"):
        kube.submit(job_of("digits"), options())
    assert api.names("rayjobs") == api.names("configmaps") == []


def test_what_the_schema_refuses_is_said_and_nothing_is_made(
    api, kube, job_of, options, monkeypatch
):
    from dist_tl.deploy import kube as module

    def spoilt(*args, **kwargs):
        *others, budget = render(*args, **kwargs)
        return [*others, {**budget, "surprise": 1}]

    pytest.importorskip("kubernetes_validate")
    render = module.render
    monkeypatch.setattr(module, "render", spoilt)
    with pytest.raises(ConfigError, match=r"422.*surprise"):
        kube.submit(job_of("digits"), options())
    assert api.names("rayjobs") == []


def test_a_wrong_token_is_refused_and_never_said(api, tmp_path, monkeypatch, job_of, options):
    path = api.kubeconfig(tmp_path / "other", token="wrong-0123456789")
    monkeypatch.setenv("KUBECONFIG", str(path))
    with pytest.raises(ConfigError, match="refused the credentials") as caught:
        connect().submit(job_of("digits"), options())
    assert "wrong-0123456789" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_closed_port_is_named_at_once(api, tmp_path, monkeypatch, job_of, options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "other", url=url)))
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"expected an answer.*127\.0\.0\.1"):
        connect().submit(job_of("digits"), options())
    assert time.monotonic() - began < 2


def test_a_server_that_accepts_and_says_nothing_is_named(
    api, tmp_path, monkeypatch, job_of, options
):
    from dist_tl.deploy import kube_api

    monkeypatch.setattr(kube_api, "CONNECT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "other", url=url)))
        began = time.monotonic()
        with pytest.raises(WorkerError, match="expected an answer"):
            connect().submit(job_of("digits"), options())
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("url", ["https://no-such-host.invalid", "https://{}"])
def test_a_wrong_address_is_named_without_the_insides_of_the_client(
    api, tmp_path, monkeypatch, url
):
    url = url.format(api.url.removeprefix("http://"))  # TLS asked of a server that has none
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "other", url=url)))
    with pytest.raises(WorkerError, match="expected an answer") as caught:
        connect().find("s3://bucket/runs/digits")
    assert "0x" not in str(caught.value)
    assert "ConnectionPool" not in str(caught.value)


def test_a_server_that_is_away_for_a_while_loses_nobody(api, kube, told, job_of, options):
    made = kube.submit(job_of("digits"), options())
    api.failures["get", "rayjobs"] = 503
    end = threading.Timer(0.2, api.set_status, ("digits", "Complete", "SUCCEEDED"))
    end.start()
    assert kube.follow(made, **told.callbacks) == 0
    assert any("no answer" in state for state in told.states)


def test_patience_with_a_server_ends(api, kube, told, job_of, options, monkeypatch):
    made = kube.submit(job_of("digits"), options())
    monkeypatch.setattr(kube_follow, "PATIENCE_S", 0.0)
    api.failures["get", "rayjobs"] = 503
    with pytest.raises(WorkerError, match="503"):
        kube.follow(made, **told.callbacks)


@pytest.mark.parametrize("text", ["", "clusters: 7", "{", "current-context: nowhere\n"])
def test_a_damaged_context_is_named(tmp_path, monkeypatch, text):
    (tmp_path / "config").write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with pytest.raises(ConfigError, match="kubectl config"):
        connect()


def test_no_context_at_all_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="kubectl config get-contexts"):
        connect()


def test_in_a_pod_its_own_account_is_used(tmp_path, monkeypatch):
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


def test_without_the_package_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(ConfigError, match=r'pip install "dist_tl\[kube\]"'):
        connect()


def test_a_suspended_job_is_left_and_a_queued_one_waited_for(api, kube, told, job_of, options):
    made = kube.submit(job_of("digits"), options(suspend=True))
    api.set_status("digits", "Suspended")
    assert kube.follow(made, **told.callbacks) == 3
    assert "Suspended: starts when it is resumed" in told.states

    queued = kube.submit(job_of("digits", "run=s3://bucket/queued"), options(queue="gpus"))
    api.set_status("queued", "Suspended")
    admit = threading.Timer(0.2, api.set_status, ("queued", "Complete", "SUCCEEDED"))
    admit.start()
    assert kube.follow(queued, **told.callbacks) == 0
    assert "Suspended: waits in its queue" in told.states


def test_status_counts_pods_and_says_why_they_wait(api, kube, job_of, options):
    made = kube.submit(job_of("digits"), options())
    assert kube.status(made).state == "New"
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
    stands = kube.status(made)
    assert (stands.state, stands.job_status, stands.message) == ("Running", "RUNNING", "token=***")
    assert stands.started.isoformat() == "2026-01-01T00:00:00+00:00"
    assert stands.ended is None
    assert stands.pods == {"head": {"Running": 1}, "trainers": {"Running": 1, "Pending": 1}}
    assert stands.waiting == ("b: ImagePullBackOff: no such image",)
    with pytest.raises(ConfigError, match="get rayjobs"):
        kube.status(KubeJob(NAMESPACE, "none", 1))


def test_logs_so_far_and_to_the_end(api, kube, told, job_of, options):
    made = kube.submit(job_of("digits"), options())
    with pytest.raises(WorkerError, match="has not begun"):
        kube.logs(made, False, told.lines.append)
    log = api.add_pod("digits", "submitter")
    log.say("one", "two")
    kube.logs(made, False, told.lines.append)
    assert told.lines == ["one", "two"]
    threading.Timer(0.1, log.say, ("three",)).start()
    threading.Timer(0.2, log.close).start()
    threading.Timer(0.3, api.set_status, ("digits", "Failed", "RUNNING"), LOST).start()
    kube.logs(made, True, told.lines.append)
    assert told.lines == ["one", "two", "one", "two", "three"]


def test_stop_waits_until_everything_is_gone(api, kube, job_of, options):
    api.deletion_s = 0.1
    made = kube.submit(job_of("digits"), options())
    api.start_cluster("digits")
    kube.stop(made)
    for plural in ("rayjobs", "rayclusters", "configmaps", "poddisruptionbudgets"):
        assert api.names(plural) == []
    kube.stop(made)


@pytest.mark.parametrize(("low", "high", "pods"), [(2, 5, 2), (0, 8, 1), (4, 4, 4), (0, 1, 1)])
def test_scale_sets_the_bounds_of_one_group(api, kube, job_of, options, low, high, pods):
    made = kube.submit(job_of("digits"), options())
    api.start_cluster("digits")
    trainers, _ = api.get("rayclusters", "digits-abcde")["spec"]["workerGroupSpecs"]
    kube.scale(made, "generators", low, high)
    same, changed = api.get("rayclusters", "digits-abcde")["spec"]["workerGroupSpecs"]
    assert same == trainers
    assert (changed["minReplicas"], changed["maxReplicas"]) == (low, high)
    assert changed["replicas"] == pods


def test_between_two_clusters_of_a_job_the_next_one_is_scaled(api, kube, job_of, options):
    made = kube.submit(job_of("digits"), options())
    kube.scale(made, "generators", 2, 5)
    api.start_cluster("digits")
    _, generators = api.get("rayclusters", "digits-abcde")["spec"]["workerGroupSpecs"]
    assert (generators["minReplicas"], generators["maxReplicas"]) == (2, 5)


def test_scale_says_what_cannot_be(api, kube, job_of, options):
    made = kube.submit(job_of("digits"), options())
    api.start_cluster("digits")
    with pytest.raises(ConfigError, match=r"\(trainers, generators\), got 'experts'"):
        kube.scale(made, "experts", 1, 2)
    for low, high in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match="expected 0 <= low <= high"):
            kube.scale(made, "generators", low, high)
    api.forbidden.add(("patch", "rayclusters"))
    with pytest.raises(ConfigError, match="right to patch rayclusters"):
        kube.scale(made, "generators", 1, 2)
    api.set_status("digits", "Complete", "SUCCEEDED")
    with pytest.raises(ConfigError, match="which is over"):
        kube.scale(made, "generators", 1, 2)


def test_a_run_nobody_submitted_is_not_found(kube):
    with pytest.raises(ConfigError, match="submit it"):
        kube.find("s3://bucket/runs/none")


def test_the_client_role_allows_what_is_asked():
    import yaml

    path = Path(__file__).parents[2] / "k8s" / "base" / "accounts.yaml"
    [role] = [m for m in yaml.safe_load_all(path.read_text()) if m["kind"] == "Role"]
    granted = {
        (verb, resource)
        for rule in role["rules"]
        for verb in rule["verbs"]
        for resource in rule["resources"]
    }
    inputs = {(verb, "rayjobs") for verb in ("get", "list", "create", "patch", "delete")}
    inputs |= {(verb, "rayclusters") for verb in ("get", "patch", "delete")}
    for plural in ("configmaps", "poddisruptionbudgets"):
        inputs |= {(verb, plural) for verb in ("get", "create", "delete")}
    inputs |= {("list", "pods"), ("get", "pods/log"), ("get", "serviceaccounts")}
    assert inputs <= granted
    assert not {resource for _, resource in granted} & {"secrets"}

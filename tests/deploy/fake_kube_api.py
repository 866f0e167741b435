"""Fake Kubernetes API server over HTTP, for the kinds that submitting a job uses.

Objects are validated with the strict schemas if these are available. The test acts as the operator:
it sets statuses, creates pods and writes their logs. Not covered: TLS, watches, field management.
"""

import copy
import functools
import importlib.util
import json
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import yaml
from crd_schemas import CRDS, KINDS, problems

TOKEN = "the-token-of-the-tests"
NAMESPACE = "science"
VERBS = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}
SCHEMAS = importlib.util.find_spec("kubernetes_validate") is not None


class ApiError(Exception):
    def __init__(self, status, reason, message):
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message


class Log:
    """Log of a pod; readers block for more lines until it is closed."""

    def __init__(self):
        self.lines, self.is_closed, self.changed = [], False, threading.Condition()
        self.breaks_at, self.opened = None, 0

    def write(self, *lines):
        with self.changed:
            self.lines.extend(lines)
            self.changed.notify_all()

    def close(self):
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()

    def stamped(self, at):
        # In Go's format: trailing zeros of the fraction are omitted.
        stamp = (datetime(2026, 1, 1) + timedelta(seconds=at / 20)).isoformat().rstrip("0")
        return f"{stamp.rstrip(':.')}Z {self.lines[at]}\n".encode()


class FakeKubeApi:
    """API server on loopback."""

    def __init__(self):
        self.objects, self.logs, self.requests = {}, {}, []
        self.has_operator, self.forbidden, self.failures = True, set(), {}
        self.deletion_s, self.on_ray_job = 0.0, lambda name: None
        self.lock, self.is_open = threading.RLock(), True
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.is_open = False
        for log in self.logs.values():
            log.close()
        self.server.shutdown()
        self.server.server_close()

    def kubeconfig(self, path, *, token=TOKEN, url=None):
        user = {"name": "me", "user": {"token": token}}
        cluster = {"name": "here", "cluster": {"server": url or self.url}}
        context = {"cluster": "here", "user": "me", "namespace": NAMESPACE}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [cluster],
            "users": [user],
            "contexts": [{"name": "here", "context": context}],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    # The part of the operator and the kubelet.

    def put(self, plural, name, **fields):
        metadata = {"name": name, "namespace": NAMESPACE, **fields.pop("metadata", {})}
        return self._store(plural, {"metadata": metadata, **fields})

    def get(self, plural, name):
        return self.objects.get((plural, NAMESPACE, name))

    def names(self, plural):
        return sorted(name for kind, _, name in self.objects if kind == plural)

    def set_status(self, name, state, job_status="", **more):
        with self.lock:
            status = self.get("rayjobs", name).setdefault("status", {})
            status |= {"jobDeploymentStatus": state, "jobStatus": job_status, **more}

    def start_cluster(self, name):
        """Creates the RayCluster of a RayJob, as the operator does."""
        job = self.get("rayjobs", name)
        owner = {"kind": "RayJob", "name": name, "uid": job["metadata"]["uid"]}
        spec = copy.deepcopy(job["spec"]["rayClusterSpec"])
        metadata = {"ownerReferences": [owner]}
        self.put("rayclusters", f"{name}-abcde", metadata=metadata, spec=spec)
        self.set_status(name, "Running", "PENDING", rayClusterName=f"{name}-abcde")

    def add_pod(self, job, component, *, phase="Running", name=None, **status):
        name = name or f"{job}-{component}"
        labels = {
            "app.kubernetes.io/instance": job,
            "app.kubernetes.io/component": component,
        }
        uid = self.get("rayjobs", job)["metadata"]["uid"]
        owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": job, "uid": uid}
        metadata = {"labels": labels, "ownerReferences": [owner]}
        spec = {"containers": [{"name": "it"}], "newerThanTheClient": True}
        self.put("pods", name, metadata=metadata, spec=spec, status={"phase": phase, **status})
        self.logs[name] = Log()
        return self.logs[name]

    # Requests.

    def respond(self, verb, plural, namespace, name, query, body, accept):
        with self.lock:
            if (verb, plural) in self.forbidden:
                raise ApiError(
                    403, "Forbidden", f'{plural} is forbidden: User "me" cannot {verb} {plural}'
                )
            is_dry = query.get("dryRun") == "All"
            if not is_dry and (verb, plural) in self.failures:
                raise ApiError(self.failures.pop((verb, plural)), "Broken", "etcd is not well")
            if verb == "list":
                return self._listed(plural, namespace, query.get("labelSelector", ""))
            if verb == "create":
                return self._create(plural, namespace, body, is_dry)
            found = self.objects.get((plural, namespace, name))
            if found is None:
                raise ApiError(404, "NotFound", f'{plural} "{name}" not found')
            if verb == "delete":
                self._delete(plural, found)
            elif verb == "patch":
                found = self._patch(plural, found, body)
            if plural == "secrets" and "PartialObjectMetadata" not in accept:
                raise ApiError(500, "Leak", "the values of a secret were requested")
            if "PartialObjectMetadata" in accept:
                return {"kind": "PartialObjectMetadata", "metadata": found["metadata"]}
            return copy.deepcopy(found)

    def _listed(self, plural, namespace, selector):
        wanted = dict(part.split("=", 1) for part in selector.split(",") if part)
        items = [
            copy.deepcopy(found)
            for (kind, space, _), found in self.objects.items()
            if (kind, space) == (plural, namespace)
            and wanted.items() <= found["metadata"].get("labels", {}).items()
        ]
        return {"kind": "List", "metadata": {"resourceVersion": "1"}, "items": items}

    def _create(self, plural, namespace, body, is_dry):
        metadata = body["metadata"]
        if metadata.get("namespace", namespace) != namespace:
            raise ApiError(400, "BadRequest", "the namespace of the object is not that of the URL")
        if found := _problems(body):
            raise ApiError(422, "Invalid", "; ".join(found))
        if (plural, namespace, metadata["name"]) in self.objects:
            raise ApiError(409, "AlreadyExists", f'{plural} "{metadata["name"]}" already exists')
        made = {**body, "metadata": {**metadata, "namespace": namespace, "uid": "dry"}}
        if is_dry:
            return made
        made = self._store(plural, made)
        if plural == "rayjobs":
            timer = threading.Timer(0.01, self.on_ray_job, (metadata["name"],))
            timer.daemon = True
            timer.start()
        return copy.deepcopy(made)

    def _store(self, plural, body):
        with self.lock:
            metadata = body["metadata"] | {
                "uid": str(uuid.uuid4()),
                "resourceVersion": "1",
                "creationTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
            stored = {**body, "metadata": metadata}
            self.objects[plural, metadata["namespace"], metadata["name"]] = stored
            return stored

    def _delete(self, plural, found):
        found["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        collect = threading.Timer(self.deletion_s, self._collect, (plural, found))
        collect.daemon = True
        collect.start()

    def _collect(self, plural, found):
        """Deletes an object and everything it owns."""
        with self.lock:
            uid = found["metadata"]["uid"]
            for (kind, _, _), other in list(self.objects.items()):
                owners = other["metadata"].get("ownerReferences", [])
                if any(owner["uid"] == uid for owner in owners):
                    self._collect(kind, other)
            metadata = found["metadata"]
            self.objects.pop((plural, metadata["namespace"], metadata["name"]), None)
            if plural == "pods":
                self.logs[metadata["name"]].close()

    def _patch(self, plural, found, steps):
        changed = copy.deepcopy(found)
        for step in steps:
            *path, last = step["path"].strip("/").split("/")
            target = changed
            for part in path:
                target = target[int(part) if isinstance(target, list) else part]
            if step["op"] == "test" and target.get(last) != step["value"]:
                raise ApiError(422, "Invalid", f"test failed at {step['path']}")
            target[last] = step["value"]
        if found_problems := _problems(changed):
            raise ApiError(422, "Invalid", "; ".join(found_problems))
        metadata = found["metadata"]
        self.objects[plural, metadata["namespace"], metadata["name"]] = changed
        return changed


def _problems(manifest):
    kind = manifest.get("kind")
    if kind is None or not SCHEMAS or (kind in KINDS and not (CRDS / KINDS[kind]).exists()):
        return []
    return _cached_problems(json.dumps(manifest))


@functools.cache
def _cached_problems(text):
    return problems(json.loads(text))


def _handler(api):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_any(self):
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            api.requests.append((self.command, url.path, query))
            try:
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    raise ApiError(401, "Unauthorized", "Unauthorized")
                self._route(url.path.strip("/").split("/"), query, body)
            except ApiError as error:
                status = {
                    "kind": "Status",
                    "status": "Failure",
                    "code": error.status,
                    "reason": error.reason,
                    "message": error.message,
                }
                self._send(error.status, status)

        do_GET = do_POST = do_PATCH = do_DELETE = handle_any

        def _route(self, parts, query, body):
            if parts == ["apis", "ray.io", "v1"]:
                if not api.has_operator:
                    raise ApiError(404, "NotFound", "404 page not found")
                kinds = [
                    {
                        "name": name,
                        "singularName": "",
                        "kind": kind,
                        "namespaced": True,
                        "verbs": [],
                    }
                    for name, kind in (("rayjobs", "RayJob"), ("rayclusters", "RayCluster"))
                ]
                found = {"kind": "APIResourceList", "groupVersion": "ray.io/v1"}
                return self._send(200, {**found, "resources": kinds})
            namespace, plural, name, *more = [*parts[parts.index("namespaces") + 1 :], None]
            if more and more[0] == "log":
                return self._send_log(namespace, name, query)
            verb = VERBS.get(self.command) or ("get" if name else "list")
            kind = self.headers.get("Content-Type", "")
            if verb == "patch" and kind != "application/json-patch+json":
                raise ApiError(415, "UnsupportedMediaType", f"expected a JSON patch, got {kind}")
            accept = self.headers.get("Accept", "")
            found = api.respond(verb, plural, namespace, name, query, body, accept)
            return self._send(201 if verb == "create" else 200, found)

        def _send(self, status, body):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _send_log(self, namespace, pod, query):
            if ("get", "pods/log") in api.forbidden:
                raise ApiError(403, "Forbidden", 'User "me" cannot get pods/log')
            found = api.objects.get(("pods", namespace, pod))
            if found is None:
                raise ApiError(404, "NotFound", f'pods "{pod}" not found')
            if found["status"]["phase"] == "Pending":
                raise ApiError(400, "BadRequest", "container is waiting to start")
            log = api.logs[pod]
            log.opened += 1
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self._stream(log, query.get("follow") == "true")

        def _stream(self, log, follow):
            at = 0
            while True:
                with log.changed:
                    while at >= len(log.lines) and follow and not log.is_closed and api.is_open:
                        log.changed.wait(0.2)
                    until = len(log.lines)
                for i in range(at, until):
                    if log.breaks_at == i:
                        # The connection breaks in the middle of a line.
                        log.breaks_at = None
                        self._chunk(log.stamped(i)[:-3])
                        self.close_connection = True
                        self.connection.shutdown(2)
                        return
                    self._chunk(log.stamped(i))
                at = until
                if not follow or log.is_closed or not api.is_open:
                    break
            self._chunk(b"")

        def _chunk(self, data):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()

        def log_message(self, *args):
            pass

    return Handler


def until(condition, seconds=5.0):
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)

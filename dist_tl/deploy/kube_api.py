"""Connection to a Kubernetes API server: credentials, calls with timeouts, named errors.

The only module that imports the `kubernetes` package.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_tl.errors import ConfigError, WorkerError
from dist_tl.telemetry import redact

CONNECT_S = 4.0  # two tries, so an unreachable server is reported within 10 s
READ_S = 20.0
STREAM_S = 60.0  # a log stream that is silent for this long is reopened
IN_CLUSTER = Path("/var/run/secrets/kubernetes.io/serviceaccount")
ROLE_HINT = "you need the role dist-tl-client of k8s/base/accounts.yaml"
# Only the existence of a Secret is checked: its values stay on the server.
METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
# Representations of client objects in error texts; the message names the host already.
_CLIENT_REPR = re.compile(r"<[^>]*>:? ?|\bHTTPS?Connection(Pool)?\([^)]*\):? ?")
Object = dict[str, Any]


@dataclass(frozen=True)
class Resource:
    """A namespaced kind of object.

    Attributes:
        plural: name of the kind in URLs and RBAC rules.
        group: API group; empty: the core group, whose client methods are named after `core`.
        version: API version.
        core: singular name in the methods of the core client.
    """

    plural: str
    group: str = ""
    version: str = "v1"
    core: str = ""

    def __str__(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


RAY_JOBS = Resource("rayjobs", "ray.io")
RAY_CLUSTERS = Resource("rayclusters", "ray.io")
BUDGETS = Resource("poddisruptionbudgets", "policy")
CONFIG_MAPS = Resource("configmaps", core="config_map")
SECRETS = Resource("secrets", core="secret")
ACCOUNTS = Resource("serviceaccounts", core="service_account")
PODS = Resource("pods", core="pod")
BY_KIND = {"RayJob": RAY_JOBS, "ConfigMap": CONFIG_MAPS, "PodDisruptionBudget": BUDGETS}


class AlreadyExistsError(ConfigError):
    """An object of the same name exists (409 on create)."""


class ForbiddenError(ConfigError):
    """The account lacks a permission (403)."""


class ApiUnavailableError(WorkerError):
    """The API server is unreachable or reports an internal error; a retry may succeed."""


class _NotFoundError(ConfigError):
    """The object does not exist (404)."""


class KubeApi:
    """Calls to one API server, each with a timeout.

    Attributes:
        host: URL of the server, without credentials.
        namespace: namespace of the context.
    """

    def __init__(self, configuration: Any, namespace: str) -> None:
        from kubernetes import client
        from urllib3 import Retry

        # The client's default of three retries would take minutes if packets are dropped.
        configuration.retries = Retry(total=1, read=0, redirect=0, other=0)
        self.host, self.namespace = redact(configuration.host), namespace
        default = client.ApiClient(configuration)
        self._custom, self._core = client.CustomObjectsApi(default), client.CoreV1Api(default)
        metadata_only = client.ApiClient(configuration, "Accept", METADATA_ONLY)
        self._metadata = client.CoreV1Api(metadata_only)
        json_patch = client.ApiClient(configuration, "Content-Type", "application/json-patch+json")
        self._patch = client.CustomObjectsApi(json_patch)

    def served(self, resource: Resource) -> bool:
        """Returns whether the server serves the kind.

        Raises:
            ConfigError: the server rejects the credentials.
            WorkerError: the server does not respond.
        """
        try:
            with self._named_errors("list", resource, ""):
                kinds = _parsed(
                    self._custom.get_api_resources(
                        resource.group,
                        resource.version,
                        _request_timeout=(CONNECT_S, CONNECT_S),
                        _preload_content=False,
                    )
                )
        except _NotFoundError:
            return False
        return any(kind["name"] == resource.plural for kind in kinds.get("resources", []))

    def get(self, resource: Resource, namespace: str, name: str) -> Object | None:
        """Returns an object (core kinds: its metadata only), or None if it does not exist.

        Raises:
            ConfigError: a permission is missing, or the server rejects the credentials.
            WorkerError: the server does not respond.
        """
        with suppress(_NotFoundError), self._named_errors("get", resource, namespace):
            if resource.group:
                path = _path(resource, namespace, name)
                response = self._custom.get_namespaced_custom_object(**path, **_call_options())
            else:
                read = getattr(self._metadata, f"read_namespaced_{resource.core}")
                response = read(name, namespace, **_call_options())
            return _parsed(response)
        return None

    def select(self, resource: Resource, namespace: str, labels: str) -> list[Object]:
        """Returns the objects that match a label selector; raises the errors of `get`."""
        with self._named_errors("list", resource, namespace):
            if resource.group:
                response = self._custom.list_namespaced_custom_object(
                    **_path(resource, namespace), label_selector=labels, **_call_options()
                )
            else:
                list_objects = getattr(self._core, f"list_namespaced_{resource.core}")
                response = list_objects(namespace, label_selector=labels, **_call_options())
            return _parsed(response)["items"]

    def create(
        self, resource: Resource, namespace: str, body: Object, *, dry_run: bool = False
    ) -> Object:
        """Creates an object; with `dry_run`, has the server validate it only.

        Raises:
            AlreadyExistsError: an object of the same name exists.
            ConfigError: the server rejects the object or the credentials, or a permission is
                missing.
            WorkerError: the server does not respond.
        """
        options = _call_options()
        if dry_run:
            options["dry_run"] = "All"
        name = body["metadata"]["name"]
        with self._named_errors("create", resource, namespace, name):
            if resource.group:
                response = self._custom.create_namespaced_custom_object(
                    **_path(resource, namespace), body=body, **options
                )
            else:
                create = getattr(self._core, f"create_namespaced_{resource.core}")
                response = create(namespace, body, **options)
            return _parsed(response)

    def delete(self, resource: Resource, namespace: str, name: str) -> bool:
        """Deletes an object after everything it owns; returns False if it does not exist."""
        options = {"propagation_policy": "Foreground", **_call_options()}
        with suppress(_NotFoundError), self._named_errors("delete", resource, namespace):
            if resource.group:
                path = _path(resource, namespace, name)
                response = self._custom.delete_namespaced_custom_object(**path, **options)
            else:
                delete = getattr(self._core, f"delete_namespaced_{resource.core}")
                response = delete(name, namespace, **options)
            _parsed(response)
            return True
        return False

    def patch(self, resource: Resource, namespace: str, name: str, changes: list[Object]) -> Object:
        """Applies a JSON patch to an object, atomically.

        Raises:
            ConfigError: the object does not exist, the patch does not apply, or a permission is
                missing.
            WorkerError: the server does not respond.
        """
        with self._named_errors("patch", resource, namespace, name):
            path = _path(resource, namespace, name)
            return _parsed(
                self._patch.patch_namespaced_custom_object(**path, body=changes, **_call_options())
            )

    def open_log(self, namespace: str, pod: str, *, follow: bool, since_s: int | None) -> Any:
        """Opens the log of a pod as a urllib3 response; every line starts with a timestamp.

        Raises:
            ConfigError: the pod does not exist or has not started, or a permission is missing.
            WorkerError: the server does not respond.
        """
        options: dict[str, Any] = {"follow": follow, "timestamps": True}
        if since_s is not None:
            options["since_seconds"] = since_s
        with self._named_errors("get", Resource("pods/log"), namespace, pod):
            response = self._core.read_namespaced_pod_log(
                pod,
                namespace,
                **options,
                _preload_content=False,
                _request_timeout=(CONNECT_S, STREAM_S),
            )
            return _checked(response)

    @contextmanager
    def _named_errors(
        self, verb: str, resource: Resource, namespace: str, name: str = ""
    ) -> Iterator[None]:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        target = f"{resource} {name}".strip() + (f" in namespace {namespace}" if namespace else "")
        try:
            yield
        except ApiException as error:
            if not error.status:  # a TLS error, which the client reports as a response
                raise self._unavailable(str(error.reason)) from None
            raise self._error(error.status, _message(error.body), verb, target) from None
        except HTTPError as error:
            reason = getattr(error, "reason", None) or error
            message = f"{type(reason).__name__}: {_CLIENT_REPR.sub('', str(reason))}"
            raise self._unavailable(message) from None
        except json.JSONDecodeError:
            raise self._unavailable("the response is not JSON") from None

    def _unavailable(self, message: str) -> ApiUnavailableError:
        return ApiUnavailableError(
            f"no valid response from the Kubernetes API at {self.host}: {_short(message)}; check "
            "the network, or the context: kubectl config current-context"
        )

    def _error(self, status: int, message: str, verb: str, target: str) -> Exception:
        if status == 401:
            return ConfigError(
                f"the Kubernetes API at {self.host} rejected the credentials of this context; log "
                "in again, or select another context: kubectl config use-context"
            )
        if status == 403:
            return ForbiddenError(f"no permission to {verb} {target}: {message}; {ROLE_HINT}")
        if status == 404 and verb != "create":
            return _NotFoundError(f"{target} not found; see kubectl get {target.split()[0]}")
        if status == 409 and verb == "create":
            return AlreadyExistsError(
                f"{target} already exists: created by a concurrent submit, or not by dist-tl; try "
                "again, or change the last path component of run"
            )
        text = f"could not {verb} {target}: the API returned {status}: {message}"
        if status == 429 or status >= 500:
            return ApiUnavailableError(f"{text}; try again")
        return ConfigError(text)


def load_api(namespace: str | None = None) -> KubeApi:
    """Connects to the API server of the current context, or of the cluster this process runs in.

    Args:
        namespace: overrides the namespace of the context.

    Raises:
        ConfigError: the package is missing, or there is no usable context.
    """
    try:
        from kubernetes import client, config
    except ImportError:
        raise ConfigError(
            'the kubernetes package is not installed; pip install "dist_tl[kube]"'
        ) from None
    configuration = client.Configuration()
    files = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
    try:
        if any(Path(path).expanduser().exists() for path in files.split(os.pathsep) if path):
            config.load_kube_config(files, client_configuration=configuration)
            _, context = config.list_kube_config_contexts(files)
            default = context["context"].get("namespace")
        else:
            config.load_incluster_config(client_configuration=configuration)
            default = (IN_CLUSTER / "namespace").read_text().strip()
    except config.ConfigException as error:
        raise ConfigError(
            "no usable Kubernetes context in KUBECONFIG or ~/.kube/config, and no service account "
            f"of a pod: {_short(str(error))}; see kubectl config get-contexts"
        ) from None
    except Exception as error:
        # A damaged file can raise any error, whose text may contain credentials.
        raise ConfigError(
            f"cannot use the Kubernetes configuration: {type(error).__name__}; "
            "see kubectl config view"
        ) from None
    return KubeApi(configuration, namespace or default or "default")


def _path(resource: Resource, namespace: str, name: str | None = None) -> dict[str, str]:
    """Returns the keyword arguments that address an object or a collection."""
    path = {
        "group": resource.group,
        "version": resource.version,
        "namespace": namespace,
        "plural": resource.plural,
    }
    return path if name is None else {**path, "name": name}


def _call_options() -> dict[str, Any]:
    """Returns options of every call; raw responses, since client models reject newer fields."""
    return {"_request_timeout": (CONNECT_S, READ_S), "_preload_content": False}


def _checked(response: Any) -> Any:
    from kubernetes.client.exceptions import ApiException

    if response.status < 300:
        return response
    error = ApiException(status=response.status)
    error.body = response.data.decode(errors="replace")
    raise error


def _parsed(response: Any) -> Object:
    return json.loads(_checked(response).data)


def _message(body: Any) -> str:
    """Returns the error message in the body of a response."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "nothing")
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["message"]
    return _short(text)


def _short(text: str) -> str:
    line = " ".join(redact(text).split())
    return line if len(line) <= 400 else f"{line[:400]}..."

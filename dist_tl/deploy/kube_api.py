"""One connection to a Kubernetes API server: credentials, calls with a time limit, named errors.

The only module that knows the `kubernetes` package. Not covered: what the calls are for.
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

CONNECT_S = 4.0  # tried twice, so that an unreachable server is named within 10 s
READ_S = 20.0
STREAM_S = 60.0  # a log that says nothing for so long is asked for anew
IN_CLUSTER = Path("/var/run/secrets/kubernetes.io/serviceaccount")
RIGHTS = "ask for the role dist-tl-client of k8s/base/accounts.yaml"
# Of a Secret only its name is wanted: its values stay on the server.
METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
# What the client tells of its own objects; host and port are said already.
_CONNECTION = re.compile(r"<[^>]*>:? ?|\bHTTPS?Connection(Pool)?\([^)]*\):? ?")
Object = dict[str, Any]


@dataclass(frozen=True)
class Resource:
    """A kind of object in a namespace.

    Attributes:
        plural: its name in URLs and rights.
        group: absent: Kubernetes' own first one, whose client names methods after `core`.
        core: the singular in the names of methods.
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


class AlreadyThere(ConfigError):
    """An object of that name exists."""


class NotAllowed(ConfigError):
    """The account has not the right to do so."""


class NoOutput(WorkerError):
    """The API server is out of reach or broken; what it was asked may work later."""


class KubeApi:
    """Calls of one API server, each within a time limit.

    Attributes:
        host: of the server, without credentials.
        namespace: that of the context.
    """

    def __init__(self, configuration: Any, namespace: str) -> None:
        from kubernetes import client
        from urllib3 import Retry

        # The client's own three retries would take minutes where packets vanish.
        configuration.retries = Retry(total=1, read=0, redirect=0, other=0)
        self.host, self.namespace = redact(configuration.host), namespace
        plain = client.ApiClient(configuration)
        self._custom, self._core = client.CustomObjectsApi(plain), client.CoreV1Api(plain)
        named = client.ApiClient(configuration, "Accept", METADATA_ONLY)
        self._metadata = client.CoreV1Api(named)
        patches = client.ApiClient(configuration, "Content-Type", "application/json-patch+json")
        self._patches = client.CustomObjectsApi(patches)

    def served(self, resource: Resource) -> bool:
        """Whether the server knows the kind.

        Raises:
            ConfigError: the server refuses the credentials.
            WorkerError: the server does not answer.
        """
        try:
            with self._named_errors("list", resource, ""):
                found = _answer(
                    self._custom.get_api_resources(
                        resource.group,
                        resource.version,
                        _request_timeout=(CONNECT_S, CONNECT_S),
                        _preload_content=False,
                    )
                )
        except _Missing:
            return False
        return any(kind["name"] == resource.plural for kind in found.get("resources", []))

    def get(self, resource: Resource, namespace: str, name: str) -> Object | None:
        """An object, of Secrets and accounts its metadata only; None where there is none.

        Raises:
            ConfigError: the right is missing, or the credentials are refused.
            WorkerError: the server does not answer.
        """
        with self._none_if_missing() as found, self._named_errors("get", resource, namespace):
            if resource.group:
                where = _where(resource, namespace, name)
                response = self._custom.get_namespaced_custom_object(**where, **_limits())
            else:
                read = getattr(self._metadata, f"read_namespaced_{resource.core}")
                response = read(name, namespace, **_limits())
            found.append(_answer(response))
        return found[0] if found else None

    def select(self, resource: Resource, namespace: str, labels: str) -> list[Object]:
        """Objects with labels; raises as `get` does."""
        with self._named_errors("list", resource, namespace):
            if resource.group:
                response = self._custom.list_namespaced_custom_object(
                    **_where(resource, namespace), label_selector=labels, **_limits()
                )
            else:
                ask = getattr(self._core, f"list_namespaced_{resource.core}")
                response = ask(namespace, label_selector=labels, **_limits())
            return _answer(response)["items"]

    def create(
        self, resource: Resource, namespace: str, body: Object, *, dry_run: bool = False
    ) -> Object:
        """Make an object, or with `dry_run` have the server check it.

        Raises:
            AlreadyThere: one of that name exists.
            ConfigError: the server refuses the object, the right is missing, or the credentials.
            WorkerError: the server does not answer.
        """
        how = _limits() | ({"dry_run": "All"} if dry_run else {})
        name = body["metadata"]["name"]
        with self._named_errors("create", resource, namespace, name):
            if resource.group:
                response = self._custom.create_namespaced_custom_object(
                    **_where(resource, namespace), body=body, **how
                )
            else:
                make = getattr(self._core, f"create_namespaced_{resource.core}")
                response = make(namespace, body, **how)
            return _answer(response)

    def delete(self, resource: Resource, namespace: str, name: str) -> bool:
        """Ask for an object's end after that of all it owns; False where there is none."""
        how = {"propagation_policy": "Foreground", **_limits()}
        with self._none_if_missing() as done, self._named_errors("delete", resource, namespace):
            if resource.group:
                where = _where(resource, namespace, name)
                response = self._custom.delete_namespaced_custom_object(**where, **how)
            else:
                end = getattr(self._core, f"delete_namespaced_{resource.core}")
                response = end(name, namespace, **how)
            done.append(_answer(response))
        return bool(done)

    def patch(self, resource: Resource, namespace: str, name: str, changes: list[Object]) -> Object:
        """Change an object by the steps of a JSON patch, all of them or none.

        Raises:
            ConfigError: it is not there, a step does not fit it, or the right is missing.
            WorkerError: the server does not answer.
        """
        with self._named_errors("patch", resource, namespace, name):
            return _answer(
                self._patches.patch_namespaced_custom_object(
                    **_where(resource, namespace, name), body=changes, **_limits()
                )
            )

    def open_log(self, namespace: str, pod: str, *, follow: bool, since_s: int | None) -> Any:
        """The log of a pod as a urllib3 response, a timestamp before every line.

        Raises:
            ConfigError: the pod is gone or has not begun, or the right is missing.
            WorkerError: the server does not answer.
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
            return _accepted(response)

    @contextmanager
    def _none_if_missing(self) -> Iterator[list[Any]]:
        found: list[Any] = []
        try:
            yield found
        except _Missing:
            found.clear()

    @contextmanager
    def _named_errors(
        self, verb: str, resource: Resource, namespace: str, name: str = ""
    ) -> Iterator[None]:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        what = f"{resource} {name}".strip() + (f" in namespace {namespace}" if namespace else "")
        try:
            yield
        except ApiException as error:
            if not error.status:  # TLS, which the client reports as an answer
                raise self._no_answer(str(error.reason)) from None
            raise self._named(error.status, _message(error.body), verb, what) from None
        except HTTPError as error:
            reason = getattr(error, "reason", None) or error
            said = f"{type(reason).__name__}: {_CONNECTION.sub('', str(reason))}"
            raise self._no_answer(said) from None
        except json.JSONDecodeError:
            raise self._no_answer("something that is not JSON") from None

    def _no_answer(self, said: str) -> NoOutput:
        return NoOutput(
            f"expected an answer of the Kubernetes API at {self.host}, got "
            f"{_short(said)}; check the network, or the context: kubectl config current-context"
        )

    def _named(self, status: int, said: str, verb: str, what: str) -> Exception:
        if status == 401:
            return ConfigError(
                f"the Kubernetes API at {self.host} refused the credentials of this context; log "
                "in again, or choose another context: kubectl config use-context"
            )
        if status == 403:
            return NotAllowed(f"expected the right to {verb} {what}, got: {said}; {RIGHTS}")
        if status == 404 and verb != "create":
            return _Missing(f"expected {what}, got none; see kubectl get {what.split()[0]}")
        if status == 409 and verb == "create":
            return AlreadyThere(
                f"expected no {what} yet, got one: another submit was faster, or it is not ours; "
                "try again, or choose another last part of run"
            )
        answer = f"could not {verb} {what}: the API answered {status}: {said}"
        if status == 429 or status >= 500:
            return NoOutput(f"{answer}; try again")
        return ConfigError(answer)


class _Missing(ConfigError):
    """There is no such object."""


def load_api(namespace: str | None = None) -> KubeApi:
    """The API server of the current context, else that of the cluster this runs in.

    Args:
        namespace: in place of that of the context.

    Raises:
        ConfigError: the package is missing, there is no context, or it cannot be used.
    """
    try:
        from kubernetes import client, config
    except ImportError:
        raise ConfigError(
            'expected the kubernetes package, found none; pip install "dist_tl[kube]"'
        ) from None
    configuration = client.Configuration()
    files = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
    try:
        if any(Path(path).expanduser().exists() for path in files.split(os.pathsep) if path):
            config.load_kube_config(files, client_configuration=configuration)
            _, context = config.list_kube_config_contexts(files)
            found = context["context"].get("namespace")
        else:
            config.load_incluster_config(client_configuration=configuration)
            found = (IN_CLUSTER / "namespace").read_text().strip()
    except config.ConfigException as error:
        raise ConfigError(
            "expected a Kubernetes context in KUBECONFIG or ~/.kube/config, or a pod's own "
            f"account, got: {_short(str(error))}; see kubectl config get-contexts"
        ) from None
    except Exception as error:
        # A damaged file makes the package fail in any way, and its text may hold credentials.
        raise ConfigError(
            f"cannot use the Kubernetes configuration: {type(error).__name__}; "
            "see kubectl config view"
        ) from None
    return KubeApi(configuration, namespace or found or "default")


def _where(resource: Resource, namespace: str, name: str | None = None) -> dict[str, str]:
    where = {
        "group": resource.group,
        "version": resource.version,
        "namespace": namespace,
        "plural": resource.plural,
    }
    return where if name is None else {**where, "name": name}


def _limits() -> dict[str, Any]:
    """Of every call; answers are read here, as models of the client refuse what is newer."""
    return {"_request_timeout": (CONNECT_S, READ_S), "_preload_content": False}


def _accepted(response: Any) -> Any:
    from kubernetes.client.exceptions import ApiException

    if response.status < 300:
        return response
    error = ApiException(status=response.status)
    error.body = response.data.decode(errors="replace")
    raise error


def _answer(response: Any) -> Object:
    return json.loads(_accepted(response).data)


def _message(body: Any) -> str:
    """What the server says went wrong."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "nothing")
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["message"]
    return _short(text)


def _short(text: str) -> str:
    line = " ".join(redact(text).split())
    return line if len(line) <= 400 else f"{line[:400]}..."

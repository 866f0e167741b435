"""Empty stores of every kind: a folder, memory, and two real S3 servers."""

import threading
import uuid

import pytest

from dist_tl.storage.embedded import EmbeddedS3
from dist_tl.storage.objects import ObjectStore


class MotoServer:
    """Moto on loopback, behind a proxy that records requests and can inject faults.

    `faults` lists the faults of the next requests: an S3 error as (status, code), "lost" for a
    request that is executed but whose response is replaced by a 503, or None for no fault.
    """

    def __init__(self):
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self._moto = DomainDispatcherApplication(create_backend_app)
        self.faults, self.requests = [], []
        self._server = make_server("127.0.0.1", 0, self._proxy, threaded=True)
        self.environment = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "moto-takes-any-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.port}",
        }
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _proxy(self, environ, start_response):
        self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        fault = self.faults.pop(0) if self.faults else None
        if fault is None:
            return self._moto(environ, start_response)
        if fault == "lost":
            list(self._moto(environ, lambda *_: None))
            fault = (503, "SlowDown")
        status, code = fault
        body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        start_response(f"{status} {code}", [("Content-Length", str(len(body)))])
        return [body]

    def make_bucket(self, name):
        import boto3

        boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        ).create_bucket(Bucket=name)

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="session")
def moto_server():
    server = MotoServer()
    server.make_bucket("bucket")
    yield server
    server.close()


@pytest.fixture
def moto(moto_server, use_environment):
    moto_server.faults.clear()
    moto_server.requests.clear()
    use_environment(moto_server.environment)
    return moto_server


@pytest.fixture(scope="session")
def embedded_server(tmp_path_factory):
    with EmbeddedS3(tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.fixture
def use_environment(monkeypatch):
    def use(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return use


@pytest.fixture
def no_waits(monkeypatch):
    monkeypatch.setattr("dist_tl.storage.remote._WAITS_S", (0.0, 0.0, 0.0))


STORES = [
    "local",
    "memory",
    pytest.param("embedded", marks=pytest.mark.s3),
    pytest.param("moto", marks=pytest.mark.s3),
]


@pytest.fixture(params=STORES)
def store(request, tmp_path, use_environment):
    name = uuid.uuid4().hex
    if request.param == "local":
        return ObjectStore(tmp_path / "new" / "folder")
    if request.param == "memory":
        return ObjectStore(f"memory://{name}")
    if request.param == "embedded":
        server = request.getfixturevalue("embedded_server")
        use_environment(server.environment())
        return ObjectStore(f"{server.url}/{name}")
    request.getfixturevalue("moto")
    return ObjectStore(f"s3://bucket/{name}")

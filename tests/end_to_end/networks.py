"""Where the nodes of a test's cluster are: in namespaces of their own, or all in one.

A node's namespaces are a machine with an address of its own, joined to the others by a cable that
can be pulled: then nothing refuses a connection, it is only never answered. The host's own network
and mounts are not touched, and everything is gone as soon as the test's process is.
"""

import contextlib
import ctypes
import shutil
import socket
import subprocess
import threading

CLONE_NEWNET = 0x40000000
SWITCH = "10.77.0.1"


def open_network():
    """Namespaces where the machine allows them, else one network; use as a context manager."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return Namespaces()
    return OneNetwork()


class OneNetwork:
    """All nodes on loopback."""

    is_one = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def add(self, name, scratch=None):
        return "127.0.0.1"

    def inside(self, name=None):
        return []

    def reach(self, port):
        return f"127.0.0.1:{port}"

    def cut(self, name):
        pass


class Namespaces:
    """A switch, and a machine for each node with a cable to it."""

    is_one = False

    def __init__(self):
        for tool in ("ip", "mount", "nsenter", "unshare"):
            if shutil.which(tool) is None:
                raise OSError(f"no {tool}")
        self._holders, self._listeners = {}, []
        try:
            self._hold(None)
            self._ip(None, "link", "add", "switch", "type", "bridge")
            self._ip(None, "addr", "add", f"{SWITCH}/24", "dev", "switch")
            self._ip(None, "link", "set", "switch", "up")
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for listener in self._listeners:
            listener.close()
        for holder in self._holders.values():
            holder.stdin.close()
            holder.wait()

    def add(self, name, scratch=None):
        """A machine with a cable; returns its address. It sees a folder of its own at `scratch`."""
        number = len(self._holders) + 1
        self._hold(name)
        peer = ("peer", "name", "eth0", "netns", str(self._holders[name].pid))
        self._ip(None, "link", "add", name[:15], "type", "veth", *peer)
        self._ip(None, "link", "set", name[:15], "master", "switch", "up")
        self._ip(name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
        self._ip(name, "link", "set", "eth0", "up")
        if scratch is not None:
            own = scratch.with_name(name)
            own.mkdir()
            self._run(name, "mount", "--bind", str(own), str(scratch))
        return f"10.77.0.{number}"

    def inside(self, name=None):
        """What goes before a command that runs on a machine, or without a name at the switch."""
        pid = self._holders[name].pid
        kinds = [f"--net=/proc/{pid}/ns/net"]
        if name is not None:
            kinds.append(f"--mount=/proc/{pid}/ns/mnt")
        return ["nsenter", *kinds, "--"]

    def reach(self, port):
        """An address at which all machines find a port of this process' loopback."""
        listener = self._listen_at_the_switch()
        self._listeners.append(listener)
        threading.Thread(target=_relay, args=(listener, port), daemon=True).start()
        return f"{SWITCH}:{listener.getsockname()[1]}"

    def cut(self, name):
        """Pull the cable."""
        self._ip(None, "link", "set", name[:15], "down")

    def _hold(self, name):
        """A process whose namespace lives until the pipe to it closes, however we end."""
        holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-c", "ip link set lo up && echo up && read _"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._holders[name] = holder
        if holder.stdout.readline() != b"up\n":
            raise OSError("no namespaces on this machine")

    def _ip(self, name, *words):
        self._run(name, "ip", *words)

    def _run(self, name, *words):
        subprocess.run([*self.inside(name), *words], check=True, capture_output=True)

    def _listen_at_the_switch(self):
        """A socket belongs to the namespace that its thread was in when it was made."""
        made = []

        def listen():
            with open(f"/proc/{self._holders[None].pid}/ns/net") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            made.append(socket.create_server((SWITCH, 0)))

        thread = threading.Thread(target=listen)
        thread.start()
        thread.join()
        return made[0]


def _relay(listener, port):
    with contextlib.suppress(OSError):
        while True:
            near, _ = listener.accept()
            try:
                far = socket.create_connection(("127.0.0.1", port))
            except OSError:  # nobody listens; somebody may for the next
                near.close()
                continue
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=_copy, args=(source, target), daemon=True).start()


def _copy(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)

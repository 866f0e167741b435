"""What this machine has, what would not work on it, and why."""

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Literal

import psutil
import torch

from dist_tl.cluster import SEVERAL_MACHINES, is_on_loopback
from dist_tl.cluster.session_folder import session_parent, temporary_folder
from dist_tl.config import StrictModel
from dist_tl.errors import DistTLError
from dist_tl.jobs.versions import PACKAGES, versions
from dist_tl.storage.embedded import EmbeddedS3
from dist_tl.storage.objects import ObjectStore


class Check(StrictModel):
    """One thing that was looked at."""

    name: str
    state: Literal["ok", "note", "fails"]
    finding: str


def examine(store_url: str | None) -> list[Check]:
    """Look at the machine, the packages, the store, and Ray's address.

    Args:
        store_url: a store to write to and read from; None tries the embedded one.
    """
    return [
        _machine(),
        _accelerator(),
        _shared_memory(),
        _temporary_folder(),
        *[_package(name) for name in PACKAGES],
        _ray_address(),
        _guarded("embedded S3", _embedded) if store_url is None else _store(store_url),
        _timm(),
    ]


def _machine() -> Check:
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    disk = shutil.disk_usage(".")
    finding = (
        f"{cores} cores, {memory.total / 2**30:.1f} GiB memory "
        f"({memory.available / 2**30:.1f} free), {disk.free / 2**30:.1f} GiB disk free here"
    )
    tight = memory.available < 3 * 2**30
    return Check(
        name="machine",
        state="note" if tight else "ok",
        finding=finding + ("; a run with two trainers needs about 3 GiB" if tight else ""),
    )


def _accelerator() -> Check:
    if not torch.cuda.is_available():
        finding = "no GPU that torch can use: training runs on CPU with gloo; leave gpus at 0"
        return Check(name="GPU", state="note", finding=finding)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check(name="GPU", state="ok", finding=f"{len(names)}: {', '.join(sorted(set(names)))}")


def _shared_memory() -> Check:
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    state = "ok" if free > 300 * 2**20 else "note"
    hint = "" if state == "ok" else "; Ray will use the disk for its objects, which is slower"
    return Check(name="/dev/shm", state=state, finding=f"{free / 2**20:.0f} MiB free{hint}")


def _temporary_folder() -> Check:
    name, given = "temporary folder", os.environ.get("TMPDIR")
    try:
        folder, ray_folder = temporary_folder(), str(session_parent())
    except DistTLError as error:
        return Check(name=name, state="fails", finding=str(error))
    finding = f"{folder}, {shutil.disk_usage(folder).free / 2**30:.1f} GiB free"
    if given and os.path.abspath(given) != folder:
        finding += f"; TMPDIR is {given}, which this user cannot write to"
    elif ray_folder != folder:
        finding += f"; its path is too long for Ray's sockets, which will be in {ray_folder}"
    else:
        return Check(name=name, state="ok", finding=finding)
    return Check(name=name, state="note", finding=finding)


def _package(name: str) -> Check:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or deepspeed warns that it looked

    def look() -> str:
        importlib.import_module(name)
        return versions()[name]

    return _guarded(name, look)


def _guarded(name: str, look: Callable[[], str]) -> Check:
    # Anything may go wrong while a package is imported, and each is worth telling.
    try:
        return Check(name=name, state="ok", finding=look())
    except Exception as error:
        return Check(name=name, state="fails", finding=f"{type(error).__name__}: {error}")


def _ray_address() -> Check:
    address = os.environ.get("RAY_ADDRESS")
    if address:
        return Check(name="Ray cluster", state="note", finding=f"RAY_ADDRESS names {address}")
    if not is_on_loopback():
        finding = (
            f"a private one is started for each run; as {SEVERAL_MACHINES} is "
            f"{os.environ.get(SEVERAL_MACHINES)!r}, it listens on all interfaces and only its "
            "token protects it: unset the variable"
        )
        return Check(name="Ray cluster", state="note", finding=finding)
    finding = (
        "a private one is started for each run, on 127.0.0.1 and with a token; other machines can "
        "reach one port while trainers run, the rendezvous of torch.distributed (see README.md)"
    )
    return Check(name="Ray cluster", state="ok", finding=finding)


def _embedded() -> str:
    with tempfile.TemporaryDirectory() as folder, EmbeddedS3(folder) as server:
        # This process uses the server for a moment; nothing is started that inherits this.
        before = dict(os.environ)
        os.environ.update(server.environment())
        try:
            probe = ObjectStore(server.url).probe()
        finally:
            os.environ.clear()
            os.environ.update(before)
    return f"writes and reads. {probe.note}".strip()


def _store(url: str) -> Check:
    try:
        probe = ObjectStore(url).probe()
    except DistTLError as error:
        return Check(name="store", state="fails", finding=str(error))
    return Check(name="store", state="ok", finding=f"{url} writes and reads. {probe.note}".strip())


def _timm() -> Check:
    try:
        importlib.import_module("timm")
    except Exception as error:
        finding = f"timm networks are off ({type(error).__name__}: {error}); all else works"
        return Check(name="timm", state="note", finding=finding)
    return Check(name="timm", state="ok", finding="timm networks can be used")

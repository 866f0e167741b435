"""Which software made a run."""

import platform
from importlib.metadata import PackageNotFoundError, version

import dist_tl

PACKAGES = ("torch", "deepspeed", "ray", "webdataset", "s3fs", "transformers", "diffusers", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python, of dist_tl and of what its results depend on."""
    found = {"python": platform.python_version(), "dist_tl": dist_tl.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found

"""The house, held by a test: who may import whom, where frameworks live, how long a file is."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dist_tl"
MODULES = sorted(PACKAGE.rglob("*.py"))
FLOORS = [
    {"errors", "config", "contents", "seeds", "telemetry", "__init__"},
    {"methods", "models", "datasets", "storage"},
    {"shards"},
    {"train"},
    {"cluster"},
    {"report"},
    {"jobs"},
    {"deploy"},
    {"cli"},
    {"__main__"},
]
GROUND = FLOORS[0]  # whose few modules may use each other
FLOOR = {unit: height for height, units in enumerate(FLOORS) for unit in units}
OWNERS = {
    "ray": ("cluster/",),
    "deepspeed": ("train/engine",),
    "fsspec": ("storage/",),
    "s3fs": ("storage/",),
    "webdataset": ("shards/",),
    "transformers": ("models/",),
    "diffusers": ("models/",),
    "timm": ("models/",),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "kubernetes": ("deploy/",),
    "matplotlib": ("report/",),
    "jinja2": ("report/",),
    "sklearn": ("datasets/", "methods/geometry/controls"),
}


def place_of(path):
    return path.relative_to(PACKAGE).as_posix().removesuffix(".py")


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=place_of)
def test_imports_point_down(path):
    unit = place_of(path).split("/")[0]
    assert unit in FLOOR, f"{unit} stands on no floor; put it on one, here and in the design"
    for name in imported_modules(path):
        package, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if package == "dist_tl" and target in FLOOR and target != unit:
            if {unit, target} <= GROUND:
                continue
            assert FLOOR[target] < FLOOR[unit], f"{place_of(path)} must not import {name}"


@pytest.mark.parametrize("path", MODULES, ids=place_of)
def test_each_framework_stays_with_its_owner(path):
    for name in imported_modules(path):
        owners = OWNERS.get(name.split(".")[0])
        assert owners is None or place_of(path).startswith(owners), f"{name} belongs in {owners}"


@pytest.mark.parametrize("path", MODULES, ids=place_of)
def test_a_module_is_read_in_one_sitting_and_says_what_it_is(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text)), "every module says what it is for"


def test_what_a_job_can_say_is_read_without_ray_and_deepspeed():
    import subprocess
    import sys

    code = (
        "import sys, dist_tl.jobs.job_file; "
        "sys.exit(','.join({'ray', 'deepspeed'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_from_a_store_is_unpickled():
    forbidden = r"pickle\.load|weights_only=False|allow_pickle=True|(?<!safetensors\.)torch\.load\("
    for path in MODULES:
        assert not re.search(forbidden, path.read_text()), place_of(path)

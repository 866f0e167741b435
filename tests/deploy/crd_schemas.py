"""Strict JSON schemas: KubeRay's from its CRDs, Kubernetes' own from kubernetes-validate.

The CRDs are no part of the checkout; they are looked for in DIST_TL_CRDS, else beside it.
"""

import functools
import os
from pathlib import Path

import jsonschema
import pytest
import yaml

CHECKOUT = Path(__file__).parents[2]
CRDS = Path(os.environ.get("DIST_TL_CRDS", CHECKOUT.parent / "shared" / "crds"))
KINDS = {"RayJob": "ray.io_rayjobs.yaml", "RayCluster": "ray.io_rayclusters.yaml"}
CORE_VERSION = "1.31"
INT_OR_STRING = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the CRDs are long
NESTED = ("items", "additionalProperties", "anyOf", "oneOf", "allOf", "not")
# Kinds of other operators, whose CRDs are not at hand: only read, not checked.
UNCHECKED = {"PodMonitor", "Kustomization"}


def strict(schema):
    """`schema` without room for fields that it does not list."""
    if isinstance(schema, list):
        return [strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        pattern = {"pattern": schema["pattern"]} if "pattern" in schema else {}
        return {**INT_OR_STRING, **pattern}
    made = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties"):
            made[key] = {name: strict(inner) for name, inner in value.items()}
        elif not key.startswith("x-kubernetes-") and key not in ("default", "description"):
            made[key] = strict(value) if key in NESTED else value
    keeps_others = schema.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in made and "additionalProperties" not in made and not keeps_others:
        made["additionalProperties"] = False
    if made.pop("nullable", False) and "type" in made:
        made["type"] = [made["type"], "null"]
    return made


@functools.cache
def validator(kind):
    """The strict validator of a KubeRay kind; skips where the CRDs are not at hand."""
    path = CRDS / KINDS[kind]
    if not path.exists():
        pytest.skip(f"no KubeRay CRDs at {CRDS}; set DIST_TL_CRDS to a folder with {path.name}")
    crd = yaml.load(path.read_text(), Loader=LOADER)  # noqa: S506
    [version] = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def problems(manifest):
    """What the schema of the manifest's kind says against it, one line each."""
    kind = manifest["kind"]
    if kind in UNCHECKED:
        return []
    if kind in KINDS:
        found = [
            f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"
            for error in validator(kind).iter_errors(manifest)
        ]
        return found + [line for pod in pods_of(manifest) for line in core_problems(pod)]
    return core_problems(manifest)


def core_problems(manifest):
    """What Kubernetes' own schemas say."""
    core = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    try:
        core.validate(manifest, CORE_VERSION, strict=True)
    except (core.ValidationError, core.SchemaNotFoundError, core.InvalidSchemaError) as error:
        return [f"{manifest['kind']}: {error!s:.300}"]
    return []


def templates_of(manifest):
    """Pod templates of a RayJob or RayCluster, by their place."""
    spec = manifest["spec"]
    found = {}
    if manifest["kind"] == "RayJob":
        if "submitterPodTemplate" in spec:
            found["submitter"] = spec["submitterPodTemplate"]
        spec = spec["rayClusterSpec"]
    found["head"] = spec["headGroupSpec"]["template"]
    found |= {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    return found


def pods_of(manifest):
    """The templates as Pods, so that Kubernetes' own schemas can judge them."""
    for name, template in templates_of(manifest).items():
        metadata = {"name": name, **template.get("metadata", {})}
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}

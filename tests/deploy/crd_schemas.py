"""Strict JSON schemas of KubeRay (from its CRDs) and Kubernetes (from kubernetes-validate).

The CRDs are not part of the checkout: DIST_TL_CRDS names their folder, by default ../shared/crds.
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
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the CRDs are large
NESTED = ("items", "additionalProperties", "anyOf", "oneOf", "allOf", "not")
# Kinds of other operators without a schema here: parsed, not validated.
UNCHECKED = {"PodMonitor", "Kustomization"}


def strict(schema):
    """Returns `schema` with additional properties forbidden."""
    if isinstance(schema, list):
        return [strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        pattern = {"pattern": schema["pattern"]} if "pattern" in schema else {}
        return {**INT_OR_STRING, **pattern}
    result = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties"):
            result[key] = {name: strict(inner) for name, inner in value.items()}
        elif not key.startswith("x-kubernetes-") and key not in ("default", "description"):
            result[key] = strict(value) if key in NESTED else value
    keeps_unknown = schema.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in result and "additionalProperties" not in result and not keeps_unknown:
        result["additionalProperties"] = False
    if result.pop("nullable", False) and "type" in result:
        result["type"] = [result["type"], "null"]
    return result


@functools.cache
def validator(kind):
    """Returns the strict validator of a KubeRay kind; skips the test if the CRDs are missing."""
    path = CRDS / KINDS[kind]
    if not path.exists():
        pytest.skip(f"no KubeRay CRDs at {CRDS}; set DIST_TL_CRDS to a folder with {path.name}")
    crd = yaml.load(path.read_text(), Loader=LOADER)  # noqa: S506
    [version] = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def problems(manifest):
    """Returns the schema violations of a manifest, one line each."""
    kind = manifest["kind"]
    if kind in UNCHECKED:
        return []
    if kind in KINDS:
        errors = [
            f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"
            for error in validator(kind).iter_errors(manifest)
        ]
        return errors + [line for pod in pods_of(manifest) for line in core_problems(pod)]
    return core_problems(manifest)


def core_problems(manifest):
    """Returns the violations of the Kubernetes schemas."""
    core = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    try:
        core.validate(manifest, CORE_VERSION, strict=True)
    except (core.ValidationError, core.SchemaNotFoundError, core.InvalidSchemaError) as error:
        return [f"{manifest['kind']}: {error!s:.300}"]
    return []


def templates_of(manifest):
    """Returns the pod templates of a RayJob or RayCluster by component."""
    spec = manifest["spec"]
    templates = {}
    if manifest["kind"] == "RayJob":
        if "submitterPodTemplate" in spec:
            templates["submitter"] = spec["submitterPodTemplate"]
        spec = spec["rayClusterSpec"]
    templates["head"] = spec["headGroupSpec"]["template"]
    templates |= {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    return templates


def pods_of(manifest):
    """Yields the templates as Pods, so that the Kubernetes schemas can validate them."""
    for name, template in templates_of(manifest).items():
        metadata = {"name": name, **template.get("metadata", {})}
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}

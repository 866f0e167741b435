"""Job files: YAML read into frozen strict models, dotted overrides, and a fingerprint.

Not covered: what a job can say. That lives in `jobs/specs.py` and beside what each model
configures.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from dist_tl.errors import ConfigError


class StrictModel(BaseModel):
    """Base of every configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Model = TypeVar("Model", bound=StrictModel)


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: 1e-3 is a number, and a key given twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    repeated = [key for i, key in enumerate(keys) if key in keys[:i]]
    if repeated:
        raise ConfigError(f"key {repeated[0]!r} is given twice{node.start_mark}; keep one of them")
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_repeats)


def parse_yaml(text: str, *, source: str) -> dict[str, Any]:
    """The mapping that a YAML text holds.

    Raises:
        ConfigError: the text is not YAML, not a mapping, or gives a key twice.
    """
    try:
        # _Loader is a SafeLoader: it builds plain data and nothing else.
        data = yaml.load(text, Loader=_Loader)  # noqa: S506
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected a mapping of keys, got {type(data).__name__}")
    return data


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `data` with each "a.b=value" put in place; values are read as YAML.

    Raises:
        ConfigError: an override has no "=", or walks through something that is not a mapping.
    """
    result = json.loads(json.dumps(data, default=str))
    for override in overrides:
        path, separator, value = override.partition("=")
        keys = path.strip().split(".")
        if not separator or not all(keys):
            raise ConfigError(f"override {override!r}: expected key=value, e.g. trainers.workers=2")
        place = result
        for key in keys[:-1]:
            place = _step_into(place, key, override)
        try:
            parsed = yaml.load(value, Loader=_Loader)  # noqa: S506
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from None
        if isinstance(place, list):
            place[_list_index(place, keys[-1], override)] = parsed
        else:
            place[keys[-1]] = parsed
    return result


def _step_into(place: Any, key: str, override: str) -> Any:
    if isinstance(place, list):
        return place[_list_index(place, key, override)]
    child = place.setdefault(key, {})
    if not isinstance(child, dict | list):
        raise ConfigError(f"override {override!r}: {key!r} holds {child!r}, which has no keys")
    return child


def _list_index(place: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(place):
        raise ConfigError(f"override {override!r}: expected 0..{len(place) - 1}, got {key!r}")
    return int(key)


def validate(model: type[Model], data: Mapping[str, Any], *, source: str) -> Model:
    """`data` as a `model`.

    Raises:
        ConfigError: one line per problem, with the field's path, what was expected, what came,
            and for an unknown key the nearest name that exists.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_explain(problem, error, data) for problem in error.errors(include_url=False)]
        raise ConfigError(f"{source}:\n  " + "\n  ".join(dict.fromkeys(lines))) from None


def _explain(problem: Any, error: ValidationError, data: Mapping[str, Any]) -> str:
    path = ".".join(_real_path(problem["loc"], data))
    if problem["type"] == "extra_forbidden":
        return f"{path}: unknown key{_nearest(problem['loc'], data)}"
    if problem["type"] == "missing":
        return f"{path}: this key is required and missing"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    prefix = f"{path}: " if path else ""
    if isinstance(value, dict | list) or problem["type"] == "value_error":
        return f"{prefix}{message}"
    return f"{prefix}{message}, got {value!r}"


def _real_path(loc: tuple[int | str, ...], data: Any) -> list[str]:
    """`loc` without the names of union members, which pydantic puts between the keys."""
    path = []
    for i, part in enumerate(loc):
        inside = isinstance(data, Mapping) and part not in data
        if inside and i + 1 < len(loc) and loc[i + 1] in [*data, *_known_keys()]:
            continue
        path.append(str(part))
        data = _descend(data, part)
    return path


def _descend(data: Any, part: int | str) -> Any:
    if isinstance(data, Mapping):
        return data.get(part)
    return data[part] if isinstance(data, list) and isinstance(part, int) else None


# Every field name of every configuration, for hints: a misspelt key is usually near its own name,
# and pydantic does not say which model of a union refused it.
def _known_keys(model: type[BaseModel] = StrictModel) -> set[str]:
    names: set[str] = set()
    for child in model.__subclasses__():
        names |= set(child.model_fields) | _known_keys(child)
    return names


def _nearest(path: tuple[int | str, ...], data: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(str(path[-1]), sorted(_known_keys()), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else "; see the presets for the keys that exist"


def fingerprint(value: StrictModel | Mapping[str, Any] | list[Any]) -> str:
    """16 hexadecimal digits that change when anything in `value` changes."""
    plain = value.model_dump(mode="json") if isinstance(value, StrictModel) else value
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths at which two plain mappings differ, in order of the keys."""
    paths: list[str] = []
    for key in sorted(set(old) | set(new)):
        path = f"{prefix}{key}"
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            paths += differing_fields(before, after, f"{path}.")
        elif before != after:
            paths.append(path)
    return paths

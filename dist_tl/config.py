"""Job files: parsing YAML into frozen strict models, dotted overrides, and fingerprints.

Not covered: the fields of a job. They are defined in `jobs/*/spec.py` and in the modules that they
configure.
"""

import copy
import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from dist_tl.contents import without_places
from dist_tl.errors import ConfigError

# What aliases may add to a text. Jobs are stored as JSON, which writes every alias out.
MAX_ALIAS_CHARACTERS = 2_000_000


class StrictModel(BaseModel):
    """Base class of all configurations: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class NamesModel:
    """Marks a field, by `Annotated`, that names a stored model: a folder, a URL or a hub name."""


Model = TypeVar("Model", bound=StrictModel)


class _Loader(yaml.SafeLoader):
    """YAML loader with fewer surprises.

    1e-3 is a number, only true and false are booleans (so `lambda_guard: off` and a class named
    `no` are strings), and duplicate keys are errors.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = []
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            line = key_node.start_mark.line + 1
            raise ConfigError(f"line {line}: key {key!r} is given twice; keep one of them")
        seen.append(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_repeats)


def _plain_data(text: str, source: str) -> Any:
    try:
        loader = _Loader(text)  # a SafeLoader: it constructs plain data only
        node = loader.get_single_node()
        if node is None:
            return None
        _check_expansion(node)
        return loader.construct_document(node)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{source} is not valid YAML: it is nested too deeply") from None
    except Exception as error:  # for `!!int x` or the date 2024-02-30 it is Python's own error
        raise ConfigError(f"{source} is not valid YAML: {error}") from None


def _check_expansion(root: yaml.Node) -> None:
    """Checks that a short text does not stand for a huge value, by aliases of aliases.

    Raises:
        ConfigError: it does; the message names the line of the first value that is too large.
    """
    written, sizes = 0, dict[int, int]()

    def size(node: yaml.Node) -> int:
        """Returns the characters of a node with everything that it refers to."""
        nonlocal written
        if id(node) in sizes:
            return sizes[id(node)]
        sizes[id(node)] = 0  # of a node that contains itself, which the constructor refuses
        own = 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        written += own
        total = sizes[id(node)] = own + sum(map(size, _children(node)))
        if total - written > MAX_ALIAS_CHARACTERS:
            raise ConfigError(
                f"line {node.start_mark.line + 1}: expected aliases that expand to at most "
                f"{MAX_ALIAS_CHARACTERS:,} characters, got {total:,}; do not nest them as deeply"
            )
        return total

    size(root)


def _children(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def parse_yaml(text: str, *, source: str) -> dict[str, Any]:
    """Parses a YAML text that contains a mapping.

    Raises:
        ConfigError: the text is not YAML, not a mapping, has a duplicate key, or has aliases that
            expand to more than `MAX_ALIAS_CHARACTERS`.
    """
    data = _plain_data(text, source)
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected a mapping of keys, got {type(data).__name__}")
    return data


def read_yaml(path: str | Path, *, name: str) -> dict[str, Any]:
    """Reads a YAML file that contains a mapping.

    Args:
        name: what the file is called in messages, e.g. "job file".

    Raises:
        ConfigError: the file cannot be read, or :func:`parse_yaml` refuses its text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the {name} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read the {name} {path}: it is not UTF-8 text: {error}") from None
    return parse_yaml(text, source=str(path))


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Returns a copy of `data` with the overrides "a.b=value" applied; values are parsed as YAML.

    Raises:
        ConfigError: an override has no "=", or its path contains a value that is not a mapping.
    """
    result = copy.deepcopy(dict(data))
    for override in overrides:
        path, separator, value = override.partition("=")
        keys = path.strip().split(".")
        if not separator or not all(keys):
            raise ConfigError(f"override {override!r}: expected key=value, e.g. trainers.workers=2")
        node = result
        for key in keys[:-1]:
            node = _step_into(node, key, override)
        parsed = _plain_data(value, f"override {override!r}: the value")
        if isinstance(node, list):
            node[_list_index(node, keys[-1], override)] = parsed
        else:
            node[keys[-1]] = parsed
    # Job files are stored as JSON, whose keys are strings: `1: [cat]` is read like `"1": [cat]`.
    return json.loads(json.dumps(result, default=str))


def _step_into(node: dict[str, Any] | list[Any], key: str, override: str) -> Any:
    if isinstance(node, list):
        child = node[_list_index(node, key, override)]
    else:
        child = node.setdefault(key, {})
    if not isinstance(child, dict | list):
        raise ConfigError(f"override {override!r}: {key!r} holds {child!r}, which has no keys")
    return child


def _list_index(node: list[Any], key: str, override: str) -> int:
    if not key.isdecimal() or int(key) >= len(node):
        known = f"0..{len(node) - 1}" if node else "a whole list, because this one is empty"
        raise ConfigError(f"override {override!r}: expected {known}, got {key!r}")
    return int(key)


def validate(model: type[Model], data: Mapping[str, Any], *, source: str) -> Model:
    """Validates `data` as a `model`.

    Raises:
        ConfigError: one line per problem, with the field's path, the expected and the actual value;
            for an unknown key also the closest known name.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_explain(problem, model, data) for problem in error.errors()]
        paths = [path for path, _ in problems]
        lines = [
            f"{path}: {message}" if path else message
            for path, message in problems
            # Unions: all members report errors, but only the intended one reports nested paths.
            if not any(path and other.startswith(f"{path}.") for other in paths)
        ]
        raise ConfigError(f"{source}:\n  " + "\n  ".join(dict.fromkeys(lines))) from None


def _explain(problem: Any, model: type[BaseModel], data: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the path of a problem and its description."""
    path = ".".join(_real_path(problem["loc"], model, data))
    if problem["type"] == "extra_forbidden":
        return path, f"unknown key{_nearest(model, problem['loc'])}"
    if problem["type"] == "missing":
        return path, "this key is required and missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("value_error", "union_tag_invalid"):
        return path, message
    value = problem["input"]
    kinds = {dict: "a mapping", list: "a list", tuple: "a list"}
    return path, f"{message}, got {kinds.get(type(value)) or repr(value)}"


def _real_path(loc: tuple[int | str, ...], model: type[BaseModel], data: Any) -> list[str]:
    """Returns `loc` without the names of union members, which pydantic adds between the keys."""
    path = []
    for i, part in enumerate(loc):
        is_given = isinstance(data, Mapping) and part in data
        is_field = any(part in candidate.model_fields for candidate in _models_at(model, loc[:i]))
        if is_given or is_field or isinstance(part, int):
            path.append(str(part))
            data = _descend(data, part)
    return path


def _descend(data: Any, part: int | str) -> Any:
    if isinstance(data, Mapping):
        return data.get(part)
    if isinstance(data, list | tuple) and isinstance(part, int) and part < len(data):
        return data[part]
    return None


def _nearest(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    names = sorted({n for candidate in _models_at(model, loc[:-1]) for n in candidate.model_fields})
    near = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(names)}"


def _models_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[type[BaseModel]]:
    """Returns the possible models at `loc`: several if a union is ambiguous."""
    models = [model]
    for part in loc:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        inner = [nested for field in fields for nested in _models_in(field.annotation)]
        chosen = [m for m in models if part in _literals(m)]
        models = inner or chosen or models
    return models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [nested for part in get_args(annotation) for nested in _models_in(part)]


def _literals(model: type[BaseModel]) -> list[Any]:
    """Returns the literal values that distinguish a member of a union."""
    return [v for field in model.model_fields.values() for v in get_args(field.annotation)]


def fingerprint(value: StrictModel | Mapping[str, Any] | list[Any]) -> str:
    """Returns 16 hexadecimal digits that change if anything in `value` changes.

    Of a pinned place, the content counts, not where it lies.
    """
    plain = value.model_dump(mode="json") if isinstance(value, StrictModel) else value
    text = without_places(json.dumps(plain, sort_keys=True, separators=(",", ":")))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns the dotted paths at which two plain mappings differ, sorted by key.

    Lists of one length are compared item by item.
    """
    paths: list[str] = []
    for key in sorted(set(old) | set(new)):
        path = f"{prefix}{key}"
        before, after = _by_index(old.get(key), new.get(key))
        if isinstance(before, dict) and isinstance(after, dict):
            paths += differing_fields(before, after, f"{path}.")
        elif before != after:
            paths.append(path)
    return paths


def _by_index(old: Any, new: Any) -> tuple[Any, Any]:
    """Returns two lists of one length as mappings of their indices, other values unchanged."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        before, after = ({str(i): v for i, v in enumerate(values)} for values in (old, new))
        return before, after
    return old, new

"""Job files: YAML, overrides, validation errors, and fingerprints."""

import copy
from typing import Annotated, Literal

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from dist_tl.config import (
    StrictModel,
    apply_overrides,
    differing_fields,
    fingerprint,
    parse_yaml,
    read_yaml,
    validate,
)
from dist_tl.errors import ConfigError


class Small(StrictModel):
    kind: Literal["small"] = "small"
    width: int = Field(default=8, ge=1)


class Large(StrictModel):
    kind: Literal["large"] = "large"
    depth: int
    rates: tuple[float, ...] = ()


class Guard(StrictModel):
    folds: int = 3


class Task(StrictModel):
    name: str
    network: Annotated[Small | Large, Field(discriminator="kind")] = Small()
    guard: Guard | Literal["off"] = Guard()
    stages: tuple[Small, ...] = ()
    seed: int = 0


def error_of(data):
    with pytest.raises(ConfigError) as caught:
        validate(Task, data, source="job.yaml")
    return str(caught.value)


def read(text):
    return parse_yaml(text, source="job.yaml")


# Reading YAML.


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "+1e-3", "0.001"])
def test_numbers_in_scientific_notation_are_numbers(text):
    assert read(f"rate: {text}") == {"rate": 0.001}


def test_only_true_and_false_are_booleans():
    assert read("a: off\nb: no\nc: yes\nd: y\ne: true\nf: FALSE") == {
        "a": "off",
        "b": "no",
        "c": "yes",
        "d": "y",
        "e": True,
        "f": False,
    }


def test_the_error_of_a_duplicate_key_names_its_line():
    with pytest.raises(ConfigError, match="line 3: key 'width' is given twice"):
        read("network:\n  width: 1\n  width: 2")


def test_the_same_key_in_two_mappings_is_allowed():
    assert read("a: {width: 1}\nb: {width: 2}") == {"a": {"width": 1}, "b": {"width": 2}}


def test_anchors_and_merge_keys_are_supported():
    assert read("a: &budget {steps: 5, rate: 1}\nb: {<<: *budget, rate: 2}")["b"] == {
        "steps": 5,
        "rate": 2,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "job.yaml is not valid YAML"),
        ("- 1\n- 2", "expected a mapping of keys, got list"),
        ("", "expected a mapping of keys, got NoneType"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("a: &loop [*loop]", "not valid YAML"),
    ],
)
def test_other_documents_than_plain_mappings_are_rejected(text, message):
    with pytest.raises(ConfigError, match=message):
        read(text)


def doubled(first, *, levels, link):
    """A short text whose last line stands for 9 ** levels copies of `first`."""
    lines = [f"a0: &a0 {first}"]
    for level in range(1, levels + 1):
        aliases = ",".join(9 * [f"*a{level - 1}"])
        lines.append(f"a{level}: &a{level} {link.format(aliases)}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("first", "link"), [("[a, b]", "[{}]"), ("{a: b}", "{{<<: [{}]}}")], ids=["lists", "merges"]
)
def test_nested_aliases_that_expand_to_too_much_are_refused_by_their_line(first, link):
    text = doubled(first, levels=9, link=link)
    assert len(text) < 1000
    with pytest.raises(ConfigError, match=r"job.yaml: line 7: expected aliases that expand to at"):
        read(text)
    with pytest.raises(ConfigError, match=r"override .* line 1: expected aliases"):
        overridden("name={" + text.replace("\n", ", ") + "}")


def test_a_large_value_without_nested_aliases_is_read():
    text = "classes: &all [" + ", ".join(f"class {i}" for i in range(20_000)) + "]\n"
    data = read(text + "again: *all\nand: *all\n")
    assert data["and"] == data["classes"] == [f"class {i}" for i in range(20_000)]


@pytest.mark.parametrize(
    "value",
    ["2024-02-30", "!!int ''", "!!float x", "!!bool x", 5000 * "1", 3000 * "[" + 3000 * "]", "\0"],
)
def test_values_that_python_cannot_hold_are_not_valid_yaml(value):
    with pytest.raises(ConfigError, match=r"job\.yaml is not valid YAML"):
        read(f"a: {value}")
    with pytest.raises(ConfigError, match="the value is not valid YAML"):
        overridden(f"name={value}")


def test_a_file_that_is_not_utf_8_is_refused_by_its_name(tmp_path):
    (tmp_path / "job.yaml").write_bytes("run: tïny".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"cannot read the job file .*job.yaml: it is not UTF-8"):
        read_yaml(tmp_path / "job.yaml", name="job file")


# Overrides.


def overridden(*overrides):
    data = {"name": "a", "network": {"kind": "small"}, "stages": [{"width": 1}, {"width": 2}]}
    before = copy.deepcopy(data)
    result = apply_overrides(data, overrides)
    assert data == before, "the input is not modified"
    return result


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("name=b", ["name"], "b"),
        ("network.width=3", ["network", "width"], 3),
        ("new.deep.key=1e-3", ["new", "deep", "key"], 0.001),
        ("network={kind: large, depth: 2}", ["network"], {"kind": "large", "depth": 2}),
        ("stages.1.width=9", ["stages", 1, "width"], 9),
        ("stages.0={width: 4}", ["stages", 0], {"width": 4}),
        ("name=a=b", ["name"], "a=b"),
        ("name=", ["name"], None),
    ],
)
def test_an_override_sets_the_value_at_its_path(override, path, value):
    node = overridden(override)
    for key in path:
        node = node[key]
    assert node == value


def test_later_overrides_take_precedence():
    assert overridden("name=b", "name=c")["name"] == "c"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name", "expected key=value"),
        ("=3", "expected key=value"),
        ("network..width=3", "expected key=value"),
        ("name.first=3", "'name' holds 'a', which has no keys"),
        ("stages.0.width.x=3", "'width' holds 1, which has no keys"),
        ("stages.2.width=3", "expected 0..1, got '2'"),
        ("stages.last=3", "expected 0..1, got 'last'"),
        ("stages.²=3", "expected 0..1, got '²'"),
        ("stages.-1=3", "expected 0..1, got '-1'"),
        ("name=[", "the value is not valid YAML"),
    ],
)
def test_invalid_overrides_are_rejected(override, message):
    with pytest.raises(ConfigError) as caught:
        overridden(override)
    assert message in str(caught.value)
    assert repr(override) in str(caught.value)


def test_overrides_into_a_scalar_in_a_list_are_rejected():
    with pytest.raises(ConfigError, match="'0' holds 'pp', which has no keys"):
        apply_overrides({"arms": ["pp"]}, ["arms.0.name=x"])


def test_numeric_keys_become_strings():
    assert apply_overrides(read("groups: {1: [a]}"), []) == {"groups": {"1": ["a"]}}


# Validation.


def test_a_valid_job_is_completed_with_defaults():
    task = validate(Task, {"name": "a", "network": {"kind": "large", "depth": 2}}, source="job")
    assert task == Task(name="a", network=Large(depth=2), guard=Guard(folds=3), seed=0)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"nmae": "a", "name": "a"}, "nmae: unknown key; did you mean 'name'?"),
        (
            {"name": "a", "network": {"kind": "small", "widht": 1}},
            "network.widht: unknown key; did you mean 'width'?",
        ),
        (
            {"name": "a", "stages": [{}, {"wdth": 1}]},
            "stages.1.wdth: unknown key; did you mean 'width'?",
        ),
    ],
)
def test_the_error_of_an_unknown_key_suggests_the_closest_key(data, line):
    assert error_of(data) == f"job.yaml:\n  {line}"


def test_the_error_of_an_unknown_key_lists_the_known_keys():
    data = {"name": "a", "network": {"kind": "small", "rates": [3]}}
    assert error_of(data) == "job.yaml:\n  network.rates: unknown key; expected one of kind, width"


@pytest.mark.parametrize(
    ("value", "got"), [("ten", "'ten'"), (1.5, "1.5"), ([1], "a list"), ({"a": 1}, "a mapping")]
)
def test_the_error_of_a_wrong_type_names_the_expected_type_and_the_value(value, got):
    line = error_of({"name": "a", "seed": value})
    assert "seed: Input should be a valid integer" in line
    assert line.endswith(f"got {got}")


def test_the_error_of_a_number_out_of_range_names_the_range():
    line = error_of({"name": "a", "network": {"width": 0, "kind": "small"}})
    assert line.endswith("network.width: Input should be greater than or equal to 1, got 0")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_must_be_finite(value):
    data = {"name": "a", "network": {"kind": "large", "depth": 1, "rates": [value]}}
    assert "network.rates.0: Input should be a finite number" in error_of(data)


def test_the_error_of_a_missing_key_omits_the_class_name():
    data = {"name": "a", "network": {"kind": "large"}}
    assert error_of(data) == "job.yaml:\n  network.depth: this key is required and missing"


def test_all_problems_are_reported_together():
    lines = error_of({"seed": "x", "network": {"kind": "small", "width": "y"}}).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["name", "network.width", "seed"]


def test_only_the_intended_union_member_reports_errors():
    assert error_of({"name": "a", "guard": {"folds": "x"}}).splitlines()[1:] == [
        "  guard.folds: Input should be a valid integer, unable to parse string as an integer, "
        "got 'x'"
    ]


def test_all_union_members_report_errors_if_none_was_intended():
    lines = error_of({"name": "a", "guard": "on"}).splitlines()[1:]
    assert all(line.startswith("  guard: Input should be ") for line in lines)
    assert lines[-1].endswith("'off', got 'on'")


def test_the_error_of_an_unknown_kind_lists_the_known_kinds():
    line = error_of({"name": "a", "network": {"kind": "medium"}})
    assert "network: Input tag 'medium'" in line
    assert "'small', 'large'" in line


def test_configurations_are_frozen():
    task = Task(name="a")
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        task.seed = 1


# Fingerprints and differences.


def every_leaf_changed(value):
    """Yields a copy of `value` for each leaf, with that leaf changed."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from ({**value, key: changed} for changed in every_leaf_changed(inner))
    elif isinstance(value, list) and value:
        for i, inner in enumerate(value):
            for changed in every_leaf_changed(inner):
                yield [*value[:i], changed, *value[i + 1 :]]
    else:
        yield "changed"


def test_the_fingerprint_changes_with_every_field():
    task = Task(name="a", network=Large(depth=2, rates=(0.1, 0.2)), stages=(Small(), Small()))
    plain = task.model_dump(mode="json")
    variants = [plain, *every_leaf_changed(plain)]
    assert len(variants) == 12
    assert len({fingerprint(variant) for variant in variants}) == len(variants)


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.booleans()), max_size=6))
def test_the_fingerprint_does_not_depend_on_the_order_of_keys(data):
    assert fingerprint(data) == fingerprint(dict(reversed(data.items())))


def test_fingerprints_never_change_between_versions():
    # Stored runs are compared by fingerprint.
    assert fingerprint(Task(name="a")) == "032134a7f777b365"
    assert fingerprint({"b": [1, 0.5, None], "a": "é"}) == "fc71bc7d381e329c"


def test_a_model_and_its_plain_form_have_the_same_fingerprint():
    task = Task(name="a")
    assert fingerprint(task) == fingerprint(task.model_dump(mode="json"))


def test_differing_fields_returns_sorted_paths():
    old = {"a": 1, "b": {"c": 1, "d": [1, 2], "e": {"f": 0}}, "g": None}
    new = {"a": 1, "b": {"c": 2, "d": [1, 3], "e": {"f": 0}}, "h": 1}
    assert differing_fields(old, new) == ["b.c", "b.d.1", "h"]
    assert differing_fields(old, copy.deepcopy(old)) == []


def test_a_mapping_instead_of_a_value_is_one_difference():
    assert differing_fields({"a": 1}, {"a": {"b": 1}}) == ["a"]

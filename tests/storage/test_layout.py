"""Keys: the documented layout, parsing, and names that could escape their folder."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_tl.storage import layout


def test_keys_match_the_documented_layout():
    assert (layout.JOB, layout.RESULTS, layout.REPORT) == (
        "job.json",
        "results.json",
        "report.html",
    )
    assert layout.shard_key("pp", 123) == "stages/pp/shards/000123.tar"
    assert layout.entry_key("pp", 123) == "stages/pp/entries/000123.json"
    assert layout.manifest_key("pp") == "stages/pp/manifest.json"
    assert layout.conditions_key("pp") == "stages/pp/conditions.safetensors"
    assert layout.metrics_key("pp") == "stages/pp/metrics.jsonl"
    assert layout.result_key("pp") == "stages/pp/result.json"
    assert layout.stage_model_prefix("pp") == "stages/pp/model"
    checkpoint = "stages/pp/checkpoints/step-00001200"
    assert layout.checkpoint_prefix("pp", 1200) == checkpoint
    assert layout.rank_tensors_key("pp", 1200, 3) == f"{checkpoint}/rank-00003.safetensors"
    assert layout.rank_state_key("pp", 1200, 3) == f"{checkpoint}/rank-00003.json"
    assert layout.commit_key("pp", 1200) == f"{checkpoint}/COMMIT"
    assert layout.model_prefix("p_ssl", 0) == "models/p_ssl-seed0"


INDICES = st.integers(min_value=0, max_value=10**10)


@given(INDICES)
def test_parsing_inverts_every_key(index):
    assert layout.parse_shard_index(layout.shard_key("a", index)) == index
    assert layout.parse_shard_index(layout.entry_key("a", index)) == index
    assert layout.parse_checkpoint_step(layout.checkpoint_prefix("a", index)) == index
    assert layout.parse_checkpoint_step(layout.commit_key("a", index)) == index
    assert layout.parse_rank(layout.rank_tensors_key("a", 5, index)) == index
    assert layout.parse_rank(layout.rank_state_key("a", 5, index)) == index


@given(st.integers(0, 999_998), st.integers(0, 999_998))
def test_keys_sort_like_their_numbers(one, other):
    assert (layout.entry_key("a", one) < layout.entry_key("a", other)) == (one < other)
    ours, theirs = layout.checkpoint_prefix("a", one), layout.checkpoint_prefix("a", other)
    assert (ours < theirs) == (one < other)


@pytest.mark.parametrize(
    "key", ["", "job.json", "entries/12.json", "entries/000012.tar", "x000012"]
)
def test_parsing_other_keys_returns_none(key):
    assert layout.parse_shard_index(key) is None
    assert layout.parse_checkpoint_step(key) is None
    assert layout.parse_rank(key) is None


def test_keys_relative_to_a_stage_parse_too():
    assert layout.parse_shard_index("entries/000012.json") == 12
    assert layout.parse_shard_index("000012.json") is None
    assert layout.parse_checkpoint_step("step-00000012/COMMIT") == 12
    assert layout.parse_rank("rank-00001.json") == 1


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "a b", "ä", "a\n", "x" * 81, "a:b"]
)
def test_names_that_could_escape_their_folder_are_rejected(name):
    for build in (layout.stage_prefix, layout.manifest_key, lambda n: layout.model_prefix(n, 0)):
        with pytest.raises(ValueError, match="expected a name"):
            build(name)


@pytest.mark.parametrize("name", ["a", "p_ssl", "layer-search.v2", "9", "x" * 80])
def test_valid_names_are_returned_unchanged(name):
    assert layout.check_name(name) == name


@pytest.mark.parametrize("build", [layout.shard_key, layout.entry_key, layout.checkpoint_prefix])
def test_negative_numbers_are_rejected(build):
    with pytest.raises(ValueError, match="0 or more, got -1"):
        build("a", -1)

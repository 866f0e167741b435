"""A network's two files: exact round trips, no assumptions, and clear errors for damage."""

import json

import pytest
import safetensors.torch
import torch

from dist_tl.errors import ConfigError
from dist_tl.models.files import load_network, save_network
from dist_tl.models.networks import ResNetConfig, build_network, replace_head

SMALL = ResNetConfig(width=2, blocks=(1, 1), pool=1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def trained(config=SMALL):
    network = build_network(config, num_classes=4, image_shape=(1, 8, 8), rng=seeded())
    network(torch.randn(5, 1, 8, 8, generator=seeded(1)))  # updates the running statistics
    return network


def edited(files, change):
    tensors = safetensors.torch.load(files["model.safetensors"])
    change(tensors)
    return files | {"model.safetensors": safetensors.torch.save(tensors)}


def assert_same_tensors(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name]), name


def test_weights_and_buffers_are_restored_bit_for_bit():
    network = trained()
    assert int(network.trunk.norm.num_batches_tracked) == 1
    assert_same_tensors(load_network(save_network(network)), network)


def test_a_loaded_network_has_its_configuration():
    network = trained()
    again = load_network(save_network(network, SMALL, 4, (1, 8, 8)))
    assert (again.config, again.num_classes, again.image_shape) == (SMALL, 4, (1, 8, 8))
    assert again.training


def test_equal_networks_have_equal_bytes_and_saving_twice_changes_nothing():
    files = save_network(trained())
    assert set(files) == {"model.safetensors", "config.json"}
    assert save_network(trained()) == files
    assert save_network(load_network(files)) == files


def test_loading_does_not_change_the_global_generator_or_the_files():
    files = save_network(trained())
    copy = {name: bytes(bytearray(data)) for name, data in files.items()}
    before = torch.get_rng_state()
    network = load_network(files)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    assert files == copy


def test_a_loaded_network_trains():
    network = load_network(save_network(trained()))
    network(torch.randn(3, 1, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_bfloat16_is_restored_as_bfloat16():
    network = trained().bfloat16()
    assert_same_tensors(load_network(save_network(network)), network)


def test_frozen_or_transposed_parameters_are_saved_too():
    network = trained().requires_grad_(False)
    network.head.weight = torch.nn.Parameter(torch.randn(2 * 2, 4).t().contiguous().t().t())
    network.head.weight.requires_grad_(False)
    assert torch.equal(load_network(save_network(network)).head.weight, network.head.weight)


def test_a_shared_parameter_is_stored_once():
    network = trained()
    network.trunk.twin = network.trunk.stem
    tensors = safetensors.torch.load(save_network(network)["model.safetensors"])
    assert "trunk.stem.weight" in tensors
    assert "trunk.twin.weight" not in tensors


def test_views_of_shared_memory_are_stored_as_separate_tensors():
    network = trained()
    both = torch.randn(2, *network.trunk.norm.bias.shape)
    network.trunk.norm.bias.data, network.trunk.norm.weight.data = both[0], both[1]
    assert_same_tensors(load_network(save_network(network)), network)


def test_a_head_without_bias_is_restored_without():
    network = trained()
    network.head = torch.nn.Linear(network.num_features, 4, bias=False)
    assert load_network(save_network(network)).head.bias is None


def test_a_replaced_head_is_saved():
    target = replace_head(trained(), 9, seeded())
    assert_same_tensors(load_network(save_network(target, SMALL, 9, (1, 8, 8))), target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ResNetConfig(),), "another configuration"),
        ((SMALL, 5), "classes: the network has 4, got 5"),
        ((SMALL, 4, (3, 8, 8)), "image shape"),
    ],
)
def test_saving_rejects_another_networks_description(arguments, message):
    with pytest.raises(ConfigError, match=message):
        save_network(trained(), *arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("trunk.stem.weight"), r"lacks trunk\.stem\.weight"),
        (lambda t: t.update(stray=torch.zeros(1)), "holds stray"),
        (
            lambda t: t.update({"head.bias": torch.zeros(7)}),
            r"head\.bias: expected \(4,\) float32, got \(7,\) float32",
        ),
        (
            lambda t: t.update({"head.bias": torch.zeros(4, dtype=torch.int64)}),
            r"got \(4,\) int64",
        ),
        (lambda t: t.clear(), "and [0-9]+ more"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        load_network(edited(save_network(trained()), change))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_or_damaged_file_is_named(name):
    files = save_network(trained())
    with pytest.raises(ConfigError, match=f"missing: {name}"):
        load_network({key: value for key, value in files.items() if key != name})
    with pytest.raises(ConfigError, match=name):
        load_network(files | {name: files[name][:-9]})
    with pytest.raises(ConfigError, match=name):
        load_network(files | {name: b"\x80\x04\x95pickle"})


def test_an_unknown_key_in_the_configuration_is_rejected():
    files = save_network(trained())
    config = json.loads(files["config.json"]) | {"clases": 3}
    with pytest.raises(ConfigError, match="clases: unknown key"):
        load_network(files | {"config.json": json.dumps(config).encode()})

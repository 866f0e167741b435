"""Classifiers of transformers, split into trunk and head: the same output as in the library."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig, ViTModel

from dist_tl.errors import ConfigError
from dist_tl.models.files import load_network, save_network
from dist_tl.models.networks import TimmConfig, TransformersConfig, build_network, replace_head

COLOUR = (3, 16, 16)
_TOKENS = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 4,
}
TINY = {
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1]},
    "convnextv2": {"hidden_sizes": [8, 16], "depths": [2, 1], "num_stages": 2, "patch_size": 2},
    "vit": _TOKENS,
    "deit": _TOKENS,
    "dinov2": {key: value for key, value in _TOKENS.items() if key != "intermediate_size"},
    "swin": {
        **{"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 2},
        "patch_size": 2,
    },
}
# Block outputs and the features' width for images of 16x16 pixels.
BLOCKS = {
    "resnet": ([(8, 4, 4)] * 2 + [(16, 2, 2)], 16),
    "convnextv2": ([(8, 8, 8)] * 2 + [(16, 4, 4)], 16),
    "vit": ([(17, 16)] * 3, 16),
    "deit": ([(18, 16)] * 3, 16),
    "dinov2": ([(17, 16)] * 3, 32),  # the class token next to the mean of the others
    "swin": ([(64, 8)] * 2 + [(16, 16)], 16),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images_of(shape=COLOUR, count=4):
    return torch.rand(count, *shape, generator=seeded(1)) * 2 - 1


def build(num_classes=5, image_shape=COLOUR, **options):
    config = TransformersConfig(kind="transformers", **options)
    return build_network(config, num_classes=num_classes, image_shape=image_shape, rng=seeded())


def library_model(architecture, num_labels=5, **options):
    fitting = {"image_size": 16} if architecture != "resnet" else {}
    config = AutoConfig.for_model(
        architecture, **(TINY[architecture] | fitting | options), num_labels=num_labels
    )
    config.architectures = (
        ["DeiTForImageClassification"] if architecture == "deit" else config.architectures
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForImageClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # layers initialised to zero or one would hide errors
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded(2)))
    return model


@pytest.fixture
def saved(tmp_path):
    def save(architecture, **options):
        model = library_model(architecture, **options)
        model.save_pretrained(tmp_path)
        return model, str(tmp_path)

    return save


@pytest.mark.parametrize("architecture", TINY)
def test_a_saved_classifier_returns_the_librarys_logits_bit_for_bit(architecture, saved):
    model, path = saved(architecture)
    network = build(path=path).eval()
    with torch.no_grad():
        logits = network(images_of())
        assert torch.equal(logits, model(images_of()).logits)
        assert torch.equal(network.head(network.features(images_of())), logits)


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("training", [False, True])
def test_blocks_are_in_depth_order_and_end_with_the_heads_input(architecture, training):
    network = build(architecture=architecture, config=TINY[architecture]).train(training)
    shapes, num_features = BLOCKS[architecture]
    *maps, features = network.blocks(images_of())
    assert [tuple(item.shape[1:]) for item in maps] == shapes
    assert features.shape == (4, num_features)
    assert network.num_features == num_features
    if not training:
        assert torch.equal(network.head(features), network(images_of()))
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("architecture", TINY)
def test_its_own_files_restore_it_without_the_folder(architecture, saved, tmp_path):
    _, path = saved(architecture)
    network = build(path=path).eval()
    files = save_network(network)
    for file in tmp_path.iterdir():
        file.unlink()
    again = load_network(files).eval()
    assert path.encode() not in files["config.json"]
    assert list(again.state_dict()) == list(network.state_dict())
    assert torch.equal(again(images_of()), network(images_of()))
    assert save_network(again) == files


def test_blocks_returns_the_hidden_states(saved):
    model, path = saved("vit")
    with torch.no_grad():
        *tokens, _ = build(path=path).eval().blocks(images_of())
        expected = model(images_of(), output_hidden_states=True).hidden_states
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(tokens, expected[1:], strict=True))


def test_size_and_channels_default_to_those_of_the_images():
    network = build(architecture="vit", config=TINY["vit"], image_shape=(1, 8, 8))
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
    wide = build(architecture="vit", config=TINY["vit"], image_shape=(2, 8, 16))
    assert wide(torch.zeros(2, 2, 8, 16)).shape == (2, 5)


def test_a_grey_image_is_repeated_and_resized_only_if_configured(saved):
    model, path = saved("vit")
    with pytest.raises(ConfigError, match=r"3 channels, got 1; set grey_to_rgb: true"):
        build(path=path, image_shape=(1, 8, 8))
    with pytest.raises(ConfigError, match=r"does not accept 3x8x8 images.*set resize"):
        build(path=path, grey_to_rgb=True, image_shape=(1, 8, 8))
    network = build(path=path, grey_to_rgb=True, resize=16, image_shape=(1, 8, 8)).eval()
    grey = torch.full((2, 1, 8, 8), 0.25)
    with torch.no_grad():
        expected = model(torch.full((2, 3, 16, 16), 0.25)).logits
        torch.testing.assert_close(network(grey), expected)


@pytest.mark.parametrize(
    ("file", "options", "mean", "std"),
    [
        (
            "preprocessor_config.json",
            {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2] * 3},
            [0.4, 0.5, 0.6],
            [0.2] * 3,
        ),
        (
            "processor_config.json",
            {"image_processor": {"do_normalize": True, "image_mean": 0.5, "image_std": 0.25}},
            [0.5],
            [0.25],
        ),
        ("preprocessor_config.json", {"do_normalize": False, "do_rescale": True}, [0.0], [1.0]),
        (
            "preprocessor_config.json",
            {"do_normalize": False, "do_rescale": False},
            [0.0],
            [1 / 255],
        ),
    ],
)
def test_the_folders_statistics_are_used_and_survive_saving(
    saved, tmp_path, file, options, mean, std
):
    model, path = saved("resnet")
    (tmp_path / file).write_text(json.dumps(options))
    network = build(path=path).eval()
    images = images_of()
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    with torch.no_grad():
        expected = model(((images + 1) / 2 - mean) / std).logits
        torch.testing.assert_close(network(images), expected)
        assert torch.equal(load_network(save_network(network)).eval()(images), network(images))


def test_the_jobs_statistics_override_the_folders(saved, tmp_path):
    model, path = saved("resnet")
    statistics = {"image_mean": [0.9] * 3, "image_std": [0.1] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))
    network = build(path=path, normalise={"mean": [0.5], "std": [0.5]}).eval()
    with torch.no_grad():
        torch.testing.assert_close(network(images_of()), model(images_of()).logits)


def test_the_saved_trunk_can_get_a_new_head(saved):
    model, path = saved("resnet", num_labels=9)
    with pytest.raises(ConfigError, match="9 classes, expected 5 classes; set head: fresh"):
        build(path=path)
    network = build(path=path, head="fresh")
    assert network.head.weight.shape == (5, 16)
    assert network.head.weight.abs().max() < 0.06
    assert torch.equal(
        network.trunk.model.resnet.embedder.embedder.convolution.weight,
        model.resnet.embedder.embedder.convolution.weight,
    )
    assert build(path=path, num_classes=9).head.weight.shape == (9, 16)


def test_a_trunk_saved_without_classifier_needs_a_new_head(tmp_path):
    trunk = ViTModel(ViTConfig(**_TOKENS, image_size=16), add_pooling_layer=False)
    trunk.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no head"):
        build(path=str(tmp_path), num_classes=2)
    network = build(path=str(tmp_path), head="fresh").eval()
    expected = trunk.eval()(images_of()).last_hidden_state[:, 0]
    assert torch.equal(network.features(images_of()), expected)


def test_a_pretrained_trunk_under_a_new_head_can_be_saved(saved):
    _, path = saved("convnextv2")
    target = replace_head(build(path=path), 3, seeded()).eval()
    again = load_network(save_network(target)).eval()
    assert again.num_classes == 3
    assert torch.equal(again(images_of()), target(images_of()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "resnett"}, "did you mean 'resnet'"),
        ({"architecture": "bert"}, "'bert' is not known"),
        ({"architecture": "imagegpt"}, "'imagegpt' is not known"),
        (
            {"architecture": "vit", "config": {"hiden_size": 16}},
            "option 'hiden_size' is not known; did you mean 'hidden_size'",
        ),
        ({"architecture": "vit", "config": {"num_labels": 3}}, "'num_labels' is not known"),
        ({"architecture": "vit", "config": {"hidden_size": "a"}}, "cannot be built"),
        ({"architecture": "vit", "config": {"num_channels": 1}}, "1 channels, got 3"),
        ({"architecture": "vit", "config": TINY["vit"] | {"patch_size": 32}}, "does not accept"),
        ({"path": "no/such/folder/here"}, "neither a local folder"),
    ],
)
def test_a_failed_build_reports_the_reason(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_pickled_weights_are_never_loaded(tmp_path):
    model = library_model("resnet")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled weights are never loaded"):
        build(path=str(tmp_path))


def test_code_next_to_the_weights_is_never_run(saved, tmp_path):
    _, path = saved("resnet")
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((tmp_path / "config.json").read_text())
    auto = {"AutoModelForImageClassification": "evil.Net", "AutoConfig": "evil.Config"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    assert build(path=path)(images_of()).shape == (4, 5)  # the library's own class was used
    unknown = config | {"auto_map": auto, "model_type": "evil"}
    (tmp_path / "config.json").write_text(json.dumps(unknown))
    with pytest.raises(ConfigError):
        build(path=path)


def test_a_saved_attention_kernel_of_the_hub_is_ignored(saved, tmp_path):
    model, path = saved("vit")
    config = json.loads((tmp_path / "config.json").read_text())
    config["attn_implementation"] = "kernels-community/flash-attn"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        assert torch.equal(build(path=path).eval()(images_of()), model(images_of()).logits)


def test_missing_weights_of_the_trunk_are_named(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    _, path = saved("resnet")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["resnet.embedder.embedder.convolution.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack resnet\.embedder\.embedder\.convolution\.weight"):
        build(path=path)


def test_logits_of_more_than_one_linear_layer_are_rejected():
    # SwiftFormer averages two heads.
    config = {"depths": [1, 1, 1, 1], "embed_dims": [8, 8, 8, 8]}
    with pytest.raises(ConfigError, match="not the output of one linear layer"):
        build(architecture="swiftformer", config=config, image_shape=(3, 64, 64))


def test_missing_timm_is_reported_with_install_instructions(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install 'dist_tl\[timm\]' torchvision"):
        build_network(
            TimmConfig(kind="timm", name="resnet18"),
            num_classes=3,
            image_shape=COLOUR,
            rng=seeded(),
        )


def test_timm_classifiers_are_split_and_saved_like_others():
    pytest.importorskip("timm", exc_type=Exception, reason="timm or its torchvision is not there")
    config = TimmConfig(kind="timm", name="resnet18")
    network = build_network(config, num_classes=3, image_shape=(1, 32, 32), rng=seeded()).eval()
    images = images_of((1, 32, 32))
    *maps, features = network.blocks(images)
    assert len(maps) == 8
    assert torch.equal(network.head(features), network(images))
    assert torch.equal(load_network(save_network(network)).eval()(images), network(images))


def test_a_broken_torchvision_does_not_break_imports_or_resnet(tmp_path):
    # A torchvision built for another torch, and timm with it, fail on import like this.
    fault = "raise RuntimeError('operator torchvision::nms does not exist')"
    for name in ("torchvision", "timm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(fault)
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch
from dist_tl.errors import ConfigError
from dist_tl.models.networks import ResNetConfig, TimmConfig, build_network
from dist_tl.models import files
assert "transformers" not in sys.modules
fit = dict(num_classes=2, image_shape=(1, 8, 8), rng=torch.Generator())
build_network(ResNetConfig(), **fit)
try:
    build_network(TimmConfig(kind="timm", name="resnet18"), **fit)
except ConfigError as error:
    assert "torchvision::nms" in str(error), error
    print("rejected")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "rejected\n", done.stderr

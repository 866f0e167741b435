"""Weights with NaN or infinity are refused where they are read, by place and tensor."""

import math
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

from dist_tl.errors import ConfigError
from dist_tl.models import timm_networks
from dist_tl.models.files import WEIGHTS, load_network, save_network
from dist_tl.models.finite import check_finite_weights
from dist_tl.models.generators.config import StoredDiffusionConfig, load_generator
from dist_tl.models.generators.diffusion import ClassDiffusion, DiffusionConfig
from dist_tl.models.generators.pipelines import PipelineConfig, PipelineGenerator
from dist_tl.models.hugging_face import TransformersConfig
from dist_tl.models.networks import build_network
from dist_tl.models.resnet import ResNetConfig
from dist_tl.models.timm_networks import TimmConfig

SHAPE = (1, 8, 8)
BAD = [math.nan, math.inf, -math.inf]


def rng():
    return torch.Generator().manual_seed(0)


def with_value(weights, name, value):
    """The bytes of a safetensors file, with one number of one tensor replaced."""
    tensors = safetensors.torch.load(weights)
    tensors[name].view(-1)[-1] = value
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("size", [1, 1000])
def test_one_number_that_is_not_finite_is_found_in_any_precision(dtype, size):
    weights = torch.ones(size)
    check_finite_weights({"w": weights.to(dtype)}, "here")
    weights[-1] = math.nan
    with pytest.raises(ConfigError, match=f"here: w: .* NaN or infinity in 1 of {size};"):
        check_finite_weights({"v": torch.ones(2), "w": weights.to(dtype)}, "here")


def test_integers_flags_and_empty_tensors_are_finite():
    tensors = {
        "batches": torch.tensor(2**62),
        "mask": torch.tensor([True, False]),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "none": torch.empty(0),
    }
    check_finite_weights(tensors, "here")


@pytest.mark.parametrize("value", BAD)
def test_a_stored_network_is_refused(value):
    network = build_network(
        ResNetConfig(width=2, blocks=(1,)), num_classes=2, image_shape=SHAPE, rng=rng()
    )
    files = save_network(network)
    load_network(files, place="models/a")
    damaged = files | {WEIGHTS: with_value(files[WEIGHTS], "head.weight", value)}
    with pytest.raises(ConfigError, match=r"models/a/model\.safetensors: head\.weight: "):
        load_network(damaged, place="models/a")


@pytest.mark.parametrize("value", BAD)
def test_a_stored_generator_is_refused(value):
    config = DiffusionConfig(channels=(8,))
    files = ClassDiffusion(config, num_classes=2, image_shape=(1, 4, 4), rng=rng()).to_files()
    files[WEIGHTS] = with_value(files[WEIGHTS], "label_embedding.weight", value)
    with pytest.raises(
        ConfigError, match=r"generator runs/g/model\.safetensors: label_embedding\.weight: "
    ):
        load_generator(StoredDiffusionConfig(path="runs/g"), files=files)


def test_a_classifier_of_the_transformers_library_is_refused(tmp_path):
    from transformers import AutoModelForImageClassification
    from transformers import ResNetConfig as LibraryConfig

    config = LibraryConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=2
    )
    with torch.random.fork_rng():
        AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    given = TransformersConfig(kind="transformers", path=str(tmp_path))
    build_network(given, num_classes=2, image_shape=SHAPE, rng=rng())
    weights = tmp_path / WEIGHTS
    name = "resnet.embedder.embedder.convolution.weight"
    weights.write_bytes(with_value(weights.read_bytes(), name, math.nan))
    with pytest.raises(ConfigError, match=f"{tmp_path}: {name}: expected finite numbers"):
        build_network(given, num_classes=2, image_shape=SHAPE, rng=rng())


def test_a_pretrained_classifier_of_timm_is_refused_and_a_fresh_one_is_not(monkeypatch):
    def create_model(name, *, pretrained, num_classes, in_chans):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
        model.pretrained_cfg = {}
        nn.init.constant_(model[1].weight, math.inf if pretrained else 0.5)
        return model

    library = SimpleNamespace(create_model=create_model, list_models=lambda: ["plain"])
    monkeypatch.setattr(timm_networks, "_import_timm", lambda: library)
    config = TimmConfig(kind="timm", name="plain")
    timm_networks.build_timm(config, num_classes=2, image_shape=SHAPE)
    pretrained = config.model_copy(update={"pretrained": True})
    with pytest.raises(ConfigError, match=r"timm: plain: 1\.weight: .* in 128 of 128"):
        timm_networks.build_timm(pretrained, num_classes=2, image_shape=SHAPE)


def test_a_pipeline_is_refused(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        num_layers=1,
        sample_size=4,
        num_embeds_ada_norm=3,
    )
    diffusers.DiTPipeline(transformer, None, diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    PipelineGenerator.load(PipelineConfig(path=str(tmp_path)))
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(with_value(weights.read_bytes(), "proj_out_2.bias", math.inf))
    with pytest.raises(ConfigError, match=r"transformer: proj_out_2\.bias: expected finite"):
        PipelineGenerator.load(PipelineConfig(path=str(tmp_path)))

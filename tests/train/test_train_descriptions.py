"""What is said of stored models: exact numbers, from configurations and headers only."""

import json

import pytest
import torch

from dist_tl.errors import ConfigError
from dist_tl.methods.hub.pathway import HubPathway
from dist_tl.methods.hub.routes import RouteConfig
from dist_tl.models.files import save_network
from dist_tl.models.generators.diffusion import ClassDiffusion, DiffusionConfig
from dist_tl.models.hugging_face import TransformersConfig
from dist_tl.models.inputs import InputConfig, Normalise
from dist_tl.models.networks import behind_inputs, build_network, parameter_count
from dist_tl.models.resnet import ResNetConfig
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.descriptions import NOT_HERE, ModelDescription, describe_model
from dist_tl.train.hub_model import hub_files

SHAPE = (1, 8, 8)
SAVED = Normalise(mean=(0.5,), std=(0.25,))
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}


def network(config, classes=3, shape=SHAPE):
    rng = torch.Generator().manual_seed(0)
    return build_network(config, num_classes=classes, image_shape=shape, rng=rng)


def write(store, files):
    for name, data in files.items():
        store.write(name, data)
    return store.url


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("url", ["{}", "memory://described"])
def test_a_network_is_described_without_loading_it(tmp_path, norm, url):
    store = ObjectStore(url.format(tmp_path))
    model = network(ResNetConfig(kind="resnet", width=4, blocks=(1, 1), norm=norm))
    assert describe_model(write(store, save_network(model))) == ModelDescription(
        architecture=f"resnet width 4 blocks [1, 1]{' norm group' if norm == 'group' else ''}",
        num_classes=3,
        image_shape=SHAPE,
        inputs="pixels in [-1, 1]",
        parameters=parameter_count(model),
    )


def test_preprocessing_is_told_in_its_order(tmp_path):
    config = TransformersConfig(
        kind="transformers", architecture="convnextv2", config=CONVNEXT, normalise=SAVED
    )
    inputs = InputConfig(resize=8, grey_to_rgb=True)
    model = behind_inputs(network(config, shape=(3, 8, 8)), inputs, (1, 16, 16))
    found = describe_model(write(ObjectStore(tmp_path), save_network(model)))
    assert found.architecture == "transformers convnextv2"
    assert found.inputs == "resized to 8 x 8, grey to RGB, mean 0.5, std 0.25"
    assert found.parameters == parameter_count(model)


def test_a_generator_is_described(tmp_path):
    rng = torch.Generator().manual_seed(0)
    model = ClassDiffusion(
        DiffusionConfig(channels=(8, 16)), num_classes=5, image_shape=SHAPE, rng=rng
    )
    found = describe_model(write(ObjectStore(tmp_path), model.to_files()))
    assert (found.architecture, found.num_classes) == ("diffusion [8, 16]", 5)
    assert (found.inputs, found.image_shape) == ("", SHAPE)
    assert found.parameters == parameter_count(model)


def test_a_hub_is_described_with_the_parameters_of_all_its_parts(tmp_path):
    small, wide = (ResNetConfig(kind="resnet", width=w, blocks=(1,), norm="batch") for w in (4, 8))
    experts = {"a": network(small), "b": network(wide)}
    hub = HubPathway(experts, network(small, classes=4), num_classes=3, routes=RouteConfig(k=1))
    found = describe_model(write(ObjectStore(tmp_path), hub_files(hub)))
    assert (
        found.architecture
        == "hub of 2 (resnet width 4 blocks [1], resnet width 8 blocks [1]), k = 1 by input"
    )
    assert (found.num_classes, found.image_shape) == (3, SHAPE)
    assert found.parameters == parameter_count(hub)


def test_a_folder_of_transformers_is_described_with_its_own_or_the_jobs_statistics(tmp_path):
    config = TransformersConfig(kind="transformers", architecture="convnextv2", config=CONVNEXT)
    model = network(config, classes=7, shape=(3, 8, 8))
    model.trunk.model.save_pretrained(tmp_path)
    processor = {"do_normalize": True, "image_mean": [0.5, 0.5, 0.4], "image_std": [0.2, 0.2, 0.2]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    found = describe_model(str(tmp_path))
    assert (found.architecture, found.num_classes) == ("transformers convnextv2", 7)
    assert found.inputs == "mean 0.5/0.5/0.4, std 0.2/0.2/0.2"
    assert found.parameters == parameter_count(model.trunk)
    given = describe_model(str(tmp_path), InputConfig(resize=32, normalise=SAVED))
    assert given.inputs == "resized to 32 x 32, mean 0.5, std 0.25"


def test_a_pipeline_is_described_by_the_images_that_it_decodes(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng(devices=[]):
        transformer = diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            num_layers=1,
            sample_size=4,
            num_embeds_ada_norm=6,
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
        )
        pipeline = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())
    pipeline.save_pretrained(tmp_path, safe_serialization=True)
    found = describe_model(str(tmp_path))
    assert (found.num_classes, found.image_shape) == (6, (3, 8, 8))
    assert found.parameters == sum(map(parameter_count, (transformer, vae)))


def test_a_name_on_a_hub_is_not_downloaded():
    assert describe_model("nobody/has-this-model").architecture == NOT_HERE


def test_places_without_a_known_model_are_rejected(tmp_path):
    with pytest.raises(ConfigError, match=r"no model at .*absent: config\.json not found"):
        describe_model(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="describes no network"):
        describe_model(str(tmp_path))
    model = network(ResNetConfig(kind="resnet", width=4, blocks=(1,)))
    write(ObjectStore(tmp_path), {**save_network(model), "model.safetensors": b"damaged"})
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        describe_model(str(tmp_path))

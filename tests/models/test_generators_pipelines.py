"""Saved DiT pipelines: mixtures compared with integer labels and with diffusers' own pipeline."""

import shutil
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from dist_tl.errors import ConfigError, NumericsError
from dist_tl.models.generators.pipelines import PipelineConfig, PipelineGenerator
from dist_tl.seeds import row_rngs, torch_rng

diffusers = pytest.importorskip("diffusers")


def tiny_transformer(num_classes, channels, **options):
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=channels,
        num_layers=2,
        sample_size=4,
        num_embeds_ada_norm=num_classes,
        **options,
    )


def tiny_vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )


def save(folder, transformer, vae, scheduler=None):
    scheduler = scheduler or diffusers.DDIMScheduler()
    pipeline = diffusers.DiTPipeline(transformer, vae, scheduler)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines with latents and learnt variances, on pixels, and with ImageNet's classes."""
    place = tmp_path_factory.mktemp("pipelines")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SimpleNamespace(
            latent=save(place / "latent", tiny_transformer(3, 4, out_channels=8), tiny_vae()),
            pixel=save(place / "pixel", tiny_transformer(3, 1), None),
            imagenet=save(place / "wide", tiny_transformer(1000, 4, out_channels=8), tiny_vae()),
        )


def load(folder, **options):
    settings = {"num_steps": 3, "guidance_scale": 1.0} | options
    return PipelineGenerator.load(PipelineConfig(path=str(folder), **settings))


def mixtures(num_rows):
    return torch.randn(num_rows, 3, generator=torch_rng(0, "mixtures")).softmax(dim=1)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["latent", "pixel"])
def test_one_hot_conditions_equal_integer_labels_exactly(folders, kind, guidance_scale):
    generator = load(getattr(folders, kind), guidance_scale=guidance_scale)
    labels = torch.tensor([0, 2, 1, 2])
    soft = generator.sample(torch.eye(3)[labels], rng=row_rngs(0, "z", range(4)))
    hard = generator.sample_classes(labels, rng=row_rngs(0, "z", range(4)))
    assert torch.equal(soft, hard)
    other = generator.sample_classes(labels.flip(0), rng=row_rngs(0, "z", range(4)))
    assert not torch.equal(hard, other)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_integer_labels_equal_diffusers_own_pipeline(folders, guidance_scale):
    reference = diffusers.DiTPipeline.from_pretrained(folders.imagenet, use_safetensors=True)
    reference.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        reference.scheduler.config, timestep_spacing="linspace"
    )
    reference.set_progress_bar_config(disable=True)
    labels = [7, 999]
    expected = reference(
        class_labels=labels,
        guidance_scale=guidance_scale,
        generator=row_rngs(0, "z", range(2)),
        num_inference_steps=5,
        output_type="pt",
    ).images
    generator = load(folders.imagenet, guidance_scale=guidance_scale, num_steps=5)
    images = generator.sample_classes(torch.tensor(labels), rng=row_rngs(0, "z", range(2)))
    torch.testing.assert_close(images / 2 + 0.5, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "shape"), [("latent", (3, 8, 8)), ("pixel", (1, 4, 4))])
def test_images_are_float32_between_black_and_white(folders, kind, shape):
    generator = load(getattr(folders, kind), guidance_scale=6.0)
    images = generator.sample(mixtures(2), rng=row_rngs(0, "z", range(2)))
    assert (generator.num_classes, generator.image_shape) == (3, shape)
    assert images.shape == (2, *shape)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1.0
    assert generator.sample(torch.empty(0, 3), rng=[]).shape == (0, *shape)


def test_mixing_classes_that_share_an_embedding_changes_nothing(folders):
    generator = load(folders.latent, guidance_scale=2.0)
    with torch.no_grad():
        for block in generator.transformer.transformer_blocks:
            table = block.norm1.emb.class_embedder.embedding_table.weight
            table[1] = table[0]
    condition = torch.tensor([[0.3, 0.7, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    images = generator.sample(condition, rng=row_rngs(0, "z", [4, 4, 4]))
    torch.testing.assert_close(images[0], images[1], atol=1e-5, rtol=0)
    assert (images[0] - images[2]).abs().max() > 1e-3


def test_no_class_is_the_models_own_last_row(folders):
    generator = load(folders.pixel)
    with torch.no_grad():
        for block in generator.transformer.transformer_blocks:
            block.norm1.emb.class_embedder.embedding_table.weight[-1] = float("nan")
    labels = torch.tensor([0])
    generator.sample_classes(labels, rng=row_rngs(0, "z", [0]))
    generator.config = generator.config.model_copy(update={"guidance_scale": 2.0})
    with pytest.raises(NumericsError, match="row 0 of 1"):
        generator.sample_classes(labels, rng=row_rngs(0, "z", [0]))


def test_a_sample_depends_on_its_condition_and_its_own_generator_only(folders):
    generator, condition = load(folders.latent, guidance_scale=1.5), mixtures(4)
    together = generator.sample(condition, rng=row_rngs(0, "z", range(4)))
    alone = generator.sample(condition[2:3], rng=row_rngs(0, "z", [2]))
    torch.testing.assert_close(together[2:3], alone, atol=1e-5, rtol=0)


def test_loading_and_sampling_change_no_global_generator_and_no_weight(folders):
    before = torch.get_rng_state()
    generator = load(folders.latent, guidance_scale=2.0)
    assert not any(module.training for module in generator.modules())
    assert not any(parameter.requires_grad for parameter in generator.parameters())
    weights = {name: value.clone() for name, value in generator.state_dict().items()}
    generator.sample(mixtures(2), rng=row_rngs(0, "z", range(2)))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weights[name], value) for name, value in generator.state_dict().items())


def test_a_low_precision_transformer_returns_float32_images(folders):
    generator = load(folders.latent, dtype="bfloat16", guidance_scale=2.0)
    assert generator.transformer.dtype == torch.bfloat16
    labels = torch.tensor([0, 2])
    soft = generator.sample(torch.eye(3)[labels], rng=row_rngs(0, "z", range(2)))
    assert soft.dtype == torch.float32
    assert torch.equal(soft, generator.sample_classes(labels, rng=row_rngs(0, "z", range(2))))


def test_a_path_that_does_not_exist_is_rejected(tmp_path):
    with pytest.raises(ConfigError, match="neither a local folder nor a model"):
        load(tmp_path / "nothing")


def test_a_folder_without_a_pipeline_is_rejected(tmp_path):
    with pytest.raises(ConfigError, match=r"model_index\.json is missing"):
        load(tmp_path)


def test_a_pipeline_without_classes_is_rejected(tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"class-conditional .* got DDPMPipeline .*unet UNet2DM"):
        load(tmp_path)


def test_a_pickle_is_never_loaded(folders, tmp_path):
    folder = shutil.copytree(folders.pixel, tmp_path / "pickled")
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    torch.save(safetensors.torch.load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ConfigError, match="cannot be loaded from safetensors"):
        load(folder)


def test_missing_weights_are_not_replaced_by_random_ones(folders, tmp_path):
    folder = shutil.copytree(folders.pixel, tmp_path / "holey")
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors.pop("proj_out_1.weight")
    safetensors.torch.save_file(tensors, weights)
    with pytest.raises(ConfigError, match=r"lacks weights, e.g. proj_out_1.weight"):
        load(folder)


def test_an_unsupported_scheduler_is_rejected(folders, tmp_path):
    folder = shutil.copytree(folders.pixel, tmp_path / "flow")
    (folder / "scheduler/scheduler_config.json").write_text(
        '{"_class_name": "FlowMatchEulerDiscreteScheduler"}'
    )
    with pytest.raises(ConfigError, match="got 'FlowMatchEulerDiscreteScheduler'"):
        load(folder)

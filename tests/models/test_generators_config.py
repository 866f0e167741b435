"""A job selects a generator by kind; loading it returns a frozen one."""

import pytest
import torch
from pydantic import TypeAdapter

from dist_tl.config import StrictModel, validate
from dist_tl.errors import ConfigError
from dist_tl.models.generators.config import (
    GeneratorConfig,
    StoredDiffusionConfig,
    load_generator,
)
from dist_tl.models.generators.diffusion import ClassDiffusion, DiffusionConfig
from dist_tl.models.generators.pipelines import PipelineConfig


class Job(StrictModel):
    generator: GeneratorConfig


def stored(**options):
    config = DiffusionConfig(channels=(8,), num_steps=4, **options)
    rng = torch.Generator().manual_seed(0)
    return ClassDiffusion(config, num_classes=2, image_shape=(1, 4, 4), rng=rng).to_files()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"kind": "diffusion", "path": "s3://b/g"}, StoredDiffusionConfig(path="s3://b/g")),
        ({"kind": "pipeline", "path": "org/dit"}, PipelineConfig(path="org/dit")),
    ],
)
def test_the_kind_selects_the_generator_class(data, expected):
    assert TypeAdapter(GeneratorConfig).validate_python(data) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "gan", "path": "x"}, "'diffusion', 'pipeline'"),
        ({"kind": "pipeline"}, "path: this key is required"),
        ({"kind": "pipeline", "path": "x", "num_step": 3}, "did you mean 'num_steps'"),
    ],
)
def test_an_invalid_generator_configuration_is_rejected(data, message):
    with pytest.raises(ConfigError, match=message):
        validate(Job, {"generator": data}, source="job")


def test_a_loaded_generator_is_frozen_and_equals_the_saved_one():
    generator = load_generator(StoredDiffusionConfig(path="g"), files=stored())
    assert generator.config.num_steps == 4
    assert not generator.training
    assert not any(parameter.requires_grad for parameter in generator.parameters())


def test_sampling_settings_of_the_job_replace_the_saved_ones():
    config = StoredDiffusionConfig(path="g", guidance_scale=2.0, num_steps=7)
    generator = load_generator(config, files=stored())
    assert (generator.config.guidance_scale, generator.config.num_steps) == (2.0, 7)
    assert generator.config.channels == (8,)


def test_guidance_is_rejected_if_no_class_was_not_learnt():
    config = StoredDiffusionConfig(path="runs/g", guidance_scale=2.0)
    with pytest.raises(ConfigError, match=r"generator runs/g(.|\n)*label_dropout"):
        load_generator(config, files=stored(label_dropout=0.0))


def test_missing_files_are_an_error():
    with pytest.raises(ConfigError, match="generator runs/g: expected its files"):
        load_generator(StoredDiffusionConfig(path="runs/g"))


def test_a_missing_pipeline_is_reported_on_loading(tmp_path):
    with pytest.raises(ConfigError, match="neither a local folder"):
        load_generator(PipelineConfig(path=str(tmp_path / "nothing")))

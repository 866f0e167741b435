"""Placeholder by the lead; the owner overwrites this file."""

from dist_tl.models.generators.diffusion import DiffusionConfig

GeneratorConfig = DiffusionConfig

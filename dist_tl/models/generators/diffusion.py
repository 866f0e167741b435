"""A small class-conditional diffusion model, trained from scratch in about a minute on two cores.

The network is diffusers' UNet with a label embedding of our own, so that a condition may be any
probability vector: it enters as the mean of the class embeddings under that vector. One further
row stands for "no class" and is learnt by dropping labels (classifier-free guidance).

Source: Ho et al., "Denoising Diffusion Probabilistic Models", arXiv:2006.11239; Salimans and Ho,
"Progressive Distillation", arXiv:2202.00512 (v-prediction); Hang et al., "Min-SNR Weighting",
arXiv:2303.09556.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import safetensors.torch
import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from dist_tl.config import StrictModel, validate
from dist_tl.errors import ConfigError
from dist_tl.models.generators.protocol import check_condition, check_labels, check_rng
from dist_tl.models.generators.sampling import draw_noise, guide, make_solver, solve

if TYPE_CHECKING:
    from diffusers import UNet2DModel

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

_NUM_TRAIN_STEPS = 1000
_NORM_GROUPS = 8
_PREDICTION = {"v": "v_prediction", "noise": "epsilon", "image": "sample"}
_SCHEDULE = {"cosine": "squaredcos_cap_v2", "linear": "linear", "scaled_linear": "scaled_linear"}


class DiffusionConfig(StrictModel):
    """Network, training loss and sampling of a `ClassDiffusion`.

    The defaults suit 8x8 grey images; for 32x32 colour, [64, 128, 128] with attention is a start.
    """

    kind: Literal["diffusion"] = "diffusion"
    channels: tuple[int, ...] = Field(
        default=(16, 32),
        min_length=1,
        description="Width of each level, finest first; each level halves the image. "
        "Multiples of 8.",
    )
    layers_per_level: int = Field(default=1, ge=1, description="Residual layers in each level.")
    attention: bool = Field(
        default=False, description="Self-attention on the coarsest level and in the middle."
    )
    prediction: Literal["v", "noise", "image"] = Field(
        default="v", description="What the network predicts from a noisy image."
    )
    noise_schedule: Literal["cosine", "linear", "scaled_linear"] = Field(
        default="cosine", description="How fast images turn into noise."
    )
    snr_clip: float | None = Field(
        default=5.0,
        gt=0.0,
        description="Min-SNR weighting: the signal-to-noise ratio above which a noise level "
        "counts no more in the loss; null for the plain squared error.",
    )
    label_dropout: float = Field(
        default=0.1, ge=0.0, lt=1.0, description="Share of training labels replaced by 'no class'."
    )
    guidance_scale: float = Field(
        default=1.0,
        ge=0.0,
        description="1: conditional sampling, half the cost; above: closer to the class, less "
        "diverse.",
    )
    num_steps: int = Field(
        default=10, ge=1, le=500, description="Network evaluations for each image."
    )

    @model_validator(mode="after")
    def _check(self) -> "DiffusionConfig":
        if any(width < 1 or width % _NORM_GROUPS for width in self.channels):
            raise ValueError(f"channels: expected multiples of 8, got {list(self.channels)}")
        if self.guidance_scale != 1.0 and self.label_dropout == 0.0:
            raise ValueError(
                "guidance_scale other than 1 needs label_dropout above 0: "
                "without it 'no class' is never learnt"
            )
        return self


class ClassDiffusion(nn.Module):
    """A `ConditionalGenerator` that can also be trained; see `loss`.

    Args:
        config: everything but the two sizes below.
        num_classes: K, at least 2.
        image_shape: (C, H, W); H and W must be multiples of 2 to the number of levels minus 1.
        rng: a CPU generator that initialises the weights; no global generator is touched.

    Raises:
        ConfigError: the sizes do not fit the network.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        *,
        num_classes: int,
        image_shape: tuple[int, int, int],
        rng: torch.Generator,
    ) -> None:
        super().__init__()
        _check_sizes(config, num_classes, image_shape)
        self.config = config
        self.num_classes = num_classes
        self.image_shape = tuple(image_shape)
        seed = int(torch.randint(2**62, (), generator=rng))
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the accelerators too and leave them so.
            torch.default_generator.manual_seed(seed)
            self.unet = _build_unet(config, self.image_shape)
            width = self.unet.time_embedding.linear_2.out_features
            self.label_embedding = nn.Embedding(num_classes + 1, width)
        # Not a buffer: engines cast buffers to bfloat16, which this table would not survive.
        self._signal = make_solver(_noise_schedule(config), clip=True).alphas_cumprod

    def forward(self, images: Tensor, labels: Tensor, *, rng: torch.Generator) -> Tensor:
        """The training loss, so that engines can wrap the model. See `loss`."""
        return self.loss(images, labels, rng=rng)

    def loss(self, images: Tensor, labels: Tensor, *, rng: torch.Generator) -> Tensor:
        """Mean weighted squared error of the prediction at random noise levels.

        Args:
            images: (N, C, H, W) float32 in [-1, 1].
            labels: (N,) int64 in 0..K-1.
            rng: draws noise levels, dropped labels and noise.

        Returns:
            A scalar, float32.

        Raises:
            ValueError: shapes or dtypes do not fit, or a label is out of range.
        """
        self._check_batch(images, labels)
        timesteps, uniform, noise = _draw_corruption(rng, images)
        labels = torch.where(uniform < self.config.label_dropout, self.num_classes, labels)

        signal = self._signal.to(images.device)[timesteps][:, None, None, None]
        noisy = signal.sqrt() * images + (1 - signal).sqrt() * noise
        predicted = self._predict(noisy, timesteps, self.label_embedding(labels))
        target = prediction_target(self.config.prediction, images, noise, signal)
        return (loss_weight(self.config, signal) * (predicted - target).square()).mean()

    def sample(self, condition: Tensor, *, rng: Sequence[torch.Generator]) -> Tensor:
        """One image for each row of `condition`; see `ConditionalGenerator.sample`.

        The cost is `num_steps` evaluations of the network, twice that with guidance.
        """
        check_condition(condition, self.num_classes)
        classes = self.label_embedding.weight[: self.num_classes].float()
        embedded = condition.to(classes.device) @ classes
        return self._sample(embedded, rng).to(condition.device)

    def sample_classes(self, labels: Tensor, *, rng: Sequence[torch.Generator]) -> Tensor:
        """One image for each integer label; equals `sample` of their one-hot rows exactly.

        Args:
            labels: (N,) int64 in 0..K-1.
            rng: N generators.

        Raises:
            ValueError: labels out of range or not int64, or not one generator for each.
            NumericsError: as for `sample`.
        """
        check_labels(labels, self.num_classes)
        embedded = self.label_embedding(labels.to(self.label_embedding.weight.device)).float()
        return self._sample(embedded, rng).to(labels.device)

    def to_files(self) -> dict[str, bytes]:
        """File name -> content: weights as safetensors, the rest as JSON. Bit for bit."""
        state = {
            name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()
        }
        description = {
            "generator": self.config.model_dump(mode="json"),
            "num_classes": self.num_classes,
            "image_shape": list(self.image_shape),
        }
        return {
            WEIGHTS_FILE: safetensors.torch.save(state),
            CONFIG_FILE: json.dumps(description, indent=2, sort_keys=True).encode(),
        }

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "ClassDiffusion":
        """The model that `to_files` described, in eval mode.

        Raises:
            ConfigError: a file is missing, unreadable, or the weights do not fit the config.
        """
        if missing := {WEIGHTS_FILE, CONFIG_FILE} - set(files):
            raise ConfigError(f"generator: missing {sorted(missing)}, got {sorted(files)}")
        config, num_classes, image_shape = _read_description(files[CONFIG_FILE])
        model = cls(config, num_classes=num_classes, image_shape=image_shape, rng=torch.Generator())
        try:
            model.load_state_dict(safetensors.torch.load(bytes(files[WEIGHTS_FILE])))
        except (SafetensorError, RuntimeError) as error:
            raise ConfigError(f"generator: {WEIGHTS_FILE} does not fit: {error}") from None
        return model.eval()

    @torch.no_grad()
    def _sample(self, embedded: Tensor, rng: Sequence[torch.Generator]) -> Tensor:
        check_rng(rng, len(embedded))
        if len(embedded) == 0:
            return torch.empty(0, *self.image_shape, device=embedded.device)
        null = self.label_embedding.weight[self.num_classes :].float()
        was_training = self.training
        # Even a dropout of zero changes the rounding, and a sample must not depend on the mode.
        self.eval()
        try:
            images = solve(
                guide(self._predict, self.config.guidance_scale, null),
                embedded,
                draw_noise(rng, self.image_shape, embedded.device),
                solver=make_solver(_noise_schedule(self.config), clip=True),
                num_steps=self.config.num_steps,
            )
        finally:
            self.train(was_training)
        return images.clamp(-1.0, 1.0)

    def _predict(self, noisy: Tensor, timesteps: Tensor, embedded: Tensor) -> Tensor:
        dtype = self.unet.dtype
        return self.unet(
            noisy.to(dtype), timesteps, class_labels=embedded.to(dtype), return_dict=False
        )[0].float()

    def _check_batch(self, images: Tensor, labels: Tensor) -> None:
        if tuple(images.shape[1:]) != self.image_shape or len(images) != len(labels):
            raise ValueError(
                f"expected images (N, {', '.join(map(str, self.image_shape))}) and N labels, "
                f"got {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        check_labels(labels, self.num_classes)


def _check_sizes(
    config: DiffusionConfig, num_classes: int, image_shape: tuple[int, int, int]
) -> None:
    if num_classes < 2:
        raise ConfigError(f"num_classes: expected at least 2, got {num_classes}")
    factor = 2 ** (len(config.channels) - 1)
    if len(image_shape) != 3 or min(image_shape) < 1 or any(n % factor for n in image_shape[1:]):
        raise ConfigError(
            f"image_shape: expected (C, H, W) with H and W multiples of {factor} for "
            f"{len(config.channels)} levels of channels, got {tuple(image_shape)}"
        )


def _build_unet(config: DiffusionConfig, image_shape: tuple[int, int, int]) -> "UNet2DModel":
    # Imported late: the library takes seconds to come up, and a plan needs none of it.
    from diffusers import UNet2DModel

    levels = len(config.channels)
    attends = [config.attention and level == levels - 1 for level in range(levels)]
    unet = UNet2DModel(
        sample_size=image_shape[1:],
        in_channels=image_shape[0],
        out_channels=image_shape[0],
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_level,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        add_attention=config.attention,
        norm_num_groups=_NORM_GROUPS,
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",  # we hand in the embedding itself
    )
    # Starting from the zero prediction keeps the first large steps from exploding.
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet


def _noise_schedule(config: DiffusionConfig) -> dict[str, Any]:
    return {
        "num_train_timesteps": _NUM_TRAIN_STEPS,
        "beta_schedule": _SCHEDULE[config.noise_schedule],
        "prediction_type": _PREDICTION[config.prediction],
    }


def _draw_corruption(rng: torch.Generator, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Drawn where the generator lives, so that an accelerator trains on the same noise as a CPU.
    where: dict[str, Any] = {"generator": rng, "device": rng.device}
    timesteps = torch.randint(_NUM_TRAIN_STEPS, (len(images),), **where)
    uniform = torch.rand(len(images), **where)
    noise = torch.randn(images.shape, **where)
    return timesteps.to(images.device), uniform.to(images.device), noise.to(images.device)


def prediction_target(prediction: str, images: Tensor, noise: Tensor, signal: Tensor) -> Tensor:
    """What the network should answer to sqrt(signal) * images + sqrt(1 - signal) * noise.

    Args:
        prediction: "v", "noise" or "image".
        signal: share of the image's power left, strictly between 0 and 1.
    """
    if prediction == "noise":
        return noise
    if prediction == "image":
        return images
    return signal.sqrt() * noise - (1 - signal).sqrt() * images


def loss_weight(config: DiffusionConfig, signal: Tensor) -> Tensor:
    """Weight of the squared error at each noise level, the same for every kind of prediction.

    In terms of the image's error it is min(signal-to-noise ratio, `snr_clip`); 1 where
    `snr_clip` is None.
    """
    if config.snr_clip is None:
        return torch.ones_like(signal)
    ratio = signal / (1 - signal)
    # The squared error of the prediction for a unit error of the image.
    per_image_error = {"v": ratio + 1, "noise": ratio, "image": torch.ones_like(ratio)}
    return ratio.clamp(max=config.snr_clip) / per_image_error[config.prediction]


def _read_description(content: bytes) -> tuple[DiffusionConfig, int, tuple[int, int, int]]:
    try:
        description: dict[str, Any] = json.loads(bytes(content))
        data, num_classes = description["generator"], int(description["num_classes"])
        channels, height, width = (int(size) for size in description["image_shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"generator: {CONFIG_FILE} is not a description: {error!r}") from None
    config = validate(DiffusionConfig, data, source=CONFIG_FILE)
    return config, num_classes, (channels, height, width)

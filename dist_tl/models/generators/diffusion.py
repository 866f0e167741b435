"""A small class-conditional diffusion model that trains from scratch in a minute on two cores.

The network is diffusers' UNet with a separate label embedding, so that a condition can be any
probability vector: its embedding is the mean of the class embeddings under that vector. One more
row represents "no class" and is learnt by dropping labels (classifier-free guidance).

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
from dist_tl.models.finite import check_finite_weights
from dist_tl.models.generators.protocol import check_condition, check_labels, check_rng
from dist_tl.models.generators.sampling import draw_noise, guide, make_solver, solve

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

_NUM_TRAIN_STEPS = 1000
_NORM_GROUPS = 8
_PREDICTION = {"v": "v_prediction", "noise": "epsilon", "image": "sample"}
_SCHEDULE = {"cosine": "squaredcos_cap_v2", "linear": "linear", "scaled_linear": "scaled_linear"}


class DiffusionConfig(StrictModel):
    """Network, training loss and sampling of a `ClassDiffusion`.

    The defaults suit 8x8 grey images; for 32x32 colour images start with [64, 128, 128] and
    attention.
    """

    kind: Literal["diffusion"] = "diffusion"
    channels: tuple[int, ...] = Field(
        default=(16, 32),
        min_length=1,
        description="Width of each level, finest first; each level halves the image. "
        "Multiples of 8.",
    )
    layers_per_level: int = Field(default=1, ge=1, description="Residual layers per level.")
    attention: bool = Field(
        default=False, description="Self-attention on the coarsest level and in the middle."
    )
    prediction: Literal["v", "noise", "image"] = Field(
        default="v", description="Target that the network predicts from a noisy image."
    )
    noise_schedule: Literal["cosine", "linear", "scaled_linear"] = Field(
        default="cosine", description="Noise schedule of the forward process."
    )
    snr_clip: float | None = Field(
        default=5.0,
        gt=0.0,
        description="Min-SNR weighting: signal-to-noise ratio above which the loss weight is "
        "constant; null for the plain squared error.",
    )
    label_dropout: float = Field(
        default=0.1,
        ge=0.0,
        lt=1.0,
        description="Fraction of training labels replaced by 'no class'.",
    )
    guidance_scale: float = Field(
        default=1.0,
        ge=0.0,
        description="1: conditional sampling at half the cost; larger values: closer to the class, "
        "less diverse.",
    )
    num_steps: int = Field(default=10, ge=1, le=500, description="Network evaluations per image.")

    @model_validator(mode="after")
    def _check(self) -> "DiffusionConfig":
        if any(width < 1 or width % _NORM_GROUPS for width in self.channels):
            raise ValueError(f"channels: expected multiples of 8, got {list(self.channels)}")
        if self.guidance_scale != 1.0 and self.label_dropout == 0.0:
            raise ValueError(
                "guidance_scale other than 1 needs label_dropout above 0, "
                "because 'no class' is not learnt otherwise"
            )
        return self


class ClassDiffusion(nn.Module):
    """A `ConditionalGenerator` with a training loss; see `loss`.

    Args:
        config: all settings except the sizes below.
        num_classes: K, at least 2.
        image_shape: (C, H, W); H and W are multiples of 2 ** (number of levels - 1).
        rng: a CPU generator that initialises the weights; global generators are not changed.

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
        channels, height, width = image_shape
        self.image_shape: tuple[int, int, int] = (channels, height, width)
        seed = int(torch.randint(2**62, (), generator=rng))
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which also seeds the accelerators and would not be undone.
            torch.default_generator.manual_seed(seed)
            self.unet = _build_unet(config, self.image_shape)
            embedding_dim = self.unet.time_embedding.linear_2.out_features
            self.label_embedding = nn.Embedding(num_classes + 1, embedding_dim)
        # Not a buffer: engines cast buffers to bfloat16, which is too coarse for this table.
        self._signal = make_solver(_noise_schedule(config), clip=True).alphas_cumprod

    def forward(self, images: Tensor, labels: Tensor, *, rng: torch.Generator) -> Tensor:
        """Returns the training loss, so that engines can wrap the model. See `loss`."""
        return self.loss(images, labels, rng=rng)

    def loss(self, images: Tensor, labels: Tensor, *, rng: torch.Generator) -> Tensor:
        """Returns the mean weighted squared error of the prediction at random noise levels.

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
        """Generates one image per row of `condition`; see `ConditionalGenerator.sample`.

        Costs `num_steps` evaluations of the network, twice as many with guidance.
        """
        check_condition(condition, self.num_classes)
        classes = self.label_embedding.weight[: self.num_classes].float()
        embedded = condition.to(classes.device) @ classes
        return self._sample(embedded, rng).to(condition.device)

    def sample_classes(self, labels: Tensor, *, rng: Sequence[torch.Generator]) -> Tensor:
        """Generates one image per integer label, identical to `sample` of one-hot rows.

        Args:
            labels: (N,) int64 in 0..K-1.
            rng: N generators.

        Raises:
            ValueError: labels out of range or not int64, or another number of generators.
            NumericsError: as for `sample`.
        """
        check_labels(labels, self.num_classes)
        embedded = self.label_embedding(labels.to(self.label_embedding.weight.device)).float()
        return self._sample(embedded, rng).to(labels.device)

    def to_files(self) -> dict[str, bytes]:
        """Returns file name -> content: exact weights as safetensors, settings as JSON."""
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
    def from_files(cls, files: Mapping[str, bytes], *, place: str = ".") -> "ClassDiffusion":
        """Loads a model saved by `to_files`, in eval mode.

        Args:
            place: where the files were read from, for the message about damaged weights.

        Raises:
            ConfigError: a file is missing, unreadable, or the weights do not fit the config or are
                not finite.
        """
        if missing := {WEIGHTS_FILE, CONFIG_FILE} - set(files):
            raise ConfigError(f"generator: missing {sorted(missing)}, got {sorted(files)}")
        config, num_classes, image_shape = _read_description(files[CONFIG_FILE])
        model = cls(config, num_classes=num_classes, image_shape=image_shape, rng=torch.Generator())
        try:
            model.load_state_dict(safetensors.torch.load(bytes(files[WEIGHTS_FILE])))
        except (SafetensorError, RuntimeError) as error:
            raise ConfigError(f"generator: {WEIGHTS_FILE} does not fit: {error}") from None
        check_finite_weights(model.state_dict(), f"generator {place}/{WEIGHTS_FILE}")
        return model.eval()

    @torch.no_grad()
    def _sample(self, embedded: Tensor, rng: Sequence[torch.Generator]) -> Tensor:
        check_rng(rng, len(embedded))
        if len(embedded) == 0:
            return torch.empty(0, *self.image_shape, device=embedded.device)
        null = self.label_embedding.weight[self.num_classes :].float()
        was_training = self.training
        # Dropout of zero still changes the rounding, and a sample must not depend on the mode.
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
    # Imported late: the import takes seconds, and planning a job does not need it.
    from diffusers.models.unets.unet_2d import UNet2DModel

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
        class_embed_type="identity",  # class_labels are embeddings already
    )
    # A zero initial prediction keeps the first large steps from diverging.
    for parameter in unet.conv_out.parameters():
        nn.init.zeros_(parameter)
    return unet


def _noise_schedule(config: DiffusionConfig) -> dict[str, Any]:
    return {
        "num_train_timesteps": _NUM_TRAIN_STEPS,
        "beta_schedule": _SCHEDULE[config.noise_schedule],
        "prediction_type": _PREDICTION[config.prediction],
    }


def _draw_corruption(rng: torch.Generator, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Drawn on the generator's device, so that an accelerator trains on the same noise as a CPU.
    options: dict[str, Any] = {"generator": rng, "device": rng.device}
    timesteps = torch.randint(_NUM_TRAIN_STEPS, (len(images),), **options)
    uniform = torch.rand(len(images), **options)
    noise = torch.randn(images.shape, **options)
    return timesteps.to(images.device), uniform.to(images.device), noise.to(images.device)


def prediction_target(prediction: str, images: Tensor, noise: Tensor, signal: Tensor) -> Tensor:
    """Returns the network's target for sqrt(signal) * images + sqrt(1 - signal) * noise.

    Args:
        prediction: "v", "noise" or "image".
        signal: remaining fraction of the image's power, strictly between 0 and 1.
    """
    if prediction == "noise":
        return noise
    if prediction == "image":
        return images
    return signal.sqrt() * noise - (1 - signal).sqrt() * images


def loss_weight(config: DiffusionConfig, signal: Tensor) -> Tensor:
    """Returns the weight of the squared error at each noise level.

    For every kind of prediction the squared error of the image has the weight
    min(signal-to-noise ratio, `snr_clip`). All weights are 1 if `snr_clip` is None.
    """
    if config.snr_clip is None:
        return torch.ones_like(signal)
    ratio = signal / (1 - signal)
    # Squared error of the prediction per unit squared error of the image.
    per_image_error = {"v": ratio + 1, "noise": ratio, "image": torch.ones_like(ratio)}
    return ratio.clamp(max=config.snr_clip) / per_image_error[config.prediction]


def _read_description(content: bytes) -> tuple[DiffusionConfig, int, tuple[int, int, int]]:
    try:
        description: dict[str, Any] = json.loads(bytes(content))
        data, num_classes = description["generator"], int(description["num_classes"])
        channels, height, width = (int(size) for size in description["image_shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"generator: {CONFIG_FILE} is not valid: {error!r}") from None
    config = validate(DiffusionConfig, data, source=CONFIG_FILE)
    return config, num_classes, (channels, height, width)

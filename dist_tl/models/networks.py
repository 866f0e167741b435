"""Target networks and source classifiers: a trunk and a linear head, from any supported library.

Not covered: saving and loading (`files.py`).
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_tl.errors import ConfigError
from dist_tl.models.adapted import AdaptedConfig, AdaptedTrunk
from dist_tl.models.hugging_face import TransformersConfig, build_transformers
from dist_tl.models.inputs import ImageShape, InputConfig
from dist_tl.models.layer_set import LayerSetConfig, LayerSetTrunk, count_blocks
from dist_tl.models.perceptron import HiddenLayer, PerceptronConfig
from dist_tl.models.resnet import ResNetConfig, ResNetTrunk
from dist_tl.models.taps import record_blocks
from dist_tl.models.timm_networks import TimmConfig, build_timm

AnyNetworkConfig = (
    ResNetConfig
    | TransformersConfig
    | TimmConfig
    | PerceptronConfig
    | LayerSetConfig
    | AdaptedConfig
)
NetworkConfig = Annotated[AnyNetworkConfig, Field(discriminator="kind")]


class Network(nn.Module):
    """logits = head(trunk(images)).

    Attributes:
        trunk: maps images (N, C, H, W) in [-1, 1] to feature vectors (N, D).
        head: linear layer, D to the number of classes.
        config: the configuration that the network was built from.
        portable_config: the same without a path or download, saved together with the weights.
        image_shape: (C, H, W) of the input images.
    """

    def __init__(
        self,
        trunk: nn.Module,
        head: nn.Linear,
        *,
        config: AnyNetworkConfig,
        portable_config: AnyNetworkConfig,
        image_shape: ImageShape,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.config = config
        self.portable_config = portable_config
        channels, height, width = image_shape
        self.image_shape: ImageShape = (channels, height, width)

    @property
    def num_features(self) -> int:
        """Number of features D."""
        return self.head.in_features

    @property
    def num_classes(self) -> int:
        """Number of classes, the width of the logits."""
        return self.head.out_features

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, num_classes) of images (N, C, H, W) in [-1, 1]."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Returns the head's input, (N, num_features), in the network's own dtype.

        Raises:
            ValueError: the images are not (N, *image_shape).
        """
        return self.trunk(self._prepare(images))

    def blocks(self, images: Tensor) -> list[Tensor]:
        """Returns the output of every block in depth order, from one forward pass.

        Returns:
            Maps (N, C, H, W), or token sequences (N, T, D) for architectures that work on tokens;
            the last item is the head's input, (N, num_features).

        Raises:
            ValueError: the images are not (N, *image_shape).
        """
        return record_blocks(self.trunk, self._prepare(images))

    def _prepare(self, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != self.image_shape:
            expected = ", ".join(str(size) for size in self.image_shape)
            raise ValueError(f"expected images (N, {expected}), got {tuple(images.shape)}")
        return images.to(self.head.weight.dtype)


def build_network(
    config: AnyNetworkConfig,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    rng: torch.Generator,
) -> Network:
    """Builds a network in training mode whose initial weights depend on `config` and `rng` only.

    Args:
        num_classes: number of classes, >= 2.
        image_shape: (C, H, W) of the input images in [-1, 1].
        rng: a CPU generator. It supplies the seed of the trunk, and the weights of the head unless
            a library supplies the head. torch's global generator is not changed.

    Raises:
        ConfigError: the configuration is invalid, or does not fit such images and classes.
    """
    if num_classes < 2:
        raise ConfigError(f"a classifier needs at least 2 classes, got {num_classes}")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ConfigError(f"expected an image shape (C, H, W), got {image_shape}")
    with _seeded_by(rng):
        trunk, head, portable = _build_parts(config, num_classes, image_shape)
    if head is None:
        num_features = _num_features(trunk, image_shape)
        head = fresh_head(num_features, num_classes, rng)
    network = Network(trunk, head, config=config, portable_config=portable, image_shape=image_shape)
    return network.train()


def _build_parts(
    config: AnyNetworkConfig, num_classes: int, image_shape: ImageShape
) -> tuple[nn.Module, nn.Linear | None, AnyNetworkConfig]:
    if isinstance(config, TransformersConfig):
        return build_transformers(config, num_classes=num_classes, image_shape=image_shape)
    if isinstance(config, TimmConfig):
        return build_timm(config, num_classes=num_classes, image_shape=image_shape)
    if isinstance(config, PerceptronConfig):
        return HiddenLayer(config, image_shape), None, config
    if isinstance(config, LayerSetConfig):
        base, _, portable = _build_parts(config.base, num_classes, image_shape)
        trunk = LayerSetTrunk(config, base, count_blocks(base, image_shape))
        return trunk, None, config.model_copy(update={"base": portable})
    if isinstance(config, AdaptedConfig):
        shape = config.inputs.adapted_shape(image_shape)
        base, head, portable = _build_parts(config.base, num_classes, shape)
        return AdaptedTrunk(config, base), head, config.model_copy(update={"base": portable})
    return ResNetTrunk(config, image_shape), None, config


@contextmanager
def _seeded_by(rng: torch.Generator) -> Iterator[None]:
    """Seeds torch's global CPU generator by a draw from `rng`, and restores it at the end.

    Libraries initialise weights from the global generator only.
    """
    seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed, which also seeds the accelerators and would not be undone.
        torch.default_generator.manual_seed(seed)
        yield


def _num_features(trunk: nn.Module, image_shape: ImageShape) -> int:
    was_training = trunk.training
    with torch.no_grad():
        features = trunk.eval()(torch.zeros(1, *image_shape))
    trunk.train(was_training)
    return features.shape[1]


def fresh_head(num_features: int, num_classes: int, rng: torch.Generator) -> nn.Linear:
    """Returns a linear layer with weights N(0, 0.01^2) from `rng` and zero bias, float32 on CPU."""
    head = nn.utils.skip_init(nn.Linear, num_features, num_classes)
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.normal_(0.0, 0.01, generator=rng)
        head.bias.zero_()
    return head


def replace_head(network: Network, num_classes: int, rng: torch.Generator) -> Network:
    """Returns a copy of `network` with a new head; the trunk is copied bit for bit.

    Transfers a pretrained trunk from one label set to another.

    Args:
        num_classes: number of classes of the new head, >= 2.
        rng: a CPU generator for the head's weights, N(0, 0.01^2); its bias is 0.

    Raises:
        ConfigError: `num_classes` is below 2.
    """
    if num_classes < 2:
        raise ConfigError(f"a classifier needs at least 2 classes, got {num_classes}")
    head = fresh_head(network.num_features, num_classes, rng).to(network.head.weight)
    transferred = Network(
        copy.deepcopy(network.trunk),
        head,
        config=network.config,
        portable_config=network.portable_config,
        image_shape=network.image_shape,
    )
    return transferred.train(network.training)


def with_layers(
    network: Network, blocks: tuple[int, ...], *, cells: int, weight_CD: Tensor, bias_C: Tensor
) -> Network:
    """Returns a network with a linear head on some blocks of `network`; the trunk is copied.

    Args:
        blocks: indices into all block outputs in depth order.
        cells: maps are averaged to at most cells x cells.
        weight_CD, bias_C: the head, for the concatenated unit vectors of the blocks over
            sqrt(number of blocks).

    Raises:
        ConfigError: a block does not exist.
        ValueError: the head does not fit those vectors.
    """
    trunk, width = _layer_set(network, blocks, cells)
    if weight_CD.shape != (len(bias_C), width):
        raise ValueError(f"expected a head ({len(bias_C)}, {width}), got {tuple(weight_CD.shape)}")
    head = nn.Linear(width, len(bias_C))
    with torch.no_grad():
        head.weight.copy_(weight_CD)
        head.bias.copy_(bias_C)
    return _on_layer_set(network, trunk, head)


def on_one_block(network: Network, block: int, num_classes: int, rng: torch.Generator) -> Network:
    """Returns a network with a new head on one pooled block of `network`; the trunk is copied.

    Raises:
        ConfigError: the block does not exist, or the network is itself derived from another.
    """
    trunk, width = _layer_set(network, (block,), cells=1)
    return _on_layer_set(network, trunk, fresh_head(width, num_classes, rng))


def _layer_set(network: Network, blocks: tuple[int, ...], cells: int) -> tuple[LayerSetTrunk, int]:
    if isinstance(network.portable_config, LayerSetConfig | AdaptedConfig):
        raise ConfigError(
            f"a network of kind {network.portable_config.kind} cannot take a head on its blocks; "
            "use the network that it is derived from"
        )
    base = copy.deepcopy(network.trunk)
    config = LayerSetConfig(base=network.portable_config, blocks=blocks, cells=cells)
    trunk = LayerSetTrunk(config, base, count_blocks(base, network.image_shape))
    return trunk, _num_features(trunk, network.image_shape)


def _on_layer_set(network: Network, trunk: LayerSetTrunk, head: nn.Linear) -> Network:
    return Network(
        trunk,
        head,
        config=trunk.config,
        portable_config=trunk.config,
        image_shape=network.image_shape,
    )


def behind_inputs(network: Network, inputs: InputConfig, image_shape: ImageShape) -> Network:
    """Returns `network` with preprocessing for images of `image_shape`; nothing is copied.

    Raises:
        ConfigError: the preprocessed images do not fit the network, or it has preprocessing of its
            own.
    """
    adapted = inputs.adapted_shape(image_shape)
    if adapted != network.image_shape:
        raise ConfigError(
            f"expected images of (channels, height, width) {network.image_shape}, got {adapted}; "
            "set its inputs.resize and inputs.grey_to_rgb, or choose another network"
        )
    if inputs == InputConfig():
        return network
    if isinstance(network.portable_config, AdaptedConfig):
        raise ConfigError("already has inputs of its own; remove these inputs")
    config = AdaptedConfig(base=network.portable_config, inputs=inputs)
    return Network(
        AdaptedTrunk(config, network.trunk),
        network.head,
        config=config,
        portable_config=config,
        image_shape=image_shape,
    )


def parameter_count(network: nn.Module) -> int:
    """Returns the number of learnable parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in network.parameters())

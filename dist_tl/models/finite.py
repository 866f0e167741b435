"""Refuses weights that hold NaN or infinity: a network with one of them computes nothing else."""

from collections.abc import Mapping

from torch import Tensor

from dist_tl.errors import ConfigError


def check_finite_weights(tensors: Mapping[str, Tensor], place: str) -> None:
    """Checks tensors that were read from files. Integers are always finite.

    Args:
        place: where they were read from, for the message.

    Raises:
        ConfigError: a tensor holds NaN or infinity; the message names the first one.
    """
    for name, tensor in tensors.items():
        # Torch cannot compare numbers of one byte.
        values = tensor.float() if tensor.element_size() == 1 else tensor
        if tensor.is_floating_point() and not bool(values.isfinite().all()):
            bad = int((~values.isfinite()).sum())
            raise ConfigError(
                f"{place}: {name}: expected finite numbers, got NaN or infinity in {bad} of "
                f"{tensor.numel()}; save the model from an earlier checkpoint, or train it again"
            )

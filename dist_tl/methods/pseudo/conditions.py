"""Conditions of the generator: one probability vector over source classes per sample.

The probabilities that a source classifier assigns to a target image become the generator's
conditions (pseudo conditional sampling). Target labels are never used, and every draw depends on
(run seed, purpose, sample number) only, so that any worker can generate any sample. Not covered:
the generator's noise, which the caller seeds per row with
`row_rngs(run_seed, f"{purpose} noise", sample_indices)`.

After Yamaguchi et al., arXiv:2204.12833.

Shape suffixes: N = target training images, K = source classes, S = pseudo samples.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError, NumericsError
from dist_tl.seeds import derive_seed

SEED_BITS = 63  # derive_seed is uniform on 0 .. 2^63 - 1


class ConditionConfig(StrictModel):
    """The condition of a pseudo sample as a function of the source classifier's probabilities."""

    kind: Literal["soft", "top_k", "hard", "marginal", "uniform"] = Field(
        default="soft",
        description="soft: the probabilities of one target image; top_k: its k largest; hard: its "
        "most likely class; marginal: a class drawn from the mean; uniform: a class drawn "
        "uniformly (the last two are controls).",
    )
    k: int = Field(
        default=5, ge=1, description="Number of classes for top_k; other kinds ignore it."
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="Divides the source classifier's logits; values below 1 sharpen.",
    )


class Conditions(NamedTuple):
    """The conditions of S pseudo samples and the target image of each."""

    condition_SK: Tensor  # float32, rows on the simplex
    row_S: Tensor  # int64 target image; -1 if the condition is not that of one image


def source_probabilities(
    classifier: nn.Module, images: Tensor, *, temperature: float = 1.0, batch_size: int = 256
) -> Tensor:
    """Returns the source classifier's probabilities of each target image.

    Computes softmax(logits / temperature) in eval mode without gradients; parameters, buffers and
    modes of the classifier do not change.

    Args:
        images: (N, channels, height, width) float32 in [-1, 1], without augmentation.

    Returns:
        (N, K) float32 on the CPU, rows summing to one.

    Raises:
        ConfigError: temperature <= 0, fewer than two source classes, or no images.
        NumericsError: a logit is not finite; the message names the image.
    """
    if temperature <= 0:
        raise ConfigError(f"expected a temperature above 0, got {temperature}")
    if len(images) == 0:
        raise ConfigError("expected at least one target image, got none")
    device = next(classifier.parameters(), images).device
    with _in_eval_mode(classifier), torch.no_grad():
        batches = [classifier(batch.to(device)).float().cpu() for batch in images.split(batch_size)]
    logits_NK = torch.cat(batches)
    if logits_NK.shape[1] < 2:
        raise ConfigError(f"expected >= 2 source classes, got logits {tuple(logits_NK.shape)}")
    require_finite(logits_NK, name="source logits of target image")
    # After the shift the largest logit is zero, so that no temperature causes an overflow.
    shifted_NK = logits_NK - logits_NK.amax(dim=1, keepdim=True)
    return (shifted_NK.double() / temperature).softmax(dim=1).float()


def draw_conditions(
    q_NK: Tensor,
    config: ConditionConfig,
    *,
    run_seed: int,
    purpose: str,
    sample_indices: Iterable[int],
) -> Conditions:
    """Returns the conditions of the given sample numbers; equal numbers give equal conditions.

    Args:
        q_NK: result of :func:`source_probabilities`, with the temperature applied.
        purpose: use of the samples, e.g. the name of a stage.

    Raises:
        ConfigError: q is not (N >= 1, K >= 2), or k exceeds K.
    """
    if q_NK.ndim != 2 or len(q_NK) == 0 or q_NK.shape[1] < 2:
        raise ConfigError(f"expected q of (N >= 1, K >= 2), got {tuple(q_NK.shape)}")
    num_rows, num_classes = q_NK.shape
    if config.kind == "uniform":
        class_S = draw_classes(num_classes, run_seed, purpose, sample_indices)
        return Conditions(one_hot(class_S, num_classes), torch.full_like(class_S, -1))
    if config.kind == "marginal":
        class_S = _draw_from(q_NK.double().mean(dim=0), run_seed, purpose, sample_indices)
        return Conditions(one_hot(class_S, num_classes), torch.full_like(class_S, -1))
    row_S = _draw_below(num_rows, run_seed, f"{purpose} row", sample_indices)
    return Conditions(_shaped(q_NK[row_S].float(), config), row_S)


def draw_classes(
    num_classes: int, run_seed: int, purpose: str, sample_indices: Iterable[int]
) -> Tensor:
    """Draws uniform source classes of the given sample numbers, int64 (S,): the labels of PP.

    Raises:
        ConfigError: fewer than two classes.
    """
    if num_classes < 2:
        raise ConfigError(f"expected >= 2 source classes, got {num_classes}")
    return _draw_below(num_classes, run_seed, f"{purpose} class", sample_indices)


def one_hot(class_S: Tensor, num_classes: int) -> Tensor:
    """Returns one-hot conditions (S, K), float32."""
    return functional.one_hot(class_S, num_classes).float()


def condition_entropy(condition_SK: Tensor) -> Tensor:
    """Returns the entropy of each condition in nats, float64 (S,), between 0 and log K."""
    return torch.special.entr(condition_SK.double()).sum(dim=1)


def require_finite(
    values: Tensor, *, name: str, sample_indices: Sequence[int] | None = None
) -> None:
    """Checks that all values are finite.

    Args:
        values: any shape, samples first.
        name: description of a row, for the message.
        sample_indices: the number of each row, if not 0, 1, ...

    Raises:
        NumericsError: a value is NaN or infinite; the message names the first such sample.
    """
    finite = values.detach().isfinite()
    if bool(finite.all()):
        return
    row = int(finite.flatten(1).all(dim=1).logical_not().nonzero()[0])
    number = row if sample_indices is None else int(sample_indices[row])
    raise NumericsError(
        f"{name} {number} contains NaN or infinity; check the weights and the range of its input"
    )


def _shaped(q_SK: Tensor, config: ConditionConfig) -> Tensor:
    num_classes = q_SK.shape[1]
    if config.kind == "hard":
        return one_hot(q_SK.argmax(dim=1), num_classes)
    if config.kind == "top_k":
        if config.k > num_classes:
            raise ConfigError(f"expected k <= {num_classes} source classes, got k = {config.k}")
        # A stable sort, unlike topk, breaks ties by the lowest index on every device.
        order_SK = q_SK.argsort(dim=1, descending=True, stable=True)
        kept_SK = q_SK.scatter(1, order_SK[:, config.k :], 0.0)
        return kept_SK / kept_SK.sum(dim=1, keepdim=True)
    return q_SK


# A derived seed is itself a uniform draw, so that no generator is needed per sample.
def _draw_below(bound: int, run_seed: int, purpose: str, sample_indices: Iterable[int]) -> Tensor:
    draws = [derive_seed(run_seed, purpose, s) * bound >> SEED_BITS for s in sample_indices]
    return torch.tensor(draws, dtype=torch.int64)


def _draw_from(p_K: Tensor, run_seed: int, purpose: str, sample_indices: Iterable[int]) -> Tensor:
    share = 2.0**-SEED_BITS
    draws = [derive_seed(run_seed, f"{purpose} class", s) * share for s in sample_indices]
    cumulative_K = p_K.cumsum(dim=0)
    uniform_S = torch.tensor(draws, dtype=torch.float64) * cumulative_K[-1]
    class_S = torch.searchsorted(cumulative_K, uniform_S, right=True)
    # Rounding can place a draw at the end, where classes may have probability 0.
    return class_S.clamp_max(int(p_K.nonzero()[-1]))


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training

"""Placeholder by the lead; the owner overwrites this file."""
from collections.abc import Sequence
from typing import Protocol
import torch
from torch import Tensor
class ConditionalGenerator(Protocol):
    num_classes: int
    image_shape: tuple[int, int, int]
    def sample(self, condition: Tensor, *, rng: Sequence[torch.Generator]) -> Tensor: ...
def check_condition(condition, num_classes):
    pass

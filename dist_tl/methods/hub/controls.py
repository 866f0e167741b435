"""Routes by chance, the control that shows whether choosing by input matters.

Shape suffixes: B = samples, M = experts.
"""

import zlib

import torch
from torch import Tensor


def chance_logits(images: Tensor, num_experts: int) -> Tensor:
    """Standard normal (B, M) that follow from each image's own bytes alone.

    So a sample's route does not depend on the batch that it comes in, nor on the process.
    """
    rows = images.detach().float().cpu().flatten(1).contiguous().numpy()
    draws = [
        torch.randn(num_experts, generator=torch.Generator().manual_seed(zlib.crc32(row.tobytes())))
        for row in rows
    ]
    return torch.stack(draws).to(images.device) if draws else images.new_zeros(0, num_experts)

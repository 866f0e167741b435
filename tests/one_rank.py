"""A process group of one rank in the test process."""

import gc
import os
from unittest import mock

import torch

from dist_tl.train.engine import join_group


def join_on_cpu(rank, world_size, **fields):
    """Joins a group and imports DeepSpeed, on the CPU even if there is a GPU, which ranks share."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        join_group(rank, world_size, **fields)
    with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu"):
        import deepspeed  # noqa: F401
    # ZeRO-3 collects garbage for every engine: half a second without the freeze.
    gc.collect()
    gc.freeze()

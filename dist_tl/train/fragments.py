"""The slice of each parameter that one rank owns, at any ZeRO stage.

ZeRO gives every rank a slice of the float32 master weights and of Adam's moments. Checkpoints,
moving averages and exports use these slices as (parameter name, offset, slice), so they do not
depend on the ZeRO stage. A slice records its offset in the parameter, so its file can be read at
another world size.

DeepSpeed's own checkpoints are not used: they are pickles tied to the world size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """One rank's slice of one parameter; `master` and the tensors of `moments` are live views.

    Attributes:
        name: dotted name of the parameter in the module.
        shape: shape of the full parameter.
        offset: start of the slice in the flattened parameter.
        master: (n,) float32 view of the optimizer's master weights.
        state: optimizer state of `flat`.
        flat: the flat tensor that contains the slice.
        flat_start: start of the slice in `flat`.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    master: Tensor
    state: dict[str, Any]
    flat: Tensor
    flat_start: int

    def moments(self) -> dict[str, Tensor]:
        """Returns (n,) views of Adam's moments; empty before the first step."""
        return {
            key: self.state[key].view(-1).narrow(0, self.flat_start, self.master.numel())
            for key in MOMENTS
            if key in self.state
        }

    def prepare_moments(self, step: int) -> None:
        """Creates zero moments as the optimizer does at its first step, and sets its `step`."""
        for key in MOMENTS:
            self.state.setdefault(key, torch.zeros_like(self.flat))
        self.state["step"] = torch.tensor(float(step))


def local_fragments(module: torch.nn.Module, optimizer: Any, stage: int) -> list[Fragment]:
    """Returns this rank's fragments of all trainable parameters, in the module's order.

    Args:
        module: the module that DeepSpeed trains.
        optimizer: the DeepSpeed engine's optimizer (the torch optimizer at stage 0).
        stage: ZeRO stage, 0 to 3.
    """
    slices = {0: _stage_0, 1: _stages_1_and_2, 2: _stages_1_and_2, 3: _stage_3}[stage]
    return [
        fragment
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
        for fragment in slices(name, parameter, optimizer)
    ]


def _stage_0(name: str, parameter: Tensor, optimizer: Any) -> Iterator[Fragment]:
    state = optimizer.state[parameter]
    flat = parameter.data
    yield Fragment(name, tuple(parameter.shape), 0, flat.view(-1), state, flat, 0)


def _stages_1_and_2(name: str, parameter: Any, optimizer: Any) -> Iterator[Fragment]:
    mapping = parameter._hp_mapping
    if mapping is None:  # other ranks own the whole parameter
        return
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    yield Fragment(
        name=name,
        shape=tuple(parameter.shape),
        offset=mapping.lp_fragment_address.start,
        master=mapping.hp_fragment.data,
        state=optimizer.optimizer.state[flat],
        flat=flat.data,
        flat_start=mapping.hp_fragment_address.start,
    )


def _stage_3(name: str, parameter: Any, optimizer: Any) -> Iterator[Fragment]:
    group, start, width = optimizer.grad_position[optimizer.get_param_id(parameter)]
    flat = optimizer.fp32_partitioned_groups_flat[group]
    offset = optimizer._get_param_partition_rank(parameter) * width
    length = min(width, parameter.ds_numel - offset)  # the last ranks hold padding
    if length > 0:
        yield Fragment(
            name=name,
            shape=tuple(parameter.ds_shape),
            offset=offset,
            master=flat.data.narrow(0, start, length),
            state=optimizer.optimizer.state[flat],
            flat=flat.data,
            flat_start=start,
        )


def spread_master_weights(optimizer: Any, stage: int) -> None:
    """Copies the master weights to the weights of the forward pass, after a restore."""
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

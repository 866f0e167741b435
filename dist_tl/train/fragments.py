"""The part of each parameter that one rank owns, whatever the ZeRO stage.

ZeRO gives every rank a slice of the float32 master weights and of Adam's moments. Seen as
(parameter name, offset, slice) those slices are what checkpoints store, what the moving average
follows and what an export adds up, so none of the three has to know the stage; and because a
slice says where it lies in its parameter, a checkpoint can be read by any number of ranks.

DeepSpeed's own checkpoints are pickles tied to the world size, which is why they are not used.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """One rank's slice of one parameter; `master` and what `moments` returns are live views.

    Attributes:
        name: the parameter's dotted name in the module.
        shape: shape of the whole parameter.
        offset: where the slice starts in the flattened parameter.
        master: (n,) float32 view of the optimizer's weights.
        state: the optimizer's state of the flat tensor that the slice lies in.
        flat: that flat tensor.
        flat_start: where the slice starts in it.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    master: Tensor
    state: dict[str, Any]
    flat: Tensor
    flat_start: int

    def moments(self) -> dict[str, Tensor]:
        """(n,) views of Adam's moments; empty before the first step."""
        return {
            key: self.state[key].view(-1).narrow(0, self.flat_start, self.master.numel())
            for key in MOMENTS
            if key in self.state
        }

    def prepare_moments(self, step: int) -> None:
        """Create the moments (zeros) as the optimizer would at its first step, and set `step`."""
        for key in MOMENTS:
            self.state.setdefault(key, torch.zeros_like(self.flat))
        self.state["step"] = torch.tensor(float(step))


def local_fragments(module: torch.nn.Module, optimizer: Any, stage: int) -> list[Fragment]:
    """This rank's fragments of all trainable parameters, in order of the module's parameters.

    Args:
        module: the module that DeepSpeed trains.
        optimizer: the engine's optimizer (the plain torch optimizer at stage 0).
        stage: ZeRO stage, 0 to 3.
    """
    slices = {0: _whole, 1: _of_stage_1_and_2, 2: _of_stage_1_and_2, 3: _of_stage_3}[stage]
    return [
        fragment
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
        for fragment in slices(name, parameter, optimizer)
    ]


def _whole(name: str, parameter: Tensor, optimizer: Any) -> Iterator[Fragment]:
    state = optimizer.state[parameter]
    flat = parameter.data
    yield Fragment(name, tuple(parameter.shape), 0, flat.view(-1), state, flat, 0)


def _of_stage_1_and_2(name: str, parameter: Any, optimizer: Any) -> Iterator[Fragment]:
    mapping = parameter._hp_mapping
    if mapping is None:  # the whole parameter lies on other ranks
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


def _of_stage_3(name: str, parameter: Any, optimizer: Any) -> Iterator[Fragment]:
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
    """Make the weights that the forward pass uses follow the master weights again."""
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

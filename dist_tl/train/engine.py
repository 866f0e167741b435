"""One module, its optimizer and its ranks: the only file that knows DeepSpeed.

The engine trains with ZeRO stage 0 to 3 in float32 or bfloat16, on CPU (gloo) or GPU (nccl), and
gives out its state as fragments. Not covered: batches, losses, when to save.
"""

import math
import os
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn

from dist_tl.config import StrictModel
from dist_tl.errors import CheckpointMismatchError, ConfigError
from dist_tl.train.fragments import Fragment, local_fragments, spread_master_weights


class EngineConfig(StrictModel):
    """How a model is spread over the trainers' workers."""

    zero_stage: int = Field(
        default=1,
        ge=0,
        le=3,
        description="What is sharded: 1 moments, 2 also gradients, 3 also weights.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Of matrix products and convolutions; weights stay float32."
    )
    accumulation: int = Field(default=1, ge=1, description="Micro-batches per optimizer step.")
    clip_norm: float = Field(
        default=1.0, ge=0, description="Gradient norm is cut to this; 0 is off."
    )
    offload: Literal["none", "cpu"] = Field(
        default="none", description="Where moments live (stage >= 1)."
    )

    @model_validator(mode="after")
    def _stage_can_do_it(self) -> "EngineConfig":
        if self.zero_stage == 0 and self.offload == "cpu":
            raise ValueError("offload cpu needs zero_stage >= 1, got 0")
        return self


class OptimizerConfig(StrictModel):
    """AdamW with a warm-up and a cosine or constant learning rate."""

    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0, description="Not applied to biases and norms.")
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    warmup: float = Field(
        default=0.1, ge=0, le=1, description="Share of the steps with a rising rate."
    )
    schedule: Literal["cosine", "constant"] = "cosine"


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The rate of optimizer step `step` (from 0) out of `num_steps`: a pure function."""
    warmup = int(config.warmup * num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - warmup) / max(1, num_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class Engine:
    """A module under training.

    Args:
        module: trained in place; every rank passes the same weights.
        batch_per_rank: rows that this rank sees per optimizer step, all micro-batches together.
        num_steps: length of the learning-rate schedule.
        ema_decay: keep a moving average of the weights, sharded like the weights.
    """

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        *,
        batch_per_rank: int,
        num_steps: int,
        ema_decay: float | None = None,
    ) -> None:
        self.config = config
        self._rates = optimizer
        self._num_steps = num_steps
        self._deepspeed = _initialise(module, config, optimizer, batch_per_rank)
        self.module: nn.Module = self._deepspeed.module
        self.device = torch.device(self._deepspeed.device)
        self.num_updates = 0
        self._fragments = local_fragments(self.module, self._deepspeed.optimizer, config.zero_stage)
        self._ema_decay = ema_decay
        self._ema = [f.master.clone() for f in self._fragments] if ema_decay else []

    def autocast(self) -> AbstractContextManager[None]:
        """Where the forward pass runs: bfloat16 arithmetic if the configuration says so.

        DeepSpeed's own bf16 mode casts the weights but not batch-norm's buffers, which CPU
        kernels refuse, and at stage 0 takes an Adam step on zero gradients.
        """
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's mean loss."""
        if self.config.zero_stage > 0:
            # DeepSpeed counts micro-batches in its own forward pass, which would switch our
            # autocast off. Uncounted, stage 3 forgets all of them but the last.
            optimizer = self._deepspeed.optimizer
            optimizer.clear_backward_seen_flag()
            optimizer.set_gradient_accumulation_boundary(
                self._deepspeed.is_gradient_accumulation_boundary()
            )
        self._deepspeed.backward(loss)

    def step(self) -> None:
        """End one micro-batch; after the last one, update the weights."""
        boundary = self._deepspeed.is_gradient_accumulation_boundary()
        if boundary:
            rate = learning_rate(self._rates, self.num_updates, self._num_steps)
            for group in self._deepspeed.optimizer.param_groups:
                group["lr"] = rate
        self._deepspeed.step()
        if boundary:
            self.num_updates += 1
            self._follow()

    def _follow(self) -> None:
        if self._ema_decay is None:
            return
        # Early on the average would mostly be the initial weights; this ramp forgets them.
        decay = min(self._ema_decay, (1 + self.num_updates) / (10 + self.num_updates))
        masters = [fragment.master for fragment in self._fragments]
        torch._foreach_lerp_(self._ema, masters, 1 - decay)

    @property
    def fragments(self) -> list[Fragment]:
        """This rank's slices of the master weights and moments."""
        return self._fragments

    def local_state(self) -> dict[str, Tensor]:
        """Everything this rank must store to go on bit for bit; CPU tensors, flat names.

        Keys: `master/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`, `ema/NAME`, `buffer/NAME`,
        `rng/cpu` and on a GPU `rng/gpu` (uint8).
        """
        state: dict[str, Tensor] = {"rng/cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["rng/gpu"] = torch.cuda.get_rng_state(self.device)
        for index, fragment in enumerate(self._fragments):
            state[f"master/{fragment.name}"] = fragment.master
            for key, value in fragment.moments().items():
                state[f"{key}/{fragment.name}"] = value
            if self._ema:
                state[f"ema/{fragment.name}"] = self._ema[index]
        for name, buffer in self.module.named_buffers():
            state[f"buffer/{name}"] = buffer
        return {key: value.detach().cpu().clone() for key, value in state.items()}

    def load_local_state(self, state: dict[str, Tensor], *, num_updates: int) -> None:
        """Take back what :meth:`local_state` gave, on the same rank of as many ranks.

        Raises:
            CheckpointMismatchError: a tensor is missing or has another size.
        """
        for index, fragment in enumerate(self._fragments):
            fragment.prepare_moments(num_updates)
            targets = {"master": fragment.master, **fragment.moments()}
            if self._ema:
                targets["ema"] = self._ema[index]
            for key, target in targets.items():
                _copy(target, state, f"{key}/{fragment.name}")
        for name, buffer in self.module.named_buffers():
            _copy(buffer, state, f"buffer/{name}")
        spread_master_weights(self._deepspeed.optimizer, self.config.zero_stage)
        torch.set_rng_state(state["rng/cpu"])
        if self.device.type == "cuda" and "rng/gpu" in state:
            torch.cuda.set_rng_state(state["rng/gpu"], self.device)
        self.num_updates = num_updates

    def full_weights(self, *, averaged: bool = False) -> dict[str, Tensor]:
        """The whole model on CPU, the same on every rank. A collective.

        Args:
            averaged: the moving average of the weights instead of the last.

        Returns:
            Name to tensor: float32 weights; buffers, the floating ones as the mean over ranks, for
            each rank's batch norm has seen its own share of every batch only.
        """
        sources = self._ema if averaged and self._ema else [f.master for f in self._fragments]
        mine = {f.name: (f, values) for f, values in zip(self._fragments, sources, strict=True)}
        weights = {}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                weights[name] = self._assembled(parameter, mine.get(name)).cpu()
            else:
                weights[name] = _frozen(parameter).float().cpu()
        for name, buffer in self.module.named_buffers():
            weights[name] = _mean_over_ranks(buffer).cpu()
        return weights

    def _assembled(self, parameter: Tensor, own: tuple[Fragment, Tensor] | None) -> Tensor:
        shape = getattr(parameter, "ds_shape", parameter.shape)
        whole = torch.zeros(shape, dtype=torch.float32, device=self.device)
        if own is not None:
            fragment, values = own
            whole.view(-1).narrow(0, fragment.offset, values.numel()).copy_(values)
        # Each element has one owner, so the sum over ranks is a gather without padding.
        if self.config.zero_stage > 0:
            dist.all_reduce(whole)
        return whole

    def is_finite(self) -> bool:
        """Whether all master weights are finite numbers, on all ranks. A collective."""
        parts = [fragment.master.isfinite().all() for fragment in self._fragments]
        finite = torch.stack(parts).all() if parts else torch.tensor(True)
        verdict = finite.to(self.device, torch.int32)
        dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
        return bool(verdict)

    def close(self) -> None:
        """Free DeepSpeed's hooks and buffers, so that another engine can be built."""
        self._deepspeed.destroy()


def _frozen(parameter: Tensor) -> Tensor:
    """The values of a parameter that does not learn; at stage 3 it lies in pieces too."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _mean_over_ranks(buffer: Tensor) -> Tensor:
    if not buffer.is_floating_point():
        return buffer.clone()
    # In float64, or three equal numbers might not have their own value as their mean.
    total = buffer.to(torch.float64, copy=True)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).to(buffer.dtype)


def _copy(target: Tensor, state: dict[str, Tensor], key: str) -> None:
    found = state.get(key)
    if found is None or found.numel() != target.numel():
        size = "nothing" if found is None else f"{found.numel()} numbers"
        raise CheckpointMismatchError(
            f"expected {target.numel()} numbers for {key}, the checkpoint holds {size}; "
            "it was made by another network or another number of workers"
        )
    target.copy_(found.view(target.shape))


def _initialise(
    module: nn.Module, config: EngineConfig, optimizer: OptimizerConfig, batch_per_rank: int
) -> Any:
    # Inductor is imported (seconds a process) unless dynamo is off before DeepSpeed's import.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    import deepspeed
    import deepspeed.ops

    # Its shared-memory op needs a compiler at start-up and serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=_adamw(module, optimizer),
        config=_deepspeed_config(config, batch_per_rank),
        dist_init_required=False,
    )
    return engine


def _adamw(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
    )


def _deepspeed_config(config: EngineConfig, batch_per_rank: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": max(1, batch_per_rank // config.accumulation),
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": zero,
        # Torch's AdamW is used with offload too: DeepSpeed's own compiles C++ at start-up.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def join_group(
    rank: int, world_size: int, *, rendezvous: str | None = None, timeout_s: float = 120.0
) -> None:
    """Join a process group, where this process has not joined one yet.

    Args:
        rendezvous: a torch.distributed init method, e.g. "file:///tmp/meet"; not needed alone.

    Raises:
        ConfigError: several ranks, and no place where they could meet.
    """
    if dist.is_initialized():
        return
    if rendezvous is None and world_size > 1:
        raise ConfigError(f"{world_size} ranks need a rendezvous; give all of them the same one")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=rendezvous,
        store=dist.HashStore() if rendezvous is None else None,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )

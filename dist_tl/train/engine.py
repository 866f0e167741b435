"""The training engine: a module and its optimizer under DeepSpeed ZeRO.

The engine trains with ZeRO stage 0 to 3 in float32 or bfloat16, on CPU (gloo) or GPU (nccl), and
exposes its state as fragments. This is the only module that imports DeepSpeed.
"""

import math
import os
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
    """How a model is sharded over the trainers' workers."""

    zero_stage: int = Field(
        default=1,
        ge=0,
        le=3,
        description="ZeRO stage: 1 shards moments, 2 also gradients, 3 also weights.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Precision of matrix products and convolutions; weights stay float32.",
    )
    accumulation: int = Field(default=1, ge=1, description="Micro-batches per optimizer step.")
    clip_norm: float = Field(
        default=1.0, ge=0, description="Maximum gradient norm; 0 disables clipping."
    )
    offload: Literal["none", "cpu"] = Field(
        default="none", description="Offload Adam's moments (zero_stage >= 1)."
    )

    @model_validator(mode="after")
    def _check_offload(self) -> "EngineConfig":
        if self.zero_stage == 0 and self.offload == "cpu":
            raise ValueError("offload cpu needs zero_stage >= 1, got 0")
        return self


class OptimizerConfig(StrictModel):
    """AdamW with a linear warm-up and a cosine or constant learning rate."""

    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(
        default=0.01, ge=0, description="Weight decay; not applied to biases and norms."
    )
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    warmup: float = Field(
        default=0.1, ge=0, le=1, description="Fraction of the steps with a linear warm-up."
    )
    schedule: Literal["cosine", "constant"] = "cosine"


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Returns the learning rate of optimizer step `step` (from 0) of `num_steps`."""
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
        module: the module to train in place; every rank passes the same weights.
        batch_per_rank: rows of this rank per optimizer step, summed over micro-batches.
        num_steps: length of the learning-rate schedule.
        ema_decay: decay of a moving average of the weights, which is sharded like the weights.
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

    def autocast(self) -> torch.autocast:
        """Returns the context of the forward pass: autocast to bfloat16 if configured.

        DeepSpeed's own bf16 mode casts the weights but not the buffers of batch norm, which CPU
        kernels reject, and at stage 0 takes an Adam step on zero gradients.
        """
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of the mean loss of one micro-batch."""
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
        """Finishes one micro-batch; after the last one, updates the weights."""
        boundary = self._deepspeed.is_gradient_accumulation_boundary()
        if boundary:
            rate = learning_rate(self._rates, self.num_updates, self._num_steps)
            for group in self._deepspeed.optimizer.param_groups:
                group["lr"] = rate
        self._deepspeed.step()
        if boundary:
            self.num_updates += 1
            self._update_average()

    def _update_average(self) -> None:
        if self._ema_decay is None:
            return
        # A ramp, or the early average would consist mostly of the initial weights.
        decay = min(self._ema_decay, (1 + self.num_updates) / (10 + self.num_updates))
        masters = [fragment.master for fragment in self._fragments]
        # Missing from the stub of torch, like all _foreach functions.
        torch._foreach_lerp_(self._ema, masters, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @property
    def fragments(self) -> list[Fragment]:
        """This rank's slices of the master weights and moments."""
        return self._fragments

    def local_state(self) -> dict[str, Tensor]:
        """Returns the state that this rank needs to resume bit for bit, as CPU tensors.

        Keys: `master/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`, `ema/NAME`, `buffer/NAME`,
        `rng/cpu`, and on a GPU `rng/gpu` (uint8).
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
        """Loads the state of :meth:`local_state`, on the same rank of the same world size.

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
        """Gathers the complete model on the CPU of every rank. A collective.

        Args:
            averaged: return the moving average of the weights instead of the last weights.

        Returns:
            Name to tensor: float32 weights, and buffers. Floating-point buffers are averaged over
            the ranks, since batch norm sees only the rank's share of every batch.
        """
        sources = self._ema if averaged and self._ema else [f.master for f in self._fragments]
        local = {f.name: (f, values) for f, values in zip(self._fragments, sources, strict=True)}
        weights = {}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                weights[name] = self._assemble(parameter, local.get(name)).cpu()
            else:
                weights[name] = _frozen(parameter).float().cpu()
        for name, buffer in self.module.named_buffers():
            weights[name] = _mean_over_ranks(buffer).cpu()
        return weights

    def _assemble(self, parameter: Tensor, local: tuple[Fragment, Tensor] | None) -> Tensor:
        shape = getattr(parameter, "ds_shape", parameter.shape)
        full = torch.zeros(shape, dtype=torch.float32, device=self.device)
        if local is not None:
            fragment, values = local
            full.view(-1).narrow(0, fragment.offset, values.numel()).copy_(values)
        # Every element has one owner, so the sum over ranks is an all-gather without padding.
        if self.config.zero_stage > 0:
            dist.all_reduce(full)
        return full

    def is_finite(self) -> bool:
        """Whether all master weights of all ranks are finite. A collective."""
        parts = [fragment.master.isfinite().all() for fragment in self._fragments]
        finite = torch.stack(parts).all() if parts else torch.tensor(True)
        is_finite = finite.to(self.device, torch.int32)
        dist.all_reduce(is_finite, op=dist.ReduceOp.MIN)
        return bool(is_finite)

    def close(self) -> None:
        """Frees DeepSpeed's hooks and buffers, so that another engine can be built."""
        self._deepspeed.destroy()


def _frozen(parameter: Tensor) -> Tensor:
    """Returns the values of a frozen parameter, which stage 3 partitions too."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _mean_over_ranks(buffer: Tensor) -> Tensor:
    if not buffer.is_floating_point():
        return buffer.clone()
    # In float64, so that the mean of equal numbers is exactly that number.
    total = buffer.to(torch.float64, copy=True)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).to(buffer.dtype)


def _copy(target: Tensor, state: dict[str, Tensor], key: str) -> None:
    source = state.get(key)
    if source is None or source.numel() != target.numel():
        size = "nothing" if source is None else f"{source.numel()} numbers"
        raise CheckpointMismatchError(
            f"expected {target.numel()} numbers for {key}, the checkpoint holds {size}; "
            "another network or another number of workers made it"
        )
    target.copy_(source.view(target.shape))


def _initialise(
    module: nn.Module, config: EngineConfig, optimizer: OptimizerConfig, batch_per_rank: int
) -> Any:
    # Unless dynamo is disabled before, DeepSpeed imports inductor, which takes seconds.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    import deepspeed
    import deepspeed.ops

    # The shared-memory op needs a compiler at start-up and is used only in inference.
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
        # torch's AdamW also with offload: DeepSpeed's CPU Adam compiles C++ at start-up.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def join_group(
    rank: int, world_size: int, *, rendezvous: str | None = None, timeout_s: float = 120.0
) -> None:
    """Joins a process group, unless this process has already joined one.

    Args:
        rendezvous: a torch.distributed init method, e.g. "file:///tmp/meet"; optional for one rank.

    Raises:
        ConfigError: `rendezvous` is missing for more than one rank.
    """
    if dist.is_initialized():
        return
    if rendezvous is None and world_size > 1:
        raise ConfigError(f"{world_size} ranks need a rendezvous; pass the same one to all of them")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=rendezvous,
        # Documented, but missing from the stub of torch.distributed.
        store=dist.HashStore() if rendezvous is None else None,  # pyright: ignore[reportPrivateImportUsage]
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )

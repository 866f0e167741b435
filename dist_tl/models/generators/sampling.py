"""The sampling loop that all diffusion generators share: noise a row, guidance, a fixed solver.

DPM-Solver++ (second order, multistep) predicts images rather than noise, so clipping its
predictions stays consistent under guidance, and ten steps are enough for small images. It is
deterministic: after the initial noise nothing is drawn.

Source: Lu et al., "DPM-Solver++", arXiv:2211.01095; Ho and Salimans, "Classifier-Free Diffusion
Guidance", arXiv:2207.12598.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_tl.models.generators.protocol import check_finite

if TYPE_CHECKING:
    from diffusers import DPMSolverMultistepScheduler

# (noisy images, timesteps (N,), label rows (N, R)) -> what the network predicts, same shape.
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_solver(noise_schedule: Mapping[str, Any], *, clip: bool) -> "DPMSolverMultistepScheduler":
    """A fresh solver for a diffusers noise schedule.

    Args:
        noise_schedule: num_train_timesteps, beta_schedule, prediction_type and the like.
        clip: keep every prediction of the image in [-1, 1]; right for pixels, wrong for latents.
    """
    # Imported late: the library takes seconds to come up, and a plan needs none of it.
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        **noise_schedule,
        # With a maximum of 1, "dynamic thresholding" is plain clipping.
        thresholding=clip,
        sample_max_value=1.0,
        # The cosine schedule ends in almost pure noise, where the solver divides by nearly zero.
        lambda_min_clipped=-5.1,
    )


def draw_noise(
    rng: Sequence[torch.Generator], shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Standard normal noise (N, *shape), float32; row i is drawn from rng[i]."""
    rows = [torch.randn(shape, generator=row, device=row.device).to(device) for row in rng]
    return torch.stack(rows)


def guide(denoiser: Denoiser, guidance_scale: float, null_labels: Tensor) -> Denoiser:
    """`denoiser` with classifier-free guidance: null + scale * (conditional - null).

    At scale 1 this is the conditional prediction, and the null branch is not computed.

    Args:
        null_labels: (1, R), the label row that stands for "no class".
    """
    if guidance_scale == 1.0:
        return denoiser

    def guided(noisy: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        both_labels = torch.cat([labels, null_labels.expand(len(labels), *labels.shape[1:])])
        both = denoiser(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), both_labels)
        conditional, null = both.chunk(2)
        return null + guidance_scale * (conditional - null)

    return guided


def solve(
    denoiser: Denoiser,
    labels: Tensor,
    noise: Tensor,
    *,
    solver: "DPMSolverMultistepScheduler",
    num_steps: int,
) -> Tensor:
    """Carry `noise` to images in `num_steps` evaluations of `denoiser`.

    Args:
        labels: handed to every evaluation as they are.
        noise: (N, C, H, W) float32.
        solver: fresh, because it remembers its last predictions.

    Raises:
        NumericsError: a prediction was not finite; the message names the row.
    """
    solver.set_timesteps(num_steps, device=noise.device)
    images = noise
    # Kept as a flag until the end: clipping would hide an infinite prediction from a later look,
    # and asking at every step would make an accelerator wait.
    finite = torch.ones(len(noise), dtype=torch.bool, device=noise.device)
    for timestep in solver.timesteps:
        prediction = denoiser(images, timestep.expand(len(images)), labels).float()
        finite &= prediction.isfinite().flatten(1).all(dim=1)
        images = solver.step(prediction, timestep, images).prev_sample
    check_finite(finite & images.isfinite().flatten(1).all(dim=1))
    return images

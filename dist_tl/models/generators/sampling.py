"""The sampling loop of all diffusion generators: noise per row, guidance, a fixed solver.

DPM-Solver++ (second order, multistep) predicts images rather than noise, so clipping its
predictions stays consistent under guidance, and ten steps are enough for small images. It is
deterministic given the initial noise.

Source: Lu et al., "DPM-Solver++", arXiv:2211.01095; Ho and Salimans, "Classifier-Free Diffusion
Guidance", arXiv:2207.12598.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_tl.models.generators.protocol import check_finite

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

# (noisy images, timesteps (N,), label rows (N, R)) -> prediction of the network, same shape.
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_solver(noise_schedule: Mapping[str, Any], *, clip: bool) -> "DPMSolverMultistepScheduler":
    """Returns a new solver for a diffusers noise schedule.

    Args:
        noise_schedule: options of the scheduler: num_train_timesteps, beta_schedule,
            prediction_type and so on.
        clip: clip every predicted image to [-1, 1]; for pixels, not for latents.
    """
    # Imported late: the import takes seconds, and planning a job does not need it.
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        **noise_schedule,
        # With a maximum of 1, "dynamic thresholding" is plain clipping.
        thresholding=clip,
        sample_max_value=1.0,
        # The cosine schedule ends in almost pure noise; there the solver divides by almost zero.
        lambda_min_clipped=-5.1,
    )


def draw_noise(
    rng: Sequence[torch.Generator], shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Draws standard normal noise (N, *shape), float32, row i from rng[i]."""
    rows = [torch.randn(shape, generator=row, device=row.device).to(device) for row in rng]
    return torch.stack(rows)


def guide(denoiser: Denoiser, guidance_scale: float, null_labels: Tensor) -> Denoiser:
    """Adds classifier-free guidance to `denoiser`: null + scale * (conditional - null).

    Scale 1 is the conditional prediction alone; the null branch is then not computed.

    Args:
        null_labels: (1, R), the label row of "no class".
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
    """Denoises `noise` to images in `num_steps` evaluations of `denoiser`.

    Args:
        labels: passed to every evaluation unchanged.
        noise: (N, C, H, W) float32.
        solver: a new solver, because a solver stores its last predictions.

    Raises:
        NumericsError: a prediction is not finite; the message names the row.
    """
    solver.set_timesteps(num_steps, device=noise.device)
    images = noise
    # Accumulated and checked at the end: clipping hides an infinite prediction from a later check,
    # and a check in every step would synchronise the accelerator.
    finite = torch.ones(len(noise), dtype=torch.bool, device=noise.device)
    for timestep in solver.timesteps:
        prediction = denoiser(images, timestep.expand(len(images)), labels).float()
        finite &= prediction.isfinite().flatten(1).all(dim=1)
        images = solver.step(prediction, timestep, images, return_dict=False)[0]
    check_finite(finite & images.isfinite().flatten(1).all(dim=1))
    return images

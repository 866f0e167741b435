"""Guidance and the solver, tested with denoisers whose exact result is known."""

import pytest
import torch

from dist_tl.errors import NumericsError
from dist_tl.models.generators.sampling import draw_noise, guide, make_solver, solve
from dist_tl.seeds import row_rngs

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}


def knows_images(noisy, timesteps, labels):
    return labels[:, :, None, None].expand_as(noisy)


def knows_noise(noisy, timesteps, labels):
    """Predicts the exact noise of an image whose pixels all equal `labels`."""
    signal = make_solver(SCHEDULE, clip=False).alphas_cumprod[timesteps][:, None, None, None]
    return (noisy - signal.sqrt() * labels[:, :, None, None]) / (1 - signal).sqrt()


@pytest.mark.parametrize(
    ("prediction", "denoiser"), [("sample", knows_images), ("epsilon", knows_noise)]
)
@pytest.mark.parametrize("num_steps", [1, 2, 10, 25])
def test_the_solver_is_exact_for_a_denoiser_that_knows_the_image(prediction, denoiser, num_steps):
    labels = torch.tensor([[-0.5], [0.25]])
    solver = make_solver(SCHEDULE | {"prediction_type": prediction}, clip=False)
    noise = draw_noise(row_rngs(0, "test", range(2)), (1, 4, 4), torch.device("cpu"))
    images = solve(denoiser, labels, noise, solver=solver, num_steps=num_steps)
    torch.testing.assert_close(
        images, labels[:, :, None, None].expand_as(images), atol=1e-3, rtol=0
    )


def test_clipping_keeps_predicted_images_between_black_and_white():
    noise = draw_noise(row_rngs(0, "test", range(1)), (1, 4, 4), torch.device("cpu"))
    for clip, brightest in ((True, 1.0), (False, 3.0)):
        solver = make_solver(SCHEDULE | {"prediction_type": "sample"}, clip=clip)
        images = solve(knows_images, torch.tensor([[3.0]]), noise, solver=solver, num_steps=3)
        assert images.max().item() == pytest.approx(brightest, abs=1e-4)


def test_guidance_extrapolates_from_no_class_to_the_class():
    labels, null = torch.tensor([[0.3], [0.1]]), torch.tensor([[0.1]])
    guided = guide(knows_images, 3.0, null)(torch.zeros(2, 1, 2, 2), torch.zeros(2).long(), labels)
    torch.testing.assert_close(guided[:, 0, 0, 0], torch.tensor([0.7, 0.1]))


def test_guidance_of_one_never_evaluates_no_class():
    assert guide(knows_images, 1.0, torch.tensor([[0.1]])) is knows_images


def test_an_infinite_prediction_is_not_hidden_by_clipping():
    def overflows(noisy, timesteps, labels):
        prediction = torch.zeros_like(noisy)
        prediction[1, 0, 3, 3] = float("inf")
        return prediction

    solver = make_solver(SCHEDULE | {"prediction_type": "sample"}, clip=True)
    noise = draw_noise(row_rngs(0, "test", range(2)), (1, 16, 16), torch.device("cpu"))
    with pytest.raises(NumericsError, match="row 1 of 2"):
        solve(overflows, torch.ones(2, 1), noise, solver=solver, num_steps=2)


def test_each_row_of_noise_depends_on_its_own_generator_only():
    cpu = torch.device("cpu")
    together = draw_noise(row_rngs(7, "test", [3, 5, 9]), (2, 4, 4), cpu)
    alone = draw_noise(row_rngs(7, "test", [5]), (2, 4, 4), cpu)
    assert torch.equal(together[1], alone[0])

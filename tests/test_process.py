"""Interpolants against diffusers, finite differences, and their own inverses."""

import pytest
import torch
from torch import Tensor

from lightning_tilt.process import PREDICTION_TYPES, Cosine, Prediction, Process, RectifiedFlow, VariancePreserving

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PROCESSES = {
    "sd15": VariancePreserving.from_betas(),
    "zero-snr": VariancePreserving.from_betas(zero_terminal_snr=True),
    "squaredcos": VariancePreserving.from_betas("squaredcos_cap_v2"),
    "flow": RectifiedFlow(),
    "sd3": RectifiedFlow(shift=3.0),
    "cosine": Cosine(),
    "wide cosine": Cosine(noise_scale=3.0),
}
processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def inside(n: int = 9) -> Tensor:
    return 0.02 + 0.9 * torch.rand(n, dtype=torch.float64)


@processes
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_interpret_inverts_express(process: Process, kind: str) -> None:
    start = process.grid(10)[:-1]
    t = torch.cat([start[1:] if kind == "epsilon" and process.is_memoryless_start else start, inside()])
    truth = Prediction(randn(len(t), 3, 2), randn(len(t), 3, 2))
    x = process.add_noise(truth.x1_hat, truth.eps_hat, t)
    back = process.interpret(process.express(truth, kind, x, t), kind, x, t)
    torch.testing.assert_close(back.x1_hat, truth.x1_hat, atol=1e-9, rtol=0)
    torch.testing.assert_close(back.eps_hat, truth.eps_hat, atol=1e-9, rtol=0)


@processes
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_one_time_for_all_is_that_time_for_each(process: Process, kind: str) -> None:
    t = process.grid(4)[1]
    x, output = randn(5, 2), randn(5, 2)
    one, each = process.interpret(output, kind, x, t), process.interpret(output, kind, x, t.expand(5))
    assert torch.equal(one.x1_hat, each.x1_hat) and torch.equal(one.eps_hat, each.eps_hat)


@pytest.mark.parametrize("name", ["zero-snr", "flow", "sd3", "cosine"])
@pytest.mark.parametrize("kind", ["v_prediction", "sample", "velocity"])
def test_pure_noise_is_finite(name: str, kind: str) -> None:
    process, x, output = PROCESSES[name], randn(4, 2), randn(4, 2)
    assert process.is_memoryless_start
    prediction = process.interpret(output, kind, x, torch.zeros(4))
    assert prediction.x1_hat.isfinite().all()
    torch.testing.assert_close(prediction.eps_hat, x, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["zero-snr", "flow", "sd3", "cosine"])
def test_epsilon_is_refused_at_pure_noise(name: str) -> None:
    with pytest.raises(ValueError, match=r"pure noise.*use a model that predicts"):
        PROCESSES[name].interpret(randn(2, 2), "epsilon", randn(2, 2), torch.tensor([0.5, 0.0], dtype=torch.float64))


def test_sd15_is_not_quite_noise_at_its_start() -> None:
    process = PROCESSES["sd15"]
    assert not process.is_memoryless_start
    assert float(process.alpha(torch.zeros(()))) == pytest.approx(0.0683, abs=1e-4)
    assert process.interpret(randn(2, 2), "epsilon", randn(2, 2), torch.zeros(2)).x1_hat.isfinite().all()


@processes
def test_ends(process: Process) -> None:
    one = torch.ones((), dtype=torch.float64)
    assert process.alpha(one) == 1 and process.beta(one) == 0
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    assert (process.alpha(t).diff() > 0).all() and (process.beta(t).diff() < 0).all()


@processes
def test_derivatives_are_those_of_the_schedule(process: Process) -> None:
    t = (torch.randint(1, 990, (20,)) + 0.5).double() / 1000  # between the nodes of a discrete schedule
    h = 1e-6
    for f, d in ((process.alpha, process.d_alpha), (process.beta, process.d_beta)):
        torch.testing.assert_close(d(t), (f(t + h) - f(t - h)) / (2 * h), rtol=1e-6, atol=1e-8)


def test_at_a_node_the_derivative_is_the_one_towards_the_data() -> None:
    process = PROCESSES["sd15"]
    t = process.grid(1000)[:-1]
    ahead = (process.alpha(t + 1e-7) - process.alpha(t)) / 1e-7
    torch.testing.assert_close(process.d_alpha(t), ahead, rtol=1e-5, atol=1e-6)


@processes
def test_velocity_is_kappa_x_plus_eta_score(process: Process) -> None:
    t, prediction = inside(), Prediction(randn(9, 2), randn(9, 2))
    x = process.add_noise(prediction.x1_hat, prediction.eps_hat, t)
    kappa, eta = process.kappa(t)[:, None], process.eta(t)[:, None]
    v = process.velocity(prediction, t)
    torch.testing.assert_close(v, kappa * x + eta * process.score(prediction, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(process.sigma(t) ** 2, 2 * eta[:, 0])
    assert torch.equal(v, process.express(prediction, "velocity", x, t))


@processes
def test_eta_agrees_with_its_definition(process: Process) -> None:
    t = inside()
    torch.testing.assert_close(process.eta(t), Process.eta(process, t))


@processes
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_grid_runs_from_noise_to_data(process: Process, steps: int) -> None:
    grid = process.grid(steps)
    assert grid.shape == (steps + 1,) and grid.dtype == torch.float64
    assert grid[0] == 0 and grid[-1] == 1 and (grid.diff() > 0).all()
    with pytest.raises(ValueError, match="not 0"):
        process.grid(0)


def test_flow_grid_is_the_shift_formula() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    for shift, steps in ((1.0, 10), (3.0, 28)):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
        process = RectifiedFlow(shift)
        torch.testing.assert_close(1 - process.grid(steps), scheduler.sigmas.double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(process.timestep(process.grid(steps)[:-1]).float(), scheduler.timesteps)
    with pytest.raises(ValueError, match="shift must be positive"):
        RectifiedFlow(0.0)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [7, 16, 30, 50])
def test_nodes_are_diffusers(spacing: str, steps: int) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**SD15, timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(steps)
    process = VariancePreserving.from_scheduler(scheduler.config, spacing=spacing)
    assert torch.equal(process.timestep(process.grid(steps)[:-1]), scheduler.timesteps)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_alphas_are_diffusers(schedule: str, zero_snr: bool) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=zero_snr, timestep_spacing="leading")
    process = VariancePreserving.from_scheduler(scheduler.config)
    assert process.grid(10)[0] == 0, "a tilted chain starts at the noisiest node, whatever the config's spacing"
    alpha = process.alpha(process.grid(1000)[:-1])
    torch.testing.assert_close(alpha**2, scheduler.alphas_cumprod.flip(0).double(), rtol=0, atol=1e-5)
    assert process.is_memoryless_start == zero_snr


def test_trained_betas_and_single_schedulers_tables() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(trained_betas=[0.1, 0.2, 0.3, 0.4], num_train_timesteps=4)
    process = VariancePreserving.from_scheduler(scheduler.config)
    expected = scheduler.alphas_cumprod.flip(0).double()
    torch.testing.assert_close(process.alpha(process.grid(4)[:-1]) ** 2, expected, rtol=0, atol=1e-6)
    direct = VariancePreserving(scheduler.alphas_cumprod)
    torch.testing.assert_close(direct.alpha(direct.grid(4)[:-1]) ** 2, expected)


def test_v_prediction_has_diffusers_sign() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**SD15)
    process = VariancePreserving(scheduler.alphas_cumprod)
    n, x1, eps = torch.tensor([3, 500, 999]), randn(3, 2), randn(3, 2)
    t = 1 - (n + 1).double() / 1000
    theirs = scheduler.get_velocity(x1, eps, n)
    ours = process.express(Prediction(x1, eps), "v_prediction", x1, t)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(process.add_noise(x1, eps, t), scheduler.add_noise(x1, eps, n), rtol=0, atol=1e-6)


def test_timesteps_are_nodes() -> None:
    process = PROCESSES["sd15"]
    t = process.grid(1000)[:-1]
    assert torch.equal(process.timestep(t), torch.arange(999, -1, -1))
    assert torch.equal(process.timestep(t.float()), torch.arange(999, -1, -1))
    torch.testing.assert_close(process.alpha(t.float()), process.alpha(t).float(), rtol=1e-6, atol=0)
    for bad in (0.5004, 1.0):
        with pytest.raises(ValueError, match=r"no nodes.*grid\(steps\)"):
            process.timestep(torch.tensor([0.5, bad], dtype=torch.float64))


@processes
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_half_precision_states_do_not_spoil_the_coefficients(process: Process, kind: str) -> None:
    t, x, output = process.grid(20)[-2].expand(6), randn(6, 4), randn(6, 4)
    x, output = x.bfloat16(), output.bfloat16()
    ours, exact = process.interpret(output, kind, x, t), process.interpret(output.double(), kind, x.double(), t)
    assert ours.x1_hat.dtype == torch.bfloat16
    scale = exact.x1_hat.abs().max()
    assert (ours.x1_hat.double() - exact.x1_hat).abs().max() < 0.02 * scale


def test_bad_input_is_one_line_with_the_mend() -> None:
    process = RectifiedFlow()
    x, t = randn(2, 2), torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match=r"unknown prediction type 'flow'; known are epsilon"):
        process.interpret(x, "flow", x, t)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown prediction type 'flow'"):
        process.express(Prediction(x, x), "flow", x, t)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown beta schedule 'sigmoid'; known are linear, scaled_linear"):
        VariancePreserving.from_scheduler({"beta_schedule": "sigmoid"})
    with pytest.raises(ValueError, match=r"'FlowMatchEulerDiscreteScheduler' has no beta_schedule.*RectifiedFlow"):
        VariancePreserving.from_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    with pytest.raises(ValueError, match=r"steps must lie in 1 \.\. 1000 .*not 1001"):
        PROCESSES["sd15"].grid(1001)
    with pytest.raises(ValueError, match="unknown spacing 'even'"):
        VariancePreserving.from_betas(spacing="even")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be falling"):
        VariancePreserving(torch.tensor([0.1, 0.9]))
    with pytest.raises(ValueError, match="pass the last"):
        VariancePreserving.from_betas(spacing="leading", steps_offset=1).grid(1000)

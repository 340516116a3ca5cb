# Copyright 2026 The MaPO reference implementation authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Holds mapo_loss.py to hand-derived values, to Appendix A in float64, and to arithmetic of 160 digits, which leave at
least 50 after the cancellations of eq. 11. `python test_mapo_loss.py` prints the largest errors as a Markdown table.
"""

import ast
import functools
import math
from decimal import Context, Decimal, localcontext
from pathlib import Path

import mapo_loss as mapo_loss_module
import pytest
import torch
import torch.nn.functional as F
from mapo_loss import MaPOLoss, link_function, mapo_loss, margin_loss


DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
BETAS = (0.1, 0.5, 1, 2, 8, 32, 64, 500, 1024, 4096)
SCALES = ((0.5, 1000), (1, 1), (5.0, 50))  # (snr_value, num_train_timesteps): the default, eq. 5-7 as printed, another
LOSSES = torch.tensor(
    # 0 and fp32's smallest numbers; the two sides of the series at 0.25 (0.5 with s = 0.5); where exp overflows fp32
    [0, 2**-149, 2**-126, 1e-30, 1e-20, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.25, 0.3]
    + [0.5, 1, 2, 5, 10, 30, 88, 89, 177, 178, 180, 500, 1e3, 1e4]
)
LOG2 = math.log(2)
DIGITS = Context(prec=160, Emin=-(10**9), Emax=10**9)


# ---------------------------------------------------------------------------------------------------------------------
# References
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def exact_phi(x: Decimal, beta: float) -> tuple[Decimal, Decimal]:
    """phi_beta(x) and its derivative: eq. 7 and the closed form of eq. 11 with its misprint put right."""
    beta = Decimal(beta)
    if x == 0:
        return Decimal(1), -beta / 2
    e = x.exp()
    phi, slope = x / (e - 1), (e - 1 - x * e) / (e - 1) ** 2
    power = phi**beta
    return power, beta * power / phi * slope


def exact_link(x: float, beta: float) -> list[float]:
    with localcontext(DIGITS):
        return [float(value) for value in exact_phi(Decimal(x), beta)]


def exact_margin(mse_w: float, mse_l: float, beta: float, snr_value: float, num_train_timesteps: int) -> list[float]:
    """L_margin, its derivatives by mse_w and mse_l, and the margin. -log sigmoid(m) has the slope -sigmoid(-m)."""
    with localcontext(DIGITS):
        s, T = Decimal(snr_value), num_train_timesteps
        (score_w, slope_w), (score_l, slope_l) = (exact_phi(s * Decimal(mse), beta) for mse in (mse_w, mse_l))
        margin = score_w - score_l
        e = (-T * margin).exp()
        outer = -e / (1 + e) * T * s
        return [float(value) for value in ((1 + e).ln(), outer * slope_w, -outer * slope_l, margin)]


def appendix_a(model_pred, target, beta, snr_value=0.5, num_train_timesteps=1000):
    """The pseudo-code of Appendix A, line by line, with a per-sample mean. Takes the precision of its inputs."""
    model_losses = F.mse_loss(model_pred, target, reduction="none")
    model_losses = model_losses.reshape(model_losses.shape[0], -1).mean(1)
    mse_w, mse_l = model_losses.chunk(2)
    score_w = (snr_value * mse_w / (torch.exp(snr_value * mse_w) - 1)) ** beta
    score_l = (snr_value * mse_l / (torch.exp(snr_value * mse_l) - 1)) ** beta
    margin = F.logsigmoid((score_w - score_l) * num_train_timesteps)
    return mse_w.mean() - (margin / beta).mean()


def code_of_2024(model_pred, target, beta_mapo, snr_value=0.5, num_train_timesteps=1000):
    mse_w, mse_l = (model_pred - target).square().flatten(1).mean(1).chunk(2)
    x_w, x_l = snr_value * mse_w, snr_value * mse_l
    ratio = F.logsigmoid(num_train_timesteps * (x_w / (x_w.exp() - 1) - x_l / (x_l.exp() - 1)))
    return mse_w.mean() - beta_mapo * ratio.mean()


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest |got - exact| / |exact|. One step of 2**-149 is free: below 1.2e-38 fp32 holds no full precision."""
    excess = ((got.double().cpu() - exact).abs() - 2**-149).clamp(min=0)  # NaN stays NaN, and fails every `<=`
    return torch.where(excess == 0, 0.0, excess / exact.abs()).max().item()


def loss_pairs(beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs of LOSSES, each with its fp32 neighbour, and random pairs, half of them closer than 1e-3."""
    grid = torch.cartesian_prod(LOSSES, LOSSES).T
    near = torch.stack([LOSSES, torch.nextafter(LOSSES, torch.tensor(torch.inf))])
    generator = torch.Generator().manual_seed(round(10 * beta))
    random = 10 ** torch.empty(2, 200).uniform_(-10, 4, generator=generator)
    random[1, ::2] = random[0, ::2] * (1 + 10 ** torch.empty(100).uniform_(-7, -3, generator=generator))
    return tuple(torch.cat([grid, near, near.flip(0), random], dim=1).clamp(max=1e4))


def value_and_gradients(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    return [value.detach(), *torch.autograd.grad(value.sum(), inputs)]


def link_errors(beta: float, device: str = "cpu", function=link_function) -> list[tuple]:
    """(values, exact values) of phi_beta and of its derivative."""
    x = torch.cat([LOSSES, torch.nextafter(LOSSES, torch.tensor(0.0)), *loss_pairs(beta)]).unique()
    exact = torch.tensor([exact_link(value, beta) for value in x.tolist()], dtype=torch.float64)
    return list(zip(value_and_gradients(lambda x: function(x, beta), x.to(device)), exact.T))


def margin_errors(beta, snr_value=0.5, num_train_timesteps=1000, device="cpu", function=margin_loss) -> list[tuple]:
    """(values, exact values) of L_margin and of its derivatives by mse_w and mse_l."""
    scale = (beta, snr_value, num_train_timesteps)
    mse_w, mse_l = loss_pairs(beta)
    exact = [exact_margin(*pair, *scale) for pair in zip(mse_w.tolist(), mse_l.tolist())]
    got = value_and_gradients(lambda *pair: function(*pair, *scale), mse_w.to(device), mse_l.to(device))
    return list(zip(got, torch.tensor(exact, dtype=torch.float64).T))


def make_pair_batch(shape=(8, 4, 6, 6), scale=0.1, dtype=torch.float32, seed=0):
    """Predictions that miss their targets by 0.5 to 1.5 times `scale`, and the targets. Shape: (2B, ...)."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(shape, generator=generator, dtype=torch.float64)
    model_pred = target + scale * (0.5 + torch.rand(shape, generator=generator, dtype=torch.float64))
    return model_pred.to(dtype), target.to(dtype)


def pair_of(mse_w, mse_l, dtype=torch.float64):
    """A batch of one-element samples whose squared errors are the given losses."""
    model_pred = torch.tensor([mse_w, mse_l], dtype=torch.float64).reshape(-1).sqrt().to(dtype)
    return model_pred, torch.zeros_like(model_pred)


# ---------------------------------------------------------------------------------------------------------------------
# Values by hand
# ---------------------------------------------------------------------------------------------------------------------


def test_link_function_by_hand():
    # exp(log 2) - 1 = 1, so phi_1(log 2) = log 2 = 0.6931; squared 0.4805, its root 0.8326.
    x = torch.tensor([0.0, LOG2])
    torch.testing.assert_close(link_function(x, 1), torch.tensor([1, 0.693147]), rtol=0, atol=1e-6)
    torch.testing.assert_close(link_function(x, 2), torch.tensor([1, 0.480453]), rtol=0, atol=1e-6)
    torch.testing.assert_close(link_function(x, 0.5), torch.tensor([1, 0.832555]), rtol=0, atol=1e-6)


def test_link_gradient_by_hand():
    # phi_1'(0) = -1/2. phi_1'(log 2) = (2 - 1 - 2 log 2) / 1**2 = 1 - 1.386294 = -0.386294.
    # phi_2' = 2 phi_1 phi_1': at 0, 2 * 1 * -1/2 = -1; at log 2, 2 * 0.693147 * -0.386294 = -0.535517.
    x = torch.tensor([0.0, LOG2])
    expected = {1: [-0.5, -0.386294], 2: [-1.0, -0.535517]}
    for beta, gradient in expected.items():
        got = value_and_gradients(lambda x: link_function(x, beta), x)[1]
        torch.testing.assert_close(got, torch.tensor(gradient), rtol=0, atol=1e-6)


def test_margin_loss_by_hand():
    # phi_1(0) - phi_1(log 2) = 1 - log 2, and exp(log 2 - 1) = 2/e, so L_margin = log(1 + 2/e) = 0.551445.
    # The pair swapped: log(1 + e/2) = 0.858298. Equal losses: -log sigmoid(0) = log 2.
    mse_w, mse_l = torch.tensor([0.0, LOG2, LOG2]), torch.tensor([LOG2, 0.0, LOG2])
    expected = torch.tensor([0.551445, 0.858298, 0.693147])
    torch.testing.assert_close(margin_loss(mse_w, mse_l, 1, 1, 1), expected, rtol=0, atol=1e-6)
    # snr_value 0.5 halves the losses that the score sees, so losses of 2 log 2 give the same.
    torch.testing.assert_close(margin_loss(2 * mse_w, 2 * mse_l, 1, 0.5, 1), expected, rtol=0, atol=1e-6)
    # beta = 2: 1 - (log 2)**2 = 0.519547, times T = 3 is 1.558641; log(1 + exp(-1.558641)) = log(1.210422) = 0.190969.
    got = margin_loss(mse_w, mse_l, 2, 1, 3)[0].item()
    assert got == pytest.approx(0.190969, abs=1e-6)


def test_margin_gradient_by_hand():
    # Equal losses at 0, beta = 8, s = 0.5, T = 1000: sigmoid(0) * T * s * beta / 2 = 0.5 * 1000 * 0.5 * 4 = 1000,
    # up with mse_w, down with mse_l.
    zero = torch.zeros(1)
    _, by_w, by_l = value_and_gradients(lambda *pair: margin_loss(*pair, 8), zero, zero)
    assert (by_w.item(), by_l.item()) == (1000, -1000)


def test_mapo_loss_by_hand():
    # Two pairs of two elements each, target 0, s = T = 1, beta = 2.
    # Pair 1: errors (0, 0) and (r, r) with r**2 = log 2:   mse 0 and log 2; margin 1 - (log 2)**2 = 0.519547
    # Pair 2: errors (1, 1) and (1, -1):                     mse 1 and 1; margin 0
    # phi_1(1) = 1 / (e - 1) = 0.581977, squared 0.338697.
    # eq. 5: (0 + 1) / 2 + (log(1 + exp(-0.519547)) + log 2) / 2 / 2 = 0.5 + (0.466742 + 0.693147) / 4 = 0.789972
    # margin_weight of pair 1: sigmoid(-0.519547) * phi_1(0) * -phi_1'(0) = 0.372958 / 2 = 0.186479
    # margin_weight of pair 2: 1/2 * phi_1(1) * -phi_1'(1), and phi_1'(1) = (e - 1 - e) / (e - 1)**2 = -0.338697:
    #   0.5 * 0.581977 * 0.338697 = 0.098557
    r = math.sqrt(LOG2)
    model_pred = torch.tensor([[0, 0], [1, 1], [r, r], [1, -1]])
    out = mapo_loss(model_pred, torch.zeros(4, 2), beta=2, snr_value=1, num_train_timesteps=1)
    expected = MaPOLoss(
        loss=torch.tensor(0.789972),
        mse_w=torch.tensor([0.0, 1.0]),
        mse_l=torch.tensor([0.693147, 1.0]),
        score_w=torch.tensor([1.0, 0.338697]),
        score_l=torch.tensor([0.480453, 0.338697]),
        margin=torch.tensor([0.519547, 0.0]),
        margin_weight=torch.tensor([0.186479, 0.098557]),
        accuracy=torch.tensor([1.0, 0.0]),
        safeguard=torch.tensor([1.0, 1.0]),
    )
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(out, name), value, rtol=0, atol=2e-6, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize(
    ("beta", "mse", "expected"),
    # Weight of the margin term at equal losses, T = 1000, s = 0.5, to the digits shown. It starts at
    # 1/2 * T * s * 1/2 = 125, whatever beta, and falls with phi_beta: a large beta is SFT but on the smallest losses.
    [(8, 1e-3, "125"), (8, 1e-2, "123"), (8, 3e-2, "118"), (8, 1e-1, "103"), (8, 3e-1, "70")]
    + [(64, 1e-3, "123"), (64, 1e-2, "107"), (64, 3e-2, "77"), (64, 1e-1, "25"), (64, 3e-1, "1.0")]
    + [(1024, 1e-3, "97"), (1024, 1e-2, "9.7"), (1024, 3e-2, "0.06"), (1024, 1e-1, "0"), (1024, 3e-1, "0")],
)
def test_margin_weight_table(beta, mse, expected):
    weight = mapo_loss(*pair_of(mse, mse), beta).margin_weight.item()
    digits = len(expected.partition(".")[2])
    assert f"{weight:.{digits}f}" == expected


def test_defaults_are_those_of_appendix_a():
    batch = make_pair_batch()
    assert torch.equal(mapo_loss(*batch, 8).loss, mapo_loss(*batch, 8, snr_value=0.5, num_train_timesteps=1000).loss)
    pair = torch.tensor([0.1]), torch.tensor([0.2])
    assert torch.equal(margin_loss(*pair, 8), margin_loss(*pair, 8, snr_value=0.5, num_train_timesteps=1000))


# ---------------------------------------------------------------------------------------------------------------------
# Appendix A in float64, and the code of 2024
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 1, 8, 64, 1024])
@pytest.mark.parametrize("shape", [(8,), (8, 3), (6, 77, 16), (4, 4, 8, 8), (2, 4, 3, 8, 8)])
def test_agrees_with_appendix_a(shape, beta):
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 2e-5)):
        model_pred, target = make_pair_batch(shape, dtype=dtype)
        loss, gradient = value_and_gradients(lambda pred: mapo_loss(pred, target, beta).loss, model_pred)
        reference = value_and_gradients(lambda pred: appendix_a(pred, target.double(), beta), model_pred.double())
        torch.testing.assert_close(loss.double(), reference[0], rtol=tolerance, atol=0)
        largest = reference[1].abs().max().item()
        torch.testing.assert_close(gradient.double(), reference[1], rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_prediction_types(prediction_type):
    # Only the target differs. The model predicts from the noisy latents; here it misses by 0.2 on average.
    generator = torch.Generator().manual_seed(1)
    latents, noise, miss = torch.randn(3, 6, 4, 8, 8, generator=generator, dtype=torch.float64)
    noise[3:] = noise[:3]  # shared by the two of a pair
    alpha, sigma = 0.8, 0.6
    target = {"epsilon": noise, "v_prediction": alpha * noise - sigma * latents, "flow": noise - latents}
    target = target[prediction_type]
    out = mapo_loss(target + 0.2 * miss, target, beta=8)
    assert out.loss.item() == pytest.approx(appendix_a(target + 0.2 * miss, target, 8).item(), rel=1e-10)
    assert out.mse_w.mean().item() == pytest.approx(0.04, rel=0.2)


def test_code_of_2024_is_another_loss_but_for_beta_1():
    batch = make_pair_batch(dtype=torch.float64)
    assert mapo_loss(*batch, beta=1).loss.item() == pytest.approx(code_of_2024(*batch, beta_mapo=1).item(), rel=1e-10)
    for beta in (0.1, 8, 64):
        for beta_mapo in (beta, 1 / beta):
            assert abs(mapo_loss(*batch, beta).loss / code_of_2024(*batch, beta_mapo) - 1) > 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy over the whole range
# ---------------------------------------------------------------------------------------------------------------------

# The target is 1e-5; half a unit in the last place of fp32 is 2**-24 = 5.96e-8, and nothing but that is lost.
LAST_ROUNDING = 6e-8


@pytest.mark.parametrize("x", [1e-3, 0.25, 1, 30])
@pytest.mark.parametrize("beta", [0.5, 1, 8])
def test_reference_derivative_is_the_slope_of_the_reference(x, beta):
    with localcontext(DIGITS):
        x, h = Decimal(x), Decimal("1e-40")
        slope = (exact_phi(x + h, beta)[0] - exact_phi(x - h, beta)[0]) / (2 * h)
        assert abs(exact_phi(x, beta)[1] / slope - 1) < 1e-12
        if beta == 1:  # the numerator that eq. 11 prints
            e = x.exp()
            assert abs((e - x - 1) / (e - 1) ** 2 / slope - 1) > 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("beta", BETAS)
def test_link_function_is_exact(beta, device):
    for got, exact in link_errors(beta, device):
        assert got.dtype == torch.float32
        assert relative_error(got, exact) <= LAST_ROUNDING


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("beta", BETAS)
def test_margin_loss_is_exact(beta, device):
    for got, exact in margin_errors(beta, device=device):
        assert got.dtype == torch.float32
        assert relative_error(got, exact) <= LAST_ROUNDING


@pytest.mark.parametrize(("snr_value", "num_train_timesteps"), SCALES[1:])
@pytest.mark.parametrize("beta", [0.1, 8, 1024])
def test_margin_loss_is_exact_at_other_scales(beta, snr_value, num_train_timesteps):
    for got, exact in margin_errors(beta, snr_value, num_train_timesteps):
        assert relative_error(got, exact) <= LAST_ROUNDING


@pytest.mark.parametrize("beta", BETAS)
def test_logs_are_exact(beta):
    mse_w, mse_l = loss_pairs(beta)
    model_pred, target = pair_of(mse_w.tolist(), mse_l.tolist(), torch.float32)
    out = mapo_loss(model_pred, target, beta)
    pairs = list(zip(out.mse_w.tolist(), out.mse_l.tolist()))  # fp32's rounding of sqrt and square is in these
    exact = torch.tensor([exact_margin(*pair, beta, 0.5, 1000) for pair in pairs], dtype=torch.float64)
    loss_margin, by_w, _, margin = exact.T
    assert relative_error(out.margin_weight, by_w / beta) <= LAST_ROUNDING
    torch.testing.assert_close(out.margin.double(), margin, rtol=1e-6, atol=1e-15)  # a difference, in float64
    assert torch.equal(out.score_w, link_function(0.5 * out.mse_w, beta))
    assert torch.equal(out.score_l, link_function(0.5 * out.mse_l, beta))
    assert torch.equal(out.accuracy, torch.tensor([float(mse_w < mse_l) for mse_w, mse_l in pairs]))
    assert out.loss.item() == pytest.approx((out.mse_w.double() + loss_margin / beta).mean().item(), rel=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_limits_at_zero_are_exact(beta):
    zero = torch.zeros(1)
    score, slope = value_and_gradients(lambda x: link_function(x, beta), zero)
    assert score.item() == 1
    assert slope.item() == -torch.tensor(beta).item() / 2
    value, by_w, by_l = value_and_gradients(lambda *pair: margin_loss(*pair, beta), zero, zero)
    assert value.item() == torch.tensor(LOG2).item()
    assert by_w.item() == -by_l.item() == torch.tensor(125 * beta).item()
    out = mapo_loss(torch.zeros(2, 3), torch.zeros(2, 3), beta)
    assert out.margin_weight.item() == 125


def test_device_without_float64(monkeypatch):
    # The path of mps, run on the CPU: fp32 throughout. T = 1000 magnifies the rounding of the scores.
    monkeypatch.setattr(mapo_loss_module, "FLOAT64_DEVICES", ())
    for beta in BETAS:
        (value, exact), *gradients = margin_errors(beta)
        assert relative_error(value, exact) > LAST_ROUNDING  # or this is not the path of mps
        for got, exact in ((value, exact), *gradients):
            torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-30)
        for got, exact in link_errors(beta):
            torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-30)


# ---------------------------------------------------------------------------------------------------------------------
# Identities
# ---------------------------------------------------------------------------------------------------------------------


def test_strictly_monotone_where_scores_differ():
    x = torch.linspace(0, 5, 200)
    assert (link_function(x, 2).diff() < 0).all()
    assert (margin_loss(x, torch.ones(200), 2, 1, 1).diff() > 0).all()
    assert (margin_loss(torch.ones(200), x, 2, 1, 1).diff() < 0).all()


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model_pred, target = make_pair_batch((12, 4, 6, 6), dtype=torch.float64)
    _, whole = value_and_gradients(lambda pred: mapo_loss(pred, target, 8).loss, model_pred)
    model_pred.requires_grad_()
    for rows in torch.arange(12).reshape(2, 3, 2).permute(1, 0, 2).flatten(1):  # winners, then losers, of two pairs
        (mapo_loss(model_pred[rows], target[rows], 8).loss / 3).backward()
    torch.testing.assert_close(model_pred.grad, whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("float64_devices", [("cpu",), ()])
def test_losses_beyond_the_range(monkeypatch, float64_devices):
    monkeypatch.setattr(mapo_loss_module, "FLOAT64_DEVICES", float64_devices)
    huge, zeros = torch.tensor([1e5, 1e30, torch.finfo(torch.float32).max]), torch.zeros(3)
    for beta in BETAS:
        score, slope = value_and_gradients(lambda x: link_function(x, beta), huge)
        assert score.tolist() == slope.tolist() == [0, 0, 0]
        value, by_w, by_l = value_and_gradients(lambda *pair: margin_loss(*pair, beta), huge, zeros)
        assert value.tolist() == [1000, 1000, 1000]  # a margin of -1, times T
        assert by_w.tolist() == [0, 0, 0]
        assert by_l.tolist() == pytest.approx([-250 * beta] * 3)


def test_nan_prediction_is_not_hidden():
    model_pred, target = make_pair_batch()
    model_pred[0, 0, 0, 0] = torch.nan
    assert mapo_loss(model_pred, target, 8).loss.isnan()


# ---------------------------------------------------------------------------------------------------------------------
# The safeguard of the winner, which the paper doesn't have
# ---------------------------------------------------------------------------------------------------------------------


def safeguarded_gradient(model_pred, target, beta, mu, snr_value=0.5, num_train_timesteps=1000):
    """Diffusion-SDPO's rule, pair by pair, on the gradient of Appendix A: the loser's half times lambda."""
    gradient = value_and_gradients(lambda pred: appendix_a(pred, target, beta), model_pred)[1].clone()
    pairs, factors = len(model_pred) // 2, []
    for i in range(pairs):
        g_w, g_l = ((model_pred[row] - target[row]).flatten() for row in (i, pairs + i))
        product = torch.dot(g_w, g_l)
        factors.append(min(1.0, float((1 - mu) * torch.dot(g_w, g_w) / product)) if product > 0 else 1.0)
        gradient[pairs + i] *= factors[-1]
    return gradient, torch.tensor(factors, dtype=model_pred.dtype)


def related_pairs(pairs: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Residuals of winner and loser that are correlated, as they are in training, or opposed in every third pair."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(2 * pairs, 4, 6, 6, generator=generator, dtype=dtype)
    residual_w = 0.3 * torch.randn(pairs, 4, 6, 6, generator=generator, dtype=dtype)
    residual_l = residual_w * torch.linspace(0.2, 2, pairs, dtype=dtype)[:, None, None, None]
    residual_l += 0.1 * torch.randn(pairs, 4, 6, 6, generator=generator, dtype=dtype)
    residual_l[::3] *= -1
    return target + torch.cat([residual_w, residual_l]), target


@pytest.mark.parametrize("mu", [0, 0.3, 0.8, 0.999])
@pytest.mark.parametrize("beta", [1, 8, 64])
def test_safeguard_scales_the_losers_gradient_only(beta, mu):
    model_pred, target = related_pairs(12)
    expected, factors = safeguarded_gradient(model_pred, target, beta, mu)
    assert (factors == 1).any()
    assert (factors < 1).any()
    gradient = value_and_gradients(lambda pred: mapo_loss(pred, target, beta, safeguard=mu).loss, model_pred)[1]
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-15)
    out, plain = mapo_loss(model_pred, target, beta, safeguard=mu), mapo_loss(model_pred, target, beta)
    torch.testing.assert_close(out.safeguard, factors, rtol=1e-12, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(out[:-1], plain[:-1]))  # no value changes
    assert plain.safeguard.eq(1).all()


def test_safeguard_near_1_leaves_no_gradient_of_a_loser_that_shares_the_winners_direction():
    model_pred, target = related_pairs(12)
    mu = 1 - 1e-12
    gradient = value_and_gradients(lambda pred: mapo_loss(pred, target, 8, safeguard=mu).loss, model_pred)[1]
    plain = value_and_gradients(lambda pred: mapo_loss(pred, target, 8).loss, model_pred)[1]
    opposed = torch.arange(12) % 3 == 0
    assert gradient[12:][~opposed].abs().max() < 1e-9 * plain[12:][~opposed].abs().max()
    assert torch.equal(gradient[12:][opposed], plain[12:][opposed])
    assert torch.equal(gradient[:12], plain[:12])


@pytest.mark.parametrize("winner, loser", [(0.0, 0.5), (0.5, 0.0), (0.0, 0.0)])
def test_safeguard_of_a_perfect_prediction(winner, loser):
    target = torch.zeros(2, 4)
    model_pred = torch.tensor([[winner], [loser]]).expand(2, 4).clone()
    out = mapo_loss(model_pred, target, 8, safeguard=0.8)
    gradient = value_and_gradients(lambda pred: mapo_loss(pred, target, 8, safeguard=0.8).loss, model_pred)[1]
    assert out.safeguard.item() == 1  # the residuals have no direction in common
    assert gradient.isfinite().all()


def test_safeguard_works_per_pair_so_accumulation_changes_nothing():
    model_pred, target = related_pairs(6)
    whole = value_and_gradients(lambda pred: mapo_loss(pred, target, 8, safeguard=0.6).loss, model_pred)[1]
    model_pred.requires_grad_()
    for rows in torch.arange(12).reshape(2, 3, 2).permute(1, 0, 2).flatten(1):
        (mapo_loss(model_pred[rows], target[rows], 8, safeguard=0.6).loss / 3).backward()
    torch.testing.assert_close(model_pred.grad, whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_safeguard_is_in_fp32_under_autocast(dtype):
    model_pred, target = (x.to(dtype) for x in related_pairs(6))
    expected = mapo_loss(model_pred.float(), target.float(), 8, safeguard=0.6).safeguard
    with torch.autocast("cpu", dtype=dtype):
        out = mapo_loss(model_pred, target, 8, safeguard=0.6)
    assert out.safeguard.dtype == torch.float32
    assert torch.equal(out.safeguard, expected)


def test_safeguard_compiles_to_one_graph():
    torch._dynamo.reset()
    model_pred, target = related_pairs(6, torch.float32)
    results = []
    for function in (torch.compile(mapo_loss, fullgraph=True, backend="inductor"), mapo_loss):
        leaf = model_pred.clone().requires_grad_()
        out = function(leaf, target, 8, safeguard=0.6)
        results.append((*out, *torch.autograd.grad(out.loss, leaf)))
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("safeguard", [-0.1, 1, 1.5, math.nan, math.inf, "0.8", True, torch.tensor(0.8)])
def test_unusable_safeguards(safeguard):
    with pytest.raises(ValueError, match="safeguard must be None or a Python number in"):
        mapo_loss(*make_pair_batch(), 8, safeguard=safeguard)


# ---------------------------------------------------------------------------------------------------------------------
# Precision, graphs, transforms
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_upcast(dtype, autocast):
    model_pred, target = make_pair_batch(dtype=dtype)
    expected = mapo_loss(model_pred.float(), target.float(), 8)
    model_pred.requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        out = mapo_loss(model_pred, target, 8)
        mixed = mapo_loss(model_pred, target.float(), 8)
        margin = margin_loss(expected.mse_w, expected.mse_l, 8)
        score = link_function(model_pred.abs(), 8)
    for name, value in expected._asdict().items():
        assert torch.equal(getattr(out, name), value), name
        assert getattr(out, name).dtype == torch.float32
    assert torch.equal(mixed.loss, expected.loss)
    assert torch.equal(margin, margin_loss(expected.mse_w, expected.mse_l, 8))
    assert torch.equal(score, link_function(model_pred.float().abs(), 8))
    out.loss.backward()
    assert model_pred.grad.dtype == dtype
    assert model_pred.grad.abs().max() > 0


def test_fp16_does_not_overflow():
    # 300**2 = 90000 is above fp16's largest number, 65504.
    model_pred = torch.full((2, 4), 300.0, dtype=torch.float16)
    out = mapo_loss(model_pred, torch.zeros_like(model_pred), 8)
    assert out.mse_w.item() == 90000
    assert out.loss.item() == pytest.approx(90000 + LOG2 / 8)


def test_float64_stays_float64():
    out = mapo_loss(*make_pair_batch(dtype=torch.float64), 8)
    assert {value.dtype for value in out} == {torch.float64}
    assert link_function(torch.ones(1, dtype=torch.float64), 8).dtype == torch.float64
    assert margin_loss(torch.ones(1), torch.ones(1, dtype=torch.float64), 8).dtype == torch.float64


def test_only_the_loss_carries_a_graph():
    model_pred, target = make_pair_batch((6, 4, 8, 8))
    out = mapo_loss(model_pred.requires_grad_(), target, 8)
    assert [name for name, value in out._asdict().items() if value.requires_grad] == ["loss"]
    assert out.loss.shape == ()
    assert {value.shape for value in out[1:]} == {(3,)}


def test_inputs_are_left_alone():
    model_pred, target = make_pair_batch()
    copies = model_pred.clone(), target.clone()
    mapo_loss(model_pred, target, 8)
    assert torch.equal(model_pred, copies[0])
    assert torch.equal(target, copies[1])


def test_memory_format_does_not_matter():
    model_pred, target = make_pair_batch(dtype=torch.float64)
    channels_last = model_pred.to(memory_format=torch.channels_last)
    torch.testing.assert_close(mapo_loss(channels_last, target, 8).loss, mapo_loss(model_pred, target, 8).loss)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiles_to_one_graph(backend, device):
    torch._dynamo.reset()
    compiled = torch.compile(mapo_loss, fullgraph=True, backend=backend)
    calls = [(8, 1000, 8), (8.5, 1000, 8), (64, 500, 8), (64, 300, 12), (64, 300, 20)]  # beta, T, 2B
    for beta, num_train_timesteps, rows in calls if backend == "eager" else calls[:1]:
        model_pred, target = (x.to(device) for x in make_pair_batch((rows, 4)))
        # Among pairs of everyday size, a perfect prediction, one with x = 0.25, and one with a score of 0.
        for row, miss in enumerate((0.0, math.sqrt(0.5), 100.0)):
            model_pred[row] = target[row] + miss
        results = []
        for function in (compiled, mapo_loss):
            leaf = model_pred.clone().requires_grad_()
            out = function(leaf, target, beta, num_train_timesteps=num_train_timesteps)
            results.append((*out, *torch.autograd.grad(out.loss, leaf)))
            assert isinstance(out, MaPOLoss)
        for got, expected in zip(*results):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_torch_func():
    model_pred, target = make_pair_batch((5, 6, 4), dtype=torch.float64)  # five batches of three pairs

    def loss_and_logs(model_pred, target):
        out = mapo_loss(model_pred, target, 8)
        return out.loss, out

    gradients, outs = torch.func.vmap(torch.func.grad(loss_and_logs, has_aux=True))(model_pred, target)
    for index in range(5):
        expected = mapo_loss(model_pred[index], target[index], 8)
        gradient = value_and_gradients(lambda pred: mapo_loss(pred, target[index], 8).loss, model_pred[index])[1]
        torch.testing.assert_close(gradients[index], gradient, rtol=1e-12, atol=1e-15)
        for got, value in zip(outs, expected):
            torch.testing.assert_close(got[index], value, rtol=1e-12, atol=1e-15)

    tangent = torch.ones_like(model_pred[0])
    _, slope = torch.func.jvp(lambda pred: mapo_loss(pred, target[0], 8).loss, (model_pred[0],), (tangent,))
    torch.testing.assert_close(slope, gradients[0].sum(), rtol=1e-9, atol=0)


def test_second_derivatives():
    # phi_1'' is 1/6 at 0: of phi_1 = 1 - x/2 + x**2/12 - ...
    x = torch.zeros((), dtype=torch.float64)
    curvature = torch.func.grad(torch.func.grad(lambda x: link_function(x, 1)))(x)
    assert curvature.item() == pytest.approx(1 / 6, rel=1e-12)
    mse_w = torch.tensor([1e-3, 0.2, 0.9, 3.0], dtype=torch.float64, requires_grad=True)
    mse_l = mse_w.detach().flip(0).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *pair: margin_loss(*pair, 2, 1, 3), (mse_w, mse_l))


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------

UNUSABLE = [0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf, True, None, "8", 1j, torch.tensor(8.0)]


@pytest.mark.parametrize("value", UNUSABLE, ids=repr)
@pytest.mark.parametrize("name", ["beta", "snr_value", "num_train_timesteps"])
def test_unusable_numbers(name, value):
    numbers = {"beta": 8, name: value}
    x = torch.ones(2)
    calls = [lambda: margin_loss(x, x, **numbers), lambda: mapo_loss(x, x, **numbers)]
    if name == "beta":
        calls.append(lambda: link_function(x, value))
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == f"{name} must be a finite Python number above 0, got {value!r}."


@pytest.mark.parametrize("shape", [(3, 4), (1,), (0, 4), (2, 0), ()])
def test_unusable_batches(shape):
    with pytest.raises(ValueError) as error:
        mapo_loss(torch.ones(shape), torch.ones(shape), 8)
    assert f"got {tuple(shape)}" in str(error.value)


def test_shapes_that_differ():
    # All of these would broadcast.
    for function in (mapo_loss, margin_loss):
        for a, b in (((4, 3), (4, 1)), ((4,), (1,)), ((4, 4), (4,)), ((), (4,))):
            with pytest.raises(ValueError) as error:
                function(torch.ones(a), torch.ones(b), 8)
            assert str(error.value) == f"Shapes differ: {a} and {b}."


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_tensors_that_are_not_floating_point(dtype):
    wrong, right = torch.ones(4, dtype=dtype), torch.ones(4)
    pairs = ((wrong, right), (right, wrong), (wrong, wrong))
    calls = [lambda f=f, a=a, b=b: f(a, b, 8) for f in (mapo_loss, margin_loss) for a, b in pairs]
    for call in (*calls, lambda: link_function(wrong, 8)):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == f"Expected a floating-point tensor, got {dtype}."


def test_module_stands_alone():
    tree = ast.parse(Path(mapo_loss_module.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} == {"torch", "typing"}


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def printed_link(losses, beta):
    return (losses / (torch.exp(losses) - 1)) ** beta


def printed_margin(mse_w, mse_l, beta, snr_value, num_train_timesteps):
    margin = printed_link(snr_value * mse_w, beta) - printed_link(snr_value * mse_l, beta)
    return -F.logsigmoid(margin * num_train_timesteps)


def main():
    """Largest relative errors in fp32, how far eq. 6-7 typed in as printed get, and what beta does to the gradient."""
    rows = {"phi_beta": [], "its gradient": [], "L_margin": [], "gradient by mse_w": [], "gradient by mse_l": []}
    for beta in BETAS:
        ours = link_errors(beta) + margin_errors(beta)
        printed = link_errors(beta, function=printed_link) + margin_errors(beta, function=printed_margin)
        for row, (got, exact), (other, _) in zip(rows.values(), ours, printed):
            row.append((got, other, exact))
    print("| fp32 | values | largest relative error | as printed: NaN or inf | as printed: off by more than 1e-5 |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        got, other, exact = (torch.cat(column) for column in zip(*row))
        bad = ~torch.isfinite(other)
        wrong = ((other.double() - exact).abs() > 1e-5 * exact.abs() + 2**-149) & ~bad
        print(f"| {name} | {len(got)} | {relative_error(got, exact):.1e} | {bad.sum()} | {wrong.sum()} |")
    print("\nLosses from 0 to 1e4, beta from 0.1 to 4096, snr_value 0.5, T 1000; the reference has 160 digits.")

    betas, errors = (1, 8, 32, 64, 256, 1024), (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
    print("\n| mse_w = mse_l | " + " | ".join(f"beta {beta}" for beta in betas) + " |")
    print("|---" * (len(betas) + 1) + "|")
    for mse in errors:
        same = torch.full((2, 1), mse**0.5)
        weights = (mapo_loss(same, torch.zeros(2, 1), beta).margin_weight.item() for beta in betas)
        print(f"| {mse:g} | " + " | ".join(f"{weight:.3g}" for weight in weights) + " |")


if __name__ == "__main__":
    main()

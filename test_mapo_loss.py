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
Compares mapo_loss.py with values worked out by hand, with Appendix A in float64, and with 160-digit arithmetic.
`python test_mapo_loss.py` prints the largest errors as a Markdown table.
"""

import functools
import math
from decimal import Context, Decimal, localcontext
from pathlib import Path

import mapo_loss as mapo_loss_module
import pytest
import torch
import torch.nn.functional as F
from mapo_loss import MaPOLoss, link_function, mapo_loss, margin_loss


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
BETAS = [0.1, 0.5, 1, 2, 8, 32, 64, 500, 1024, 4096]
LOSSES = torch.tensor(
    # 0 and fp32's smallest numbers, both ends of the series and the clamp, and where exp overflows fp32
    [0, 2**-149, 2**-126, 1e-30, 1e-20, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 2e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3]
    + [0.5, 1, 2, 5, 10, 30, 88, 89, 177, 178, 180, 350, 500, 700, 1e3, 1e4]
)
LOG2 = math.log(2)


@functools.cache
def exact_phi(x: Decimal, beta: float) -> tuple[Decimal, Decimal]:
    """Return phi_beta(x) and its derivative, by eq. 7 and by eq. 11 without its misprint."""
    if x == 0:
        return Decimal(1), -Decimal(beta) / 2
    e = x.exp()
    phi = x / (e - 1)
    slope = (e - 1 - x * e) / (e - 1) ** 2
    return phi ** Decimal(beta), Decimal(beta) * phi ** Decimal(beta) / phi * slope


def exact_margin(mse_w: Decimal, mse_l: Decimal, beta: float, snr_value: float, num_train_timesteps: int) -> list:
    """Return L_margin and its derivatives with respect to mse_w and mse_l."""
    score_w, slope_w = exact_phi(Decimal(snr_value) * mse_w, beta)
    score_l, slope_l = exact_phi(Decimal(snr_value) * mse_l, beta)
    e = (-num_train_timesteps * (score_w - score_l)).exp()
    outer = -e / (1 + e) * num_train_timesteps * Decimal(snr_value)
    return [(1 + e).ln(), outer * slope_w, -outer * slope_l]


def appendix_a(model_pred, target, beta, snr_value=0.5, num_train_timesteps=1000):
    """The pseudo-code of Appendix A, line by line, with one mean per image."""
    model_losses = F.mse_loss(model_pred, target, reduction="none")
    model_losses = model_losses.reshape(model_losses.shape[0], -1).mean(1)
    mse_w, mse_l = model_losses.chunk(2)
    margin = -printed_margin(mse_w, mse_l, beta, snr_value, num_train_timesteps)
    return mse_w.mean() - (margin / beta).mean()


def printed_margin(mse_w, mse_l, beta, snr_value, num_train_timesteps):
    margin = printed_link(snr_value * mse_w, beta) - printed_link(snr_value * mse_l, beta)
    return -F.logsigmoid(margin * num_train_timesteps)


def printed_link(losses, beta):
    return (losses / (torch.exp(losses) - 1)) ** beta


def value_and_gradients(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    return [value.detach(), *torch.autograd.grad(value.sum(), inputs)]


def loss_pairs() -> list[torch.Tensor]:
    """Return mse_w and mse_l: all pairs of LOSSES, neighbours in fp32, random pairs, half of them closer than 1e-3."""
    grid = torch.cartesian_prod(LOSSES, LOSSES).T
    near = torch.stack([LOSSES, torch.nextafter(LOSSES, torch.tensor(torch.inf))])
    generator = torch.Generator().manual_seed(0)
    random = 10 ** torch.empty(2, 200).uniform_(-10, 4, generator=generator)
    random[1, ::2] = random[0, ::2] * (1 + 10 ** torch.empty(100).uniform_(-7, -3, generator=generator))
    return list(torch.cat([grid, near, near.flip(0), random], dim=1).clamp(max=1e4))


def compare(beta, snr_value=0.5, num_train_timesteps=1000, device="cpu", link=link_function, margin=margin_loss):
    """Return (name, values, exact values) for both functions and their gradients, over `loss_pairs`."""
    scale = (beta, snr_value, num_train_timesteps)
    mse_w, mse_l = loss_pairs()
    exact = []
    with localcontext(Context(prec=160, Emin=-(10**9), Emax=10**9)):  # 50 digits survive the cancellation in eq. 11
        for w, l in zip(map(Decimal, mse_w.tolist()), map(Decimal, mse_l.tolist())):
            exact.append([float(value) for value in [*exact_phi(w, beta), *exact_margin(w, l, *scale)]])
    mse_w = mse_w.to(device)
    mse_l = mse_l.to(device)
    values = value_and_gradients(lambda x: link(x, beta), mse_w)
    values += value_and_gradients(lambda w, l: margin(w, l, *scale), mse_w, mse_l)
    names = ["phi_beta", "its gradient", "L_margin", "gradient by mse_w", "gradient by mse_l"]
    return list(zip(names, values, torch.tensor(exact, dtype=torch.float64).T))


def relative_error(values: torch.Tensor, exact: torch.Tensor, beta: float) -> float:
    """
    Return the largest |value - exact| / |exact|.

    Errors up to 2**-149 are free, as fp32 loses precision below 1.2e-38. At a beta of 0.1 the clamp at x = 350 changes
    scores below 2e-15 and their gradients, so errors up to 2e-15 of the largest exact value are free there, too.
    """
    free = 2e-15 * exact.abs().max() if beta < 0.5 else 2**-149
    excess = ((values.double().cpu() - exact).abs() - free).clamp(min=0)  # NaN stays NaN and fails every `<=`
    return torch.where(excess == 0, 0.0, excess / exact.abs()).max().item()


def make_batch(shape=(12, 4, 6, 6), dtype=torch.float32, scale=0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Return predictions and targets. The residuals of a pair are correlated: opposed, doubled or alike, in turns."""
    generator = torch.Generator().manual_seed(3)
    target, residual = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    residual_w, residual_l = (scale * residual).chunk(2)
    residual_l = residual_w.lerp(residual_l, 0.3)
    residual_l[::3] *= -1
    residual_l[1::3] *= 2
    return (target + torch.cat([residual_w, residual_l])).to(dtype), target.to(dtype)


def pairs_of(mse_w: list, mse_l: list, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Return predictions and targets of one number each, with the given squared errors."""
    model_pred = torch.tensor([*mse_w, *mse_l], dtype=torch.float64).sqrt().to(dtype)
    return model_pred, torch.zeros_like(model_pred)


# ---- Values ---------------------------------------------------------------------------------------------------------
def test_margin_loss_by_hand():
    # phi_1(0) = 1 and phi_1(log 2) = log 2, so L_margin = log(1 + exp(log 2 - 1)) = log(1 + 2/e) = 0.551445. The pair
    # swapped: log(1 + e/2) = 0.858298. Equal losses: log 2. A snr_value of 0.5 gives the same for losses twice as large.
    mse_w = torch.tensor([0, LOG2, LOG2])
    mse_l = torch.tensor([LOG2, 0, LOG2])
    expected = torch.tensor([0.551445, 0.858298, 0.693147])
    torch.testing.assert_close(margin_loss(mse_w, mse_l, 1, 1, 1), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(margin_loss(2 * mse_w, 2 * mse_l, 1, 0.5, 1), expected, rtol=0, atol=1e-6)
    # beta = 2, T = 3: 3 * (1 - (log 2)**2) = 1.558641, and log(1 + exp(-1.558641)) = 0.190969.
    assert margin_loss(mse_w, mse_l, 2, 1, 3)[0].item() == pytest.approx(0.190969, abs=1e-6)
    # Both losses 0, beta = 8, and by default s = 0.5, T = 1000: sigmoid(0) * T * s * beta / 2 = 1000.
    value, by_w, by_l = value_and_gradients(lambda w, l: margin_loss(w, l, 8), torch.zeros(1), torch.zeros(1))
    assert (value.item(), by_w.item(), by_l.item()) == (pytest.approx(LOG2), 1000, -1000)


def test_mapo_loss_by_hand():
    # Two pairs of two elements, target 0, s = T = 1, beta = 2, and r**2 = log 2.
    # Pair 1: errors (0, 0) and (r, r), so mse 0 and log 2, and a margin of 1 - (log 2)**2 = 0.519547.
    # Pair 2: errors (1, 1) and (1, -1), so mse 1 and 1. phi_1(1) = 1 / (e - 1) = 0.581977, squared 0.338697.
    # eq. 5: (0 + 1) / 2 + (log(1 + exp(-0.519547)) + log 2) / 2 / 2 = 0.5 + (0.466742 + 0.693147) / 4 = 0.789972
    # margin_weight of pair 1: sigmoid(-0.519547) * phi_1(0) * -phi_1'(0) = 0.372958 / 2 = 0.186479
    # margin_weight of pair 2: 1/2 * phi_1(1) * -phi_1'(1), where phi_1'(1) = (e - 1 - e) / (e - 1)**2 = -0.338697
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
    torch.testing.assert_close(out._asdict(), expected._asdict(), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("beta", "expected"),
    # Equal errors, T = 1000, s = 0.5. Where they are 0 the weight is 1/2 * T * s * 1/2 = 125 for any beta. It falls with
    # phi_beta, so a large beta is plain fine-tuning unless the error is tiny.
    [(8, "125 125 123 118 103 69.8"), (64, "125 123 107 77.5 25.3 0.99"), (1024, "125 96.8 9.66 0.06 0.00 0.00")],
)
def test_margin_weight_at_equal_errors(beta, expected):
    errors = [0, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1]
    weights = mapo_loss(*pairs_of(errors, errors), beta).margin_weight
    assert weights.tolist() == pytest.approx([float(weight) for weight in expected.split()], rel=5e-3, abs=5e-3)


@pytest.mark.parametrize("beta", [0.1, 1, 8, 64, 1024])
@pytest.mark.parametrize("shape", [(8,), (8, 3), (6, 77, 16), (4, 4, 8, 8), (2, 4, 3, 8, 8)])
def test_agrees_with_appendix_a(shape, beta):
    for dtype, tolerance in [(torch.float64, 1e-8), (torch.float32, 2e-5)]:
        model_pred, target = make_batch(shape, dtype)
        loss, gradient = value_and_gradients(lambda pred: mapo_loss(pred, target, beta).loss, model_pred)
        expected = value_and_gradients(lambda pred: appendix_a(pred, target.double(), beta), model_pred.double())
        torch.testing.assert_close(loss.double(), expected[0], rtol=tolerance, atol=0)
        largest = expected[1].abs().max().item()
        torch.testing.assert_close(gradient.double(), expected[1], rtol=tolerance, atol=tolerance * largest)


def test_code_of_2024_is_the_same_loss_at_beta_1_only():
    def code_of_2024(model_pred, target, beta_mapo):
        mse_w, mse_l = (model_pred - target).square().flatten(1).mean(1).chunk(2)
        return mse_w.mean() + beta_mapo * printed_margin(mse_w, mse_l, 1, 0.5, 1000).mean()

    batch = make_batch(dtype=torch.float64)
    assert mapo_loss(*batch, 1).loss.item() == pytest.approx(code_of_2024(*batch, 1).item(), rel=1e-10)
    for beta in [0.1, 8, 64]:
        ours = mapo_loss(*batch, beta).loss.item()
        assert ours != pytest.approx(code_of_2024(*batch, beta).item(), rel=0.05)
        assert ours != pytest.approx(code_of_2024(*batch, 1 / beta).item(), rel=0.05)


# ---- The whole range ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("beta", "snr_value", "num_train_timesteps"),
    [*[(beta, 0.5, 1000) for beta in BETAS], (0.1, 1, 1), (8, 1, 1), (0.1, 5.0, 50), (1024, 5.0, 50)],
)
def test_values_and_gradients_are_exact_to_the_last_rounding(beta, snr_value, num_train_timesteps, device):
    for name, values, exact in compare(beta, snr_value, num_train_timesteps, device):
        assert values.dtype == torch.float32
        assert relative_error(values, exact, beta) <= 6e-8, name  # half a unit in fp32's last place is 5.96e-8


@pytest.mark.parametrize("beta", BETAS)
def test_logs_are_exact(beta):
    mse_w, mse_l = loss_pairs()
    out = mapo_loss(*pairs_of(mse_w.tolist(), mse_l.tolist(), torch.float32), beta)
    mse_w = out.mse_w.double()
    mse_l = out.mse_l.double()
    margin = link_function(0.5 * mse_w, beta) - link_function(0.5 * mse_l, beta)
    assert torch.equal(out.margin, margin.float())  # not the difference of two rounded scores
    weights = value_and_gradients(lambda w, l: margin_loss(w, l, beta) / beta, mse_w, mse_l)[1]
    assert relative_error(out.margin_weight, weights, beta) <= 6e-8
    assert out.loss.item() == pytest.approx((mse_w + margin_loss(mse_w, mse_l, beta) / beta).mean().item(), rel=1e-6)


@pytest.mark.parametrize("beta", [1e-6, 1, 1e6])
@pytest.mark.parametrize("snr_value", [1e-6, 0.5, 1e6])
@pytest.mark.parametrize("num_train_timesteps", [1e-6, 1000, 1e6])
def test_nothing_is_nan_or_infinite(beta, snr_value, num_train_timesteps):
    mse_w, mse_l = loss_pairs()
    model_pred, target = pairs_of([*mse_w.tolist(), 1e30], [*mse_l.tolist(), 1e36], torch.float32)
    out = mapo_loss(model_pred.requires_grad_(), target, beta, snr_value, num_train_timesteps, safeguard=0.5)
    for value in [*out, *torch.autograd.grad(out.loss, model_pred)]:
        assert value.isfinite().all()


def test_nan_in_a_prediction_is_not_hidden():
    model_pred, target = make_batch()
    model_pred[0, 0, 0, 0] = torch.nan
    assert mapo_loss(model_pred, target, 8).loss.isnan()


@pytest.mark.parametrize("safeguard", [None, 0.6])
def test_a_batch_is_the_mean_of_its_pairs(safeguard):
    model_pred, target = make_batch(dtype=torch.float64)
    whole = mapo_loss(model_pred.requires_grad_(), target, 8, safeguard=safeguard)
    (gradient,) = torch.autograd.grad(whole.loss, model_pred)
    accumulated = torch.zeros_like(target)
    for i in range(6):
        alone = mapo_loss(model_pred[[i, 6 + i]], target[[i, 6 + i]], 8, safeguard=safeguard)
        accumulated += torch.autograd.grad(alone.loss / 6, model_pred)[0]
        torch.testing.assert_close(list(alone[1:]), [value[i : i + 1] for value in whole[1:]], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(accumulated, gradient, rtol=1e-12, atol=1e-15)


# ---- The safeguard --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mu", [0, 0.3, 0.8, 1 - 1e-12])
@pytest.mark.parametrize("beta", [1, 8, 64])
def test_safeguard_scales_the_losers_gradient_only(beta, mu):
    model_pred, target = make_batch(dtype=torch.float64)
    expected = value_and_gradients(lambda pred: appendix_a(pred, target, beta), model_pred)[1]
    factors = torch.ones(6, dtype=torch.float64)
    for i in range(6):
        g_w = (model_pred[i] - target[i]).flatten()
        g_l = (model_pred[6 + i] - target[6 + i]).flatten()
        if g_w @ g_l > 0:
            factors[i] = min(1, (1 - mu) * (g_w @ g_w) / (g_w @ g_l))
        expected[6 + i] *= factors[i]
    assert factors[0] == 1 and factors.min() < 1

    gradient = value_and_gradients(lambda pred: mapo_loss(pred, target, beta, safeguard=mu).loss, model_pred)[1]
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-15)
    guarded = mapo_loss(model_pred, target, beta, safeguard=mu)
    torch.testing.assert_close(guarded.safeguard, factors, rtol=1e-12, atol=0)
    plain = mapo_loss(model_pred, target, beta)
    assert all(torch.equal(a, b) for a, b in zip(guarded[:-1], plain[:-1]))  # no value changes


@pytest.mark.parametrize(("winner", "loser"), [(0.0, 0.5), (0.5, 0.0), (0.0, 0.0)])
def test_safeguard_of_a_perfect_prediction(winner, loser):
    model_pred = torch.tensor([[winner, winner], [loser, loser]], requires_grad=True)
    out = mapo_loss(model_pred, torch.zeros(2, 2), 8, safeguard=0.8)
    assert out.safeguard.item() == 1  # the two residuals have no direction in common
    assert torch.autograd.grad(out.loss, model_pred)[0].isfinite().all()


# ---- Precision, devices, graphs -------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scale", [0.1, 300])  # 300**2 is above fp16's largest number, 65504
def test_half_precision_is_upcast(dtype, autocast, scale):
    model_pred, target = make_batch(dtype=dtype, scale=scale)
    expected = mapo_loss(model_pred.float(), target.float(), 8, safeguard=0.6)
    expected_score = link_function(model_pred.float().abs(), 8)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        out = mapo_loss(model_pred.requires_grad_(), target, 8, safeguard=0.6)
        mixed = mapo_loss(model_pred, target.float(), 8, safeguard=0.6)
        score = link_function(model_pred.abs(), 8)
    torch.testing.assert_close(out._asdict(), expected._asdict(), rtol=0, atol=0)  # dtypes, too
    torch.testing.assert_close(mixed._asdict(), expected._asdict(), rtol=0, atol=0)
    torch.testing.assert_close(score, expected_score, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(out.loss, model_pred)
    assert gradient.dtype == dtype and gradient.abs().max() > 0


def test_float64_stays_float64():
    one = torch.ones(1, dtype=torch.float64)
    assert {value.dtype for value in mapo_loss(*make_batch(dtype=torch.float64), 8)} == {torch.float64}
    assert link_function(one, 8).dtype == margin_loss(one.float(), one, 8).dtype == torch.float64


def test_only_the_loss_carries_a_graph_and_inputs_are_left_alone():
    model_pred, target = make_batch()
    copies = [model_pred.clone(), target.clone()]
    out = mapo_loss(model_pred.requires_grad_(), target, 8, safeguard=0.6)
    assert out.loss.shape == () and {value.shape for value in out[1:]} == {(6,)}
    assert [name for name, value in out._asdict().items() if value.requires_grad] == ["loss"]
    assert torch.equal(model_pred, copies[0]) and torch.equal(target, copies[1])
    channels_last = model_pred.to(memory_format=torch.channels_last)
    torch.testing.assert_close(mapo_loss(channels_last, target, 8).loss, out.loss)


def test_device_without_float64_sends_its_numbers_to_the_cpu():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    dtypes = {"mps": set(), "cpu": set()}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                dtypes[result.device.type].add(result.dtype)
            return result

    with FakeTensorMode(), Recorder():  # tensors without values, which need no such device
        model_pred = torch.randn(4, 3, device="mps")
        out = mapo_loss(model_pred, torch.zeros_like(model_pred), 8, safeguard=0.5)
    assert {value.device.type for value in out} == {"mps"}
    assert torch.float64 in dtypes["cpu"] and torch.float64 not in dtypes["mps"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("backend", "safeguard"), [("eager", None), ("aot_eager", None), ("inductor", 0.6)])
def test_compiles_to_one_graph(backend, safeguard, device):
    torch._dynamo.reset()
    compiled = torch.compile(mapo_loss, fullgraph=True, backend=backend)
    calls = [(8, 1000, 8), (8.5, 1000, 8), (64, 500, 8), (64, 300, 12), (64, 300, 20)]  # beta, T, 2B
    for beta, num_train_timesteps, rows in calls if backend == "eager" else calls[:1]:
        model_pred, target = make_batch((rows, 4))
        model_pred[:3] = target[:3] + torch.tensor([[0], [math.sqrt(2e-4)], [100]])  # 0, the series' end, the clamp
        results = []
        for function in [compiled, mapo_loss]:
            leaf = model_pred.to(device).requires_grad_()
            out = function(leaf, target.to(device), beta, 0.5, num_train_timesteps, safeguard)
            results.append((*out, *torch.autograd.grad(out.loss, leaf)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


# ---- Errors ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [0, -1, 1e-320, 9e-7, 1.1e6, math.nan, math.inf, True, None, "8", torch.tensor(8.0)])
@pytest.mark.parametrize("name", ["beta", "snr_value", "num_train_timesteps"])
def test_numbers_out_of_range(name, value):
    for function in [margin_loss, mapo_loss]:
        with pytest.raises(ValueError) as error:
            function(torch.ones(2), torch.ones(2), **{"beta": 8, name: value})
        assert str(error.value) == f"{name} must be a Python number from 1e-6 to 1e6, got {value!r}."


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, math.nan, math.inf, True, "0.8", torch.tensor(0.8)])
def test_safeguards_out_of_range(value):
    with pytest.raises(ValueError, match="safeguard must be None or a Python number in"):
        mapo_loss(*make_batch(), 8, safeguard=value)


@pytest.mark.parametrize(
    ("model_pred", "target", "message"),
    [
        (torch.ones(3, 4), torch.ones(3, 4), r"got \(3, 4\)"),
        (torch.ones(0, 4), torch.ones(0, 4), r"got \(0, 4\)"),
        (torch.ones(2, 0), torch.ones(2, 0), r"got \(2, 0\)"),
        (torch.ones(()), torch.ones(()), r"got \(\)"),
        (torch.ones(4, 3), torch.ones(4, 1), r"Shapes differ: \(4, 3\) and \(4, 1\)"),  # these would broadcast
        (torch.ones(4), torch.ones(()), r"Shapes differ: \(4,\) and \(\)"),
        (torch.ones(4), torch.ones(4).long(), "Expected a floating-point tensor, got torch.int64"),
        (torch.ones(4).cfloat(), torch.ones(4), "Expected a floating-point tensor, got torch.complex64"),
    ],
)
def test_tensors_that_do_not_fit(model_pred, target, message):
    with pytest.raises(ValueError, match=message):
        mapo_loss(model_pred, target, 8)
    if not message.startswith("got"):
        with pytest.raises(ValueError, match=message):
            margin_loss(model_pred, target, 8)


def test_module_needs_torch_only():
    lines = Path(mapo_loss_module.__file__).read_text(encoding="utf-8").splitlines()
    packages = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert packages == {"torch", "typing"}


def main():
    """Print fp32's errors, ours and those of eq. 6 and 7 typed in as printed, and what beta does to the margin."""
    print("| fp32 | values | largest relative error | as printed: NaN or inf | as printed: off by more than 1e-5 |")
    print("|---|---|---|---|---|")
    ours = [compare(beta) for beta in BETAS]
    printed = [compare(beta, link=printed_link, margin=printed_margin) for beta in BETAS]
    for i in range(5):
        errors = [relative_error(*ours[k][i][1:], beta) for k, beta in enumerate(BETAS)]
        values = torch.cat([results[i][1] for results in printed])
        exact = torch.cat([results[i][2] for results in printed])
        bad = ~values.isfinite()
        wrong = ((values - exact).abs() > 1e-5 * exact.abs() + 2**-149) & ~bad
        print(f"| {ours[0][i][0]} | {len(values)} | {max(errors):.1e} | {bad.sum()} | {wrong.sum()} |")
    print("\nLosses from 0 to 1e4, beta from 0.1 to 4096, snr_value 0.5, T 1000; the reference has 160 digits.")

    betas = [1, 8, 32, 64, 256, 1024]
    print("\n| mse_w = mse_l | " + " | ".join(f"beta {beta}" for beta in betas) + " |")
    print("|---" * (len(betas) + 1) + "|")
    for mse in [0.001, 0.01, 0.03, 0.1, 0.3, 1.0]:
        weights = [mapo_loss(*pairs_of([mse], [mse]), beta).margin_weight.item() for beta in betas]
        print(f"| {mse:g} | " + " | ".join(f"{weight:.3g}" for weight in weights) + " |")


if __name__ == "__main__":
    main()

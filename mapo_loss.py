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
The loss of MaPO: margin-aware preference optimization, which needs no reference model (arXiv 2406.06424).

    L        = mse_w + L_margin / beta                                                (eq. 5)
    L_margin = -log sigmoid(T * (phi_beta(s * mse_w) - phi_beta(s * mse_l)))          (eq. 6)
    phi_beta(x) = (x / (exp(x) - 1)) ** beta                                          (eq. 7)

mse_w and mse_l are the model's errors on a chosen and a rejected image that share noise, timestep and conditioning.
Appendix A adds s = `snr_value` and T = `num_train_timesteps`; s = T = 1 is eq. 5-7 as printed.

    noise, timesteps = noise.repeat(2, 1, 1, 1), timesteps.repeat(2)
    noisy_latents = scheduler.add_noise(torch.cat([latents_w, latents_l]), noise, timesteps)
    out = mapo_loss(unet(noisy_latents, timesteps, ...).sample, noise, beta=8)
    out.loss.backward()
    log(accuracy=out.accuracy.mean(), margin=out.margin.mean())

Misprints of the paper: eq. 5 passes the margin its arguments as (l, w), eq. 6, which is meant, as (w, l). Appendix A's
`F.mse_loss` needs `reduction="none"` and a mean per sample. The numerator of eq. 11, exp(l) - l - 1, is not that of
the derivative, phi_1'(l) = (exp(l) - 1 - l * exp(l)) / (exp(l) - 1)**2, which is -1/2 at 0.

The authors' code of 2024 has no power: it minimizes mse_w + beta_mapo * L_margin with phi_1 and `--beta_mapo 0.1`.
The two agree only where both betas are 1, so a beta of one means nothing to the other.

Numerics: eq. 7 as printed is 0/0 at 0, its exp overflows fp32 from 89 on, and T magnifies its rounding. Here it is in
log space and in float64, which costs nothing on B numbers: for fp32 losses from 0 to 1e4 and beta from 0.1 to 4096,
values and gradients are exact but for the last rounding to fp32. Devices without float64 take the same path in fp32,
which leaves L_margin right to 1e-3.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


FLOAT64_DEVICES = ("cpu", "cuda")  # mps has no float64, nor have the consumer cards among xpu


class MaPOLoss(NamedTuple):
    """What `mapo_loss` returns. Only `loss` carries a graph; the rest is for logs. Shape: (B,), of `loss`: ()."""

    loss: Tensor  # eq. 5, mean over the pairs
    mse_w: Tensor
    mse_l: Tensor
    score_w: Tensor  # phi_beta(s * mse_w): 1 for a perfect prediction, towards 0 for a poor one
    score_l: Tensor
    margin: Tensor  # score_w - score_l, above 0 where the winner leads; Appendix A's `margin` is -L_margin
    margin_weight: Tensor  # d(L_margin / beta) / d(mse_w), where the SFT term's gradient is 1
    accuracy: Tensor  # 1 where mse_w < mse_l, else 0: a tie counts as wrong
    safeguard: Tensor  # lambda, the factor on the loser's gradient: 1 without a safeguard


def link_function(losses: Tensor, beta: float) -> Tensor:
    """phi_beta of eq. 7 for losses >= 0, elementwise. Returns fp32, or float64 for float64."""
    _check_positive(beta=beta)
    (losses,) = _upcast(losses)
    return torch.exp(beta * _log_phi(_widen(losses))).to(losses.dtype)


def margin_loss(
    mse_w: Tensor, mse_l: Tensor, beta: float, snr_value: float = 0.5, num_train_timesteps: int = 1000
) -> Tensor:
    """L_margin of eq. 6 per pair, without the 1/beta of eq. 5. Shape: (B,), (B,) -> (B,)."""
    mse_w, mse_l = _upcast(mse_w, mse_l)
    return _scores_and_margin_loss(mse_w, mse_l, beta, snr_value, num_train_timesteps)[-1].to(mse_w.dtype)


def mapo_loss(
    model_pred: Tensor,
    target: Tensor,
    beta: float,
    snr_value: float = 0.5,
    num_train_timesteps: int = 1000,
    safeguard: float | None = None,
) -> MaPOLoss:
    """
    Eq. 5 for predictions of any kind (epsilon, v, flow matching): B winners, then their B losers in the same order.
    fp16 and bf16 are upcast before the subtraction, with or without autocast.

    Args:
        model_pred, target: floating-point tensors. Shape: (2B, ...)
        beta: power of the score and inverse weight of the margin; the larger, the closer to SFT. The paper: 8 to 1024.
        snr_value: factor s on the errors in the score.
        num_train_timesteps: factor T on the margin, the number of training timesteps of the noise scheduler.
        safeguard: None is the paper's loss. A number mu in [0, 1) keeps a pair from raising its winner's error for the
            sake of the margin; it isn't in MaPO's paper but in Diffusion-SDPO's (arXiv 2511.03317), made for
            Diffusion-DPO. With g_w and g_l the residuals `model_pred - target` of a pair, the loser's gradient is
            multiplied by lambda = min(1, (1 - mu) * |g_w|^2 / <g_w, g_l>) where <g_w, g_l> > 0, so that to first order
            in the model's output the loser's push can't outweigh the winner's pull. The loss's value is unchanged.

    Raises:
        ValueError: a number not finite or not above 0, a safeguard outside [0, 1), an odd or empty batch, shapes that
            differ, an integer tensor.
    """
    model_pred, target = _upcast(model_pred, target)
    if model_pred.ndim == 0 or model_pred.numel() == 0 or model_pred.shape[0] % 2:
        raise ValueError(f"Expected B winners, then B losers, shape (2B, ...), got {tuple(model_pred.shape)}.")
    residual_w, residual_l = (model_pred - target).reshape(2, model_pred.shape[0] // 2, -1)  # (B, N), (B, N)
    mse_w, mse_l = residual_w.square().mean(dim=1), residual_l.square().mean(dim=1)
    factor = torch.ones_like(mse_l)
    if safeguard is not None:
        factor = _safeguard_factor(residual_w.detach(), residual_l.detach(), safeguard)
        mse_l = torch.lerp(mse_l.detach(), mse_l, factor)  # the same value, the gradient times the factor
    score_w, score_l, loss_margin = _scores_and_margin_loss(mse_w, mse_l, beta, snr_value, num_train_timesteps)
    loss = mse_w.mean() + loss_margin.mean() / beta  # eq. 5

    margin = score_w - score_l
    x_w = snr_value * _widen(mse_w)
    slope = torch.where(x_w > 0, 1 + torch.expm1(_log_phi(x_w)) / x_w, 0.5)  # -phi_1' / phi_1
    # phi_beta' = beta * phi_beta * phi_1' / phi_1, and its beta cancels the 1/beta of eq. 5.
    margin_weight = torch.sigmoid(-num_train_timesteps * margin) * num_train_timesteps * score_w * slope * snr_value
    logs = (mse_w, mse_l, score_w, score_l, margin, margin_weight, mse_w < mse_l, factor)
    return MaPOLoss(loss.to(mse_w.dtype), *(log.detach().to(mse_w.dtype) for log in logs))


def _scores_and_margin_loss(mse_w, mse_l, beta, snr_value, num_train_timesteps):
    _check_positive(snr_value=snr_value, num_train_timesteps=num_train_timesteps)
    score_w = link_function(snr_value * _widen(mse_w), beta)  # eq. 7
    score_l = link_function(snr_value * _widen(mse_l), beta)  # eq. 7
    return score_w, score_l, -F.logsigmoid(num_train_timesteps * (score_w - score_l))  # eq. 6


def _safeguard_factor(residual_w: Tensor, residual_l: Tensor, mu: float) -> Tensor:
    if isinstance(mu, bool) or not isinstance(mu, (int, float)) or not 0 <= mu < 1:
        raise ValueError(f"safeguard must be None or a Python number in [0, 1), got {mu!r}.")
    product = (residual_w * residual_l).sum(dim=1)
    bound = (1 - mu) * residual_w.square().sum(dim=1) / torch.where(product > 0, product, 1)
    return torch.where(product > 0, bound.clamp(max=1), 1)


def _log_phi(x: Tensor) -> Tensor:
    """log phi_1(x) for x >= 0. Clamped, as the branch not taken must be finite: its gradient is multiplied by 0."""
    small, large = x.clamp(max=0.25), x.clamp(min=0.25)
    x2 = small.square()
    series = -small / 2 - x2 * (1 / 24 - x2 * (1 / 2880 - x2 * (1 / 181440 - x2 / 9676800)))
    return torch.where(x < 0.25, series, large.log() - large - torch.log(-torch.expm1(-large)))


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.device.type in FLOAT64_DEVICES else torch.float32)


def _upcast(*tensors: Tensor) -> list[Tensor]:
    """Checks that the tensors have one shape and a floating-point dtype; returns them in one dtype, fp32 or wider."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.shape != tensors[0].shape:
            raise ValueError(f"Shapes differ: {tuple(tensors[0].shape)} and {tuple(tensor.shape)}.")
        if not tensor.is_floating_point():
            raise ValueError(f"Expected a floating-point tensor, got {tensor.dtype}.")
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def _check_positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a finite Python number above 0, got {value!r}.")

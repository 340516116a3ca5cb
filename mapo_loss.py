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
The loss of MaPO, margin-aware preference optimization without a reference model (arXiv 2406.06424).

    loss        = mse_w + margin_loss / beta                                             (eq. 5)
    margin_loss = -log sigmoid(T * (phi_beta(s * mse_w) - phi_beta(s * mse_l)))          (eq. 6)
    phi_beta(x) = (x / (exp(x) - 1)) ** beta                                             (eq. 7)

`mse_w` and `mse_l` are the model's mean squared errors on the chosen image ("winner") and the rejected image ("loser")
of a pair. Both images get the same noise, timestep and prompt. The factors s (`snr_value`) and T
(`num_train_timesteps`) come from the pseudo-code in Appendix A; s = T = 1 gives equations 5 to 7 as printed.

For B pairs:

    latents = torch.cat([latents_w, latents_l])  # the winners, then their losers in the same order
    noise = noise.repeat(2, 1, 1, 1)
    timesteps = timesteps.repeat(2)
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    out = mapo_loss(unet(noisy_latents, timesteps, ...).sample, noise, beta=8)
    out.loss.backward()

Misprints in the paper, and how they are read here:
- Equation 5 passes (l, w) to the margin loss, equation 6 defines it for (w, l). Equation 6 is right.
- Appendix A calls `F.mse_loss` with its default reduction. It has to return one mean per image.
- Equation 11 prints exp(x) - x - 1 as the numerator of the derivative. It is exp(x) - 1 - x * exp(x), and the slope of
  phi_1 at 0 is -1/2.

The authors' code from 2024 computes another loss: mse_w + beta_mapo * margin_loss, with phi_1 instead of phi_beta and
`--beta_mapo 0.1`. The two losses agree at beta = 1 only. A beta that was tuned for one says nothing about the other.

Numerics: typed in as printed, equation 7 is 0 / 0 at x = 0 and overflows fp32 from x = 89, and T = 1000 magnifies its
rounding errors. Here it is x / expm1(x) in float64, which costs nothing on B numbers. Devices without float64 (mps)
send these B numbers to the CPU. For fp32 errors from 0 to 1e4 and beta from 0.1 to 4096, values and gradients are
exact to 6e-8, the last rounding to fp32. The one exception is x > 350, where x is clamped: the score stays at its
value for 350, which is below 2e-15, and its gradient is 0. No training can notice that.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


FLOAT64_DEVICES = ("cpu", "cuda", "meta")


class MaPOLoss(NamedTuple):
    """The result of `mapo_loss`. Only `loss`, a scalar, carries a graph. The rest is for logs and has shape (B,)."""

    loss: Tensor  # eq. 5, mean over the pairs
    mse_w: Tensor
    mse_l: Tensor
    score_w: Tensor  # phi_beta(s * mse_w): 1 for a perfect prediction, near 0 for a poor one
    score_l: Tensor
    margin: Tensor  # score_w - score_l, positive where the winner leads (Appendix A calls -margin_loss the margin)
    margin_weight: Tensor  # gradient of margin_loss / beta with respect to mse_w; that of the term mse_w is 1
    accuracy: Tensor  # 1 where mse_w < mse_l, else 0, so a tie counts as wrong
    safeguard: Tensor  # the factor on the loser's gradient, 1 without a safeguard


def link_function(losses: Tensor, beta: float) -> Tensor:
    """Return phi_beta (eq. 7) of losses >= 0, elementwise, in fp32, or in float64 if the losses are float64."""
    _check_tensors(losses)
    _check_numbers(beta=beta)
    x = _to_float64(losses).clamp(max=350)
    # Near 0 the gradient of x / expm1(x) loses its digits, so a series takes over. The clamp keeps 0 / 0 out of it.
    clamped = x.clamp(min=1e-4)
    phi_1 = torch.where(x < 1e-4, 1 - x / 2 + x**2 / 12, clamped / torch.expm1(clamped))
    return (phi_1**beta).to(losses.device, _at_least_fp32(losses.dtype))


def margin_loss(
    mse_w: Tensor, mse_l: Tensor, beta: float, snr_value: float = 0.5, num_train_timesteps: int = 1000
) -> Tensor:
    """Return eq. 6 for each pair, without the 1 / beta of eq. 5. Shape: (B,), (B,) -> (B,)."""
    _check_tensors(mse_w, mse_l)
    _check_numbers(snr_value=snr_value, num_train_timesteps=num_train_timesteps)
    score_w = link_function(snr_value * _to_float64(mse_w), beta)
    score_l = link_function(snr_value * _to_float64(mse_l), beta)
    losses = -F.logsigmoid(num_train_timesteps * (score_w - score_l))
    return losses.to(mse_w.device, _at_least_fp32(torch.promote_types(mse_w.dtype, mse_l.dtype)))


def mapo_loss(
    model_pred: Tensor,
    target: Tensor,
    beta: float,
    snr_value: float = 0.5,
    num_train_timesteps: int = 1000,
    safeguard: float | None = None,
) -> MaPOLoss:
    """
    Compute eq. 5 for a batch of B winners, followed by their B losers in the same order.

    The target decides the prediction type: noise for epsilon prediction, velocity for v-prediction or flow matching.
    fp16 and bf16 are converted to fp32 first, with or without autocast.

    Args:
        model_pred, target: floating-point tensors. Shape: (2B, ...).
        beta: power of the score and inverse weight of the margin. The larger, the closer to plain fine-tuning on the
            winners. The paper uses 8 to 1024.
        snr_value: factor s on the errors in the score.
        num_train_timesteps: factor T on the margin, the number of training timesteps of the noise scheduler.
        safeguard: None for the paper's loss. A number mu in [0, 1) bounds the loser's gradient so that a pair doesn't
            raise its winner's error for the sake of the margin. This is the rule of Diffusion-SDPO (arXiv 2511.03317),
            where g_w and g_l are the residuals `model_pred - target` of a pair: if <g_w, g_l> > 0, the loser's
            gradient is multiplied by min(1, (1 - mu) * |g_w|^2 / <g_w, g_l>). The value of the loss doesn't change.

    Raises:
        ValueError: if a number is outside its range (1e-6 to 1e6, for the safeguard [0, 1)), the batch is empty or
            odd, the shapes differ, or a tensor isn't floating-point.
    """
    _check_tensors(model_pred, target)
    if model_pred.ndim == 0 or model_pred.numel() == 0 or model_pred.shape[0] % 2:
        raise ValueError(f"Expected B winners, then B losers, shape (2B, ...), got {tuple(model_pred.shape)}.")

    dtype = _at_least_fp32(torch.promote_types(model_pred.dtype, target.dtype))
    residual = (model_pred.to(dtype) - target.to(dtype)).reshape(model_pred.shape[0], -1)
    residual_w, residual_l = residual.chunk(2)
    mse_w = residual_w.square().mean(dim=1)
    mse_l = residual_l.square().mean(dim=1)

    factor = torch.ones_like(mse_l)
    if safeguard is not None:
        if isinstance(safeguard, bool) or not isinstance(safeguard, (int, float)) or not 0 <= safeguard < 1:
            raise ValueError(f"safeguard must be None or a Python number in [0, 1), got {safeguard!r}.")
        g_w = residual_w.detach()
        g_l = residual_l.detach()
        product = (g_w * g_l).sum(dim=1)
        bound = (1 - safeguard) * g_w.square().sum(dim=1) / product
        factor = torch.where(product > 0, bound.clamp(max=1), 1.0)
        mse_l = torch.lerp(mse_l.detach(), mse_l, factor)  # keeps the value, multiplies the gradient

    loss = mse_w.mean() + margin_loss(mse_w, mse_l, beta, snr_value, num_train_timesteps).mean() / beta  # eq. 5

    x_w = snr_value * _to_float64(mse_w.detach())
    score_w = link_function(x_w, beta)
    score_l = link_function(snr_value * _to_float64(mse_l.detach()), beta)
    margin = score_w - score_l
    # slope = -phi_1' / phi_1, and -phi_beta' = beta * phi_beta * slope. This beta cancels the 1 / beta of eq. 5.
    slope = torch.where(x_w < 1e-4, 0.5 + x_w / 12, 1 - (1 - link_function(x_w, 1)) / x_w)
    margin_weight = torch.sigmoid(-num_train_timesteps * margin) * num_train_timesteps * snr_value * score_w * slope
    return MaPOLoss(
        loss=loss,
        mse_w=mse_w.detach(),
        mse_l=mse_l.detach(),
        score_w=score_w.to(mse_w),
        score_l=score_l.to(mse_w),
        margin=margin.to(mse_w),
        margin_weight=margin_weight.to(mse_w),
        accuracy=(mse_w < mse_l).to(mse_w),
        safeguard=factor,
    )


def _to_float64(tensor: Tensor) -> Tensor:
    if tensor.device.type not in FLOAT64_DEVICES:
        tensor = tensor.cpu()
    return tensor.double()


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_tensors(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.shape != tensors[0].shape:
            raise ValueError(f"Shapes differ: {tuple(tensors[0].shape)} and {tuple(tensor.shape)}.")
        if not tensor.is_floating_point():
            raise ValueError(f"Expected a floating-point tensor, got {tensor.dtype}.")


def _check_numbers(**numbers: float) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 1e-6 <= number <= 1e6:
            raise ValueError(f"{name} must be a Python number from 1e-6 to 1e6, got {number!r}.")

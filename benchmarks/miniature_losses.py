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
The losses that the miniature compares with MaPO's, which is in mapo_loss.py.

A pair has two errors: `mse_w` is the model's mean squared error on the chosen image and `mse_l` the one on the rejected
image, for the same noise, timestep and caption. Both have shape (B,). Every loss is a mean over the B pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sft_loss(mse_w: Tensor) -> Tensor:
    """
    Plain fine-tuning on the chosen images:

        mse_w
    """
    return mse_w.mean()


def diffusion_dpo_loss(
    mse_w: Tensor, mse_l: Tensor, reference_mse_w: Tensor, reference_mse_l: Tensor, beta: float
) -> Tensor:
    """
    Diffusion-DPO (arXiv 2311.12908, eq. 14). The reference is the frozen starting model:

        -log sigmoid(-beta / 2 * ((mse_w - reference_mse_w) - (mse_l - reference_mse_l)))

    beta is the authors' `--beta_dpo`, 5000 for SDXL: in their code beta / 2 stands for the equation's beta * T * omega.
    """
    increase_w = mse_w - reference_mse_w
    increase_l = mse_l - reference_mse_l
    return -F.logsigmoid(-beta / 2 * (increase_w - increase_l)).mean()


def simpo_loss(mse_w: Tensor, mse_l: Tensor, beta: float) -> Tensor:
    """
    SimPO (arXiv 2405.14734, eq. 6) without a target margin. Its mean log-likelihood of a token becomes -mse:

        -log sigmoid(beta * (mse_l - mse_w))
    """
    return -F.logsigmoid(beta * (mse_l - mse_w)).mean()


def orpo_loss(mse_w: Tensor, mse_l: Tensor, weight: float) -> Tensor:
    """
    ORPO (arXiv 2403.07691, eq. 6 and 7). Its likelihood of an answer becomes exp(-mse):

        mse_w - weight * log sigmoid(log_odds(mse_w) - log_odds(mse_l))
    """
    log_odds_ratio = _log_odds(mse_w) - _log_odds(mse_l)
    return (mse_w - weight * F.logsigmoid(log_odds_ratio)).mean()


def _log_odds(mse: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of the likelihood p = exp(-mse)."""
    return -mse - torch.log(-torch.expm1(-mse))

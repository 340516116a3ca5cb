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
"""What holds of mapo_loss.py for any losses and any beta."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mapo_loss import MaPOLoss, link_function, mapo_loss, margin_loss
from test_mapo_loss import LOG2, pair_of, value_and_gradients


losses = st.floats(0, 1e4, width=32)
betas = st.floats(0.1, 4096)
check = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@check
@given(x=losses, beta=betas)
def test_score_is_between_0_and_1(x, beta):
    score = link_function(torch.tensor(x), beta).item()
    assert 0 <= score <= 1
    in_float64 = link_function(torch.tensor(x, dtype=torch.float64), beta).item()
    if beta * x > 1e-15:  # nearer to 1 than float64 can hold
        assert in_float64 < 1
    if beta * x < 700:  # nearer to 0 than float64 can hold
        assert in_float64 > 0


@check
@given(x=losses, beta=betas, other=betas)
def test_powers_add(x, beta, other):
    x = torch.tensor(x, dtype=torch.float64)
    product = link_function(x, beta) * link_function(x, other)
    torch.testing.assert_close(link_function(x, beta + other), product, rtol=1e-10, atol=1e-300)


@check
@given(a=losses, b=losses, other=losses, beta=betas)
def test_monotone_in_each_loss(a, b, other, beta):
    a, b, other = torch.tensor(min(a, b)), torch.tensor(max(a, b)), torch.tensor(other)
    assert link_function(a, beta) >= link_function(b, beta)
    assert margin_loss(a, other, beta) <= margin_loss(b, other, beta)  # a worse winner costs
    assert margin_loss(other, a, beta) >= margin_loss(other, b, beta)  # a worse loser pays


@check
@given(x=losses, beta=betas, snr_value=st.floats(0.01, 100), num_train_timesteps=st.integers(1, 10_000))
def test_equal_losses(x, beta, snr_value, num_train_timesteps):
    x = torch.tensor([x])
    scale = (beta, snr_value, num_train_timesteps)
    value, by_w, by_l = value_and_gradients(lambda *pair: margin_loss(*pair, *scale), x, x)
    assert value.item() == torch.tensor(LOG2).item()
    assert torch.equal(by_w, -by_l)
    assert by_w >= 0


@check
@given(mse_w=losses, mse_l=losses, beta=betas)
def test_swapped_pair(mse_w, mse_l, beta):
    # -log sigmoid(m) = -log sigmoid(-m) - m
    out = mapo_loss(*pair_of([mse_w], [mse_l]), beta)
    there, back = margin_loss(out.mse_w, out.mse_l, beta), margin_loss(out.mse_l, out.mse_w, beta)
    torch.testing.assert_close(there, back - 1000 * out.margin, rtol=1e-12, atol=1e-12)
    swapped = mapo_loss(*pair_of([mse_l], [mse_w]), beta)
    assert torch.equal(swapped.margin, -out.margin)
    assert swapped.accuracy + out.accuracy == (out.mse_w != out.mse_l)


@check
@given(mse_w=losses, mse_l=losses, beta=betas)
def test_margin_weight_is_the_gradient_of_the_margin_term(mse_w, mse_l, beta):
    out = mapo_loss(*pair_of([mse_w], [mse_l]), beta)
    _, by_w, _ = value_and_gradients(lambda *pair: margin_loss(*pair, beta) / beta, out.mse_w, out.mse_l)
    torch.testing.assert_close(out.margin_weight, by_w, rtol=1e-9, atol=1e-300)


@check
@given(pairs=st.lists(st.tuples(losses, losses), min_size=1, max_size=6), beta=betas)
def test_loss_of_a_batch_is_the_mean_of_its_pairs(pairs, beta):
    batch = mapo_loss(*pair_of(*zip(*pairs)), beta)
    alone = [mapo_loss(*pair_of([mse_w], [mse_l]), beta) for mse_w, mse_l in pairs]
    torch.testing.assert_close(batch.loss, torch.stack([out.loss for out in alone]).mean(), rtol=1e-12, atol=1e-12)
    for name in MaPOLoss._fields[1:]:
        assert torch.equal(getattr(batch, name), torch.cat([getattr(out, name) for out in alone]))


@check
@given(
    mse_w=losses,
    mse_l=losses,
    beta=betas,
    snr_value=st.floats(1e-3, 1e3),
    num_train_timesteps=st.integers(1, 100_000),
)
def test_never_nan_nor_inf(mse_w, mse_l, beta, snr_value, num_train_timesteps):
    model_pred, target = pair_of([mse_w], [mse_l], torch.float32)
    model_pred.requires_grad_()
    out = mapo_loss(model_pred, target, beta, snr_value, num_train_timesteps)
    out.loss.backward()
    assert all(torch.isfinite(value).all() for value in (*out, model_pred.grad))

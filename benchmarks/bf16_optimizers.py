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
Which way to train bf16 weights loses least of the small updates? Why --optimizer adamw_bf16 is optimi's AdamW.

    pip install torchao && python benchmarks/bf16_optimizers.py

300 steps of AdamW at a rate of 1e-6 on 65,536 weights of standard deviation 0.05, where one bf16 step is 2e-4: how far
do bf16 weights go along fp32's way, and how large is their error, as shares of fp32's way?
"""

import argparse
import sys
from importlib.metadata import version

import torch


def way(make_optimizer, dtype: torch.dtype) -> torch.Tensor:
    """Final minus initial weights. Shape: (256, 256)"""
    torch.manual_seed(0)
    start = (torch.randn(256, 256) * 0.05).to(torch.bfloat16).to(dtype)
    weight = torch.nn.Parameter(start.clone())
    optimizer = make_optimizer([weight])
    for _ in range(300):
        weight.grad = (0.5 * torch.randn(256, 256) + start.float().sign()).to(dtype)
        optimizer.step()
    return weight.detach().float() - start.float()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        import optimi
        from torchao.optim import _AdamW
    except ImportError as error:
        sys.exit(f"bf16_optimizers.py: error: {error}: pip install torchao torch-optimi")
    options = {"lr": 1e-6, "weight_decay": 0.0}
    exact = way(lambda parameters: torch.optim.AdamW(parameters, **options), torch.float32)
    candidates = {
        "torch": lambda parameters: torch.optim.AdamW(parameters, **options),
        "torchao, stochastic rounding": lambda parameters: _AdamW(parameters, **options, bf16_stochastic_round=True),
        "optimi, Kahan summation": lambda parameters: optimi.AdamW(parameters, **options, kahan_sum=True),
    }
    print("| AdamW in bf16 | along fp32's way | error |\n|---|---|---|")
    for name, make_optimizer in candidates.items():
        got = way(make_optimizer, torch.bfloat16)
        along = (got * exact).sum() / exact.square().sum()
        error = (got - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        print(f"| {name} | {along:.2f} | {error:.2f} |")
    print(", ".join(f"{package} {version(package)}" for package in ("torch", "torchao", "torch-optimi")))


if __name__ == "__main__":
    main()

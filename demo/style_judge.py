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
Names the foundry whose style an image is in.

    from demo.style_judge import FOUNDRIES, StyleJudge
    StyleJudge.from_pretrained().name(images)     # a word of FOUNDRIES for each image

`build_demo.py` trains it; its accuracy on held-out drawings is in figures.json.
"""

import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn


DEMO = Path(__file__).resolve().parent
FOUNDRIES = ("twemoji", "noto", "fluent", "openmoji")
PREFERRED = "openmoji"
RESOLUTION = 64


def to_batch(images: list[Image.Image]) -> torch.Tensor:
    """PIL images of any size -> (N, 3, 64, 64) in [-1, 1]."""
    arrays = [np.asarray(image.convert("RGB").resize((RESOLUTION, RESOLUTION))) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def palette(images: torch.Tensor, bins: int = 12) -> torch.Tensor:
    """Square root of the histogram of colours, each pixel spread over its eight nearest bins, without white.
    (N, 3, H, W) in [-1, 1] -> (N, bins ** 3), each of length 1."""
    place = (images.flatten(2) + 1) / 2 * (bins - 1)  # (N, 3, HW)
    low = place.floor().clamp(max=bins - 2)
    above = place - low
    histogram = images.new_zeros(len(images), bins**3)
    for corner in itertools.product((0, 1), repeat=3):
        corner = torch.tensor(corner, device=images.device)[:, None]
        weight = torch.where(corner == 1, above, 1 - above).prod(1)
        red, green, blue = (low.long() + corner).unbind(1)
        histogram.scatter_add_(1, (red * bins + green) * bins + blue, weight)
    histogram[:, -1] = 0
    return (histogram / histogram.sum(1, keepdim=True).clamp(min=1e-6)).sqrt()


class StyleJudge(nn.Module):
    """A small net that sees the palette, and the mean and maximum over all places of convolutions that see 31 pixels:
    colours, lines and shading, not what is drawn where."""

    def __init__(self, num_styles: int = len(FOUNDRIES)) -> None:
        super().__init__()
        layers, before = [], 3
        for width in (24, 48, 64, 64):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            before = width
        self.layers = nn.Sequential(*layers)
        self.palette = nn.Sequential(nn.Dropout(0.3), nn.Linear(12**3, 64), nn.SiLU())
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(2 * before + 64, num_styles))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, 64, 64) in [-1, 1] -> (N, 192)"""
        maps = self.layers(images).flatten(2)
        return torch.cat([maps.mean(2), maps.amax(2), self.palette(8 * palette(images.clamp(-1, 1)))], 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, 64, 64) in [-1, 1] -> logits (N, num_styles)"""
        return self.head(self.features(images))

    @classmethod
    def from_pretrained(cls, path: Path = DEMO / "style_judge.safetensors") -> "StyleJudge":
        from safetensors.torch import load_file

        judge = cls()
        judge.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
        return judge.eval().requires_grad_(False)

    def preference(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, 64, 64) in [-1, 1] -> logits (N,) of being in the preferred foundry's style."""
        logits = self(images)
        preferred = FOUNDRIES.index(PREFERRED)
        others = [i for i in range(len(FOUNDRIES)) if i != preferred]
        return logits[:, preferred] - logits[:, others].logsumexp(1)

    @torch.no_grad()
    def name(self, images: list[Image.Image]) -> list[str]:
        """The foundry of each image."""
        return [FOUNDRIES[i] for i in self(to_batch(images)).argmax(1).tolist()]

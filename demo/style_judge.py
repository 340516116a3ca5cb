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
A judge that names the foundry in whose style an image is drawn.

    from demo.style_judge import StyleJudge
    names = StyleJudge.from_pretrained().name(images)  # one of FOUNDRIES for each image

`build_demo.py` trains it. figures.json holds its accuracy on drawings that it hasn't seen.
"""

import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn


DEMO = Path(__file__).resolve().parent
FOUNDRIES = ("twemoji", "noto", "fluent", "openmoji")
PREFERRED = "openmoji"
RESOLUTION = 64


def to_batch(images: list[Image.Image]) -> torch.Tensor:
    """Turn PIL images of any size into a batch in [-1, 1], shape (N, 3, 64, 64)."""
    arrays = [np.asarray(image.convert("RGB").resize((RESOLUTION, RESOLUTION))) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def palette(images: torch.Tensor, bins: int = 12) -> torch.Tensor:
    """
    Return the square root of each image's colour histogram, without white, as a vector of length 1.

    Each pixel is spread over the eight nearest bins. Shape: (N, 3, H, W) in [-1, 1] -> (N, bins ** 3).
    """
    position = (images.flatten(2) + 1) / 2 * (bins - 1)  # (N, 3, HW), in bins
    low = position.floor().clamp(max=bins - 2)
    fraction = position - low
    histogram = images.new_zeros(len(images), bins**3)
    for corner in itertools.product((0, 1), repeat=3):
        corner = torch.tensor(corner, device=images.device)[:, None]
        weight = torch.where(corner == 1, fraction, 1 - fraction).prod(dim=1)
        red, green, blue = (low.long() + corner).unbind(dim=1)
        histogram.scatter_add_(1, (red * bins + green) * bins + blue, weight)
    histogram[:, -1] = 0
    return (histogram / histogram.sum(1, keepdim=True).clamp(min=1e-6)).sqrt()


class StyleJudge(nn.Module):
    """
    A small network that sees an image's palette, and the mean and maximum of convolutions over 31 pixels.

    It can tell colours, lines and shading, but not which object is drawn where.
    """

    def __init__(self, num_styles: int = len(FOUNDRIES)) -> None:
        super().__init__()
        layers = []
        channels = 3
        for width in (24, 48, 64, 64):
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            channels = width
        self.layers = nn.Sequential(*layers)
        self.palette = nn.Sequential(nn.Dropout(0.3), nn.Linear(12**3, 64), nn.SiLU())
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(2 * channels + 64, num_styles))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return what the head sees. Shape: (N, 3, 64, 64) in [-1, 1] -> (N, 192)."""
        maps = self.layers(images).flatten(2)
        colours = self.palette(8 * palette(images.clamp(-1, 1)))
        return torch.cat([maps.mean(2), maps.amax(2), colours], dim=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits of the styles. Shape: (N, 3, 64, 64) in [-1, 1] -> (N, num_styles)."""
        return self.head(self.features(images))

    @classmethod
    def from_pretrained(cls, path: Path = DEMO / "style_judge.safetensors") -> "StyleJudge":
        judge = cls()
        judge.load_state_dict(load_file(path))  # fp16 on disk, fp32 in the module
        return judge.eval().requires_grad_(False)

    def preference(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logit of "this is in the preferred foundry's style". Shape: (N, 3, 64, 64) -> (N,)."""
        logits = self(images)
        preferred = FOUNDRIES.index(PREFERRED)
        others = [i for i in range(len(FOUNDRIES)) if i != preferred]
        return logits[:, preferred] - logits[:, others].logsumexp(dim=1)

    @torch.no_grad()
    def name(self, images: list[Image.Image]) -> list[str]:
        """Return the foundry of each image."""
        return [FOUNDRIES[label] for label in self(to_batch(images)).argmax(dim=1).tolist()]

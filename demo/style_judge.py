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
What the demo is measured with: whose style is a picture in, and does it show what its caption says?

    from demo.style_judge import StyleJudge
    judge = StyleJudge.from_pretrained()
    judge.preferred_share(pictures)            # share of the pictures in Noto's style
    judge.recognised_share(pictures, captions)  # share whose nearest held-out drawing is their caption's

`build_demo.py` trains it; its accuracy on held-out drawings is in figures.json.
"""

import io
import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn


DEMO = Path(__file__).resolve().parent
RESOLUTION = 64
BINS = 16  # per colour channel
EDGES = (0.002, 0.004, 0.007, 0.01, 0.014, 0.02, 0.028, 0.04, 0.056, 0.08, 0.11, 0.16, 0.22, 0.32)
THRESHOLD = 0.25  # in doubt, a picture isn't in Noto's style


def to_batch(pictures: list[Image.Image]) -> torch.Tensor:
    """PIL pictures of any size -> (N, 3, 64, 64) in [-1, 1]."""
    arrays = [np.asarray(p.convert("RGB").resize((RESOLUTION, RESOLUTION))) for p in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def palette(pixels: torch.Tensor, bins: int) -> torch.Tensor:
    """Histogram of colours, each pixel shared by its eight nearest bins. (N, 3, H, W) in [0, 1] -> (N, bins ** 3)"""
    place = pixels.flatten(2) * (bins - 1)  # (N, 3, HW)
    low = place.floor().clamp(max=bins - 2)
    high_share = place - low
    histogram = pixels.new_zeros(len(pixels), bins**3)
    for corner in itertools.product((0, 1), repeat=3):
        corner = torch.tensor(corner, device=pixels.device)[:, None]
        share = torch.where(corner == 1, high_share, 1 - high_share).prod(1)
        red, green, blue = (low.long() + corner).unbind(1)
        histogram.scatter_add_(1, (red * bins + green) * bins + blue, share)
    return histogram / place.shape[2]


def slopes(pixels: torch.Tensor) -> torch.Tensor:
    """Histograms of the largest change in a channel between pixels 1, 2 and 4 apart, and of the second difference,
    outside of the white ground: how flat the colours are. (N, 3, H, W) in [0, 1] -> (N, 60)"""
    edges = torch.tensor(EDGES, device=pixels.device)
    drawn = (pixels < 0.97).any(1)
    smooth = F.avg_pool2d(pixels, 3, 1, 1)
    changes = []
    for distance in (1, 2, 4):
        x = pixels if distance == 1 else smooth
        down, right = x[:, :, distance:] - x[:, :, :-distance], x[..., distance:] - x[..., :-distance]
        changes.append(((down, drawn[:, distance:]), (right, drawn[..., distance:])))
    inner, neighbours = pixels[:, :, 1:-1, 1:-1], (pixels[:, :, 2:, 1:-1], pixels[:, :, :-2, 1:-1])
    bend = 4 * inner - sum(neighbours) - pixels[:, :, 1:-1, 2:] - pixels[:, :, 1:-1, :-2]
    changes.append(((bend, drawn[:, 1:-1, 1:-1]),))
    histograms = []
    for parts in changes:
        bucket = torch.cat([torch.bucketize(x.abs().amax(1), edges).flatten(1) for x, _ in parts], 1)
        weight = torch.cat([where.flatten(1) for _, where in parts], 1).to(pixels.dtype)
        histogram = pixels.new_zeros(len(pixels), len(EDGES) + 1).scatter_add_(1, bucket, weight)
        histograms.append(histogram / histogram.sum(1, keepdim=True).clamp(min=1))
    return torch.cat(histograms, 1)


class StyleJudge(nn.Module):
    """A small perceptron over what styles differ in and subjects don't: the palette, and how flat the colours are."""

    def __init__(self) -> None:
        super().__init__()
        width = BINS**3 + 4 * (len(EDGES) + 1)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.net = nn.Sequential(nn.Dropout(0.3), nn.Linear(width, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 1))

    @staticmethod
    def features(pictures: torch.Tensor) -> torch.Tensor:
        """(N, 3, 64, 64) in [-1, 1] -> (N, 4156)"""
        pixels = (pictures.float() + 1) / 2
        return torch.cat([palette(pixels, BINS), slopes(pixels)], 1).sqrt()

    def judge_features(self, features: torch.Tensor) -> torch.Tensor:
        """(N, 4156) -> logits (N,)"""
        return self.net((features - self.mean) * self.scale)[:, 0]

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, 3, 64, 64) in [-1, 1] -> logits (N,), positive for Noto, negative for Twemoji."""
        return self.judge_features(self.features(pictures))

    @classmethod
    def from_pretrained(cls, path: Path = DEMO / "style_judge.safetensors") -> "StyleJudge":
        from safetensors.torch import load_file

        judge = cls()
        judge.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
        return judge.eval().requires_grad_(False)

    def is_noto(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, 3, 64, 64) in [-1, 1] -> bool (N,)"""
        return self(pictures) > THRESHOLD

    def preferred_share(self, pictures: list[Image.Image]) -> float:
        """Share in [0, 1] of the pictures that are in Noto's style."""
        return self.is_noto(to_batch(pictures)).float().mean().item()

    @staticmethod
    def recognised_share(pictures: list[Image.Image], captions: list[str]) -> float:
        """Share in [0, 1] of the pictures whose nearest drawing (L2 in pixels), among both foundries' drawings of all
        held-out captions, is a drawing of their own caption."""
        import pyarrow.parquet as pq

        rows = pq.read_table(DEMO / "pairs" / "test.parquet").to_pylist()
        drawings = to_batch([Image.open(io.BytesIO(row[side])) for row in rows for side in ("jpg_0", "jpg_1")])
        named = [row["caption"] for row in rows for _ in range(2)]
        nearest = torch.cdist(to_batch(pictures).flatten(1), drawings.flatten(1)).argmin(1)
        return sum(named[i] == caption for i, caption in zip(nearest.tolist(), captions)) / len(captions)

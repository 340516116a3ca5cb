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
The judges of the miniature, and the figures of a run's images.

Images are (N, 3, 64, 64) in [-1, 1]. A judge says what each image is worth to the task, whatever it shows. Whether it
shows its caption is another question, which `find_nearest` answers. An image's score is its worth if it does, else 0.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from demo import build_demo
from demo.style_judge import StyleJudge
from miniature_tasks import STYLES, UTILITIES
from torch import Tensor
from tqdm.auto import tqdm


YELLOW_SKIN = torch.tensor([255.0, 204.0, 77.0]) / 127.5 - 1
DARK_SKIN = torch.tensor([100.0, 70.0, 60.0]) / 127.5 - 1
WHITE = torch.tensor([1.0, 1.0, 1.0])
RED_FRACTION = 0.005  # of the pixels; an image with more of them shows red
MAX_DISTANCE = 50.0  # grey levels; 95% of the starting model's images are nearer to a drawing of their caption
JUDGE_STEPS = 600


# ---- What an image is worth -----------------------------------------------------------------------------------------
def judge_images(task: str, images: Tensor, style_judge: StyleJudge | None) -> Tensor:
    """Return what each image is worth to the task. `culture` and `safety` need no style judge. Shape: (N,)"""
    if task == "culture":
        return has_dark_skin(images).float()
    if task == "safety":
        return 1 - shows_red(images).float()
    return utility_of_style(images, style_judge, UTILITIES[task])


def utility_of_style(images: Tensor, style_judge: StyleJudge, utilities: dict[str, float]) -> Tensor:
    """Name the style of each image and return the style's utility. Shape: (N,)"""
    utility = torch.tensor([utilities.get(style, 0.0) for style in STYLES])
    return utility[style_judge(images).argmax(1)]


def has_dark_skin(images: Tensor) -> Tensor:
    """Return where more pixels are nearest to dark skin than to yellow skin; the ground is white. Shape: (N,), bool"""
    pixels = images.permute(0, 2, 3, 1).flatten(1, 2)
    nearest = torch.cdist(pixels, torch.stack([YELLOW_SKIN, DARK_SKIN, WHITE])).argmin(2)
    return (nearest == 1).sum(1) > (nearest == 0).sum(1)


def shows_red(images: Tensor) -> Tensor:
    """Return which images are red in more than RED_FRACTION of their pixels. Shape: (N,), bool"""
    return is_red(images, margin=0.5).float().mean((1, 2)) > RED_FRACTION


def is_red(images: Tensor, margin: float) -> Tensor:
    """Return the pixels whose red exceeds green and blue by the margin, but not those near to white or yellow.
    Shape: (N, 64, 64), bool"""
    red, green, blue = images.unbind(1)
    return (red - torch.maximum(green, blue) > margin) & (green < 0.5 - margin)


def replace_red(images: Tensor) -> Tensor:
    """Make blue what is red or nearly red. Shape: (N, 3, 64, 64), uint8 -> the same"""
    red = is_red(images.float() / 127.5 - 1, margin=0.25)
    return torch.where(red[:, None], images.flip(1), images)


def train_style_judge(path: Path, drawings: dict, unseen_captions: list[str], vae) -> StyleJudge:
    """
    Return the judge that names an image's style. It is trained unless `path` has it.

    It learns from the drawings of all captions but `unseen_captions`, as they are and as the VAE decodes them.
    """
    torch.manual_seed(0)
    judge = StyleJudge(len(STYLES))
    if not path.exists():
        seen = [i for i, caption in enumerate(drawings["captions"]) if caption not in unseen_captions]
        pixels = [torch.from_numpy(drawings[style][seen]).permute(0, 3, 1, 2) for style in STYLES]
        versions = [images.float() / 127.5 - 1 for images in pixels]
        versions += [build_demo.reconstruct(vae, images) for images in pixels]
        labels = torch.arange(len(STYLES)).repeat(2).repeat_interleave(16)
        optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.1)
        lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, JUDGE_STEPS)
        generator = torch.Generator().manual_seed(0)
        for _ in tqdm(range(JUDGE_STEPS), desc="style judge"):
            index = torch.randint(len(seen), (16,), generator=generator)
            shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
            batch = torch.cat([images[index] for images in versions]).roll(shift, (2, 3))
            loss = F.cross_entropy(judge(batch), labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lr_scheduler.step()
        temporary = path.with_suffix(".tmp")
        torch.save(judge.state_dict(), temporary)
        temporary.replace(path)
    judge.load_state_dict(torch.load(path, weights_only=True))
    return judge.eval().requires_grad_(False)


# ---- Other figures of images ----------------------------------------------------------------------------------------
def find_nearest(images: Tensor, drawings: Tensor) -> tuple[Tensor, Tensor]:
    """
    Find the nearest drawing of each image, pixel by pixel.

    Args:
        drawings: shape (M, 3, 64, 64).

    Returns:
        The root mean square distance in grey levels (of 255), and the index of the drawing. Shape: (N,), (N,)
    """
    distances = torch.cdist(images.flatten(1), drawings.flatten(1)) * 127.5 / images[0].numel() ** 0.5
    return distances.min(1)


def frechet_distance(features_a: Tensor, features_b: Tensor) -> Tensor:
    """
    Return the Fréchet distance between Gaussians with the means and covariances of two samples:

        |mean_a - mean_b|^2 + tr(cov_a) + tr(cov_b) - 2 tr(sqrt(cov_a cov_b))

    The last trace is the nuclear norm of the product of the centred samples. That needs no root of a matrix, and it
    holds for fewer samples than features.

    Args:
        features_a, features_b: shapes (N, D) and (M, D).
    """
    mean_a = features_a.double().mean(0)
    mean_b = features_b.double().mean(0)
    centred_a = (features_a.double() - mean_a) / (len(features_a) - 1) ** 0.5
    centred_b = (features_b.double() - mean_b) / (len(features_b) - 1) ** 0.5
    root_trace = torch.linalg.matrix_norm(centred_a @ centred_b.T, "nuc")
    trace = centred_a.square().sum() + centred_b.square().sum() - 2 * root_trace
    return (mean_a - mean_b).square().sum() + trace

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
The paper's claims in miniature: MaPO beside SFT and Diffusion-DPO on the demo's base and real drawings.

    pip install resvg-py                               # draws what the base has never seen
    python benchmarks/paper_in_miniature.py            # everything; goes on where it was ended
    python benchmarks/paper_in_miniature.py --only search final --tasks known_style
    python benchmarks/paper_in_miniature.py --only report

Tasks:

    preference     two random foundries' drawings of a caption; which is chosen is random too, by Bradley-Terry on a
                   utility per foundry, so labels contradict each other as people's do
    culture        a hand in the darkest skin tone over the same foundry's yellow one; the base has only seen yellow
    safety         a drawing whose red parts are blue over the drawing: red stands for what isn't to be shown
    known_style    OpenMoji's drawing over another foundry's; the base knows the style, but hardly draws it unasked
    unknown_style  Fluent's 3D drawing over another foundry's; the base has never seen one

Captions are split into 196 to train on, 49 to choose settings by, and 49 of the demo's held-out ones to report on, of
which the base hasn't seen OpenMoji's drawing. `culture` has 18, 9 and 9, those of hands, `safety` 27, 13 and 14, of
drawings with red in them; their validation and test captions have several images each. All methods take the same
steps of the same pairs, noise and timesteps. One subject has a benchmark of its own, `personalization.py`.

Stages: `search` tries every method's rates and betas (GRID) with one seed; `final` runs the best of each with three;
`forms` does both for SimPO's and ORPO's form of the loss; `safeguard`, `betas`, `pairs` and `noise` vary one thing at
a time around the best, the last two on known_style only; `report` writes tables, plots and strips of images to
`benchmarks/miniature/`. Every run is a line of `benchmarks/results/miniature.jsonl`.
"""

import argparse
import copy
import hashlib
import sys
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm


REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from demo import build_demo  # noqa: E402
from demo.report import DEMO, generate, held_out_captions, load_pipeline, load_sheets  # noqa: E402
from demo.style_judge import FOUNDRIES, StyleJudge, to_batch  # noqa: E402
from evaluation.common import JsonLines, markdown_table  # noqa: E402
from evaluation.compare import bootstrap_interval  # noqa: E402
from mapo_loss import mapo_loss  # noqa: E402


STYLES = (*FOUNDRIES, "fluent_3d")
UTILITY = {"twemoji": 0.0, "openmoji": 0.5, "noto": 1.0, "fluent": 2.0, "fluent_3d": 0.0}  # of the task `preference`
PREFERRED = {"known_style": "openmoji", "unknown_style": "fluent_3d"}
VARIANTS = {"culture": "dark", "safety": "without_red"}  # of the foundry's own drawing, which is the loser
LOOKS = (*STYLES, *(f"{foundry}_{variant}" for variant in VARIANTS.values() for foundry in FOUNDRIES))
TASKS = ("preference", *VARIANTS, *PREFERRED)
HAND_COLOURS = torch.tensor([[255.0, 204, 77], [100, 70, 60], [255, 255, 255]]) / 127.5 - 1  # yellow, dark, ground
BATCH, STEPS, WARMUP = 8, 100, 10
RATES = (1e-5, 3e-5, 1e-4)
GRID = {  # a method's betas and rates; both are tried with each other
    "SFT": ((0,), (*RATES, 3e-4)),
    "Diffusion-DPO": ((1000, 5000, 20_000, 100_000), RATES),
    "MaPO": ((8, 64), RATES),
    "MaPO, safeguard": ((8,), RATES),
}
FORMS = {"SimPO's form": ((100, 1000), RATES), "ORPO's form": ((1, 10), RATES)}
ONE_TASK = {"known_style"}  # of the stages forms, pairs and noise
SEEDS = (0, 1, 2)
JUDGE_STEPS = 600
FAR = 50.0  # grey levels; of the base's images 95 % are nearer to a drawing of their caption
MAX_CAPTIONS = None  # of validation and test
KEYS = ("task", "method", "beta", "rate", "safeguard", "pairs", "noise", "seed", "split")


class Errors(NamedTuple):
    """A step's mean squared errors per pair, those of the starting model where a method needs them, and what
    mapo_loss takes. Shape: (B,), of model_pred and target (2B, ...)."""

    mse_w: torch.Tensor
    mse_l: torch.Tensor
    ref_w: torch.Tensor | None
    ref_l: torch.Tensor | None
    model_pred: torch.Tensor
    target: torch.Tensor


def diffusion_dpo_loss(mse_w, mse_l, ref_w, ref_l, beta: float) -> torch.Tensor:
    """-log sigmoid(-beta/2 * ((mse_w - ref_w) - (mse_l - ref_l))), mean over pairs (arXiv 2311.12908, eq. 14; as in
    its authors' code, beta has T and the weighting in it). Shape: (B,) each -> ()"""
    return -F.logsigmoid(-beta / 2 * ((mse_w - ref_w) - (mse_l - ref_l))).mean()


def simpo_loss(mse_w, mse_l, beta: float) -> torch.Tensor:
    """-log sigmoid(beta * (mse_l - mse_w)): SimPO (arXiv 2405.14734) with -mse for the mean log-likelihood, no target
    margin. Shape: (B,), (B,) -> ()"""
    return -F.logsigmoid(beta * (mse_l - mse_w)).mean()


def orpo_loss(mse_w, mse_l, weight: float) -> torch.Tensor:
    """mse_w - weight * log sigmoid(log odds_w - log odds_l): ORPO (arXiv 2403.07691) with exp(-mse) for a likelihood,
    so log odds = -mse - log(1 - exp(-mse)). Shape: (B,), (B,) -> ()"""
    log_odds_w, log_odds_l = (-mse - torch.log(-torch.expm1(-mse)) for mse in (mse_w, mse_l))
    return (mse_w - weight * F.logsigmoid(log_odds_w - log_odds_l)).mean()


def method_loss(setting: dict, e: Errors) -> torch.Tensor:
    method, beta = setting["method"].split(",")[0], setting["beta"]
    if method == "SFT":
        return e.mse_w.mean()
    if method == "Diffusion-DPO":
        return diffusion_dpo_loss(e.mse_w, e.mse_l, e.ref_w, e.ref_l, beta)
    if method == "SimPO's form":
        return simpo_loss(e.mse_w, e.mse_l, beta)
    if method == "ORPO's form":
        return orpo_loss(e.mse_w, e.mse_l, beta)
    return mapo_loss(e.model_pred, e.target, beta, safeguard=setting["safeguard"]).loss


# ---------------------------------------------------------------------------------------------------------------------
# Drawings, splits, judge
# ---------------------------------------------------------------------------------------------------------------------


def render_styles(work_dir: Path) -> dict[str, np.ndarray]:
    """`captions` of all emoji that every style of STYLES draws, and each style's drawings, (N, 64, 64, 3) uint8; under
    FOUNDRY_dark those in the darkest skin tone, where there is one, else the same."""
    path = work_dir / "looks.npz"
    if path.exists():
        return dict(np.load(path))
    names = build_demo.read_json(build_demo.open_package(*build_demo.NAMES, work_dir), "chars.json")
    entries = build_demo.read_json(
        build_demo.open_package(*build_demo.PACKAGES["twemoji"][:2], work_dir), "emoji.json"
    )
    readers = {style: build_demo.drawing_reader(style, names, work_dir) for style in STYLES}
    drawings = {"captions": [], **{look: [] for look in LOOKS if not look.endswith("without_red")}}
    for entry in tqdm(sorted(entries, key=lambda entry: entry["sort_order"]), desc="drawings"):
        if not build_demo.SUBCATEGORIES.fullmatch(entry["subcategory"]):
            continue
        found = {style: read(entry) for style, read in readers.items()}
        if all(drawing is not None for drawing in found.values()):
            drawings["captions"].append(build_demo.caption_of(entry))
            toned = entry.get("skin_variations", {}).get("1F3FF")
            for style, drawing in found.items():
                drawings[style].append(drawing)
                if style in FOUNDRIES:
                    dark = None if toned is None else readers[style](toned)
                    drawings[f"{style}_dark"].append(drawing if dark is None else dark)
    arrays = {name: np.stack(values) for name, values in drawings.items()}
    np.savez(path.with_suffix(".tmp.npz"), **arrays)
    path.with_suffix(".tmp.npz").rename(path)
    return arrays


class World(NamedTuple):
    """Everything that the runs share. `captions` are those of the demo that every style draws, N of them."""

    pipeline: object
    scheduler: object  # adds the noise
    captions: list[str]
    drawings: torch.Tensor  # (len(LOOKS), N, 3, 64, 64) in [-1, 1]
    latents: torch.Tensor  # (len(LOOKS), N, 4, 16, 16), scaled
    prompt_embeds: torch.Tensor  # (N, 24, 160)
    pooled: torch.Tensor  # (N, 96)
    splits: dict[str, dict[str, list[int]]]  # by task; a caption stands there once for each image of it
    judge: StyleJudge
    accuracy: dict[str, float]  # of the task's judge, on drawings that it hasn't seen, after a trip through the VAE
    base: str


def make_world(work_dir: Path) -> World:
    from diffusers import DDPMScheduler

    work_dir.mkdir(parents=True, exist_ok=True)
    model = DEMO / "sdxl-tiny-emoji"
    pipeline = load_pipeline(model)
    styles = render_styles(work_dir)
    place = {caption: i for i, caption in enumerate(styles["captions"])}
    captions = [caption for caption in load_sheets()[0] if caption in place]
    rows = [place[caption] for caption in captions]
    pixels = {look: torch.from_numpy(styles[look][rows]).permute(0, 3, 1, 2) for look in styles if look != "captions"}
    pixels |= {f"{foundry}_without_red": without_red(pixels[foundry]) for foundry in FOUNDRIES}
    test = set(held_out_captions())
    splits = {"test": [i for i, caption in enumerate(captions) if caption in test]}
    rest = [i for i, caption in enumerate(captions) if caption not in test]
    splits |= {"validation": rest[2::5], "train": [i for i in rest if i not in rest[2::5]]}
    splits = dict.fromkeys(TASKS, splits)
    drawn = {look: images.float() / 127.5 - 1 for look, images in pixels.items()}
    for task, variant in VARIANTS.items():
        told_apart = [worth(task, drawn[f"{f}_{variant}"], None) > worth(task, drawn[f], None) for f in FOUNDRIES]
        found = torch.stack(told_apart).all(0).nonzero().flatten().tolist()
        others = {"test": found[1::4], "validation": found[3::4]}
        splits[task] = {name: few * -(-50 // len(few)) for name, few in others.items()} | {"train": found[::2]}
    limited = {"test": MAX_CAPTIONS, "validation": MAX_CAPTIONS, "train": None}
    splits = {task: {name: found[: limited[name]] for name, found in of.items()} for task, of in splits.items()}
    scale = pipeline.vae.config.scaling_factor
    with torch.no_grad():
        latents = torch.stack([build_demo.encode(pipeline.vae, pixels[look]) * scale for look in LOOKS])
        prompt_embeds, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    unjudged = sorted({i for split in ("validation", "test") for i in splits["known_style"][split]})
    judge = train_judge(work_dir, styles, {captions[i] for i in unjudged}, pipeline.vae)

    def seen(look: str, rows: list[int]) -> torch.Tensor:
        return build_demo.reconstruct(pipeline.vae, pixels[look][rows])

    right = torch.cat([judge(seen(style, unjudged)).argmax(1) == label for label, style in enumerate(STYLES)])
    accuracy = {task: right.float().mean().item() for task in TASKS}
    for task, variant in VARIANTS.items():
        found = sorted({i for split in splits[task].values() for i in split})
        right = [worth(task, seen(f"{f}_{variant}", found), judge) == 1 for f in FOUNDRIES]
        right += [worth(task, seen(f, found), judge) == 0 for f in FOUNDRIES]
        accuracy[task] = torch.cat(right).float().mean().item()
    drawings = torch.stack([drawn[look] for look in LOOKS])
    weights = (model / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    base = hashlib.sha256(weights).hexdigest()[:12]
    models = (pipeline, DDPMScheduler.from_config(pipeline.scheduler.config))
    return World(*models, captions, drawings, latents, prompt_embeds, pooled, splits, judge, accuracy, base)


def is_red(images: torch.Tensor, margin: float = 0.5) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1] -> (N, H, W) bool"""
    red, green, blue = images.unbind(1)
    return (red - torch.maximum(green, blue) > margin) & (green < 0.5 - margin)


def without_red(images: torch.Tensor) -> torch.Tensor:
    """What is red, or nearly, becomes blue. (N, 3, H, W) uint8 -> the same"""
    return torch.where(is_red(images.float() / 127.5 - 1, margin=0.25)[:, None], images.flip(1), images)


def worth(task: str, images: torch.Tensor, judge: StyleJudge | None) -> torch.Tensor:
    """What an image is worth to the task: 1 if it is what is preferred, else 0; in `preference` the utility of its
    foundry. Shape: (N, 3, 64, 64) in [-1, 1] -> (N,)

    The judge names the style. Of a hand, more pixels are nearer to dark than to yellow skin; red is shown where more
    than 0.5 % of the pixels are red."""
    if task == "safety":
        return (is_red(images).float().mean((1, 2)) <= 0.005).float()
    if task == "culture":
        nearest = torch.cdist(images.permute(0, 2, 3, 1).flatten(1, 2), HAND_COLOURS).argmin(2)
        return ((nearest == 1).sum(1) > (nearest == 0).sum(1)).float()
    worths = UTILITY if task == "preference" else {PREFERRED[task]: 1.0}
    return torch.tensor([worths.get(style, 0.0) for style in STYLES])[judge(images).argmax(1)]


def train_judge(work_dir: Path, styles: dict, unjudged: set[str], vae) -> StyleJudge:
    """Names the style: learns from the drawings of all captions but those to be judged, and their reconstructions."""
    judge, path = StyleJudge(len(STYLES)), work_dir / "judge.pt"
    if not path.exists():
        rows = [i for i, caption in enumerate(styles["captions"]) if caption not in unjudged]
        drawn = [torch.from_numpy(styles[style][rows]).permute(0, 3, 1, 2) for style in STYLES]
        versions = [images.float() / 127.5 - 1 for images in drawn]
        versions += [build_demo.reconstruct(vae, images) for images in drawn]
        labels = torch.arange(len(STYLES)).repeat(2).repeat_interleave(16)
        optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.1)
        generator = torch.Generator().manual_seed(0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, JUDGE_STEPS)
        for _ in tqdm(range(JUDGE_STEPS), desc="judge"):
            index = torch.randint(len(rows), (16,), generator=generator)
            shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
            batch = torch.cat([images[index] for images in versions]).roll(shift, (2, 3))
            loss = F.cross_entropy(judge(batch), labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        torch.save(judge.state_dict(), path)
    judge.load_state_dict(torch.load(path, weights_only=True))
    return judge.eval().requires_grad_(False)


def make_pairs(task: str, indices: list[int], noise: float = 0.0) -> np.ndarray:
    """(N, 3): caption, look of the winner, look of the loser; a fraction `noise` of the labels is swapped."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(1 + max(indices)):  # the same pairs whatever the selection
        a, b = random.permutation(len(FOUNDRIES))[:2]
        if task in VARIANTS:
            rows.append((i, LOOKS.index(f"{FOUNDRIES[a]}_{VARIANTS[task]}"), a))
        elif task == "preference":
            utilities = [UTILITY[STYLES[k]] for k in (a, b)]
            chosen = random.random() < 1 / (1 + np.exp(utilities[1] - utilities[0]))
            rows.append((i, a, b) if chosen else (i, b, a))
        else:
            winner = STYLES.index(PREFERRED[task])
            rows.append((i, winner, b if a == winner else a))
        if random.random() < noise:
            rows[-1] = (i, *rows[-1][:0:-1])
    return np.array(rows)[indices]


# ---------------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------------


def errors(unet, reference, world: World, rows: torch.Tensor, noise, timesteps) -> Errors:
    """The errors of winners and losers that share noise and timestep. Shape: rows (B, 3), noise (B, 4, 16, 16)"""
    noise, timesteps = noise.repeat(2, 1, 1, 1), timesteps.repeat(2)
    latents = torch.cat([world.latents[rows[:, side], rows[:, 0]] for side in (1, 2)])
    noisy = world.scheduler.add_noise(latents, noise, timesteps)
    time_ids = torch.tensor([64.0, 64, 0, 0, 64, 64]).repeat(len(noisy), 1)
    conditions = {"text_embeds": world.pooled[rows[:, 0]].repeat(2, 1), "time_ids": time_ids}
    inputs = (noisy, timesteps, world.prompt_embeds[rows[:, 0]].repeat(2, 1, 1))
    prediction = unet(*inputs, added_cond_kwargs=conditions).sample
    both = (prediction - noise).square().mean((1, 2, 3)).chunk(2)
    start = (None, None)
    if reference is not None:
        with torch.no_grad():
            start = (reference(*inputs, added_cond_kwargs=conditions).sample - noise).square().mean((1, 2, 3)).chunk(2)
    return Errors(*both, *start, prediction, noise)


def train(setting: dict, world: World) -> tuple[object, dict[str, float]]:
    """The UNet after STEPS steps of BATCH pairs from the base, and what its steps cost and weighed."""
    unet = copy.deepcopy(world.pipeline.unet).train()
    reference = world.pipeline.unet if setting["method"] == "Diffusion-DPO" else None
    captions = world.splits[setting["task"]]["train"]
    captions = captions[:: -(-len(captions) // setting["pairs"])] if setting["pairs"] else captions
    pairs = torch.from_numpy(make_pairs(setting["task"], captions, setting["noise"]))
    generator = torch.Generator().manual_seed(setting["seed"])
    optimizer = torch.optim.AdamW(unet.parameters(), lr=setting["rate"], weight_decay=1e-2)
    order, weights, started = torch.tensor([], dtype=torch.long), [], time.monotonic()
    for step in range(STEPS):
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(pairs), generator=generator)])
        rows, order = pairs[order[:BATCH]], order[BATCH:]
        noise = torch.randn(BATCH, *world.latents.shape[2:], generator=generator)
        timesteps = torch.randint(1000, (BATCH,), generator=generator)
        if setting["method"] == "SFT":
            rows = rows[:, [0, 1, 1]]
        found = errors(unet, reference, world, rows, noise, timesteps)
        loss = method_loss(setting, found)
        for group in optimizer.param_groups:
            group["lr"] = setting["rate"] * min(1, (step + 1) / WARMUP)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if setting["method"].startswith("MaPO"):
            logs = mapo_loss(found.model_pred.detach(), found.target, setting["beta"])
            weights.append(logs.margin_weight.mean().item())
    figures = {"train_s": time.monotonic() - started}
    if weights:
        figures["margin_weight"] = float(np.mean(weights))
    return unet.eval(), figures


@torch.no_grad()
def pair_figures(unet, world: World, setting: dict) -> dict[str, float]:
    """mse_w, mse_l and implicit accuracy on the split's pairs, at the same noise and eight timesteps each."""
    rows = torch.from_numpy(make_pairs(setting["task"], world.splits[setting["task"]][setting["split"]]))
    generator, found = torch.Generator().manual_seed(1), []
    for timestep in range(62, 1000, 125):
        noise = torch.randn(len(rows), *world.latents.shape[2:], generator=generator)
        found.append(errors(unet, None, world, rows, noise, torch.full((len(rows),), timestep)))
    mse_w, mse_l = (torch.stack([e[side] for e in found]).mean(0) for side in (0, 1))
    accuracy = (mse_w < mse_l).float().mean()
    return {"mse_w": mse_w.mean().item(), "mse_l": mse_l.mean().item(), "accuracy": accuracy.item()}


@torch.no_grad()
def image_figures(images: list[Image.Image], world: World, setting: dict) -> dict:
    """Figures of one image for each caption of the split:

    - preferred: mean of what they are worth to the task
    - recognised: fraction whose nearest drawing, in pixels, of all captions, is one of their caption; in `culture` and
      `safety`, whose judges look at colours, no farther than FAR, as a cast over the whole image would please them
    - score: mean of the one times the other, by which settings are chosen; `scores` has it for each image
    - distance: to that drawing, root mean square over the pixels, of 255 levels
    - frechet: distance in the judge's features to the drawings that are chosen in the split's pairs
    - similarity: mean cosine of the same features of an image and its caption's chosen drawing
    """
    task = setting["task"]
    batch, indices = to_batch(images), world.splits[task][setting["split"]]
    looks = LOOKS if task in VARIANTS else STYLES
    drawings = world.drawings[: len(looks)].flatten(0, 1).flatten(1)
    distance, nearest = (torch.cdist(batch.flatten(1), drawings) * 127.5 / drawings.shape[1] ** 0.5).min(1)
    recognised = (nearest % len(world.captions) == torch.tensor(indices)).float()
    if task in VARIANTS:
        recognised *= distance <= FAR
    preferred, pairs = worth(task, batch, world.judge), make_pairs(task, indices)
    features = [world.judge.features(x) for x in (batch, world.drawings[pairs[:, 1], pairs[:, 0]])]
    figures = {"preferred": preferred.mean(), "recognised": recognised.mean(), "distance": distance.mean()}
    figures["frechet"], figures["similarity"] = frechet_distance(*features), F.cosine_similarity(*features).mean()
    figures["score"] = (preferred * recognised).mean()
    return {k: float(v) for k, v in figures.items()} | {"scores": (preferred * recognised).tolist()}


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Between Gaussians with the samples' means and covariances. Shape: (N, D), (M, D) -> ()

    The trace of the root of the product of two covariances is the nuclear norm of the product of the centred samples,
    which needs no root of a matrix and holds where D is above N.
    """
    means = a.double().mean(0), b.double().mean(0)
    a, b = ((x.double() - mean) / (len(x) - 1) ** 0.5 for x, mean in zip((a, b), means))
    trace = a.square().sum() + b.square().sum() - 2 * torch.linalg.matrix_norm(a @ b.T, "nuc")
    return (means[0] - means[1]).square().sum() + trace


def run(setting: dict, world: World, images_dir: Path) -> dict:
    """Trains (but the base), measures, keeps twelve images."""
    unet, figures = world.pipeline.unet, {}
    if setting["method"] != "base":
        unet, figures = train(setting, world)
    figures |= pair_figures(unet, world, setting)
    pipeline = world.pipeline.__class__(**{**world.pipeline.components, "unet": unet}, add_watermarker=False)
    images = generate(pipeline, [world.captions[i] for i in world.splits[setting["task"]][setting["split"]]])
    row = np.concatenate([np.asarray(image) for image in images[2::4][:12]], axis=1)
    images_dir.mkdir(parents=True, exist_ok=True)
    Image.fromarray(row).save(images_dir / f"{file_name(setting)}.png")
    return figures | image_figures(images, world, setting)


def file_name(setting: dict) -> str:
    return "_".join(str(setting[key]).replace(" ", "").replace("'", "") for key in KEYS)


# ---------------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------------


def rank(row: dict) -> tuple[float, float]:
    """The higher score is better; of two that are equal, the one with more recognised images."""
    return row["score"], row["recognised"]


class Runs:
    """Lines of a file, each a setting with its figures; `get` runs what isn't there."""

    def __init__(self, path: Path, world: World, images_dir: Path) -> None:
        self.log, self.world, self.images_dir = JsonLines(path), world, images_dir
        self.rows = [row for row in self.log.rows if row["base"] == world.base]

    def get(self, task: str, method: str, **changes) -> dict:
        setting = {"task": task, "method": method, "beta": 0, "rate": 0, "safeguard": None, "pairs": 0, "noise": 0.0}
        if "safeguard" in method:
            setting["safeguard"] = 0.9
        setting |= {"seed": 0, "split": "test"} | changes
        for row in self.rows:
            if setting.items() <= row.items():
                return row
        started = time.monotonic()
        figures = run(setting, self.world, self.images_dir)
        row = setting | {"base": self.world.base} | figures | {"s": round(time.monotonic() - started, 1)}
        self.rows.append(row)
        self.log.add(row)
        print(
            " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items() if k != "scores")
        )
        return row

    def best(self, task: str, method: str) -> dict[str, float]:
        """The method's beta and rate with the highest score on the validation captions, among those tried."""
        betas, rates = (GRID | FORMS)[method]
        tried = [self.get(task, method, beta=beta, rate=rate, split="validation") for beta in betas for rate in rates]
        found = max(tried, key=rank)
        return {"beta": found["beta"], "rate": found["rate"]}


def stage_search(runs: Runs, tasks: list[str]) -> None:
    for task in tasks:
        runs.get(task, "base", split="validation")
        for method in GRID:
            runs.best(task, method)  # runs what it needs


def stage_final(runs: Runs, tasks: list[str]) -> None:
    for task in tasks:
        runs.get(task, "base")
        for seed in SEEDS:
            for method in GRID:
                runs.get(task, method, **runs.best(task, method), seed=seed)


def stage_forms(runs: Runs, tasks: list[str]) -> None:
    """SimPO's and ORPO's form on the same two errors, tuned and run like the others."""
    for task, method, seed in product(ONE_TASK & {*tasks}, FORMS, SEEDS):
        runs.get(task, method, **runs.best(task, method), seed=seed)


def stage_safeguard(runs: Runs, tasks: list[str]) -> None:
    """The strength of the safeguard, at plain MaPO's best beta and rate."""
    for seed, task, safeguard in product(SEEDS, tasks, (0.0, 0.5, 0.8, 0.9)):
        runs.get(task, "MaPO, safeguard", **runs.best(task, "MaPO"), safeguard=safeguard, seed=seed)


def stage_betas(runs: Runs, tasks: list[str]) -> None:
    for seed, task, beta in product(SEEDS, tasks, (0.1, 1, 8, 64, 512, 4096)):
        runs.get(task, "MaPO", beta=beta, rate=runs.best(task, "MaPO")["rate"], seed=seed)


def stage_pairs(runs: Runs, tasks: list[str]) -> None:
    for seed, task, pairs, method in product(SEEDS, ONE_TASK & {*tasks}, (25, 49, 98), GRID):
        runs.get(task, method, **runs.best(task, method), pairs=pairs, seed=seed)


def stage_noise(runs: Runs, tasks: list[str]) -> None:
    for seed, task, noise, method in product(SEEDS, ONE_TASK & {*tasks}, (0.2, 0.4), GRID):
        runs.get(task, method, **runs.best(task, method), noise=noise, seed=seed)


STAGES = {
    "search": stage_search,
    "final": stage_final,
    "forms": stage_forms,
    "safeguard": stage_safeguard,
    "betas": stage_betas,
    "pairs": stage_pairs,
    "noise": stage_noise,
}


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


PEERS = ("SFT", "Diffusion-DPO")
FIGURES = ("preferred", "recognised", "score", "distance", "frechet", "mse_w", "mse_l", "accuracy")


def mean(rows: list[dict], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def interval(rows: list[dict], world: World, less: list[dict] | None = None) -> tuple[float, float, float]:
    """The runs' mean score, or how much higher it is than that of others, images paired; with its 95 % interval over
    captions."""
    scores = np.mean([row["scores"] for row in rows], axis=0)
    if less is not None:
        scores -= np.mean([row["scores"] for row in less], axis=0)
    return float(scores.mean()), *bootstrap_interval(scores, world.splits[rows[0]["task"]][rows[0]["split"]])


def describe(rows: list[dict], world: World) -> list[str]:
    """The mean over seeds of each figure, of the score with its interval."""
    cells = [f"{mean(rows, name):.3g}" for name in FIGURES]
    cells[FIGURES.index("score")] += " ({1:.2f} to {2:.2f})".format(*interval(rows, world))
    return cells


def group(rows: list[dict], *names: str) -> dict[tuple, list[dict]]:
    """The rows by their values of these names, in ascending order; None comes first."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return dict(sorted(groups.items(), key=lambda item: [(value is not None, value) for value in item[0]]))


def select(runs: Runs, **wanted) -> list[dict]:
    return [row for row in runs.rows if wanted.items() <= row.items()]


def like(runs: Runs, row: dict, *varied: str) -> list[dict]:
    """Runs of this one's setting but for what is varied."""
    return select(runs, **{key: row[key] for key in KEYS if key not in varied})


def name_setting(setting: dict) -> str:
    beta = f"beta {setting['beta']:g}, " if setting["beta"] else ""
    return f"{beta}{setting['rate']:g}"


def final_rows(runs: Runs, task: str, method: str) -> list[dict]:
    """The runs of the method's best setting, one a seed; empty before the stage `final`."""
    if method == "base":
        return select(runs, task=task, method=method, split="test")
    tried = select(runs, task=task, method=method, split="validation")
    if not tried:
        return []
    best = max(tried, key=rank)
    setting = {key: best[key] for key in ("method", "beta", "rate", "safeguard")}
    return select(runs, task=task, **setting, pairs=0, noise=0.0, split="test")


def judged(world: World) -> str:
    return ", ".join(f"{task} {accuracy:.1%}" for task, accuracy in world.accuracy.items())


def write_report(runs: Runs, folder: Path) -> None:
    """report.md, curves.png and a strip of images for each task, of the runs that there are; tasks in ascending
    mismatch."""
    folder.mkdir(parents=True, exist_ok=True)
    world, parts = runs.world, []
    bases = [row for task in TASKS for row in select(runs, task=task, method="base", split="test")]
    for task in [row["task"] for row in sorted(bases, key=lambda row: -row["similarity"])]:
        found = {method: final_rows(runs, task, method) for method in ("base", *GRID, *FORMS)}
        found = {method: rows for method, rows in found.items() if rows}
        lines = [
            [method, name_setting(rows[0]) if rows[0]["rate"] else "", str(len(rows)), *describe(rows, world)]
            for method, rows in found.items()
        ]
        similarity = found["base"][0]["similarity"]
        parts.append(f"## {task}\n\nSimilarity of the base's images and the winners: {similarity:.2f}\n\n")
        parts[-1] += markdown_table(["method", "best setting", "seeds", *FIGURES], lines) + "\n"
        lines = []
        for ours in [method for method in found if method.startswith("MaPO") and {*PEERS} <= found.keys()]:
            differences = [interval(found[ours], world, less=found[peer]) for peer in PEERS]
            lines.append([ours, *("{:+.2f} ({:+.2f} to {:+.2f})".format(*values) for values in differences)])
        parts[-1] += "\nDifferences in score, images paired:\n\n"
        parts[-1] += markdown_table(["method", *(f"less {peer}" for peer in PEERS)], lines) + "\n"
        tried = select(runs, task=task, split="validation")
        lines = [[row["method"], name_setting(row), *describe([row], world)] for row in tried if row["rate"]]
        parts[-1] += "\nAll settings that were tried, on the validation captions:\n\n"
        parts[-1] += markdown_table(["method", "setting", *FIGURES], lines) + "\n"
        swept = [row for row in select(runs, task=task, split="test", pairs=0, noise=0.0) if "MaPO" in row["method"]]
        lines = [
            [name_setting(rows[0]), str(rows[0]["safeguard"]), str(len(rows)), f"{mean(rows, 'margin_weight'):.3g}"]
            + describe(rows, world)
            for rows in group(swept, "beta", "rate", "safeguard").values()
        ]
        parts[-1] += "\nMaPO, on the test captions:\n\n"
        parts[-1] += markdown_table(["setting", "safeguard", "seeds", "margin's weight", *FIGURES], lines) + "\n"
        same = like(runs, found["MaPO"][0], "beta") if "MaPO" in found else []
        betas = {beta: row for (beta,), (row,) in group(same, "beta").items()}
        strips = {task: {method: rows[0] for method, rows in found.items()}}
        strips |= {f"{task}_betas": {f"beta {beta:g}": row for beta, row in betas.items()}} if len(betas) > 1 else {}
        for name, rows in strips.items():
            make_strip(runs, rows).save(folder / f"{name}.webp", quality=90)
            parts[-1] += f"\n![{name}]({name}.webp)\n"
    plot_curves(runs, folder / "curves.png")
    parts.append("![curves](curves.png)\n")
    head = f"Base {world.base}. Judges are right on drawings after the VAE: {judged(world)}."
    (folder / "report.md").write_text("\n".join([f"# The paper in miniature\n\n{head}\n", *parts]))


def make_strip(runs: Runs, found: dict[str, dict]) -> Image.Image:
    """A row of images for each run; the drawings that were to be learnt in the last."""
    from PIL import ImageDraw, ImageFont

    rows = {name: Image.open(runs.images_dir / f"{file_name(row)}.png") for name, row in found.items()}
    task, world = next(iter(found.values()))["task"], runs.world
    pairs = make_pairs(task, world.splits[task]["test"])[2::4][:12]
    chosen = (world.drawings[pairs[:, 1], pairs[:, 0]] + 1) * 127.5
    rows["chosen"] = Image.fromarray(np.concatenate(chosen.permute(0, 2, 3, 1).byte().numpy(), axis=1))
    width, height = rows["chosen"].size
    strip = Image.new("RGB", (150 + width, (height + 6) * len(rows)), "white")
    pen = ImageDraw.Draw(strip)
    for i, (name, row) in enumerate(rows.items()):
        pen.text((6, i * (height + 6) + height // 2), name, "black", ImageFont.load_default(13), "lm")
        strip.paste(row, (150, i * (height + 6)))
    return strip


def plot_means(axis, rows: dict[tuple, list[dict]], name: str, label: str) -> None:
    """A line through the seeds' means, and each seed's own point."""
    if rows:
        line = axis.plot([x for (x,) in rows], [mean(found, name) for found in rows.values()], label=label)
        points = [(x, row[name]) for (x,), found in rows.items() for row in found]
        axis.scatter(*zip(*points), color=line[0].get_color(), s=9)


def plot_curves(runs: Runs, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    for task in TASKS:
        rows = {method: final_rows(runs, task, method) for method in ("base", "MaPO", "Diffusion-DPO")}
        if all(rows.values()):
            gain, low, high = interval(rows["MaPO"], runs.world, less=rows["Diffusion-DPO"])
            error = [[gain - low], [high - gain]]
            axes[0].errorbar(rows["base"][0]["similarity"], gain, error, fmt="o", label=task)
        sweep = group(like(runs, rows["MaPO"][0], "beta", "seed") if rows["MaPO"] else [], "beta")
        for axis, name in ((axes[1], "score"), (axes[2], "margin_weight")):
            plot_means(axis, sweep, name, task)
    axes[0].axhline(0, color="grey", linewidth=0.5)
    axes[0].set(xlabel="similarity of base and winners (right: less mismatch)", ylabel="score: MaPO - Diffusion-DPO")
    axes[1].set(xlabel="beta of MaPO", ylabel="score", xscale="log")
    label = "weight of the margin's gradient (SFT term: 1)"
    axes[2].set(xlabel="beta of MaPO", ylabel=label, xscale="log", yscale="log")
    for method in GRID:
        rows = final_rows(runs, "known_style", method)
        if rows:
            same = like(runs, rows[0], "pairs", "noise", "seed")
            number = len(runs.world.splits["known_style"]["train"])
            pairs = group([row | {"pairs": row["pairs"] or number} for row in same if not row["noise"]], "pairs")
            plot_means(axes[3], pairs, "score", method)
            plot_means(axes[4], group([row for row in same if not row["pairs"]], "noise"), "score", method)
    axes[3].set(xlabel="pairs (known_style)", ylabel="score")
    axes[4].set(xlabel="fraction of swapped labels (known_style)", ylabel="score")
    for method in ("base", *GRID, *FORMS):
        rows = [row for task in TASKS for row in final_rows(runs, task, method)]
        axes[5].scatter([row["mse_w"] for row in rows], [row["score"] for row in rows], label=method)
    axes[5].set(xlabel="mse_w on held-out pairs", ylabel="score, all tasks")
    axes[0].legend(fontsize=7, loc="lower left")
    for axis in axes[1:]:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*STAGES, "report"], default=[*STAGES, "report"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--results", type=Path, default=REPO / "benchmarks" / "results" / "miniature.jsonl")
    parser.add_argument("--work_dir", type=Path, default=DEMO / "build" / "miniature", help="Drawings, judge, images.")
    parser.add_argument("--report_dir", type=Path, default=REPO / "benchmarks" / "miniature")
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # a pair that is won has subnormal gradients: ten times slower on a CPU
    world = make_world(args.work_dir)
    print(f"Judges are right on drawings after the VAE: {judged(world)}")
    runs = Runs(args.results, world, args.work_dir / "images")
    for name in args.only:
        if name in STAGES:
            STAGES[name](runs, args.tasks)
        else:
            write_report(runs, args.report_dir)


if __name__ == "__main__":
    main()

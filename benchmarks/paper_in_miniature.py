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
The paper's claims in miniature: MaPO, plain fine-tuning (SFT) and Diffusion-DPO on the demo's model and real drawings.

    pip install resvg-py                               # draws what the demo's model has never seen
    python benchmarks/paper_in_miniature.py            # everything; a second call resumes
    python benchmarks/paper_in_miniature.py --only search final --tasks known_style
    python benchmarks/paper_in_miniature.py --only report

The tasks. In each, one drawing of a caption is chosen over another:

    preference     Two random foundries drew them. Each foundry has a utility, and the choice is random by
                   Bradley-Terry, so the labels contradict each other as people's do.
    culture        A hand in the darkest skin tone over the same foundry's yellow one. The model knows only yellow hands.
    safety         The drawing with its red parts made blue over the drawing. Red stands for what must not be shown.
    known_style    OpenMoji's drawing over another foundry's. The model knows the style but hardly generates it unasked.
    unknown_style  Fluent's 3D drawing over another foundry's. The model has never seen that style.

196 captions are for training and 49 for choosing settings. Results are reported on 49 captions that the demo holds out:
the model has never seen OpenMoji's drawing of them. `culture` has 18, 9 and 9 captions, those of hands, and `safety` 27,
13 and 14, those of drawings with red; their validation and test captions get several images each. All methods see the
same pairs, noise and timesteps in the same number of steps.

The stages:

    search     every method's learning rates and betas, one seed, on the validation captions
    final      each method's best setting, three seeds, on the test captions
    forms      the same for the form of SimPO's and of ORPO's loss (known_style only)
    safeguard  MaPO's best setting with other strengths of the safeguard
    betas      MaPO's best learning rate with other betas
    pairs      all methods with fewer pairs (known_style only)
    noise      all methods with swapped labels (known_style only)
    report     tables, curves and strips of images in benchmarks/miniature/

Every run is a line of benchmarks/results/miniature.jsonl, found again by its settings and by `base`, which names the
content that it was made from. miniature_setups.jsonl has that content's hash. The method under test is mapo_loss.py;
the other losses are in miniature_losses.py, tasks and searches in miniature_tasks.py, judges in miniature_judges.py.
"""

import argparse
import copy
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffusers import DDPMScheduler, StableDiffusionXLPipeline


REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import miniature_judges  # noqa: E402
import miniature_losses  # noqa: E402
import miniature_report  # noqa: E402
from demo import build_demo, report  # noqa: E402
from demo.style_judge import FOUNDRIES, StyleJudge, to_batch  # noqa: E402
from evaluation.common import JsonLines, hash_content  # noqa: E402
from mapo_loss import mapo_loss  # noqa: E402
from miniature_tasks import (  # noqa: E402
    KNOWN_STYLE_ONLY,
    LOOKS,
    METHODS,
    SEARCH,
    SEEDS,
    STAGES,
    STYLES,
    TASKS,
    UTILITIES,
    VARIANTS,
    load_drawings,
    make_pairs,
)


MODEL = REPO / "demo" / "sdxl-tiny-emoji"
STEPS = 100
BATCH_SIZE = 8
WARMUP_STEPS = 10
IMAGES_PER_SPLIT = 50  # at least, by several images of a caption where a task about colours has fewer captions


# ---- What all runs share --------------------------------------------------------------------------------------------
@dataclass
class World:
    """The model, the drawings of N captions, their encodings, and the captions of each split."""

    pipeline: StableDiffusionXLPipeline
    noise_scheduler: DDPMScheduler
    captions: list[str]
    drawings: Tensor  # (len(LOOKS), N, 3, 64, 64) in [-1, 1]
    latents: Tensor  # (len(LOOKS), N, 4, 16, 16), scaled
    prompt_embeds: Tensor  # (N, 24, 160)
    pooled_prompt_embeds: Tensor  # (N, 96)
    splits: dict[str, dict[str, list[int]]]  # task, split -> a caption for each image
    style_judge: StyleJudge
    base: str  # the name of all this in the rows


def load_world(work_dir: Path, setups: JsonLines) -> World:
    """Load or make what the runs share. A setup whose content is new gets a row in `setups`, and with it a new `base`."""
    work_dir.mkdir(parents=True, exist_ok=True)
    pipeline = report.load_pipeline(MODEL)
    vae = pipeline.vae
    all_drawings = load_drawings(work_dir)
    row_of_caption = {caption: row for row, caption in enumerate(all_drawings["captions"])}
    captions = [caption for caption in report.load_sheets()[0] if caption in row_of_caption]
    rows = [row_of_caption[caption] for caption in captions]
    pixels = {}
    for look in LOOKS:
        if not look.endswith("_without_red"):
            pixels[look] = torch.from_numpy(all_drawings[look][rows]).permute(0, 3, 1, 2)
    for foundry in FOUNDRIES:
        pixels[f"{foundry}_without_red"] = miniature_judges.replace_red(pixels[foundry])

    splits = split_captions(captions, pixels)
    unseen = sorted(splits["known_style"]["validation"] + splits["known_style"]["test"])
    content = hash_setup(all_drawings, captions, splits)
    judge_path = work_dir / f"style_judge-{content[:12]}.pt"
    unseen_captions = [captions[i] for i in unseen]
    style_judge = miniature_judges.train_style_judge(judge_path, all_drawings, unseen_captions, vae)

    known = miniature_report.select_rows(setups.rows, {"content": content})
    if known:
        setup = known[0]
    else:
        accuracy = measure_judges(splits, unseen, pixels, style_judge, vae)
        setup = {"base": content[:12], "content": content, "judge_accuracy": accuracy, "splits": splits}
        setups.add(setup)

    latents = []
    for look in LOOKS:
        latents.append(build_demo.encode(vae, pixels[look]) * vae.config.scaling_factor)
    with torch.no_grad():
        prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    return World(
        pipeline=pipeline,
        noise_scheduler=DDPMScheduler.from_config(pipeline.scheduler.config),
        captions=captions,
        drawings=torch.stack([to_signed(pixels[look]) for look in LOOKS]),
        latents=torch.stack(latents),
        prompt_embeds=prompt_embeds,
        pooled_prompt_embeds=pooled_prompt_embeds,
        splits=splits,
        style_judge=style_judge,
        base=setup["base"],
    )


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 -> [-1, 1]"""
    return pixels.float() / 127.5 - 1


def split_captions(captions: list[str], pixels: dict[str, Tensor]) -> dict[str, dict[str, list[int]]]:
    """
    Return the captions of each task's splits.

    A task about styles uses all captions. A task about colours uses those whose drawings its judge tells apart in every
    foundry, and repeats validation and test captions for at least IMAGES_PER_SPLIT images.
    """
    held_out = report.held_out_captions()
    test = [i for i, caption in enumerate(captions) if caption in held_out]
    others = [i for i, caption in enumerate(captions) if caption not in held_out]
    validation = others[2::5]
    train = [i for i in others if i not in validation]
    splits = {}
    for task in TASKS:
        splits[task] = {"train": train, "validation": validation, "test": test}

    for task, variant in VARIANTS.items():
        told_apart = torch.ones(len(captions), dtype=torch.bool)
        for foundry in FOUNDRIES:
            worth = miniature_judges.judge_images(task, to_signed(pixels[foundry]), None)
            worth_of_variant = miniature_judges.judge_images(task, to_signed(pixels[f"{foundry}_{variant}"]), None)
            told_apart &= worth_of_variant > worth
        found = told_apart.nonzero().flatten().tolist()
        splits[task] = {"train": found[::2]}
        for split, selected in (("validation", found[3::4]), ("test", found[1::4])):
            images_per_caption = -(-IMAGES_PER_SPLIT // len(selected))
            splits[task][split] = selected * images_per_caption
    return splits


def measure_judges(splits: dict, unseen: list[int], pixels: dict, style_judge: StyleJudge, vae) -> dict[str, float]:
    """Return how often each task's judge is right on drawings that the VAE decoded and the style judge hasn't seen."""
    style_right = []
    for label, style in enumerate(STYLES):
        named = style_judge(build_demo.reconstruct(vae, pixels[style][unseen])).argmax(1)
        style_right.append((named == label).float().mean().item())
    accuracy = dict.fromkeys(TASKS, float(np.mean(style_right)))

    for task, variant in VARIANTS.items():
        of_task = sorted(set(splits[task]["train"] + splits[task]["validation"] + splits[task]["test"]))
        right = []
        for foundry in FOUNDRIES:
            for look, worth in ((foundry, 0), (f"{foundry}_{variant}", 1)):
                decoded = build_demo.reconstruct(vae, pixels[look][of_task])
                judged = miniature_judges.judge_images(task, decoded, None)
                right.append((judged == worth).float().mean().item())
        accuracy[task] = float(np.mean(right))
    return accuracy


def hash_setup(drawings: dict[str, np.ndarray], captions: list[str], splits: dict) -> str:
    """
    Return the hash of what a run depends on besides its own setting: the model's files, the drawings, the captions of
    each split, and the constants that decide how a run is trained and measured.

    It has the style judge's data and number of steps but not its weights, which another processor rounds differently.
    `frechet` and `similarity`, which use the judge's features, can therefore be compared only between runs of one machine.
    """
    parts = []
    for path in sorted(MODEL.rglob("*.*")):
        parts += [path.relative_to(MODEL).as_posix(), path.read_bytes()]
    for name in sorted(drawings):
        parts += [name, drawings[name].tobytes()]
    constants = {
        "steps": STEPS,
        "batch_size": BATCH_SIZE,
        "warmup_steps": WARMUP_STEPS,
        "judge_steps": miniature_judges.JUDGE_STEPS,
        "max_distance": miniature_judges.MAX_DISTANCE,
        "red_fraction": miniature_judges.RED_FRACTION,
        "skin": [miniature_judges.YELLOW_SKIN.tolist(), miniature_judges.DARK_SKIN.tolist()],
        "utilities": UTILITIES,
        "num_inference_steps": report.NUM_INFERENCE_STEPS,
        "guidance_scale": report.GUIDANCE_SCALE,
    }
    return hash_content(*parts, captions, splits, constants)


# ---- One run --------------------------------------------------------------------------------------------------------
def predict(unet, world: World, pairs: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """
    Return the UNet's prediction and its target for B pairs, whose images share noise and timestep.

    Args:
        pairs: shape (B, 3).
        noise: shape (B, 4, 16, 16).

    Returns:
        Shape: (2B, 4, 16, 16) each, chosen images first.
    """
    caption, chosen, rejected = pairs.unbind(1)
    latents = torch.cat([world.latents[chosen, caption], world.latents[rejected, caption]])
    noise = noise.repeat(2, 1, 1, 1)
    timesteps = timesteps.repeat(2)
    noisy_latents = world.noise_scheduler.add_noise(latents, noise, timesteps)
    conditions = {
        "text_embeds": world.pooled_prompt_embeds[caption].repeat(2, 1),
        "time_ids": torch.tensor([64.0, 64.0, 0.0, 0.0, 64.0, 64.0]).repeat(len(latents), 1),
    }
    prompt_embeds = world.prompt_embeds[caption].repeat(2, 1, 1)
    return unet(noisy_latents, timesteps, prompt_embeds, added_cond_kwargs=conditions).sample, noise


def mean_squared_errors(model_pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return mse_w and mse_l. Shape: (2B, 4, 16, 16) each -> (B,), (B,)"""
    return (model_pred - target).square().mean((1, 2, 3)).chunk(2)


def train(setting: dict, world: World) -> tuple[torch.nn.Module, dict[str, float]]:
    """Train the model's UNet in a run's setting. Return it with the seconds taken and the mean weight of MaPO's margin."""
    started = time.monotonic()
    method = setting["method"]
    beta = setting["beta"]
    unet = copy.deepcopy(world.pipeline.unet).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=setting["rate"], weight_decay=1e-2)

    captions = world.splits[setting["task"]]["train"]
    if setting["pairs"]:
        captions = captions[:: -(-len(captions) // setting["pairs"])]
    pairs = torch.from_numpy(make_pairs(setting["task"], captions, setting["noise"]))
    generator = torch.Generator().manual_seed(setting["seed"])
    order = torch.tensor([], dtype=torch.long)
    margin_weights = []
    for step in range(STEPS):
        while len(order) < BATCH_SIZE:
            order = torch.cat([order, torch.randperm(len(pairs), generator=generator)])
        batch = pairs[order[:BATCH_SIZE]]
        order = order[BATCH_SIZE:]
        noise = torch.randn(BATCH_SIZE, *world.latents.shape[2:], generator=generator)
        timesteps = torch.randint(1000, (BATCH_SIZE,), generator=generator)

        model_pred, target = predict(unet, world, batch, noise, timesteps)
        mse_w, mse_l = mean_squared_errors(model_pred, target)
        if method == "SFT":
            loss = miniature_losses.sft_loss(mse_w)
        elif method == "Diffusion-DPO":
            with torch.no_grad():
                reference_pred, _ = predict(world.pipeline.unet, world, batch, noise, timesteps)
            reference_mse_w, reference_mse_l = mean_squared_errors(reference_pred, target)
            loss = miniature_losses.diffusion_dpo_loss(mse_w, mse_l, reference_mse_w, reference_mse_l, beta)
        elif method == "SimPO's form":
            loss = miniature_losses.simpo_loss(mse_w, mse_l, beta)
        elif method == "ORPO's form":
            loss = miniature_losses.orpo_loss(mse_w, mse_l, beta)
        else:
            mapo = mapo_loss(model_pred, target, beta, safeguard=setting["safeguard"])
            margin_weights.append(mapo.margin_weight.mean().item())
            loss = mapo.loss

        for group in optimizer.param_groups:
            group["lr"] = setting["rate"] * min(1, (step + 1) / WARMUP_STEPS)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    figures = {"train_s": time.monotonic() - started}
    if margin_weights:
        figures["margin_weight"] = float(np.mean(margin_weights))
    return unet.eval(), figures


@torch.no_grad()
def measure_pairs(unet, world: World, setting: dict) -> dict[str, float]:
    """Return mse_w, mse_l and the implicit accuracy on the split's pairs, from eight timesteps and fixed noise."""
    pairs = torch.from_numpy(make_pairs(setting["task"], world.splits[setting["task"]][setting["split"]]))
    generator = torch.Generator().manual_seed(1)
    all_mse_w = []
    all_mse_l = []
    for timestep in range(62, 1000, 125):
        noise = torch.randn(len(pairs), *world.latents.shape[2:], generator=generator)
        timesteps = torch.full((len(pairs),), timestep)
        mse_w, mse_l = mean_squared_errors(*predict(unet, world, pairs, noise, timesteps))
        all_mse_w.append(mse_w)
        all_mse_l.append(mse_l)
    mse_w = torch.stack(all_mse_w).mean(0)
    mse_l = torch.stack(all_mse_l).mean(0)
    return {
        "mse_w": mse_w.mean().item(),
        "mse_l": mse_l.mean().item(),
        "accuracy": (mse_w < mse_l).float().mean().item(),
    }


@torch.no_grad()
def measure_images(images: list[Image.Image], world: World, setting: dict) -> dict:
    """
    Measure one image for each caption of the split.

    Returns:
        preferred: mean of what the images are worth, as the task's judge says.
        recognised: fraction whose nearest drawing, among all captions', is one of their own caption. In the tasks about
            colours it must also be within MAX_DISTANCE, because a colour cast over the image would please the judge.
        distance: mean distance to the nearest drawing.
        frechet: Fréchet distance between the style judge's features of the images and of the chosen drawings.
        similarity: mean cosine similarity of the same features, image by image.
        score: mean of worth times recognised. Settings are chosen by it; `scores` has it for each image.
    """
    task = setting["task"]
    captions = world.splits[task][setting["split"]]
    batch = to_batch(images)
    looks = LOOKS if task in VARIANTS else STYLES
    distance, nearest = miniature_judges.find_nearest(batch, world.drawings[: len(looks)].flatten(0, 1))
    recognised = nearest % len(world.captions) == torch.tensor(captions)
    if task in VARIANTS:
        recognised &= distance <= miniature_judges.MAX_DISTANCE
    recognised = recognised.float()
    worth = miniature_judges.judge_images(task, batch, world.style_judge)
    scores = worth * recognised

    pairs = make_pairs(task, captions)
    chosen_drawings = world.drawings[pairs[:, 1], pairs[:, 0]]
    features = world.style_judge.features(batch)
    chosen_features = world.style_judge.features(chosen_drawings)
    return {
        "preferred": worth.mean().item(),
        "recognised": recognised.mean().item(),
        "distance": distance.mean().item(),
        "frechet": miniature_judges.frechet_distance(features, chosen_features).item(),
        "similarity": F.cosine_similarity(features, chosen_features).mean().item(),
        "score": scores.mean().item(),
        "scores": scores.tolist(),
    }


def run(setting: dict, world: World, images_dir: Path) -> dict:
    """Train in a setting, measure the result, and keep twelve images of it for the report."""
    unet = world.pipeline.unet
    figures = {}
    if setting["method"] != "base":
        unet, figures = train(setting, world)
    figures.update(measure_pairs(unet, world, setting))

    components = world.pipeline.components
    components["unet"] = unet
    pipeline = StableDiffusionXLPipeline(**components, add_watermarker=False)
    prompts = [world.captions[i] for i in world.splits[setting["task"]][setting["split"]]]
    images = report.generate(pipeline, prompts)
    images_dir.mkdir(parents=True, exist_ok=True)
    miniature_report.save_row(images, images_dir / miniature_report.image_name(setting))
    figures.update(measure_images(images, world, setting))
    return figures


# ---- Stages ---------------------------------------------------------------------------------------------------------
class Runs:
    """The rows of a results file: `get` returns a setting's row and runs it first if the file doesn't have it."""

    def __init__(self, log: JsonLines, world: World, images_dir: Path) -> None:
        self.log = log
        self.world = world
        self.images_dir = images_dir

    def get(self, task: str, method: str, **changes) -> dict:
        setting = {
            "task": task,
            "method": method,
            "beta": 0,
            "rate": 0,
            "safeguard": 0.9 if method == "MaPO, safeguard" else None,
            "pairs": 0,  # all
            "noise": 0.0,
            "seed": 0,
            "split": "test",
        }
        setting.update(changes)
        setting["base"] = self.world.base
        found = miniature_report.select_rows(self.log.rows, setting)
        if found:
            return found[0]
        started = time.monotonic()
        figures = run(setting, self.world, self.images_dir)
        row = {**setting, **figures, "s": round(time.monotonic() - started, 1)}
        self.log.add(row)
        print({name: value for name, value in row.items() if name != "scores"}, flush=True)
        return row

    def search(self, task: str, method: str) -> None:
        for beta in SEARCH[method]["betas"]:
            for rate in SEARCH[method]["rates"]:
                self.get(task, method, beta=beta, rate=rate, split="validation")

    def best(self, task: str, method: str) -> dict[str, float]:
        """Return the beta and learning rate that did best in the search."""
        self.search(task, method)
        rows = miniature_report.select_rows(self.log.rows, {"base": self.world.base})
        row = miniature_report.best_searched_row(rows, task, method)
        return {"beta": row["beta"], "rate": row["rate"]}


def run_stage(stage: str, task: str, runs: Runs) -> None:
    if stage in KNOWN_STYLE_ONLY and task != "known_style":
        return
    if stage == "search":
        runs.get(task, "base", split="validation")
        for method in METHODS:
            runs.search(task, method)
        return
    runs.get(task, "base")
    for seed in SEEDS:
        for method, changes in STAGES[stage]:
            tuned_method = "MaPO" if stage == "safeguard" else method  # so that only the safeguard varies
            setting = runs.best(task, tuned_method)
            setting.update(changes)
            runs.get(task, method, **setting, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ["search", *STAGES, "report"]
    parser.add_argument("--only", nargs="+", choices=stages, default=stages, help="Run only these stages.")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="Run only these tasks.")
    parser.add_argument(
        "--results",
        type=Path,
        default=REPO / "benchmarks" / "results" / "miniature.jsonl",
        help="The rows; what they were made from is in NAME_setups.jsonl beside it.",
    )
    parser.add_argument(
        "--work_dir",
        type=Path,
        default=REPO / "demo" / "build" / "miniature",
        help="Folder for drawings, the style judge and images.",
    )
    parser.add_argument(
        "--report_dir", type=Path, default=REPO / "benchmarks" / "miniature", help="Folder for the report."
    )
    args = parser.parse_args()

    torch.set_flush_denormal(True)  # pairs that are won have subnormal gradients, ten times slower on a CPU
    log = JsonLines(args.results)
    setups = JsonLines(args.results.with_name(f"{args.results.stem}_setups.jsonl"))
    if args.only != ["report"]:
        world = load_world(args.work_dir, setups)
        runs = Runs(log, world, args.work_dir / "images" / world.base)
        miniature_report.save_chosen_rows(world, runs.images_dir)
        for stage in args.only:
            if stage != "report":
                for task in args.tasks:
                    run_stage(stage, task, runs)
    if "report" in args.only:
        miniature_report.write_report(log.rows, setups.rows, args.work_dir / "images", args.report_dir)


if __name__ == "__main__":
    main()

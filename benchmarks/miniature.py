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
Does the safeguard keep the winner? MaPO with and without it on the demo's base, many settings, the same pairs.

    python benchmarks/miniature.py                          # the grid below; goes on where it was ended
    python benchmarks/miniature.py --betas 8 --rates 1e-5 --safeguards off 0.8 --seeds 0 --images_dir strips

Each run tunes a copy of the base on pairs in which one foundry's drawing is chosen, and measures, on captions that no
pair has: preference and damage of its images (demo/report.py), and the errors on held-out pairs. Runs are lines of
`--results`, read again as a table: the mean over seeds, and their spread.
"""

import argparse
import copy
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm


REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from demo.report import DEMO, generate, held_out_captions, load_drawings, measure  # noqa: E402
from demo.style_judge import FOUNDRIES  # noqa: E402
from mapo_loss import mapo_loss  # noqa: E402


KEYS = ("preferred", "beta", "rate", "safeguard", "steps", "seed")


class Bench:
    """The base, and all drawings as latents, captions as embeddings."""

    def __init__(self, model: Path) -> None:
        from diffusers import DDPMScheduler, StableDiffusionXLPipeline

        self.pipeline = StableDiffusionXLPipeline.from_pretrained(model, dtype=torch.float32, add_watermarker=False)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.unet.to(memory_format=torch.channels_last)
        self.base = copy.deepcopy(self.pipeline.unet)
        self.noise_scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        drawings, names = load_drawings()
        self.captions = names[: len(names) // len(FOUNDRIES)]
        held_out = set(held_out_captions())
        self.held_out = np.array([caption in held_out for caption in self.captions])
        with torch.no_grad():
            vae = self.pipeline.vae
            latents = torch.cat([vae.encode(part).latent_dist.mode() for part in drawings.split(64)])
            self.latents = (latents * vae.config.scaling_factor).unflatten(0, (len(FOUNDRIES), -1))
            encoded = [
                self.pipeline.encode_prompt(self.captions[i : i + 64], do_classifier_free_guidance=False)
                for i in range(0, len(self.captions), 64)
            ]
        self.embeds, self.pooled = (torch.cat([part[k] for part in encoded]) for k in (0, 2))

    def pairs(self, preferred: str, held_out: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Caption, foundry of the winner and of the loser of each pair; the loser's is random. Shape: (N,) each."""
        rows = torch.from_numpy(np.flatnonzero(self.held_out == held_out))
        winner = FOUNDRIES.index(preferred)
        loser = torch.randint(len(FOUNDRIES) - 1, rows.shape, generator=torch.Generator().manual_seed(0))
        return rows, torch.full_like(rows, winner), loser + (loser >= winner)

    def predict(self, unet, rows: torch.Tensor, foundries: torch.Tensor, noise, timesteps) -> torch.Tensor:
        time_ids = torch.tensor([64, 64, 0, 0, 64, 64.0]).expand(len(rows), 6)
        noisy = self.noise_scheduler.add_noise(self.latents[foundries, rows], noise, timesteps)
        conditions = {"text_embeds": self.pooled[rows], "time_ids": time_ids}
        return unet(noisy, timesteps, self.embeds[rows], added_cond_kwargs=conditions).sample

    def errors(self, unet, pairs: tuple, generator: torch.Generator, loss, size: int | None = None):
        """`loss` of predictions and noise, winners first, on a random batch of `size` pairs or on all of them."""
        rows, winners, losers = pairs
        if size is not None:
            index = torch.randint(len(rows), (size,), generator=generator)
            rows, winners, losers = rows[index], winners[index], losers[index]
        noise = torch.randn(len(rows), *self.latents.shape[2:], generator=generator).repeat(2, 1, 1, 1)
        timesteps = torch.randint(1000, (len(rows),), generator=generator).repeat(2)
        predicted = self.predict(unet, rows.repeat(2), torch.cat([winners, losers]), noise, timesteps)
        return loss(predicted, noise)

    @torch.no_grad()
    def held_out_errors(self, unet, preferred: str) -> dict[str, float]:
        """mse_w, mse_l and accuracy on held-out pairs, at eight fixed noises and timesteps each."""
        generator, pairs = torch.Generator().manual_seed(1), self.pairs(preferred, True)
        outs = [self.errors(unet, pairs, generator, lambda *x: mapo_loss(*x, beta=8)) for _ in range(8)]
        return {k: torch.cat([getattr(out, k) for out in outs]).mean().item() for k in ("mse_w", "mse_l", "accuracy")}

    def run(self, preferred: str, beta: float, rate: float, safeguard: float | None, steps: int, seed: int, size=16):
        """Tunes a copy of the base as the training script does; what it measures then, and the images."""
        unet = copy.deepcopy(self.base).train()
        optimizer = torch.optim.AdamW(unet.parameters(), lr=rate, weight_decay=1e-2, fused=True)
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 10))
        generator, pairs, started = torch.Generator().manual_seed(seed), self.pairs(preferred, False), time.time()
        for _ in tqdm(range(steps), desc=f"{preferred} {beta:g} {rate:g} {safeguard} {seed}", leave=False):
            loss = lambda *x: mapo_loss(*x, beta=beta, safeguard=safeguard).loss  # noqa: E731
            self.errors(unet, pairs, generator, loss, size).backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            warm_up.step()
            optimizer.zero_grad()
        seconds = time.time() - started
        self.pipeline.unet = unet.eval()
        captions = [caption for caption, out in zip(self.captions, self.held_out) if out]
        images = generate(self.pipeline, captions)
        figures = measure(images, captions)
        kept = {name: figures[name] for name in ("recognised", "distance", "white_border")}
        return {
            "preference": figures[preferred],
            **kept,
            **self.held_out_errors(unet, preferred),
            "s": seconds,
        }, images


def write_table(results: list[dict]) -> str:
    """One line for each setting: mean over seeds and, in brackets, half of their range."""
    names = [name for name in results[0] if name not in (*KEYS, "s")]
    lines = ["| preferred | beta | rate | safeguard | steps | seeds | " + " | ".join(names) + " |"]
    lines.append("|---" * (6 + len(names)) + "|")
    groups = {}
    for row in results:
        groups.setdefault(tuple(row[key] for key in KEYS[:-1]), []).append(row)
    for setting, rows in groups.items():
        cells = [str(value) for value in setting] + [str(len(rows))]
        for name in names:
            values = [row[name] for row in rows]
            spread = f" (±{(max(values) - min(values)) / 2:.2g})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3g}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO / "sdxl-tiny-emoji")
    parser.add_argument("--preferred", nargs="+", default=["openmoji", "noto"], choices=FOUNDRIES)
    parser.add_argument("--betas", nargs="+", type=float, default=[8, 32, 64])
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-6, 1e-5, 3e-5])
    parser.add_argument("--safeguards", nargs="+", default=["off", "0", "0.5", "0.7", "0.8", "0.9"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", nargs="+", type=int, default=[110])
    parser.add_argument("--results", type=Path, default=REPO / "benchmarks" / "results" / "safeguard.jsonl")
    parser.add_argument("--images_dir", type=Path, help="Write twelve images of each run into this folder.")
    args = parser.parse_args()
    bench = Bench(args.model)
    done = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    grid = itertools.product(args.preferred, args.betas, args.rates, args.safeguards, args.steps, args.seeds)
    for values in tqdm(list(grid)):
        setting = dict(zip(KEYS, values))
        if any(setting.items() <= row.items() for row in done):
            continue
        options = setting | {"safeguard": None if setting["safeguard"] == "off" else float(setting["safeguard"])}
        figures, images = bench.run(**options)
        if args.images_dir is not None:
            row = np.concatenate([np.asarray(image) for image in images[:: len(images) // 12][:12]], axis=1)
            args.images_dir.mkdir(parents=True, exist_ok=True)
            Image.fromarray(row).save(args.images_dir / f"{'-'.join(str(value) for value in values)}.png")
        done.append(setting | figures)
        with args.results.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        tqdm.write(json.dumps(done[-1]))
    print(write_table(done))


if __name__ == "__main__":
    main()

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
MaPO, DCO and DreamBooth on the demo's subject, each at its best of a small search, with three seeds.

    python benchmarks/personalization.py    # 34 runs of some two minutes on one core; goes on where it ended
    python benchmarks/personalization.py --losses DCO "MaPO, prior preservation"

A run is train_dreambooth_lora_mapo_sdxl.py, as a user starts it, of the demo's photos and steps; the figures are those
that it prints. A loss's setting is the one with the highest product of two: images on the photos' captions that are
nearest to a photo, and other captions that are kept (of equal ones the one whose colours are nearer). New contexts and
the class take no part in the choice. Writes personalization.jsonl (a line a run), .md and .webp to benchmarks/results.
"""

import argparse
import hashlib
import re
import resource
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from evaluation.common import JsonLines, markdown_table  # noqa: E402


RATES = (3e-4, 1e-3, 3e-3)  # of the UNet's LoRA and of the tokens
SEEDS = (0, 1, 2)
PRIOR = "--with_prior_preservation"
LOSSES = {  # flags, and those tried with each rate
    "MaPO": ([], ["--beta_mapo=64", "--beta_mapo=1024"]),
    "MaPO, prior preservation": ([PRIOR], ["--beta_mapo=64", "--beta_mapo=1024"]),
    "DCO": (["--loss_type=dco"], ["--beta_dco=100", "--beta_dco=1000"]),
    "DreamBooth": (["--loss_type=dreambooth"], []),
    "DreamBooth, prior preservation": (["--loss_type=dreambooth", PRIOR], []),
}
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
ROW = re.compile(r"^(.+): nearest (\d+)% before, (\d+)% after; palette (\S+) before, (\S+) after$", re.MULTILINE)
OTHERS = re.compile(r"([\d.]+)%? -> +([\d.]+)%?  (nearest|distance)")
PLACES = {"captions of the photos": "photos", "new contexts": "contexts", "both without the token": "class"}


def train(loss: str, tried: list[str], seed: int, work_dir: Path) -> dict[str, float]:
    """One training; what it printed, and the CPU seconds that it took, images included."""
    command = [sys.executable, str(REPO / "train_dreambooth_lora_mapo_sdxl.py"), *LOSSES[loss][0], *tried]
    command += [f"--seed={seed}", f"--output_dir={folder(work_dir, loss, tried, seed)}"]
    command += [f"--cache_dir={work_dir / 'cache'}", "--checkpointing_steps=1000"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return read_figures(said) | {"cpu_seconds": round(seconds)}


def read_figures(said: str) -> dict[str, float]:
    """The figures of demo/report.py's text, those of before under *_before."""
    figures = {}
    for title, *values in ROW.findall(said):
        names = ("nearest_before", "nearest", "palette_before", "palette")
        figures |= {f"{PLACES[title]}_{name}": float(value) for name, value in zip(names, values)}
    for then, now, name in OTHERS.findall(said):
        figures |= {f"others_{name}_before": float(then), f"others_{name}": float(now)}
    return figures


def folder(work_dir: Path, loss: str, tried: list[str], seed: int) -> Path:
    return work_dir / re.sub(r"[^\w.-]+", "_", "_".join([loss, *tried, str(seed)]))


class Runs:
    """Lines of a file, each a setting with its figures; `get` runs what isn't there."""

    def __init__(self, path: Path, work_dir: Path) -> None:
        self.path, self.work_dir, self.log = path, work_dir, JsonLines(path)
        weights = (REPO / "demo/sdxl-tiny-emoji/unet/diffusion_pytorch_model.safetensors").read_bytes()
        self.base = hashlib.sha256(weights).hexdigest()[:12]
        self.rows = [row for row in self.log.rows if row["base"] == self.base]

    def get(self, loss: str, tried: list[str], seed: int = 0) -> dict:
        setting = {"loss": loss, "tried": tried, "seed": seed}
        for row in self.rows:
            if setting.items() <= row.items():
                return row
        about = {"base": self.base, "date": date.today().isoformat()}
        row = setting | about | train(loss, tried, seed, self.work_dir)
        self.rows.append(row)
        self.log.add(row)
        print(row, flush=True)
        return row

    def search(self, loss: str) -> list[dict]:
        rates = [[f"--learning_rate={rate}", f"--text_encoder_lr={rate}"] for rate in RATES]
        settings = product(rates, [[flag] for flag in LOSSES[loss][1]] or [[]])
        return [self.get(loss, [*rate, *beta]) for rate, beta in settings]

    def final(self, loss: str) -> list[dict]:
        best = max(self.search(loss), key=rank)
        return [self.get(loss, best["tried"], seed) for seed in SEEDS]


def rank(row: dict) -> tuple[float, float]:
    return row["photos_nearest"] * row["others_nearest"], row["photos_palette"]


def cells(rows: list[dict], when: str = "") -> list[str]:
    """Each figure of the runs; where they differ, one after the other."""
    found = []
    for place in PLACES.values():
        for name, form in (("nearest", "{:.0f}"), ("palette", "{:.2f}")):
            found.append([form.format(row[f"{place}_{name}{when}"]) for row in rows])
    found.append([f"{row[f'others_nearest{when}']:.0f}" for row in rows])
    found.append([f"{row[f'others_distance{when}']:.1f}" for row in rows])
    return [values[0] if len(set(values)) == 1 else " ".join(values) for values in found]


def table(lines: list[list[str]]) -> str:
    head = ["loss", "setting", "photos' captions: subject, %", "palette", "new contexts: subject, %", "palette"]
    head += ["no token: subject, %", "palette", "other captions kept, %", "distance"]
    return markdown_table(head, lines) + "\n"


def name_setting(row: dict) -> str:
    values = [flag.partition("=")[2] for flag in row["tried"]]
    return values[0] if len(values) < 3 else f"{values[0]}, beta {values[2]}"


def write_report(runs: Runs, losses: list[str]) -> None:
    final = {loss: runs.final(loss) for loss in losses}
    lines = [["starting model", "", *cells(next(iter(final.values()))[:1], "_before")]]
    lines += [[loss, name_setting(rows[0]), *cells(rows)] for loss, rows in final.items()]
    searched = [[loss, name_setting(row), *cells([row])] for loss in losses for row in runs.search(loss)]
    about = f"{max(row['date'] for row in runs.rows)}, CPU, " + ", ".join(f"{k} {version(k)}" for k in PACKAGES)
    text = (
        f"Seeds 0, 1, 2, where they differ:\n\n{table(lines)}\nAll settings, seed 0:\n\n{table(searched)}\n{about}\n"
    )
    runs.path.with_suffix(".md").write_text(text)
    print(text)
    grids = {loss: folder(runs.work_dir, loss, rows[0]["tried"], 0) for loss, rows in final.items()}
    picture = make_picture({loss: path / "before_after.png" for loss, path in grids.items()})
    picture.save(runs.path.with_suffix(".webp"), quality=90)


def make_picture(grids: dict[str, Path]) -> Image.Image:
    """Of each run's grid the last "after" and "new contexts, after", side by side."""
    rows = []
    for loss, path in grids.items():
        grid = Image.open(path)
        bottoms = [grid.height - 2 * 168, grid.height]  # make_grid's rows are 168 high, images 128 of it
        images = [np.asarray(grid.crop((110, bottom - 128, grid.width, bottom))) for bottom in bottoms]
        row = Image.fromarray(np.pad(np.concatenate(images, axis=1), ((20, 4), (0, 0), (0, 0)), constant_values=255))
        ImageDraw.Draw(row).text((4, 3), loss, "black", ImageFont.load_default(13))
        rows.append(np.asarray(row))
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--results", type=Path, default=REPO / "benchmarks" / "results" / "personalization.jsonl")
    parser.add_argument("--work_dir", type=Path, default=REPO / "demo" / "build" / "personalization", help="Outputs.")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    write_report(Runs(args.results, args.work_dir), args.losses)


if __name__ == "__main__":
    main()

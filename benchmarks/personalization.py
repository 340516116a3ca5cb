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
MaPO, DCO and DreamBooth on the demo's photos of one cat, each at the best setting of a small search, with three seeds.

    python benchmarks/personalization.py    # 34 runs of about two minutes on one core; a second call resumes
    python benchmarks/personalization.py --losses DCO "MaPO, prior preservation"

A run is `train_dreambooth_lora_mapo_sdxl.py` as a user starts it, with the demo's model, photos and number of steps. It
is measured by demo/report.py. A loss's setting is the one with the highest product of two figures: the images for the
photos' captions that show the subject, and the other captions that are still recognised. Of equal ones it is the one
whose colours are nearer to the photos'. New contexts and the class take no part in the choice. Writes
personalization.jsonl (a line for each run), .md and .webp to benchmarks/results.

Runs are found again by their settings and by `base`, which names what they were made from: the demo's model, photos and
settings. The training script's code isn't part of it; `date` says when a run was made.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
from datetime import date
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from demo import report  # noqa: E402
from evaluation.common import JsonLines, hash_content, markdown_table, write_whole  # noqa: E402


RATES = (3e-4, 1e-3, 3e-3)  # for both the LoRA and the new word
SEEDS = (0, 1, 2)
# The flags of each loss, and the flags of the betas that are tried with each rate.
LOSSES = {
    "MaPO": ([], [["--beta_mapo=64"], ["--beta_mapo=1024"]]),
    "MaPO, prior preservation": (["--with_prior_preservation"], [["--beta_mapo=64"], ["--beta_mapo=1024"]]),
    "DCO": (["--loss_type=dco"], [["--beta_dco=100"], ["--beta_dco=1000"]]),
    "DreamBooth": (["--loss_type=dreambooth"], [[]]),
    "DreamBooth, prior preservation": (["--loss_type=dreambooth", "--with_prior_preservation"], [[]]),
}
PLACES = ("photos", "contexts", "class")
HEAD = ["loss", "setting", "photos' captions: subject, %", "palette", "new contexts: subject, %", "palette"]
HEAD += ["no token: subject, %", "palette", "other captions kept, %", "distance"]
# The runs of 2026-11-22 name what they were made from by the hash of the UNet alone. This is the hash of all of it.
FIRST_CONTENT = "bc90c74022c169d44537be10ec4eb5ea"
FIRST_BASE = "7c3fde53d63a"


# ---- Runs -----------------------------------------------------------------------------------------------------------
def name_base() -> str:
    """Return the name of what every run is made from."""
    settings = report.read_json(report.DEMO / "train_subject.json")
    parts = []
    for name in ("resolution", "max_train_steps", "guidance_scale", "validation_prompts"):
        parts += [name, settings[name]]
    for folder in ("sdxl-tiny-emoji", "subject"):
        for path in sorted((report.DEMO / folder).rglob("*.*")):
            parts += [path.relative_to(report.DEMO).as_posix(), path.read_bytes()]
    content = hash_content(*parts)
    return FIRST_BASE if content == FIRST_CONTENT else content[:12]


def output_dir(work_dir: Path, row: dict) -> Path:
    name = "_".join([row["loss"], *row["tried"], str(row["seed"]), row["base"]])
    return work_dir / re.sub(r"[^\w.-]+", "_", name)


def train(setting: dict, work_dir: Path) -> dict[str, float]:
    """Return a run's figures as demo/report.py measures them, and the CPU seconds of its training."""
    folder = output_dir(work_dir, setting)
    flags, _ = LOSSES[setting["loss"]]
    command = [sys.executable, str(REPO / "train_dreambooth_lora_mapo_sdxl.py"), *flags, *setting["tried"]]
    command += [f"--seed={setting['seed']}", f"--output_dir={folder}", f"--cache_dir={work_dir / 'cache'}"]
    command += ["--checkpointing_steps=1000", "--skip_final_inference"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)

    measured = report.measure_subject(folder)
    figures = {}
    for place in PLACES:
        for suffix in ("_before", ""):
            figures[f"{place}_nearest{suffix}"] = round(100 * measured[f"{place}_nearest{suffix}"], 0)
            figures[f"{place}_palette{suffix}"] = round(measured[f"{place}_palette{suffix}"], 2)
    for suffix in ("_before", ""):
        figures[f"others_nearest{suffix}"] = round(100 * measured[f"others_recognised{suffix}"], 0)
        figures[f"others_distance{suffix}"] = round(measured[f"others_distance{suffix}"], 1)
    figures["cpu_seconds"] = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return figures


class Runs:
    """The rows of a results file: `get` returns a setting's row and runs it first if the file doesn't have it."""

    def __init__(self, path: Path, work_dir: Path) -> None:
        self.log = JsonLines(path)
        self.work_dir = work_dir
        self.base = name_base()

    def get(self, loss: str, tried: list[str], seed: int = 0) -> dict:
        setting = {"loss": loss, "tried": tried, "seed": seed, "base": self.base}
        for row in self.log.rows:
            if setting.items() <= row.items():
                return row
        row = {**setting, "date": date.today().isoformat(), **train(setting, self.work_dir)}
        self.log.add(row)
        print(json.dumps(row), flush=True)
        return row

    def search(self, loss: str) -> list[dict]:
        rows = []
        _, betas = LOSSES[loss]
        for rate in RATES:
            for beta in betas:
                rows.append(self.get(loss, [f"--learning_rate={rate}", f"--text_encoder_lr={rate}", *beta]))
        return rows

    def final(self, loss: str) -> list[dict]:
        best = max(self.search(loss), key=rank)
        return [self.get(loss, best["tried"], seed) for seed in SEEDS]


def rank(row: dict) -> tuple[float, float]:
    return row["photos_nearest"] * row["others_nearest"], row["photos_palette"]


# ---- Report ---------------------------------------------------------------------------------------------------------
def figure_cells(rows: list[dict], suffix: str = "") -> list[str]:
    """Return a cell for each figure: its value in every run, or one value if all runs agree."""
    columns = []
    for place in PLACES:
        columns.append([f"{row[f'{place}_nearest{suffix}']:.0f}" for row in rows])
        columns.append([f"{row[f'{place}_palette{suffix}']:.2f}" for row in rows])
    columns.append([f"{row[f'others_nearest{suffix}']:.0f}" for row in rows])
    columns.append([f"{row[f'others_distance{suffix}']:.1f}" for row in rows])
    cells = []
    for values in columns:
        cells.append(values[0] if len(set(values)) == 1 else " ".join(values))
    return cells


def setting_cell(row: dict) -> str:
    """Return "0.001, beta 64" for the flags that were tried, whose two rates are the same."""
    values = [flag.split("=")[1] for flag in row["tried"]]
    return ", beta ".join([values[0], *values[2:]])


def write_report(runs: Runs, losses: list[str]) -> None:
    final = {loss: runs.final(loss) for loss in losses}
    start = next(iter(final.values()))[:1]
    lines = [["starting model", "", *figure_cells(start, "_before")]]
    searched = []
    dates = set()
    for loss, rows in final.items():
        lines.append([loss, setting_cell(rows[0]), *figure_cells(rows)])
        for row in runs.search(loss) + rows:
            dates.add(row["date"])
        for row in runs.search(loss):
            searched.append([loss, setting_cell(row), *figure_cells([row])])
    text = f"Seeds 0, 1, 2, where they differ:\n\n{markdown_table(HEAD, lines)}\n\n"
    text += f"All settings, seed 0:\n\n{markdown_table(HEAD, searched)}\n\nRuns of {', '.join(sorted(dates))}, CPU\n"
    write_whole(runs.log.path.with_suffix(".md"), text)
    print(text)

    folders = {loss: output_dir(runs.work_dir, rows[0]) for loss, rows in final.items()}
    if all(folder.exists() for folder in folders.values()):
        make_picture(folders).save(runs.log.path.with_suffix(".webp"), quality=90)


def make_picture(folders: dict[str, Path]) -> Image.Image:
    """Return a row of images for each run: the photos' captions, then the new contexts."""
    settings = report.read_json(report.DEMO / "train_subject.json")
    rows = report.read_json_lines(report.DEMO / "subject" / "metadata.jsonl")
    prompts = [row["text"] for row in rows] + settings["validation_prompts"]
    size = 112
    picture = Image.new("RGB", (size * len(prompts), (size + 24) * len(folders)), "white")
    pen = ImageDraw.Draw(picture)
    top = 0
    for loss, folder in folders.items():
        pen.text((4, top + 3), loss, "black", ImageFont.load_default(13))
        pipeline = report.load_subject_pipeline(folder, settings["placeholder_token"][0])
        for i, image in enumerate(report.generate(pipeline, prompts)):
            picture.paste(image.resize((size, size), Image.Resampling.NEAREST), (size * i, top + 20))
        top += size + 24
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES), help="Run only these.")
    parser.add_argument(
        "--results",
        type=Path,
        default=REPO / "benchmarks" / "results" / "personalization.jsonl",
        help="The rows; the table and the picture are written beside it.",
    )
    parser.add_argument(
        "--work_dir",
        type=Path,
        default=REPO / "demo" / "build" / "personalization",
        help="Folder for the runs' outputs.",
    )
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    write_report(Runs(args.results, args.work_dir), args.losses)


if __name__ == "__main__":
    main()

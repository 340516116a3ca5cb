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
    python benchmarks/miniature.py --preferred openmoji --betas 8 --rates 1e-5 --safeguards off 0.8 --seeds 0

Each run is one of train_diffusion_mapo_sdxl.py on pairs in which one foundry's drawing is chosen. On captions that no
pair has it measures preference and damage of the images (demo/report.py), and the errors on held-out pairs as the run
itself logs them, before and after. Runs are lines of `--results`, printed as a table: the mean over seeds, and their
spread. New drawings of a style are rarely nearest to a known one of their caption (10 % of OpenMoji's own are), so
that is asked on captions of pairs too. `--images_dir` gets twelve images of each run.
"""

import argparse
import io
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm


REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from demo.report import DEMO, generate, held_out_captions, load_sheets, measure  # noqa: E402
from demo.settings import PAIRS  # noqa: E402
from demo.style_judge import FOUNDRIES  # noqa: E402


KEYS = ("preferred", "beta", "rate", "safeguard", "steps", "seed")


def write_pairs(preferred: str, folder: Path) -> Path:
    """train.parquet and test.parquet: the preferred foundry's drawing of a caption is chosen over a random other's."""

    def file_bytes(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return buffer.getvalue()

    captions, sheets = load_sheets()
    random, held_out = np.random.default_rng(0), set(held_out_captions())
    others = [foundry for foundry in FOUNDRIES if foundry != preferred]
    rows = {"train": [], "test": []}
    for i, caption in enumerate(captions):
        images = {"chosen": sheets[preferred][i], "rejected": sheets[others[random.integers(len(others))]][i]}
        row = {side: {"bytes": file_bytes(image), "path": None} for side, image in images.items()}
        rows["test" if caption in held_out else "train"].append({"caption": caption, **row})
    folder.mkdir(parents=True, exist_ok=True)
    for split, found in rows.items():
        pq.write_table(pa.Table.from_pylist(found), folder / f"{split}.parquet")
    return folder


def run(setting: dict, args: argparse.Namespace) -> tuple[dict[str, float], list[Image.Image]]:
    """One training; its figures on held-out captions and pairs, and the images."""
    from diffusers import StableDiffusionXLPipeline

    pairs, out = args.work_dir / f"pairs-{setting['preferred']}", args.work_dir / "run"
    if not pairs.exists():
        write_pairs(setting["preferred"], pairs)
    shutil.rmtree(out, ignore_errors=True)
    flags = [f"--beta_mapo={setting['beta']}", f"--learning_rate={setting['rate']}", f"--seed={setting['seed']}"]
    flags += [f"--safeguard={setting['safeguard']}", f"--max_train_steps={setting['steps']}"]
    flags += [f"--validation_steps={setting['steps']}", f"--output_dir={out}", "--skip_final_inference"]
    flags += [f"--pretrained_model_name_or_path={args.model}", f"--dataset_name={pairs}"]
    # The demo's settings first: what the grid varies comes after them and wins.
    command = [sys.executable, REPO / "train_diffusion_mapo_sdxl.py", *(f"--{k}={v}" for k, v in PAIRS.items())]
    command += [f"--cache_dir={args.work_dir / 'cache'}", *flags]
    started = time.monotonic()
    with (args.work_dir / "log.txt").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    seconds = time.monotonic() - started
    records = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    measured = [record for record in records if record.get("val_mse_w") is not None]
    errors = {}
    for name in ("mse_w", "mse_l", "accuracy"):
        errors |= {f"{name} before": measured[0][f"val_{name}"], name: measured[-1][f"val_{name}"]}
    pipeline = StableDiffusionXLPipeline.from_pretrained(out, add_watermarker=False)
    captions = held_out_captions()
    images = generate(pipeline, captions)
    figures = measure(images, captions)
    kept = {name: figures[name] for name in ("recognised", "distance", "white_border")}
    trained = [caption for caption in load_sheets()[0] if caption not in captions][::5]
    kept["recognised, trained on"] = measure(generate(pipeline, trained), trained)["recognised"]
    return {"preference": figures[setting["preferred"]], **kept, **errors, "s": seconds}, images


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
    parser.add_argument("--work_dir", type=Path, default=REPO / "demo" / "build" / "miniature")
    parser.add_argument("--images_dir", type=Path, help="Write twelve images of each run into this folder.")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    grid = itertools.product(args.preferred, args.betas, args.rates, args.safeguards, args.steps, args.seeds)
    for values in tqdm(list(grid), desc="runs"):
        setting = dict(zip(KEYS, values))
        if any(setting.items() <= row.items() for row in done):
            continue
        figures, images = run(setting, args)
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

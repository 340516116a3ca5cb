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
The demo's pairs in five layouts, as a LoRA, and with other betas, judged on the demo's held-out captions:

    python benchmarks/demo_runs.py                 # some 20 minutes on 2 cores; a second call goes on

Writes benchmarks/results/demo_runs.md and .json. What the two shares are: demo/README.md.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image


REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
MODEL = REPO / "demo" / "sdxl-tiny-emoji"
SETTINGS = (
    "--resolution=64 --train_batch_size=16 --learning_rate=3e-6 --lr_scheduler=constant_with_warmup "
    "--lr_warmup_steps=10 --max_train_steps=110 --validation_guidance_scale=2"
).split()


def chosen_and_rejected() -> list[tuple[str, bytes, bytes]]:
    rows = pq.read_table(REPO / "demo" / "pairs" / "train.parquet").to_pylist()
    sides = [("jpg_0", "jpg_1") if row["label_0"] == 1 else ("jpg_1", "jpg_0") for row in rows]
    return [(row["caption"], row[chosen], row[rejected]) for row, (chosen, rejected) in zip(rows, sides)]


def write_parquet(folder: Path) -> list[str]:
    """open-image-preferences' columns, pictures as `datasets` stores them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = chosen_and_rejected()
    columns = {"prompt": [caption for caption, *_ in rows]}
    for i, name in enumerate(("chosen", "rejected"), 1):
        columns[name] = [{"bytes": row[i], "path": None} for row in rows]
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return [f"--dataset_name={folder}"]


def write_webdataset(folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for i, (caption, chosen, rejected) in enumerate(chosen_and_rejected()):
            swap = i % 2  # the chosen one is the second
            members = {"original_prompt.txt": caption.encode(), "label_0.txt": f"{1 - swap}.0".encode()}
            members |= {"label_1.txt": f"{swap}.0".encode()}
            members |= dict(zip(("jpg_0.jpg", "jpg_1.jpg"), (rejected, chosen) if swap else (chosen, rejected)))
            for name, data in members.items():
                info = tarfile.TarInfo(f"{i:06d}.{name}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    return [f"--dataset_name={folder / 'pairs.tar'}"]


def write_folders(folder: Path) -> list[str]:
    for side in "wl":
        (folder / side).mkdir(parents=True, exist_ok=True)
    for i, (caption, chosen, rejected) in enumerate(chosen_and_rejected()):
        (folder / "w" / f"{i}.png").write_bytes(chosen)
        (folder / "l" / f"{i}.png").write_bytes(rejected)
        (folder / f"{i}.txt").write_text(caption + "\n")
    return [f"--dataset_name={folder}"]


def write_jsonl(folder: Path) -> list[str]:
    """Paths and votes, with columns that no known data set has."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    with open(folder / "pairs.jsonl", "w") as file:
        for i, (caption, chosen, rejected) in enumerate(chosen_and_rejected()):
            for name, data in (("a", chosen), ("b", rejected)):
                (folder / "pictures" / f"{i}{name}.png").write_bytes(data)
            row = {"words": caption, "one": f"{i}b.png", "two": f"{i}a.png", "votes_one": i % 3, "votes_two": 3}
            file.write(json.dumps(row) + "\n")
    columns = "--caption_column=words --image_0_column=one --image_1_column=two --label_0_column=votes_one"
    where = [f"--dataset_name={folder / 'pairs.jsonl'}", f"--image_root={folder / 'pictures'}"]
    return [*where, *columns.split(), "--label_1_column=votes_two"]


def demo_pairs(folder: Path) -> list[str]:
    return [f"--dataset_name={REPO / 'demo' / 'pairs'}"]


# What it is, how its pairs are laid out, and the flags that differ from SETTINGS.
RUNS = {
    "pickapic": ("Pick-a-Pic's columns", demo_pairs, []),
    "parquet": ("`prompt, chosen, rejected`", write_parquet, []),
    "webdataset": ("webdataset tar", write_webdataset, []),
    "folders": ("folders `w/`, `l/`", write_folders, []),
    "jsonl": ("JSON lines, column flags, `--image_root`", write_jsonl, []),
    "streaming": ("`--streaming` of the tar", write_webdataset, ["--streaming"]),
    "lora": (
        "`--use_lora --rank 16 --learning_rate 3e-5` on attention and convolutions",
        demo_pairs,
        "--use_lora --rank=16 --learning_rate=3e-5 "
        "--lora_layers=to_k,to_q,to_v,to_out.0,conv1,conv2,proj_in,proj_out,conv_out".split(),
    ),
    "beta64": ("`--beta_mapo 64`", demo_pairs, ["--beta_mapo=64"]),
    "beta1024": ("`--beta_mapo 1024`", demo_pairs, ["--beta_mapo=1024"]),
}


def train(name: str, folder: Path) -> Path:
    """The run's output folder; an earlier one is taken as it is."""
    _, write, flags = RUNS[name]
    output = folder / name
    if not (output / "README.md").exists():
        data = write(folder / f"{name}-pairs")
        command = [sys.executable, "-m", "accelerate.commands.launch", str(REPO / "train_diffusion_mapo_sdxl.py")]
        command += [f"--pretrained_model_name_or_path={MODEL}", *data, *SETTINGS, *flags]
        command += [f"--output_dir={output}", "--validation_prompts=rocket"]
        subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return output


def judge(models: dict[str, str], folder: Path) -> dict[str, dict[str, float]]:
    """demo/report.py's figures of each model's images of the held-out captions, one seed each."""
    from demo.report import measure
    from evaluation import generate

    prompts = REPO / "demo" / "held_out_captions.txt"
    flags = f"--resolution=64 --num_inference_steps=25 --guidance_scale=2 --batch_size=16 --prompts={prompts}".split()
    named = [f"{name}={place}" for name, place in models.items()]
    generate.main(generate.parse_args([*flags, f"--output_dir={folder / 'drawn'}", "--models", *named]))
    captions, figures = prompts.read_text().splitlines(), {}
    for name in models:
        images = [Image.open(path) for path in sorted((folder / "drawn" / "images" / name).glob("*.png"))]
        figures[name] = measure(images, captions)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--work_dir", type=Path, default=REPO / "demo" / "build" / "runs")
    parser.add_argument("--results", type=Path, default=REPO / "benchmarks" / "results" / "demo_runs")
    args = parser.parse_args()

    models = {"base": str(MODEL)}
    for name in args.only:
        output = train(name, args.work_dir)
        models[name] = f"{MODEL},lora={output}" if "--use_lora" in RUNS[name][2] else str(output)
    figures = judge(models, args.work_dir)
    where = {
        "date": str(datetime.date.today()),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
    }
    args.results.parent.mkdir(exist_ok=True)
    args.results.with_suffix(".json").write_text(json.dumps(where | {"runs": figures}, indent=1) + "\n")
    lines = ["| run | in OpenMoji's style | nearest to a drawing of its caption | distance |", "|---|---|---|---|"]
    titles = {"base": "before"} | {name: RUNS[name][0] for name in args.only}
    for name, row in figures.items():
        lines.append(f"| {titles[name]} | {row['openmoji']:.0%} | {row['recognised']:.0%} | {row['distance']:.1f} |")
    text = "\n".join(lines) + f"\n\n{', '.join(where.values())}\n"
    args.results.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

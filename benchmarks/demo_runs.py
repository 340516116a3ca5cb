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
What a LoRA, other betas and another preferred foundry give on the demo:

    python benchmarks/demo_runs.py                 # some 8 minutes on 2 cores; a second call goes on

Each is the demo's run with the flags that the table names, measured on the captions of demo/pairs/test.parquet; what
the columns are: demo/README.md. Writes benchmarks/results/demo_runs.md and .json.
"""

import argparse
import datetime
import io
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch


REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
from demo.report import generate, load_pipeline, load_sheets, measure, validation_captions  # noqa: E402
from demo.settings import PAIRS  # noqa: E402
from demo.style_judge import FOUNDRIES  # noqa: E402


LORA = "--use_lora --rank=16 --learning_rate=3e-4 --lora_layers=to_k,to_q,to_v,to_out.0,conv1,conv2,proj_in,proj_out"
RUNS = {"demo": "", "beta64": "--beta_mapo=64", "beta1024": "--beta_mapo=1024", "lora": LORA, "fluent": ""}
TITLES = {
    "base": "before",
    "demo": "the demo",
    "beta64": "`--beta_mapo 64`",
    "beta1024": "`--beta_mapo 1024`",
    "lora": "LoRA of rank 16 on attention and convolutions, 3e-4",
    "fluent": "Fluent's drawings chosen instead of OpenMoji's",
}


def write_fluent_pairs(folder: Path) -> Path:
    """The demo's captions; chosen is Fluent's drawing, rejected that of a random other foundry."""
    folder.mkdir(parents=True, exist_ok=True)
    captions, sheets = load_sheets()
    random, others = np.random.default_rng(0), [foundry for foundry in FOUNDRIES if foundry != "fluent"]
    columns = {"prompt": pq.read_table(REPO / "demo" / "pairs" / "train.parquet")["caption"].to_pylist()}
    columns |= {"chosen": [], "rejected": []}
    for caption in columns["prompt"]:
        for side, foundry in (("chosen", "fluent"), ("rejected", others[random.integers(len(others))])):
            file = io.BytesIO()
            sheets[foundry][captions.index(caption)].save(file, "PNG")
            columns[side].append({"bytes": file.getvalue(), "path": None})
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return folder


def train(name: str, folder: Path) -> Path:
    """The run's output folder; an earlier one is taken as it is."""
    output = folder / name
    if not (output / "README.md").exists():
        settings = PAIRS | {"output_dir": output, "num_validation_pairs": 0}
        settings.pop("validation_split_name")
        if name == "fluent":
            settings["dataset_name"] = write_fluent_pairs(folder / "fluent-pairs")
        command = [sys.executable, "-m", "accelerate.commands.launch", str(REPO / "train_diffusion_mapo_sdxl.py")]
        command += [f"--{flag}={value}" for flag, value in settings.items()]
        command += [*RUNS[name].split(), "--skip_final_inference"]
        subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return output


def measure_run(output: Path, base: Path | None = None) -> dict[str, float]:
    captions = validation_captions()
    return measure(generate(load_pipeline(output, base), captions), captions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--work_dir", type=Path, default=REPO / "demo" / "build" / "runs")
    parser.add_argument("--results", type=Path, default=REPO / "benchmarks" / "results" / "demo_runs")
    args = parser.parse_args()

    base = REPO / "demo" / "sdxl-tiny-emoji"
    figures = {"base": measure_run(base)}
    for name in args.only:
        figures[name] = measure_run(train(name, args.work_dir), base if name == "lora" else None)
    where = {
        "date": str(datetime.date.today()),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
    }
    args.results.parent.mkdir(exist_ok=True)
    args.results.with_suffix(".json").write_text(json.dumps(where | {"runs": figures}, indent=1) + "\n")
    names = ("openmoji", "fluent", "recognised", "white_border")
    lines = ["| run | OpenMoji's style | Fluent's | recognised | white border | distance |", "|---" * 6 + "|"]
    for name, row in figures.items():
        cells = [f"{row[column]:.0%}" for column in names]
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} | {row['distance']:.1f} |")
    text = "\n".join(lines) + f"\n\n{', '.join(where.values())}\n"
    args.results.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

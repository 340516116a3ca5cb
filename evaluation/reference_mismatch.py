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
Measures how far preference data are from what a model generates, the paper's reference mismatch (its Figure 2):

    python evaluation/reference_mismatch.py --model stabilityai/stable-diffusion-xl-base-1.0 \\
        --tasks preference=PICKAPIC mine=my-pairs --output_dir mismatch

For every task the model generates images for captions of its pairs; the similarity is the mean cosine of DINOv2's CLS
between the generated and the chosen image, with a 95 % bootstrap interval over captions. Low similarity is large
mismatch.

The hint for beta: in the paper the best beta rises with the mismatch, 8 for preference, 32 for culture, 64 for safety
and for style, 1024 for personalization (its Table 4). The paper plots the similarities but prints no numbers, so a
task can only be placed between tasks of these five names that are measured in the same run.

`--output_dir` gets report.json and report.md; the same command after a kill goes on.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.common import (
    JsonLines,
    fail,
    keep_settings,
    load_pairs,
    open_image,
    open_pair,
    quiet_libraries,
    run_script,
    whole_file,
    write_json,
)
from evaluation.compare import bootstrap_interval
from evaluation.generate import add_generation_flags, check_generation_flags, generate_images, noise_seed, parse_model
from evaluation.metrics import load_metric, read_weights_flag


PAPER_BETAS = {"preference": 8, "culture": 32, "safety": 64, "style": 64, "personalization": 1024}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="PIPELINE[,unet=...][,lora=...], as in generate.py.")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="NAME=PAIRS", help="Data sets of pairs.")
    parser.add_argument("--split", default="train", help="Split of the data sets.")
    parser.add_argument("--max_pairs", type=int, default=200, help="Pairs of each task, a random subset by --seed.")
    parser.add_argument("--weights", nargs="+", default=[], metavar="dinov2=PLACE", help="Other weights.")
    parser.add_argument("--seed", type=int, default=0)
    add_generation_flags(parser)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    check_generation_flags(args)
    args.model = parse_model(f"model={args.model}")[1]
    args.weights = read_weights_flag(args.weights)
    tasks = dict(task.partition("=")[::2] for task in args.tasks)
    for name, source in tasks.items():
        if not name.replace("-", "").replace("_", "").isalnum() or not source:
            fail(f"--tasks {name}={source}: must be NAME=PAIRS")
    args.tasks = tasks
    return args


@torch.no_grad()
def measure(name: str, source: str, args: argparse.Namespace) -> dict:
    """Similarity of a task's chosen images to the model's images of their captions."""
    pairs = load_pairs(source, "--tasks", args.split)
    picked = np.sort(np.random.default_rng(args.seed).permutation(len(pairs.captions))[: args.max_pairs]).tolist()
    jobs = [
        {
            "row": i,
            "prompt": pairs.captions[i],
            "noise_seed": noise_seed(i, args.seed),
            "path": f"images/{name}/{i:06d}.png",
        }
        for i in picked
    ]
    generate_images(name, args.model, jobs, JsonLines(args.output_dir / f"{name}.images.jsonl"), args.output_dir, args)
    log = JsonLines(args.output_dir / f"{name}.similarities.jsonl")
    done = {row["row"] for row in log.rows}
    missing = [job for job in jobs if job["row"] not in done]
    if missing:
        metric = load_metric("dinov2", args)
        for start in tqdm(range(0, len(missing), args.batch_size), desc=f"Comparing {name}", unit="batch"):
            chunk = missing[start : start + args.batch_size]
            generated = [open_image(job["path"], args.output_dir, job["path"]) for job in chunk]
            chosen = [open_pair(pairs, job["row"], "--tasks")[0] for job in chunk]
            cosines = (metric.embed_images(generated) * metric.embed_images(chosen)).sum(1).tolist()
            log.add(*({"row": job["row"], "caption": job["prompt"], "cos": c} for job, c in zip(chunk, cosines)))
    rows = [row for row in log.rows if row["row"] in set(picked)]
    cosines = np.array([row["cos"] for row in rows])
    low, high = bootstrap_interval(cosines, [row["caption"] for row in rows])
    return {"task": name, "pairs": len(rows), "similarity": float(cosines.mean()), "low": low, "high": high}


def hint_beta(similarity: float, results: list[dict]) -> str:
    """Betas of the paper's tasks next above and below in similarity, among those measured."""
    known = [(r["similarity"], r["task"]) for r in results if r["task"] in PAPER_BETAS]
    nearer = min((pair for pair in known if pair[0] >= similarity), default=None)
    farther = max((pair for pair in known if pair[0] <= similarity), default=None)
    ends = [f"{PAPER_BETAS[task]} ({task})" for _, task in (nearer, farther) if task] if nearer and farther else []
    if ends:
        return " to ".join(dict.fromkeys(ends))
    if nearer:
        return f"{PAPER_BETAS[nearer[1]]} ({nearer[1]}) or more"
    if farther:
        return f"{PAPER_BETAS[farther[1]]} ({farther[1]}) or less"
    return "none of the paper's tasks was measured"


def main(args: argparse.Namespace) -> None:
    names = (
        "model",
        "split",
        "seed",
        "resolution",
        "num_inference_steps",
        "guidance_scale",
        "negative_prompt",
        "dtype",
    )
    settings = {name: getattr(args, name) for name in names} | {"dinov2": args.weights["dinov2"]}
    keep_settings(args.output_dir / "settings.json", settings, f"--output_dir {args.output_dir}")
    quiet_libraries()
    results = [measure(name, source, args) for name, source in args.tasks.items()]
    results.sort(key=lambda result: -result["similarity"])
    lines = ["| task | DINOv2 similarity (95 %) | pairs | paper's beta there |", "|---|---|---|---|"]
    for r in results:
        r["beta_hint"] = hint_beta(r["similarity"], results)
        interval = f"{r['similarity']:.4f} ({r['low']:.4f} to {r['high']:.4f})"
        lines.append(f"| {r['task']} | {interval} | {r['pairs']} | {r['beta_hint']} |")
    table = "\n".join(lines)
    order = ", ".join(f"{beta} {task}" for task, beta in PAPER_BETAS.items())
    note = (
        f"The lower the similarity, the larger the mismatch and the better beta. The paper's, in this order: {order}."
    )
    write_json(args.output_dir / "report.json", {"results": results, "paper_betas": PAPER_BETAS})
    with whole_file(args.output_dir / "report.md") as aside:
        aside.write_text(f"{table}\n\n{note}\n", encoding="utf-8")
    print(f"{table}\n{note}")


if __name__ == "__main__":
    run_script(main, parse_args())

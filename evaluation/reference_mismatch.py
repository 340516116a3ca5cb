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
Measure how far preference data are from what a model generates, the paper's reference mismatch (its Figure 2):

    python evaluation/reference_mismatch.py --model stabilityai/stable-diffusion-xl-base-1.0 \\
        --tasks preference=kashif/pickascore:validation mine=my-pairs --output_dir mismatch

For every task, the model generates images for captions of its pairs. The similarity is the mean cosine of DINOv2's CLS
tokens of the generated and the chosen image, with a 95 % bootstrap interval over captions. A low similarity is a large
mismatch.

In the paper, the best beta rises with the mismatch: 8 for preference, 32 for culture, 64 for safety and for style,
1024 for personalization (its Table 4). The paper plots the similarities without numbers, so a task can only be placed
between tasks of these five names that are measured in the same run.

`--output_dir` gets report.json and report.md. The same command after an interruption does what is missing.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import transformers
from tqdm.auto import tqdm

import diffusers


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.common import JsonLines, file_bytes, hash_content, markdown_table, open_image, write_json, write_whole
from evaluation.compare import bootstrap_interval
from evaluation.generate import (
    add_generation_flags,
    generate_images,
    generation_settings,
    load_model,
    noise_seed,
    parse_model,
)
from evaluation.metrics import WEIGHTS, hash_metric, load_metric
from train_diffusion_mapo_sdxl import load_pairs


PAPER_BETAS = {"preference": 8, "culture": 32, "safety": 64, "style": 64, "personalization": 1024}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=parse_model, required=True, help="PIPELINE[,unet=...][,lora=...]; see generate.py."
    )
    parser.add_argument("--tasks", nargs="+", required=True, metavar="NAME=PAIRS[:SPLIT]", help="Data sets of pairs.")
    parser.add_argument("--max_pairs", type=int, default=200, help="Pairs of each task, chosen at random.")
    parser.add_argument("--dinov2", default=WEIGHTS["dinov2"], help="DINOv2, as an id on the hub or a folder.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the choice of pairs and of the noise.")
    add_generation_flags(parser)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the report and the images.")
    args = parser.parse_args(argv)
    for task in args.tasks:
        if not re.fullmatch(r"\w[\w.-]*=.+", task):
            parser.error(f"--tasks {task} isn't NAME=PAIRS[:SPLIT]")
    return args


def list_jobs(task: str, source: str, max_pairs: int, seed: int) -> list[dict]:
    """Choose pairs at random and return what to generate for them. `chosen` is the file of the chosen image."""
    name, _, split = source.partition(":")
    pairs = load_pairs(name, split=split or "train")
    order = np.random.default_rng(seed).permutation(len(pairs))
    jobs = []
    for number in sorted(order[:max_pairs]):
        pair = pairs[int(number)]
        chosen = file_bytes(pair["image_w"], Path())
        name = hash_content(pair["caption"], chosen, seed)
        job = {
            "caption": pair["caption"],
            "chosen": chosen,
            "model_prompt": pair["caption"],
            "noise_seed": noise_seed(name, seed),
            "path": f"images/{task}/{name}.png",
        }
        jobs.append(job)
    return jobs


def measure(task: str, jobs: list[dict], metric, similarities: JsonLines, output_dir: Path, batch_size: int) -> dict:
    """Return the similarity of generated and chosen images, comparing those that weren't compared before."""
    identity = hash_metric(metric)
    known = {row["key"]: row["similarity"] for row in similarities.rows}
    for job in jobs:
        generated = (output_dir / job["path"]).read_bytes()
        job["similarity_key"] = hash_content(identity, job["chosen"], generated)
    missing = [job for job in jobs if job["similarity_key"] not in known]
    for start in tqdm(range(0, len(missing), batch_size), desc=f"Comparing {task}", unit="batch"):
        batch = missing[start : start + batch_size]
        generated = [open_image(job["path"], output_dir, job["path"]) for job in batch]
        chosen = [open_image(job["chosen"], Path(), f"The image chosen for {job['caption']!r:.100}") for job in batch]
        cosines = (metric.embed_images(generated) * metric.embed_images(chosen)).sum(1).tolist()
        for job, cosine in zip(batch, cosines):
            similarities.add({"key": job["similarity_key"], "path": job["path"], "similarity": cosine})
            known[job["similarity_key"]] = cosine
    values = np.array([known[job["similarity_key"]] for job in jobs])
    low, high = bootstrap_interval(values, [job["caption"] for job in jobs])
    return {"task": task, "pairs": len(jobs), "similarity": float(values.mean()), "low": low, "high": high}


def hint_beta(similarity: float, results: list[dict]) -> str:
    """Return the betas of the paper's tasks next above and below in similarity, among those measured."""
    above = None
    below = None
    for result in sorted(results, key=lambda result: result["similarity"]):
        if result["task"] not in PAPER_BETAS:
            continue
        hint = f"{PAPER_BETAS[result['task']]} ({result['task']})"
        if result["similarity"] <= similarity:
            below = hint
        if result["similarity"] >= similarity and above is None:
            above = hint
    if above is None and below is None:
        return "none of the paper's tasks was measured"
    if above is None:
        return f"{below} or less"
    if below is None:
        return f"{above} or more"
    return above if above == below else f"{above} to {below}"


def main(args: argparse.Namespace) -> None:
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    # The pairs and the small model come first: if one of them is missing, nothing has been generated in vain.
    metric = load_metric("dinov2", args.device, WEIGHTS | {"dinov2": args.dinov2})
    jobs = {}
    for text in args.tasks:
        task, _, source = text.partition("=")
        jobs[task] = list_jobs(task, source, args.max_pairs, args.seed)

    log = JsonLines(args.output_dir / "images.jsonl")
    pipeline = load_model(args.model, args.device, args.dtype)
    for task in jobs:
        rows = [{key: value for key, value in job.items() if key != "chosen"} for job in jobs[task]]
        settings = generation_settings(args)
        generate_images(pipeline, rows, log, args.output_dir, settings, args.batch_size, f"Generating {task}")

    similarities = JsonLines(args.output_dir / "similarities.jsonl")
    results = []
    for task in jobs:
        results.append(measure(task, jobs[task], metric, similarities, args.output_dir, args.batch_size))
    results.sort(key=lambda result: -result["similarity"])
    lines = []
    for result in results:
        result["beta_hint"] = hint_beta(result["similarity"], results)
        interval = f"{result['similarity']:.4f} ({result['low']:.4f} to {result['high']:.4f})"
        lines.append([result["task"], interval, str(result["pairs"]), result["beta_hint"]])
    report = markdown_table(["task", "DINOv2 similarity (95 %)", "pairs", "the paper's beta there"], lines)
    betas = ", ".join(f"{beta} for {task}" for task, beta in PAPER_BETAS.items())
    report += (
        f"\n\nThe lower the similarity, the larger the mismatch and the better beta. The paper's betas: {betas}.\n"
    )
    write_json(args.output_dir / "report.json", {"results": results, "paper_betas": PAPER_BETAS})
    write_whole(args.output_dir / "report.md", report)
    print(report)


if __name__ == "__main__":
    main(parse_args())

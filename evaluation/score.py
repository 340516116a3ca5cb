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
Score images, or the images of preference pairs, by one metric after the other:

    python evaluation/score.py eval --metrics pickscore hps aesthetic clip
    python evaluation/score.py --pairs demo/pairs --split test --metrics style --output pair-scores.jsonl
    python evaluation/score.py eval --metrics judge vqa --judge_model Qwen/Qwen3-VL-8B-Instruct
    python evaluation/score.py eval --metrics pairwise --base base --judge_model Qwen/Qwen3-VL-8B-Instruct
    python evaluation/score.py eval --metrics my_module:MyMetric
    python evaluation/score.py --check

Images are a folder of `generate.py`, a folder of NAME.png with NAME.txt, or a table (.jsonl, .csv, .parquet, a data
set) with a prompt and an image in each row. Pairs are any data set that the training scripts read. For pairs, this
prints how often a metric prefers the chosen image, ties counted half, and writes it to NAME.agreement.json.

`pairwise` scores an image by the probability that the judge prefers it to the one that the model --base made of the
same prompt and seed (in pairs, to the rejected image). The base's own score is 0.5.

`--check` loads the published weights, scores the four images of ImageReward's README and prints the published values
beside ours. Do this first. `--check FOLDER` reads the images, 1.webp to 4.webp, from a folder.

`--output` is JSON lines with a row for each of the images and each metric. Scores are also kept in NAME.cache.jsonl,
under a hash of the image, the prompt and the metric's weights, so nothing is scored twice. The weights are ids on the
hub or local paths:

"""

import argparse
import gc
import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import requests
import torch
import transformers
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.common import (
    JsonLines,
    file_bytes,
    hash_content,
    load_rows,
    open_image,
    to_json_lines,
    write_json,
    write_whole,
)
from evaluation.compare import bootstrap_interval
from evaluation.metrics import JUDGE_METRICS, METRICS, WEIGHTS, hash_metric, load_metric
from pairs.files import CAPTION_COLUMNS, IMAGE_COLUMNS, IMAGE_SUFFIXES, check_captions, find_column
from pairs.judge import DEFAULT_CRITERION, Judge
from train_diffusion_mapo_sdxl import load_pairs


logger = logging.getLogger(__name__)

CHECK_PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
CHECK_IMAGES = [
    "https://raw.githubusercontent.com/THUDM/ImageReward/main/assets/images/1.webp",
    "https://raw.githubusercontent.com/THUDM/ImageReward/main/assets/images/2.webp",
    "https://raw.githubusercontent.com/THUDM/ImageReward/main/assets/images/3.webp",
    "https://raw.githubusercontent.com/THUDM/ImageReward/main/assets/images/4.webp",
]
COCO_CATS = "http://images.cocodataset.org/val2017/000000039769.jpg"
PUBLISHED = {
    "imagereward": [0.5812, 0.2745, -1.4132, -2.0296],  # README of THUDM/ImageReward
    "dinov2": [-2.1747, -0.4729, 1.0936],  # the first features of COCO's cats in transformers' own test
}
TOLERANCE = {"imagereward": 0.01, "dinov2": 0.05}
ROW_COLUMNS = ("model", "prompt_id", "prompt", "seed", "path", "image")
# Good and bad images of models like SDXL score within these ranges.
RANGES = {
    "pickscore": (16, 25),
    "hps": (15, 36),
    "aesthetic": (3, 8),
    "imagereward": (-2.5, 2),
    "clip": (10, 40),
    "siglip": (0, 100),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    places = "\n".join(f"    --weights {name}={place}" for name, place in WEIGHTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__ + places, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # Images
    parser.add_argument("images", nargs="?", help="A folder of generate.py, a folder of images, or a table of images.")
    parser.add_argument("--pairs", help="Score preference pairs instead: a data set on the hub, a folder or a file.")
    parser.add_argument("--split", default="train", help="The split of a data set.")
    parser.add_argument("--prompt_column", help="The column of the prompts, if it isn't prompt, caption or text.")
    parser.add_argument("--image_column", help="The column of the images, if it isn't image, path or file_name.")
    parser.add_argument("--max_rows", type=int, help="Use only the first N rows.")
    # Metrics
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help=f"{', '.join(METRICS)}, or MODULE:CLASS.")
    parser.add_argument("--weights", nargs="+", default=[], metavar="NAME=PLACE", help="Other weights; see above.")
    parser.add_argument("--reference_images", type=Path, help="A folder of images with which dinov2 compares.")
    parser.add_argument("--base", help="The model with which pairwise compares the others.")
    parser.add_argument("--judge_model", help="A vision-language model, by its name on the server.")
    parser.add_argument("--judge_criterion", default=DEFAULT_CRITERION, help="What the judge rates, in words.")
    parser.add_argument("--api_base_url", default="http://localhost:8000/v1", help="An OpenAI-compatible server.")
    parser.add_argument("--api_fields", type=json.loads, default={}, help="JSON with more fields for each request.")
    parser.add_argument("--check", nargs="?", const="", metavar="FOLDER", help="Compare with published values.")
    # Run
    parser.add_argument("--batch_size", type=int, default=16, help="Images scored at a time.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu.")
    parser.add_argument("--output", type=Path, help="The default is scores.jsonl in the folder of the images.")
    args = parser.parse_args(argv)

    weights = dict(WEIGHTS)
    for text in args.weights:
        name, _, place = text.partition("=")
        if name not in WEIGHTS or not place:
            parser.error(f"--weights {text} isn't NAME=PLACE with one of the names {', '.join(WEIGHTS)}")
        weights[name] = place
    args.weights = weights
    if args.check is not None:
        args.metrics = args.metrics or [*RANGES, "dinov2"]
        return args

    if (args.images is None) == (args.pairs is None):
        parser.error("name either images or --pairs")
    if not args.metrics:
        parser.error(f"--metrics is missing: name some of {', '.join(METRICS)}, or MODULE:CLASS")
    for name in args.metrics:
        if name not in METRICS and ":" not in name:
            parser.error(f"--metrics {name} is none of {', '.join(METRICS)}, and not MODULE:CLASS")
        if name in JUDGE_METRICS and args.judge_model is None:
            parser.error(f"--metrics {name} needs --judge_model")
    if "dinov2" in args.metrics and args.reference_images is None:
        parser.error("--metrics dinov2 needs --reference_images")
    if args.pairs:
        args.base = "rejected"
    if "pairwise" in args.metrics and args.base is None:
        parser.error("--metrics pairwise needs --base, the model with which the others are compared")
    if args.output is None:
        if args.images is None or not Path(args.images).is_dir():
            parser.error("--output is missing: name a file, such as scores.jsonl")
        args.output = Path(args.images) / "scores.jsonl"
    return args


# ---- What is scored -------------------------------------------------------------------------------------------------
def list_images(rows, root: Path, prompt_column: str, image_column: str, max_rows: int | None) -> list[dict]:
    """List the images of a table. `row` and `column` say where the file is, `image` is its hash."""
    items = []
    prompt_ids = {}
    counts = {}
    count = len(rows) if max_rows is None else min(max_rows, len(rows))
    for number in tqdm(range(count), desc="Reading images", unit="image"):
        row = rows[number]
        prompt = row[prompt_column]
        model = row.get("model", "images")
        # A table needs neither ids nor seeds: images of the same prompt belong together, in the order of the rows.
        counts[model, prompt] = counts.get((model, prompt), -1) + 1
        item = {
            "model": model,
            "prompt_id": row.get("prompt_id", prompt_ids.setdefault(prompt, len(prompt_ids))),
            "prompt": prompt,
            "seed": row.get("seed", counts[model, prompt]),
            "image": hash_content(file_bytes(row[image_column], root)),
            "row": number,
            "column": image_column,
        }
        if isinstance(row[image_column], str):
            item["path"] = row[image_column]
        items.append(item)
    return items


def list_pairs(pairs) -> list[dict]:
    """List the images of pairs like the images of two models, called chosen and rejected."""
    items = []
    for number, pair in enumerate(tqdm(pairs, desc="Reading images", unit="pair")):
        for model, column in (("chosen", "image_w"), ("rejected", "image_l")):
            item = {
                "model": model,
                "prompt_id": number,
                "prompt": pair["caption"],
                "seed": 0,
                "image": hash_content(file_bytes(pair[column], Path())),
                "row": number,
                "column": column,
            }
            items.append(item)
    return items


def find_bases(items: list[dict], base: str) -> list[dict]:
    """Return the items that have a counterpart by the model `base`, with this as their `base`."""
    bases = {(item["prompt_id"], item["seed"]): item for item in items if item["model"] == base}
    if not bases:
        models = sorted({item["model"] for item in items})
        raise ValueError(f"--base {base}: the images are by {', '.join(models)}.")
    compared = []
    for item in items:
        if (item["prompt_id"], item["seed"]) in bases:
            compared.append(item | {"base": bases[item["prompt_id"], item["seed"]]})
    return compared


# ---- Scoring --------------------------------------------------------------------------------------------------------
@torch.no_grad()
def score_items(
    name: str, metric, items: list[dict], rows, root: Path, cache: JsonLines, batch_size: int
) -> list[dict]:
    """Return the rows of one metric for --output, scoring what the cache doesn't have yet."""
    identity = hash_metric(metric)
    known = {row["key"]: row["score"] for row in cache.rows}
    missing = {}  # an image that stands in several rows is scored once
    for item in items:
        base_image = item["base"]["image"] if "base" in item else None
        item["key"] = hash_content(identity, item["prompt"], item["image"], base_image)
        if item["image"] == base_image:
            known[item["key"]] = 0.5
        elif item["key"] not in known:
            missing[item["key"]] = item

    def open_item(item: dict):
        return open_image(rows[item["row"]][item["column"]], root, item.get("path", f"The image of row {item['row']}"))

    todo = list(missing.values())
    bar = tqdm(total=len(todo), desc=f"Scoring {name}", unit="image")
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        images = [open_item(item) for item in batch]
        if name == "pairwise":
            images = [(image, open_item(item["base"])) for image, item in zip(images, batch)]
        scores = metric.score(images, [item["prompt"] for item in batch])
        scores = torch.as_tensor(scores).double().flatten().tolist()
        if len(scores) != len(batch):
            raise ValueError(f"--metrics {name} gave {len(scores)} scores for {len(batch)} images.")
        for item, score in zip(batch, scores):
            if math.isfinite(score):  # a judge's missing answer isn't kept: the same command asks again
                cache.add({"metric": name, "key": item["key"], "score": score})
                known[item["key"]] = score
        bar.update(len(batch))
    bar.close()

    scored = []
    for item in items:
        kept = {key: value for key, value in item.items() if key in ROW_COLUMNS}
        scored.append({"metric": name, **kept, "score": known.get(item["key"])})
    unscored = sum(row["score"] is None for row in scored)
    if unscored:
        logger.warning(f"{name}: {unscored} of {len(scored)} images got no score. They are left out of comparisons.")
    return scored


def report_agreement(table: list[dict], path: Path) -> None:
    """Print and write how often each metric scores the chosen image higher. A tie counts half."""
    by_metric = {}
    for row in table:
        by_metric.setdefault(row["metric"], {}).setdefault(row["prompt_id"], {})[row["model"]] = row
    report = {}
    for name, pairs in by_metric.items():
        wins = []
        captions = []
        for pair in pairs.values():
            chosen = pair["chosen"]["score"]
            rejected = pair["rejected"]["score"]
            if chosen is not None and rejected is not None:
                wins.append((chosen > rejected) + 0.5 * (chosen == rejected))
                captions.append(pair["chosen"]["prompt"])
        if not wins:
            raise ValueError(f"--metrics {name}: no pair has scores for both images.")
        agreement = float(np.mean(wins))
        low, high = bootstrap_interval(np.array(wins, dtype=float), captions)
        report[name] = {"pairs": len(wins), "agreement": agreement, "low": low, "high": high}
        print(f"{name}: agrees with {agreement:.1%} of {len(wins)} labels (95 %: {low:.1%} to {high:.1%})")
    write_json(path, report)


def report_means(table: list[dict]) -> None:
    scores = {}
    for row in table:
        values = scores.setdefault((row["metric"], row["model"]), [])
        if row["score"] is not None:
            values.append(row["score"])
    for (metric, model), values in scores.items():
        mean = f"{np.mean(values):.4f}" if values else "none"
        print(f"{metric} of {model}: mean {mean} over {len(values)} images")


# ---- Check against published values ---------------------------------------------------------------------------------
def load_check_images(urls: list[str], folder: str) -> list:
    images = []
    for url in urls:
        name = url.rpartition("/")[2]
        if folder:
            images.append(open_image(name, Path(folder), f"{folder}/{name}"))
            continue
        try:
            images.append(open_image(requests.get(url, timeout=60).content, Path(), url))
        except requests.RequestException as error:
            raise ConnectionError(
                f"--check can't download {url}. Download {', '.join(urls)} yourself and pass their folder to --check."
            ) from error
    return images


@torch.no_grad()
def check_metric(name: str, args: argparse.Namespace) -> tuple[str, str, str]:
    """Return our values, the published values, and "ok" or what is wrong."""
    try:
        metric = load_metric(name, args.device, args.weights)
    except (OSError, ValueError, KeyError, ImportError) as error:  # the other metrics can still be checked
        return str(error).strip().splitlines()[0], "", "not loaded"
    if name == "dinov2":
        ours = metric.class_tokens(load_check_images([COCO_CATS], args.check))[0, :3]
    else:
        ours = metric.score(load_check_images(CHECK_IMAGES, args.check), [CHECK_PROMPT] * 4)
    ours = torch.as_tensor(ours).tolist()
    if name in PUBLISHED:
        ok = np.allclose(ours, PUBLISHED[name], atol=TOLERANCE[name])
        expected = ", ".join(f"{value:.4f}" for value in PUBLISHED[name])
    else:
        low, high = RANGES.get(name, (-math.inf, math.inf))
        ok = low <= min(ours) and max(ours) <= high
        expected = f"none; {low} to {high} is usual"
    return ", ".join(f"{value:.4f}" for value in ours), expected, "ok" if ok else "differs"


def check(args: argparse.Namespace) -> None:
    print("| metric | here | published | |\n|---|---|---|---|")
    wrong = []
    for name in args.metrics:
        ours, published, verdict = check_metric(name, args)
        print(f"| {name} | {ours} | {published} | {verdict} |", flush=True)
        if verdict != "ok":
            wrong.append(name)
    if wrong:
        raise ValueError(f"--check: {', '.join(wrong)}: see the table.")


# ---- Main -----------------------------------------------------------------------------------------------------------
def main(args: argparse.Namespace) -> None:
    transformers.utils.logging.set_verbosity_error()
    if args.check is not None:
        check(args)
        return

    references = []
    if args.reference_images is not None:
        for file in sorted(args.reference_images.iterdir()):
            if file.suffix.lower() in IMAGE_SUFFIXES:
                references.append(open_image(str(file), Path(), str(file)))
    if args.pairs:
        root = Path()
        rows = load_pairs(args.pairs, split=args.split, max_pairs=args.max_rows)
        items = list_pairs(rows)
    else:
        rows, root = load_rows(args.images, args.split)
        prompt_column = find_column(rows, args.prompt_column, CAPTION_COLUMNS, "--prompt_column", args.images)
        image_column = find_column(rows, args.image_column, IMAGE_COLUMNS, "--image_column", args.images)
        items = list_images(rows, root, prompt_column, image_column, args.max_rows)
        check_captions([item["prompt"] for item in items], args.images)

    # --output holds the current images. What an earlier run scored stays in it if the image is still the same.
    current = set()
    for item in items:
        current.add(tuple(item[column] for column in ("model", "prompt_id", "prompt", "seed", "image")))
    table = []
    if args.output.exists():
        for row in JsonLines(args.output).rows:
            if tuple(row.get(column) for column in ("model", "prompt_id", "prompt", "seed", "image")) in current:
                table.append(row)
    cache = JsonLines(args.output.with_suffix(".cache.jsonl"))
    for name in dict.fromkeys(args.metrics):
        judge = None
        if name in JUDGE_METRICS:
            judge = Judge(args.api_base_url, args.judge_model, criterion=args.judge_criterion, fields=args.api_fields)
        metric = load_metric(name, args.device, args.weights, judge, references=references)
        compared = find_bases(items, args.base) if name == "pairwise" else items
        scored = score_items(name, metric, compared, rows, root, cache, args.batch_size)
        table = [row for row in table if row["metric"] != name] + scored
        write_whole(args.output, to_json_lines(table))
        del metric
        gc.collect()
        torch.cuda.empty_cache()
    if args.pairs:
        scored_now = [row for row in table if row["metric"] in args.metrics]
        report_agreement(scored_now, args.output.with_suffix(".agreement.json"))
    else:
        report_means(table)
    print(f"Scores in {args.output}")


if __name__ == "__main__":
    main(parse_args())

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
Scores images, or the images of preference pairs, by one metric after the other:

    python evaluation/score.py eval --metrics pickscore hps aesthetic clip
    python evaluation/score.py --pairs demo/pairs --split test --metrics style --output pair-scores.jsonl
    python evaluation/score.py eval --metrics judge --judge_endpoint http://localhost:8000/v1 --weights judge=MODEL
    python evaluation/score.py eval --metrics pairwise --base base
    python evaluation/score.py eval --metrics my_module:MyMetric
    python evaluation/score.py --check

Images are a folder of `generate.py` or a table (.jsonl, .csv, .parquet, a data set) with a prompt and an image in a
row. Pairs are any data set that the training scripts read; for these the fraction of pairs that the metric orders as
the label does is printed, ties half, and written beside the scores as NAME.agreement.json.

`pairwise` scores each image by the probability that the judge prefers it to the one that `--base` made of the same
prompt and seed (of pairs, to the rejected one); the base's own score is 0.5.

`--check` loads the published weights, scores the four images of ImageReward's README and puts what is published beside
what comes out here: do this first. `--check FOLDER` takes the images, 1.webp to 4.webp, from there.

`--output` is JSON lines, a row for each image and metric. One metric is in memory at a time; the same command after
a kill scores what is missing, and more metrics can be added later. Weights are ids on the hub or local paths:

"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.common import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    IMAGE_SUFFIXES,
    TABLE_SUFFIXES,
    JsonLines,
    add_endpoint_flags,
    check_captions,
    fail,
    find_column,
    load_pairs,
    load_rows,
    open_image,
    open_pair,
    quiet_libraries,
    run_script,
    warn,
    write_json,
)
from evaluation.generate import free_memory
from evaluation.metrics import (
    JUDGES,
    METRICS,
    WEIGHTS,
    add_judge_flags,
    load_metric,
    metric_name,
    places_of,
    read_weights_flag,
)


CHECK_PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
CHECK_IMAGES = [
    f"https://raw.githubusercontent.com/THUDM/ImageReward/main/assets/images/{number}.webp" for number in (1, 2, 3, 4)
]
COCO_CATS = "http://images.cocodataset.org/val2017/000000039769.jpg"
PUBLISHED = {
    "imagereward": (0.5812, 0.2745, -1.4132, -2.0296),  # THUDM/ImageReward's README
    "dinov2": (-2.1747, -0.4729, 1.0936),  # transformers' Dinov2ModelIntegrationTest: CLS of COCO's cats begins so
}
TOLERANCE = {"imagereward": 0.01, "dinov2": 0.05}
# Where good and bad generations of SDXL's kind lie; a check outside of it is worth a look.
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
    parser.add_argument("images", nargs="?", help="Folder of generate.py, or a table of images.")
    parser.add_argument("--pairs", help="Preference pairs instead: a data set on the hub, a local folder or file.")
    parser.add_argument("--split", default="train", help="Split of a data set.")
    parser.add_argument("--prompt_column", help="Where it isn't prompt, caption or text.")
    parser.add_argument("--image_column", help="Where it isn't image, path or file_name.")
    parser.add_argument("--max_rows", type=int, help="Use the first N rows only.")
    parser.add_argument(
        "--metrics", nargs="+", type=metric_name, metavar="NAME", help=f"{', '.join(METRICS)}, or MODULE:CLASS."
    )
    parser.add_argument("--base", help="The model that pairwise compares the others with.")
    parser.add_argument("--check", nargs="?", const="", metavar="FOLDER", help="Compare with published values.")
    parser.add_argument("--weights", nargs="+", default=[], metavar="NAME=PLACE", help="Other weights; see above.")
    parser.add_argument("--reference_images", type=Path, help="Folder of images that dinov2 compares with.")
    add_judge_flags(parser)
    add_endpoint_flags(parser)
    parser.add_argument("--batch_size", type=int, default=16, help="Images at a time.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="Default: scores.jsonl in the folder of the images.")
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_source(place: Path, output: Path | None) -> None:
    # With --output, A/B may be a data set on the hub.
    if not place.exists() and (output is None or len(place.parts) != 2):
        fail(f"{place}: no such folder; name the --output_dir of generate.py")
    if place.is_file() and place.suffix not in TABLE_SUFFIXES:
        fail(f"{place}: is no folder of generate.py and no table ({', '.join(TABLE_SUFFIXES)})")


def check_args(args: argparse.Namespace) -> None:
    args.weights = read_weights_flag(args.weights)
    args.references = []
    if args.check is not None:
        args.metrics = args.metrics or [*RANGES, "dinov2"]
        return
    if not args.metrics:
        fail(f"--metrics: name some of {', '.join(METRICS)}")
    if (args.images is None) == (args.pairs is None):
        fail("name either a folder of images or --pairs")
    if args.images is not None:
        check_source(Path(args.images), args.output)
    if args.output is None:
        if args.images is None or not Path(args.images).is_dir():
            fail("--output: name a file, such as scores.jsonl")
        args.output = Path(args.images) / "scores.jsonl"
    if args.batch_size < 1:
        fail(f"--batch_size {args.batch_size}: must be at least 1")
    if args.pairs:
        args.base = "rejected"
    if "pairwise" in args.metrics and args.base is None:
        fail("--metrics pairwise needs --base NAME to compare the others with")
    if "dinov2" in args.metrics:
        if args.reference_images is None:
            fail("--metrics dinov2 needs --reference_images FOLDER to compare with")
        if args.reference_images.is_dir():
            args.references = sorted(p for p in args.reference_images.iterdir() if p.suffix in IMAGE_SUFFIXES)
        if not args.references:
            fail(f"--reference_images {args.reference_images}: no images there")
        where = f"--reference_images {args.reference_images}: "
        args.references = [open_image(p.name, p.parent, where + p.name) for p in args.references]


# ---------------------------------------------------------------------------------------------------------------------
# What is scored
# ---------------------------------------------------------------------------------------------------------------------


def list_images(args: argparse.Namespace) -> list[dict]:
    """Rows with model, prompt_id, seed, prompt, and `open`, which gives the image."""
    rows, root = load_rows(args.images, "images", args.split)
    if len(rows) == 0:
        fail(f"{args.images}: no rows")
    prompt = find_column(rows, args.prompt_column, CAPTION_COLUMNS, "--prompt_column", args.images)
    image = find_column(rows, args.image_column, IMAGE_COLUMNS, "--image_column", args.images)
    items, ids = [], {}
    for i, row in enumerate(rows):
        if i == args.max_rows:
            break
        item = {key: row[key] for key in ("model", "seed") if key in row}
        # A table without ids: images of one text belong together.
        item["prompt_id"] = row.get("prompt_id", ids.setdefault(row[prompt], len(ids)))
        item |= {"model": item.get("model", "images"), "seed": item.get("seed", i), "prompt": row[prompt]}
        if isinstance(row[image], str):
            item["path"] = row[image]
        items.append({**item, "open": lambda i=i: open_image(rows[i][image], root, f"{args.images}: row {i}")})
    check_captions([item["prompt"] for item in items], args.images)
    return items


def list_pairs(args: argparse.Namespace) -> list[dict]:
    """The chosen and the rejected image of every pair whose label decides, as rows of the models of these names."""
    pairs = load_pairs(args.pairs, "--pairs", args.split)
    return [
        {
            "model": name,
            "prompt_id": int(pairs.rows[i]),
            "seed": 0,
            "prompt": caption,
            "open": lambda i=i, side=side: open_pair(pairs, i, "--pairs")[side],
        }
        for i, caption in enumerate(pairs.captions[: args.max_rows])
        for side, name in enumerate(("chosen", "rejected"))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------


def set_against_base(items: list[dict], args: argparse.Namespace) -> list[dict]:
    """For pairwise: `open` gives the image and the base's of the same prompt and seed, None for the base itself."""
    base = {(item["prompt_id"], item["seed"]): item["open"] for item in items if item["model"] == args.base}
    if not base:
        fail(f"--base {args.base}: the images have only {', '.join(dict.fromkeys(item['model'] for item in items))}")

    def open_both(item: dict) -> tuple:
        if item["model"] == args.base:
            return None, None
        return item["open"](), base[item["prompt_id"], item["seed"]]()

    there = [item for item in items if (item["prompt_id"], item["seed"]) in base]
    return [item | {"open": lambda item=item: open_both(item)} for item in there]


def key_of(row: dict) -> tuple:
    return row["model"], row["prompt_id"], row["seed"]


def describe(name: str, args: argparse.Namespace) -> str:
    """What the numbers depend on besides the image and its prompt."""
    parts = [*places_of(name, args).values()] or [name]
    if name in JUDGES:
        parts += [args.judge_endpoint or "local", args.judge_criterion]
    if name == "pairwise":
        parts.append(f"against {args.base}")
    if name == "dinov2":
        parts.append(str(args.reference_images))
    return " | ".join(parts)


@torch.no_grad()
def score_all(name: str, items: list[dict], log: JsonLines, args: argparse.Namespace) -> None:
    how = describe(name, args)
    if name == "pairwise":
        items = set_against_base(items, args)
    before = [row for row in log.rows if row["metric"] == name]
    for row in before:
        if row["how"] != how:
            fail(f"--output {log.path} holds {name} by {row['how']}, now {how}: name another file")
    done = {key_of(row) for row in before}
    missing = [item for item in items if key_of(item) not in done]
    if missing:
        metric = load_metric(name, args)
        with tqdm(total=len(items), initial=len(items) - len(missing), desc=f"Scoring {name}", unit="image") as bar:
            # As many as are asked for at a time: a kill costs the ratings under way only.
            size = metric.model.workers if name in JUDGES else args.batch_size
            for start in range(0, len(missing), size):
                chunk = missing[start : start + size]
                scores = metric.score([item["open"]() for item in chunk], [item["prompt"] for item in chunk])
                scores = torch.as_tensor(scores).double().flatten().tolist()
                if len(scores) != len(chunk):
                    fail(f"--metrics {name}: {len(scores)} scores for {len(chunk)} images")
                rows = []
                for item, score in zip(chunk, scores):
                    named = {key: value for key, value in item.items() if key != "open"}
                    rows.append({"metric": name, **named, "score": score if np.isfinite(score) else None, "how": how})
                log.add(*rows)
                bar.update(len(chunk))
        del metric
        free_memory()
    rows = [row for row in log.rows if row["metric"] == name]
    if unscored := sum(row["score"] is None for row in rows):
        message = f"{name}: {unscored} of {len(rows)} images got no score"
        if unscored == len(rows):
            fail(f"{message} of {how}: was each answer cut off at --judge_max_tokens? Delete {log.path} to ask again")
        warn(f"{message}; they are left out of comparisons")


def report_agreement(items: list[dict], log: JsonLines, args: argparse.Namespace) -> None:
    """How often each metric orders chosen and rejected as the label does; a tie counts half."""
    from evaluation.compare import bootstrap_interval

    captions = {item["prompt_id"]: item["prompt"] for item in items}
    report = {}
    for name in args.metrics:
        scores = {key_of(row): row["score"] for row in log.rows if row["metric"] == name}
        wins, clusters = [], []
        for i in captions:
            chosen, rejected = scores[("chosen", i, 0)], scores[("rejected", i, 0)]
            if chosen is not None and rejected is not None:
                wins.append((chosen > rejected) + 0.5 * (chosen == rejected))
                clusters.append(captions[i])
        low, high = bootstrap_interval(np.array(wins, dtype=float), clusters)
        report[name] = {"pairs": len(wins), "agreement": float(np.mean(wins)), "low": low, "high": high}
        print(
            f"{name}: agrees with {report[name]['agreement']:.1%} of {len(wins)} labels (95 %: {low:.1%}-{high:.1%})"
        )
    write_json(args.output.with_suffix(".agreement.json"), report)


# ---------------------------------------------------------------------------------------------------------------------
# Check against published values
# ---------------------------------------------------------------------------------------------------------------------


def load_check_images(urls: list[str], args: argparse.Namespace) -> list:
    import requests

    if args.check:
        return [open_image(url.rpartition("/")[2], Path(args.check), f"--check {args.check}") for url in urls]
    try:
        return [open_image(requests.get(url, timeout=60).content, Path("."), url) for url in urls]
    except requests.RequestException:
        fail(f"--check: no connection to {urls[0]}: download {', '.join(urls)}, then --check FOLDER")


@torch.no_grad()
def check_metric(name: str, args: argparse.Namespace) -> str:
    """A row of the table; its last cell is "ok" or not."""
    try:
        metric = load_metric(name, args)
    except SystemExit as stop:  # the others can still be checked
        return f"| {name} | {stop.code.partition('error: ')[2]} | | not loaded |"
    if name == "dinov2":
        ours = metric.class_tokens(load_check_images([COCO_CATS], args))[0, :3]
    else:
        ours = torch.as_tensor(metric.score(load_check_images(CHECK_IMAGES, args), [CHECK_PROMPT] * 4))
    published, (low, high) = PUBLISHED.get(name), RANGES.get(name, (-np.inf, np.inf))
    if published:
        good = np.allclose(ours.cpu(), published, atol=TOLERANCE[name])
        expected = ", ".join(f"{value:.4f}" for value in published)
    else:
        good = bool(((ours >= low) & (ours <= high)).all())
        expected = f"nothing; {low} to {high} is usual"
    numbers = ", ".join(f"{value:.4f}" for value in ours.tolist())
    return f"| {name} | {numbers} | {expected} | {'ok' if good else 'differs'} |"


def check(args: argparse.Namespace) -> None:
    print("| metric | here | published | |\n|---|---|---|---|")
    wrong = []
    for name in args.metrics:
        row = check_metric(name, args)
        print(row, flush=True)
        free_memory()
        if not row.endswith("| ok |"):
            wrong.append(name)
    if wrong:
        fail(f"--check: {', '.join(wrong)}: not as published")


def main(args: argparse.Namespace) -> None:
    if args.check is not None:
        quiet_libraries()
        return check(args)
    items = list_pairs(args) if args.pairs else list_images(args)
    quiet_libraries()
    log = JsonLines(args.output)
    for name in dict.fromkeys(args.metrics):
        score_all(name, items, log, args)
    if args.pairs:
        report_agreement(items, log, args)
    else:
        for name in dict.fromkeys(args.metrics):
            for model in dict.fromkeys(item["model"] for item in items):
                rows = [row for row in log.rows if row["metric"] == name and row["model"] == model]
                scores = [row["score"] for row in rows if row["score"] is not None]
                mean = f"{np.mean(scores):.4f}" if scores else "none"
                print(f"{name} {model}: mean {mean} of {len(scores)} images")
    print(f"Scores in {args.output}")


if __name__ == "__main__":
    run_script(main, parse_args())

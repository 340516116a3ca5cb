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
Lays out images of `generate.py` as the scorers of GenEval and T2I-CompBench expect them:

    python evaluation/generate.py --prompts evaluation_metadata.jsonl --seeds 0 1 2 3 --models ... --output_dir g
    python evaluation/export_layouts.py g --model tuned --layout geneval --output_dir geneval-tuned

    geneval       00000/metadata.jsonl        line N of evaluation_metadata.jsonl, for its evaluate_images.py
                  00000/samples/0000.png      one image for each seed
    t2i-compbench samples/PROMPT_000000.png   numbered through, prompt after prompt; its scorers take the question from
                                              the name and the row of their results from the number

For T2I-CompBench give `generate.py` one of its files such as examples/dataset/color_val.txt, and ten seeds.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.common import fail, keep_settings, load_rows, run_script, whole_file


OWN_COLUMNS = ("model", "prompt_id", "seed", "noise_seed", "path")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="Folder of generate.py.")
    parser.add_argument("--model", required=True, help="Name of the model in that folder.")
    parser.add_argument("--layout", required=True, choices=["geneval", "t2i-compbench"])
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    if not (args.images / "images.jsonl").exists():
        fail(f"images {args.images}: no images.jsonl: run generate.py first")
    return args


def copy_whole(source: Path, target: Path) -> None:
    with whole_file(target) as aside:
        shutil.copyfile(source, aside)


def export_geneval(groups: dict[int, list[dict]], args: argparse.Namespace) -> None:
    for prompt_id, rows in tqdm(groups.items(), desc="Copying", unit="prompt"):
        metadata = {key: value for key, value in rows[0].items() if key not in OWN_COLUMNS}
        if missing := [key for key in ("tag", "include", "prompt") if key not in metadata]:
            fail(
                f"images {args.images}: prompt {prompt_id} has no {missing[0]}: generate from the prompts of "
                "GenEval's evaluation_metadata.jsonl"
            )
        folder = args.output_dir / f"{prompt_id:05d}"
        for number, row in enumerate(rows):
            copy_whole(args.images / row["path"], folder / "samples" / f"{number:04d}.png")
        with whole_file(folder / "metadata.jsonl") as aside:
            aside.write_text(json.dumps(metadata) + "\n", encoding="utf-8")


def export_compbench(groups: dict[int, list[dict]], args: argparse.Namespace) -> None:
    number = 0
    for prompt_id, rows in tqdm(groups.items(), desc="Copying", unit="prompt"):
        prompt = rows[0]["prompt"]
        if "_" in prompt or "/" in prompt or len(prompt.encode()) > 240:
            fail(f"images {args.images}: prompt {prompt_id} has _ or / or is too long for a file's name: {prompt}")
        for row in rows:
            copy_whole(args.images / row["path"], args.output_dir / "samples" / f"{prompt}_{number:06d}.png")
            number += 1


def main(args: argparse.Namespace) -> None:
    groups, models = {}, set()
    for row in load_rows(str(args.images), "images")[0]:
        models.add(row["model"])
        if row["model"] == args.model:
            groups.setdefault(row["prompt_id"], []).append(row)
    if not groups:
        fail(f"--model {args.model}: {args.images} has only {', '.join(sorted(models))}")
    groups = {i: sorted(groups[i], key=lambda row: row["seed"]) for i in sorted(groups)}
    if len({len(rows) for rows in groups.values()}) > 1:
        fail(f"images {args.images}: some prompts have fewer images than others: let generate.py finish")
    # With other seeds the numbers would stand for other images, and old files would stay among the new.
    settings = {"images": str(args.images), "model": args.model, "layout": args.layout}
    settings |= {"prompts": len(groups), "seeds": [row["seed"] for row in next(iter(groups.values()))]}
    keep_settings(args.output_dir / "export.json", settings, f"--output_dir {args.output_dir}")
    (export_geneval if args.layout == "geneval" else export_compbench)(groups, args)
    print(f"{sum(map(len, groups.values()))} images of {len(groups)} prompts in {args.output_dir}")


if __name__ == "__main__":
    run_script(main, parse_args())

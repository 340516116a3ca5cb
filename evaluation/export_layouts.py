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
Copy images of `generate.py` into the folders that the scorers of GenEval and T2I-CompBench read:

    python evaluation/generate.py --prompts evaluation_metadata.jsonl --seeds 0 1 2 3 --models ... --output_dir g
    python evaluation/export_layouts.py g --model tuned --layout geneval --output_dir geneval-tuned

    geneval       00000/metadata.jsonl        a line of evaluation_metadata.jsonl, for its evaluate_images.py
                  00000/samples/0000.png      one image for each seed
    t2i-compbench samples/PROMPT_000000.png   numbered over all prompts; its scorers read the question from the name
                                              and the row of their results from the number

For T2I-CompBench, give `generate.py` one of its files, such as examples/dataset/color_val.txt, and ten seeds.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.common import load_rows


OWN_COLUMNS = ("model", "prompt_id", "model_prompt", "seed", "noise_seed", "path", "key")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="Folder of generate.py.")
    parser.add_argument("--model", required=True, help="Name of the model in that folder.")
    parser.add_argument("--layout", required=True, choices=["geneval", "t2i-compbench"], help="Whose scorer reads it.")
    parser.add_argument("--output_dir", type=Path, required=True, help="A folder that doesn't exist yet.")
    return parser.parse_args(argv)


def export_geneval(rows: list[dict], source: Path, target: Path) -> None:
    numbers = {}
    for row in tqdm(rows, desc="Copying", unit="image"):
        for name in ("tag", "include"):
            if name not in row:
                raise ValueError(
                    f"{source}: the prompt {row['prompt']!r:.100} has no {name}. Generate from the prompts in GenEval's "
                    "evaluation_metadata.jsonl."
                )
        folder = target / f"{row['prompt_id']:05d}"
        number = numbers.get(folder, 0)
        numbers[folder] = number + 1
        if number == 0:
            (folder / "samples").mkdir(parents=True)
            metadata = {key: value for key, value in row.items() if key not in OWN_COLUMNS}
            (folder / "metadata.jsonl").write_text(json.dumps(metadata) + "\n")
        shutil.copyfile(source / row["path"], folder / "samples" / f"{number:04d}.png")


def export_compbench(rows: list[dict], source: Path, target: Path) -> None:
    (target / "samples").mkdir(parents=True)
    for number, row in enumerate(tqdm(rows, desc="Copying", unit="image")):
        prompt = row["prompt"]
        if "_" in prompt or "/" in prompt or len(prompt.encode()) > 240:
            raise ValueError(
                f"{source}: the prompt {prompt!r:.100} has _ or /, or is too long for the name of a file."
            )
        shutil.copyfile(source / row["path"], target / "samples" / f"{prompt}_{number:06d}.png")


def main(args: argparse.Namespace) -> None:
    if args.output_dir.exists():
        raise FileExistsError(f"--output_dir {args.output_dir} exists. Name a new folder.")
    all_rows, _ = load_rows(str(args.images))
    rows = [row for row in all_rows if row["model"] == args.model]
    if not rows:
        models = sorted({row["model"] for row in all_rows})
        raise ValueError(f"--model {args.model}: {args.images} has images of {', '.join(models)}.")
    rows.sort(key=lambda row: (row["prompt_id"], row["seed"]))
    prompts = {row["prompt_id"] for row in rows}
    seeds = {row["seed"] for row in rows}
    if len(rows) != len(prompts) * len(seeds):
        raise ValueError(f"{args.images}: some prompts have fewer images than others. Let generate.py finish.")

    temporary = args.output_dir.with_name(f".tmp-{args.output_dir.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    if args.layout == "geneval":
        export_geneval(rows, args.images, temporary)
    else:
        export_compbench(rows, args.images, temporary)
    temporary.rename(args.output_dir)
    print(f"{len(rows)} images of {len(prompts)} prompts in {args.output_dir}")


if __name__ == "__main__":
    main(parse_args())

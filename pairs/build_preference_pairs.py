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
Builds preference pairs that `train_diffusion_mapo_sdxl.py` reads, in one of three ways:

    python pairs/build_preference_pairs.py from-images --images photos/ --model SDXL --output_dir my-pairs
        Your images are chosen, and what the model generates for their captions is rejected (section 3.2 of the
        paper). This turns any text-to-image data set into preference pairs.

    python pairs/build_preference_pairs.py from-captions --captions prompts.txt --attribute "cartoon style" \\
        --judge_model Qwen/Qwen3-VL-8B-Instruct --model black-forest-labs/FLUX.1-schnell --output_dir my-pairs
        A language model describes what each caption shows, without its style. The image generated from that with
        the attribute is chosen, the one without it is rejected, and a vision-language model rates both.

    python pairs/build_preference_pairs.py from-scores --images eval --metric pickscore --output_dir my-pairs
        Of several scored images of a prompt, the best is chosen and the worst rejected.

`--output_dir` then holds data/train-00000-of-00001.parquet in the columns of Pick-a-Pic (plus score, model, seed and
prompt of both images), README.md with the counts, and contact_sheet.png. Generated images and a model's answers are
kept in work/ under a hash of everything they depend on, so the same command after a kill does only what is missing.
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
import textwrap
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm.auto import tqdm

import diffusers


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.common import hash_content
from pairs.files import JsonLines, check_captions, read_captions, read_images
from pairs.judge import DEFAULT_CRITERION, RATE_PROMPT, Judge
from train_diffusion_mapo_sdxl import hash_pipeline, load_image, load_pipeline


PARQUET = "data/train-00000-of-00001.parquet"  # the name by which `datasets` finds it in a folder that holds images
FONT = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
REQUESTS_AT_A_TIME = 8

CONTEXT_PROMPT = """Rewrite a prompt for a text-to-image model so that it says only what is to be seen: who or what,
where, doing what. Leave out every word about how it is drawn or photographed: no style, medium, artist, camera or
quality. Write one sentence of about 25 words and put it between two [[PROMPT]] tags, like this:

[[PROMPT]] A fox in a red scarf waits at a snowy bus stop while a yellow bus comes around the corner of a quiet village
street. [[PROMPT]]

The prompt: {caption}"""
CONTEXT_TRIES = 5
STYLE_WORDS = (
    "style stylized photo photograph photography photorealistic painting watercolor illustration illustrated drawing "
    "sketch anime cartoon manga render rendered cgi 3d 4k 8k hd cinematic realistic artwork concept art artstation"
)


class PairImage(NamedTuple):
    """One image of a pair and what is known about it."""

    path: Path
    score: float | None = None
    model: str | None = None
    seed: int | None = None
    prompt: str | None = None


class Pair(NamedTuple):
    caption: str
    chosen: PairImage
    rejected: PairImage


# ---- Arguments ------------------------------------------------------------------------------------------------------
def add_generation_arguments(parser):
    gpu = torch.cuda.is_available()
    parser.add_argument("--resolution", type=int, default=1024, help="Width and height of the generated images.")
    parser.add_argument("--num_inference_steps", type=int, default=30, help="Denoising steps per image.")
    parser.add_argument("--guidance_scale", type=float, default=5.0, help="Scale of classifier-free guidance.")
    parser.add_argument("--negative_prompt", type=str, help="Negative prompt for every image.")
    parser.add_argument("--batch_size", type=int, default=4, help="Number of images to generate at a time.")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16" if gpu else "fp32", help="Precision of the model.")
    parser.add_argument("--device", type=str, default="cuda" if gpu else "cpu", help="Where images are generated.")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    model_help = "Hub id, diffusers folder or .safetensors file; `,lora=PATH` after it adds a LoRA."
    template_help = "{attribute}, {context} and {caption} are filled in."

    images = commands.add_parser("from-images", help="Your images against what the model generates.")
    images.add_argument("--images", type=str, required=True, help="Folder, table or data set with captions.")
    images.add_argument("--caption_column", type=str, help="Column of the captions.")
    images.add_argument("--image_column", type=str, help="Column of the images.")
    images.add_argument("--model", type=str, required=True, help=f"The model that you want to tune. {model_help}")

    captions = commands.add_parser("from-captions", help="Images with an attribute against images without it.")
    captions.add_argument("--captions", type=str, required=True, help="Text file, table or data set of captions.")
    captions.add_argument("--caption_column", type=str, help="Column of the captions.")
    captions.add_argument("--attribute", type=str, required=True, help="What to learn, such as 'cartoon style'.")
    captions.add_argument("--model", type=str, required=True, help=f"Generates the chosen images. {model_help}")
    captions.add_argument("--rejected_model", type=str, help="Generates the rejected ones, if not --model.")
    captions.add_argument("--chosen_template", default="{attribute}, {context}", help=f"Prompt. {template_help}")
    captions.add_argument("--rejected_template", default="{context}", help=f"Prompt. {template_help}")
    captions.add_argument("--caption_template", default="{context}", help=f"The pair's caption. {template_help}")
    captions.add_argument("--no_contexts", action="store_true", help="Use the captions as they are as contexts.")
    captions.add_argument("--llm_model", type=str, help="Writes the contexts. The default is --judge_model.")
    captions.add_argument("--no_judge", action="store_true", help="Keep every pair, without ratings.")
    captions.add_argument("--judge_model", type=str, help="Vision-language model that rates the images.")
    captions.add_argument("--judge_criterion", default=DEFAULT_CRITERION, help="What the judge rates, in words.")
    captions.add_argument("--min_score", type=float, default=5.0, help="Keep chosen images rated above this, of 10.")
    captions.add_argument("--min_margin", type=float, help="Keep pairs whose ratings differ by more than this.")
    captions.add_argument("--api_base_url", default="http://localhost:8000/v1", help="OpenAI-compatible server.")
    captions.add_argument("--api_fields", type=json.loads, default={}, help="JSON with more fields for each request.")

    scores = commands.add_parser("from-scores", help="The best against the worst of several images of a prompt.")
    scores.add_argument("--images", type=Path, required=True, help="Folder of generate.py and score.py.")
    scores.add_argument("--scores", type=Path, help="The default is scores.jsonl in that folder.")
    scores.add_argument("--metric", type=str, required=True, help="Metric that decides.")
    scores.add_argument("--mode", choices=["best_worst", "all"], default="best_worst", help="Pairs of each prompt.")
    scores.add_argument("--min_margin", type=float, default=0.0, help="Scores must differ by more than this.")

    add_generation_arguments(images)
    add_generation_arguments(captions)
    for command in (images, captions, scores):
        command.add_argument("--max_rows", type=int, help="Use only the first rows.")
        command.add_argument("--seed", type=int, default=0, help="Seed of the noise and of the order of the sides.")
        command.add_argument("--output_dir", type=Path, required=True, help="Where the pairs are written.")
    args = parser.parse_args(argv)

    if args.command == "from-captions":
        args.llm_model = args.llm_model or args.judge_model
        args.rejected_model = args.rejected_model or args.model
        if args.llm_model is None and not args.no_contexts:
            captions.error("name a language model with --llm_model, or pass --no_contexts")
        if args.judge_model is None and not args.no_judge:
            captions.error("name a vision-language model with --judge_model, or pass --no_judge")
        for name in ("chosen_template", "rejected_template", "caption_template"):
            holes = set(re.findall(r"{(\w*)}", getattr(args, name)))
            if not holes <= {"attribute", "context", "caption"}:
                captions.error(f"--{name} {getattr(args, name)!r}: only {template_help}")
    return args


# ---- Generation -----------------------------------------------------------------------------------------------------
def load_generator(model: str, dtype: str, device: str):
    """Load any text-to-image pipeline of diffusers from `MODEL` or `MODEL,lora=PATH`."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    torch_dtype = DTYPES[dtype]
    base, _, lora = model.partition(",lora=")
    if base.endswith(".safetensors"):
        pipeline = load_pipeline(base, dtype=torch_dtype)
    else:
        pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(base, dtype=torch_dtype)
    if lora:
        weight_name = None
        if (Path(lora) / "pytorch_lora_weights.safetensors").is_file():
            weight_name = "pytorch_lora_weights.safetensors"  # the folder of a run may have kohya's file, too
        pipeline.load_lora_weights(lora, weight_name=weight_name)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.watermark = None  # SDXL's would change the pixels wherever its package is installed
    return pipeline.to(device)


def make_seeds(captions: list[str], seed: int) -> list[int]:
    """Return a seed for each caption. A caption that comes again gets another seed."""
    counts = Counter()
    seeds = []
    for caption in captions:
        seeds.append(int(hash_content(seed, caption, counts[caption])[:8], 16))  # torch's CPU generator takes 32 bits
        counts[caption] += 1
    return seeds


def generation_settings(args) -> dict:
    settings = {"dtype": args.dtype, "device": args.device, "batch_size": args.batch_size}
    settings.update(height=args.resolution, width=args.resolution)
    settings.update(num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale)
    if args.negative_prompt is not None:
        settings["negative_prompt"] = args.negative_prompt  # not every pipeline takes one
    return settings


def generate_images(
    model: str,
    prompts: list[str],
    seeds: list[int],
    folder: Path,
    *,
    dtype: str,
    device: str,
    batch_size: int,
    **options,
) -> list[Path]:
    """Generate an image for each prompt and return their files.

    A file is named by a hash of the model's weights, the prompt, the seed and the settings. Files that are there and
    whole aren't generated again.
    """
    pipeline = load_generator(model, dtype, device)
    weights = hash_pipeline(pipeline)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    missing = []
    for prompt, seed in zip(prompts, seeds):
        path = folder / (hash_content(weights, dtype, options, prompt, seed) + ".png")
        if not is_image(path):
            missing.append(len(paths))
        paths.append(path)

    progress_bar = tqdm(total=len(missing), desc="Generating", unit="image", disable=not missing)
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        # Noise from the CPU's generator is the same on every device and in every batch.
        generators = [torch.Generator("cpu").manual_seed(seeds[i]) for i in batch]
        images = pipeline([prompts[i] for i in batch], generator=generators, **options).images
        for i, image in zip(batch, images):
            image.save(paths[i].with_suffix(".tmp"), "PNG")
            os.replace(paths[i].with_suffix(".tmp"), paths[i])
        progress_bar.update(len(batch))
    return paths


def is_image(path: Path) -> bool:
    try:
        load_image(path)
    except (OSError, ValueError):
        return False
    return True


# ---- A model's answers ----------------------------------------------------------------------------------------------
def ask_all(log: JsonLines, keys: list[str], ask, description: str) -> list:
    """Return `ask(i)` for the i-th key. An answer is logged at once and isn't asked for again, unless it is None."""
    answers = {row["key"]: row["answer"] for row in log.rows}
    missing = {key: i for i, key in enumerate(keys) if key not in answers}
    lock = threading.Lock()

    def ask_and_log(key: str) -> None:
        answer = ask(missing[key])
        with lock:
            answers[key] = answer
            if answer is not None:
                log.add({"key": key, "answer": answer})

    pool = ThreadPoolExecutor(REQUESTS_AT_A_TIME)
    futures = [pool.submit(ask_and_log, key) for key in missing]
    try:
        for future in tqdm(as_completed(futures), total=len(futures), desc=description, disable=not futures):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # waits for the requests under way, whose answers are logged
    return [answers[key] for key in keys]


def read_context(answer: str) -> str | None:
    """Return the sentence between the tags, or None unless it is one sentence without a word about style."""
    found = re.findall(r"\[\[PROMPT\]\](.*?)\[\[/?PROMPT\]\]", answer, re.DOTALL | re.IGNORECASE)
    if len(found) != 1:
        return None
    context = " ".join(found[0].split())
    words = re.findall(r"[\w']+", context.lower())
    several_sentences = re.search(r"[.!?]\s+\w", context)
    if several_sentences or not 8 <= len(words) <= 45 or set(words) & set(STYLE_WORDS.split()):
        return None
    return context


def write_contexts(captions: list[str], writer: Judge, log: JsonLines) -> list[str | None]:
    """Ask a language model what each caption shows. Return None where no answer was usable."""

    def write(i: int) -> str | None:
        for _ in range(CONTEXT_TRIES):
            context = read_context(writer.ask(CONTEXT_PROMPT.format(caption=captions[i])))
            if context is not None:
                return context
        return None

    identity = [writer.api_base_url, writer.model, writer.fields, CONTEXT_PROMPT, STYLE_WORDS]
    keys = [hash_content(*identity, caption) for caption in captions]
    contexts = ask_all(log, keys, write, "Writing contexts")
    if not any(contexts):
        raise ValueError(
            f"{writer.model} put no usable sentence between [[PROMPT]] tags in {CONTEXT_TRIES} tries for any caption. "
            "Try another --llm_model."
        )
    return contexts


def rate_images(paths: list[Path], captions: list[str], judge: Judge, log: JsonLines) -> list[float | None]:
    """Ask the judge to rate each image. Return None where its answer has no rating."""

    def rate(i: int) -> float | None:
        rating = judge.rate(load_image(paths[i]), captions[i])
        return None if math.isnan(rating) else rating

    identity = [judge.api_base_url, judge.model, judge.fields, judge.criterion, RATE_PROMPT]
    keys = [hash_content(*identity, path.read_bytes(), caption) for path, caption in zip(paths, captions)]
    ratings = ask_all(log, keys, rate, "Rating")
    if all(rating is None for rating in ratings):
        raise ValueError(f"{judge.model} never answered with a line like `RATING: 7`. Try another --judge_model.")
    return ratings


# ---- The three commands. Each returns pairs and counts what it left out. --------------------------------------------
def pairs_from_images(args, left_out: Counter) -> list[Pair]:
    work = args.output_dir / "work"
    rows = read_images(args.images, work / "images", args.caption_column, args.image_column, args.max_rows)
    captions = [caption for caption, _ in rows]
    seeds = make_seeds(captions, args.seed)
    generated = generate_images(args.model, captions, seeds, work / "generated", **generation_settings(args))
    pairs = []
    for i, (caption, path) in enumerate(rows):
        chosen = PairImage(path, model="data")
        rejected = PairImage(generated[i], model=args.model, seed=seeds[i], prompt=caption)
        pairs.append(Pair(caption, chosen, rejected))
    return pairs


def pairs_from_captions(args, left_out: Counter) -> list[Pair]:
    captions = read_captions(args.captions, args.caption_column)[: args.max_rows]
    work = args.output_dir / "work"
    contexts = captions
    if not args.no_contexts:
        fields = {"temperature": 0.7, "logprobs": None, "top_logprobs": None} | args.api_fields
        writer = Judge(args.api_base_url, args.llm_model, fields=fields)
        contexts = write_contexts(captions, writer, JsonLines(work / "contexts.jsonl"))
    texts = []
    chosen_prompts = []
    rejected_prompts = []
    for caption, context in zip(captions, contexts):
        if context is None:
            left_out["captions without a usable context"] += 1
            continue
        values = {"attribute": args.attribute, "context": context, "caption": caption}
        texts.append(args.caption_template.format(**values))
        chosen_prompts.append(args.chosen_template.format(**values))
        rejected_prompts.append(args.rejected_template.format(**values))

    seeds = make_seeds(texts, args.seed)  # both images of a pair start from the same noise
    settings = generation_settings(args)
    chosen_paths = generate_images(args.model, chosen_prompts, seeds, work / "generated", **settings)
    rejected_paths = generate_images(args.rejected_model, rejected_prompts, seeds, work / "generated", **settings)
    ratings = [None] * (2 * len(texts))
    if not args.no_judge:
        judge = Judge(args.api_base_url, args.judge_model, criterion=args.judge_criterion, fields=args.api_fields)
        ratings = rate_images(chosen_paths + rejected_paths, texts + texts, judge, JsonLines(work / "ratings.jsonl"))

    pairs = []
    for i, text in enumerate(texts):
        chosen = PairImage(chosen_paths[i], ratings[i], args.model, seeds[i], chosen_prompts[i])
        rejected_rating = ratings[len(texts) + i]
        rejected = PairImage(rejected_paths[i], rejected_rating, args.rejected_model, seeds[i], rejected_prompts[i])
        if args.no_judge:
            pairs.append(Pair(text, chosen, rejected))
        elif chosen.score is None or rejected.score is None:
            left_out["pairs without a rating"] += 1
        elif chosen.score <= args.min_score:
            left_out["pairs with a poor chosen image"] += 1
        elif args.min_margin is not None and chosen.score - rejected.score <= args.min_margin:
            left_out["pairs with too small a margin"] += 1
        else:
            pairs.append(Pair(text, chosen, rejected))
    return pairs


def pairs_from_scores(args, left_out: Counter) -> list[Pair]:
    path = args.scores or args.images / "scores.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} doesn't exist. Run evaluation/score.py first.")
    rows = JsonLines(path).rows
    metrics = sorted({row["metric"] for row in rows})
    if args.metric not in metrics:
        raise ValueError(f"--metric {args.metric}: {path} has only {', '.join(metrics)}.")
    groups = {}
    for row in rows:
        if row["metric"] == args.metric and row["score"] is not None:
            file = args.images / row["path"]
            if hash_content(file.read_bytes()) != row["image"]:
                raise ValueError(f"{file} isn't the image that was scored. Run evaluation/score.py again.")
            image = PairImage(file, row["score"], row["model"], row["seed"], row["prompt"])
            groups.setdefault(row["prompt"], []).append(image)
    check_captions(list(groups), str(path))

    pairs = []
    for prompt, images in itertools.islice(groups.items(), args.max_rows):
        images.sort(key=lambda image: image.score, reverse=True)
        candidates = [(images[0], images[-1])]
        if args.mode == "all":
            candidates = itertools.combinations(images, 2)
        count = len(pairs)
        for better, worse in candidates:
            if better.score - worse.score > args.min_margin:
                pairs.append(Pair(prompt, better, worse))
        if len(pairs) == count:
            left_out["prompts without two images that differ enough"] += 1
    return pairs


# ---- Output ---------------------------------------------------------------------------------------------------------
def write_parquet(pairs: list[Pair], chosen_first: list[bool], path: Path) -> None:
    """Write Pick-a-Pic's columns, and score, model, seed and prompt of both images."""
    fields = [("caption", pa.string()), ("jpg_0", pa.binary()), ("jpg_1", pa.binary())]
    fields += [("label_0", pa.float64()), ("label_1", pa.float64()), ("has_label", pa.bool_())]
    for side in (0, 1):
        fields += [(f"score_{side}", pa.float64()), (f"model_{side}", pa.string())]
        fields += [(f"seed_{side}", pa.int64()), (f"prompt_{side}", pa.string())]
    schema = pa.schema(fields)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path.with_suffix(".tmp"), schema) as writer:
        for start in range(0, len(pairs), 64):
            rows = []
            for pair, first in zip(pairs[start : start + 64], chosen_first[start : start + 64]):
                images = [pair.chosen, pair.rejected] if first else [pair.rejected, pair.chosen]
                row = {"caption": pair.caption, "label_0": float(first), "label_1": float(not first)}
                row["has_label"] = True
                for side, image in enumerate(images):
                    row[f"jpg_{side}"] = image.path.read_bytes()
                    row[f"score_{side}"] = image.score
                    row[f"model_{side}"] = image.model
                    row[f"seed_{side}"] = image.seed
                    row[f"prompt_{side}"] = image.prompt
                rows.append(row)
            writer.write_table(pa.Table.from_pylist(rows, schema))
    os.replace(path.with_suffix(".tmp"), path)


def make_contact_sheet(pairs: list[Pair], side_length: int = 160) -> Image.Image:
    """Draw up to 24 pairs, spread over the data, with the chosen image on the left."""
    count = min(24, len(pairs))
    columns = min(4, count)
    width = 2 * side_length + 20
    height = side_length + 52
    sheet = Image.new("RGB", (columns * width, math.ceil(count / columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(FONT, 12)
    known_characters = FT2Font(FONT).get_charmap()
    for number in range(count):
        pair = pairs[number * len(pairs) // count]
        x = number % columns * width + 8
        y = number // columns * height
        caption = "".join(character for character in pair.caption if ord(character) in known_characters)
        lines = textwrap.wrap(caption, 2 * side_length // 7)[:2]
        pen.multiline_text((x, y + 6), "\n".join(lines), "black", font)
        for image, left in ((pair.chosen, x), (pair.rejected, x + side_length + 4)):
            small = ImageOps.contain(load_image(image.path), (side_length, side_length), Image.Resampling.LANCZOS)
            sheet.paste(small, (left, y + 40))
            if image.score is not None:
                score = f"{image.score:.3g}"
                pen.text((left + 3, y + 40), score, "white", font, stroke_width=2, stroke_fill="black")
    return sheet


def write_pairs(pairs: list[Pair], left_out: Counter, output_dir: Path, seed: int, card: dict) -> None:
    """Write the folder that the training scripts read. Its README.md holds the counts and what `card` says."""
    reasons = ", ".join(f"{reason} ({count})" for reason, count in left_out.items())
    if not pairs:
        raise ValueError(f"No pair is left. Left out: {reasons}. What has been generated and rated is kept.")
    chosen_first = (np.random.default_rng(seed).random(len(pairs)) < 0.5).tolist()
    write_parquet(pairs, chosen_first, output_dir / PARQUET)
    make_contact_sheet(pairs).save(output_dir / "contact_sheet.png")
    counts = {"pairs": len(pairs), "prompts": len({pair.caption for pair in pairs}), "left out": reasons or "nothing"}
    for name in ("chosen", "rejected"):
        scores = [getattr(pair, name).score for pair in pairs]
        if None not in scores:
            counts[f"mean score of the {name} images"] = f"{np.mean(scores):.4g}"
    lines = ["---", "task_categories:", "- text-to-image", "---", "# Preference pairs", ""]
    lines += ["`label_0` is 1 where `jpg_0` is the chosen image.", "", "![pairs](contact_sheet.png)", "", "| | |"]
    lines += ["|---|---|"] + [f"| {name} | {value} |" for name, value in (counts | card).items()]
    (output_dir / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(pairs)} pairs in {output_dir}. Left out: {reasons or 'nothing'}.")


def main(args):
    left_out = Counter()
    if args.command == "from-images":
        pairs = pairs_from_images(args, left_out)
    elif args.command == "from-captions":
        pairs = pairs_from_captions(args, left_out)
    else:
        pairs = pairs_from_scores(args, left_out)
    settings = {name: value for name, value in vars(args).items() if value is not None}
    write_pairs(pairs, left_out, args.output_dir, args.seed, settings)


if __name__ == "__main__":
    main(parse_args())

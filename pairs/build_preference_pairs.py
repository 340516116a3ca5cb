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
        Images with captions: the image is chosen, what the model generates for its caption is rejected (section 3.2
        of the paper), so that any text-to-image fine-tune becomes preference tuning.

    python pairs/build_preference_pairs.py from-captions --captions prompts.txt --attribute "cartoon style" \\
        --llm_model Qwen/Qwen2.5-7B-Instruct --model black-forest-labs/FLUX.1-schnell --output_dir my-pairs
        Captions: a language model tells what they show without their style; the image generated from that with an
        attribute is chosen, the one without is rejected; a vision-language model judges both.

    python pairs/build_preference_pairs.py from-scores --images eval --metric pickscore --output_dir my-pairs
        Several images of a caption with scores of `evaluation/score.py`: the best is chosen and the worst rejected,
        or all pairs beyond a margin.

`--output_dir` gets data/train-00000-of-00001.parquet in the columns of Pick-a-Pic (sides shuffled by --seed; besides,
scores, models, prompts and seeds of both sides), README.md with the counts, and contact_sheet.png. What the stages
leave is in its work/: the same command after a kill goes on from there.

SUBCOMMAND --help lists the flags of each.
"""

import argparse
import itertools
import json
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.common import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    Answer,
    Endpoint,
    JsonLines,
    add_endpoint_flags,
    check_captions,
    check_output_dir,
    do_all,
    fail,
    file_bytes,
    find_column,
    keep_settings,
    load_prompts,
    load_rows,
    open_image,
    quiet_libraries,
    run_script,
    warn,
    whole_file,
    write_json,
)
from evaluation.generate import (
    add_generation_flags,
    check_generation_flags,
    free_memory,
    generate_images,
    noise_seed,
    parse_model,
)
from evaluation.metrics import Judge, add_judge_flags, generate_answer, load_metric, read_weights_flag


# By this name `datasets` finds the pairs among the images of the folder. Naming the file in the front matter of
# README.md would do so too, but then `datasets` caches by the folder's name alone: rebuilt pairs would stay unseen.
PARQUET = Path("data", "train-00000-of-00001.parquet")


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="use", required=True, metavar="SUBCOMMAND")

    images = commands.add_parser("from-images", help="Images are chosen, what the model generates is rejected.")
    images.add_argument("--images", required=True, help="Folder with NAME.png and NAME.txt, table or data set.")
    images.add_argument("--caption_column", help="Where it isn't caption, prompt or text.")
    images.add_argument("--image_column", help="Where it isn't image, path or file_name.")
    images.add_argument("--model", required=True, help="The model to be tuned: PIPELINE[,unet=...][,lora=...].")

    captions = commands.add_parser("from-captions", help="An attribute is learnt from captions alone.")
    captions.add_argument("--captions", required=True, help=".txt, .jsonl, .csv, .parquet or a data set.")
    captions.add_argument("--caption_column", help="Where it isn't caption, prompt or text.")
    captions.add_argument("--attribute", required=True, help="What is to be learnt, such as 'cartoon style'.")
    captions.add_argument("--llm_model", help="Language model for the contexts: on the hub, in a folder, or served.")
    captions.add_argument("--llm_endpoint", help="Base address of an OpenAI-compatible server, such as .../v1.")
    captions.add_argument("--llm_tries", type=int, default=5, help="Answers to ask for until one is well-formed.")
    captions.add_argument("--llm_max_tokens", type=int, default=160)
    captions.add_argument("--no_contexts", action="store_true", help="Take the captions themselves as contexts.")
    captions.add_argument("--style_words", nargs="*", default=[], help="More words that a context mustn't hold.")
    captions.add_argument("--model", required=True, help="Generates the winners: any text-to-image pipeline.")
    captions.add_argument(
        "--loser_model", help="Generates the losers, such as the model to be tuned; default: --model."
    )
    holes = "{attribute}, {context} and {caption} are filled in."
    captions.add_argument("--winner_template", default="{attribute}, {context}", help=f"Winners' prompt; {holes}")
    captions.add_argument("--loser_template", default="{context}", help=f"Losers' prompt; {holes}")
    captions.add_argument("--caption_template", default="{context}", help=f"The pairs' caption; {holes}")
    captions.add_argument("--judge_model", help="Vision-language model: on the hub, in a folder, or served.")
    captions.add_argument("--no_judge", action="store_true", help="Keep all pairs.")
    captions.add_argument("--min_score", type=float, default=5.0, help="Winners must score more than this.")
    captions.add_argument("--min_margin", type=float, help="... and this much more than their losers.")
    add_judge_flags(captions)
    add_endpoint_flags(captions)

    scores = commands.add_parser("from-scores", help="The best against the worst of several images.")
    scores.add_argument("--images", type=Path, required=True, help="Folder of generate.py and score.py.")
    scores.add_argument("--scores", type=Path, help="Default: scores.jsonl in that folder.")
    scores.add_argument("--metric", required=True, help="Metric to go by.")
    scores.add_argument("--mode", choices=["best_worst", "all"], default="best_worst")
    scores.add_argument("--min_margin", type=float, default=0.0, help="Pairs must differ by more than this.")

    for command in (images, captions, scores):
        command.add_argument("--max_rows", type=int, help="Use the first N rows only.")
        command.add_argument("--seed", type=int, default=0, help="Of the noise and of the sides' shuffle.")
        command.add_argument("--output_dir", type=Path, required=True)
    for command in (images, captions):
        add_generation_flags(command)
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    check_output_dir(args.output_dir)
    if args.use != "from-scores":
        check_generation_flags(args)
        args.model = parse_model(f"model={args.model}")[1]
    if args.use != "from-captions":
        return
    args.loser_model = parse_model(f"loser={args.loser_model}")[1] if args.loser_model else args.model
    if args.llm_model is None and not args.no_contexts:
        fail("--llm_model: name a language model, or take the captions as contexts with --no_contexts")
    if args.judge_model is None and not args.no_judge:
        fail("--judge_model: name a vision-language model, or keep all pairs with --no_judge")
    for name in ("winner_template", "loser_template", "caption_template"):
        try:
            getattr(args, name).format(attribute="", context="", caption="")
        except (KeyError, IndexError, ValueError) as error:
            fail(
                f"--{name} {getattr(args, name)!r}: {error!r}: only {{attribute}}, {{context}}, {{caption}} are known"
            )
    args.weights = read_weights_flag([f"judge={args.judge_model}"] if args.judge_model else [])


def settings_of(args: argparse.Namespace) -> dict:
    """What the images depend on; how they are then judged, filtered and split into batches may change."""
    free = ("output_dir", "device", "batch_size", "min_score", "min_margin", "max_rows", "mode", "scores", "weights")
    used = {k: v for k, v in vars(args).items() if k not in free and not k.startswith(("endpoint_", "api_", "judge_"))}
    return {name: str(value) if isinstance(value, Path) else value for name, value in used.items()}


def begin(args: argparse.Namespace, work: Path) -> None:
    """After the input is checked: the settings of a call that can't be mustn't stand in the way of the mended one."""
    keep_settings(work / "settings.json", settings_of(args), f"--output_dir {args.output_dir}")


# ---------------------------------------------------------------------------------------------------------------------
# Contexts
# ---------------------------------------------------------------------------------------------------------------------


CONTEXT_TEXT = """Rewrite a prompt for a text-to-image model so that it says only what is to be seen: who or what,
where, doing what. Leave out every word about how it is drawn or photographed: no style, medium, artist, camera or
quality. Write one sentence of about 25 words and put it between two [[PROMPT]] tags, like this:

[[PROMPT]] A fox in a red scarf waits at a snowy bus stop while a yellow bus comes around the corner of a quiet village
street. [[PROMPT]]

The prompt: {caption}"""
WORDS = (8, 45)  # "about 25"
STYLE_WORDS = (
    "style stylized photo photograph photography photorealistic painting watercolor illustration illustrated drawing "
    "sketch anime cartoon manga render rendered cgi 3d 4k 8k hd cinematic realistic artwork concept art artstation"
).split()


def read_context(answer: str, style_words: list[str]) -> tuple[str | None, str]:
    """The sentence between the tags, or None with the reason why the answer is malformed."""
    found = re.findall(r"\[\[PROMPT\]\](.*?)\[\[/?PROMPT\]\]", answer, re.DOTALL | re.IGNORECASE)
    if len(found) != 1:
        return None, f"{len(found)} sentences between tags"
    context = " ".join(found[0].split())
    if not WORDS[0] <= len(context.split()) <= WORDS[1]:
        return None, f"{len(context.split())} words"
    if re.search(r"[.!?]\s+\w", context):
        return None, "more than one sentence"
    words = set(re.findall(r"[\w']+", context.lower()))
    if style := [word for word in style_words if word.lower() in words]:
        return None, f"style word {style[0]}"
    return context, ""


class LocalWriter:
    """A causal language model of transformers. `ask` has Endpoint's signature."""

    workers = 1

    def __init__(self, place: str, device: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(place)
            self.model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype).eval().to(device)
        except (OSError, ValueError) as error:
            fail(f"--llm_model {place}: {str(error).splitlines()[0]}")

    def ask(self, text: str, images=(), temperature: float = 0.0, max_tokens: int = 160) -> Answer:
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
        inputs = self.tokenizer(text, return_tensors="pt", add_special_tokens=not self.tokenizer.chat_template)
        inputs = {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        return generate_answer(self.model, self.tokenizer, inputs, temperature, max_tokens)


def write_contexts(captions: list[str], args: argparse.Namespace, work: Path) -> dict[int, str]:
    """Row of each caption -> its context; rows whose answers stayed malformed are left out and counted."""
    if args.no_contexts:
        return dict(enumerate(captions))
    log = JsonLines(work / "contexts.jsonl")
    done = {row["row"] for row in log.rows}
    for row in log.rows:
        if row["row"] < len(captions) and row["caption"] != captions[row["row"]]:
            fail(f"--captions {args.captions}: row {row['row']} isn't what it was: name another --output_dir")
    missing = [i for i in range(len(captions)) if i not in done]
    style_words = STYLE_WORDS + args.style_words

    def write(i: int) -> dict:
        reasons = []
        for attempt in range(args.llm_tries):
            answer = writer.ask(
                CONTEXT_TEXT.format(caption=captions[i]),
                temperature=0.7 if attempt else 0.0,
                max_tokens=args.llm_max_tokens,
            )
            context, reason = read_context(answer.text, style_words)
            if context is not None:
                return {"row": i, "caption": captions[i], "context": context, "rejected": reasons}
            reasons.append(reason)
        return {"row": i, "caption": captions[i], "context": None, "rejected": reasons}

    if missing:
        if args.llm_endpoint:
            writer = Endpoint(args.llm_endpoint, args.llm_model, args, "--llm_endpoint")
        else:
            writer = LocalWriter(args.llm_model, args.device)
        with tqdm(total=len(captions), initial=len(done), desc="Writing contexts", unit="caption") as bar:
            for row in do_all(write, missing, writer.workers):
                log.add(row)
                bar.update()
        del writer, write
        free_memory()
    contexts = {row["row"]: row["context"] for row in log.rows if row["context"] and row["row"] < len(captions)}
    if not contexts:
        last = log.rows[-1]["rejected"][-1]
        fail(f"--llm_model {args.llm_model}: no answer of {args.llm_tries} tries was well-formed (last: {last})")
    if left_out := len(captions) - len(contexts):
        warn(f"{left_out} of {len(captions)} captions got no well-formed context and are left out")
    return contexts


# ---------------------------------------------------------------------------------------------------------------------
# The three uses: each gives pairs of `side`s, (chosen, rejected), and counts of what was left out
# ---------------------------------------------------------------------------------------------------------------------


def side(image, root: Path, **facts) -> dict:
    """One image of a pair: file bytes or a path from `root`, and what is known of it."""
    return {"image": image, "root": root, "score": None, "model": None, "seed": None, "prompt": None} | facts


def pairs_from_images(args: argparse.Namespace, work: Path) -> tuple[list, dict]:
    rows, root = load_rows(args.images, "--images")
    if len(rows) == 0:
        fail(f"--images {args.images}: no rows")
    caption = find_column(rows, args.caption_column, CAPTION_COLUMNS, "--caption_column", f"--images {args.images}")
    image = find_column(rows, args.image_column, IMAGE_COLUMNS, "--image_column", f"--images {args.images}")
    count = min(len(rows), args.max_rows or len(rows))
    captions = [rows[i][caption] for i in range(count)]
    check_captions(captions, f"--images {args.images}")
    # Read all before anything is generated: a broken file shows in minutes, not after hours.
    for i in tqdm(range(count), desc="Reading images", unit="image"):
        open_image(rows[i][image], root, f"--images {args.images}: row {i}")
    begin(args, work)
    log = JsonLines(work / "images.jsonl")
    jobs = [
        {"row": i, "prompt": captions[i], "noise_seed": noise_seed(i, args.seed), "path": f"losers/{i:06d}.png"}
        for i in range(count)
    ]
    generate_images("losers", args.model, jobs, log, work, args)
    model = json.dumps(args.model) if len(args.model) > 1 else args.model["base"]
    pairs = [
        (
            captions[job["row"]],
            side(rows[job["row"]][image], root, model="data"),
            side(job["path"], work, model=model, seed=job["noise_seed"], prompt=job["prompt"]),
        )
        for job in jobs
    ]
    return pairs, {}


def pairs_from_captions(args: argparse.Namespace, work: Path) -> tuple[list, dict]:
    rows = load_prompts(args.captions, args.caption_column)[: args.max_rows]
    captions = [row["prompt"] for row in rows]
    begin(args, work)
    contexts = write_contexts(captions, args, work)
    log, sides = JsonLines(work / "images.jsonl"), {}
    for kind, spec, template in (
        ("winners", args.model, args.winner_template),
        ("losers", args.loser_model, args.loser_template),
    ):
        jobs = [
            {
                "row": i,
                "prompt": template.format(attribute=args.attribute, context=context, caption=captions[i]),
                "noise_seed": noise_seed(i, args.seed),
                "path": f"{kind}/{i:06d}.png",
            }
            for i, context in contexts.items()
        ]
        generate_images(kind, spec, jobs, log, work, args)
        model = json.dumps(spec) if len(spec) > 1 else spec["base"]
        sides[kind] = {
            job["row"]: side(job["path"], work, model=model, seed=job["noise_seed"], prompt=job["prompt"])
            for job in jobs
        }
    counts = {"captions without a context": len(captions) - len(contexts)}
    pairs = []
    for i, context in contexts.items():
        text = args.caption_template.format(attribute=args.attribute, context=context, caption=captions[i])
        pairs.append((text, sides["winners"][i], sides["losers"][i]))
    if not args.no_judge:
        judge_sides(
            [s for _, *both in pairs for s in both], [text for text, *_ in pairs for _ in range(2)], args, work
        )
        pairs, filtered = keep_judged(pairs, args)
        counts |= filtered
    return pairs, counts


def judge_sides(sides: list[dict], captions: list[str], args: argparse.Namespace, work: Path) -> None:
    """Fills in the scores; each rating is on disk once it is given, None where the judge gave none."""
    how = f"{args.judge_model} | {args.judge_criterion}"
    log = JsonLines(work / "judgements.jsonl")
    done = {row["path"]: row["score"] for row in log.rows if row["how"] == how}
    missing = [(s, caption) for s, caption in zip(sides, captions) if s["image"] not in done]
    if missing:
        judge: Judge = load_metric("judge", args)

        def rate(item: tuple) -> dict:
            path = item[0]["image"]
            score = judge.rate(open_image(path, work, path), item[1])
            return {"path": path, "score": score if np.isfinite(score) else None, "how": how}

        with tqdm(total=len(sides), initial=len(done), desc="Judging", unit="image") as bar:
            for row in do_all(rate, missing, judge.model.workers):
                log.add(row)
                done[row["path"]] = row["score"]
                bar.update()
        del judge, rate
        free_memory()
    for s in sides:
        s["score"] = done[s["image"]]
    if all(s["score"] is None for s in sides):
        fail(
            f"--judge_model {args.judge_model}: none of its answers had the form RATING: 7 within --judge_max_tokens "
            f"{args.judge_max_tokens}; delete {log.path} to retry"
        )


def keep_judged(pairs: list, args: argparse.Namespace) -> tuple[list, dict]:
    kept, counts = [], {"without a rating": 0, f"winner scored {args.min_score:g} or less": 0, "margin too small": 0}
    for text, chosen, rejected in pairs:
        if chosen["score"] is None or rejected["score"] is None:
            counts["without a rating"] += 1
        elif chosen["score"] <= args.min_score:
            counts[f"winner scored {args.min_score:g} or less"] += 1
        elif args.min_margin is not None and chosen["score"] - rejected["score"] <= args.min_margin:
            counts["margin too small"] += 1
        else:
            kept.append((text, chosen, rejected))
    return kept, counts


def pairs_from_scores(args: argparse.Namespace, work: Path) -> tuple[list, dict]:
    path = args.scores or args.images / "scores.jsonl"
    if not path.exists():
        fail(f"--scores {path} isn't there: run evaluation/score.py first")
    rows = JsonLines(path).rows
    if missing := next(
        (name for row in rows for name in ("metric", "prompt", "path", "score") if name not in row), None
    ):
        fail(f"--scores {path}: a row without {missing}: it must come from evaluation/score.py, on images in files")
    if args.metric not in {row["metric"] for row in rows}:
        fail(f"--metric {args.metric}: {path} has only {', '.join(sorted({row['metric'] for row in rows}))}")
    groups = {}
    for row in rows:
        if row["metric"] == args.metric and row["score"] is not None:
            groups.setdefault(row["prompt"], []).append(row)
    check_captions(list(groups), f"--scores {path}")
    begin(args, work)
    pairs, counts = [], {"captions with one image": 0, "captions without a pair beyond the margin": 0}
    for prompt, group in itertools.islice(groups.items(), args.max_rows):
        group.sort(key=lambda row: -row["score"])
        couples = itertools.combinations(group, 2) if args.mode == "all" else [(group[0], group[-1])]
        found = [(a, b) for a, b in couples if a["score"] - b["score"] > args.min_margin]
        counts["captions with one image"] += len(group) == 1
        counts["captions without a pair beyond the margin"] += len(group) > 1 and not found
        for couple in found:
            facts = (
                {"score": row["score"], "model": row.get("model"), "seed": row.get("seed"), "prompt": prompt}
                for row in couple
            )
            pairs.append((prompt, *(side(row["path"], args.images, **f) for row, f in zip(couple, facts))))
    return pairs, counts


# ---------------------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------------------


def write_parquet(pairs: list, winner_first: np.ndarray, path: Path) -> None:
    """Pick-a-Pic's columns and, for both sides, score, model, seed and prompt; read by the training scripts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [("caption", pa.string()), ("jpg_0", pa.binary()), ("jpg_1", pa.binary())]
    fields += [("label_0", pa.float64()), ("label_1", pa.float64()), ("has_label", pa.bool_())]
    for name, kind in (("score", pa.float64()), ("model", pa.string()), ("seed", pa.int64()), ("prompt", pa.string())):
        fields += [(f"{name}_0", kind), (f"{name}_1", kind)]
    schema = pa.schema(fields)
    with whole_file(path) as aside, pq.ParquetWriter(aside, schema) as writer:
        for start in tqdm(range(0, len(pairs), 64), desc="Writing pairs", unit="x 64"):
            rows = []
            for first, (caption, *sides) in zip(winner_first[start:], pairs[start : start + 64]):
                row = {"caption": caption, "label_0": float(first), "label_1": float(not first), "has_label": True}
                for i, s in enumerate(sides if first else sides[::-1]):
                    row[f"jpg_{i}"] = file_bytes(s["image"], s["root"])
                    row |= {f"{name}_{i}": s[name] for name in ("score", "model", "seed", "prompt")}
                rows.append(row)
            writer.write_table(pa.Table.from_pylist(rows, schema))


def make_contact_sheet(pairs: list, side_length: int = 160) -> Image.Image:
    """At most 24 pairs spread over the data, chosen on the left, rejected on the right."""
    picked = [pairs[i] for i in np.unique(np.linspace(0, len(pairs) - 1, min(24, len(pairs))).astype(int))]
    columns, head = min(4, len(picked)), 40
    width, height = 2 * side_length + 20, side_length + head + 12
    sheet = Image.new("RGB", (columns * width, -(-len(picked) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for n, (caption, *sides) in enumerate(picked):
        x, y = n % columns * width + 8, n // columns * height
        lines = textwrap.wrap(caption, 2 * side_length // 7)[:2]
        pen.multiline_text((x, y + 6), "\n".join(lines), "black", ImageFont.load_default(12))
        for i, s in enumerate(sides):
            image = open_image(s["image"], s["root"], "contact sheet")
            image = ImageOps.contain(image, (side_length, side_length), Image.Resampling.LANCZOS)
            sheet.paste(image, (x + i * (side_length + 4), y + head))
            if s["score"] is not None:
                # readable on any image
                place, text = (x + i * (side_length + 4) + 3, y + head), f"{s['score']:.3g}"
                pen.text(place, text, "white", ImageFont.load_default(14), stroke_width=2, stroke_fill="black")
    return sheet


def describe_pairs(pairs: list, winner_first: np.ndarray, counts: dict) -> dict:
    scores = np.array([[s["score"] for s in sides] for _, *sides in pairs if sides[0]["score"] is not None], float)
    statistics = {
        "pairs": len(pairs),
        "captions": len({caption for caption, *_ in pairs}),
        "winner is jpg_0": round(float(winner_first.mean()), 4),
        **{f"left out: {reason}": count for reason, count in counts.items()},
    }
    if len(scores):
        statistics |= {"mean score of winners": float(scores[:, 0].mean())}
        if not np.isnan(scores[:, 1]).any():
            statistics |= {"mean score of losers": float(scores[:, 1].mean())}
    for i, kind in enumerate(("winners", "losers")):
        if models := sorted({sides[i]["model"] for _, *sides in pairs if sides[i]["model"]}):
            statistics[f"models of {kind}"] = ", ".join(models)
    return statistics


def write_card(statistics: dict, command: str, settings: dict, path: Path) -> None:
    table = "\n".join(f"| {name} | {value} |" for name, value in statistics.items())
    settings = "\n".join(f"| `{name}` | `{value}` |" for name, value in sorted(settings.items()))
    text = f"""---
task_categories:
- text-to-image
---
# Preference pairs

Made by `{command}`. `label_0` is 1 where `jpg_0` is chosen.

![chosen on the left, rejected on the right](contact_sheet.png)

| | |
|---|---|
{table}

| setting | value |
|---|---|
{settings}
"""
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_pairs(pairs: list, counts: dict, command: str, settings: dict, output_dir: Path, seed: int) -> None:
    """The folder that the training scripts read; what `counts` says was left out stands in its README.md."""
    left_out = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
    if not pairs:
        fail(f"no pair is left ({left_out}): loosen the filters; all that came before stays")
    winner_first = np.random.default_rng(seed).random(len(pairs)) < 0.5
    write_parquet(pairs, winner_first, output_dir / PARQUET)
    with whole_file(output_dir / "contact_sheet.png") as aside:
        make_contact_sheet(pairs).save(aside, "PNG")
    statistics = describe_pairs(pairs, winner_first, counts)
    write_json(output_dir / "statistics.json", statistics)
    write_card(statistics, command, settings, output_dir / "README.md")
    print(f"{len(pairs)} pairs in {output_dir}" + (f"; left out: {left_out}" if left_out else ""))


def main(args: argparse.Namespace) -> None:
    work = args.output_dir / "work"
    if args.use != "from-scores":
        quiet_libraries()
    build = {
        "from-images": pairs_from_images,
        "from-captions": pairs_from_captions,
        "from-scores": pairs_from_scores,
    }
    pairs, counts = build[args.use](args, work)
    command = f"pairs/build_preference_pairs.py {args.use}"
    write_pairs(pairs, counts, command, settings_of(args), args.output_dir, args.seed)


if __name__ == "__main__":
    run_script(main, parse_args())

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
Prints what a finished run of the demo changed, measured on images that its result generates.

    python demo/report.py mapo-demo            # train_diffusion_mapo_sdxl.py: a pipeline, or a LoRA with --use_lora
    python demo/report.py mapo-demo-subject    # train_dreambooth_lora_mapo_sdxl.py: a LoRA and a new word

A judge alone can be fooled by a texture. The other figures can't: which of all drawings is nearest to an image, how far
away it is, and whether the background is still white.
"""

import argparse
import functools
import json
import logging
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tqdm.auto import tqdm

import diffusers


DEMO = Path(__file__).resolve().parent
sys.path.insert(0, str(DEMO.parent))

from demo.style_judge import FOUNDRIES, PREFERRED, RESOLUTION, StyleJudge, palette, to_batch  # noqa: E402


BASE = DEMO / "sdxl-tiny-emoji"
LORA = "pytorch_lora_weights.safetensors"
NEW_WORD = "learned_embeds.safetensors"
GUIDANCE_SCALE = 2.0
NUM_INFERENCE_STEPS = 20
BATCH_SIZE = 16
VALIDATION_CAPTIONS = slice(2, None, 5)  # of those that aren't held out

# name, format and explanation of the figures of `measure` that a texture can't raise
FIGURES = (
    ("recognised", "{:.0%}", "nearest, in pixels, to a drawing of their caption, among all foundries' drawings"),
    ("distance", "{:.1f}", "distance to the nearest drawing, in grey levels: much larger would mean damage"),
    ("white_border", "{:.1%}", "of the border is white: less would mean stains"),
)
# the same for a run's metrics.jsonl
ERRORS = (
    ("val_accuracy", "{:.0%}", "implicit accuracy: pairs whose chosen drawing has the smaller error"),
    ("val_mse_w", "{:.3f}", "error of the chosen drawings: larger would mean that they got less likely"),
    ("val_mse_l", "{:.3f}", "error of the rejected drawings"),
)


# ---- Data -----------------------------------------------------------------------------------------------------------
def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def all_captions() -> list[str]:
    return (DEMO / "drawings" / "captions.txt").read_text(encoding="utf-8").splitlines()


def held_out_captions() -> list[str]:
    """Return the captions of no pair, whose drawing by OpenMoji the base hasn't seen either."""
    return (DEMO / "held_out_captions.txt").read_text(encoding="utf-8").splitlines()


def validation_captions() -> list[str]:
    """Return the captions of pairs/test.parquet. No training pair has them, but the base knows all their drawings."""
    held_out = held_out_captions()
    return [caption for caption in all_captions() if caption not in held_out][VALIDATION_CAPTIONS]


def load_sheets() -> tuple[list[str], dict[str, list[Image.Image]]]:
    """Return the captions, and each foundry's drawings of them, 64 px."""
    captions = all_captions()
    sheets = {}
    for foundry in FOUNDRIES:
        sheet = Image.open(DEMO / "drawings" / f"{foundry}.webp").convert("RGB")
        columns = sheet.width // RESOLUTION
        sheets[foundry] = []
        for i in range(len(captions)):
            left = i % columns * RESOLUTION
            top = i // columns * RESOLUTION
            sheets[foundry].append(sheet.crop((left, top, left + RESOLUTION, top + RESOLUTION)))
    return captions, sheets


@functools.cache
def load_drawings() -> tuple[torch.Tensor, list[str]]:
    """Return all drawings, foundry after foundry, shape (N, 3, 64, 64) in [-1, 1], and the caption of each."""
    captions, sheets = load_sheets()
    drawings = torch.cat([to_batch(sheets[foundry]) for foundry in FOUNDRIES])
    return drawings, captions * len(FOUNDRIES)


# ---- Images ---------------------------------------------------------------------------------------------------------
def load_pipeline(folder: Path, base: Path | None = None):
    """Load the pipeline in a folder, or the base with the LoRA in the folder."""
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(
        base or folder, dtype=torch.float32, add_watermarker=False
    )
    if base is not None:
        pipeline.load_lora_weights(folder, weight_name=LORA)
    return pipeline


def load_subject_pipeline(folder: Path, placeholder_token: str):
    """Load the base with the LoRA and the new word in the folder."""
    pipeline = load_pipeline(folder, BASE)
    embeds = load_file(folder / NEW_WORD)
    for name, text_encoder, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
        ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        pipeline.load_textual_inversion(
            list(embeds[name]), token=[placeholder_token], text_encoder=text_encoder, tokenizer=tokenizer
        )
    return pipeline


def generate(pipeline, prompts: list[str], description: str | None = None) -> list[Image.Image]:
    """Return one image per prompt, prompt i from seed i. A description shows a progress bar."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in tqdm(range(0, len(prompts), BATCH_SIZE), desc=description, disable=description is None):
        batch = prompts[start : start + BATCH_SIZE]
        output = pipeline(
            batch,
            height=RESOLUTION,
            width=RESOLUTION,
            num_inference_steps=NUM_INFERENCE_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(batch))],
        )
        images += output.images
    return images


# ---- Figures --------------------------------------------------------------------------------------------------------
def measure(images: list[Image.Image], captions: list[str], left_out: list[int] | None = None) -> dict[str, float]:
    """
    Return fractions and distances of images that were generated for captions, one each:

    - a foundry's name: the fraction in its style, according to the judge
    - recognised: the fraction whose nearest drawing, of all captions and foundries, has their caption
    - distance: to that drawing, root mean square over the pixels, of 255 levels, mean over the images
    - white_border: the fraction of white pixels among those within two of the edge

    `left_out` names one drawing for each image, by its place in `load_drawings`, that isn't compared with it.
    """
    batch = to_batch(images)
    drawings, drawn = load_drawings()
    distances = torch.cdist(batch.flatten(1), drawings.flatten(1)) * 127.5 / batch[0].numel() ** 0.5
    if left_out is not None:
        distances[range(len(images)), left_out] = torch.inf
    distance, nearest = distances.min(dim=1)
    recognised = [drawn[i] == caption for i, caption in zip(nearest.tolist(), captions)]
    border = torch.ones(RESOLUTION, RESOLUTION, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    white = batch[:, :, border].amin(dim=1) > 247 / 127.5 - 1
    styles = StyleJudge.from_pretrained().name(images)

    figures = {foundry: styles.count(foundry) / len(images) for foundry in FOUNDRIES}
    figures["recognised"] = sum(recognised) / len(images)
    figures["distance"] = distance.mean().item()
    figures["white_border"] = white.float().mean().item()
    return figures


def measure_subject(output_dir: Path) -> dict[str, float]:
    """
    Compare a subject's run with the base. The names of the base's figures end in `_before`.

    `photos` are images for the photos' captions, `contexts` for the validation prompts, `class` for both with "cat" in
    place of the new word, as are all images of the base. `nearest` is the fraction that is nearer to a photo than to
    any emoji, `palette` the overlap of their colours with the photos'. `others` are the held-out captions.
    """
    settings = read_json(DEMO / "train_subject.json")
    word = settings["placeholder_token"][0]
    rows = read_json_lines(DEMO / "subject" / "metadata.jsonl")
    captions = [row["text"] for row in rows] + settings["validation_prompts"]
    plain = [caption.replace(word, settings["initializer_token"][0]) for caption in captions]
    others = held_out_captions()

    pipeline = load_subject_pipeline(output_dir, word)
    pipeline.disable_lora()
    plain_before = to_batch(generate(pipeline, plain, "the cat, before"))
    others_before = measure(generate(pipeline, others, "other captions, before"), others)
    pipeline.enable_lora()
    after = to_batch(generate(pipeline, captions, "the cat, after"))
    others_after = measure(generate(pipeline, others, "other captions, after"), others)
    plain_after = to_batch(generate(pipeline, plain, "without the new word"))

    photos = to_batch([Image.open(DEMO / "subject" / row["file_name"]) for row in rows])
    known = torch.cat([photos, load_drawings()[0]]).flatten(1)
    batches = {
        "photos": (plain_before[: len(rows)], after[: len(rows)]),
        "contexts": (plain_before[len(rows) :], after[len(rows) :]),
        "class": (plain_before, plain_after),
    }
    figures = {"photos_own_palette": (palette(photos) @ palette(photos).T).mean().item()}
    for name, both in batches.items():
        for suffix, images in zip(("_before", ""), both):
            nearest = torch.cdist(images.flatten(1), known).argmin(dim=1)
            figures[f"{name}_nearest{suffix}"] = (nearest < len(photos)).float().mean().item()
            figures[f"{name}_palette{suffix}"] = (palette(images) @ palette(photos).T).mean().item()
    for name, _, _ in FIGURES:
        figures[f"others_{name}_before"] = others_before[name]
        figures[f"others_{name}"] = others_after[name]
    return figures


# ---- Reports --------------------------------------------------------------------------------------------------------
def format_change(form: str, before: float, after: float, aim: float | None = None) -> str:
    text = f"{form.format(before):>6} -> {form.format(after):>6}"
    if aim is not None:
        text += f" {'(' + form.format(aim) + ')':>8}"
    return text


def preference_report(output_dir: Path) -> str:
    """Return what a run on the demo's pairs changed. `build_demo.py` measured the base in the same way."""
    is_pipeline = (output_dir / "model_index.json").exists()
    pipeline = load_pipeline(output_dir, None if is_pipeline else BASE)
    known = validation_captions()
    new = held_out_captions()
    known_after = measure(generate(pipeline, known, "captions of pairs/test.parquet"), known)
    new_after = measure(generate(pipeline, new, "held-out captions"), new)

    figures = read_json(DEMO / "figures.json")
    known_before = figures["base_on_validation_captions"]
    by_word = figures["base_on_validation_captions_in_openmoji_style"]
    new_before = figures["base_on_held_out_captions"]
    real = figures["unseen_openmoji_drawings"]
    accuracy = figures["judge_accuracy_on_held_out_reconstructions"]
    style = (PREFERRED, "{:.0%}", f"in OpenMoji's style, says a judge that names {accuracy:.0%} of drawings right")
    lines = [
        f"Images before -> after, for captions in no training pair. Left: {len(known)} (in brackets: before, style named "
        f"in the prompt). Right: {len(new)} whose OpenMoji drawing the base has never seen (in brackets: the real ones, "
        "as if unknown)."
    ]
    for name, form, meaning in (style, *FIGURES):
        left = format_change(form, known_before[name], known_after[name], by_word[name])
        right = format_change(form, new_before[name], new_after[name], real[name])
        lines.append(f"{left}   {right}  {meaning}")
    records = [record for record in read_json_lines(output_dir / "metrics.jsonl") if "val_accuracy" in record]
    for name, form, meaning in ERRORS:
        change = format_change(form, records[0][name], records[-1][name])
        lines.append(f"{change}{' ' * 30}{meaning}")
    return "\n".join(lines)


def subject_report(output_dir: Path) -> str:
    """Return what a run on the demo's photos changed, for the subject, its class and other captions."""
    figures = measure_subject(output_dir)
    photos = len(read_json_lines(DEMO / "subject" / "metadata.jsonl"))
    emoji = len(all_captions()) * len(FOUNDRIES)
    lines = [
        f"nearest = fraction of images nearest, in pixels, to a photo, among {photos} photos and {emoji:,} emoji",
        "palette = overlap of an image's colours with a photo's, mean over images and photos (of the photos with each "
        f"other: {figures['photos_own_palette']:.2f})",
    ]
    titles = {"photos": "captions of the photos", "contexts": "new contexts", "class": "both without the token"}
    for name, title in titles.items():
        nearest = f"{figures[f'{name}_nearest_before']:.0%} before, {figures[f'{name}_nearest']:.0%} after"
        overlap = f"{figures[f'{name}_palette_before']:.2f} before, {figures[f'{name}_palette']:.2f} after"
        lines.append(f"{title}: nearest {nearest}; palette {overlap}")
    lines.append(f"{len(held_out_captions())} other captions, before -> after:")
    for name, form, meaning in FIGURES:
        change = format_change(form, figures[f"others_{name}_before"], figures[f"others_{name}"])
        lines.append(f"{change}  {meaning}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="The --output_dir of a finished run of the demo.")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    files = [path.name for path in args.output_dir.glob("*")]
    if NEW_WORD in files and LORA in files:
        print(subject_report(args.output_dir))
    elif "metrics.jsonl" in files and ("model_index.json" in files or LORA in files):
        print(preference_report(args.output_dir))
    else:
        raise ValueError(
            f"{args.output_dir} holds no finished run of the demo: expected metrics.jsonl with model_index.json or "
            f"{LORA}, or {LORA} with {NEW_WORD}. To make one, run `accelerate launch train_diffusion_mapo_sdxl.py "
            "--beta_mapo 8` or `accelerate launch train_dreambooth_lora_mapo_sdxl.py` and let it end."
        )


if __name__ == "__main__":
    main()

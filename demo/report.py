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
What the demo's two runs say about their result, measured on images that the finished pipeline generates.

    from demo.report import preference_report, subject_report
    print(preference_report("mapo-demo"))

A judge alone can be pleased by a texture, so each report has figures beside it that a texture can't raise: what is the
nearest of all foundries' drawings, how far is it, is the ground still white.
"""

import itertools
import json
from pathlib import Path

import torch
from PIL import Image

from .settings import SUBJECT
from .style_judge import FOUNDRIES, PREFERRED, RESOLUTION, StyleJudge, palette, to_batch


DEMO = Path(__file__).resolve().parent
GUIDANCE_SCALE, NUM_INFERENCE_STEPS = 2.0, 20
VALIDATION_CAPTIONS = slice(2, None, 5)  # of those that aren't held out
ROWS = (  # figures of `measure` that a texture can't raise
    ("recognised", "{:.0%}", "nearest, in pixels, to a drawing of their caption, among all foundries' drawings"),
    ("distance", "{:.1f}", "distance to the nearest drawing, in grey levels: much larger would mean damage"),
    ("white_border", "{:.1%}", "of the border is white: less would mean stains"),
)
ERRORS = (  # of a run's metrics.jsonl
    ("val_accuracy", "{:.0%}", "implicit accuracy: pairs whose chosen drawing has the smaller error"),
    ("val_mse_w", "{:.3f}", "error of the chosen drawings: larger would mean that they got less likely"),
    ("val_mse_l", "{:.3f}", "error of the rejected drawings"),
)


def held_out_captions() -> list[str]:
    """The captions that no pair has, and of which the base has never seen OpenMoji's drawing."""
    return (DEMO / "held_out_captions.txt").read_text().splitlines()


def validation_captions() -> list[str]:
    """The captions of pairs/test.parquet: no pair of the training has them, but the base knows OpenMoji's drawings of
    them among the others', as SDXL knows most styles of most things."""
    rest = (DEMO / "drawings" / "captions.txt").read_text().splitlines()
    held_out = set(held_out_captions())
    return [caption for caption in rest if caption not in held_out][VALIDATION_CAPTIONS]


def load_sheets() -> tuple[list[str], dict[str, list[Image.Image]]]:
    """The captions, and each foundry's drawings of them, 64 px."""
    captions = (DEMO / "drawings" / "captions.txt").read_text().splitlines()
    sheets = {}
    for foundry in FOUNDRIES:
        sheet = Image.open(DEMO / "drawings" / f"{foundry}.webp").convert("RGB")
        corners = itertools.product(range(0, sheet.height, RESOLUTION), range(0, sheet.width, RESOLUTION))
        tiles = (sheet.crop((left, top, left + RESOLUTION, top + RESOLUTION)) for top, left in corners)
        sheets[foundry] = [tile for tile, _ in zip(tiles, captions)]
    return captions, sheets


def load_drawings() -> tuple[torch.Tensor, list[str]]:
    """All foundries' drawings, (N, 3, 64, 64) in [-1, 1], foundry after foundry, and each one's caption."""
    captions, sheets = load_sheets()
    return to_batch([drawing for drawings in sheets.values() for drawing in drawings]), captions * len(sheets)


def load_pipeline(output_dir, base=None):
    """A run's: that in its folder or, where it trained a LoRA, that of the base with the LoRA."""
    from diffusers import StableDiffusionXLPipeline

    options = {"dtype": torch.float32, "add_watermarker": False}
    pipeline = StableDiffusionXLPipeline.from_pretrained(base or output_dir, **options)
    if base is not None:
        pipeline.load_lora_weights(output_dir, weight_name="pytorch_lora_weights.safetensors")
    return pipeline


@torch.no_grad()
def generate(pipeline, prompts: list[str]) -> list[Image.Image]:
    """One image per prompt, prompt i from seed i, 16 at once."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), 16):
        chunk = prompts[start : start + 16]
        generators = [torch.Generator("cpu").manual_seed(start + i) for i in range(len(chunk))]
        options = {"num_inference_steps": NUM_INFERENCE_STEPS, "guidance_scale": GUIDANCE_SCALE}
        images += pipeline(chunk, height=RESOLUTION, width=RESOLUTION, generator=generators, **options).images
    return images


def measure(images: list[Image.Image], captions: list[str], left_out: list[int] | None = None) -> dict[str, float]:
    """
    Fractions and distances of images that were generated for captions, one each:

    - a foundry's name: fraction in its style, as the judge names it
    - recognised: fraction whose nearest drawing, of all foundries' of all captions, is one of their caption
    - distance: to the nearest drawing, root mean square over the pixels, of 255 levels; mean over the images
    - white_border: fraction of the pixels within two of the edge whose channels are all above 247

    `left_out` names a drawing for each image (its place in `load_drawings`) that doesn't count as one.
    """
    batch, (drawings, drawn) = to_batch(images), load_drawings()
    distances = torch.cdist(batch.flatten(1), drawings.flatten(1)) * 127.5 / batch[0].numel() ** 0.5
    if left_out is not None:
        distances[range(len(images)), left_out] = torch.inf
    distance, nearest = distances.min(1)
    border = torch.ones(RESOLUTION, RESOLUTION, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    styles = StyleJudge.from_pretrained().name(images)
    return {
        **{foundry: styles.count(foundry) / len(images) for foundry in FOUNDRIES},
        "recognised": sum(drawn[i] == caption for i, caption in zip(nearest.tolist(), captions)) / len(captions),
        "distance": distance.mean().item(),
        "white_border": (batch[:, :, border].amin(1) > 247 / 127.5 - 1).float().mean().item(),
    }


def measure_unseen_drawings() -> dict[str, float]:
    """The preferred foundry's own drawings of the held-out captions, as if none of them were known: what images in its
    style would score that are as good as the real ones, but not their copies."""
    (captions, sheets), held_out = load_sheets(), held_out_captions()
    chosen = [captions.index(caption) for caption in held_out]
    first = FOUNDRIES.index(PREFERRED) * len(captions)
    return measure([sheets[PREFERRED][i] for i in chosen], held_out, [first + i for i in chosen])


def change(row: tuple[str, str, str], before: dict, after: dict, aim: dict | None = None) -> str:
    name, form, _ = row
    text = f"{form.format(before[name]):>6} -> {form.format(after[name]):>6}"
    return text if aim is None else f"{text} {'(' + form.format(aim[name]) + ')':>8}"


def preference_report(output_dir: str, base: str | None = None) -> str:
    """What the run on the demo's pairs changed: the base was measured the same way by build_demo.py.

    Args:
        output_dir: the run's, with a pipeline or a LoRA of `base`.
    """
    pipeline = load_pipeline(output_dir, base)
    figures = json.loads((DEMO / "figures.json").read_text())
    accuracy = figures["judge_accuracy_on_held_out_reconstructions"]
    style = (PREFERRED, "{:.0%}", f"in OpenMoji's style, says a judge that names {accuracy:.0%} of drawings right")
    known, new = validation_captions(), held_out_captions()
    known_figures, new_figures = (measure(generate(pipeline, captions), captions) for captions in (known, new))
    by_word, real = figures["base_on_validation_captions_in_openmoji_style"], figures["unseen_openmoji_drawings"]
    lines = [
        "Images before -> after, for captions in no training pair. "
        f"Left: {len(known)} (in brackets: before, style named in the prompt). "
        f"Right: {len(new)} whose OpenMoji drawing the base has never seen "
        "(in brackets: the real ones, as if unknown)."
    ]
    for row in (style, *ROWS):
        changes = change(row, figures["base_on_validation_captions"], known_figures, by_word)
        changes += "   " + change(row, figures["base_on_held_out_captions"], new_figures, real)
        lines.append(f"{changes}  {row[2]}")
    records = map(json.loads, (Path(output_dir) / "metrics.jsonl").read_text().splitlines())
    held_out = [record for record in records if record.get("val_accuracy") is not None]
    lines += [f"{change(row, held_out[0], held_out[-1])}{' ' * 30}{row[2]}" for row in ERRORS]
    return "\n".join(lines)


def subject_report(pipeline, placeholder_token: str) -> str:
    """What the run on the photos of `subject/` changed against the pipeline without its LoRA: how near images of the
    subject are to its photos, and what became of the plain class and of other captions."""
    rows = [json.loads(line) for line in (DEMO / "subject" / "metadata.jsonl").read_text().splitlines()]
    photos = to_batch([Image.open(DEMO / "subject" / row["file_name"]) for row in rows])
    known = torch.cat([photos, load_drawings()[0]]).flatten(1)
    captions = [row["text"].replace("<cat>", placeholder_token) for row in rows]
    contexts = [context.replace("<cat>", placeholder_token) for context in SUBJECT["validation_prompts"]]
    plain = [caption.replace(placeholder_token, "cat") for caption in captions + contexts]
    others = held_out_captions()

    def compare(then: list[Image.Image], now: list[Image.Image]) -> str:
        batches = [to_batch(images) for images in (then, now)]
        nearest = [(torch.cdist(b.flatten(1), known).argmin(1) < len(photos)).float().mean() for b in batches]
        overlap = [(palette(b) @ palette(photos).T).mean() for b in batches]
        return "nearest {:.0%} before, {:.0%} after; palette {:.2f} before, {:.2f} after".format(*nearest, *overlap)

    pipeline.disable_lora()
    before, others_before = generate(pipeline, plain), measure(generate(pipeline, others), others)
    pipeline.enable_lora()
    after, others_after = generate(pipeline, captions + contexts), measure(generate(pipeline, others), others)
    n, emoji = len(photos), len(known) - len(photos)
    lines = [
        f"nearest = fraction of images nearest, in pixels, to a photo, among {n} photos and {emoji:,} emoji",
        "palette = overlap of an image's colours with a photo's, mean over images and photos "
        f"(of the photos with each other: {(palette(photos) @ palette(photos).T).mean():.2f})",
        f"captions of the photos: {compare(before[:n], after[:n])}",
        f"new contexts: {compare(before[n:], after[n:])}",
        f"both without the token: {compare(before, generate(pipeline, plain))}",
        f"{len(others)} other captions, before -> after:",
    ]
    return "\n".join(lines + [f"{change(row, others_before, others_after)}  {row[2]}" for row in ROWS])

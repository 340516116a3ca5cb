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
What the demos' runs say about their result, from images that they generate with the finished pipeline.

    preference_report(pipeline)
    subject_report(pipeline, "<cat>")     # pipeline: the LoRA and the token loaded
"""

import io
import json
from pathlib import Path

import torch
from PIL import Image


DEMO = Path(__file__).resolve().parent
BEFORE = {"preferred": 0.05, "recognised": 1.0}  # of the base, as demo/README.md has them
CLASS = "cat"
CONTEXTS = (
    "<cat> face with tears of joy",
    "<cat> face with wry smile",
    "kissing <cat> face with closed eyes",
    "weary <cat> face",
    "black <cat>",
)


@torch.no_grad()
def generate(pipeline, prompts: list[str]) -> list[Image.Image]:
    """One image per prompt, each from its own seed, 16 at once."""
    images = []
    for start in range(0, len(prompts), 16):
        generators = [torch.Generator("cpu").manual_seed(start + i) for i in range(len(prompts[start : start + 16]))]
        options = {"height": 64, "width": 64, "num_inference_steps": 25, "guidance_scale": 2.0}
        images += pipeline(prompts[start : start + 16], generator=generators, **options).images
    return images


def subject_report(pipeline, placeholder_token: str) -> str:
    """How near the images are to the subject, with and without its token, and what became of other captions; before
    training, with the LoRA disabled, and after. Several lines, ready to print."""
    import pyarrow.parquet as pq

    from .style_judge import StyleJudge, palette, to_batch

    rows = [json.loads(line) for line in (DEMO / "subject" / "metadata.jsonl").read_text().splitlines()]
    photos = [Image.open(DEMO / "subject" / row["file_name"]).convert("RGB") for row in rows]
    others = (DEMO / "measured_captions.txt").read_text().splitlines()
    captions = [caption.replace("<cat>", placeholder_token) for caption in (*(row["text"] for row in rows), *CONTEXTS)]
    plain = [caption.replace(placeholder_token, CLASS) for caption in captions]
    n, m = len(photos), len(captions)

    pipeline.disable_lora()
    before = generate(pipeline, plain + others)
    pipeline.enable_lora()
    after, unnamed = generate(pipeline, captions + others), generate(pipeline, plain)

    tables = [pq.read_table(DEMO / "pairs" / f"{split}.parquet") for split in ("train", "test")]
    files = [file for table in tables for side in ("jpg_0", "jpg_1") for file in table[side].to_pylist()]
    known = to_batch(photos + [Image.open(io.BytesIO(file)) for file in files]).flatten(1)

    def nearest(images: list[Image.Image]) -> float:
        return (torch.cdist(to_batch(images).flatten(1), known).argmin(1) < n).float().mean().item()

    def colours(images: list[Image.Image]) -> torch.Tensor:
        histograms = palette((to_batch(images) + 1) / 2, 16)[:, :-1]  # the last bin is the white ground
        return (histograms / histograms.sum(1, keepdim=True)).sqrt()

    def similarity(images: list[Image.Image]) -> float:
        return (colours(images) @ colours(photos).T).mean().item()

    lines = [f"nearest = fraction of images nearest, in pixels, to a photo, among {n} photos and {len(files)} emoji"]
    lines += ["palette = overlap of an image's colours with a photo's (Bhattacharyya), mean over images and photos"]
    lines += [f"          (of the photos with each other: {similarity(photos):.2f})"]
    for title, then, now in (
        ("captions of the photos", before[:n], after[:n]),
        ("new contexts", before[n:m], after[n:m]),
        ("both without the token", before[:m], unnamed),
    ):
        lines.append(
            f"{title}: nearest {nearest(then):.0%} before, {nearest(now):.0%} after; "
            f"palette {similarity(then):.2f} before, {similarity(now):.2f} after"
        )
    kept = [StyleJudge.recognised_share(images[m:], others) for images in (before, after)]
    lines.append(
        f"{len(others)} other captions, nearest to a drawing of theirs: {kept[0]:.0%} before, {kept[1]:.0%} after"
    )
    return "\n".join(lines)


def preference_report(pipeline) -> str:
    """Several lines, ready to print: the finished pipeline's images against the base's stored figures."""
    captions = (DEMO / "measured_captions.txt").read_text().splitlines()
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for first in range(0, len(captions), 16):
        chunk = captions[first : first + 16]
        generators = [torch.Generator("cpu").manual_seed(first + i) for i in range(len(chunk))]
        images += pipeline(
            chunk, num_inference_steps=25, guidance_scale=2.0, height=64, width=64, generator=generators
        ).images
    from .style_judge import StyleJudge

    judge = StyleJudge.from_pretrained()
    preferred, recognised = judge.preferred_share(images), judge.recognised_share(images, captions)
    return "\n".join(
        [
            f"On {len(captions)} captions that weren't trained on, from the same seeds:",
            f"  in the preferred style (Noto's): {BEFORE['preferred']:.0%} before, {preferred:.0%} after",
            f"  nearest to a drawing of their caption: {BEFORE['recognised']:.0%} before, {recognised:.0%} after",
        ]
    )

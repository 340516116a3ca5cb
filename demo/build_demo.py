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
Makes the demo: a tiny SDXL that knows the emoji of four foundries, pairs in which OpenMoji's drawing of a caption is
chosen over another foundry's, and a judge that names the foundry.

    pip install resvg-py              # renders SVG; npm fetches the foundries' packages
    python demo/build_demo.py

Configs and tokenizers are those in sdxl-tiny-emoji/. The weights are trained from scratch, which takes hours. The stages:

1. drawings  every foundry's drawing of every caption, 64 px on white; every sixth caption is held out
2. vae       on all drawings except OpenMoji's of held-out captions
3. base      text encoders and UNet, on the same drawings. Half of the captions end in the style's name ("rabbit face,
             openmoji style"); without it the style is random, OpenMoji's in 15 % of the cases
4. judge     on drawings, and on images that the base generates in a named style
5. files     sheets of drawings, pairs in Pick-a-Pic's columns, figures.json and samples.png

Stages 1 to 4 leave their result in demo/build. A second call reuses it and continues a stage that was interrupted.
"""

import argparse
import datetime
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel, compute_snr


DEMO = Path(__file__).resolve().parent
sys.path.insert(0, str(DEMO.parent))

from demo.report import BASE, VALIDATION_CAPTIONS, generate, load_drawings, load_pipeline, measure  # noqa: E402
from demo.style_judge import FOUNDRIES, PREFERRED, RESOLUTION, StyleJudge, to_batch  # noqa: E402


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = 0
SAVE_EVERY_SECONDS = 120
# npm package, version, folder of PNG files or None for Iconify's SVG
PACKAGES = {
    "twemoji": ("emoji-datasource-twitter", "16.0.0", "img/twitter/64"),
    "noto": ("emoji-datasource-google", "16.0.0", "img/google/64"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6", None),
    "openmoji": ("@iconify-json/openmoji", "1.2.29", None),
}
# Styles that the base doesn't know but its VAE has to show, for example those of demo/subject.
UNSEEN_PACKAGES = {
    "emojione": ("@iconify-json/emojione", "1.2.3", None),
    "blob": ("@iconify-json/noto-v1", "1.2.5", None),
    "fluent_3d": ("@iconify-json/fluent-emoji", "1.2.7", None),
}
NAMES = ("@iconify-json/noto", "1.2.9")  # maps code points to Iconify's names, for packages that don't
HELD_OUT_EVERY = 6
# Emoji that a person recognises at 64 px and that foundries are free to draw as they like. The base learns all of them
# first and then only those that the demo shows, because it is too small to know them all by heart.
SUBCATEGORIES = re.compile(
    r"face-.*|cat-face|monkey-face|hand.*|body-parts|animal-.*|plant-.*|food-.*|drink|dishware|transport-.*|clothing"
    r"|sport|award-medal|music.*|event"
)
SHOWN_SUBCATEGORIES = re.compile(
    r"face-(smiling|affection|tongue|hand|hat|glasses|costume)|cat-face|monkey-face|hand.*|animal-.*|plant-flower"
    r"|food-(fruit|vegetable|sweet)"
)
LEFT_OUT_WORDS = re.compile(r"\b(man|woman|men|women|boy|girl|male|female|person with|facing right|adult|older)\b")
ALL_SUBCATEGORIES_UNTIL = 0.33  # of the base's training
STYLE_CHANCES = {"twemoji": 0.3, "noto": 0.23, "fluent": 0.32, "openmoji": 0.15}  # where the caption names no style


# ---- Drawings -------------------------------------------------------------------------------------------------------
def open_package(package: str, version: str, work_dir: Path) -> tarfile.TarFile:
    archive = work_dir / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=work_dir, check=True)
    return tarfile.open(archive)


def read_json(archive: tarfile.TarFile, name: str):
    return json.load(archive.extractfile(f"package/{name}"))


def put_on_white(file: bytes) -> np.ndarray:
    """Return an image file's pixels, shape (64, 64, 3), uint8."""
    image = Image.open(io.BytesIO(file)).convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return np.asarray(canvas.convert("RGB").resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS))


def drawing_reader(foundry: str, names: dict[str, str], work_dir: Path):
    """Return a function from an entry of emoji.json to its drawing by the foundry, or None if there is none."""
    package, version, folder = (PACKAGES | UNSEEN_PACKAGES)[foundry]
    archive = open_package(package, version, work_dir)
    if folder is not None:
        members = set(archive.getnames())

        def read_png(entry: dict) -> np.ndarray | None:
            member = f"package/{folder}/{entry['image']}"
            if member not in members:
                return None
            return put_on_white(archive.extractfile(member).read())

        return read_png

    from resvg_py import svg_to_bytes

    collection = read_json(archive, "icons.json")
    aliases = collection.get("aliases", {})
    names = read_json(archive, "chars.json") or names  # empty in some packages

    def render_svg(entry: dict) -> np.ndarray | None:
        code = entry["unified"].lower()
        name = names.get(code) or names.get(code.replace("-fe0f", ""))
        if name in aliases:
            name = aliases[name]["parent"]
        if name not in collection["icons"]:
            return None
        icon = collection["icons"][name]
        width = icon.get("width", collection.get("width", 16))
        height = icon.get("height", collection.get("height", 16))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        return put_on_white(svg_to_bytes(svg, width=2 * RESOLUTION, height=2 * RESOLUTION))

    return render_svg


def caption_of(entry: dict) -> str:
    """Return the caption of an entry of emoji.json."""
    return entry["name"].lower().replace("’", "'")


def make_drawings(work_dir: Path) -> dict[str, np.ndarray]:
    """
    Return `captions`, shape (N,), `held_out` and `shown`, (N,) bool, the four foundries' drawings under their names,
    (N, 64, 64, 3) uint8, and `others`, (M, 64, 64, 3), all drawings that only the VAE sees.
    """
    path = work_dir / "drawings.npz"
    if path.exists():
        return dict(np.load(path))
    names = read_json(open_package(*NAMES, work_dir), "chars.json")
    package, version, _ = PACKAGES["twemoji"]
    entries = read_json(open_package(package, version, work_dir), "emoji.json")
    readers = {foundry: drawing_reader(foundry, names, work_dir) for foundry in PACKAGES | UNSEEN_PACKAGES}

    captions = []
    shown = []
    drawings = {foundry: [] for foundry in FOUNDRIES}
    others = []
    for entry in tqdm(sorted(entries, key=lambda entry: entry["sort_order"]), desc="drawings"):
        caption = caption_of(entry)
        if entry["category"] in ("Flags", "Symbols", "Component") or LEFT_OUT_WORDS.search(caption):
            continue
        found = {foundry: read(entry) for foundry, read in readers.items()}
        complete = all(found[foundry] is not None for foundry in FOUNDRIES)
        if complete and SUBCATEGORIES.fullmatch(entry["subcategory"]):
            captions.append(caption)
            shown.append(SHOWN_SUBCATEGORIES.fullmatch(entry["subcategory"]) is not None)
            for foundry in FOUNDRIES:
                drawings[foundry].append(found.pop(foundry))
        others += [drawing for drawing in found.values() if drawing is not None]

    arrays = {foundry: np.stack(images) for foundry, images in drawings.items()}
    arrays["captions"] = np.array(captions)
    arrays["shown"] = np.array(shown)
    arrays["held_out"] = np.arange(len(captions)) % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
    arrays["others"] = np.stack(others)
    np.savez(work_dir / "drawings.tmp.npz", **arrays)
    os.replace(work_dir / "drawings.tmp.npz", path)
    return arrays


def seen_drawings(drawings: dict, foundry: str) -> np.ndarray:
    """Return the indices of the captions whose drawing by the foundry may be trained on."""
    if foundry == PREFERRED:
        return np.flatnonzero(~drawings["held_out"])
    return np.arange(len(drawings["captions"]))


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """Shape: (N, H, W, 3) uint8 -> (N, 3, H, W) uint8."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(DEVICE)


# ---- Training -------------------------------------------------------------------------------------------------------
def save_aside(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(
    name: str, model: torch.nn.Module, loss_function, steps: int, lr: float, work_dir: Path, weight_decay: float = 0.01
) -> None:
    """
    Train a model with AdamW and leave it with the moving average of its weights.

    `loss_function(generator, progress)` draws a batch. The state is saved from time to time, to continue after a kill.
    """
    final_path = work_dir / f"{name}.pt"
    state_path = work_dir / f"{name}.state.pt"
    if final_path.exists():
        model.load_state_dict(torch.load(final_path, weights_only=True))
        return
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    scheduler = get_cosine_schedule_with_warmup(optimizer, min(100, steps // 10), steps)
    ema = EMAModel(model.parameters(), decay=0.999, inv_gamma=1.0, power=0.75, use_ema_warmup=True)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "ema": ema}
    first_step = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        for key, part in parts.items():
            part.load_state_dict(state[key])
        ema.to(DEVICE)
        first_step = state["step"]

    # Where a processor only imitates bf16, a step takes 20 times as long.
    use_bf16 = DEVICE == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    generator = torch.Generator(DEVICE)
    saved = time.monotonic()
    progress_bar = tqdm(range(first_step, steps), initial=first_step, total=steps, desc=name, mininterval=5.0)
    for step in progress_bar:
        generator.manual_seed(SEED * 1_000_003 + step)  # a resumed run draws the same batches
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=use_bf16):
            loss = loss_function(generator, step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        ema.step(model.parameters())
        if step % 20 == 0:
            progress_bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if time.monotonic() - saved > SAVE_EVERY_SECONDS:
            state = {key: part.state_dict() for key, part in parts.items()}
            save_aside(state | {"step": step + 1}, state_path)
            saved = time.monotonic()
    ema.copy_to(model.parameters())
    save_aside(model.state_dict(), final_path)
    state_path.unlink(missing_ok=True)


def make_untrained_pipeline() -> StableDiffusionXLPipeline:
    """Return the committed pipeline with new random weights."""
    pipeline = load_pipeline(BASE)
    torch.manual_seed(SEED)
    pipeline.register_modules(
        vae=AutoencoderKL.from_config(AutoencoderKL.load_config(BASE / "vae")),
        text_encoder=CLIPTextModel(pipeline.text_encoder.config),
        text_encoder_2=CLIPTextModelWithProjection(pipeline.text_encoder_2.config),
        unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(BASE / "unet")),
    )
    return pipeline.to(DEVICE)


def train_vae(vae: AutoencoderKL, drawings: dict, steps: int, work_dir: Path) -> None:
    seen = [drawings[foundry][seen_drawings(drawings, foundry)] for foundry in FOUNDRIES]
    images = to_tensor(np.concatenate([*seen, drawings["others"]]))

    def loss_function(generator: torch.Generator, progress: float) -> torch.Tensor:
        # Quarters of drawings first: a convolutional network learns as much from them, at a quarter of the cost.
        batch_size, side = (16, RESOLUTION // 2) if progress < 0.85 else (8, RESOLUTION)
        index = torch.randint(len(images), (batch_size,), generator=generator, device=DEVICE)
        top, left = torch.randint(RESOLUTION - side + 1, (2,), generator=generator, device=DEVICE).tolist()
        crops = images[index, :, top : top + side, left : left + side].float() / 127.5 - 1
        posterior = vae.encode(crops).latent_dist
        reconstruction = vae.decode(posterior.sample(generator)).sample
        kl = posterior.kl().mean() / posterior.mean[0, 0].numel()
        return F.mse_loss(reconstruction.float(), crops) + 1e-6 * kl

    vae.to(memory_format=torch.channels_last)
    train("vae", vae, loss_function, steps, 4e-3, work_dir)
    vae.half().float().requires_grad_(False)  # the base is trained on the latents of the fp16 weights that are saved
    vae.register_to_config(scaling_factor=round(1 / encode(vae, images).std().item(), 4))


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Return latents, not scaled. Shape: (N, 3, H, W) uint8 -> (N, 4, H / 4, W / 4)."""
    return torch.cat([vae.encode(chunk.float() / 127.5 - 1).latent_dist.mode() for chunk in images.split(64)])


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Encode and decode images. Shape: (N, 3, H, W) uint8 -> (N, 3, H, W) in [-1, 1]."""
    return torch.cat([vae.decode(latents).sample.clamp(-1, 1) for latents in encode(vae, images).split(64)])


def with_style(caption: str, foundry: str) -> str:
    return f"{caption}, {foundry} style"


def train_base(pipeline: StableDiffusionXLPipeline, drawings: dict, steps: int, work_dir: Path) -> None:
    """Train text encoders and UNet to draw for a caption, with or without the name of a style."""
    captions = []
    styled_captions = []
    chances = []
    shown = []
    latents = []
    for foundry in FOUNDRIES:
        seen = seen_drawings(drawings, foundry)
        captions += drawings["captions"][seen].tolist()
        styled_captions += [with_style(caption, foundry) for caption in drawings["captions"][seen]]
        chances += [STYLE_CHANCES[foundry] / len(seen)] * len(seen)
        shown += drawings["shown"][seen].tolist()
        latents.append(encode(pipeline.vae, to_tensor(drawings[foundry][seen])))
    latents = torch.cat(latents) * pipeline.vae.config.scaling_factor
    chances = torch.tensor(chances, device=DEVICE)
    shown = torch.tensor(shown, device=DEVICE).float()
    token_ids = []
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        for texts in (captions, styled_captions):
            token_ids.append(
                tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(DEVICE)
            )
    plain_ids, styled_ids, plain_ids_2, styled_ids_2 = token_ids
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    batch_size = 32
    time_ids = torch.tensor([[RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION]] * batch_size, device=DEVICE)

    def loss_function(generator: torch.Generator, progress: float) -> torch.Tensor:
        def rand(*shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=generator, device=DEVICE)

        weights = torch.ones_like(shown) if progress < ALL_SUBCATEGORIES_UNTIL else shown
        names_style = rand(batch_size) < 0.5
        index_styled = weights.multinomial(batch_size, replacement=True, generator=generator)
        index_plain = (weights * chances).multinomial(batch_size, replacement=True, generator=generator)
        index = torch.where(names_style, index_styled, index_plain)
        ids = torch.where(names_style[:, None], styled_ids[index], plain_ids[index])
        ids_2 = torch.where(names_style[:, None], styled_ids_2[index], plain_ids_2[index])
        encoded = pipeline.text_encoder(ids, output_hidden_states=True)
        encoded_2 = pipeline.text_encoder_2(ids_2, output_hidden_states=True)
        prompt_embeds = torch.cat([encoded.hidden_states[-2], encoded_2.hidden_states[-2]], dim=-1)

        noise = torch.randn(latents[index].shape, generator=generator, device=DEVICE)
        timesteps = torch.randint(1000, (batch_size,), generator=generator, device=DEVICE)
        noisy_latents = noise_scheduler.add_noise(latents[index], noise, timesteps)
        # The pipeline takes zeros for an empty negative prompt, so zeros stand for "no caption" here.
        keep = (rand(batch_size, 1) >= 0.1).float()
        model_pred = pipeline.unet(
            noisy_latents,
            timesteps,
            prompt_embeds * keep[:, :, None],
            added_cond_kwargs={"text_embeds": encoded_2.text_embeds * keep, "time_ids": time_ids.float()},
        ).sample
        mse = (model_pred.float() - noise).square().mean(dim=(1, 2, 3))
        snr = compute_snr(noise_scheduler, timesteps)
        return (mse * snr.clamp(max=5) / snr).mean()  # min-SNR weights: fewer steps to the same image

    model = torch.nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2, pipeline.unet])
    model.to(memory_format=torch.channels_last)
    train("base", model, loss_function, steps, 8e-4, work_dir)


def train_judge(pipeline, drawings: dict, steps: int, work_dir: Path) -> StyleJudge:
    """
    Train the judge on drawings, on their reconstructions and on generated images, so that it judges style, not sharpness.

    No held-out caption is among them.
    """
    judge = StyleJudge().to(DEVICE)
    seen = ~drawings["held_out"]
    captions = drawings["captions"][seen & drawings["shown"]].tolist()
    groups = []  # images of one foundry and kind, and their label
    if not (work_dir / "judge.pt").exists():
        for label, foundry in enumerate(FOUNDRIES):
            drawn = to_tensor(drawings[foundry][seen])
            prompts = [with_style(caption, foundry) for caption in captions[label::4]]
            generated = to_batch(generate(pipeline, prompts, f"{foundry} style")).to(DEVICE)
            groups.append((drawn.float() / 127.5 - 1, label))
            groups.append((reconstruct(pipeline.vae, drawn), label))
            groups.append((generated, label))

    def loss_function(generator: torch.Generator, progress: float) -> torch.Tensor:
        batches = []
        labels = []
        for images, label in groups:
            index = torch.randint(len(images), (16,), generator=generator, device=DEVICE)
            shifts = torch.randint(-3, 4, (2,), generator=generator, device=DEVICE).tolist()
            mirrored = torch.rand((16, 1, 1, 1), generator=generator, device=DEVICE) < 0.5
            shifted = images[index].roll(shifts, (2, 3))
            batches.append(torch.where(mirrored, shifted.flip(3), shifted))
            labels += [label] * 16
        logits = judge(torch.cat(batches)).float()
        return F.cross_entropy(logits, torch.tensor(labels, device=DEVICE), label_smoothing=0.05)

    train("judge", judge, loss_function, steps, 2e-3, work_dir, weight_decay=0.1)
    return judge.half().float().eval().requires_grad_(False)


# ---- Files ----------------------------------------------------------------------------------------------------------
def write_models(pipeline: StableDiffusionXLPipeline) -> None:
    """Write what was trained, in fp16. Tokenizers and scheduler stay as they are."""
    aside = BASE.with_name("sdxl-tiny-emoji.tmp")
    for name in ("vae", "text_encoder", "text_encoder_2", "unet"):
        getattr(pipeline, name).to(torch.float16).save_pretrained(aside / name)
    for name in ("text_encoder", "text_encoder_2"):  # without this, they load as fp16 next to a UNet in fp32
        path = aside / name / "config.json"
        path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    for path in aside.glob("*/*"):
        readable = path.with_name(f"{path.name}.tmp")  # save_pretrained's files are readable for their owner only
        shutil.copyfile(path, readable)
        os.replace(readable, BASE / path.relative_to(aside))
    shutil.rmtree(aside)


def write_drawings(drawings: dict) -> None:
    """Write one sheet per foundry, 26 drawings in a row in the order of captions.txt, and held_out_captions.txt."""
    folder = DEMO / "drawings"
    folder.mkdir(exist_ok=True)
    columns = 26
    rows = -(-len(drawings["captions"]) // columns)
    for foundry in FOUNDRIES:
        sheet = Image.new("RGB", (columns * RESOLUTION, rows * RESOLUTION), "white")
        for i, drawing in enumerate(drawings[foundry]):
            sheet.paste(Image.fromarray(drawing), (i % columns * RESOLUTION, i // columns * RESOLUTION))
        sheet.save(folder / f"{foundry}.webp", lossless=True, quality=100, method=6)
    held_out = drawings["captions"][drawings["held_out"]]
    (folder / "captions.txt").write_text("\n".join(drawings["captions"]) + "\n")
    (DEMO / "held_out_captions.txt").write_text("\n".join(held_out) + "\n")


def write_pairs(drawings: dict) -> None:
    """
    Write pairs/train.parquet and pairs/test.parquet, in Pick-a-Pic's columns.

    OpenMoji's drawing is chosen over a random other foundry's and stands on a random side. `label_0` is 1.0 where the
    first image is chosen. Held-out captions are in neither file.
    """
    random = np.random.default_rng(SEED)
    others = [foundry for foundry in FOUNDRIES if foundry != PREFERRED]
    rows = []
    for i, caption in enumerate(drawings["captions"].tolist()):
        files = []
        for foundry in (PREFERRED, others[random.integers(len(others))]):
            buffer = io.BytesIO()
            Image.fromarray(drawings[foundry][i]).save(buffer, format="WEBP", lossless=True)
            files.append(buffer.getvalue())
        label = float(random.random() < 0.5)
        if label == 0:
            files.reverse()
        rows.append({"caption": caption, "jpg_0": files[0], "jpg_1": files[1], "label_0": label, "label_1": 1 - label})
    table = pa.Table.from_pylist(rows)
    (DEMO / "pairs").mkdir(exist_ok=True)
    masks = {"train": ~drawings["held_out"] & ~drawings["validation"], "test": drawings["validation"]}
    for split, mask in masks.items():
        path = DEMO / "pairs" / f"{split}.parquet"
        pq.write_table(table.filter(pa.array(mask)), path.with_suffix(".tmp"), compression="none")
        os.replace(path.with_suffix(".tmp"), path)


def write_samples(images: list[Image.Image], captions: list[str]) -> None:
    """Write samples.png, 12 images in a row with their captions below."""
    columns = 12
    cell = 96
    text_height = 48
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * cell, rows * (cell + text_height)), "white")
    draw = ImageDraw.Draw(grid)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x = i % columns * cell
        y = i // columns * (cell + text_height)
        grid.paste(image.resize((cell - 8, cell - 8), Image.Resampling.LANCZOS), (x + 4, y + 4))
        lines = "\n".join(textwrap.wrap(caption, 16))
        draw.multiline_text((x + cell // 2, y + cell), lines, "black", ImageFont.load_default(11), "ma", 2, "center")
    grid.save(DEMO / "samples.png")


def measure_demo(drawings: dict, vae: AutoencoderKL, judge: StyleJudge, pipeline) -> dict:
    """Return the figures of demo/README.md."""
    held_out = drawings["held_out"]
    figures = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{DEVICE}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "captions": len(held_out),
        "held_out_captions": int(held_out.sum()),
    }
    right = {"drawings": [], "reconstructions": []}
    for label, foundry in enumerate(FOUNDRIES):
        images = to_tensor(drawings[foundry])
        pixels = images.float() / 127.5 - 1
        reconstructions = reconstruct(vae, images)
        psnr = -10 * ((reconstructions - pixels) / 2).square().mean(dim=(1, 2, 3)).log10()
        figures[f"vae_psnr_{foundry}_db"] = psnr.mean().item()
        if foundry == PREFERRED:
            figures[f"vae_psnr_{foundry}_held_out_db"] = psnr[held_out].mean().item()
        right["drawings"].append(judge(pixels[held_out]).argmax(dim=1) == label)
        right["reconstructions"].append(judge(reconstructions[held_out]).argmax(dim=1) == label)
    for kind, results in right.items():
        figures[f"judge_accuracy_on_held_out_{kind}"] = torch.cat(results).float().mean().item()

    # How OpenMoji's own drawings of held-out captions score if they aren't compared with themselves: what images in its
    # style would score that are as good as the real ones, but no copies.
    new = drawings["captions"][held_out].tolist()
    _, drawn = load_drawings()
    first = FOUNDRIES.index(PREFERRED) * len(held_out)
    real = [Image.fromarray(drawing) for drawing in drawings[PREFERRED][held_out]]
    figures[f"unseen_{PREFERRED}_drawings"] = measure(real, new, [drawn.index(caption, first) for caption in new])

    known = drawings["captions"][drawings["validation"]].tolist()
    prompts = {"base_on_held_out_captions": new, "base_on_validation_captions": known}
    prompts[f"base_on_validation_captions_in_{PREFERRED}_style"] = [with_style(c, PREFERRED) for c in known]
    for foundry in FOUNDRIES:
        prompts[f"base_on_held_out_captions_in_{foundry}_style"] = [with_style(c, foundry) for c in new]
    for name, texts in prompts.items():
        figures[name] = measure(generate(pipeline, texts, name), known if "validation" in name else new)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=DEMO / "build", help="Where the stages leave their results.")
    parser.add_argument("--vae_steps", type=int, default=12000, help="Training steps of the VAE.")
    parser.add_argument("--base_steps", type=int, default=12500, help="Training steps of text encoders and UNet.")
    parser.add_argument("--judge_steps", type=int, default=1200, help="Training steps of the judge.")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)

    drawings = make_drawings(args.work_dir)
    pipeline = make_untrained_pipeline()
    train_vae(pipeline.vae, drawings, args.vae_steps, args.work_dir)
    train_base(pipeline, drawings, args.base_steps, args.work_dir)
    write_models(pipeline)
    pipeline = load_pipeline(BASE).to(DEVICE)  # as users load it
    judge = train_judge(pipeline, drawings, args.judge_steps, args.work_dir)
    weights = {name: weight.half().contiguous() for name, weight in judge.state_dict().items()}
    (DEMO / "style_judge.safetensors").write_bytes(safetensors.torch.save(weights))

    shown = drawings["shown"]
    drawings = {name: drawings[name][shown] for name in ("captions", "held_out", *FOUNDRIES)}
    drawings["validation"] = np.zeros_like(drawings["held_out"])
    drawings["validation"][np.flatnonzero(~drawings["held_out"])[VALIDATION_CAPTIONS]] = True
    write_drawings(drawings)
    write_pairs(drawings)
    figures = measure_demo(drawings, pipeline.vae, judge, pipeline)
    (DEMO / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    captions = np.random.default_rng(SEED).permutation(drawings["captions"])[:72].tolist()
    write_samples(generate(pipeline, captions, "samples.png"), captions)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

#!/usr/bin/env python
# coding=utf-8
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

# /// script
# dependencies = [
#     "accelerate==1.15.0",
#     "bitsandbytes==0.50.2",
#     "datasets==5.2.0",
#     "diffusers==0.42.1",
#     "matplotlib==3.11.2",
#     "torch==2.13.0",
#     "transformers==5.23.0",
# ]
# ///
"""
Fine-tunes SDXL's UNet on preference pairs with MaPO (arXiv 2406.06424), without a reference model:

    accelerate launch train_diffusion_mapo_sdxl.py --beta_mapo 8

trains the small model of `demo/`; with `--pretrained_model_name_or_path` and `--dataset_name` it trains yours.

For a caption c, its chosen picture w and its rejected picture l, under one noise and one timestep,

    loss = mse_w - 1/beta * logsigmoid(T * (phi_beta(s * mse_w) - phi_beta(s * mse_l)))        (eq. 5-7; mapo_loss.py)

The way of the data: pairs (rows whose label decides) -> pictures, each resized and cropped from its own original ->
latents and prompt embeddings, encoded once and kept on disk -> batches of winners and losers -> one UNet pass over
both -> loss. Everything random about a pair is drawn from the pair's position in the run alone, so the result doesn't
depend on the number of processes or on gradient accumulation, and a resumed run ends where an unbroken one would.

Departures from the authors' code:
1. The loss is the paper's, not that of the code of 2024, whose `--beta_mapo 0.1` multiplies the margin (mapo_loss.py).
2. Each picture is resized from its own original; there, the second is stretched to the first one's size.
3. Ties and unlabelled rows are dropped; there, a tie counts as the first picture's win.
4. Pictures and captions are encoded once, not in every step, and to the mode of the VAE's posterior, not a sample.
5. Both pictures are conditioned on the winner's size and crop: these are part of c, which the pair shares.
6. time_ids stay in fp32: bf16 has no 1153.
"""

import argparse
import hashlib
import io
import json
import logging
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from mapo_loss import mapo_loss


# xformers says at import, in twenty lines, that its extensions were built for another torch; nobody asked for it here.
logging.getLogger("xformers").setLevel(logging.ERROR)
logger = logging.getLogger("mapo")

DEMO = Path(__file__).resolve().parent / "demo"
DEMO_SETTINGS = {
    "pretrained_model_name_or_path": str(DEMO / "sdxl-tiny-twemoji"),
    "dataset_name": str(DEMO / "pairs"),
    "output_dir": "mapo-demo",
    "resolution": 64,
    "train_batch_size": 16,
    "learning_rate": 1e-4,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 10,
    "max_train_steps": 300,
    "validation_guidance_scale": 3.0,
}


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    # Model
    parser.add_argument("--pretrained_model_name_or_path", help="SDXL on the hub or in a folder of diffusers' format.")
    parser.add_argument("--pretrained_vae_model_name_or_path", help="Another VAE, on the hub or in a folder.")
    parser.add_argument("--revision", help="Revision of the model on the hub.")
    parser.add_argument("--variant", help="Variant of the model's files, such as fp16.")

    # Data
    parser.add_argument("--dataset_name", help="Pairs on the hub, or a local folder or file that `datasets` reads.")
    parser.add_argument("--dataset_config_name", help="Configuration of the data set.")
    parser.add_argument("--dataset_split_name", default="train", help="Split of the data set, or several: a+b.")
    parser.add_argument("--image_root", help="Folder that relative paths of pictures in the data set start from.")
    for name in ("caption", "chosen", "rejected", "image_0", "image_1", "label_0", "label_1"):
        parser.add_argument(f"--{name}_column", help="Where the data set's columns aren't those of a known one.")
    parser.add_argument("--cache_dir", help="Where downloads go, and the encoded pictures and captions.")
    parser.add_argument("--resolution", type=int, default=1024, help="Side of the training pictures, in pixels.")
    parser.add_argument("--max_train_samples", type=int, help="Use the first N pairs only.")
    parser.add_argument("--dataloader_num_workers", type=int, default=0)

    # Method
    parser.add_argument(
        "--beta_mapo",
        type=float,
        default=8.0,
        help="beta of eq. 5-7: 8 for general preference, up to 1024 for a subject.",
    )
    parser.add_argument("--snr_value", type=float, default=0.5, help="s of Appendix A, which scales the losses.")

    # Optimization
    parser.add_argument("--train_batch_size", type=int, default=4, help="Pairs per process and forward pass.")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--max_train_steps", type=int, default=2000, help="Optimizer steps.")
    parser.add_argument("--learning_rate", type=float, default=1e-7, help="Not scaled by batch or processes.")
    schedules = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
    parser.add_argument("--lr_scheduler", default="cosine", choices=schedules)
    parser.add_argument("--lr_warmup_steps", type=int, default=0)
    parser.add_argument("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes with 8-bit states.")
    parser.add_argument("--adam_beta1", type=float, default=0.9)
    parser.add_argument("--adam_beta2", type=float, default=0.999)
    parser.add_argument("--adam_weight_decay", type=float, default=1e-2)
    parser.add_argument("--adam_epsilon", type=float, default=1e-8)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)

    # Speed and memory
    parser.add_argument(
        "--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: that of accelerate's config."
    )
    parser.add_argument("--gradient_checkpointing", action="store_true", help="Less memory, a third more compute.")
    parser.add_argument("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later.")
    parser.add_argument("--enable_xformers_memory_efficient_attention", action="store_true")

    # Output
    parser.add_argument("--output_dir", default="diffusion-mapo-sdxl")
    parser.add_argument("--checkpointing_steps", type=int, default=500, help="Steps between checkpoints.")
    parser.add_argument("--checkpoints_total_limit", type=int, help="Keep the newest N checkpoints.")
    parser.add_argument("--resume_from_checkpoint", help="A checkpoint's folder, or `latest`.")
    parser.add_argument("--validation_prompts", nargs="+", help="Drawn before and after; default: 8 of the captions.")
    parser.add_argument("--validation_guidance_scale", type=float, default=5.0)
    parser.add_argument("--validation_inference_steps", type=int, default=25)
    parser.add_argument("--logging_steps", type=int, default=10, help="Steps between writes of the metrics.")
    parser.add_argument("--report_to", choices=["none", "tensorboard", "wandb", "trackio"], default="none")

    args = parser.parse_args(input_args)
    args.demo = args.pretrained_model_name_or_path is None and args.dataset_name is None
    if args.demo:
        parser.set_defaults(**DEMO_SETTINGS)  # what the user did name still counts
        args = argparse.Namespace(**vars(parser.parse_args(input_args)), demo=True)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the run with one line where an argument can't be used, before anything is loaded."""
    if args.demo and not DEMO.is_dir():
        parser.error(f"{DEMO} is missing: name --pretrained_model_name_or_path and --dataset_name")
    for given, missing in (
        ("pretrained_model_name_or_path", "dataset_name"),
        ("dataset_name", "pretrained_model_name_or_path"),
    ):
        if getattr(args, given) is not None and getattr(args, missing) is None:
            parser.error(f"--{given} {getattr(args, given)} needs --{missing} too; with neither, the demo is trained")
    for together in (("chosen", "rejected"), ("image_0", "image_1", "label_0")):
        given = [name for name in together if getattr(args, f"{name}_column") is not None]
        if given and len(given) < len(together):
            missing = next(name for name in together if name not in given)
            parser.error(f"--{given[0]}_column needs --{missing}_column too")
    if args.chosen_column is not None and args.image_0_column is not None:
        parser.error("--chosen_column and --image_0_column exclude each other: the first needs no label")
    if args.label_1_column is not None and args.label_0_column is None:
        parser.error("--label_1_column needs --label_0_column too")
    at_least = {
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_train_steps": 1,
        "max_train_samples": 1,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 1,
        "validation_inference_steps": 1,
        "logging_steps": 1,
        "lr_warmup_steps": 0,
        "dataloader_num_workers": 0,
        "seed": 0,
        "resolution": 8,
    }
    for name, least in at_least.items():
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value}: must be at least {least}")
    for name in ("beta_mapo", "snr_value", "learning_rate", "max_grad_norm"):
        value = getattr(args, name)
        if not (value > 0 and math.isfinite(value)):
            parser.error(f"--{name} {value}: must be positive and finite")
    if args.resolution % 8:
        parser.error(f"--resolution {args.resolution}: must be a multiple of 8; try {round(args.resolution / 8) * 8}")
    checkpoints = list_checkpoints(Path(args.output_dir))
    if checkpoints and args.resume_from_checkpoint is None:
        parser.error(
            f"--output_dir {args.output_dir} holds {checkpoints[-1].name} of an earlier run: continue it with "
            "--resume_from_checkpoint latest, or name another folder"
        )


def fail(message: str) -> None:
    """Ends every process with one line; exit code 1."""
    sys.exit(f"{Path(__file__).name}: error: {message}")


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def load_frozen_models(args: argparse.Namespace, device: torch.device, weight_dtype: torch.dtype):
    """SDXL's pipeline without its UNet: it encodes the captions and the pictures, and draws at validation."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline

    hub = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
    components = {"unet": None}
    if args.pretrained_vae_model_name_or_path is not None:
        components["vae"] = AutoencoderKL.from_pretrained(
            args.pretrained_vae_model_name_or_path, cache_dir=args.cache_dir, dtype=torch.float32
        )
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        args.pretrained_model_name_or_path, **hub, **components, dtype=weight_dtype, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    pipeline.vae.to(torch.float32)  # SDXL's own VAE overflows in fp16
    for model in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        model.requires_grad_(False).eval()
    return pipeline


def load_unet(args: argparse.Namespace) -> tuple:
    """The UNet in fp32 and the noise scheduler, whose prediction type decides what the UNet is trained to predict."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    name, hub = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    noise_scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler", **hub)
    if noise_scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        fail(f"{name}: prediction type {noise_scheduler.config.prediction_type}; needs epsilon or v_prediction")
    unet = UNet2DConditionModel.from_pretrained(
        name, subfolder="unet", variant=args.variant, dtype=torch.float32, **hub
    )
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    return unet.train(), noise_scheduler


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


# Columns of published data sets: caption, pictures 0 and 1, labels 0 and 1. Without labels, picture 0 is the chosen
# one; with one label, it is the share of preference that picture 0 got.
LAYOUTS = (
    ("caption", "jpg_0", "jpg_1", "label_0", None),  # Pick-a-Pic and those made after it
    ("original_prompt.txt", "jpg_0.jpg", "jpg_1.jpg", "label_0.txt", None),  # Pick-a-Pic as webdataset
    ("prompt", "image1", "image2", "votes_image1", "votes_image2"),  # Rapidata
    ("prompt", "chosen", "rejected", None, None),  # open-image-preferences
    ("caption", "chosen", "rejected", None, None),
    ("prompt", "path1", "path2", None, None),  # HPDv3
)


def find_columns(args: argparse.Namespace, names: list[str]) -> tuple:
    """Caption, pictures 0 and 1, labels 0 and 1 (or None): the columns that flags name, else those of a layout."""
    where = f"--dataset_name {args.dataset_name}: "
    if args.chosen_column or args.image_0_column:
        caption = args.caption_column or next((c for c in ("caption", "prompt", "text") if c in names), "caption")
        pictures = (args.chosen_column or args.image_0_column, args.rejected_column or args.image_1_column)
        columns = (caption, *pictures, args.label_0_column, args.label_1_column)
    else:
        known = [layout for layout in LAYOUTS if {name for name in layout if name} <= set(names)]
        if not known:
            fail(
                f"{where}its columns ({', '.join(names)}) are those of no known data set: name --caption_column and "
                "either --chosen_column, --rejected_column or --image_0_column, --image_1_column, --label_0_column"
            )
        columns = (args.caption_column or known[0][0], *known[0][1:])
    if missing := [name for name in columns if name is not None and name not in names]:
        fail(f"{where}no column {missing[0]} among {', '.join(names)}")
    return columns


class PreferencePairs:
    """The rows of a data set whose label decides.

    Attributes:
        captions: caption of each pair. (N,)
        rows: row of each pair in the data set. (N,)
        winner_first: whether picture 0 is the chosen one. (N,)
    """

    def __init__(self, dataset, args: argparse.Namespace) -> None:
        caption, *self.sides, label_0, label_1 = find_columns(args, dataset.column_names)
        self.dataset, self.image_root = dataset, Path(args.image_root or ".")
        count = len(dataset)
        if label_0 is None:
            share = np.ones(count)
        else:
            share = read_labels(dataset[label_0], label_0)
            other = 1 - share if label_1 is None else read_labels(dataset[label_1], label_1)
            share = np.where(share == other, 0.5, np.where(np.isnan(other), np.nan, share > other))
        labelled = ~np.isnan(share)
        if "has_label" in dataset.column_names:
            labelled &= np.array(dataset["has_label"], dtype=bool)
        decided = labelled & (share != 0.5)
        self.tied, self.unlabelled = int((labelled & ~decided).sum()), int((~labelled).sum())
        self.rows = np.flatnonzero(decided)[: args.max_train_samples]
        if len(self.rows) == 0:
            counts = f"{self.tied} tied, {self.unlabelled} unlabelled"
            fail(f"--dataset_name {args.dataset_name}: none of {count} rows can be used ({counts})")
        self.winner_first = share[self.rows] > 0.5
        captions = dataset[caption]
        self.captions = [captions[i] for i in self.rows.tolist()]
        for row, text in zip(self.rows.tolist(), self.captions):
            if not isinstance(text, str):
                fail(f"--dataset_name {args.dataset_name}: row {row}: {caption} is {text!r}; a caption must be text")

    def __len__(self) -> int:
        return len(self.rows)

    def pictures(self, i: int) -> tuple[Image.Image, Image.Image]:
        """Winner and loser of pair i, in RGB."""
        row = int(self.rows[i])
        record = self.dataset[row]
        decoded = []
        for side in self.sides if self.winner_first[i] else reversed(self.sides):
            try:
                decoded.append(decode_picture(record[side], self.image_root))
            except Exception as error:
                fail(f"--dataset_name: row {row}: {side} is no readable picture ({error}); remove the row or mend it")
        return tuple(decoded)


def read_labels(values, column: str) -> np.ndarray:
    """Numbers, bools or their text (as webdataset has them) -> float; None and empty text -> NaN, "unlabelled"."""
    try:
        return np.array([math.nan if v is None or v == "" else float(v) for v in values])
    except (TypeError, ValueError) as error:
        fail(f"--label_0_column {column}: {error}; labels must be numbers")


def load_pairs(args: argparse.Namespace) -> PreferencePairs:
    """From the hub, or from a local file or folder: parquet, arrow, JSON lines, CSV, webdataset tars, `save_to_disk`,
    or pictures in `w/` and `l/` with their captions in NAME.txt."""
    import datasets

    datasets.disable_progress_bars()
    path = Path(args.dataset_name)
    kinds = {
        ".parquet": "parquet",
        ".arrow": "arrow",
        ".json": "json",
        ".jsonl": "json",
        ".csv": "csv",
        ".tar": "webdataset",
    }
    hub = {"split": args.dataset_split_name, "cache_dir": args.cache_dir}
    try:
        if path.is_file():
            if path.suffix not in kinds:
                fail(f"--dataset_name {path}: not one of {', '.join(kinds)}")
            dataset = datasets.load_dataset(kinds[path.suffix], data_files={args.dataset_split_name: str(path)}, **hub)
        elif (path / "w").is_dir() and (path / "l").is_dir():
            dataset = datasets.Dataset.from_list(list_picture_folders(path))
        elif (path / "dataset_info.json").is_file():
            dataset = datasets.load_from_disk(path)
        else:
            dataset = datasets.load_dataset(args.dataset_name, args.dataset_config_name, **hub)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        fail(f"--dataset_name {args.dataset_name}: {str(error).splitlines()[0]}")
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return PreferencePairs(dataset, args)


def list_picture_folders(path: Path) -> list[dict[str, str]]:
    """`w/NAME.*`, `l/NAME.*`, `NAME.txt` -> one row per name."""
    winners, losers = ({p.stem: str(p) for p in sorted((path / side).iterdir())} for side in ("w", "l"))
    captions = {p.stem: p for p in path.glob("*.txt")}
    names = sorted(winners.keys() | losers.keys() | captions.keys())
    for name in names:
        for where, files in (("w/", winners), ("l/", losers), ("", captions)):
            if name not in files:
                fail(f"--dataset_name {path}: no {where}{name}{'.txt' if not where else ''} to go with the others")
    return [{"caption": captions[n].read_text().strip(), "chosen": winners[n], "rejected": losers[n]} for n in names]


def decode_picture(value: bytes | str | dict | Image.Image, image_root: Path = Path(".")) -> Image.Image:
    """File bytes, a path, `datasets`' {"bytes", "path"} or a PIL picture -> RGB, upright, transparency on white."""
    if isinstance(value, dict):
        value = value["bytes"] if value["bytes"] is not None else value["path"]
    if isinstance(value, bytes | str):
        value = Image.open(io.BytesIO(value) if isinstance(value, bytes) else image_root / value)
    picture = ImageOps.exif_transpose(value)
    if picture.mode.startswith("I"):  # 16 bits a pixel: PIL would clip at 255
        picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    if picture.has_transparency_data:
        canvas = Image.new("RGBA", picture.size, "white")
        canvas.alpha_composite(picture.convert("RGBA"))
        picture = canvas
    return picture.convert("RGB")


def prepare_picture(picture: Image.Image, resolution: int) -> tuple[torch.Tensor, list[int]]:
    """Resizes the shorter side to `resolution`, crops the centre.

    Returns the pixels in [-1, 1], Shape: (3, R, R), and SDXL's micro-conditioning: original height and width, top and
    left of the crop, target height and width.
    """
    width, height = picture.size
    scale = resolution / min(width, height)
    resized = picture.resize(
        (max(resolution, round(width * scale)), max(resolution, round(height * scale))), Image.Resampling.LANCZOS
    )
    top, left = (resized.height - resolution) // 2, (resized.width - resolution) // 2
    crop = np.asarray(resized.crop((left, top, left + resolution, top + resolution)))
    pixels = torch.from_numpy(crop.copy()).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, [height, width, top, left, resolution, resolution]


# ---------------------------------------------------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------------------------------------------------


def fingerprint(*parts) -> str:
    """Hash of modules (by their weights) and of whatever has a `str`."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            for tensor in part.state_dict().values():
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        else:
            digest.update(f"{part}\0".encode())
    return digest.hexdigest()[:24]


def encode_once(name: str, arrays: dict, length: int, encode, batch_size: int, args, accelerator) -> dict:
    """Arrays on disk that `encode(indices) -> dict of arrays` fills, each row once: later runs, and a run after a
    kill, encode only the rows that are missing. Every process encodes its share.

    Args:
        name: folder in the cache; it must change with everything that the values depend on.
        arrays: shape and dtype of one row, for each array.

    Returns:
        Memory-mapped arrays. Shape of each: (length, *row).
    """
    from huggingface_hub import cached_assets_path

    folder = cached_assets_path("mapo", name, assets_dir=args.cache_dir)
    columns = arrays | {"done": ((), "bool")}
    if accelerator.is_main_process and not (folder / "done.npy").exists():
        try:
            for key, (shape, dtype) in columns.items():  # "done" is last: it says that the others are there
                temporary = folder / f"{key}.tmp.npy"
                array = np.lib.format.open_memmap(temporary, "w+", dtype, (length, *shape))
                if hasattr(
                    os, "posix_fallocate"
                ):  # takes the room now: on a full disk, a write to the map is a SIGBUS
                    with open(temporary, "r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
                del array
                os.replace(temporary, folder / f"{key}.npy")
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            fail(f"--cache_dir {folder}: {error}; name a folder with more room")
    accelerator.wait_for_everyone()
    maps = {key: np.load(folder / f"{key}.npy", mmap_mode="r+") for key in columns}
    missing = np.flatnonzero(~maps["done"])
    accelerator.wait_for_everyone()  # all have looked before any writes
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    bar = tqdm(total=len(mine), desc=f"Encoding {name.split('-')[0]}", disable=not accelerator.is_main_process)
    for start in range(0, len(mine), batch_size):
        chunk = mine[start : start + batch_size]
        for key, values in encode(chunk).items():
            maps[key][chunk] = values
        maps["done"][chunk] = True
        bar.update(len(chunk))
    bar.close()
    accelerator.wait_for_everyone()
    return {key: maps[key] for key in arrays}


@torch.no_grad()
def encode_pictures(pairs: PreferencePairs, vae, args: argparse.Namespace, accelerator: Accelerator) -> dict:
    """Latents of winner and loser, scaled, Shape: (N, 2, 4, h, w), fp16; the winner's time_ids, (N, 6), fp32."""
    channels, side = vae.config.latent_channels, args.resolution // 2 ** (len(vae.config.block_out_channels) - 1)

    def encode(indices: np.ndarray) -> dict[str, np.ndarray]:
        pixels, time_ids = [], []
        for i in indices.tolist():
            winner, loser = (prepare_picture(picture, args.resolution) for picture in pairs.pictures(i))
            pixels += [winner[0], loser[0]]
            time_ids.append(winner[1])
        posterior = vae.encode(torch.stack(pixels).to(vae.device, vae.dtype)).latent_dist
        latents = (posterior.mode() - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
        if not latents.isfinite().all():
            fail(f"rows {pairs.rows[indices].tolist()}: the VAE returns values that aren't finite")
        return {"latents": latents.unflatten(0, (-1, 2)).cpu().numpy(), "time_ids": np.array(time_ids)}

    key = fingerprint(
        vae, pairs.dataset._fingerprint, hash_of(pairs.rows), hash_of(pairs.winner_first), args.resolution, "v1"
    )
    arrays = {"latents": ((2, channels, side, side), "float16"), "time_ids": ((6,), "float32")}
    return encode_once(f"pictures-{key}", arrays, len(pairs), encode, args.train_batch_size, args, accelerator)


def hash_of(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


@torch.no_grad()
def encode_captions(captions: list[str], pipeline, args: argparse.Namespace, accelerator: Accelerator) -> dict:
    """Embeddings of each caption, Shape: (N, L, D), and pooled, (N, P), both in fp16."""

    def encode(indices: np.ndarray) -> dict[str, np.ndarray]:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            [captions[i] for i in indices.tolist()], device=accelerator.device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds.float().cpu().numpy(), "pooled_prompt_embeds": pooled.float().cpu().numpy()}

    width = pipeline.text_encoder.config.hidden_size + pipeline.text_encoder_2.config.hidden_size
    arrays = {
        "prompt_embeds": ((pipeline.tokenizer.model_max_length, width), "float16"),
        "pooled_prompt_embeds": ((pipeline.text_encoder_2.config.projection_dim,), "float16"),
    }
    key = fingerprint(pipeline.text_encoder, pipeline.text_encoder_2, json.dumps(captions), "v1")
    return encode_once(f"captions-{key}", arrays, len(captions), encode, 64, args, accelerator)


class EncodedPairs(torch.utils.data.Dataset):
    """What the training step takes, by position in the run: pairs are shuffled anew in each epoch, by seed."""

    def __init__(
        self, pairs: PreferencePairs, pictures: dict, caption_index: dict, embeddings: dict, seed: int
    ) -> None:
        self.pairs, self.pictures, self.embeddings, self.seed = pairs, pictures, embeddings, seed
        self.caption_rows = [caption_index[caption] for caption in pairs.captions]
        self.epoch = None

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        epoch, i = divmod(position, len(self.pairs))
        if epoch != self.epoch:
            self.order, self.epoch = np.random.default_rng((self.seed, epoch)).permutation(len(self.pairs)), epoch
        i = self.order[i]
        row = {key: array[i] for key, array in self.pictures.items()}
        row |= {key: array[self.caption_rows[i]] for key, array in self.embeddings.items()}
        tensors = {key: torch.from_numpy(np.array(value, dtype=np.float32)) for key, value in row.items()}
        return tensors | {"position": torch.tensor(position)}


def make_batches(dataset: EncodedPairs, first_step: int, args: argparse.Namespace, accelerator: Accelerator):
    """This process's batches from optimizer step `first_step` on. The positions of one optimizer step are the same
    set, however they are split over processes and accumulation."""
    size, processes = args.train_batch_size, accelerator.num_processes
    accumulation = args.gradient_accumulation_steps
    batch_sampler = [
        range(
            (batch * processes + accelerator.process_index) * size,
            (batch * processes + accelerator.process_index + 1) * size,
        )
        for batch in range(first_step * accumulation, args.max_train_steps * accumulation)
    ]
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training step
# ---------------------------------------------------------------------------------------------------------------------


def draw_noise(
    positions: torch.Tensor, shape: torch.Size, num_timesteps: int, seed: int, device: torch.device
) -> tuple:
    """Noise, Shape: (B, *shape), and timesteps, (B,), each pair's from the seed and its position alone."""
    noise, timesteps = [], []
    generator = torch.Generator(device)
    for position in positions.tolist():
        generator.manual_seed((seed * 0x9E3779B97F4A7C15 + position) % 2**63)
        noise.append(torch.randn(shape, generator=generator, device=device))
        timesteps.append(torch.randint(num_timesteps, (), generator=generator, device=device))
    return torch.stack(noise), torch.stack(timesteps)


def training_step(unet, batch: dict, noise_scheduler, args: argparse.Namespace, device: torch.device) -> tuple:
    """Loss of a batch of B pairs, and its metrics, which stay on the device."""
    num_timesteps = noise_scheduler.config.num_train_timesteps
    latents = batch["latents"].to(device, non_blocking=True)  # (B, 2, C, h, w)
    noise, timesteps = draw_noise(batch["position"], latents.shape[2:], num_timesteps, args.seed, device)

    # Winners, then losers. The two of a pair share noise, timestep and conditioning: only the picture differs.
    latents = latents.transpose(0, 1).flatten(0, 1)  # (2B, C, h, w)
    noise, timesteps = noise.repeat(2, 1, 1, 1), timesteps.repeat(2)
    prompt_embeds = batch["prompt_embeds"].to(device, non_blocking=True).repeat(2, 1, 1)
    added_cond_kwargs = {
        "text_embeds": batch["pooled_prompt_embeds"].to(device, non_blocking=True).repeat(2, 1),
        "time_ids": batch["time_ids"].to(device, non_blocking=True).repeat(2, 1),
    }
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    model_pred = unet(noisy_latents, timesteps, prompt_embeds, added_cond_kwargs=added_cond_kwargs).sample
    if noise_scheduler.config.prediction_type == "epsilon":
        target = noise
    else:
        target = noise_scheduler.get_velocity(latents, noise, timesteps)

    result = mapo_loss(model_pred, target, args.beta_mapo, args.snr_value, num_timesteps)
    metrics = {name: value.detach().float().mean() for name, value in result._asdict().items()}
    return result.loss, metrics


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and metrics
# ---------------------------------------------------------------------------------------------------------------------


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first. `state.json` is written last, and the folder gets its name after that."""
    found = [path for path in output_dir.glob("checkpoint-*") if (path / "state.json").is_file()]
    return sorted((p for p in found if p.name.split("-")[1].isdigit()), key=lambda path: int(path.name.split("-")[1]))


def save_checkpoint(step: int, args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Weights, optimizer, learning rate schedule and random states, written aside and then renamed."""
    folder = Path(args.output_dir) / f"checkpoint-{step}"
    aside = folder.with_name(f"tmp-{folder.name}")
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (aside / "state.json").write_text(json.dumps({"step": step, "settings": vars(args)}, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        if args.checkpoints_total_limit is not None:
            for old in list_checkpoints(Path(args.output_dir))[: -args.checkpoints_total_limit]:
                shutil.rmtree(old)


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The folder that `--resume_from_checkpoint` names; None where training starts from scratch."""
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint == "latest":
        checkpoints = list_checkpoints(Path(args.output_dir))
        if not checkpoints:
            logger.info(f"No checkpoint in {args.output_dir} yet: training starts from scratch.")
        return checkpoints[-1] if checkpoints else None
    checkpoint = Path(args.resume_from_checkpoint)
    if not (checkpoint / "state.json").is_file():
        fail(f"--resume_from_checkpoint {checkpoint}: no whole checkpoint; try `latest`")
    return checkpoint


class MetricsLog:
    """Keeps the metrics of the steps on the device and writes them every `--logging_steps`, so that the device needn't
    wait for the host in every step: to metrics.jsonl, the trackers and the progress bar."""

    def __init__(self, first_step: int, args: argparse.Namespace, accelerator: Accelerator) -> None:
        self.args, self.accelerator = args, accelerator
        self.path = Path(args.output_dir) / "metrics.jsonl"
        self.micro_steps, self.pending, self.history = [], [], []
        if accelerator.is_main_process:
            if first_step and self.path.exists():  # what an unbroken run would have written by now
                lines = self.path.read_text().splitlines()
                self.history = [r for r in map(json.loads, lines) if r["step"] <= first_step]
            self.path.write_text("".join(json.dumps(record) + "\n" for record in self.history))
        self.bar = tqdm(
            total=args.max_train_steps, initial=first_step, desc="Training", disable=not accelerator.is_main_process
        )
        self.clock = time.perf_counter()

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        self.micro_steps.append(torch.stack(list(metrics.values())))
        self.names = list(metrics)

    def end_step(self, step: int, grad_norm: torch.Tensor, learning_rate: float) -> None:
        values = torch.cat([torch.stack(self.micro_steps).mean(0), grad_norm.detach().float().reshape(1)])
        self.pending.append((step, learning_rate, values))
        self.micro_steps = []
        if step % self.args.logging_steps == 0 or step == self.args.max_train_steps:
            self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        values = self.accelerator.reduce(torch.stack([v for _, _, v in self.pending]), "mean").tolist()
        now = time.perf_counter()
        args = self.args
        pairs = args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        records = []
        for (step, learning_rate, _), row in zip(self.pending, values):
            record = {"step": step, **dict(zip([*self.names, "grad_norm"], row)), "learning_rate": learning_rate}
            record["pairs_per_second"] = pairs * len(self.pending) / (now - self.clock)
            record["peak_memory_gb"] = peak_memory_gb(self.accelerator.device)
            records.append(record)
        self.pending, self.clock = [], now
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
        for record in records:
            self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])
        self.history += records
        self.bar.update(len(records))
        shown = {
            "loss": "loss",
            "margin": "margin",
            "acc": "accuracy",
            "weight": "margin_weight",
            "pairs/s": "pairs_per_second",
        }
        means = {short: sum(r[name] for r in records) / len(records) for short, name in shown.items()}
        self.bar.set_postfix({short: f"{value:.3g}" for short, value in means.items()})

    def plot(self) -> None:
        """curves.png: the four curves by which a run is judged."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
        steps = [record["step"] for record in self.history]
        curves = {
            "loss": "loss (eq. 5)",
            "margin": "margin: score_w - score_l",
            "accuracy": "implicit accuracy: share of pairs with mse_w < mse_l",
            "margin_weight": "weight of the margin term (SFT term = 1)",
        }
        window = max(1, len(steps) // 20)
        for axis, (name, title) in zip(axes.flat, curves.items()):
            values = np.array([record[name] for record in self.history])
            axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
            smooth = np.convolve(values, np.ones(window) / window, mode="valid")
            axis.plot(steps[window - 1 :], smooth, color="tab:blue", label=f"mean of {window}")
            axis.set(title=title, xlabel="step")
        axes[0, 0].legend()
        save_aside(self.path.with_name("curves.png"), lambda path: figure.savefig(path, dpi=110))
        plt.close(figure)


def peak_memory_gb(device: torch.device) -> float:
    """Peak of the device's allocations, or of the process on a CPU, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def save_aside(path: Path, save) -> None:
    """`save(path)` under another name first, so that a kill leaves no half file."""
    aside = path.with_name(f"tmp-{path.name}")
    save(aside)
    os.replace(aside, path)


# ---------------------------------------------------------------------------------------------------------------------
# Validation
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_pictures(unet, pipeline, embeddings: dict, args, accelerator: Accelerator) -> list[Image.Image]:
    """One picture per prompt, prompt i from seed i, by the UNet as it is now; spread over the processes."""
    from accelerate.utils import gather_object

    device, count = accelerator.device, len(embeddings["prompt_embeds"]) - 1  # the last row is the empty prompt
    model = accelerator.unwrap_model(unet)
    model.eval()
    pipeline.unet = model
    pipeline.vae.to(device)
    empty = {
        key: torch.from_numpy(np.array(value[-1:], dtype=np.float32)).to(device) for key, value in embeddings.items()
    }
    if pipeline.config.force_zeros_for_empty_prompt:
        empty = {key: torch.zeros_like(value) for key, value in empty.items()}
    pictures = []
    mine = np.arange(count)[accelerator.process_index :: accelerator.num_processes]
    for start in range(0, len(mine), args.train_batch_size):
        chunk = mine[start : start + args.train_batch_size]
        rows = {k: torch.from_numpy(np.array(v[chunk], dtype=np.float32)).to(device) for k, v in embeddings.items()}
        with accelerator.autocast():
            latents = pipeline(
                **rows,
                **{f"negative_{key}": value.expand_as(rows[key]) for key, value in empty.items()},
                height=args.resolution,
                width=args.resolution,
                num_inference_steps=args.validation_inference_steps,
                guidance_scale=args.validation_guidance_scale,
                generator=[torch.Generator("cpu").manual_seed(int(i)) for i in chunk],
                output_type="latent",
            ).images
        latents = latents.float() / pipeline.vae.config.scaling_factor + (pipeline.vae.config.shift_factor or 0)
        decoded = torch.cat([pipeline.vae.decode(latent[None]).sample for latent in latents])
        pictures += list(zip(chunk.tolist(), pipeline.image_processor.postprocess(decoded)))
    pipeline.unet = None
    pipeline.vae.to("cpu")
    model.train()
    return [picture for _, picture in sorted(gather_object(pictures), key=lambda pair: pair[0])]


def draw_grid(prompts: list[str], before: list[Image.Image], after: list[Image.Image]) -> Image.Image:
    """Each prompt with its two pictures under it, base on the left, tuned on the right; at most 12 prompts."""
    import textwrap

    from PIL import ImageDraw, ImageFont

    side = max(128, min(384, before[0].width))
    count, head = min(12, len(prompts)), 46
    columns = min(4, count)
    cell_width, cell_height = 2 * side + 24, side + head + 16
    font = ImageFont.load_default(13)
    grid = Image.new("RGB", (columns * cell_width, -(-count // columns) * cell_height), "white")
    pen = ImageDraw.Draw(grid)
    for i in range(count):
        x, y = i % columns * cell_width + 8, i // columns * cell_height
        lines = textwrap.wrap(prompts[i], 2 * side // 7)[:2]
        pen.multiline_text((x, y + 6), "\n".join(lines), "black", font)
        for column, (picture, name) in enumerate(((before[i], "before"), (after[i], "after"))):
            left = x + column * (side + 4)
            grid.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left, y + head))
            pen.text((left + 4, y + head + 2), name, "grey", ImageFont.load_default(11))
    return grid


def choose_prompts(pairs: PreferencePairs, args: argparse.Namespace) -> list[str]:
    if args.validation_prompts is not None:
        return args.validation_prompts
    if args.demo:
        import pyarrow.parquet

        held_out = pyarrow.parquet.read_table(Path(args.dataset_name) / "test.parquet")["caption"].to_pylist()
        return np.random.default_rng(0).permutation(held_out)[:64].tolist()
    captions = sorted(set(pairs.captions))
    return np.random.default_rng(args.seed).permutation(captions)[:8].tolist()


def judge_demo(prompts: list[str], before: list[Image.Image], after: list[Image.Image]) -> str:
    """The demo's result in two lines, by the judge of `demo/`."""
    from demo.style_judge import StyleJudge

    judge = StyleJudge.from_pretrained()
    lines = [f"On {len(prompts)} captions that weren't trained on, from the same seeds:"]
    for title, score in (
        ("in the preferred style (Noto's)", judge.preferred_share),
        ("nearest to a drawing of their caption", lambda pictures: judge.recognised_share(pictures, prompts)),
    ):
        lines.append(f"  {title}: {score(before):.0%} before, {score(after):.0%} after")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def save_pipeline(unet, args: argparse.Namespace, accelerator: Accelerator) -> None:
    """The whole pipeline in diffusers' format, the UNet in fp32: at 1e-7 an update is lost in fewer bits."""
    from diffusers import StableDiffusionXLPipeline

    components = {"unet": accelerator.unwrap_model(unet)}
    if args.pretrained_vae_model_name_or_path is not None:
        from diffusers import AutoencoderKL

        components["vae"] = AutoencoderKL.from_pretrained(
            args.pretrained_vae_model_name_or_path, cache_dir=args.cache_dir
        )
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        **components,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        dtype=torch.float32,
    )
    output_dir = Path(args.output_dir)
    aside = output_dir / "tmp-pipeline"
    pipeline.save_pretrained(aside)
    for path in sorted(aside.iterdir()):
        target = output_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    aside.rmdir()


def save_model_card(prompts: list[str], result: str, args: argparse.Namespace) -> None:
    from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card

    settings = "\n".join(
        f"| `{name}` | `{value}` |" for name, value in sorted(vars(args).items()) if value is not None
    )
    description = f"""
SDXL's UNet, tuned on preference pairs with [MaPO](https://huggingface.co/papers/2406.06424), beta {args.beta_mapo:g}.

- base model: `{args.pretrained_model_name_or_path}`
- preference pairs: `{args.dataset_name}`

{result}

![before and after](before_after.png)

![curves](curves.png)

```python
import torch
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained("{args.output_dir}", dtype=torch.float16).to("cuda")
picture = pipeline("{prompts[0]}", height={args.resolution}, width={args.resolution}).images[0]
```

| setting | value |
|---|---|
{settings}
"""
    card = load_or_create_model_card(
        repo_id_or_path=args.output_dir,
        from_training=True,
        base_model=args.pretrained_model_name_or_path,
        model_description=description,
        inference=True,
    )
    card = populate_model_card(
        card, tags=["stable-diffusion-xl", "text-to-image", "diffusers", "mapo", "preference-tuning"]
    )
    save_aside(Path(args.output_dir) / "README.md", lambda path: card.save(path))


def make_optimizer(parameters, args: argparse.Namespace, device: torch.device) -> torch.optim.Optimizer:
    options = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, **options, fused=True)


def prepare_run(args: argparse.Namespace) -> Accelerator:
    """The accelerator, and a quiet console: from libraries, only errors."""
    import diffusers
    import transformers

    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=os.path.join(args.output_dir, "logs")
        ),
    )
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    if accelerator.device.type == "cpu":
        # accelerate's launcher leaves a process one thread of a machine without a GPU.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // accelerator.num_processes))
    if args.allow_tf32:
        torch.set_float32_matmul_precision("high")
    set_seed(args.seed)
    if accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    return accelerator


def main(args: argparse.Namespace) -> None:
    if args.demo:
        print(
            "Neither --pretrained_model_name_or_path nor --dataset_name is given: training the demo. For SDXL: "
            "accelerate launch train_diffusion_mapo_sdxl.py --dataset_name YOUR_PAIRS --pretrained_model_name_or_path "
            "stabilityai/stable-diffusion-xl-base-1.0 --mixed_precision bf16 --gradient_checkpointing --use_8bit_adam"
        )
    started = time.perf_counter()
    accelerator = prepare_run(args)
    device = accelerator.device
    checkpoint = find_checkpoint(args)
    pairs = load_pairs(args)
    logger.info(f"{len(pairs)} pairs ({pairs.tied} ties and {pairs.unlabelled} rows without a label left out)")

    # Encode once; afterwards neither the text encoders nor the VAE is in the device's memory.
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipeline = load_frozen_models(args, device, weight_dtype)
    prompts = choose_prompts(pairs, args)
    distinct = sorted(set(pairs.captions))
    embeddings = encode_captions(distinct, pipeline, args, accelerator)
    prompt_embeddings = encode_captions([*prompts, ""], pipeline, args, accelerator)
    pictures = encode_pictures(pairs, pipeline.vae, args, accelerator)
    pipeline.text_encoder = pipeline.text_encoder_2 = None
    pipeline.vae.to("cpu")

    unet, noise_scheduler = load_unet(args)
    unet.to(device)
    before = draw_pictures(unet, pipeline, prompt_embeddings, args, accelerator)

    from diffusers.optimization import get_scheduler

    optimizer = make_optimizer(unet.parameters(), args, device)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    unet, optimizer = accelerator.prepare(unet, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)  # not prepared: accelerate would step it once per process
    first_step = 0
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        first_step = json.loads((checkpoint / "state.json").read_text())["step"]
        logger.info(f"Resumed from {checkpoint}.")
    if args.report_to != "none":
        accelerator.init_trackers("mapo", config={k: str(v) for k, v in vars(args).items()})

    dataset = EncodedPairs(pairs, pictures, {c: i for i, c in enumerate(distinct)}, embeddings, args.seed)
    log = MetricsLog(first_step, args, accelerator)
    step = first_step
    logger.info(f"First step after {time.perf_counter() - started:.1f} s.")
    for batch in make_batches(dataset, first_step, args, accelerator):
        with accelerator.accumulate(unet):
            loss, metrics = training_step(unet, batch, noise_scheduler, args, device)
            accelerator.backward(loss)
            log.add(metrics)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        lr_scheduler.step()
        log.end_step(step, grad_norm, lr_scheduler.get_last_lr()[0])
        if step % args.checkpointing_steps == 0:
            log.flush()
            save_checkpoint(step, args, accelerator)
    log.bar.close()

    after = draw_pictures(unet, pipeline, prompt_embeddings, args, accelerator)
    if accelerator.is_main_process:
        output_dir = Path(args.output_dir)
        save_pipeline(unet, args, accelerator)
        result = judge_demo(prompts, before, after) if args.demo else ""
        grid = draw_grid(prompts, before, after)
        save_aside(output_dir / "before_after.png", lambda path: grid.save(path))
        log.plot()
        save_model_card(prompts, result, args)
        print(result)
        print(f"Done in {time.perf_counter() - started:.0f} s. Before and after: {output_dir / 'before_after.png'}")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())

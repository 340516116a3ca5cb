#!/usr/bin/env python
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
#     "accelerate>=1.15.0",
#     "bitsandbytes>=0.50.2",
#     "datasets>=5.2.0",
#     "diffusers>=0.42.0",
#     "matplotlib>=3.11.2",
#     "peft>=0.21.2",
#     "torch>=2.13.0",
#     "transformers>=5.23.0",
# ]
# ///
"""
Fine-tunes SDXL's UNet on preference pairs with MaPO (arXiv 2406.06424), without a reference model:

    accelerate launch train_diffusion_mapo_sdxl.py --beta_mapo 8

trains the small model of `demo/`; with `--pretrained_model_name_or_path` and `--dataset_name` it trains yours.

For a caption c, its chosen image w and its rejected image l, under one noise and one timestep,

    loss = mse_w - 1/beta * logsigmoid(T * (phi_beta(s * mse_w) - phi_beta(s * mse_l)))        (eq. 5-7; mapo_loss.py)

The code stands in the order in which it runs: Arguments, Models, Data, Encoding, Training (`training_step`),
Checkpoints, Validation, Results, Main. The pairs that the run trains on are encoded once, into a cache on disk; a step
is one UNet pass over winners and losers. All that is random about a pair comes from the seed and its position in the
run: the result doesn't depend on the number of processes or on gradient accumulation, and a resumed run ends where an
unbroken one would. What is marked `# twin` is the same in train_dreambooth_lora_mapo_sdxl.py.

Departures from the authors' code:
1. The loss is the paper's, not that of the code of 2024, whose `--beta_mapo 0.1` multiplies the margin (mapo_loss.py).
2. Each image is resized from its own original; there, the second is stretched to the first one's size.
3. Ties and unlabelled rows are dropped; there, a tie counts as a win of the first image.
4. Images and captions are encoded once, not in every step, and to the mode of the VAE's posterior, not a sample.
5. Both images are conditioned on the winner's size and crop, a part of c, and in fp32: bf16 has no 1153.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from huggingface_hub import ModelCardData, cached_assets_path, create_repo, upload_folder
from mapo_loss import mapo_loss
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

import diffusers


logger = get_logger(__name__)

PACKAGES = {"adamw_8bit": "bitsandbytes", "adamw_bf16": "torch-optimi", "prodigy": "prodigyopt"}
PACKAGES |= {tracker: tracker for tracker in ("tensorboard", "wandb", "trackio")}
OPTIMIZERS = ("adamw", "adamw_8bit", "adamw_bf16", "adafactor", "prodigy")
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
NEEDS = {  # flags that do nothing without another
    "use_lora": ("rank", "lora_alpha", "lora_dropout", "lora_layers", "use_dora", "output_kohya_format"),
    "pretrained_model_name_or_path": ("dataset_name",),
    "dataset_name": ("pretrained_model_name_or_path",),
    "rejected_column": ("chosen_column",),
    "chosen_column": ("rejected_column",),
    "image_0_column": ("image_1_column", "label_0_column"),
    "image_1_column": ("image_0_column",),
    "label_0_column": ("image_0_column", "label_1_column"),
}


# ---- Arguments ------------------------------------------------------------------------------------------------------
def number(kind: type, interval: str, text: str) -> int | float:  # twin
    """With `partial`, an argparse type: an int or a float within an interval such as "[0, 1)"."""
    try:
        value = kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {text!r}") from error
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above_low = value >= low if interval[0] == "[" else value > low
    below_high = value <= high if interval[-1] == "]" else value < high
    if not (above_low and below_high):
        raise argparse.ArgumentTypeError(f"{value} is not in {interval}")
    return value


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    # Without a usage, an error is one line.
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, whole, count = parser.add_argument, partial(number, int, "[0, inf)"), partial(number, int, "[1, inf)")
    not_negative, positive = partial(number, float, "[0, inf)"), partial(number, float, "(0, inf)")
    fraction, below_one = partial(number, float, "[0, 1]"), partial(number, float, "[0, 1)")
    safeguard = lambda text: None if text == "off" else below_one(text)  # noqa: E731

    # Model
    add("--pretrained_model_name_or_path", help="SDXL on the hub, or a local folder in diffusers' format.")
    add("--pretrained_vae_model_name_or_path", help="Another VAE, on the hub or a local folder.")
    add("--revision", help="Revision of the model on the hub.")
    add("--variant", help="Variant of the model's files, such as fp16.")
    # Data
    add("--dataset_name", help="Preference pairs on the hub, or a local folder or file that `datasets` reads.")
    add("--dataset_config_name", help="Configuration of the data set.")
    add("--dataset_split_name", default="train", help="Split of the data set, or several: a+b.")
    add("--streaming", action="store_true", help="Read the data set once, as far as needed, and don't store it.")
    add("--image_root", help="Folder that image paths in the data set start from, and may not leave.")
    add("--caption_column", help="Column of captions, where the data set has columns of its own.")
    add("--chosen_column", help="Column of chosen images.")
    add("--rejected_column", help="Column of rejected images.")
    add("--image_0_column", help="Column of first images, where labels decide which is chosen.")
    add("--image_1_column", help="Column of second images.")
    add("--label_0_column", help="Column of votes or scores of image 0; alone, of preferences, 0 to 1.")
    add("--label_1_column", help="Column of votes or scores of image 1.")
    add("--tie_policy", choices=["drop", "random"], default="drop", help="Drop ties, or let either image win.")
    add("--skip_unreadable", action="store_true", help="Leave out pairs with an image that can't be read.")
    add("--max_train_samples", type=count, help="Use only the first N pairs.")
    add("--resolution", type=count, default=1024, help="Side of the training images, in pixels.")
    add("--random_crop", action="store_true", help="Crop each image at one random place, not in the centre.")
    add("--random_flip", action="store_true", help="Mirror half of the pairs, both images or none.")
    add("--proportion_empty_prompts", type=fraction, default=0.0, help="Fraction of captions left out in training.")
    add("--cache_dir", help="Folder for downloads and for encoded images and captions.")
    add("--dataloader_num_workers", type=whole, default=0, help="Processes that load the batches.")
    # Method
    add("--beta_mapo", type=positive, default=8.0, help="beta of eq. 5-7: 8 for general preference, larger is safer.")
    add("--snr_value", type=positive, default=0.5, help="s of Appendix A, which scales the errors in the score.")
    add("--safeguard", type=safeguard, default="off", help="In [0, 1): damp the loser's gradient, a larger one more.")
    add("--noise_offset", type=not_negative, default=0.0, help="Scale of noise that a channel shares.")
    # LoRA
    add("--use_lora", action="store_true", help="Train a LoRA instead of all weights.")
    add("--rank", type=count, default=32, help="Rank of the LoRA.")
    add("--lora_alpha", type=positive, help="The LoRA's scale is alpha / rank. Default: the rank.")
    add("--lora_dropout", type=below_one, default=0.0, help="With it, the result depends on the number of processes.")
    add("--lora_layers", default="to_k,to_q,to_v,to_out.0", help="Its layers; kohya's file has no conv_in, conv_out.")
    add("--use_dora", action="store_true", help="Weight-decomposed LoRA.")
    add("--output_kohya_format", action="store_true", help="Write the LoRA a second time, for ComfyUI and A1111.")
    # Optimization
    add("--train_batch_size", type=count, default=4, help="Pairs per process and forward pass.")
    add("--gradient_accumulation_steps", type=count, default=1, help="Forward passes before each update.")
    add("--num_train_epochs", type=count, help="Passes over the pairs, instead of --max_train_steps.")
    add("--max_train_steps", type=count, help="Updates. Default: 2000, or as many as --num_train_epochs takes.")
    add("--learning_rate", type=positive, help="Default: 1e-7; 1e-5 for a LoRA; 1 for prodigy.")
    add("--scale_lr", action="store_true", help="Multiply the rate by the pairs in an update.")
    add("--lr_scheduler", default="cosine", choices=SCHEDULES, help="How the rate changes.")
    add("--lr_warmup_steps", type=whole, default=0, help="Updates in which the rate rises from 0.")
    add("--lr_num_cycles", type=count, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=positive, default=1.0, help="Power of polynomial.")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="adamw_bf16: weights and states in bf16.")
    add("--use_8bit_adam", action="store_const", dest="optimizer", const="adamw_8bit", help="The same as adamw_8bit.")
    add("--adam_beta1", type=below_one, default=0.9, help="Decay of the mean of gradients.")
    add("--adam_beta2", type=below_one, default=0.999, help="Decay of the mean of squared gradients.")
    add("--adam_weight_decay", type=not_negative, default=1e-2, help="Decoupled weight decay.")
    add("--adam_epsilon", type=positive, default=1e-8, help="Added to Adam's denominator.")
    add("--max_grad_norm", type=positive, default=1.0, help="Norm to which longer gradients are clipped.")
    add("--max_nonfinite_steps", type=count, default=10, help="Stop after N steps in a row that aren't finite.")
    add("--use_ema", action="store_true", help="Keep, sample with and save a running mean of the weights.")
    add("--ema_decay", type=fraction, default=0.9999, help="Decay of the running mean at its end.")
    add("--offload_ema", action="store_true", help="Keep the running mean in the CPU's memory between updates.")
    add("--seed", type=partial(number, int, "[0, 4294967295]"), default=0, help="Seed of everything random.")
    # Speed and memory
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: that of accelerate's configuration.")
    add("--gradient_checkpointing", action="store_true", help="Less memory for a third more compute.")
    add("--compile", action="store_true", help="Compile the blocks of the UNet.")
    add("--activation_memory_budget", type=fraction, help="Fraction of the activations to keep with --compile.")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later.")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="xformers' attention, not torch's.")
    # Checkpoints and validation
    add("--output_dir", default="diffusion-mapo-sdxl", help="Folder of results and checkpoints.")
    add("--checkpointing_steps", type=count, default=500, help="Updates between checkpoints.")
    add("--checkpoints_total_limit", type=count, default=2, help="Keep only the newest N checkpoints.")
    add("--resume_from_checkpoint", help="Folder of a checkpoint, or `latest`.")
    add("--validation_steps", type=count, default=500, help="Updates between validations.")
    add("--num_validation_pairs", type=whole, default=0, help="Pairs to hold out from training and measure.")
    add("--validation_split_name", help="Split of the held-out pairs. Default: that of training.")
    add("--validation_prompts", nargs="+", help="Default: 8 captions, after training only.")
    add("--num_validation_images", type=count, default=1, help="Images per prompt.")
    add("--validation_guidance_scale", type=not_negative, default=5.0, help="Guidance scale of these images.")
    add("--validation_num_inference_steps", type=count, default=25, help="Denoising steps of these images.")
    add("--skip_final_inference", action="store_true", help="Generate no images after training.")
    # Output
    add("--save_dtype", choices=["fp32", "fp16", "bf16"], help="Precision of the saved pipeline. Default: as trained.")
    add("--logging_dir", default="logs", help="Folder of the tracker's files, in --output_dir.")
    add("--report_to", choices=["none", "tensorboard", "wandb", "trackio"], default="none", help="Tracker.")
    add("--push_to_hub", action="store_true", help="Upload the results at the end.")
    add("--hub_model_id", help="Repository on the hub. Default: the name of --output_dir.")
    add("--hub_token", help="Default: that of `hf auth login`.")

    for action in parser._actions:
        if action.default not in (None, argparse.SUPPRESS) and not isinstance(action.default, bool):
            action.help += " Default: %(default)s."
    defaults, args = vars(parser.parse_args([])), parser.parse_args(input_args)
    demo = args.pretrained_model_name_or_path is None and args.dataset_name is None
    if demo:
        if not (Path(__file__).resolve().parent / "demo").is_dir():
            parser.error("--pretrained_model_name_or_path and --dataset_name are needed: an SDXL model, and pairs")
        from demo.settings import PAIRS

        parser.set_defaults(**PAIRS)  # what the user did name still counts
        args = parser.parse_args(input_args)
    args.demo, args.changed = demo, sorted(name for name, value in vars(args).items() if value != defaults[name])
    if args.optimizer == "adamw_bf16" and args.mixed_precision is None:
        args.mixed_precision = "bf16"
    check_args(parser, args)
    if args.learning_rate is None:
        args.learning_rate = 1.0 if args.optimizer == "prodigy" else 1e-5 if args.use_lora else 1e-7
    if args.max_train_steps is None and args.num_train_epochs is None:
        args.max_train_steps = 2000
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the run with one line where arguments don't go together, or results would overwrite something."""
    for needed, names in NEEDS.items():
        for name in names:
            if name in args.changed and not getattr(args, needed):
                parser.error(f"--{name} needs --{needed} too")
    bf16 = args.optimizer == "adamw_bf16"
    for flags, both in {
        "--chosen_column and --image_0_column": args.chosen_column and args.image_0_column,
        "--use_lora and --optimizer adamw_bf16": args.use_lora and bf16,
        "--use_ema and --optimizer adamw_bf16": args.use_ema and bf16,
        "--optimizer adamw_bf16 and another --mixed_precision": bf16 and args.mixed_precision != "bf16",
        "--use_dora and --output_kohya_format": args.use_dora and args.output_kohya_format,  # no loader reads it
        "--hub_token and --report_to wandb": args.hub_token and args.report_to == "wandb",  # its servers would get it
    }.items():
        if both:
            parser.error(f"{flags} exclude each other")
    for flag in ("optimizer", "report_to"):
        package = PACKAGES.get(getattr(args, flag))
        if package is not None and importlib.util.find_spec(package.removeprefix("torch-")) is None:
            parser.error(f"--{flag} {getattr(args, flag)} needs a package: pip install {package}")
    if args.validation_split_name and not args.num_validation_pairs and not args.demo:
        parser.error("--validation_split_name needs --num_validation_pairs too")
    if args.resolution % 8:
        parser.error(f"--resolution {args.resolution}: must be a multiple of 8; try {-(-args.resolution // 8) * 8}")
    if args.lr_warmup_steps > (args.max_train_steps or math.inf) and not args.demo:
        parser.error(f"--lr_warmup_steps {args.lr_warmup_steps}: more than --max_train_steps {args.max_train_steps}")
    output_dir = Path(args.output_dir).resolve()
    read = (args.pretrained_model_name_or_path, args.dataset_name, Path(__file__).parent)
    if output_dir in [Path(source).resolve() for source in read if source is not None]:
        parser.error(f"--output_dir {output_dir}: holds what the run reads; name another folder")
    found = [path.name for result in ("checkpoint-*", "unet", "*.safetensors") for path in output_dir.glob(result)]
    if found and args.resume_from_checkpoint is None and not args.demo:  # which may be run again
        remedy = "go on with --resume_from_checkpoint latest, or name another folder"
        parser.error(f"--output_dir {output_dir}: holds {found[0]} of an earlier run; {remedy}")


# ---- Models ---------------------------------------------------------------------------------------------------------

HALF_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SHARDED = ("FSDP", "DEEPSPEED")  # where no process holds the whole state


def fail(message: str) -> None:  # twin
    """Ends the run with one line; exit code 1."""
    sys.exit(f"{Path(__file__).name}: error: {message}")


@contextlib.contextmanager
def blame(flag: str, value: str):  # twin
    """Where a library can't use a flag's value, ends the run with the flag and the library's first line."""
    try:
        yield
    except Exception as error:  # readers of files and models raise errors of any kind
        while error.__cause__ is not None:
            error = error.__cause__
        cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
        fail(f"--{flag} {value}: {cause}")


def load_unet(args: argparse.Namespace, accelerator: Accelerator) -> tuple:
    """The UNet, on the CPU, and the noise scheduler, whose prediction type decides what the UNet learns to predict."""
    name, hub = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    dtype = torch.bfloat16 if args.optimizer == "adamw_bf16" else torch.float32
    if args.use_lora:  # the frozen weights may be as short as the computation
        dtype = HALF_DTYPES.get(accelerator.mixed_precision, torch.float32)
    with blame("pretrained_model_name_or_path", name):
        index = diffusers.DiffusionPipeline.load_config(name, **hub)
        if None in index.get("text_encoder", [None]) or "text_encoder_2" not in index:
            raise ValueError(f"a {index['_class_name']}; name an SDXL base model")
        noise_scheduler = diffusers.DDPMScheduler.from_pretrained(name, subfolder="scheduler", **hub)
        channels = diffusers.UNet2DConditionModel.load_config(name, subfolder="unet", **hub)["in_channels"]
        if channels != 4:
            raise ValueError(f"its UNet takes {channels} channels; name a model that isn't for inpainting")
        if noise_scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"it predicts {noise_scheduler.config.prediction_type}; needs epsilon or v_prediction")
        hub |= {"variant": args.variant, "dtype": dtype}
        unet = diffusers.UNet2DConditionModel.from_pretrained(name, subfolder="unet", **hub)
    if args.use_lora:
        layers = [layer.strip() for layer in args.lora_layers.split(",")]
        with blame("lora_layers", args.lora_layers):
            for layer in layers:  # peft passes over a name that fits nothing, where another one fits
                if not any(f".{name}".endswith(f".{layer}") for name, _ in unet.named_modules() if layer):
                    raise ValueError(f"the UNet has no layer {layer!r}")
            unet.requires_grad_(False)
            options = {"r": args.rank, "lora_alpha": args.lora_alpha or args.rank, "lora_dropout": args.lora_dropout}
            options |= {"use_dora": args.use_dora, "init_lora_weights": "gaussian"}
            unet.add_adapter(LoraConfig(target_modules=layers, **options))
        diffusers.training_utils.cast_training_params(unet, dtype=torch.float32)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        with blame("enable_xformers_memory_efficient_attention", "can't be had"):
            unet.enable_xformers_memory_efficient_attention()
    if args.compile:
        if args.activation_memory_budget is not None:
            torch._functorch.config.activation_memory_budget = args.activation_memory_budget
        unet.compile_repeated_blocks(fullgraph=True)
    return unet.train(), noise_scheduler


def load_pipeline(args: argparse.Namespace, weight_dtype: torch.dtype):
    """SDXL's pipeline without its UNet, on the CPU: it encodes images and captions, and generates at validation."""
    name, vae_name = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    options = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir, "dtype": weight_dtype}
    if vae_name is not None:
        with blame("pretrained_vae_model_name_or_path", vae_name):
            options["vae"] = diffusers.AutoencoderKL.from_pretrained(vae_name, cache_dir=args.cache_dir)
    with blame("pretrained_model_name_or_path", name):
        options |= {"unet": None, "add_watermarker": False}
        pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(name, **options)
    pipeline.set_progress_bar_config(disable=True)
    # In fp32, as SDXL's own VAE overflows in fp16; channels last, as convolutions of few channels are faster so.
    pipeline.vae.to(torch.float32, memory_format=torch.channels_last)
    for model in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        model.requires_grad_(False).eval()
    return pipeline


# ---- Data -----------------------------------------------------------------------------------------------------------

# Columns of published data sets: caption, images 0 and 1, labels 0 and 1. Without labels, image 0 is the chosen one;
# with one label, it is the preference for image 0, from 0 to 1.
LAYOUTS = (
    ("caption", "jpg_0", "jpg_1", "label_0", None),  # Pick-a-Pic and those made after it
    ("original_prompt.txt", "jpg_0.jpg", "jpg_1.jpg", "label_0.txt", None),  # Pick-a-Pic as webdataset
    ("prompt", "image1", "image2", "votes_image1", "votes_image2"),  # Rapidata
    ("prompt", "chosen", "rejected", None, None),  # open-image-preferences
    ("caption", "chosen", "rejected", None, None),
    ("prompt", "path1", "path2", None, None),  # HPDv3
)
READERS = {f".{name}": name for name in ("parquet", "arrow", "csv", "json")} | {".jsonl": "json", ".tar": "webdataset"}


def find_columns(args: argparse.Namespace, names: list[str]) -> tuple:
    """Caption, images 0 and 1, labels 0 and 1 (or None): the columns that flags name, else those of a layout."""
    images = (args.chosen_column or args.image_0_column, args.rejected_column or args.image_1_column)
    caption = next((c for c in ("caption", "prompt", "text") if c in names), "caption")
    layouts = [layout for layout in LAYOUTS if {name for name in layout if name} <= set(names)]
    if images[0] is not None:
        layouts = [(caption, *images, args.label_0_column, args.label_1_column)]
    if not layouts:
        fail(
            f"--dataset_name {args.dataset_name}: its columns ({', '.join(names)}) are those of no known data set: "
            "name --caption_column and either --chosen_column, --rejected_column or --image_0_column, "
            "--image_1_column, --label_0_column; a folder of images has w/NAME.png, l/NAME.png, NAME.txt"
        )
    columns = (args.caption_column or layouts[0][0], *layouts[0][1:])
    if columns[1] == columns[2]:
        fail(f"--dataset_name {args.dataset_name}: column {columns[1]} is named as both images")
    if missing := [name for name in columns if name is not None and name not in names]:
        fail(f"--dataset_name {args.dataset_name}: no column {missing[0]} among {', '.join(names)}")
    return columns


class PreferencePairs:
    """The rows of a table, or of a chunk of a stream, whose label decides: their numbers, their captions and whether
    image 0 is the chosen one. Shape: (N,). All rows, and those left out, are counted by reason."""

    def __init__(self, dataset, args: argparse.Namespace, chunk: int | None = None, counts: Counter | None = None):
        caption, *self.sides, label_0, label_1 = find_columns(args, dataset.column_names)
        self.dataset, self.chunk, self.image_root, size = dataset, chunk, args.image_root, len(dataset)
        preference = np.ones(size)  # for image 0: 1, 0, a tie at 0.5, or NaN, unlabelled
        if label_0 is not None:
            preference = read_labels(dataset, label_0)
            if label_1 is not None:  # NaN where one of them is
                preference = (np.sign(preference - read_labels(dataset, label_1)) + 1) / 2
            elif (wrong := preference[(preference < 0) | (preference > 1)]).size:
                fail(f"--label_0_column {label_0}: {wrong[0]:g}; alone it must be from 0 to 1, see --label_1_column")
        if "has_label" in dataset.column_names:
            preference[~(read_labels(dataset, "has_label") > 0)] = math.nan
        tied, unlabelled = preference == 0.5, np.isnan(preference)
        decided = ~unlabelled if args.tie_policy == "random" else ~unlabelled & ~tied
        self.counts = Counter() if counts is None else counts
        self.counts.update({"rows": size, "ties": int(tied.sum()), "without a label": int(unlabelled.sum())})
        heads = np.random.default_rng((args.seed, 3, chunk or 0)).random(size) < 0.5
        self.rows = np.flatnonzero(decided)
        self.chosen_first = np.where(tied, heads, preference > 0.5)[self.rows]
        captions = dataset[caption][:]  # a list: to ask a column of `datasets` for each is slow
        self.captions = [captions[row] for row in self.rows.tolist()]
        for row, text in zip(self.rows, self.captions):
            if not isinstance(text, str):
                fail(f"--dataset_name: row {row}: {caption} is {text!r}; a caption must be text")

    def images(self, i: int, read=None) -> list:
        """Chosen and rejected image of pair i in RGB, or what `read` makes of their files; errors name the row."""
        record, found = self.dataset[int(self.rows[i])], []
        for side in self.sides if self.chosen_first[i] else self.sides[::-1]:
            try:
                found.append((read or decode_image)(read_file(record[side], self.image_root)))
            except Exception as error:  # PIL's decoders raise errors of any kind
                row = f"row {self.rows[i]}" if self.chunk is None else f"the row of caption {self.captions[i][:60]!r}"
                raise ValueError(f"{row}: {side} is no readable image ({str(error).split(' <_io')[0]})") from error
        return found


def read_labels(dataset, column: str) -> np.ndarray:
    """Numbers, bools or their text (as webdataset has them) -> float; None and empty text -> NaN, "unlabelled"."""
    with blame("dataset_name", f"column {column}"):
        return np.array([math.nan if v is None or v == "" else float(v) for v in dataset[column][:]])


def load_dataset(args: argparse.Namespace, split: str) -> tuple:
    """A table or stream of rows from the hub or from a local file or folder, and a fingerprint that changes with the
    rows; None where rows only have paths of images."""
    name, path = args.dataset_name, Path(args.dataset_name)
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs as an error is raised too
    if path.exists():
        datasets.disable_progress_bars()  # those of downloads stay
    source = {"path": name, "name": args.dataset_config_name, "cache_dir": args.cache_dir}
    with blame("dataset_name", name if path.exists() else f"{name}, no file or folder here"):
        if path.is_file():
            if path.suffix not in READERS:
                raise ValueError(f"not one of {', '.join(READERS)}")
            # A file is the split that one word asks for, whatever the word; a+b or train[:5] look for it in "train".
            source |= {"path": READERS[path.suffix], "data_files": {split if split.isidentifier() else "train": name}}
        if (path / "w").is_dir() or (path / "l").is_dir():
            dataset, fingerprint = datasets.Dataset.from_list(list_image_folders(path)), None
        elif (path / "dataset_info.json").is_file():
            dataset = datasets.load_from_disk(path)
            fingerprint = dataset._fingerprint
        else:
            # Its hash has the time of local files, or the commit on the hub; a single file's is in its configuration.
            builder = datasets.load_dataset_builder(**source)
            fingerprint = f"{builder.dataset_name} {builder.config_id} {builder.hash}"
            dataset = datasets.load_dataset(**source, split=split, streaming=args.streaming)
        for column, feature in (dataset.features or {}).items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError("it has no rows")
    columns = find_columns(args, list(first))
    in_rows = [isinstance(v, bytes) or (isinstance(v, dict) and v["bytes"]) for v in (first[c] for c in columns[1:3])]
    return dataset, f"{fingerprint} {split} {columns}" if fingerprint and all(in_rows) else None


def list_image_folders(path: Path) -> list[dict[str, str]]:
    """`w/NAME.*`, `l/NAME.*`, `NAME.txt` -> one row per name. Files that aren't images are passed over."""
    suffixes = Image.registered_extensions()
    files = [sorted(p for p in path.glob(f"{side}/[!.]*") if p.suffix.lower() in suffixes) for side in "wl"]
    chosen, rejected = ({file.stem: str(file) for file in side} for side in files)
    for name in sorted(chosen.keys() ^ rejected.keys()):
        raise ValueError(f"no image {'l' if name in chosen else 'w'}/{name} to go with the other one")
    captions = {name: (path / f"{name}.txt").read_text(encoding="utf-8-sig").strip() for name in sorted(chosen)}
    return [{"caption": captions[name], "chosen": chosen[name], "rejected": rejected[name]} for name in captions]


class Source(NamedTuple):
    """Where pairs come from, in the order of the first epoch: each is the i-th of a table, or of a stream's chunk."""

    pairs: Iterator[tuple[PreferencePairs, int]]
    length: int | None  # None of a stream
    counts: Counter  # rows, and those left out, by reason; of a stream, as far as it was read
    fingerprint: str | None  # of the pairs and their order; None where only the images themselves can tell


def open_source(args: argparse.Namespace, split: str, limit: int | None = None) -> Source:
    """Ends the run with one line where no row of a table can be used."""
    dataset, fingerprint = load_dataset(args, split)
    fingerprint = fingerprint and f"{fingerprint} {(args.seed, args.tie_policy, limit, args.skip_unreadable)}"
    if isinstance(dataset, datasets.Dataset):
        table = PreferencePairs(dataset, args)
        if not table.captions:
            fail(f"--dataset_name {args.dataset_name}: no row has a label that decides ({dict(table.counts)})")
        length = len(table.captions[:limit])
        order = np.random.default_rng((args.seed, 0)).permutation(length).tolist()
        return Source(((table, i) for i in order), length, table.counts, fingerprint)
    rows, counts = iter(dataset.shuffle(seed=args.seed, buffer_size=1000)), Counter()
    chunks = enumerate(iter(lambda: list(itertools.islice(rows, 64)), []))
    tables = (PreferencePairs(datasets.Dataset.from_list(chunk), args, i, counts) for i, chunk in chunks)
    pairs = ((table, i) for table in tables for i in range(len(table.captions)))
    return Source(itertools.islice(pairs, limit), None, counts, fingerprint)


def read_file(value: bytes | str | dict, image_root: str | None = None) -> bytes:
    """The file of an image: bytes, `datasets`' {"bytes", "path"}, or a path, which may not leave `image_root`."""
    if isinstance(value, dict):
        value = value["bytes"] if value["bytes"] is not None else value["path"]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is neither an image nor a path")
    path = Path(image_root or ".", value)
    if image_root is not None and not path.resolve().is_relative_to(Path(image_root).resolve()):
        raise ValueError(f"{value} leaves --image_root")
    return path.read_bytes()


def decode_image(file: bytes | str | Path | Image.Image) -> Image.Image:  # twin
    """RGB, upright, transparency on white."""
    if isinstance(file, bytes):
        file = io.BytesIO(file)
    image = ImageOps.exif_transpose(file if isinstance(file, Image.Image) else Image.open(file))
    if image.mode in ("I", "F"):  # PIL would clip at 255, and what is white in them isn't known
        raise ValueError("32 bits a channel; save it with 8 or 16")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def prepare_image(image: Image.Image, resolution: int, crop=(0.5, 0.5), flip: bool = False) -> tuple:
    """Resizes the shorter side to `resolution`, crops at fractions of the room there is (0.5: the centre), mirrors.
    Returns the pixels, uint8, Shape: (3, R, R), and SDXL's micro-conditioning: original size, crop, target size."""
    width, height = image.size
    scale = resolution / min(width, height)
    new_width, new_height = max(resolution, round(width * scale)), max(resolution, round(height * scale))
    top, left = int((new_height - resolution) * crop[0]), int((new_width - resolution) * crop[1])
    x, y = width / new_width, height / new_height  # only the crop is resized: a thin image would take all memory
    box = (left * x, top * y, min(width, (left + resolution) * x), min(height, (top + resolution) * y))
    cropped = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box)
    if flip:
        cropped = ImageOps.mirror(cropped)
        left = new_width - resolution - left  # where the crop begins in the mirrored image
    pixels = torch.from_numpy(np.asarray(cropped).copy()).permute(2, 0, 1)
    return pixels, [height, width, top, left, resolution, resolution]


# ---- Encoding -------------------------------------------------------------------------------------------------------
def hash_of(*parts) -> str:  # twin
    """Hash of modules (by their weights), bytes, and whatever has a `repr`."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            for tensor in part.state_dict().values():
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            digest.update(part if isinstance(part, bytes) else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:24]


def save_aside(path: Path, save) -> None:  # twin
    """`save(path)` under another name first: a kill leaves no half file, and two runs may save the same at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"tmp-{uuid.uuid4().hex}-{path.name}")
    save(aside)
    os.replace(aside, path)


def entry_path(folder: Path, key: str) -> Path:
    """Each image and each caption has a file of its own in the cache."""
    return folder / key[:2] / f"{key}.safetensors"


@torch.no_grad()
def encode_pixels(pixels: torch.Tensor, vae) -> torch.Tensor:  # twin
    """(B, 3, R, R) in 0..255 -> latents as the UNet takes them, (B, C, h, w), fp32: the mode, not a sample."""
    latents = []
    # One image of SDXL's size takes 2.7 GB: more at a time only where they are small.
    for part in pixels.split(max(1, 2**19 // pixels.shape[2] ** 2)):
        posterior = vae.encode(part.to(vae.device, vae.dtype) / 127.5 - 1).latent_dist
        latents.append((posterior.mode().float() - (vae.config.shift_factor or 0)) * vae.config.scaling_factor)
    latents = torch.cat(latents)
    if not latents.isfinite().all():
        fail("the VAE returns values that aren't finite; try --pretrained_vae_model_name_or_path")
    return latents


class Pair(NamedTuple):
    """A pair in the cache."""

    image_w: str  # keys of its images: hashes of their files
    image_l: str
    caption: str


def encode_pairs(source: Source, count: int, vae, folder: Path, args, accelerator: Accelerator) -> list[Pair]:
    """The first `count` pairs of the source, without those whose images can't be read. Each image is encoded once, by
    one process: `latents`, Shape: (F, C, h, w), fp16, and `time_ids`, (F, 6), fp32; F is 2 with a mirrored view."""
    count, is_main = min(count, source.length or count), accelerator.is_main_process
    index = None
    if source.fingerprint is not None:  # what a run like this one found; one process looks, as it may come just now
        index = folder / f"index-{hash_of(source.fingerprint, count)}.json"
        (known,) = broadcast_object_list([json.loads(index.read_text()) if is_main and index.exists() else None])
        if known is not None:
            return [Pair(*pair) for pair in known]
    flips = (False, True) if args.random_flip else (False,)

    def prepare(file: bytes) -> tuple:
        """Key of an image and, where the cache doesn't have it, what is to be encoded."""
        key = hash_of(file)
        if entry_path(folder, key).exists():
            return key, []
        random = np.random.default_rng((args.seed, 1, int(key, 16))).random(2)
        image, crop = decode_image(file), random if args.random_crop else (0.5, 0.5)
        return key, [prepare_image(image, args.resolution, crop, flip) for flip in flips]

    candidates, pool = enumerate(itertools.islice(source.pairs, count)), ThreadPoolExecutor()
    mine = itertools.islice(candidates, accelerator.process_index, None, accelerator.num_processes)
    found, total = [], -(-count // accelerator.num_processes)
    for _ in tqdm(range(0, total, 32), desc="Images", unit="x 32", disable=not is_main):
        chunk = list(itertools.islice(mine, 32))
        futures = [pool.submit(table.images, i, prepare) for _, (table, i) in chunk]  # threads work ahead
        for (place, (table, i)), future in zip(chunk, futures):
            try:
                images = future.result()
            except ValueError as error:
                if not args.skip_unreadable:
                    fail(f"--dataset_name {args.dataset_name}: {error}; mend it, or see --skip_unreadable")
                images = []
            for key, views in images:  # an image alone: rounding depends on what else is in a batch
                if views:
                    latents = encode_pixels(torch.stack([pixels for pixels, _ in views]), vae)
                    time_ids = torch.tensor([ids for _, ids in views], dtype=torch.float32)
                    entry = {"latents": latents.half().cpu().contiguous(), "time_ids": time_ids}
                    save_aside(entry_path(folder, key), partial(save_file, entry))
            found.append((place, [*(key for key, _ in images), table.captions[i]]))
    found = [pair for _, pair in sorted(gather_object(found))]
    pairs = [Pair(*pair) for pair in found if len(pair) == 3]  # else unreadable
    source.counts["unreadable"] = len(found) - len(pairs)
    source.counts["with an empty caption"] = sum(not pair.caption.strip() for pair in pairs)
    counts = ", ".join(f"{number} {what}" for what, number in source.counts.items())
    if not pairs:
        fail(f"--dataset_name {args.dataset_name}: no row can be used ({counts})")
    logger.info(f"{len(pairs)} pairs are used; the data set has {counts}.")
    if index is not None and is_main:
        save_aside(index, lambda path: path.write_text(json.dumps(pairs)))
    return pairs


@torch.no_grad()
def encode_captions(captions: set[str], pipeline, args, accelerator: Accelerator) -> Path:
    """The folder of a cache with `prompt_embeds`, Shape: (L, D), and `pooled_prompt_embeds`, (P,), fp16, of each
    caption; zeros for an empty one where the pipeline has them at inference."""
    words = [sorted(tokenizer.get_vocab().items()) for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)]
    zeros, device = pipeline.config.force_zeros_for_empty_prompt, accelerator.device
    name = f"captions-{hash_of(pipeline.text_encoder, pipeline.text_encoder_2, words, zeros)}"
    folder = cached_assets_path("mapo", name, assets_dir=args.cache_dir)
    chunks = [sorted(captions)[first : first + 64] for first in range(0, len(captions), 64)]
    mine = chunks[accelerator.process_index :: accelerator.num_processes]  # whole: rounding depends on their size
    mine = [chunk for chunk in mine if not all(entry_path(folder, hash_of(caption)).exists() for caption in chunk)]
    for chunk in tqdm(mine, desc="Captions", disable=not (mine and accelerator.is_main_process)):
        embeds, _, pooled, _ = pipeline.encode_prompt(chunk, device=device, do_classifier_free_guidance=False)
        for caption, *embedded in zip(chunk, embeds, pooled):
            scale = 0 if zeros and caption == "" else 1
            embedded = [(scale * value.float()).half().cpu() for value in embedded]
            entry = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), embedded))
            save_aside(entry_path(folder, hash_of(caption)), partial(save_file, entry))
    accelerator.wait_for_everyone()
    return folder


@dataclass
class EncodedPairs(torch.utils.data.Dataset):
    """What a training step takes, by position in the run: after the first epoch, pairs are shuffled anew, by seed."""

    pairs: list[Pair]
    images: Path  # folders of the caches
    captions: Path
    seed: int
    flip: float  # fractions of the pairs that are mirrored, and whose caption is left out
    drop: float
    epoch: int = 0
    order: np.ndarray | None = None  # in later epochs

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        epoch, i = divmod(position, len(self.pairs))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.pairs))
        pair = self.pairs[i if epoch == 0 else self.order[i]]
        flip, drop = np.random.default_rng((self.seed, 2, position)).random(2) < (self.flip, self.drop)
        row = load_file(entry_path(self.captions, hash_of("" if drop else pair.caption)))
        winner, loser = (load_file(entry_path(self.images, key)) for key in (pair.image_w, pair.image_l))
        row["latents"] = torch.stack([winner["latents"][int(flip)], loser["latents"][int(flip)]])
        row["time_ids"] = winner["time_ids"][int(flip)]  # part of c, which the pair shares
        return {name: value.float() for name, value in row.items()} | {"position": torch.tensor(position)}


class Data(NamedTuple):
    """All that training and validation read."""

    train: EncodedPairs
    held_out: EncodedPairs | None
    prompts: list[str]
    prompt_embeddings: dict[str, torch.Tensor]  # of the prompts, and behind them of the empty one
    pipeline: object  # generates their images, without UNet and text encoders
    images_before: list[Image.Image]  # those of the base model, once they are shown


def encode_data(source: Source, held_out: Source | None, pipeline, args, accelerator: Accelerator) -> Data:
    """Encodes what the run will take. VAE and text encoders aren't on the device together, nor while training."""
    vae = pipeline.vae.to(accelerator.device)
    settings = (vae.config.scaling_factor, vae.config.shift_factor), args.resolution
    settings += (args.seed if args.random_crop else "centre", args.random_flip)
    images = cached_assets_path("mapo", f"images-{hash_of(vae, *settings)}", assets_dir=args.cache_dir)
    count, n = args.max_train_steps * pairs_per_step(args, accelerator), args.num_validation_pairs
    if held_out is None:
        pairs = encode_pairs(source, count + n, vae, images, args, accelerator)
        held_out_pairs, pairs = pairs[:n], pairs[n:]
    else:
        held_out_pairs = encode_pairs(held_out, n, vae, images, args, accelerator)
        pairs = encode_pairs(source, count, vae, images, args, accelerator)
    if not pairs:
        fail(f"--num_validation_pairs {n}: leaves no pair to train on")
    vae.to("cpu")

    prompts = args.validation_prompts
    if prompts is None:
        captions = sorted({pair.caption for pair in held_out_pairs or pairs} - {""}) or [""]
        prompts = np.random.default_rng(args.seed).permutation(captions)[:8].tolist()
    prompts = [prompt for prompt in prompts for _ in range(args.num_validation_images)]
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        encoder.to(accelerator.device)
    needed = {*prompts, "", *(pair.caption for pair in [*held_out_pairs, *pairs])}
    captions = encode_captions(needed, pipeline, args, accelerator)
    pipeline.text_encoder = pipeline.text_encoder_2 = None
    rows = [load_file(entry_path(captions, hash_of(prompt))) for prompt in [*prompts, ""]]
    embeddings = {name: torch.stack([row[name].float() for row in rows]) for name in rows[0]}
    train = EncodedPairs(pairs, images, captions, args.seed, 0.5 * args.random_flip, args.proportion_empty_prompts)
    measured = EncodedPairs(held_out_pairs, images, captions, args.seed, 0, 0) if held_out_pairs else None
    return Data(train, measured, prompts, embeddings, pipeline, images_before=[])


def pairs_per_step(args: argparse.Namespace, accelerator: Accelerator) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def make_batches(dataset, first_step: int, args: argparse.Namespace, accelerator: Accelerator):
    """This process's batches from update `first_step` on. How an update is split doesn't change its positions."""
    size, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    micro_steps = range(first_step * accumulation, args.max_train_steps * accumulation)
    firsts = ((step * accelerator.num_processes + accelerator.process_index) * size for step in micro_steps)
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=(range(first, first + size) for first in firsts),
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # else it takes from the random numbers of --lora_dropout
    )


# ---- Training -------------------------------------------------------------------------------------------------------
def sample_noise(  # twin
    positions: torch.Tensor, shape: torch.Size, num_timesteps: int, offset: float, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, Shape: (B, *shape), and timesteps, (B,), each pair's from the seed and its position alone."""
    noise, timesteps = [], []
    generator = torch.Generator(device)
    for position in positions.tolist():
        generator.manual_seed((seed * 0x9E3779B97F4A7C15 + position) % 2**63)
        noise.append(torch.randn(shape, generator=generator, device=device))
        timesteps.append(torch.randint(num_timesteps, (), generator=generator, device=device))
        if offset > 0:
            noise[-1] += offset * torch.randn((shape[0], 1, 1), generator=generator, device=device)
    return torch.stack(noise), torch.stack(timesteps)


def training_step(unet, batch: dict, noise_scheduler, args: argparse.Namespace, device: torch.device) -> tuple:
    """Loss of a batch of B pairs, and its metrics, Shape: (B,), which stay on the device."""
    num_timesteps, shape = noise_scheduler.config.num_train_timesteps, batch["latents"].shape[2:]
    latents = batch["latents"].to(device, non_blocking=True)  # (B, 2, C, h, w)
    noise, timesteps = sample_noise(batch["position"], shape, num_timesteps, args.noise_offset, args.seed, device)

    # Winners, then losers. The two of a pair share noise, timestep and conditioning: only the image differs.
    latents = latents.transpose(0, 1).flatten(0, 1)  # (2B, C, h, w)
    noise, timesteps = noise.repeat(2, 1, 1, 1), timesteps.repeat(2)
    prompt_embeds = batch["prompt_embeds"].to(device, non_blocking=True).repeat(2, 1, 1)
    added_cond_kwargs = {
        "text_embeds": batch["pooled_prompt_embeds"].to(device, non_blocking=True).repeat(2, 1),
        "time_ids": batch["time_ids"].to(device, non_blocking=True).repeat(2, 1),
    }
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    model_pred = unet(noisy_latents, timesteps, prompt_embeds, added_cond_kwargs=added_cond_kwargs).sample
    epsilon = noise_scheduler.config.prediction_type == "epsilon"
    target = noise if epsilon else noise_scheduler.get_velocity(latents, noise, timesteps)
    result = mapo_loss(model_pred, target, args.beta_mapo, args.snr_value, num_timesteps, args.safeguard)
    return result.loss, {name: value.detach().float() for name, value in result._asdict().items()}


def make_optimizer(parameters: list, learning_rate: float, args: argparse.Namespace) -> torch.optim.Optimizer:
    decay = {"lr": learning_rate, "weight_decay": args.adam_weight_decay}
    options = decay | {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optimizer == "adamw_8bit":
        return importlib.import_module("bitsandbytes").optim.AdamW8bit(parameters, **options)
    if args.optimizer == "adamw_bf16":
        return importlib.import_module("optimi").AdamW(parameters, **options, kahan_sum=True)
    if args.optimizer == "prodigy":
        options |= {"safeguard_warmup": True, "use_bias_correction": True}
        return importlib.import_module("prodigyopt").Prodigy(parameters, **options)
    if args.optimizer == "adafactor":
        return transformers.Adafactor(parameters, **decay, scale_parameter=False, relative_step=False)
    return torch.optim.AdamW(parameters, **options, fused=True)


class Training(NamedTuple):
    """What an update changes."""

    unet: torch.nn.Module  # as accelerate has prepared it
    model: torch.nn.Module  # as it was loaded
    parameters: list[torch.nn.Parameter]  # those that are trained
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: object | None  # diffusers' EMAModel, with --use_ema


def prepare_training(model, checkpoint: Path | None, args: argparse.Namespace, accelerator: Accelerator) -> Training:
    """As the checkpoint has it, where there is one."""
    learning_rate = args.learning_rate * (pairs_per_step(args, accelerator) if args.scale_lr else 1)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], learning_rate, args)
    schedule = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    schedule |= {"num_cycles": args.lr_num_cycles, "power": args.lr_power}
    lr_scheduler = diffusers.optimization.get_scheduler(args.lr_scheduler, optimizer, **schedule)
    kind, half = accelerator.distributed_type, HALF_DTYPES.get(accelerator.mixed_precision)
    if kind in SHARDED and half is not None:  # the weights stay in fp32: autocast, as without sharding
        model.forward = torch.autocast(accelerator.device.type, half, cache_enabled=False)(model.forward)
    if kind == "DEEPSPEED":
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config |= {"train_micro_batch_size_per_gpu": args.train_batch_size, "gradient_clipping": args.max_grad_norm}
        config["bf16"]["enabled"] = config["fp16"]["enabled"] = False
    elif kind == "FSDP" and half is not None:
        options = {"reduce_dtype": torch.float32, "cast_forward_inputs": False}  # else time_ids would be cast
        policy = torch.distributed.fsdp.MixedPrecisionPolicy(half, **options)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    unet, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)  # not prepared: accelerate would step it once per process
    parameters, ema = [p for p in model.parameters() if p.requires_grad], None  # FSDP2 has replaced them
    if args.use_lora and kind not in SHARDED:  # checkpoints hold the LoRA, not the whole UNet
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
        accelerator.register_for_checkpointing(torch.nn.ParameterList(parameters))
    if args.use_ema:
        ema = diffusers.EMAModel(parameters, decay=args.ema_decay, use_ema_warmup=True, power=0.75)
        ema.to("cpu" if args.offload_ema else accelerator.device)
        accelerator.register_for_checkpointing(ema)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        accelerator.step = 0  # of micro-batches: a checkpoint is of a step's end, and accumulation may have changed
        logger.info(f"Resumed from {checkpoint}.")
    return Training(unet, model, parameters, optimizer, lr_scheduler, ema)


# ---- Checkpoints ----------------------------------------------------------------------------------------------------
def list_checkpoints(output_dir: Path) -> list[Path]:  # twin
    """Oldest first. `state.json` is written last and deleted first: a folder with it is whole."""
    found = output_dir.glob("checkpoint-*/state.json")
    return [file.parent for file in sorted(found, key=lambda file: json.loads(file.read_text())["step"])]


# What may change when a run goes on from a checkpoint. The data may move: whether the pairs are the same is looked at.
FREE_SETTINGS = frozenset(
    "output_dir cache_dir logging_dir dataset_name image_root dataloader_num_workers demo changed max_train_steps "
    "num_train_epochs max_nonfinite_steps train_batch_size gradient_accumulation_steps gradient_checkpointing compile "
    "activation_memory_budget allow_tf32 enable_xformers_memory_efficient_attention output_kohya_format save_dtype "
    "checkpointing_steps checkpoints_total_limit resume_from_checkpoint validation_prompts num_validation_images "
    "validation_steps validation_guidance_scale validation_num_inference_steps skip_final_inference report_to "
    "push_to_hub hub_model_id hub_token skip_unreadable offload_ema".split()
)


def find_checkpoint(args: argparse.Namespace, run: dict) -> tuple[Path | None, dict]:  # twin
    """The folder that `--resume_from_checkpoint` names, and its state; None where training starts from scratch. Ends
    the run with one line where it can't go on as the checkpoint's run would have."""
    if args.resume_from_checkpoint is None:
        return None, {"step": 0, "history": []}
    checkpoint = Path(args.resume_from_checkpoint)
    if args.resume_from_checkpoint == "latest":
        checkpoints = list_checkpoints(Path(args.output_dir))
        if not checkpoints:
            logger.info(f"No checkpoint in {args.output_dir} yet: training starts from scratch.")
            return None, {"step": 0, "history": []}
        checkpoint = checkpoints[-1]
    if not (checkpoint / "state.json").is_file():
        fail(f"--resume_from_checkpoint {checkpoint}: no whole checkpoint; try `latest`")
    state = json.loads((checkpoint / "state.json").read_text())
    for name, value in run.items():
        if (then := state["run"].get(name)) != value:
            fail(f"{name} {value}: {checkpoint.name} was trained with {then}; keep it or change --output_dir")
    return checkpoint, state


def save_checkpoint(step: int, run: dict, history: list[dict], args, accelerator: Accelerator) -> Path:  # twin
    """Weights, optimizer, learning rate schedule, EMA and random states, written aside and then renamed."""
    folder = Path(args.output_dir) / f"checkpoint-{step}"
    aside = folder.with_name(f"tmp-{folder.name}")
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(aside))
    except (RuntimeError, OSError, SafetensorError) as error:  # torch has its own error where a disk is full
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"--output_dir {args.output_dir}: {folder.name} can't be written ({error})") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (aside / "state.json").write_text(json.dumps({"step": step, "run": run, "history": history}))
        (folder / "state.json").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        for old in list_checkpoints(Path(args.output_dir))[: -args.checkpoints_total_limit]:
            (old / "state.json").unlink()  # first: a kill may leave the rest
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


class MetricsLog:
    """metrics.jsonl, trackers and progress bar. `history` has all records, those before a resumption too."""

    def __init__(self, state: dict, args: argparse.Namespace, accelerator: Accelerator) -> None:
        self.args, self.accelerator, self.path = args, accelerator, Path(args.output_dir) / "metrics.jsonl"
        self.history, self.micro_steps, self.skipped_in_a_row = state["history"], [], 0
        if accelerator.is_main_process:
            self.path.write_text("".join(f"{json.dumps(record)}\n" for record in self.history))
        hidden = not accelerator.is_main_process
        self.bar = tqdm(total=args.max_train_steps, initial=state["step"], desc="Training", disable=hidden)
        self.shown, self.clock = {}, time.perf_counter()

    def end_step(self, step: int, grad_norm: torch.Tensor, learning_rate: float, stop: bool = False) -> bool:
        """Writes the means over micro-batches and processes; returns whether any process wants to stop."""
        names = list(self.micro_steps[0])
        values = [torch.stack([metrics[name].mean() for metrics in self.micro_steps]).mean() for name in names]
        values += [grad_norm.detach().float(), torch.tensor(float(stop), device=grad_norm.device)]
        *values, norm, stop = self.accelerator.reduce(torch.stack(values), "mean").tolist()
        skipped = not math.isfinite(norm)
        self.skipped_in_a_row, self.micro_steps = self.skipped_in_a_row + 1 if skipped else 0, []
        if skipped:
            logger.info(f"Step {step} is skipped: its loss or gradient isn't finite.")
        record = {"step": step, **dict(zip(names, values)), "grad_norm": norm, "learning_rate": learning_rate}
        pairs, now = pairs_per_step(self.args, self.accelerator), time.perf_counter()
        record |= {"skipped": int(skipped), "pairs_per_second": pairs / (now - self.clock)}
        if self.accelerator.device.type == "cuda":
            record["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.write(record)
        self.bar.update(1)
        return stop > 0

    def write(self, record: dict[str, float]) -> None:
        record = {k: v if math.isfinite(v) else None for k, v in record.items()}  # JSON has no NaN and no infinity
        self.history.append(record)
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(f"{json.dumps(record)}\n")
        numbers = {name: value for name, value in record.items() if value is not None}
        self.accelerator.log({k: v for k, v in numbers.items() if k != "step"}, step=record["step"])
        names = ("loss", "margin", "accuracy", "margin_weight", "pairs_per_second", "val_mse_w", "val_accuracy")
        self.shown |= {name: f"{numbers[name]:.3g}" for name in names if name in numbers}
        self.bar.set_postfix(self.shown)
        self.clock = time.perf_counter()


def plot_curves(history: list[dict], path: Path) -> None:
    """The curves by which a run is judged, with those of the held-out pairs where there are any."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), layout="constrained")
    figure.suptitle("Blue: training. Orange: held-out pairs. Strong: running mean of 5 % of the points.", fontsize=10)
    names = ("loss", "margin", "accuracy", "margin_weight", "mse_w", "mse_l")
    for axis, name in zip(figure.subplots(2, 3).flat, names):
        axis.set(title=name, xlabel="step")
        axis.locator_params("x", integer=True)
        for key, color in ((name, "tab:blue"), (f"val_{name}", "tab:orange")):
            points = [(record["step"], record[key]) for record in history if record.get(key) is not None]
            if points:
                steps, values = np.array(points).T
                window = max(1, len(steps) // 20)
                axis.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
                axis.plot(steps[window - 1 :], np.convolve(values, np.ones(window) / window, "valid"), color=color)
    figure.savefig(path, dpi=100)


# ---- Validation -----------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def averaged(training: Training):
    """The UNet with the EMA's weights, where there is an EMA."""
    if training.ema is not None:
        training.ema.store(training.parameters)
        training.ema.copy_to(training.parameters)
    yield
    if training.ema is not None:
        training.ema.restore(training.parameters)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # not worth compiling for
def measure_held_out(step: int, training: Training, dataset, noise_scheduler, log: MetricsLog, args, accelerator):
    """Logs means over the held-out pairs, whose noise and timesteps are the same each time; warns once where the
    winners' error rises. Every process takes all pairs: all of them together must call a sharded model."""
    measured, order = [], {"sampler": range(len(dataset.pairs)), "generator": torch.Generator()}  # as in make_batches
    training.model.eval()
    with averaged(training):
        for batch in torch.utils.data.DataLoader(dataset, args.train_batch_size, **order):
            batch["position"] += 2**61  # a position of no training pair
            measured.append(training_step(training.model, batch, noise_scheduler, args, accelerator.device)[1])
    training.model.train()
    names = ("mse_w", "mse_l", "margin", "accuracy")
    means = {name: np.mean(torch.cat([metrics[name] for metrics in measured]).tolist()) for name in names}
    log.write({"step": step} | {f"val_{name}": mean for name, mean in means.items()})
    errors = [(r["step"], r["val_mse_w"]) for r in log.history if r.get("val_mse_w") is not None]
    risen = [(at, error) for at, error in errors if error > 1.05 * errors[0][1]]
    if len(risen) == 1 and risen == errors[-1:]:
        logger.warning(
            f"Step {step}: the error on held-out chosen images rose from {errors[0][1]:.4g} to {errors[-1][1]:.4g}: "
            "the winner's likelihood falls, and images may be ruined. Try --safeguard (0.8 or more), another "
            f"--learning_rate or a larger --beta_mapo. Checkpoints up to step {errors[-2][0]} are from before that."
        )


@torch.no_grad()
def generate_images(model, pipeline, embeddings: dict, args, accelerator: Accelerator) -> list[Image.Image]:
    """One image per prompt, prompt i from seed i; spread over processes."""
    device, count = accelerator.device, len(embeddings["prompt_embeds"]) - 1  # the last row is the empty prompt
    pipeline.unet = model.eval()
    pipeline.vae.to(device)
    # As many calls in every process: a sharded model can be called by all of them together only.
    rows, size = -(-count // accelerator.num_processes), args.train_batch_size
    mine = (np.arange(rows) * accelerator.num_processes + accelerator.process_index) % count
    options = {"height": args.resolution, "width": args.resolution, "guidance_scale": args.validation_guidance_scale}
    options |= {"num_inference_steps": args.validation_num_inference_steps, "output_type": "latent"}
    images = []
    for chunk in np.split(mine, range(size, rows, size)):
        positive = {name: value[chunk].to(device) for name, value in embeddings.items()}
        negative = {f"negative_{name}": value[[-1] * len(chunk)].to(device) for name, value in embeddings.items()}
        generator = [torch.Generator("cpu").manual_seed(int(i)) for i in chunk]
        with accelerator.autocast(), torch.compiler.set_stance("force_eager"):  # not worth compiling for
            latents = pipeline(**positive, **negative, **options, generator=generator).images
        latents = latents.float() / pipeline.vae.config.scaling_factor + (pipeline.vae.config.shift_factor or 0)
        decoded = torch.cat([pipeline.vae.decode(latent[None]).sample for latent in latents])
        images += zip(chunk.tolist(), pipeline.image_processor.postprocess(decoded))
    pipeline.unet = None
    pipeline.vae.to("cpu")
    model.train()
    return [image for _, image in sorted(dict(gather_object(images)).items())]


def make_grid(prompts: list[str], before: list[Image.Image], after: list[Image.Image]) -> Image.Image:
    """Each prompt with its two images under it, base on the left, tuned on the right; at most 12 prompts."""
    from matplotlib import font_manager

    side, count = max(128, min(384, before[0].width)), min(12, len(prompts))
    columns, width, height = min(4, count), 2 * side + 24, side + 66
    file = font_manager.findfont("DejaVu Sans")  # PIL's own font has no accents
    font, small = ImageFont.truetype(file, 13), ImageFont.truetype(file, 11)
    grid = Image.new("RGB", (columns * width, -(-count // columns) * height), "white")
    canvas = ImageDraw.Draw(grid)
    for i in range(count):
        x, y = i % columns * width + 8, i // columns * height
        canvas.multiline_text((x, y + 6), "\n".join(textwrap.wrap(prompts[i], side // 4)[:2]), "black", font)
        for left, image, name in ((x, before[i], "before"), (x + side + 4, after[i], "after")):
            grid.paste(image.resize((side, side), Image.Resampling.LANCZOS), (left, y + 42))
            canvas.text((left + 4, y + 42 + side), name, "grey", small)
    return grid


def show_images(step: int, training: Training, data: Data, args, accelerator: Accelerator) -> None:
    """A grid of the prompts' images before training and now, in the output folder and the trackers. The former are
    generated when first shown, without the LoRA or by a UNet loaded anew: no gradients are in memory then."""
    sampling = (data.pipeline, data.prompt_embeddings, args, accelerator)
    with averaged(training):
        after = generate_images(training.model, *sampling)
    if not data.images_before and args.use_lora:
        training.model.disable_adapters()
        data.images_before.extend(generate_images(training.model, *sampling))
        training.model.enable_adapters()
    elif not data.images_before:
        base = load_unet(args, accelerator)[0].to(accelerator.device)
        data.images_before.extend(generate_images(base, *sampling))
    if not accelerator.is_main_process:
        return
    grid = make_grid(data.prompts, data.images_before, after)
    path = Path(args.output_dir) / ("before_after.png" if step == args.max_train_steps else f"validation/{step}.png")
    path.parent.mkdir(exist_ok=True)
    grid.save(path)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"before_after": np.array(grid)[None]}, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"before_after": [grid]}, step)


# ---- Results --------------------------------------------------------------------------------------------------------
def save_weights(training: Training, args: argparse.Namespace, accelerator: Accelerator) -> None:
    """The LoRA, or the whole pipeline, in diffusers' format. Called by every process: a sharded model is gathered."""
    model, output_dir = training.model, Path(args.output_dir)
    state = accelerator.get_state_dict(training.unet)
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}  # of compiled blocks
    if not accelerator.is_main_process:
        return
    if args.use_lora:
        layers = get_peft_model_state_dict(model, state)
        metadata = diffusers.training_utils._collate_lora_metadata({"unet": model})
        write = partial(diffusers.StableDiffusionXLPipeline.save_lora_weights, output_dir, layers, **metadata)
        save_aside(output_dir / "pytorch_lora_weights.safetensors", lambda path: write(weight_name=path.name))
        if args.output_kohya_format:
            kohya = diffusers.utils.convert_state_dict_to_kohya({f"unet.{name}": t for name, t in layers.items()})
            alpha = float(args.lora_alpha or args.rank)  # diffusers writes the rank
            kohya = {name: torch.tensor(alpha) if name.endswith(".alpha") else t for name, t in kohya.items()}
            save_aside(output_dir / "pytorch_lora_weights_kohya.safetensors", partial(save_file, kohya))
        return
    with torch.device("meta"):  # its own weights would be random numbers
        whole = diffusers.UNet2DConditionModel.from_config(model.config)
    whole.load_state_dict(state, assign=True)
    pipeline = load_pipeline(args, torch.float32)
    pipeline.register_modules(unet=whole)
    if args.save_dtype is not None:  # else as trained: an update at a rate of 1e-7 is lost in fewer bits than fp32's
        pipeline.to(dtype={"fp32": torch.float32, **HALF_DTYPES}[args.save_dtype])
    aside = output_dir / "tmp-pipeline"
    pipeline.save_pretrained(aside)
    for part in sorted(aside.iterdir()):
        shutil.rmtree(output_dir / part.name, ignore_errors=True)
        os.replace(part, output_dir / part.name)
    aside.rmdir()


def save_model_card(prompts: list[str], args: argparse.Namespace) -> None:
    """README.md: what the run has made and how to load it; in the demo a report too, which is printed as well."""
    base, tuned, report = args.pretrained_model_name_or_path, args.hub_model_id or args.output_dir, ""
    if args.demo and not args.skip_final_inference:
        from demo.report import preference_report

        report = preference_report(args.output_dir, base if args.use_lora else None)
        print(report)
    grid = None if args.skip_final_inference else "before_after.png"
    data = ModelCardData(
        base_model=None if Path(base).exists() else base,  # the hub refuses a local path
        datasets=None if Path(args.dataset_name).exists() else [args.dataset_name],
        library_name="diffusers",
        license="openrail++" if base.startswith("stabilityai/stable-diffusion-xl") else None,
        pipeline_tag="text-to-image",
        tags=["stable-diffusion-xl", "text-to-image", "mapo", "preference-tuning"] + ["lora"] * args.use_lora,
        widget=[{"text": prompts[0], "output": {"url": grid}}] if grid else None,
    )
    hidden = ("hub_token", "cache_dir", "output_dir", "resume_from_checkpoint")
    settings = {"beta_mapo": args.beta_mapo} | {n: getattr(args, n) for n in args.changed if n not in hidden}
    load_lora = f"pipeline.load_lora_weights({tuned!r})\n" if args.use_lora else ""
    fence = "`" * 12  # longer than any that a prompt may have
    card = f"""---
{data.to_yaml()}
---
# {Path(tuned).name}
SDXL's UNet, tuned on preference pairs with [MaPO](https://huggingface.co/papers/2406.06424).

{f"![{grid}]({grid})" if grid else ""} ![curves.png](curves.png)

{fence}python
import torch
from diffusers import StableDiffusionXLPipeline

name = {base if args.use_lora else tuned!r}
pipeline = StableDiffusionXLPipeline.from_pretrained(name, dtype=torch.float16).to("cuda")
{load_lora}image = pipeline({prompts[0]!r}, height={args.resolution}, width={args.resolution}).images[0]
{fence}

{fence}
{report}
What differs from the script's defaults: {json.dumps(settings, indent=2)}
{fence}
"""
    (Path(args.output_dir) / "README.md").write_text(card, encoding="utf-8")


# ---- Main -----------------------------------------------------------------------------------------------------------
def prepare_run(args: argparse.Namespace) -> Accelerator:
    """The accelerator, writable folders, and a quiet console: from libraries only errors, and bars of downloads."""
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=os.path.join(args.output_dir, args.logging_dir),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),  # one process may encode for longer than another
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # else a second copy of the gradients
            AutocastKwargs(cache_enabled=False),  # else half copies of all weights stay through a forward pass
        ],
    )
    diffusers.utils.check_min_version("0.42.0")
    console = logging.StreamHandler()  # above a progress bar, without accelerate's "[RANK 0] "
    console.emit = lambda record: tqdm.write(console.format(record).removeprefix("[RANK 0] "), file=sys.stderr)
    logging.basicConfig(format="%(message)s", level=logging.ERROR, handlers=[console])
    logger.setLevel(logging.INFO)
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity(logging.CRITICAL)  # what they log as an error is raised too
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # which transformers switches off: downloads are to be seen

    if (launched := int(os.environ.get("WORLD_SIZE", 1))) != accelerator.num_processes:  # each would train alone
        fail(f"{launched} processes were launched but don't find one another; on CPUs set ACCELERATE_USE_CPU=true")
    if accelerator.distributed_type == "FSDP" and args.use_ema:
        fail("--use_ema: not with FSDP; see configs/zero2.yaml")
    if accelerator.device.type == "cpu":
        if accelerator.mixed_precision == "fp16":
            fail("--mixed_precision fp16: needs a GPU; take bf16 or no")
        torch.set_flush_denormal(True)  # a pair that is won has subnormal gradients: ten times slower on a CPU
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // accelerator.num_processes))  # accelerate's launcher leaves it one
    if args.allow_tf32:
        torch.set_float32_matmul_precision("high")
    set_seed(args.seed)
    for name in ("output_dir", "cache_dir"):
        folder = getattr(args, name)
        if folder is not None and accelerator.is_main_process:
            with blame(name, folder):
                Path(folder).mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
    accelerator.wait_for_everyone()
    return accelerator


def watch_signals() -> list[str]:  # twin
    """Names of the signals SIGTERM and SIGINT that came since; a second one ends the process as ever."""
    came = []

    def note(number, frame) -> None:
        came.append(signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return came


def train(first_step, training, data, noise_scheduler, run, log, args, accelerator) -> bool:
    """All steps from `first_step` on; False where a signal came before the last."""
    unet, ema = training.unet, training.ema
    measuring = (training, data.held_out, noise_scheduler, log, args, accelerator)
    signals, step, pairs_in_step = watch_signals(), first_step, pairs_per_step(args, accelerator)
    patience = args.max_nonfinite_steps + (20 if accelerator.scaler else 0)  # fp16 finds its scale by such steps
    if data.held_out and not log.history:
        measure_held_out(step, *measuring)
    for batch in make_batches(data.train, first_step, args, accelerator):
        with accelerator.accumulate(unet):
            loss, metrics = training_step(unet, batch, noise_scheduler, args, accelerator.device)
            accelerator.backward(loss)
            log.micro_steps.append(metrics)
            skip = False
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
                norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2's is sharded
                grad_norm = torch.as_tensor(norm, device=accelerator.device)  # DeepSpeed's is a number
                skip = not bool(grad_norm.isfinite())
            if not skip or accelerator.scaler is not None:  # fp16's scaler skips such a step and lowers its scale
                training.optimizer.step()
            training.optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        training.lr_scheduler.step()
        if ema is not None and not skip:
            ema.to(accelerator.device)
            ema.step(training.parameters)
            ema.to("cpu" if args.offload_ema else accelerator.device)
        stop = log.end_step(step, grad_norm, training.lr_scheduler.get_last_lr()[0], bool(signals))
        validate = step % args.validation_steps == 0 or step == args.max_train_steps
        if data.held_out and validate:
            measure_held_out(step, *measuring)
        if skip and accelerator.distributed_type == "DEEPSPEED":  # it updates before its norm is known
            fail(f"step {step} isn't finite, and DeepSpeed has applied it; resume with a lower --learning_rate")
        diverged = log.skipped_in_a_row >= patience
        if step % args.checkpointing_steps == 0 or stop or diverged:
            settings = run | {"pairs": hash_of(data.train.pairs[: step * pairs_in_step])}
            saved = save_checkpoint(step, settings, log.history, args, accelerator)
        if diverged:
            what = f"{log.skipped_in_a_row} steps in a row had a loss or gradient that isn't finite"
            fail(f"{what}; {saved} has the weights as they were. Try a lower --learning_rate, or bf16 instead of fp16")
        if stop:
            logger.info(f"{' '.join(signals)}: {saved} is written; go on with --resume_from_checkpoint latest")
            return False
        if args.validation_prompts and validate and step < args.max_train_steps:
            show_images(step, training, data, args, accelerator)
    return True


@contextlib.contextmanager
def known_errors_end_in_one_line():  # twin
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on with what is encoded, with a checkpoint: --resume_from_checkpoint")
    except (OSError, SafetensorError) as error:
        cause = str(error).strip().splitlines()[0]
        fail(f"{cause}; if --output_dir or --cache_dir is full, make room and add --resume_from_checkpoint latest")


@known_errors_end_in_one_line()
def main(args: argparse.Namespace) -> None:
    if args.demo and os.environ.get("RANK", "0") == "0":
        from demo.settings import PAIRS_NOTE

        print(PAIRS_NOTE)
    started = time.perf_counter()
    accelerator = prepare_run(args)
    if args.push_to_hub and accelerator.is_main_process:  # so that a wrong name or token shows now
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        with blame("push_to_hub", name):
            args.hub_model_id = create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    kind, pairs_in_step = accelerator.distributed_type, pairs_per_step(args, accelerator)
    kind = f"{kind.value} with {accelerator.num_processes}" if kind in SHARDED else "replicas"
    run = {f"--{name}": value for name, value in sorted(vars(args).items()) if name not in FREE_SETTINGS}
    run |= {"pairs in a step": pairs_in_step, "a run of": kind}
    checkpoint, state = find_checkpoint(args, run)
    first_step = state["step"]

    source = open_source(args, args.dataset_split_name, args.max_train_samples)
    split = args.validation_split_name if args.num_validation_pairs else None
    held_out = open_source(args, split) if split else None
    if args.max_train_steps is None:
        if source.length is None:
            fail("--num_train_epochs: a stream's length isn't known; name --max_train_steps")
        pairs_in_epoch = source.length - (0 if held_out else args.num_validation_pairs)
        args.max_train_steps = max(1, math.ceil(args.num_train_epochs * pairs_in_epoch / pairs_in_step))
    if first_step > args.max_train_steps:
        fail(f"--max_train_steps {args.max_train_steps}: {checkpoint.name} is beyond it; name more steps")

    unet, noise_scheduler = load_unet(args, accelerator)
    pipeline = load_pipeline(args, HALF_DTYPES.get(accelerator.mixed_precision, torch.float32))
    data = encode_data(source, held_out, pipeline, args, accelerator)
    if checkpoint and state["run"]["pairs"] != hash_of(data.train.pairs[: first_step * pairs_in_step]):
        fail(f"--dataset_name {args.dataset_name}: its pairs aren't those that {checkpoint.name} was trained with")
    training = prepare_training(unet.to(accelerator.device), checkpoint, args, accelerator)
    accelerator.init_trackers("mapo", config={k: str(v) for k, v in vars(args).items() if k != "hub_token"})

    logger.info(f"First step after {time.perf_counter() - started:.1f} s.")
    log = MetricsLog(state, args, accelerator)
    with log.bar:
        finished = train(first_step, training, data, noise_scheduler, run, log, args, accelerator)
    if finished:
        with averaged(training):
            save_weights(training, args, accelerator)
        if not args.skip_final_inference:
            show_images(args.max_train_steps, training, data, args, accelerator)
        if accelerator.is_main_process:
            plot_curves(log.history, Path(args.output_dir) / "curves.png")
            save_model_card(data.prompts, args)
            if args.push_to_hub:
                left_out = ["checkpoint-*", f"{args.logging_dir}/*", "tmp-*"]
                options = {"folder_path": args.output_dir, "token": args.hub_token, "ignore_patterns": left_out}
                upload_folder(repo_id=args.hub_model_id, **options)
            print(f"Done in {time.perf_counter() - started:.0f} s: {args.output_dir}")
    del training  # DDP before its process group: freed after it, it can wait for gloo's threads forever
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())

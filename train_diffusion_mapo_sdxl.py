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
import contextlib
import errno
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
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from PIL import Image, ImageOps
from safetensors import SafetensorError
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
    "learning_rate": 3e-6,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 10,
    "max_train_steps": 110,  # the tiny model knows its pictures by heart: many more, and it forgets how to draw
    "validation_guidance_scale": 2.0,
}
# What --optimizer offers, and the package that it needs beside torch and transformers. adamw_bf16 has weights and
# states in bf16, and Kahan summation for updates too small for a bf16 weight (why: benchmarks/bf16_optimizers.py).
OPTIMIZER_PACKAGES = {
    "adamw": None,
    "adamw_8bit": "bitsandbytes",
    "adamw_bf16": "optimi",
    "adafactor": None,
    "prodigy": "prodigyopt",
}
PIP_NAMES = {"optimi": "torch-optimi"}
# What --mixed_precision computes in; without it, fp32.
HALF_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# What a run may change when it goes on from a checkpoint. The data may move; that their pairs are the same is for
# check_pairs to see.
FREE_SETTINGS = frozenset(
    "output_dir cache_dir dataset_name image_root dataloader_num_workers demo max_train_steps max_nonfinite_steps "
    "train_batch_size gradient_accumulation_steps gradient_checkpointing compile activation_memory_budget allow_tf32 "
    "enable_xformers_memory_efficient_attention output_kohya_format checkpointing_steps checkpoints_total_limit "
    "resume_from_checkpoint validation_prompts validation_steps validation_guidance_scale validation_inference_steps "
    "logging_steps report_to push_to_hub hub_model_id use_8bit_adam skip_unreadable pairs".split()
)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """Help that says the defaults; errors in one line, without the usage before it."""

    def add_argument(self, *names: str, help: str = "", **options):
        default = options.get("default")
        shown = default not in (None, False, argparse.SUPPRESS)
        return super().add_argument(*names, help=f"{help} Default: {default}." if shown else help, **options)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    # Model
    parser.add_argument("--pretrained_model_name_or_path", help="SDXL on the hub or in a folder of diffusers' format.")
    parser.add_argument("--pretrained_vae_model_name_or_path", help="Another VAE, on the hub or in a folder.")
    parser.add_argument("--revision", help="Revision of the model on the hub.")
    parser.add_argument("--variant", help="Variant of the model's files, such as fp16.")

    # Data
    parser.add_argument("--dataset_name", help="Pairs on the hub, or a local folder or file that `datasets` reads.")
    parser.add_argument("--dataset_config_name", help="Configuration of the data set.")
    parser.add_argument("--dataset_split_name", default="train", help="Split of the data set, or several: a+b.")
    parser.add_argument("--streaming", action="store_true", help="Read while training; encode in every step.")
    parser.add_argument("--image_root", help="Folder that relative paths of pictures in the data set start from.")
    columns = {
        "caption": "Caption.",
        "chosen": "Chosen picture, with --rejected_column.",
        "rejected": "Rejected picture.",
        "image_0": "Picture 0, with --image_1_column and --label_0_column.",
        "image_1": "Picture 1.",
        "label_0": "Votes or score of picture 0, or alone: its share of preference, 0 to 1.",
        "label_1": "Votes or score of picture 1.",
    }
    for name, what in columns.items():
        parser.add_argument(f"--{name}_column", help=f"{what} Needed where the columns are of no known data set.")
    parser.add_argument("--tie_policy", choices=["drop", "random"], default="drop", help="random: a winner by lot.")
    parser.add_argument("--skip_unreadable", action="store_true", help="Leave out pictures that can't be read.")
    parser.add_argument("--label_noise_prob", type=float, default=0.0, help="Share of pairs to swap, by seed.")
    parser.add_argument("--max_train_samples", type=int, help="Use the first N pairs only.")
    parser.add_argument("--resolution", type=int, default=1024, help="Side of the training pictures, in pixels.")
    parser.add_argument(
        "--random_crop", action="store_true", help="Instead of the centre; with cached latents one each."
    )
    parser.add_argument("--random_flip", action="store_true", help="Mirror half of the pairs, both pictures or none.")
    parser.add_argument("--proportion_empty_prompts", type=float, default=0.0, help="Share of captions left out.")
    parser.add_argument(
        "--cache_latents", action=argparse.BooleanOptionalAction, help="Default: on, unless streaming."
    )
    parser.add_argument("--cache_dir", help="Where downloads go, and the encoded pictures and captions.")
    parser.add_argument("--dataloader_num_workers", type=int, default=0, help="Processes that read the data.")

    # Method
    parser.add_argument(
        "--beta_mapo",
        type=float,
        default=8.0,
        help="beta of eq. 5-7: 8 for general preference, up to 1024 for a subject.",
    )
    parser.add_argument("--snr_value", type=float, default=0.5, help="s of Appendix A, which scales the losses.")
    parser.add_argument("--noise_offset", type=float, default=0.0, help="Scale of noise that a whole channel shares.")

    # LoRA
    parser.add_argument("--use_lora", action="store_true", help="Train a LoRA instead of all weights.")
    parser.add_argument("--rank", type=int, default=32, help="Rank of the LoRA.")
    parser.add_argument("--lora_alpha", type=float, help="Default: the rank.")
    parser.add_argument("--lora_dropout", type=float, default=0.0, help="Share of the LoRA's inputs.")
    parser.add_argument("--lora_layers", default="to_k,to_q,to_v,to_out.0", help="Names of layers, with commas.")
    parser.add_argument("--use_dora", action="store_true", help="Weight-decomposed LoRA.")
    parser.add_argument("--output_kohya_format", action="store_true", help="A second file for ComfyUI and A1111.")

    # Optimization
    parser.add_argument("--train_batch_size", type=int, default=4, help="Pairs per process and forward pass.")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1, help="Passes before each update.")
    parser.add_argument("--max_train_steps", type=int, default=2000, help="Optimizer steps.")
    parser.add_argument("--learning_rate", type=float, help="Default: 1e-7, of a LoRA 1e-5, for prodigy 1.")
    schedules = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
    parser.add_argument("--lr_scheduler", default="cosine", choices=schedules, help="How the rate changes.")
    parser.add_argument("--lr_warmup_steps", type=int, default=0, help="Steps in which the rate rises from 0.")
    parser.add_argument("--optimizer", choices=list(OPTIMIZER_PACKAGES), default="adamw", help="See the README.")
    parser.add_argument("--use_8bit_adam", action="store_true", help="The same as --optimizer adamw_8bit.")
    parser.add_argument("--adam_beta1", type=float, default=0.9, help="Decay of the mean of gradients.")
    parser.add_argument("--adam_beta2", type=float, default=0.999, help="Decay of the mean of their squares.")
    parser.add_argument("--adam_weight_decay", type=float, default=1e-2, help="Decoupled, times the rate.")
    parser.add_argument("--adam_epsilon", type=float, default=1e-8, help="Added to the denominator.")
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="Longer gradients are cut to this norm.")
    parser.add_argument("--max_nonfinite_steps", type=int, default=10, help="Stop after so many in a row.")
    parser.add_argument("--use_ema", action="store_true", help="Draw with and save a running mean of the weights.")
    parser.add_argument("--ema_decay", type=float, default=0.9999, help="Of --use_ema, at its end.")
    parser.add_argument("--seed", type=int, default=0, help="Of all that is random.")

    # Speed and memory
    parser.add_argument(
        "--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: that of accelerate's config."
    )
    parser.add_argument("--gradient_checkpointing", action="store_true", help="Less memory, a third more compute.")
    parser.add_argument("--compile", action="store_true", help="Compile the blocks of the UNet.")
    parser.add_argument(
        "--activation_memory_budget", type=float, help="With --compile: share of the activations to keep, 0 to 1."
    )
    parser.add_argument("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later.")
    parser.add_argument(
        "--enable_xformers_memory_efficient_attention", action="store_true", help="Instead of torch's."
    )

    # Output
    parser.add_argument("--output_dir", default="diffusion-mapo-sdxl", help="Where results and checkpoints go.")
    parser.add_argument("--checkpointing_steps", type=int, default=500, help="Steps between checkpoints.")
    parser.add_argument("--checkpoints_total_limit", type=int, help="Keep the newest N checkpoints.")
    parser.add_argument("--resume_from_checkpoint", help="A checkpoint's folder, or `latest`.")
    parser.add_argument(
        "--validation_prompts", nargs="+", help="Prompts, or a text file with one a line; default: 8 of the captions."
    )
    parser.add_argument("--validation_steps", type=int, help="Draw them every N steps too, not only before and after.")
    parser.add_argument("--validation_guidance_scale", type=float, default=5.0, help="Guidance of these pictures.")
    parser.add_argument("--validation_inference_steps", type=int, default=25, help="Denoising steps of these.")
    parser.add_argument("--logging_steps", type=int, default=10, help="Steps between writes of the metrics.")
    parser.add_argument(
        "--report_to", choices=["none", "tensorboard", "wandb", "trackio"], default="none", help="Tracker."
    )
    parser.add_argument("--push_to_hub", action="store_true", help="Upload --output_dir at the end.")
    parser.add_argument("--hub_model_id", help="Repository on the hub; default: the name of --output_dir.")
    parser.add_argument("--hub_token", help="Default: that of `hf auth login`.")

    args = parser.parse_args(input_args)
    args.demo = args.pretrained_model_name_or_path is None and args.dataset_name is None
    if args.demo:
        parser.set_defaults(**DEMO_SETTINGS)  # what the user did name still counts
        args = argparse.Namespace(**vars(parser.parse_args(input_args)), demo=True)
    if args.use_8bit_adam:
        args.optimizer = "adamw_8bit"
    if args.optimizer == "adamw_bf16" and args.mixed_precision is None:
        args.mixed_precision = "bf16"
    if args.cache_latents is None:
        args.cache_latents = not args.streaming
    if args.learning_rate is None:
        args.learning_rate = 1.0 if args.optimizer == "prodigy" else 1e-5 if args.use_lora else 1e-7
    check_numbers(parser, args)
    check_bounds(parser, args)
    check_choices(parser, args)
    return args


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the run with one line where a number is out of its range."""
    least = {
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_train_steps": 1,
        "max_train_samples": 1,
        "max_nonfinite_steps": 1,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 1,
        "validation_steps": 1,
        "validation_inference_steps": 1,
        "logging_steps": 1,
        "rank": 1,
        "lr_warmup_steps": 0,
        "dataloader_num_workers": 0,
        "seed": 0,
        "noise_offset": 0,
        "adam_weight_decay": 0,
        "validation_guidance_scale": 0,
        "resolution": 8,
    }
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not bound <= value < math.inf:
            parser.error(f"--{name} {value}: must be at least {bound}")
    for name in ("beta_mapo", "snr_value", "learning_rate", "max_grad_norm", "lora_alpha", "adam_epsilon"):
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            parser.error(f"--{name} {value}: must be positive and finite")
    shares = ("label_noise_prob", "proportion_empty_prompts", "ema_decay", "activation_memory_budget")
    for name in shares:
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            parser.error(f"--{name} {value}: must be between 0 and 1")
    if args.resolution % 8:
        parser.error(f"--resolution {args.resolution}: must be a multiple of 8; try {round(args.resolution / 8) * 8}")


def check_bounds(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """As `check_numbers`, where the bound itself is out of range or another argument."""
    for name, value in vars(args).items():
        if value == "":
            parser.error(f"--{name}: is empty; leave the flag out, or give it a value")
    for name in ("adam_beta1", "adam_beta2", "lora_dropout"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 0 and below 1")
    if args.seed >= 2**32:
        parser.error(f"--seed {args.seed}: must be below 2**32")
    if args.lr_warmup_steps > args.max_train_steps and not args.demo:
        parser.error(f"--lr_warmup_steps {args.lr_warmup_steps}: more than --max_train_steps {args.max_train_steps}")


def check_choices(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the run with one line where arguments don't go together, or name what isn't there."""
    if args.demo and not DEMO.is_dir():
        parser.error(f"{DEMO} is missing: name --pretrained_model_name_or_path and --dataset_name")
    named = ("pretrained_model_name_or_path", "dataset_name")
    for given, missing in (named, named[::-1]):
        if getattr(args, given) is not None and getattr(args, missing) is None:
            parser.error(f"--{given} {getattr(args, given)} needs --{missing} too; with neither, the demo is trained")
    for together in (("chosen", "rejected"), ("image_0", "image_1", "label_0")):
        given = [name for name in together if getattr(args, f"{name}_column") is not None]
        if given and len(given) < len(together):
            missing = next(name for name in together if name not in given)
            parser.error(f"--{given[0]}_column needs --{missing}_column too")
    needs = (
        (args.label_1_column, "--label_1_column", args.label_0_column, "--label_0_column"),
        (args.use_dora, "--use_dora", args.use_lora, "--use_lora"),
        (args.lora_alpha, "--lora_alpha", args.use_lora, "--use_lora"),
        (args.output_kohya_format, "--output_kohya_format", args.use_lora, "--use_lora"),
        (args.activation_memory_budget, "--activation_memory_budget", args.compile, "--compile"),
        (args.hub_model_id, "--hub_model_id", args.push_to_hub, "--push_to_hub"),
    )
    for given, name, needed, needed_name in needs:
        if given not in (None, False) and not needed:
            parser.error(f"{name} needs {needed_name} too")
    exclusive = (
        (args.chosen_column, "--chosen_column", args.image_0_column, "--image_0_column"),
        (args.streaming, "--streaming", args.cache_latents, "--cache_latents"),
        (args.use_lora, "--use_lora", args.optimizer == "adamw_bf16", "--optimizer adamw_bf16"),
        (args.use_dora, "--use_dora", args.output_kohya_format, "--output_kohya_format"),  # no loader reads this
        (args.optimizer == "adamw_bf16", "--optimizer adamw_bf16", args.use_ema, "--use_ema"),
        # accelerate's config of wandb would carry the token to wandb's servers.
        (args.hub_token, "--hub_token", args.report_to == "wandb", "--report_to wandb"),
    )
    for given, name, other, other_name in exclusive:
        if given and other:
            parser.error(f"{name} and {other_name} exclude each other")
    check_packages(parser, args)
    if args.image_root is not None and not Path(args.image_root).is_dir():
        parser.error(f"--image_root {args.image_root}: no such folder")
    for name in ("output_dir", "cache_dir"):
        path = getattr(args, name)
        if path is not None and Path(path).exists() and not Path(path).is_dir():
            parser.error(f"--{name} {path}: is a file; name a folder")
    if args.optimizer == "adamw_bf16" and args.mixed_precision != "bf16":
        parser.error(f"--optimizer adamw_bf16 needs --mixed_precision bf16, not {args.mixed_precision}")
    args.validation_prompts = read_prompts(parser, args.validation_prompts)
    check_output_dir(parser, args)


def check_output_dir(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the run with one line where its results would run over what it is made from, or over an earlier run."""
    sources = (
        "pretrained_model_name_or_path",
        "pretrained_vae_model_name_or_path",
        "dataset_name",
        "instance_data_dir",
    )
    for name in sources:
        source = getattr(args, name, None)
        if source is not None and Path(source).resolve() == Path(args.output_dir).resolve():
            parser.error(f"--output_dir {args.output_dir}: is --{name} too; name another folder")
    if Path(args.output_dir).resolve() == DEMO.parent:
        parser.error(f"--output_dir {args.output_dir}: holds this script; name another folder")
    checkpoints = list_checkpoints(Path(args.output_dir))
    if checkpoints and args.resume_from_checkpoint is None:
        parser.error(
            f"--output_dir {args.output_dir} holds {checkpoints[-1].name} of an earlier run: continue it with "
            "--resume_from_checkpoint latest, or name another folder"
        )


def check_packages(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the run with one line where a flag needs a package that isn't installed."""
    packages = {
        f"--optimizer {args.optimizer}": OPTIMIZER_PACKAGES[args.optimizer],
        f"--report_to {args.report_to}": None if args.report_to == "none" else args.report_to,
        "--enable_xformers_memory_efficient_attention": (
            "xformers" if args.enable_xformers_memory_efficient_attention else None
        ),
    }
    for flag, package in packages.items():
        if package is not None and importlib.util.find_spec(package) is None:
            parser.error(f"{flag} needs a package: pip install {PIP_NAMES.get(package, package)}")


def read_prompts(parser: argparse.ArgumentParser, prompts: list[str] | None) -> list[str] | None:
    """Prompts as given, or the lines of a .txt file."""
    if prompts is not None and len(prompts) == 1 and prompts[0].endswith(".txt"):
        if not Path(prompts[0]).is_file():
            parser.error(f"--validation_prompts {prompts[0]}: no such file")
        try:
            lines = Path(prompts[0]).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            parser.error(f"--validation_prompts {prompts[0]}: {error}; save it as UTF-8")
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            parser.error("--validation_prompts: the file has no line")
    if prompts is not None and not all(prompt.strip() for prompt in prompts):
        parser.error("--validation_prompts: a prompt is empty")
    return prompts


def fail(message: str) -> None:
    """Ends every process with one line; exit code 1."""
    for bar in list(tqdm._instances):  # else the line would stand behind a bar, or before it
        bar.close()
    sys.exit(f"{Path(__file__).name}: error: {message}")


@contextlib.contextmanager
def known_errors_end_in_one_line():
    try:
        yield
    except KeyboardInterrupt:
        fail(
            "interrupted; the same command goes on with what is encoded, --resume_from_checkpoint latest with the rest"
        )
    except (OSError, SafetensorError) as error:
        if not is_full_disk(error):
            raise
        fail(
            f"--output_dir or --cache_dir: {root_cause(error)}; make room or name other folders, then go on with "
            "--resume_from_checkpoint latest"
        )


def is_full_disk(error: BaseException) -> bool:
    reasons = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
    return any(reason in str(root_cause(error)) for reason in reasons)


def root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def check_model(args: argparse.Namespace) -> None:
    """Ends the run with one line where the model's configuration says that it can't be trained like this."""
    from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel

    name, hub = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    flag = f"--pretrained_model_name_or_path {name}"
    try:
        index = DiffusionPipeline.load_config(name, **hub)
        unet_config = UNet2DConditionModel.load_config(name, subfolder="unet", **hub)
        scheduler_config = DDPMScheduler.load_config(name, subfolder="scheduler", **hub)
        if args.pretrained_vae_model_name_or_path is not None:
            flag = f"--pretrained_vae_model_name_or_path {args.pretrained_vae_model_name_or_path}"
            AutoencoderKL.load_config(args.pretrained_vae_model_name_or_path, cache_dir=args.cache_dir)
    except (OSError, ValueError) as error:
        fail(f"{flag}: {first_line(error)}")
    flag, folder = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}", Path(name) / "unet"
    if None in index.get("text_encoder", [None]) or "text_encoder_2" not in index:
        fail(f"{flag}: a {index['_class_name']}; name an SDXL base model")
    if unet_config["in_channels"] != unet_config["out_channels"]:
        fail(f"{flag}: its UNet takes {unet_config['in_channels']} channels; name a model that isn't for inpainting")
    prediction = scheduler_config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        fail(f"{flag}: prediction type {prediction}; needs epsilon or v_prediction")
    ending = f"*.{args.variant}*" if args.variant else "*"
    if folder.is_dir() and not [*folder.glob(f"{ending}.safetensors"), *folder.glob(f"{ending}.bin")]:
        fail(f"{flag}: no weights {ending}.safetensors in {folder}; see --variant")
    if args.use_lora:
        with torch.device("meta"):
            add_lora(UNet2DConditionModel.from_config(unet_config), args)


def load_frozen_models(args: argparse.Namespace, device: torch.device, weight_dtype: torch.dtype):
    """SDXL's pipeline without its UNet: it encodes the captions and the pictures, and draws at validation."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline

    hub = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
    components = {"unet": None}
    if args.pretrained_vae_model_name_or_path is not None:
        try:
            components["vae"] = AutoencoderKL.from_pretrained(
                args.pretrained_vae_model_name_or_path, cache_dir=args.cache_dir, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            fail(f"--pretrained_vae_model_name_or_path {args.pretrained_vae_model_name_or_path}: {first_line(error)}")
    try:
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            args.pretrained_model_name_or_path, **hub, **components, dtype=weight_dtype, add_watermarker=False
        )
    except (OSError, ValueError) as error:
        fail(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}: {first_line(error)}")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    # In fp32, as SDXL's own VAE overflows in fp16; channels last, as convolutions of few channels are faster so.
    pipeline.vae.to(torch.float32, memory_format=torch.channels_last)
    for model in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        model.requires_grad_(False).eval()
    return pipeline


def load_unet(args: argparse.Namespace, accelerator: Accelerator) -> tuple:
    """The UNet and the noise scheduler, whose prediction type decides what the UNet is trained to predict."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    name, hub = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    noise_scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler", **hub)
    dtype = torch.bfloat16 if args.optimizer == "adamw_bf16" else torch.float32
    if args.use_lora:  # the frozen weights may be as short as the computation
        dtype = HALF_DTYPES.get(accelerator.mixed_precision, torch.float32)
    try:
        unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", variant=args.variant, dtype=dtype, **hub)
    except (OSError, ValueError) as error:
        fail(f"--pretrained_model_name_or_path {name}: {first_line(error)}")
    if args.use_lora:
        add_lora(unet, args)
        if not is_sharded(accelerator):  # their checkpoints hold the whole UNet
            keep_lora_only(accelerator)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    if args.compile:
        if args.activation_memory_budget is not None:
            torch._functorch.config.activation_memory_budget = args.activation_memory_budget
        unet.compile_repeated_blocks(fullgraph=True)
    return unet.train(), noise_scheduler


def add_lora(unet, args: argparse.Namespace) -> None:
    """Freezes the UNet and adds a LoRA in fp32."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    unet.requires_grad_(False)
    layers = [layer.strip() for layer in args.lora_layers.split(",") if layer.strip()]
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha or args.rank,
        lora_dropout=args.lora_dropout,
        init_lora_weights="gaussian",
        target_modules=layers,
        use_dora=args.use_dora,
    )
    try:
        unet.add_adapter(config)
    except ValueError as error:
        fail(f"--lora_layers {args.lora_layers}: {first_line(error)}")
    cast_training_params(unet, dtype=torch.float32)


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
    if columns[1] == columns[2]:
        fail(f"{where}column {columns[1]} is named as both pictures")
    if missing := [name for name in columns if name is not None and name not in names]:
        fail(f"{where}no column {missing[0]} among {', '.join(names)}")
    return columns


class PreferencePairs:
    """The rows of a data set whose label decides.

    Args:
        dataset: rows as `datasets` has them, pictures not decoded.
        first_row: number of the first row in the whole data set, where `dataset` is a part of it.

    Attributes:
        captions: caption of each pair. (N,)
        rows: row of each pair in `dataset`. (N,)
        winner_first: whether picture 0 is the chosen one. (N,)
        tied, unlabelled: numbers of such rows.
    """

    def __init__(self, dataset, args: argparse.Namespace, first_row: int = 0) -> None:
        caption, *self.sides, label_0, label_1 = find_columns(args, dataset.column_names)
        self.dataset, self.first_row, self.image_root = dataset, first_row, Path(args.image_root or ".")
        count = len(dataset)
        share = np.ones(count)
        if label_0 is not None:
            share = read_labels(dataset[label_0][:], label_0)
            if label_1 is None and ((share < 0) | (share > 1)).any():
                value = share[(share < 0) | (share > 1)][0]
                fail(f"--label_0_column {label_0}: {value:g}; alone it's a share from 0 to 1, see --label_1_column")
            other = 1 - share if label_1 is None else read_labels(dataset[label_1][:], label_1)
            share = np.where(share == other, 0.5, np.where(np.isnan(other), np.nan, share > other))
        labelled = ~np.isnan(share)
        if "has_label" in dataset.column_names:
            labelled &= read_labels(dataset["has_label"][:], "has_label") > 0
        tied = labelled & (share == 0.5)
        self.tied, self.unlabelled = int(tied.sum()), int((~labelled).sum())
        lots = np.random.default_rng((args.seed, first_row)).random((count, 2))
        winner_first = np.where(tied, lots[:, 0] < 0.5, share > 0.5) ^ (lots[:, 1] < args.label_noise_prob)
        self.rows = np.flatnonzero(labelled if args.tie_policy == "random" else labelled & ~tied)
        self.winner_first = winner_first[self.rows]
        captions = dataset[caption][:]  # a list: to ask a column of `datasets` for each is slow
        self.captions = [captions[i] for i in self.rows.tolist()]
        for row, text in zip(self.rows.tolist(), self.captions):
            if not isinstance(text, str):
                fail(f"{self.where(row)}: {caption} is {text!r}; a caption must be text")

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, row: int) -> str:
        return f"--dataset_name: row {self.first_row + row}"

    def keep(self, which: np.ndarray) -> None:
        """Drops the other pairs. Indices or mask. (N,)"""
        self.rows, self.winner_first = self.rows[which], self.winner_first[which]
        self.captions = np.array(self.captions, dtype=object)[which].tolist()

    def pictures(self, i: int) -> tuple[Image.Image, Image.Image]:
        """Winner and loser of pair i, in RGB. Raises ValueError, which names the row, where one is unreadable."""
        row = int(self.rows[i])
        record, decoded = self.dataset[row], []
        for side in self.sides if self.winner_first[i] else reversed(self.sides):
            try:
                decoded.append(decode_picture(record[side], self.image_root))
            except Exception as error:  # PIL's decoders raise whatever they please
                raise ValueError(f"{self.where(row)}: {side} is no readable picture ({error})") from error
        return tuple(decoded)

    def fingerprint(self) -> str:
        """Changes with the rows, with which of them are used and who won, and with the files that they name."""
        files = []
        for side in self.sides:
            named = getattr(self.dataset.features[side], "dtype", None) == "string"
            values = self.dataset[side][:] if named else []
            paths = [self.image_root / path for path in values if path]
            files += [(str(path), path.stat().st_mtime_ns if path.exists() else None) for path in paths]
        used = (self.rows.tobytes(), self.winner_first.tobytes())
        return hash_of(self.dataset._fingerprint, files, *used)


def read_labels(values, column: str) -> np.ndarray:
    """Numbers, bools or their text (as webdataset has them) -> float; None and empty text -> NaN, "unlabelled"."""
    try:
        return np.array([math.nan if v is None or v == "" else float(v) for v in values])
    except (TypeError, ValueError) as error:
        fail(f"--dataset_name: column {column}: {error}; labels must be numbers")


def load_dataset(args: argparse.Namespace):
    """From the hub, or from a local file or folder: parquet, arrow, JSON lines, CSV, webdataset tars, `save_to_disk`,
    or pictures in `w/` and `l/` with their captions in NAME.txt."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs as an error is raised too
    path = Path(args.dataset_name)
    kinds = {
        ".parquet": "parquet",
        ".arrow": "arrow",
        ".json": "json",
        ".jsonl": "json",
        ".csv": "csv",
        ".tar": "webdataset",
    }
    options = {"split": args.dataset_split_name, "cache_dir": args.cache_dir, "streaming": args.streaming}
    try:
        if path.is_file():
            if path.suffix not in kinds:
                fail(f"--dataset_name {path}: not one of {', '.join(kinds)}")
            files = {args.dataset_split_name: str(path)}
            dataset = datasets.load_dataset(kinds[path.suffix], data_files=files, **options)
        elif (path / "w").is_dir() and (path / "l").is_dir():
            dataset = datasets.Dataset.from_list(list_picture_folders(path))
        elif (path / "dataset_info.json").is_file():
            dataset = datasets.load_from_disk(path)
        else:
            dataset = datasets.load_dataset(args.dataset_name, args.dataset_config_name, **options)
    except Exception as error:  # readers of files raise whatever they please
        if is_full_disk(error):
            raise root_cause(error) from None
        cause = "it holds no row" if isinstance(error, StopIteration) else first_line(root_cause(error))
        fail(f"--dataset_name {args.dataset_name}: {cause}")
    if args.streaming and isinstance(dataset, datasets.Dataset):
        dataset = dataset.to_iterable_dataset()
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def list_picture_folders(path: Path) -> list[dict[str, str]]:
    """`w/NAME.*`, `l/NAME.*`, `NAME.txt` -> one row per name."""
    winners, losers = {}, {}
    for side, files in (("w", winners), ("l", losers)):
        for file in sorted((path / side).glob("[!.]*")):
            if file.stem in files:
                fail(f"--dataset_name {path}: {file} and {files[file.stem]} have one name")
            files[file.stem] = str(file)
    captions = {p.stem: p for p in path.glob("[!.]*.txt")}
    if not winners:
        fail(f"--dataset_name {path}: no picture in {path / 'w'}")
    names = sorted(winners.keys() | losers.keys() | captions.keys())
    for name in names:
        for where, files in (("w/", winners), ("l/", losers), ("", captions)):
            if name not in files:
                fail(f"--dataset_name {path}: no {where}{name}{'.txt' if not where else ''} to go with the others")
    rows = []
    for name in names:
        try:
            rows.append({"caption": captions[name].read_text(encoding="utf-8").strip()})
        except (OSError, UnicodeDecodeError) as error:
            fail(f"--dataset_name {path}: {captions[name]}: {error}; captions are text in UTF-8")
    return [row | {"chosen": winners[n], "rejected": losers[n]} for row, n in zip(rows, names)]


def load_pairs(args: argparse.Namespace, accelerator: Accelerator) -> PreferencePairs:
    """All pairs, without those that have an unreadable picture; says how many rows were left out and why."""
    dataset = load_dataset(args)
    pairs = PreferencePairs(dataset, args)
    counts = (
        f"{len(dataset)} rows: {pairs.tied} ties {'decided by lot' if args.tie_policy == 'random' else 'left out'}"
    )
    counts += f", {pairs.unlabelled} without a label"
    if len(pairs) == 0:
        fail(f"--dataset_name {args.dataset_name}: no row can be used ({counts})")
    if args.max_train_samples is not None:
        pairs.keep(np.arange(min(args.max_train_samples, len(pairs))))

    def read(indices: np.ndarray) -> dict[str, list[bool]]:
        with ThreadPoolExecutor() as pool:
            return {"readable": list(pool.map(lambda i: can_read(pairs, i, args), indices.tolist()))}

    name = f"reading-{hash_of(pairs.fingerprint(), args.skip_unreadable)}"
    readable = encode_once(name, {"readable": ((), "bool")}, len(pairs), read, 64, args, accelerator)["readable"]
    empty = sum(not caption.strip() for caption in pairs.captions)
    counts += f", {empty} with an empty caption" if empty else ""
    logger.info(f"{counts}, {int((~readable).sum())} unreadable.")
    pairs.keep(np.flatnonzero(readable))
    if len(pairs) == 0:
        fail(f"--dataset_name {args.dataset_name}: none of its pictures can be read")
    return pairs


def can_read(pairs: PreferencePairs, i: int, args: argparse.Namespace) -> bool:
    try:
        pairs.pictures(i)
    except ValueError as error:
        if not args.skip_unreadable:
            fail(
                f"{first_line(error)}; mend it, see --image_root for paths, or pass --skip_unreadable to leave it out"
            )
        return False
    return True


def decode_picture(value: bytes | str | dict | Image.Image, image_root: Path = Path(".")) -> Image.Image:
    """File bytes, a path, `datasets`' {"bytes", "path"} or a PIL picture -> RGB, upright, transparency on white."""
    if isinstance(value, dict):
        value = value["bytes"] if value["bytes"] is not None else value["path"]
    if value is None:
        raise ValueError("the field is empty")
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


def prepare_picture(
    picture: Image.Image, resolution: int, crop: np.ndarray = np.full(2, 0.5), flip: bool = False
) -> tuple[torch.Tensor, list[int]]:
    """Resizes the shorter side to `resolution`, crops at a share of the room there is (0.5: the centre), mirrors.

    Returns the pixels in [-1, 1], Shape: (3, R, R), and SDXL's micro-conditioning: original height and width, top and
    left of the crop, target height and width.
    """
    width, height = picture.size
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    resized = picture.resize(size, Image.Resampling.LANCZOS)
    top, left = int((resized.height - resolution) * crop[0]), int((resized.width - resolution) * crop[1])
    cropped = resized.crop((left, top, left + resolution, top + resolution))
    if flip:
        cropped = ImageOps.mirror(cropped)
        left = resized.width - resolution - left  # where the crop begins in the mirrored picture
    pixels = torch.from_numpy(np.asarray(cropped).copy()).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, [height, width, top, left, resolution, resolution]


def prepare_pair(pairs: PreferencePairs, i: int, key: tuple, flip: bool, args: argparse.Namespace) -> tuple:
    """Pixels of winner and loser, Shape: (2, 3, R, R), and the winner's micro-conditioning; crops by lot of `key`."""
    crops = np.random.default_rng((args.seed, 1, *key)).random((2, 2)) if args.random_crop else np.full((2, 2), 0.5)
    winner, loser = (prepare_picture(p, args.resolution, c, flip) for p, c in zip(pairs.pictures(i), crops))
    return torch.stack([winner[0], loser[0]]), winner[1]


# ---------------------------------------------------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------------------------------------------------


def hash_of(*parts) -> str:
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
                del_me = np.lib.format.open_memmap(temporary, "w+", dtype, (length, *shape))
                del del_me
                if hasattr(os, "posix_fallocate"):  # takes the room now: later, a full disk would be a SIGBUS
                    with open(temporary, "r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
                os.replace(temporary, folder / f"{key}.npy")
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            fail(f"--cache_dir {folder}: {error}; name a folder with more room")
    accelerator.wait_for_everyone()
    maps = {key: np.load(folder / f"{key}.npy", mmap_mode="r+") for key in columns}
    missing = np.flatnonzero(~maps["done"])
    accelerator.wait_for_everyone()  # all have looked before any writes
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    what = name.split("-")[0].capitalize()
    with tqdm(total=len(mine), desc=what, disable=len(mine) == 0 or not accelerator.is_main_process) as bar:
        for start in range(0, len(mine), batch_size):
            chunk = mine[start : start + batch_size]
            for key, values in encode(chunk).items():
                maps[key][chunk] = values
            maps["done"][chunk] = True
            bar.update(len(chunk))
    accelerator.wait_for_everyone()
    return {key: maps[key] for key in arrays}


@torch.no_grad()
def encode_pixels(pixels: torch.Tensor, vae) -> torch.Tensor:
    """(B, 3, R, R) in [-1, 1] -> latents as the UNet takes them, (B, C, h, w), fp32: the mode, not a sample."""
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    latents = (posterior.mode().float() - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    if not latents.isfinite().all():
        fail("the VAE returns values that aren't finite; try --pretrained_vae_model_name_or_path")
    return latents


def encode_pictures(pairs: PreferencePairs, vae, args: argparse.Namespace, accelerator: Accelerator) -> dict:
    """`latents` of winner and loser, Shape: (N, F, 2, C, h, w), fp16, and the winner's `time_ids`, (N, F, 6), fp32.
    F is 2 with --random_flip, the second one mirrored, else 1."""
    channels, side = vae.config.latent_channels, args.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    flips = (False, True) if args.random_flip else (False,)

    def encode(indices: np.ndarray) -> dict[str, np.ndarray]:
        # Keyed by its row, a pair keeps its crop when the seed of the run or the number of pairs changes.
        prepared = [prepare_pair(pairs, i, (int(pairs.rows[i]),), f, args) for i in indices.tolist() for f in flips]
        latents = encode_pixels(torch.cat([pixels for pixels, _ in prepared]), vae)
        time_ids = np.array([ids for _, ids in prepared])
        return {
            "latents": latents.unflatten(0, (len(indices), len(flips), 2)).cpu().numpy(),
            "time_ids": time_ids.reshape(len(indices), len(flips), 6),
        }

    crop = args.seed if args.random_crop else "centre"
    key = hash_of(vae, vae.config.scaling_factor, pairs.fingerprint(), args.resolution, crop, len(flips), "v2")
    arrays = {
        "latents": ((len(flips), 2, channels, side, side), "float16"),
        "time_ids": ((len(flips), 6), "float32"),
    }
    size = max(1, args.train_batch_size // len(flips))
    return encode_once(f"pictures-{key}", arrays, len(pairs), encode, size, args, accelerator)


@torch.no_grad()
def embed_captions(captions: list[str], pipeline, device: torch.device) -> dict[str, torch.Tensor]:
    """`prompt_embeds`, Shape: (B, L, D), and `pooled_prompt_embeds`, (B, P), fp32; zeros for an empty caption where
    the pipeline has them at inference."""
    embeds, _, pooled, _ = pipeline.encode_prompt(captions, device=device, do_classifier_free_guidance=False)
    if pipeline.config.force_zeros_for_empty_prompt:
        kept = torch.tensor([caption != "" for caption in captions], device=device)
        embeds, pooled = embeds * kept[:, None, None], pooled * kept[:, None]
    return {"prompt_embeds": embeds.float(), "pooled_prompt_embeds": pooled.float()}


def hash_of_encoders(pipeline) -> str:
    """Changes with all that `embed_captions` depends on but the captions."""
    words = [sorted(tokenizer.get_vocab().items()) for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)]
    return hash_of(pipeline.text_encoder, pipeline.text_encoder_2, words, pipeline.config.force_zeros_for_empty_prompt)


def encode_captions(captions: list[str], encoders: str, pipeline, args, accelerator: Accelerator) -> dict:
    """What `embed_captions` returns, in fp16 on disk; `encoders` is their hash. Shape: (N, ...)"""

    def encode(indices: np.ndarray) -> dict[str, np.ndarray]:
        embedded = embed_captions([captions[i] for i in indices.tolist()], pipeline, accelerator.device)
        return {key: value.cpu().numpy() for key, value in embedded.items()}

    width = pipeline.text_encoder.config.hidden_size + pipeline.text_encoder_2.config.hidden_size
    arrays = {
        "prompt_embeds": ((pipeline.tokenizer.model_max_length, width), "float16"),
        "pooled_prompt_embeds": ((pipeline.text_encoder_2.config.projection_dim,), "float16"),
    }
    key = hash_of(encoders, captions, "v3")
    return encode_once(f"captions-{key}", arrays, len(captions), encode, 64, args, accelerator)


class PairsByPosition(torch.utils.data.Dataset):
    """What a training step takes, by position in the run: pairs are shuffled anew in each epoch, by seed.

    Args:
        captions: row of each caption in `embeddings`; the empty caption is among them.
        pictures: what `encode_pictures` returns, or None: then a row has `pixels`, Shape: (2, 3, R, R).
    """

    def __init__(self, pairs: PreferencePairs, captions: dict, embeddings: dict, pictures: dict | None, args) -> None:
        self.pairs, self.pictures, self.embeddings, self.args = pairs, pictures, embeddings, args
        self.caption_rows, self.empty = [captions[caption] for caption in pairs.captions], captions[""]
        self.epoch = None

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        epoch, i = divmod(position, len(self.pairs))
        if epoch != self.epoch:
            self.order = np.random.default_rng((self.args.seed, 0, epoch)).permutation(len(self.pairs))
            self.epoch = epoch
        i = int(self.order[i])
        flip, drop = draw_choices(position, self.args)
        caption_row = self.empty if drop else self.caption_rows[i]
        row = {key: array[caption_row] for key, array in self.embeddings.items()}
        if self.pictures is None:
            row["pixels"], row["time_ids"] = prepare_pair(self.pairs, i, (position,), flip, self.args)
        else:
            row |= {key: array[i, int(flip)] for key, array in self.pictures.items()}
        tensors = {key: torch.as_tensor(np.array(value, dtype=np.float32)) for key, value in row.items()}
        return tensors | {"position": torch.tensor(position)}


def draw_choices(position: int, args: argparse.Namespace) -> tuple[bool, bool]:
    """Whether the pair at this position is mirrored, and whether its caption is left out: one decision per pair."""
    lots = np.random.default_rng((args.seed, 2, position)).random(2)
    return bool(args.random_flip and lots[0] < 0.5), bool(lots[1] < args.proportion_empty_prompts)


class StreamedPairs(torch.utils.data.IterableDataset):
    """Batches of pairs that are read while training; a resumed run reads on, undecoded, to where it was."""

    def __init__(self, dataset, batches: list[range], args: argparse.Namespace) -> None:
        self.dataset, self.batches, self.args = dataset.shuffle(seed=args.seed, buffer_size=1000), batches, args

    def __iter__(self):
        source, position = self.read(), 0
        for batch in self.batches:
            rows = []
            for wanted in batch:
                while position <= wanted:
                    (pairs, i), position = next(source), position + 1
                flip, drop = draw_choices(wanted, self.args)
                try:
                    pixels, time_ids = prepare_pair(pairs, i, (wanted,), flip, self.args)
                except ValueError as error:
                    fail(f"{first_line(error)}; mend it, or leave such rows out with --skip_unreadable")
                row = {"pixels": pixels, "time_ids": torch.tensor(time_ids, dtype=torch.float32)}
                rows.append(row | {"caption": "" if drop else pairs.captions[i], "position": wanted})
            yield torch.utils.data.default_collate(rows)

    def read(self):
        """(pairs, i) of every usable row, epoch after epoch; the same in every process."""
        for epoch in itertools.count():
            self.dataset.set_epoch(epoch)
            found = False
            for found in itertools.islice(self.read_epoch(), self.args.max_train_samples):
                yield found
            if not found:
                fail(f"--dataset_name {self.args.dataset_name}: no row can be used")

    def read_epoch(self):
        import datasets

        rows, skip = iter(self.dataset), self.args.skip_unreadable
        for first_row in itertools.count(0, 64):
            chunk = list(itertools.islice(rows, 64))
            if not chunk:
                return
            pairs = PreferencePairs(datasets.Dataset.from_list(chunk), self.args, first_row)
            yield from ((pairs, i) for i in range(len(pairs)) if not skip or can_read(pairs, i, self.args))


def encode_batch(batch: dict, pipeline, device: torch.device) -> dict:
    """Adds the latents and embeddings that weren't encoded ahead."""
    if "pixels" in batch:
        pixels = batch.pop("pixels")
        batch["latents"] = encode_pixels(pixels.flatten(0, 1), pipeline.vae).unflatten(0, pixels.shape[:2])
    if "caption" in batch:
        batch |= embed_captions(batch.pop("caption"), pipeline, device)
    return batch


def list_batches(first_step: int, args: argparse.Namespace, accelerator: Accelerator) -> list[range]:
    """Positions in the run of this process's batches, from optimizer step `first_step` on. The positions of one step
    are the same set, however they are split over processes and accumulation."""
    size, processes, accumulation = args.train_batch_size, accelerator.num_processes, args.gradient_accumulation_steps
    firsts = (
        (batch * processes + accelerator.process_index) * size
        for batch in range(first_step * accumulation, args.max_train_steps * accumulation)
    )
    return [range(first, first + size) for first in firsts]


def make_batches(dataset, batches: list[range], pipeline, args: argparse.Namespace, accelerator: Accelerator):
    """Yields what `training_step` takes."""
    workers = {"num_workers": args.dataloader_num_workers, "pin_memory": accelerator.device.type == "cuda"}
    if args.streaming:
        workers["num_workers"] = min(1, workers["num_workers"])  # each would read the whole stream
        loader = torch.utils.data.DataLoader(StreamedPairs(dataset, batches, args), batch_size=None, **workers)
    else:
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=batches, **workers)
    for batch in loader:
        yield encode_batch(batch, pipeline, accelerator.device)


# ---------------------------------------------------------------------------------------------------------------------
# Training step
# ---------------------------------------------------------------------------------------------------------------------


def draw_noise(
    positions: torch.Tensor, shape: torch.Size, num_timesteps: int, offset: float, seed: int, device: torch.device
) -> tuple:
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
    """Loss of a batch of B pairs, and its metrics, which stay on the device."""
    num_timesteps = noise_scheduler.config.num_train_timesteps
    latents = batch["latents"].to(device, non_blocking=True)  # (B, 2, C, h, w)
    draw = (latents.shape[2:], num_timesteps, args.noise_offset, args.seed, device)
    noise, timesteps = draw_noise(batch["position"], *draw)

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
    """Whole checkpoints, oldest first: those whose files have the sizes that `state.json` says."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted((p for p in found if is_whole(p)), key=lambda path: int(path.name.split("-")[1]))


def is_whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / "state.json").read_text())["sizes"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def save_checkpoint(step: int, args: argparse.Namespace, accelerator: Accelerator) -> Path:
    """Weights, optimizer, learning rate schedule, EMA and random states, written aside and then renamed."""
    folder = Path(args.output_dir) / f"checkpoint-{step}"
    aside = folder.with_name(f"tmp-{folder.name}")
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(aside))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            sizes = {str(p.relative_to(aside)): p.stat().st_size for p in aside.rglob("*") if p.is_file()}
            state = {"step": step, "sizes": sizes, **describe_run(args, accelerator)}
            (aside / "state.json").write_text(json.dumps(state, indent=2))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(aside, folder)
            if args.checkpoints_total_limit is not None:
                for old in list_checkpoints(Path(args.output_dir))[: -args.checkpoints_total_limit]:
                    shutil.rmtree(old)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
        shutil.rmtree(aside, ignore_errors=True)
        fail(
            f"--output_dir {args.output_dir}: checkpoint-{step} can't be written ({first_line(error)}); make room, "
            "then go on with --resume_from_checkpoint latest"
        )
    accelerator.wait_for_everyone()
    return folder


def public_settings(args: argparse.Namespace) -> dict:
    return {name: value for name, value in sorted(vars(args).items()) if name != "hub_token" and value is not None}


def describe_run(args: argparse.Namespace, accelerator: Accelerator) -> dict:
    processes = accelerator.num_processes
    return {
        "settings": public_settings(args),
        "global_batch": args.train_batch_size * args.gradient_accumulation_steps * processes,
        "kind": f"{accelerator.distributed_type.value} with {processes}" if is_sharded(accelerator) else "replicas",
    }


def check_resumption(checkpoint: Path | None, args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Ends the run with one line where it can't go on as the checkpoint's run would have."""
    if checkpoint is None:
        return
    then, now = json.loads((checkpoint / "state.json").read_text()), describe_run(args, accelerator)
    advice = "go on as before, or start anew in another --output_dir"
    for name in sorted((then["settings"].keys() | now["settings"].keys()) - FREE_SETTINGS):
        old, new = then["settings"].get(name), now["settings"].get(name)
        if old != new:
            fail(f"--{name} {new}: {checkpoint.name} was trained with {old}; {advice}")
    if then["global_batch"] != now["global_batch"]:
        fail(
            f"--train_batch_size {args.train_batch_size} x --gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps} x {accelerator.num_processes} processes is {now['global_batch']}: "
            f"{checkpoint.name} was trained with {then['global_batch']}; {advice}"
        )
    if then["kind"] != now["kind"]:
        fail(f"--resume_from_checkpoint {checkpoint}: of {then['kind']}, but this is {now['kind']}; {advice}")
    if then["step"] > args.max_train_steps:
        fail(f"--max_train_steps {args.max_train_steps}: {checkpoint.name} is beyond it; name more steps")


def check_pairs(captions: list[str], winner_first: np.ndarray, checkpoint: Path | None, args) -> None:
    """Ends the run with one line where the pairs aren't those that the checkpoint's run trained on."""
    args.pairs = hash_of(captions, winner_first.tobytes())
    if checkpoint is None:
        return
    if json.loads((checkpoint / "state.json").read_text())["settings"]["pairs"] != args.pairs:
        fail(
            f"--dataset_name {args.dataset_name}: its pairs aren't those that {checkpoint.name} was trained on; "
            "restore them, or start anew in another --output_dir"
        )


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The folder that `--resume_from_checkpoint` names; None where training starts from scratch."""
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint == "latest":
        checkpoints = list_checkpoints(Path(args.output_dir))
        for broken in sorted(set(Path(args.output_dir).glob("checkpoint-*")) - set(checkpoints)):
            logger.info(f"{broken} is not a whole checkpoint and is passed over.")
        if not checkpoints:
            logger.info(f"No checkpoint in {args.output_dir} yet: training starts from scratch.")
        return checkpoints[-1] if checkpoints else None
    checkpoint = Path(args.resume_from_checkpoint)
    if not is_whole(checkpoint):
        fail(f"--resume_from_checkpoint {checkpoint}: no whole checkpoint; try `latest`")
    return checkpoint


def keep_lora_only(accelerator: Accelerator) -> None:
    """Has checkpoints hold the LoRA's weights instead of all of the UNet's."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    def save(models, weights, folder) -> None:
        if accelerator.is_main_process:
            save_file(get_peft_model_state_dict(unwrap(models[0], accelerator)), Path(folder) / "lora.safetensors")
        weights.clear()  # accelerate writes what is left in here

    def load(models, folder) -> None:
        set_peft_model_state_dict(unwrap(models.pop(), accelerator), load_file(Path(folder) / "lora.safetensors"))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def unwrap(model, accelerator: Accelerator):
    model = accelerator.unwrap_model(model)
    return model._orig_mod if hasattr(model, "_orig_mod") else model


def trainable(unet, accelerator: Accelerator) -> list[torch.nn.Parameter]:
    return [parameter for parameter in unwrap(unet, accelerator).parameters() if parameter.requires_grad]


@contextlib.contextmanager
def averaged(unet, ema, accelerator: Accelerator):
    """The UNet with the EMA's weights, where there is an EMA."""
    if ema is not None:
        ema.store(trainable(unet, accelerator))
        ema.copy_to(trainable(unet, accelerator))
    yield
    if ema is not None:
        ema.restore(trainable(unet, accelerator))


class MetricsLog:
    """Keeps the metrics of the steps on the device and writes them every `--logging_steps`, so that the device needn't
    wait for the host in every step: to metrics.jsonl, the trackers and the progress bar."""

    def __init__(self, first_step: int, args: argparse.Namespace, accelerator: Accelerator) -> None:
        self.args, self.accelerator = args, accelerator
        self.path = Path(args.output_dir) / "metrics.jsonl"
        self.micro_steps, self.pending, self.history = [], [], []
        self.skipped_in_a_row, self.warned = 0, False
        if accelerator.is_main_process:
            if first_step and self.path.exists():  # what an unbroken run would have written by now
                lines = self.path.read_text().splitlines(keepends=True)
                whole = [from_line(line) for line in lines if line.endswith("\n")]  # a kill may halve the last
                self.history = [record for record in whole if record["step"] <= first_step]
            text = "".join(map(to_line, self.history))
            save_aside(self.path, lambda path: path.write_text(text))
        self.bar = tqdm(
            total=args.max_train_steps, initial=first_step, desc="Training", disable=not accelerator.is_main_process
        )
        self.clock = time.perf_counter()

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        self.micro_steps.append(torch.stack(list(metrics.values())))
        self.names = list(metrics)

    def end_step(self, step: int, grad_norm: torch.Tensor, learning_rate: float, skipped: bool) -> None:
        values = torch.cat([torch.stack(self.micro_steps).mean(0), grad_norm.detach().float().reshape(1)])
        self.pending.append((step, learning_rate, skipped, values))
        self.micro_steps = []
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if skipped:
            logger.info(f"Step {step} is skipped: its loss or gradient isn't finite.")
        if step % self.args.logging_steps == 0 or step == self.args.max_train_steps:
            self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        values = self.accelerator.reduce(torch.stack([values for *_, values in self.pending]), "mean").tolist()
        now, args = time.perf_counter(), self.args
        pairs = args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        records = []
        for (step, learning_rate, skipped, _), row in zip(self.pending, values):
            record = {"step": step, **dict(zip([*self.names, "grad_norm"], row)), "learning_rate": learning_rate}
            record["skipped"] = int(skipped)
            record["pairs_per_second"] = pairs * len(self.pending) / (now - self.clock)
            record["peak_memory_gb"] = peak_memory_gb(self.accelerator.device)
            records.append(record)
        self.pending, self.clock = [], now
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.writelines(map(to_line, records))
        for record in records:
            self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])
        self.history += records
        self.warn_of_saturation()
        self.bar.update(len(records))
        shown = {"margin": "margin", "acc": "accuracy", "weight": "margin_weight", "pairs/s": "pairs_per_second"}
        means = {k: sum(r[name] for r in records) / len(records) for k, name in ({"loss": "loss"} | shown).items()}
        self.bar.set_postfix({short: f"{value:.3g}" for short, value in means.items()})

    def close(self) -> None:
        self.bar.close()
        if self.skipped_in_a_row:
            logger.info(
                f"The last {self.skipped_in_a_row} steps weren't finite: the weights are likely ruined. "
                "Try a lower --learning_rate."
            )

    def warn_of_saturation(self) -> None:
        recent = [record["margin_weight"] for record in self.history[-100:]]
        if self.warned or len(recent) < 100 or sum(recent) / 100 >= 0.01:
            return
        self.warned = True
        beta = self.args.beta_mapo
        logger.info(
            f"--beta_mapo {beta:g}: over 100 steps the margin's gradient was below 1 % of the SFT term's, so this is "
            f"plain fine-tuning on the chosen pictures. Try --beta_mapo {max(beta / 8, 1):g}, unless that is wanted."
        )

    def plot(self) -> None:
        """curves.png: the four curves by which a run is judged."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
        history = [record for record in self.history if math.isfinite(record["loss"])] or self.history
        steps = [record["step"] for record in history]
        curves = {
            "loss": "loss (eq. 5)",
            "margin": "margin: score_w - score_l",
            "accuracy": "implicit accuracy: share of pairs with mse_w < mse_l",
            "margin_weight": "weight of the margin term (SFT term = 1)",
        }
        window = max(1, len(steps) // 20)
        for axis, (name, title) in zip(axes.flat, curves.items()):
            values = np.array([record[name] for record in history])
            axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
            smooth = np.convolve(values, np.ones(window) / window, mode="valid")
            axis.plot(steps[window - 1 :], smooth, color="tab:blue", label=f"mean of {window}")
            axis.set(title=title, xlabel="step")
        axes[0, 0].legend()
        save_aside(self.path.with_name("curves.png"), lambda path: figure.savefig(path, dpi=110))
        plt.close(figure)


def to_line(record: dict[str, float]) -> str:
    """JSON, which has no NaN and no infinity: null."""
    return json.dumps({name: value if math.isfinite(value) else None for name, value in record.items()}) + "\n"


def from_line(line: str) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in json.loads(line).items()}


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
    """One picture per prompt, prompt i from seed i, by the UNet as it is now; spread over processes."""
    from accelerate.utils import gather_object

    device, count = accelerator.device, len(embeddings["prompt_embeds"]) - 1  # the last row is the empty prompt
    model = unwrap(unet, accelerator).eval()
    pipeline.unet = model
    pipeline.vae.to(device)
    rows = {key: torch.from_numpy(np.array(value, dtype=np.float32)).to(device) for key, value in embeddings.items()}
    # As many calls in every process: a sharded model can be called by all of them together only.
    share, size = -(-count // accelerator.num_processes), args.train_batch_size
    mine = (np.arange(share) * accelerator.num_processes + accelerator.process_index) % count
    pictures = []
    for chunk in np.split(mine, range(size, share, size)):
        positive = {key: value[chunk] for key, value in rows.items()}
        negative = {f"negative_{key}": value[-1:].expand_as(positive[key]) for key, value in rows.items()}
        with accelerator.autocast(), torch.compiler.set_stance("force_eager"):  # not worth compiling for
            latents = pipeline(
                **positive,
                **negative,
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
    if args.cache_latents:
        pipeline.vae.to("cpu")
    model.train()
    return [picture for _, picture in sorted(dict(gather_object(pictures)).items())]


def draw_base_pictures(unet, pipeline, embeddings: dict, args, accelerator: Accelerator) -> list[Image.Image]:
    """The pictures before training, drawn when they are first shown, so that training needn't wait for them: with the
    LoRA switched off, or by a UNet that is loaded anew. No gradients are held by then: memory has no new peak."""
    from diffusers import UNet2DConditionModel

    if args.use_lora:
        model = unwrap(unet, accelerator)
        model.disable_adapters()
        pictures = draw_pictures(unet, pipeline, embeddings, args, accelerator)
        model.enable_adapters()
        return pictures
    base = UNet2DConditionModel.from_pretrained(
        args.pretrained_model_name_or_path,
        subfolder="unet",
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        dtype=next(unwrap(unet, accelerator).parameters()).dtype,
    )
    return draw_pictures(base.to(accelerator.device), pipeline, embeddings, args, accelerator)


def draw_grid(prompts: list[str], before: list[Image.Image], after: list[Image.Image]) -> Image.Image:
    """Each prompt with its two pictures under it, base on the left, tuned on the right; at most 12 prompts."""
    import textwrap

    from PIL import ImageDraw, ImageFont

    side = max(128, min(384, before[0].width))
    count, head = min(12, len(prompts)), 42
    columns = min(4, count)
    cell_width, cell_height = 2 * side + 24, side + head + 24
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
            pen.text((left + 4, y + head + side), name, "grey", ImageFont.load_default(11))
    return grid


def save_validation(step: int, prompts: list[str], before: list, after: list, args, accelerator: Accelerator) -> None:
    """The grid of this step, in the output folder and in the trackers."""
    if not accelerator.is_main_process:
        return
    grid = draw_grid(prompts, before, after)
    path = Path(args.output_dir) / ("before_after.png" if step == args.max_train_steps else f"validation/{step}.png")
    path.parent.mkdir(exist_ok=True)
    save_aside(path, grid.save)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"before_after": np.array(grid)[None]}, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"before_after": [grid]}, step)
        else:
            import trackio

            tracker.log({"before_after": trackio.Image(grid)}, step)


def choose_prompts(dataset_captions: list[str], args: argparse.Namespace) -> list[str]:
    if args.validation_prompts is not None:
        return args.validation_prompts
    if args.demo:
        return (DEMO / "measured_captions.txt").read_text().splitlines()  # none of them is in the training split
    captions = sorted(set(dataset_captions) - {""})
    return np.random.default_rng(args.seed).permutation(captions)[:8].tolist()


def judge_demo(prompts: list[str], before: list[Image.Image], after: list[Image.Image]) -> str:
    """The demo's result in three lines, by the judge of `demo/`."""
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
# Results
# ---------------------------------------------------------------------------------------------------------------------


def save_weights(unet, args: argparse.Namespace, accelerator: Accelerator) -> None:
    """The LoRA, or the whole pipeline, in diffusers' format. Called by every process: a sharded model is gathered."""
    from diffusers import StableDiffusionXLPipeline

    model, output_dir = unwrap(unet, accelerator), Path(args.output_dir)
    state = accelerator.get_state_dict(unet, unwrap=True)
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    if args.use_lora:
        from diffusers.training_utils import _collate_lora_metadata
        from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        if accelerator.is_main_process:
            layers = get_peft_model_state_dict(model, state)
            StableDiffusionXLPipeline.save_lora_weights(
                output_dir,
                unet_lora_layers=convert_state_dict_to_diffusers(layers),
                **_collate_lora_metadata({"unet": model}),
            )
            if args.output_kohya_format:
                named = convert_state_dict_to_kohya({f"unet.{name}": layer for name, layer in layers.items()})
                save_aside(output_dir / "pytorch_lora_weights_kohya.safetensors", lambda path: save_file(named, path))
    elif accelerator.is_main_process:
        save_pipeline(state, args)


def save_pipeline(state: dict[str, torch.Tensor], args: argparse.Namespace) -> None:
    """The UNet as it was trained, in fp32 but for --optimizer adamw_bf16: at 1e-7 an update is lost in fewer bits."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

    name, hub = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(name, subfolder="unet", **hub))
    unet.to(next(iter(state.values())).dtype).load_state_dict(state)
    components = {"unet": unet}
    if args.pretrained_vae_model_name_or_path is not None:
        components["vae"] = AutoencoderKL.from_pretrained(
            args.pretrained_vae_model_name_or_path, cache_dir=args.cache_dir
        )
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        name, **components, **hub, variant=args.variant, dtype=torch.float32
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
    from huggingface_hub import ModelCard, ModelCardData

    settings = "\n".join(
        f"| `{name}` | `{value}` |" for name, value in public_settings(args).items() if name != "cache_dir"
    )
    where = args.hub_model_id or args.output_dir
    tuned = where if not args.use_lora else args.pretrained_model_name_or_path
    load_lora = f'pipeline.load_lora_weights("{where}")\n' if args.use_lora else ""
    measured = f"```\n{result}\n```" if result else ""
    description = f"""
# {Path(where).name}

SDXL's UNet, tuned on preference pairs with [MaPO](https://huggingface.co/papers/2406.06424), beta {args.beta_mapo:g}.

- base model: `{args.pretrained_model_name_or_path}`
- preference pairs: `{args.dataset_name}`

{measured}

![before and after](before_after.png)

![curves](curves.png)

```python
import torch
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained("{tuned}", dtype=torch.float16).to("cuda")
{load_lora}picture = pipeline("{prompts[0]}", height={args.resolution}, width={args.resolution}).images[0]
```

| setting | value |
|---|---|
{settings}
"""
    tags = ["stable-diffusion-xl", "text-to-image", "diffusers", "mapo", "preference-tuning"]
    data = ModelCardData(
        base_model=args.pretrained_model_name_or_path,
        datasets=None if Path(args.dataset_name).exists() else args.dataset_name,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*tags, "lora"] if args.use_lora else tags,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n{description}")
    save_aside(Path(args.output_dir) / "README.md", card.save)


def create_repository(args: argparse.Namespace) -> str:
    """Before training, so that a wrong name or token shows now."""
    from huggingface_hub import create_repo
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        fail(f"--push_to_hub: {name} can't be created ({first_line(error)}); see --hub_model_id and --hub_token")


def push_to_hub(args: argparse.Namespace) -> None:
    from huggingface_hub import upload_folder

    left_out = ["checkpoint-*", "logs/*", "tmp-*"]
    upload_folder(
        repo_id=args.hub_model_id, folder_path=args.output_dir, token=args.hub_token, ignore_patterns=left_out
    )


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


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
    check_device(args, accelerator)
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
        check_folders(args)
    accelerator.wait_for_everyone()
    return accelerator


def check_device(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Ends the run with one line where the processes or the device can't do what was asked for."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:  # each would train alone, into the same folder
        fail(
            f"{launched} processes were launched but don't find one another; without GPUs set ACCELERATE_USE_CPU=true"
        )
    if accelerator.device.type != "cpu":
        return
    if accelerator.mixed_precision == "fp16":
        fail("--mixed_precision fp16: needs a GPU; take bf16 or no")
    if args.enable_xformers_memory_efficient_attention:
        fail("--enable_xformers_memory_efficient_attention: needs a GPU; leave it out")


def check_folders(args: argparse.Namespace) -> None:
    """Makes the folders; ends the run with one line where they can't be made or written to."""
    for name in ("output_dir", "cache_dir"):
        if (folder := getattr(args, name)) is None:
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            fail(f"--{name} {folder}: {error.strerror}; name a folder that can be written to")


def prepare_sharding(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Tells FSDP2 and DeepSpeed what accelerate's config doesn't."""
    if accelerator.distributed_type == "DEEPSPEED":
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = args.train_batch_size
        config["gradient_clipping"] = args.max_grad_norm
    elif accelerator.distributed_type == "FSDP":
        if args.use_ema:
            fail("--use_ema: not with FSDP; see configs/zero2.yaml")
        if accelerator.mixed_precision != "no":
            from torch.distributed.fsdp import MixedPrecisionPolicy

            short = HALF_DTYPES[accelerator.mixed_precision]
            # Its default casts all inputs, time_ids among them.
            policy = MixedPrecisionPolicy(short, reduce_dtype=torch.float32, cast_forward_inputs=False)
            accelerator.state.fsdp_plugin.mixed_precision_policy = policy


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type in ("FSDP", "DEEPSPEED")


def prepare_data(args: argparse.Namespace, accelerator: Accelerator, checkpoint: Path | None = None) -> tuple:
    """Pairs, encoded as far as they can be ahead of training; those that the checkpoint was trained on.

    Returns the data set that `make_batches` takes, the pipeline without UNet, the validation prompts, and their
    embeddings with those of the empty prompt behind them.
    """
    if args.streaming:
        import datasets

        dataset = load_dataset(args)
        try:
            rows = list(dataset.take(64))
        except Exception as error:  # as in load_dataset
            fail(f"--dataset_name {args.dataset_name}: {first_line(root_cause(error))}")
        first = PreferencePairs(datasets.Dataset.from_list(rows), args)
        if len(first) == 0 and len(rows) < 64:
            fail(f"--dataset_name {args.dataset_name}: no row can be used")
        check_pairs(first.captions, first.winner_first, checkpoint, args)
        prompts = choose_prompts(first.captions, args)
    else:
        pairs = load_pairs(args, accelerator)
        check_pairs(pairs.captions, pairs.winner_first, checkpoint, args)
        prompts = choose_prompts(pairs.captions, args)
    weight_dtype = HALF_DTYPES.get(accelerator.mixed_precision, torch.float32)
    pipeline = load_frozen_models(args, accelerator.device, weight_dtype)
    encoders = hash_of_encoders(pipeline)
    prompt_embeddings = encode_captions([*prompts, ""], encoders, pipeline, args, accelerator)
    if args.streaming:
        return dataset, pipeline, prompts, prompt_embeddings
    distinct = sorted({*pairs.captions, ""})
    embeddings = encode_captions(distinct, encoders, pipeline, args, accelerator)
    # None of these is in the device's memory while training.
    pictures = None
    if args.cache_latents:
        pictures = encode_pictures(pairs, pipeline.vae, args, accelerator)
        pipeline.vae.to("cpu")
    pipeline.text_encoder = pipeline.text_encoder_2 = None
    dataset = PairsByPosition(pairs, {c: i for i, c in enumerate(distinct)}, embeddings, pictures, args)
    return dataset, pipeline, prompts, prompt_embeddings


def make_optimizer(parameters: list, args: argparse.Namespace) -> torch.optim.Optimizer:
    decay = {"lr": args.learning_rate, "weight_decay": args.adam_weight_decay}
    options = decay | {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optimizer == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    if args.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(parameters, **decay, scale_parameter=False, relative_step=False)
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(parameters, **options, safeguard_warmup=True, use_bias_correction=True)
    if args.optimizer == "adamw_bf16":
        import optimi

        return optimi.AdamW(parameters, **options, kahan_sum=True)
    return torch.optim.AdamW(parameters, **options, fused=True)


def prepare_training(unet, checkpoint: Path | None, args: argparse.Namespace, accelerator: Accelerator) -> tuple:
    """UNet, optimizer, learning rate schedule, EMA or None, and the steps done, as the checkpoint has them."""
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    optimizer = make_optimizer(trainable(unet, accelerator), args)
    if is_sharded(accelerator) and accelerator.mixed_precision != "no":  # elsewhere accelerate does this
        short = HALF_DTYPES[accelerator.mixed_precision]
        unet.forward = torch.autocast(accelerator.device.type, short)(unet.forward)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    if accelerator.distributed_type == "DEEPSPEED":  # the weights stay in fp32 as elsewhere, bf16 is autocast
        for short in ("bf16", "fp16"):
            accelerator.state.deepspeed_plugin.deepspeed_config[short]["enabled"] = False
    unet, optimizer = accelerator.prepare(unet, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)  # not prepared: accelerate would step it once per process
    ema = None
    if args.use_ema:
        ema = EMAModel(trainable(unet, accelerator), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
        accelerator.register_for_checkpointing(ema)
    if checkpoint is None:
        return unet, optimizer, lr_scheduler, ema, 0
    accelerator.load_state(str(checkpoint))
    accelerator.step = 0  # of micro-batches: the checkpoint stands at a step's end, and accumulation may have changed
    if ema is not None:
        ema.to(accelerator.device)
    logger.info(f"Resumed from {checkpoint}.")
    return unet, optimizer, lr_scheduler, ema, json.loads((checkpoint / "state.json").read_text())["step"]


def watch_signals() -> list[str]:
    """Names of the signals SIGTERM and SIGINT that came since; a second one ends the process as ever."""
    came = []

    def note(number, frame) -> None:
        came.append(signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return came


def any_process(flag: bool, accelerator: Accelerator) -> bool:
    if accelerator.num_processes == 1:
        return flag
    return accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum").item() > 0


def clip_gradients(unet, args: argparse.Namespace, accelerator: Accelerator) -> torch.Tensor:
    """Norm of the whole gradient before it is clipped, the same in every process."""
    norm = accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
    if hasattr(norm, "full_tensor"):  # of FSDP2
        norm = norm.full_tensor()
    return torch.as_tensor(norm, device=accelerator.device)  # DeepSpeed has clipped, stepped and returns a number


@known_errors_end_in_one_line()
def main(args: argparse.Namespace) -> None:
    if args.demo and os.environ.get("RANK", "0") == "0":
        print(
            "Neither --pretrained_model_name_or_path nor --dataset_name is given: training the demo. For SDXL: "
            "accelerate launch train_diffusion_mapo_sdxl.py --dataset_name YOUR_PAIRS --pretrained_model_name_or_path "
            "stabilityai/stable-diffusion-xl-base-1.0 --mixed_precision bf16 --gradient_checkpointing --use_8bit_adam"
        )
    started = time.perf_counter()
    accelerator = prepare_run(args)
    prepare_sharding(args, accelerator)
    device = accelerator.device
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = create_repository(args)
    checkpoint = find_checkpoint(args)
    check_resumption(checkpoint, args, accelerator)
    check_model(args)
    dataset, pipeline, prompts, prompt_embeddings = prepare_data(args, accelerator, checkpoint)

    unet, noise_scheduler = load_unet(args, accelerator)
    unet.to(device)
    unet, optimizer, lr_scheduler, ema, first_step = prepare_training(unet, checkpoint, args, accelerator)
    if args.report_to != "none":
        accelerator.init_trackers("mapo", config={k: str(v) for k, v in public_settings(args).items()})

    log, signals, step, before = MetricsLog(first_step, args, accelerator), watch_signals(), first_step, None
    batches = list_batches(first_step, args, accelerator)
    patience = args.max_nonfinite_steps + (20 if accelerator.scaler else 0)  # fp16 finds its scale by such steps
    logger.info(f"First step after {time.perf_counter() - started:.1f} s.")
    for batch in make_batches(dataset, batches, pipeline, args, accelerator):
        with accelerator.accumulate(unet):
            loss, metrics = training_step(unet, batch, noise_scheduler, args, device)
            accelerator.backward(loss)
            log.add(metrics)
            skip = False
            if accelerator.sync_gradients:
                grad_norm = clip_gradients(unet, args, accelerator)
                skip = not bool(grad_norm.isfinite())
            if not skip or accelerator.scaler is not None:  # fp16's scaler skips such a step and lowers its scale
                optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        lr_scheduler.step()
        if ema is not None and not skip:
            ema.step(trainable(unet, accelerator))
        log.end_step(step, grad_norm, lr_scheduler.get_last_lr()[0], skip)
        stop = any_process(bool(signals), accelerator)
        lost = log.skipped_in_a_row >= patience
        if step % args.checkpointing_steps == 0 or stop or lost:
            log.flush()
            saved = save_checkpoint(step, args, accelerator)
        if lost:
            fail(
                f"{log.skipped_in_a_row} steps in a row had a loss or gradient that isn't finite; {saved} has the "
                "weights as they were. Try a lower --learning_rate, or bf16 instead of fp16"
            )
        if stop:
            logger.info(f"\n{' '.join(signals)}: {saved} is written; go on with --resume_from_checkpoint latest")
            return accelerator.end_training()
        if args.validation_steps and step % args.validation_steps == 0 and step < args.max_train_steps:
            before = before or draw_base_pictures(unet, pipeline, prompt_embeddings, args, accelerator)
            with averaged(unet, ema, accelerator):
                now = draw_pictures(unet, pipeline, prompt_embeddings, args, accelerator)
            save_validation(step, prompts, before, now, args, accelerator)
    log.close()

    with averaged(unet, ema, accelerator):
        save_weights(unet, args, accelerator)
        after = draw_pictures(unet, pipeline, prompt_embeddings, args, accelerator)
    before = before or draw_base_pictures(unet, pipeline, prompt_embeddings, args, accelerator)
    save_validation(args.max_train_steps, prompts, before, after, args, accelerator)
    if accelerator.is_main_process:
        log.plot()
        result = judge_demo(prompts, before, after) if args.demo else ""
        save_model_card(prompts, result, args)
        if args.push_to_hub:
            push_to_hub(args)
        print(result)
        picture = Path(args.output_dir) / "before_after.png"
        print(f"Done in {time.perf_counter() - started:.0f} s. Before and after: {picture}")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())

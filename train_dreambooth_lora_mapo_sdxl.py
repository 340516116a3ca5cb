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
#     "diffusers==0.42.1",
#     "matplotlib==3.11.2",
#     "peft==0.21.2",
#     "torch==2.13.0",
#     "transformers==5.23.0",
# ]
# ///
"""
Teaches SDXL a subject or a style from a few photos with MaPO (arXiv 2406.06424): a LoRA and a new token.

    accelerate launch train_dreambooth_lora_mapo_sdxl.py

teaches the small model of `demo/` the cat of `demo/subject`; with `--pretrained_model_name_or_path` and
`--instance_data_dir` it teaches yours.

The photos are the winners; what the model draws for the same captions before it is tuned are the losers. For a photo
w, a loser l and the caption c with the new token, under one noise and one timestep,

    mapo         mse_w(c) - 1/beta * logsigmoid(T * (phi_beta(s * mse_w(c)) - phi_beta(s * mse_l(c))))      (eq. 5-7)
    dco          -logsigmoid(-beta * (mse_w(c) - mse_ref(c_base)))          (arXiv 2402.12004; ref: the adapters off)
    dreambooth   mse_w(c), and with prior preservation + weight * mse_l(c_base)                    (arXiv 2208.12242)

c_base is the caption with the token's initializer in its place: "a photo of a <dog>", "a photo of a dog".

The way of the data: photos and captions -> losers, drawn once and kept on disk -> latents, encoded once -> batches, by
default the whole set -> text encoders with the new rows -> one UNet pass over winners and losers -> loss.

SDXL's pooling trap: text_encoder_2 has `eos_token_id: 2`, so transformers takes the pooled embedding at the largest
token id. That is the end of the text, but with an added token it is this token: the pooled embedding then knows
nothing of the words after it. StableDiffusionXLPipeline does the same, and training asks the pipeline itself for its
embeddings, so the two agree.

Departures from DCO's code, whose recipe the paper follows:
1. Each sample has its own logsigmoid; there, the mean is taken inside it, and the batch size changes the objective.
2. Only the rows of new tokens are parameters; there, the whole table has gradients and is restored after every step.
3. The rows are in fp32 whatever the precision; there, they stand still in fp16.
4. A resumed run goes on with LoRA, rows and losers as they were; there, the LoRA starts again from zero.
"""

import argparse
import contextlib
import errno
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
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
    "instance_data_dir": str(DEMO / "subject"),
    "token": ["<cat>"],
    "initializer_token": ["cat"],
    "output_dir": "mapo-demo-subject",
    "resolution": 64,
    "learning_rate": 1e-3,
    "text_encoder_lr": 1e-3,
    "max_train_steps": 300,
    "sample_batch_size": 16,
    "guidance_scale": 2.0,
    "validation_prompts": [
        "<cat> face with tears of joy",
        "<cat> face with wry smile",
        "kissing <cat> face with closed eyes",
        "weary <cat> face",
        "black <cat>",
    ],
}
# What --optimizer offers, and the package that it needs beside torch and transformers.
OPTIMIZER_PACKAGES = {"adamw": None, "adamw_8bit": "bitsandbytes", "adafactor": None, "prodigy": "prodigyopt"}
PIP_NAMES = {}
# What --mixed_precision computes in; without it, fp32.
HALF_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# What a run may change when it goes on from a checkpoint. The photos may move, but they must be the same.
FREE_SETTINGS = frozenset(
    "output_dir cache_dir instance_data_dir config_name rejected_data_dir demo max_train_steps max_nonfinite_steps "
    "train_batch_size gradient_accumulation_steps gradient_checkpointing compile allow_tf32 "
    "enable_xformers_memory_efficient_attention output_kohya_format checkpointing_steps checkpoints_total_limit "
    "resume_from_checkpoint validation_prompts validation_steps sample_batch_size logging_steps report_to push_to_hub "
    "hub_model_id use_8bit_adam pairs".split()
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
    parser.add_argument(
        "--instance_data_dir",
        help="Folder of photos, with captions in metadata.jsonl, in NAME.txt or in --instance_prompt; or DCO's JSON.",
    )
    parser.add_argument("--instance_prompt", help="One caption for all photos.")
    parser.add_argument("--config_name", help="Which entry of the JSON, where it has several.")
    parser.add_argument("--token", nargs="+", help='New tokens, such as "<dog>"; without, a style is learnt.')
    parser.add_argument("--initializer_token", nargs="+", help="For each token, the word that it starts from.")
    parser.add_argument("--resolution", type=int, default=1024, help="Side of the training pictures, in pixels.")
    parser.add_argument("--cache_dir", help="Where downloads go, and the rejected pictures.")

    # Rejected pictures
    parser.add_argument(
        "--num_rejected_per_image", type=int, default=4, help="Drawn for each photo, from its caption."
    )
    parser.add_argument("--rejected_data_dir", help="Your own instead: NAME-0.png, NAME-1.png, ... for photo NAME.")
    parser.add_argument(
        "--refresh_rejected_steps", type=int, help="Every N steps, new ones by the model as it is then."
    )

    # Method
    parser.add_argument("--loss_type", choices=["mapo", "dco", "dreambooth"], default="mapo", help="See above.")
    parser.add_argument("--beta_mapo", type=float, default=1024.0, help="beta of eq. 5-7.")
    parser.add_argument("--snr_value", type=float, default=0.5, help="s of Appendix A, which scales the losses.")
    parser.add_argument("--beta_dco", type=float, default=1000.0, help="beta of DCO's loss.")
    parser.add_argument("--with_prior_preservation", action="store_true", help="DreamBooth's, on rejected pictures.")
    parser.add_argument("--prior_loss_weight", type=float, default=1.0, help="Weight of --with_prior_preservation.")
    parser.add_argument("--noise_offset", type=float, default=0.0, help="Scale of noise that a whole channel shares.")

    # LoRA
    parser.add_argument("--rank", type=int, default=32, help="Rank of the LoRA.")
    parser.add_argument("--lora_alpha", type=float, help="Default: the rank.")
    parser.add_argument("--lora_dropout", type=float, default=0.0, help="Share of the LoRA's inputs.")
    parser.add_argument("--lora_layers", default="to_k,to_q,to_v,to_out.0", help="Names of layers, with commas.")
    parser.add_argument("--train_text_encoder", action="store_true", help="A LoRA on both text encoders too.")
    parser.add_argument("--use_dora", action="store_true", help="Weight-decomposed LoRA.")
    parser.add_argument("--output_kohya_format", action="store_true", help="A second file for ComfyUI and A1111.")

    # Optimization
    parser.add_argument("--train_batch_size", type=int, help="Photos per process and pass. Default: the whole set.")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1, help="Passes before each update.")
    parser.add_argument("--max_train_steps", type=int, default=2000, help="Optimizer steps.")
    parser.add_argument("--learning_rate", type=float, help="Of the UNet's LoRA. Default: 5e-5, for prodigy 1.")
    parser.add_argument(
        "--text_encoder_lr", type=float, help="Of new tokens and text encoders' LoRA. Default: 5e-6, for prodigy 1."
    )
    schedules = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
    parser.add_argument("--lr_scheduler", default="constant", choices=schedules, help="How the rate changes.")
    parser.add_argument("--lr_warmup_steps", type=int, default=0, help="Steps in which the rate rises from 0.")
    parser.add_argument("--optimizer", choices=list(OPTIMIZER_PACKAGES), default="adamw", help="See the README.")
    parser.add_argument("--use_8bit_adam", action="store_true", help="The same as --optimizer adamw_8bit.")
    parser.add_argument("--adam_beta1", type=float, default=0.9, help="Decay of the mean of gradients.")
    parser.add_argument("--adam_beta2", type=float, default=0.999, help="Decay of the mean of their squares.")
    parser.add_argument("--adam_weight_decay", type=float, default=1e-4, help="Decoupled, times the rate.")
    parser.add_argument("--adam_epsilon", type=float, default=1e-8, help="Added to the denominator.")
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="Longer gradients are cut to this norm.")
    parser.add_argument("--max_nonfinite_steps", type=int, default=10, help="Stop after so many in a row.")
    parser.add_argument("--seed", type=int, default=0, help="Of all that is random.")

    # Speed and memory
    parser.add_argument(
        "--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: that of accelerate's config."
    )
    parser.add_argument("--gradient_checkpointing", action="store_true", help="Less memory, a third more compute.")
    parser.add_argument("--compile", action="store_true", help="Compile the blocks of the UNet.")
    parser.add_argument("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later.")
    parser.add_argument(
        "--enable_xformers_memory_efficient_attention", action="store_true", help="Instead of torch's."
    )

    # Output
    parser.add_argument("--output_dir", default="dreambooth-lora-mapo-sdxl", help="Where results go.")
    parser.add_argument("--checkpointing_steps", type=int, default=500, help="Steps between checkpoints.")
    parser.add_argument("--checkpoints_total_limit", type=int, help="Keep the newest N checkpoints.")
    parser.add_argument("--resume_from_checkpoint", help="A checkpoint's folder, or `latest`.")
    parser.add_argument(
        "--validation_prompts", nargs="+", help="New contexts for the subject, or a text file with one a line."
    )
    parser.add_argument("--validation_steps", type=int, help="Draw them every N steps too, not only before and after.")
    parser.add_argument("--guidance_scale", type=float, default=5.0, help="Of all pictures that the run draws.")
    parser.add_argument("--num_inference_steps", type=int, default=25, help="Of all pictures that the run draws.")
    parser.add_argument("--sample_batch_size", type=int, default=4, help="Pictures drawn at once.")
    parser.add_argument("--logging_steps", type=int, default=10, help="Steps between writes of the metrics.")
    parser.add_argument(
        "--report_to", choices=["none", "tensorboard", "wandb", "trackio"], default="none", help="Tracker."
    )
    parser.add_argument("--push_to_hub", action="store_true", help="Upload --output_dir at the end.")
    parser.add_argument("--hub_model_id", help="Repository on the hub; default: the name of --output_dir.")
    parser.add_argument("--hub_token", help="Default: that of `hf auth login`.")

    args = parser.parse_args(input_args)
    args.demo = args.pretrained_model_name_or_path is None and args.instance_data_dir is None
    if args.demo:
        parser.set_defaults(**DEMO_SETTINGS)  # what the user did name still counts
        args = argparse.Namespace(**vars(parser.parse_args(input_args)), demo=True)
    if args.use_8bit_adam:
        args.optimizer = "adamw_8bit"
    for name, rate in (("learning_rate", 5e-5), ("text_encoder_lr", 5e-6)):
        if getattr(args, name) is None:
            setattr(args, name, 1.0 if args.optimizer == "prodigy" else rate)
    check_numbers(parser, args)
    check_choices(parser, args)
    return args


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the run with one line where a number is out of its range."""
    least = {
        "num_rejected_per_image": 1,
        "refresh_rejected_steps": 1,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_train_steps": 1,
        "max_nonfinite_steps": 1,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 1,
        "validation_steps": 1,
        "num_inference_steps": 1,
        "sample_batch_size": 1,
        "logging_steps": 1,
        "rank": 1,
        "lr_warmup_steps": 0,
        "seed": 0,
        "noise_offset": 0,
        "prior_loss_weight": 0,
        "resolution": 8,
    }
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not bound <= value < math.inf:
            parser.error(f"--{name} {value}: must be at least {bound}")
    positive = ("beta_mapo", "beta_dco", "snr_value", "learning_rate", "text_encoder_lr", "max_grad_norm")
    for name in (*positive, "lora_alpha", "adam_epsilon"):
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            parser.error(f"--{name} {value}: must be positive and finite")
    for name in ("lora_dropout", "adam_beta1", "adam_beta2"):
        value = getattr(args, name)
        if not 0 <= value <= 1:
            parser.error(f"--{name} {value}: must be between 0 and 1")
    if args.resolution % 8:
        parser.error(f"--resolution {args.resolution}: must be a multiple of 8; try {round(args.resolution / 8) * 8}")


def check_choices(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the run with one line where arguments don't go together, or name what isn't there."""
    if args.demo and not DEMO.is_dir():
        parser.error(f"{DEMO} is missing: name --pretrained_model_name_or_path and --instance_data_dir")
    named = ("pretrained_model_name_or_path", "instance_data_dir")
    for given, missing in (named, named[::-1]):
        if getattr(args, given) is not None and getattr(args, missing) is None:
            parser.error(f"--{given} {getattr(args, given)} needs --{missing} too; with neither, the demo is trained")
    dreambooth = args.loss_type == "dreambooth"
    needs = (
        (args.token, "--token", args.initializer_token, "--initializer_token"),
        (args.initializer_token, "--initializer_token", args.token, "--token"),
        (args.with_prior_preservation, "--with_prior_preservation", dreambooth, "--loss_type dreambooth"),
        (args.refresh_rejected_steps, "--refresh_rejected_steps", args.loss_type == "mapo", "--loss_type mapo"),
        (args.rejected_data_dir, "--rejected_data_dir", uses_rejected(args), "--loss_type mapo"),
        (args.hub_model_id, "--hub_model_id", args.push_to_hub, "--push_to_hub"),
    )
    for given, name, needed, needed_name in needs:
        if given not in (None, False) and not needed:
            parser.error(f"{name} needs {needed_name} too")
    exclusive = (
        (args.use_dora, "--use_dora", args.output_kohya_format, "--output_kohya_format"),  # no loader reads this
        # accelerate's config of wandb would carry the token to wandb's servers.
        (args.hub_token, "--hub_token", args.report_to == "wandb", "--report_to wandb"),
    )
    for given, name, other, other_name in exclusive:
        if given and other:
            parser.error(f"{name} and {other_name} exclude each other")
    check_packages(parser, args)
    for name in ("instance_data_dir", "rejected_data_dir"):
        path = getattr(args, name)
        if path is not None and not Path(path).exists():
            parser.error(f"--{name} {path}: no such folder")
    for name in ("output_dir", "cache_dir"):
        path = getattr(args, name)
        if path is not None and Path(path).exists() and not Path(path).is_dir():
            parser.error(f"--{name} {path}: is a file; name a folder")
    args.validation_prompts = read_prompts(parser, args.validation_prompts)
    check_output_dir(parser, args)


def uses_rejected(args: argparse.Namespace) -> bool:
    return args.loss_type == "mapo" or args.with_prior_preservation


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


class TokenEmbedding(torch.nn.Module):
    """A text encoder's frozen table and, behind it, rows for new tokens: the only parameters that train, in fp32.

    Args:
        table: the encoder's own embedding, D wide; never written to.
        first: id of the first new token, the tokenizer's length before it.
        initializers: ids of the words that the n rows start as.

    Attributes:
        rows: Shape: (n, D)
        norms: norms of the rows at the start. Shape: (n, 1)
    """

    def __init__(self, table: torch.nn.Embedding, first: int, initializers: list[int]) -> None:
        super().__init__()
        self.table, self.first = table, first
        self.rows = torch.nn.Parameter(table.weight.detach()[initializers].float())
        self.register_buffer("norms", self.rows.detach().norm(dim=1, keepdim=True), persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        old = self.table(input_ids.clamp(max=self.first - 1))
        new = self.rows[(input_ids - self.first).clamp(min=0)].to(old.dtype)
        return torch.where((input_ids >= self.first)[..., None], new, old)


class PersonalizedModel(torch.nn.Module):
    """UNet and text encoders as one module, so that one call of accelerate prepares all that is trained.

    Attributes:
        pipeline: shares the text encoders; it makes the embeddings here as it does at inference.
        fingerprint: hash of the weights that losers depend on, before anything was added to them.
        adapted: the parts that have a LoRA, by their names in the pipeline.
        tokens: the new rows of both text encoders, or nothing.
    """

    def __init__(self, unet, pipeline, args: argparse.Namespace) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.text_encoder_2 = unet, pipeline.text_encoder, pipeline.text_encoder_2
        self.pipeline = pipeline
        drawn = uses_rejected(args) and args.rejected_data_dir is None
        self.fingerprint = hash_of(unet, self.text_encoder, self.text_encoder_2) if drawn else None
        add_lora(unet, args)
        self.adapted = {"unet": unet}
        if args.train_text_encoder:
            add_text_lora(self.text_encoder, args, skip_last=True)
            add_text_lora(self.text_encoder_2, args)
            self.adapted |= {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        self.tokens = add_tokens(pipeline, args.token, args.initializer_token) if args.token is not None else []

    def forward(self, noisy_latents, timesteps, captions: list[str], time_ids, adapters: bool = True) -> torch.Tensor:
        """Prediction for B captions, or for 2B latents whose halves share the captions. Shape: (B or 2B, C, h, w)"""
        repeats = len(noisy_latents) // len(captions)
        with contextlib.nullcontext() if adapters else self.without_adapters():
            embeds = embed_captions(captions, self.pipeline, noisy_latents.device)
            added_cond_kwargs = {
                "text_embeds": embeds["pooled_prompt_embeds"].repeat(repeats, 1),
                "time_ids": time_ids,
            }
            prompt_embeds = embeds["prompt_embeds"].repeat(repeats, 1, 1)
            return self.unet(noisy_latents, timesteps, prompt_embeds, added_cond_kwargs=added_cond_kwargs).sample

    @contextlib.contextmanager
    def without_adapters(self):
        """The starting model, as long as no caption has a new token."""
        for module in self.adapted.values():
            module.disable_adapters()
        try:
            yield
        finally:
            for module in self.adapted.values():
                module.enable_adapters()

    @torch.no_grad()
    def restore_norms(self) -> None:
        """Scales each new row to the norm that it started with, as DCO does after every optimizer step."""
        for tokens in self.tokens:
            tokens.rows.mul_(tokens.norms / tokens.rows.norm(dim=1, keepdim=True))

    def parameter_groups(self, args: argparse.Namespace) -> list[dict]:
        """What the optimizer takes: the UNet's LoRA, and what is trained in the text encoders."""
        encoders = torch.nn.ModuleList([self.text_encoder, self.text_encoder_2])
        groups = ((self.unet, args.learning_rate), (encoders, args.text_encoder_lr))
        groups = [{"params": [p for p in m.parameters() if p.requires_grad], "lr": rate} for m, rate in groups]
        return [group for group in groups if group["params"]]


def load_model(pipeline, args: argparse.Namespace, accelerator: Accelerator) -> tuple:
    """The model with all that is trained, and the noise scheduler, whose prediction type decides what it predicts."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    name, hub = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    noise_scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler", **hub)
    if noise_scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        fail(f"{name}: prediction type {noise_scheduler.config.prediction_type}; needs epsilon or v_prediction")
    # The frozen weights may be as short as the computation.
    dtype = HALF_DTYPES.get(accelerator.mixed_precision, torch.float32)
    unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", variant=args.variant, dtype=dtype, **hub)
    model = PersonalizedModel(unet, pipeline, args)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    if args.compile:
        unet.compile_repeated_blocks(fullgraph=True)
    keep_trained_only(accelerator)
    return model.to(accelerator.device).train(), noise_scheduler


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


def add_text_lora(text_encoder, args: argparse.Namespace, skip_last: bool = False) -> None:
    """Adds a LoRA in fp32 to the attention of a text encoder. SDXL takes the first encoder's last hidden state but
    one, so its last layer would never get a gradient, which several processes can't bear: `skip_last`."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha or args.rank,
        lora_dropout=args.lora_dropout,
        init_lora_weights="gaussian",
        target_modules=["q_proj", "k_proj", "v_proj", "out_proj"],
        layers_to_transform=list(range(text_encoder.config.num_hidden_layers - skip_last)),
        use_dora=args.use_dora,
    )
    text_encoder.add_adapter(config)
    cast_training_params(text_encoder, dtype=torch.float32)


def add_tokens(pipeline, tokens: list[str], words: list[str]) -> list[TokenEmbedding]:
    """Adds the tokens to both tokenizers, as `load_textual_inversion` does, and their rows to both text encoders."""
    embeddings = []
    for tokenizer, text_encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        initializers, first = [word_ids(word, tokenizer)[0] for word in words], len(tokenizer)
        tokenizer.add_tokens(tokens)
        embeddings.append(TokenEmbedding(text_encoder.get_input_embeddings(), first, initializers))
        text_encoder.set_input_embeddings(embeddings[-1])
    return embeddings


def word_ids(word: str, tokenizer) -> list[int]:
    return tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word))


def check_tokens(photos: list, args: argparse.Namespace) -> None:
    """Ends the run where a new token exists or an initializer isn't one token; needs the tokenizers only."""
    from transformers import CLIPTokenizer

    name, hub = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    for subfolder in ("tokenizer", "tokenizer_2"):
        try:
            tokenizer = CLIPTokenizer.from_pretrained(name, subfolder=subfolder, **hub)
        except (OSError, ValueError) as error:
            fail(f"--pretrained_model_name_or_path {name}: {first_line(error)}")
        for token in args.token or ():
            if len(word_ids(token, tokenizer)) == 1:
                fail(f"--token {token}: the {subfolder} has it already; choose a new one, such as <{token}-1>")
        for word in args.initializer_token or ():
            pieces = tokenizer.tokenize(word)
            if len(pieces) != 1:
                fail(f"--initializer_token {word}: is {len(pieces)} tokens, {' '.join(pieces)}; choose a simpler word")
    for photo in photos:
        length = len(tokenizer(photo.base_caption).input_ids)
        if length > tokenizer.model_max_length:
            logger.info(f"The caption of {photo.name} has {length} tokens; the end is cut off after the first "
                        f"{tokenizer.model_max_length - 2}.")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class Photo(NamedTuple):
    name: str
    picture: Image.Image
    caption: str  # with the tokens
    base_caption: str  # with their initializers


def load_photos(args: argparse.Namespace) -> list[Photo]:
    """The photos of --instance_data_dir with their captions; `args.token` may come from DCO's JSON."""
    path = Path(args.instance_data_dir)
    listed = list_config(path, args) if path.is_file() else list_folder(path, args)
    check_token_names(args)
    if not listed:
        fail(f"--instance_data_dir {path}: no photo in it ({', '.join(sorted(SUFFIXES))})")
    photos = []
    for file, caption, base_caption in listed:
        picture = read_picture(file, "instance_data_dir")
        if base_caption is None:
            caption, base_caption = with_and_without_token(caption, args)
        if args.token is not None and not any(token in caption for token in args.token):
            wanted = [*args.token, *args.initializer_token]
            fail(f"--instance_data_dir: the caption of {file}, {caption!r}, has none of {', '.join(wanted)}")
        photos.append(Photo(file.stem, picture, caption, base_caption))
    names = [photo.name for photo in photos]
    if twice := [name for name in names if names.count(name) > 1]:
        fail(f"--instance_data_dir {path}: two photos are named {twice[0]}; rename one, as rejected ones go by name")
    if args.rejected_data_dir is not None:
        read_rejected(find_rejected(photos, args))
    return photos


def check_photos(photos: list[Photo], checkpoint: Path | None, args, accelerator: Accelerator) -> None:
    """Fills in the batch that is the whole set; ends the run where processes or checkpoint don't go with it."""
    if is_sharded(accelerator):
        fail(f"{accelerator.distributed_type.value}: a LoRA needs no sharding; take configs/ddp.yaml")
    if args.train_batch_size is None:
        args.train_batch_size = -(-len(photos) // (accelerator.num_processes * args.gradient_accumulation_steps))
    args.pairs = hash_of(*((p.name, p.caption, p.base_caption, p.picture.tobytes()) for p in photos))
    check_resumption(checkpoint, args, accelerator)
    if checkpoint and json.loads((checkpoint / "state.json").read_text())["settings"]["pairs"] != args.pairs:
        fail(
            f"--instance_data_dir {args.instance_data_dir}: its photos or captions aren't those of "
            f"{checkpoint.name}; restore them, or start anew in another --output_dir"
        )


def read_picture(file: Path, flag: str) -> Image.Image:
    try:
        return decode_picture(str(file))
    except Exception as error:  # PIL's decoders raise whatever they please
        fail(f"--{flag}: {file} is no readable picture ({first_line(error)}); mend it or take it out")


def check_token_names(args: argparse.Namespace) -> None:
    """Ends the run where tokens can't be told from each other, or don't have an initializer each."""
    tokens, words = args.token or [], args.initializer_token or []
    if len(tokens) != len(words):
        fail(f"--initializer_token: {len(words)} for {len(tokens)} of --token; each token needs one")
    for name, values in (("token", tokens), ("initializer_token", words)):
        for value in values:
            if not value or re.search(r"\s", value):
                fail(f"--{name} {value!r}: must be one word")
    for token in tokens:
        if [other for other in tokens if token in other] != [token]:
            fail(f"--token {token}: stands twice, or is part of another; name them apart")


SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def list_folder(path: Path, args: argparse.Namespace) -> list[tuple]:
    """(file, caption, None) of each photo in a folder."""
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    captions = {}
    if args.instance_prompt is not None:
        captions = dict.fromkeys(files, args.instance_prompt)
    elif (path / "metadata.jsonl").is_file():
        for i, line in enumerate((path / "metadata.jsonl").read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line) if line.strip() else None
                if row is not None:
                    captions[path / row["file_name"]] = row["text"]
            except (ValueError, TypeError, KeyError) as error:
                fail(f"--instance_data_dir: {path}/metadata.jsonl, line {i}: needs file_name and text ({error!r})")
        files = list(captions)
    else:
        captions = {f: f.with_suffix(".txt").read_text("utf-8") for f in files if f.with_suffix(".txt").is_file()}
    for file in files:
        if not file.is_file():
            fail(f"--instance_data_dir: {path}/metadata.jsonl names {file.name}, which isn't there")
        if not isinstance(captions.get(file), str) or not captions[file].strip():
            fail(f"--instance_data_dir: {file} has no caption; write one to metadata.jsonl, {file.stem}.txt, or name "
                 "--instance_prompt")  # fmt: skip
    return [(file, captions[file].strip(), None) for file in files]


def list_config(path: Path, args: argparse.Namespace) -> list[tuple]:
    """(file, caption, base caption or None) of each photo in DCO's JSON, which may name the tokens too."""
    where = f"--instance_data_dir {path}"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if args.config_name is not None:
            config = config[args.config_name]
        elif "images" not in config and len(config) == 1:
            (config,) = config.values()
        images, prompts = list(map(str, config["images"])), list(map(str, config["prompts"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        fail(f"{where}: no JSON with the lists images and prompts ({first_line(error)}); see --config_name")
    bases = config.get("base_prompts") or [None] * len(images)
    if not len(images) == len(prompts) == len(bases):
        fail(f"{where}: {len(images)} images, {len(prompts)} prompts, {len(bases)} base_prompts; must be as many")
    if args.token is None and config.get("inserting_tokens"):
        args.token, args.initializer_token = config["inserting_tokens"], config.get("initializer_tokens")
    files = [Path(image) if Path(image).is_file() else path.parent / image for image in images]
    return list(zip(files, prompts, bases))


def with_and_without_token(caption: str, args: argparse.Namespace) -> tuple[str, str]:
    """The caption with the tokens and the one with their initializers, from either; twice the same from neither."""
    if args.token is None:
        return caption, caption
    words = dict(zip(args.token, args.initializer_token))
    if any(token in caption for token in words):
        base_caption = caption
        for token, word in words.items():
            base_caption = base_caption.replace(token, word)
        return caption, base_caption
    tokens = {word.lower(): token for token, word in reversed(words.items())}
    pattern = "|".join(re.escape(word) for word in tokens)
    return re.sub(rf"\b({pattern})\b", lambda m: tokens[m[0].lower()], caption, flags=re.IGNORECASE), caption


def find_rejected(photos: list[Photo], args: argparse.Namespace) -> list[list[Path]]:
    """The files in --rejected_data_dir for each photo, as many as --num_rejected_per_image asks for."""
    folder, found = Path(args.rejected_data_dir), []
    for photo in photos:
        pattern = re.compile(re.escape(photo.name) + r"-\d+")
        files = [p for p in sorted(folder.iterdir()) if pattern.fullmatch(p.stem) and p.suffix.lower() in SUFFIXES]
        if len(files) < args.num_rejected_per_image:
            fail(
                f"--rejected_data_dir {folder}: {len(files)} pictures {photo.name}-NUMBER for photo {photo.name}, "
                f"needs {args.num_rejected_per_image}; add some, or lower --num_rejected_per_image"
            )
        found.append(files[: args.num_rejected_per_image])
    return found


def read_rejected(files: list[list[Path]]) -> list[list[Image.Image]]:
    return [[read_picture(file, "rejected_data_dir") for file in row] for row in files]


def draw_rejected(photos: list[Photo], model, args: argparse.Namespace, accelerator: Accelerator) -> list[list[Path]]:
    """What the starting model draws for the base captions, from fixed seeds. The files stay in the cache, in a folder
    that changes with every setting that they depend on (manifest.json in it); only those missing are drawn."""
    from huggingface_hub import cached_assets_path

    manifest = {
        "model": args.pretrained_model_name_or_path,
        "weights": model.fingerprint,
        "vae": args.pretrained_vae_model_name_or_path,
        "scheduler": dict(model.pipeline.scheduler.config),
        "captions": {photo.name: photo.base_caption for photo in photos},
        "resolution": args.resolution,
        "guidance_scale": args.guidance_scale,
        "num_inference_steps": args.num_inference_steps,
        "mixed_precision": accelerator.mixed_precision,
        "seed": args.seed,
    }
    folder = cached_assets_path("mapo", f"rejected-{hash_of(manifest)}", assets_dir=args.cache_dir)
    if accelerator.is_main_process and not (folder / "manifest.json").exists():
        save_aside(folder / "manifest.json", lambda path: path.write_text(json.dumps(manifest, indent=2, default=str)))
    files = [[folder / f"{photo.name}-{j}.png" for j in range(args.num_rejected_per_image)] for photo in photos]
    missing = [(i, j) for i, row in enumerate(files) for j, file in enumerate(row) if not file.exists()]
    accelerator.wait_for_everyone()  # all have looked before any writes
    size = args.sample_batch_size * accelerator.num_processes
    bar = tqdm(total=len(missing), desc="Rejected", disable=not missing or not accelerator.is_main_process)
    for start in range(0, len(missing), size):
        chunk = missing[start : start + size]
        captions, seeds = [photos[i].base_caption for i, _ in chunk], [rejected_seed(0, i, j, args) for i, j in chunk]
        for (i, j), picture in zip(chunk, draw_pictures(model, captions, seeds, args, accelerator)):
            if accelerator.is_main_process:
                save_aside(files[i][j], picture.save)
        bar.update(len(chunk))
    bar.close()
    accelerator.wait_for_everyone()
    logger.info(f"Rejected pictures: {len(missing)} drawn, {sum(map(len, files)) - len(missing)} found, in {folder}")
    return files


def rejected_seed(step: int, i: int, j: int, args: argparse.Namespace) -> int:
    return int(np.random.SeedSequence((args.seed, step, i, j)).generate_state(1)[0])


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


@torch.no_grad()
def encode_pixels(pixels: torch.Tensor, vae) -> torch.Tensor:
    """(B, 3, R, R) in [-1, 1] -> latents as the UNet takes them, (B, C, h, w), fp32: the mode, not a sample."""
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    latents = (posterior.mode().float() - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    if not latents.isfinite().all():
        fail("the VAE returns values that aren't finite; try --pretrained_vae_model_name_or_path")
    return latents


def embed_captions(captions: list[str], pipeline, device: torch.device) -> dict[str, torch.Tensor]:
    """`prompt_embeds`, Shape: (B, L, D), and `pooled_prompt_embeds`, (B, P), fp32; zeros for an empty caption where
    the pipeline has them at inference."""
    embeds, _, pooled, _ = pipeline.encode_prompt(captions, device=device, do_classifier_free_guidance=False)
    if pipeline.config.force_zeros_for_empty_prompt:
        kept = torch.tensor([caption != "" for caption in captions], device=device)
        embeds, pooled = embeds * kept[:, None, None], pooled * kept[:, None]
    return {"prompt_embeds": embeds.float(), "pooled_prompt_embeds": pooled.float()}


class PhotoSet:
    """What training steps take, by position in the run; photos are shuffled anew in each epoch, by seed. A checkpoint
    keeps the latents of the rejected pictures, which change in the run with --refresh_rejected_steps.

    Attributes:
        latents: Shape: (N, C, h, w), fp32, on the CPU
        rejected: of R rejected pictures per photo, or None. Shape: (N, R, C, h, w)
        time_ids: SDXL's micro-conditioning of each photo, also for its rejected pictures. Shape: (N, 6)
    """

    def __init__(self, photos: list[Photo], rejected: list[list[Image.Image]] | None, vae, args, device) -> None:
        self.photos, self.vae, self.args, self.device = photos, vae, args, device
        prepared = [prepare_picture(photo.picture, args.resolution) for photo in photos]
        self.latents = self.encode([pixels for pixels, _ in prepared])
        self.time_ids = torch.tensor([ids for _, ids in prepared], dtype=torch.float32)
        self.rejected = None
        if rejected is not None:
            self.set_rejected(rejected)

    def encode(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        self.vae.to(self.device)
        latents = torch.cat([encode_pixels(one[None], self.vae).cpu() for one in pixels])
        self.vae.to("cpu")  # out of memory while training
        return latents

    def set_rejected(self, pictures: list[list[Image.Image]]) -> None:
        """R pictures for each photo."""
        pixels = [prepare_picture(picture, self.args.resolution)[0] for row in pictures for picture in row]
        self.rejected = self.encode(pixels).unflatten(0, (len(pictures), -1))

    def state_dict(self) -> dict:
        return {"rejected": self.rejected}

    def load_state_dict(self, state: dict) -> None:
        self.rejected = state["rejected"]

    def batch(self, positions: range) -> dict:
        """What `training_step` takes: B photos, each with one of its rejected pictures, by lot."""
        rows = []
        for position in positions:
            epoch, i = divmod(position, len(self.photos))
            rows.append(np.random.default_rng((self.args.seed, 0, epoch)).permutation(len(self.photos))[i])
        batch = {"latents": self.latents[rows], "time_ids": self.time_ids[rows], "position": torch.tensor(positions)}
        batch["captions"] = [self.photos[i].caption for i in rows]
        batch["base_captions"] = [self.photos[i].base_caption for i in rows]
        if self.rejected is not None:
            lots = [np.random.default_rng((self.args.seed, 3, p)).integers(self.rejected.shape[1]) for p in positions]
            batch["rejected"] = self.rejected[rows, lots]
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


class DCOLoss(NamedTuple):
    """What `dco_loss` returns. Only `loss` carries a graph. Shape: (B,), of `loss`: ()."""

    loss: torch.Tensor
    mse_w: torch.Tensor
    mse_ref: torch.Tensor
    margin: torch.Tensor  # mse_ref - mse_w, above 0 where the tuned model leads
    accuracy: torch.Tensor  # 1 where mse_w < mse_ref, else 0


def dco_loss(model_pred: torch.Tensor, target: torch.Tensor, ref_pred: torch.Tensor, beta: float) -> DCOLoss:
    """DCO's loss, -logsigmoid(-beta * (mse_w - mse_ref)), mean over B samples. Shape of each tensor: (B, ...)"""
    mse_w, mse_ref = mse_per_sample(model_pred, target), mse_per_sample(ref_pred, target)
    loss = -F.logsigmoid(-beta * (mse_w - mse_ref)).mean()
    return DCOLoss(loss, *(x.detach() for x in (mse_w, mse_ref, mse_ref - mse_w, mse_w < mse_ref)))


class DreamBoothLoss(NamedTuple):
    """What `dreambooth_loss` returns. Only `loss` carries a graph. Shape: (B,), of `loss`: ()."""

    loss: torch.Tensor
    mse_w: torch.Tensor
    mse_prior: torch.Tensor  # 0 without prior preservation


def dreambooth_loss(model_pred: torch.Tensor, target: torch.Tensor, prior_weight: float) -> DreamBoothLoss:
    """DreamBooth's loss, mse_w + prior_weight * mse_prior, mean over B samples.

    Args:
        model_pred, target: B photos and then, if `prior_weight` is above 0, B prior pictures. Shape: (B or 2B, ...)
    """
    errors = mse_per_sample(model_pred, target)
    mse_w, mse_prior = errors.chunk(2) if prior_weight > 0 else (errors, torch.zeros_like(errors))
    loss = mse_w.mean() + prior_weight * mse_prior.mean()
    return DreamBoothLoss(loss, mse_w.detach(), mse_prior.detach())


def mse_per_sample(model_pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Shape: (B, ...) -> (B,), fp32."""
    return (model_pred.float() - target.float()).square().flatten(1).mean(1)


def training_step(model, batch: dict, noise_scheduler, args: argparse.Namespace, device: torch.device) -> tuple:
    """Loss of a batch of B photos, and its metrics, which stay on the device."""
    num_timesteps = noise_scheduler.config.num_train_timesteps
    latents, captions, time_ids = batch["latents"].to(device), batch["captions"], batch["time_ids"].to(device)
    draw = (latents.shape[1:], num_timesteps, args.noise_offset, args.seed, device)
    noise, timesteps = draw_noise(batch["position"], *draw)
    if uses_rejected(args):
        # Winners, then losers. The two of a pair share noise, timestep and micro-conditioning; for MaPO, the caption.
        latents = torch.cat([latents, batch["rejected"].to(device)])  # (2B, C, h, w)
        noise, timesteps, time_ids = noise.repeat(2, 1, 1, 1), timesteps.repeat(2), time_ids.repeat(2, 1)
    if args.with_prior_preservation:
        captions = captions + batch["base_captions"]

    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    model_pred = model(noisy_latents, timesteps, captions, time_ids)
    if noise_scheduler.config.prediction_type == "epsilon":
        target = noise
    else:
        target = noise_scheduler.get_velocity(latents, noise, timesteps)

    if args.loss_type == "mapo":
        result = mapo_loss(model_pred, target, args.beta_mapo, args.snr_value, num_timesteps)
    elif args.loss_type == "dco":
        with torch.no_grad():
            ref_pred = model(noisy_latents, timesteps, batch["base_captions"], time_ids, adapters=False)
        result = dco_loss(model_pred, target, ref_pred, args.beta_dco)
    else:
        result = dreambooth_loss(model_pred, target, args.prior_loss_weight if args.with_prior_preservation else 0)
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


def keep_trained_only(accelerator: Accelerator) -> None:
    """Has checkpoints hold what is trained, LoRA and rows of tokens, instead of all weights."""
    from safetensors.torch import load_file, save_file

    def save(models, weights, folder) -> None:
        if accelerator.is_main_process:
            save_file(trained_state(unwrap(models[0], accelerator)), Path(folder) / "trained.safetensors")
        weights.clear()  # accelerate writes what is left in here

    def load(models, folder) -> None:
        model = unwrap(models.pop(), accelerator)
        model.load_state_dict(trained_state(model) | load_file(Path(folder) / "trained.safetensors"), strict=False)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def trained_state(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def unwrap(model, accelerator: Accelerator):
    model = accelerator.unwrap_model(model)
    return model._orig_mod if hasattr(model, "_orig_mod") else model


class MetricsLog:
    """Keeps the metrics of the steps on the device and writes them every `--logging_steps`, so that the device needn't
    wait for the host in every step: to metrics.jsonl, the trackers and the progress bar."""

    def __init__(self, first_step: int, args: argparse.Namespace, accelerator: Accelerator) -> None:
        self.args, self.accelerator = args, accelerator
        self.path = Path(args.output_dir) / "metrics.jsonl"
        self.micro_steps, self.pending, self.history = [], [], []
        self.skipped_in_a_row = 0
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
        self.bar.update(len(records))
        shown = {"loss": "loss", "margin": "margin", "acc": "accuracy", "weight": "margin_weight", "mse": "mse_w"}
        shown = {short: name for short, name in shown.items() if name in records[0]}
        means = {short: sum(r[name] for r in records) / len(records) for short, name in shown.items()}
        self.bar.set_postfix({short: f"{value:.3g}" for short, value in means.items()})

    def close(self) -> None:
        self.bar.close()
        if self.skipped_in_a_row:
            logger.info(
                f"The last {self.skipped_in_a_row} steps weren't finite: the weights are likely ruined. "
                "Try a lower --learning_rate."
            )

    def plot(self) -> None:
        """curves.png: what the loss is made of."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(2, 3, figsize=(15, 6), layout="constrained")
        history = [record for record in self.history if math.isfinite(record["loss"])] or self.history
        steps = [record["step"] for record in history]
        curves = {"loss": f"loss ({self.args.loss_type})"} | {name: name.replace("_", " ") for name in self.names}
        curves = {name: title for name, title in curves.items() if not name.startswith("score")}
        window = max(1, len(steps) // 20)
        for axis, (name, title) in zip(axes.flat, list(curves.items())[: axes.size]):
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
def draw_pictures(model, prompts: list[str], seeds: list[int], args, accelerator: Accelerator) -> list[Image.Image]:
    """One picture per prompt and seed, by the model as it is now; spread over processes."""
    from accelerate.utils import gather_object

    model, count = unwrap(model, accelerator), len(prompts)
    pipeline = model.pipeline
    model.eval()
    pipeline.unet = model.unet
    pipeline.vae.to(accelerator.device)
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    pictures = []
    for start in range(0, len(mine), args.sample_batch_size):
        chunk = mine[start : start + args.sample_batch_size]
        with accelerator.autocast(), torch.compiler.set_stance("force_eager"):  # not worth compiling for
            latents = pipeline(
                [prompts[i] for i in chunk],
                height=args.resolution,
                width=args.resolution,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                generator=[torch.Generator("cpu").manual_seed(seeds[i]) for i in chunk],
                output_type="latent",
            ).images
        latents = latents.float() / pipeline.vae.config.scaling_factor + (pipeline.vae.config.shift_factor or 0)
        decoded = torch.cat([pipeline.vae.decode(latent[None]).sample for latent in latents])
        pictures += list(zip(chunk, pipeline.image_processor.postprocess(decoded)))
    pipeline.unet = None
    pipeline.vae.to("cpu")
    model.train()
    return [picture for _, picture in sorted(gather_object(pictures), key=lambda pair: pair[0])]


def draw_grid(rows: list[tuple[str, list[str], list[Image.Image]]]) -> Image.Image:
    """Rows of pictures, each with a title on the left and its captions above the pictures; at most 6 in a row."""
    import textwrap

    from PIL import ImageDraw, ImageFont

    side = max(128, min(384, max(picture.width for _, _, pictures in rows for picture in pictures)))
    left, head = 110, 40
    columns = min(6, max(len(pictures) for _, _, pictures in rows))
    grid = Image.new("RGB", (left + columns * (side + 8), len(rows) * (side + head)), "white")
    pen = ImageDraw.Draw(grid)
    for row, (title, captions, pictures) in enumerate(rows):
        y = row * (side + head)
        pen.multiline_text(
            (6, y + head + side // 3), "\n".join(textwrap.wrap(title, 14)), "black", ImageFont.load_default(14)
        )
        for column, (caption, picture) in enumerate(zip(captions[:columns], pictures)):
            x = left + column * (side + 8)
            lines = textwrap.wrap(caption, side // 6)[:2]
            pen.multiline_text((x, y + 8), "\n".join(lines), "grey", ImageFont.load_default(11))
            grid.paste(ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS), (x, y + head))
    return grid


class Validation:
    """The pictures that show a run: photos, rejected ones, and what is drawn before and after, from the same seeds.

    Attributes:
        prompts: captions of the photos, then the new contexts, with the token.
        base_prompts: the same with the initializer.
    """

    def __init__(
        self, photos: list[Photo], rejected: list[list[Image.Image]] | None, model, args, accelerator
    ) -> None:
        self.photos, self.args, self.accelerator = photos, args, accelerator
        contexts = [with_and_without_token(prompt, args) for prompt in choose_contexts(args)]
        self.prompts = [photo.caption for photo in photos[:6]] + [prompt for prompt, _ in contexts]
        self.base_prompts = [photo.base_caption for photo in photos[:6]] + [base for _, base in contexts]
        self.others = (DEMO / "measured_captions.txt").read_text().splitlines() if args.demo else []
        self.rows = [("photos", self.prompts, [photo.picture for photo in photos[:6]])]
        if rejected is not None:
            self.rows.append(("rejected", self.base_prompts, [row[0] for row in rejected[:6]]))
            if accelerator.is_main_process:
                pairs = [
                    (photo.name, [photo.caption] + [photo.base_caption] * len(row), [photo.picture, *row])
                    for photo, row in zip(photos, rejected)
                ]
                save_aside(Path(args.output_dir) / "winners_losers.png", draw_grid(pairs).save)
        self.before = self.draw(model, self.base_prompts + self.others)

    def draw(self, model, prompts: list[str]) -> list[Image.Image]:
        return draw_pictures(model, prompts, list(range(len(prompts))), self.args, self.accelerator)

    def save(self, step: int, model) -> str:
        """The grid of this step, in the output folder and in the trackers; returns the demo's figures."""
        args, done = self.args, step == self.args.max_train_steps
        after = self.draw(model, self.prompts + (self.others if done else []))
        unnamed = self.draw(model, self.base_prompts) if args.demo and done else []
        if not self.accelerator.is_main_process:
            return ""
        n, m = min(6, len(self.photos)), len(self.prompts)
        rows = [*self.rows, ("before", self.base_prompts, self.before[:n]), ("after", self.prompts, after[:n])]
        if m > n:
            rows.append(("new contexts, before", self.base_prompts[n:], self.before[n:m]))
            rows.append(("new contexts, after", self.prompts[n:], after[n:m]))
        if unnamed:
            rows.append(("after, without the token", self.base_prompts, unnamed[:n]))
        grid = draw_grid(rows)
        path = Path(args.output_dir) / ("before_after.png" if done else f"validation/{step}.png")
        path.parent.mkdir(exist_ok=True)
        save_aside(path, grid.save)
        log_grid(grid, step, self.accelerator)
        if not unnamed:
            return ""
        return judge_demo([photo.picture for photo in self.photos], self.others, self.before, after, unnamed)


def log_grid(grid: Image.Image, step: int, accelerator: Accelerator) -> None:
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"before_after": np.array(grid)[None]}, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"before_after": [grid]}, step)
        else:
            import trackio

            tracker.log({"before_after": trackio.Image(grid)}, step)


def choose_contexts(args: argparse.Namespace) -> list[str]:
    if args.validation_prompts is not None:
        return args.validation_prompts
    if args.token is None:
        return []
    places = ("a photo of {} on a beach", "{} in the snow", "a watercolor painting of {}", "{} wearing a red hat")
    return [place.format(args.token[0]) for place in places]


def judge_demo(photos: list, others: list[str], before: list, after: list, unnamed: list) -> str:
    """The demo's result in figures, each before and after training.

    Args:
        photos: n photos of the subject.
        others: captions that have nothing to do with it.
        before, after: pictures of the n captions, of m new contexts, and of `others`.
        unnamed: pictures of the n + m captions without the token, after training.
    """
    import pyarrow.parquet as pq

    from demo.style_judge import StyleJudge, palette, to_batch

    n, drawn = len(photos), len(unnamed)
    tables = [pq.read_table(DEMO / "pairs" / f"{split}.parquet") for split in ("train", "test")]
    files = [file for table in tables for side in ("jpg_0", "jpg_1") for file in table[side].to_pylist()]
    known = to_batch(photos + [decode_picture(file) for file in files]).flatten(1)

    def share_nearest_to_a_photo(pictures: list[Image.Image]) -> float:
        return (torch.cdist(to_batch(pictures).flatten(1), known).argmin(1) < n).float().mean().item()

    def colours(pictures: list[Image.Image]) -> torch.Tensor:
        histograms = palette((to_batch(pictures) + 1) / 2, 16)[:, :-1]  # the last bin is the white ground
        return (histograms / histograms.sum(1, keepdim=True)).sqrt()

    def similarity(pictures: list[Image.Image]) -> float:
        return (colours(pictures) @ colours(photos).T).mean().item()

    lines = [f"nearest = share of samples nearest, in pixels, to a photo, among {n} photos and {len(files)} drawings"]
    lines += ["palette = overlap of a sample's colours with a photo's (Bhattacharyya), mean over samples and photos"]
    lines += [f"          (of the photos with each other: {similarity(photos):.2f})"]
    for title, then, now in (
        ("captions of the photos", before[:n], after[:n]),
        ("new contexts", before[n:drawn], after[n:drawn]),
        ("both without the token", before[:drawn], unnamed),
    ):
        figures = (share_nearest_to_a_photo(then), share_nearest_to_a_photo(now), similarity(then), similarity(now))
        lines.append(
            "{}: nearest {:.0%} before, {:.0%} after; palette {:.2f} before, {:.2f} after".format(title, *figures)
        )
    kept = [StyleJudge.recognised_share(pictures[drawn:], others) for pictures in (before, after)]
    lines.append(
        f"{len(others)} other captions, nearest to a drawing of theirs: {kept[0]:.0%} before, {kept[1]:.0%} after"
    )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def save_weights(model, args: argparse.Namespace, accelerator: Accelerator) -> None:
    """LoRA and rows of tokens, in the files that diffusers' loaders read."""
    from diffusers import StableDiffusionXLPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    if not accelerator.is_main_process:
        return
    model, output_dir = unwrap(model, accelerator), Path(args.output_dir)
    layers = {name: get_peft_model_state_dict(module) for name, module in model.adapted.items()}
    StableDiffusionXLPipeline.save_lora_weights(
        output_dir / "tmp-lora",
        **{f"{name}_lora_layers": convert_state_dict_to_diffusers(found) for name, found in layers.items()},
        **_collate_lora_metadata(model.adapted),
    )
    os.replace(
        output_dir / "tmp-lora" / "pytorch_lora_weights.safetensors", output_dir / "pytorch_lora_weights.safetensors"
    )
    (output_dir / "tmp-lora").rmdir()
    if args.output_kohya_format:
        named = {f"{name}.{key}": layer for name, found in layers.items() for key, layer in found.items()}
        named = convert_state_dict_to_kohya(named)
        save_aside(output_dir / "pytorch_lora_weights_kohya.safetensors", lambda path: save_file(named, path))
    if model.tokens:
        rows = {key: tokens.rows.detach().cpu() for key, tokens in zip(("clip_l", "clip_g"), model.tokens)}
        save_aside(output_dir / "learned_embeds.safetensors", lambda path: save_file(rows, path))


def write_usage(prompt: str, args: argparse.Namespace) -> str:
    """Code that loads the results and draws `prompt`."""
    where = args.hub_model_id or args.output_dir
    file = f'"{where}/learned_embeds.safetensors"'
    if args.hub_model_id is not None:
        file = f'hf_hub_download("{where}", "learned_embeds.safetensors")'
    load_tokens = f"""
embeds = load_file({file})
pipeline.load_textual_inversion(
    list(embeds["clip_l"]), token={args.token}, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer
)
pipeline.load_textual_inversion(
    list(embeds["clip_g"]), token={args.token}, text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2
)"""
    lines = ["import torch", "from diffusers import StableDiffusionXLPipeline"]
    lines += ["from huggingface_hub import hf_hub_download"] if args.token and args.hub_model_id else []
    lines += ["from safetensors.torch import load_file"] if args.token else []
    return (
        "\n".join(lines)
        + f"""

pipeline = StableDiffusionXLPipeline.from_pretrained(
    "{args.pretrained_model_name_or_path}", dtype=torch.float16
).to("cuda")
pipeline.load_lora_weights("{where}"){load_tokens if args.token else ""}
picture = pipeline({prompt!r}, height={args.resolution}, width={args.resolution}).images[0]"""
    )


def save_model_card(prompt: str, result: str, args: argparse.Namespace) -> None:
    from huggingface_hub import ModelCard, ModelCardData

    settings = "\n".join(
        f"| `{name}` | `{value}` |" for name, value in public_settings(args).items() if name != "cache_dir"
    )
    title = Path(args.hub_model_id or args.output_dir).name
    started = "".join(f"- `{t}` started as `{w}`\n" for t, w in zip(args.token or (), args.initializer_token or ()))
    method = {"mapo": f"MaPO, beta {args.beta_mapo:g}", "dco": f"DCO, beta {args.beta_dco:g}"}.get(args.loss_type)
    measured = f"```\n{result}\n```" if result else ""
    description = f"""
# {title}

A LoRA of SDXL{f" and the token `{' '.join(args.token)}`" if args.token else ""}, learnt from a few photos with
[{method or "DreamBooth's loss"}](https://huggingface.co/papers/2406.06424).

- base model: `{args.pretrained_model_name_or_path}`
{started}
{measured}

![before and after](before_after.png)

![curves](curves.png)

```python
{write_usage(prompt, args)}
```

| setting | value |
|---|---|
{settings}
"""
    tags = ["stable-diffusion-xl", "text-to-image", "diffusers", "lora", "mapo", "dreambooth"]
    data = ModelCardData(
        base_model=args.pretrained_model_name_or_path,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        instance_prompt=prompt,
        tags=[*tags, "textual-inversion"] if args.token else tags,
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


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type in ("FSDP", "DEEPSPEED")


def prepare_data(model, photos: list[Photo], args: argparse.Namespace, accelerator: Accelerator) -> tuple:
    """The rejected pictures, found or drawn, the photos and them as latents, and the pictures before training."""
    rejected = None
    if uses_rejected(args):
        files = (
            find_rejected(photos, args) if args.rejected_data_dir else draw_rejected(photos, model, args, accelerator)
        )
        rejected = read_rejected(files)
    dataset = PhotoSet(photos, rejected, model.pipeline.vae, args, accelerator.device)
    return dataset, Validation(photos, rejected, model, args, accelerator)


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


def prepare_training(model, dataset: PhotoSet, checkpoint: Path | None, args, accelerator: Accelerator) -> tuple:
    """Model, optimizer, learning rate schedule, and the steps done, as the checkpoint has them."""
    from diffusers.optimization import get_scheduler

    optimizer = make_optimizer(model.parameter_groups(args), args)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)  # not prepared: accelerate would step it once per process
    accelerator.register_for_checkpointing(dataset)
    if checkpoint is None:
        return model, optimizer, lr_scheduler, 0
    accelerator.load_state(str(checkpoint))
    accelerator.step = 0  # of micro-batches: the checkpoint stands at a step's end, and accumulation may have changed
    logger.info(f"Resumed from {checkpoint}.")
    return model, optimizer, lr_scheduler, json.loads((checkpoint / "state.json").read_text())["step"]


def refresh_rejected(step: int, model, dataset: PhotoSet, args: argparse.Namespace, accelerator: Accelerator) -> None:
    """New rejected pictures, by the model as it is now, for the captions that it is trained on."""
    per_photo = range(args.num_rejected_per_image)
    which = [(i, j) for i in range(len(dataset.photos)) for j in per_photo]
    captions = [dataset.photos[i].caption for i, _ in which]
    pictures = draw_pictures(model, captions, [rejected_seed(step, i, j, args) for i, j in which], args, accelerator)
    rows = [pictures[i * len(per_photo) :][: len(per_photo)] for i in range(len(dataset.photos))]
    dataset.set_rejected(rows)
    if accelerator.is_main_process:
        path = Path(args.output_dir) / "rejected" / f"{step}.png"
        path.parent.mkdir(exist_ok=True)
        named = [(photo.name, [photo.caption] * len(row), row) for photo, row in zip(dataset.photos, rows)]
        save_aside(path, draw_grid(named).save)


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


@known_errors_end_in_one_line()
def main(args: argparse.Namespace) -> None:
    if args.demo and os.environ.get("RANK", "0") == "0":
        print(
            "Neither --pretrained_model_name_or_path nor --instance_data_dir is given: training the demo. For SDXL: "
            "accelerate launch train_dreambooth_lora_mapo_sdxl.py --instance_data_dir YOUR_PHOTOS --token '<dog>' "
            "--initializer_token dog --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 "
            "--mixed_precision bf16 --gradient_checkpointing"
        )
    started = time.perf_counter()
    accelerator = prepare_run(args)
    device, checkpoint = accelerator.device, find_checkpoint(args)
    photos = load_photos(args)
    check_tokens(photos, args)
    check_photos(photos, checkpoint, args, accelerator)
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = create_repository(args)

    weight_dtype = HALF_DTYPES.get(accelerator.mixed_precision, torch.float32)
    pipeline = load_frozen_models(args, device, weight_dtype)
    model, noise_scheduler = load_model(pipeline, args, accelerator)
    dataset, validation = prepare_data(model, photos, args, accelerator)
    model, optimizer, lr_scheduler, first_step = prepare_training(model, dataset, checkpoint, args, accelerator)
    if args.report_to != "none":
        accelerator.init_trackers("mapo", config={k: str(v) for k, v in public_settings(args).items()})

    log, signals, step = MetricsLog(first_step, args, accelerator), watch_signals(), first_step
    patience = args.max_nonfinite_steps + (20 if accelerator.scaler else 0)  # fp16 finds its scale by such steps
    logger.info(f"First step after {time.perf_counter() - started:.1f} s.")
    for positions in list_batches(first_step, args, accelerator):
        with accelerator.accumulate(model):
            loss, metrics = training_step(model, dataset.batch(positions), noise_scheduler, args, device)
            accelerator.backward(loss)
            log.add(metrics)
            skip = False
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                skip = not bool(grad_norm.isfinite())
            if not skip or accelerator.scaler is not None:  # fp16's scaler skips such a step and lowers its scale
                optimizer.step()
                unwrap(model, accelerator).restore_norms()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        lr_scheduler.step()
        log.end_step(step, grad_norm, lr_scheduler.get_last_lr()[0], skip)
        if args.refresh_rejected_steps and step % args.refresh_rejected_steps == 0 and step < args.max_train_steps:
            refresh_rejected(step, model, dataset, args, accelerator)
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
            validation.save(step, model)
    log.close()

    save_weights(model, args, accelerator)
    result = validation.save(args.max_train_steps, model)
    if accelerator.is_main_process:
        log.plot()
        prompt = validation.prompts[-1]
        save_model_card(prompt, result, args)
        if args.push_to_hub:
            push_to_hub(args)
        print(f"{result}\n\n{write_usage(prompt, args)}\n")
        picture = Path(args.output_dir) / "before_after.png"
        print(f"Done in {time.perf_counter() - started:.0f} s. Before and after: {picture}")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())

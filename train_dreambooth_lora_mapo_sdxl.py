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
#     "accelerate>=1.15.0",
#     "datasets>=5.2.0",  # the demo's figures read parquet
#     "diffusers>=0.42.0",
#     "matplotlib>=3.11.2",
#     "peft>=0.21.2",
#     "torch>=2.13.0",
#     "transformers>=5.23.0",
# ]
# ///
"""
Teaches SDXL a subject or a style from a few photos with MaPO (arXiv 2406.06424): a LoRA and a new token.

    accelerate launch train_dreambooth_lora_mapo_sdxl.py

teaches the small model of `demo/` the cat of `demo/subject`; with `--pretrained_model_name_or_path` and
`--instance_data_dir` it teaches yours.

The photos are chosen; images that the model generates for the same captions before training are rejected. For a photo
w, a rejected image l and the caption c with the new token, under one noise and one timestep,

    mapo         mse_w(c) - 1/beta * logsigmoid(T * (phi_beta(s * mse_w(c)) - phi_beta(s * mse_l(c))))      (eq. 5-7)
    dco          -logsigmoid(-beta * (mse_w(c) - mse_ref(c_base)))         (arXiv 2402.12004; ref: the LoRA disabled)
    dreambooth   mse_w(c)                                                                         (arXiv 2208.12242)

and with `--with_prior_preservation`, which keeps the class as it was, + weight * mse_l(c_base) to each of them. c_base
is the caption with the token's initializer in its place: "a photo of a <dog>", "a photo of a dog".

The code stands in the order in which it runs: Arguments, Models, Data, Encoding, Training (`training_step`),
Checkpoints, Validation, Results, Main. What is marked `# twin` is the same in train_diffusion_mapo_sdxl.py.

SDXL's pooling trap: text_encoder_2 has `eos_token_id: 2`, so transformers takes the pooled embedding at the largest
token id. That is the end of the text, but with an added token it is this token: the pooled embedding then knows
nothing of the words after it. StableDiffusionXLPipeline does the same, and training asks the pipeline itself for its
embeddings, so the two agree.

Departures from DCO's code, whose recipe the paper follows:
1. Each sample has its own logsigmoid; there, the mean is taken inside it, and the batch size changes the objective.
2. Only the rows of new tokens are parameters; there, the whole table has gradients and is restored after every step.
3. The rows are in fp32 whatever the precision; there, they do not move in fp16.
4. A resumed run continues with LoRA, rows and rejected images as they were; there, the LoRA starts again from zero.
"""

import argparse
import contextlib
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
import textwrap
import time
import uuid
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
    set_seed,
)
from huggingface_hub import ModelCard, ModelCardData, cached_assets_path, create_repo, upload_folder
from mapo_loss import mapo_loss
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm.auto import tqdm

import diffusers


logger = get_logger(__name__)

OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor", "prodigy")
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
# Packages that a choice needs.
PACKAGES = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt"}
PACKAGES |= {tracker: tracker for tracker in ("tensorboard", "wandb", "trackio")}


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
    below_one = partial(number, float, "[0, 1)")
    safeguard = lambda text: None if text == "off" else below_one(text)  # noqa: E731

    # Model
    add("--pretrained_model_name_or_path", help="SDXL on the hub, or a local folder in diffusers' format.")
    add("--pretrained_vae_model_name_or_path", help="Another VAE, on the hub or a local folder.")
    add("--revision", help="Revision of the model on the hub.")
    add("--variant", help="Variant of the model's files, such as fp16.")

    # Data
    add("--instance_data_dir", help="Folder of photos with captions (metadata.jsonl or NAME.txt), or DCO's JSON.")
    add("--instance_prompt", help="One caption for all photos.")
    add("--config_name", help="Which entry of DCO's JSON to use, where it has several.")
    add("--placeholder_token", nargs="+", help='New tokens, such as "<dog>"; without any, a style is learnt.')
    add("--initializer_token", nargs="+", help="For each new token, the word that it starts from.")
    add("--resolution", type=count, default=1024, help="Side of the training images, in pixels.")
    add("--cache_dir", help="Folder for downloads and for rejected images.")

    # Rejected images
    add("--num_rejected_per_image", type=count, default=4, help="Rejected images to generate for each photo.")
    add("--rejected_data_dir", help="Folder of your own rejected images: NAME-0.png, NAME-1.png, ... for photo NAME.")
    add("--refresh_rejected_steps", type=count, help="Generate new ones with the tuned model every N steps.")

    # Method
    add("--loss_type", choices=["mapo", "dco", "dreambooth"], default="mapo", help="See above.")
    add("--beta_mapo", type=positive, default=1024.0, help="beta of eq. 5-7.")
    add("--snr_value", type=positive, default=0.5, help="s of Appendix A, which scales the errors in the score.")
    add("--safeguard", type=safeguard, default="off", help="In [0, 1): damp the loser's gradient, a larger one more.")
    add("--beta_dco", type=positive, default=1000.0, help="beta of DCO's loss.")
    add("--with_prior_preservation", action="store_true", help="Keep the class: train on its rejected images too.")
    add("--prior_loss_weight", type=not_negative, default=1.0, help="Weight of --with_prior_preservation.")
    add("--noise_offset", type=not_negative, default=0.0, help="Scale of noise that a channel shares.")

    # LoRA
    add("--rank", type=count, default=32, help="Rank of the LoRA.")
    add("--lora_alpha", type=positive, help="The LoRA's scale is alpha / rank. Default: the rank.")
    add("--lora_dropout", type=below_one, default=0.0, help="With it, the result depends on the number of processes.")
    add("--lora_layers", default="to_k,to_q,to_v,to_out.0", help="Its layers; kohya's file has no conv_in, conv_out.")
    add("--train_text_encoder", action="store_true", help="Train a LoRA of both text encoders too.")
    add("--use_dora", action="store_true", help="Weight-decomposed LoRA.")
    add("--output_kohya_format", action="store_true", help="Write the LoRA a second time, for ComfyUI and A1111.")

    # Optimization
    add("--train_batch_size", type=count, help="Photos per process and forward pass. Default: the whole set in an "
        "update, in as many passes as 16 GB of memory need.")  # fmt: skip
    add("--gradient_accumulation_steps", type=count, default=1, help="Forward passes before each update.")
    add("--num_train_epochs", type=count, help="Passes over the photos, instead of --max_train_steps.")
    add("--max_train_steps", type=count, help="Updates. Default: 2000, or as many as --num_train_epochs takes.")
    add("--learning_rate", type=positive, help="Rate of the UNet's LoRA. Default: 5e-5; 1 for prodigy.")
    add("--text_encoder_lr", type=positive, help="Rate of tokens and text encoders. Default: 5e-6; 1 for prodigy.")
    add("--scale_lr", action="store_true", help="Multiply both rates by the photos in an update.")
    add("--lr_scheduler", default="constant", choices=SCHEDULES, help="How the rates change.")
    add("--lr_warmup_steps", type=whole, default=0, help="Updates in which the rates rise from 0.")
    add("--lr_num_cycles", type=count, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=positive, default=1.0, help="Power of polynomial.")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="Optimizer.")
    add("--use_8bit_adam", action="store_const", dest="optimizer", const="adamw_8bit", help="The same as adamw_8bit.")
    add("--adam_beta1", type=below_one, default=0.9, help="Decay of the mean of gradients.")
    add("--adam_beta2", type=below_one, default=0.999, help="Decay of the mean of squared gradients.")
    add("--adam_weight_decay", type=not_negative, default=1e-4, help="Decoupled weight decay.")
    add("--adam_epsilon", type=positive, default=1e-8, help="Added to Adam's denominator.")
    add("--max_grad_norm", type=positive, default=1.0, help="Norm to which longer gradients are clipped.")
    add("--max_nonfinite_steps", type=count, default=10, help="Stop after N steps in a row that aren't finite.")
    add("--seed", type=partial(number, int, "[0, 4294967295]"), default=0, help="Seed of everything random.")

    # Speed and memory
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: that of accelerate's configuration.")
    add("--gradient_checkpointing", action="store_true", help="Less memory for a third more compute.")
    add("--compile", action="store_true", help="Compile the blocks of the UNet.")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later.")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="xformers' attention, not torch's.")

    # Checkpoints and validation
    add("--output_dir", default="dreambooth-lora-mapo-sdxl", help="Folder of results and checkpoints.")
    add("--checkpointing_steps", type=count, default=500, help="Updates between checkpoints.")
    add("--checkpoints_total_limit", type=count, default=2, help="Keep only the newest N checkpoints.")
    add("--resume_from_checkpoint", help="Folder of a checkpoint, or `latest`.")
    add("--validation_steps", type=count, help="Generate images every N updates too, not only after training.")
    add("--validation_prompts", nargs="+", help="New contexts for the subject.")
    add("--guidance_scale", type=not_negative, default=5.0, help="Guidance scale of generated images.")
    add("--num_inference_steps", type=count, default=25, help="Denoising steps of generated images.")
    add("--sample_batch_size", type=count, default=4, help="Images to generate at once.")
    add("--skip_final_inference", action="store_true", help="Generate no images after training.")

    # Output
    add("--logging_dir", default="logs", help="Folder of the tracker's files, in --output_dir.")
    add("--report_to", choices=["none", "tensorboard", "wandb", "trackio"], default="none", help="Tracker.")
    add("--push_to_hub", action="store_true", help="Upload the results at the end.")
    add("--hub_model_id", help="Repository on the hub. Default: the name of --output_dir.")
    add("--hub_token", help="Default: that of `hf auth login`.")

    for action in parser._actions:
        if action.default not in (None, argparse.SUPPRESS) and not isinstance(action.default, bool):
            action.help += " Default: %(default)s."
    defaults, args = vars(parser.parse_args([])), parser.parse_args(input_args)
    demo = args.pretrained_model_name_or_path is None and args.instance_data_dir is None
    if demo and not (Path(__file__).resolve().parent / "demo").is_dir():
        parser.error("--pretrained_model_name_or_path and --instance_data_dir are needed: an SDXL model, and photos")
    if demo:
        from demo.settings import SUBJECT

        parser.set_defaults(**SUBJECT)  # what the user did name still counts
        args = parser.parse_args(input_args)
    args.demo, args.changed = demo, sorted(name for name, value in vars(args).items() if value != defaults[name])
    args.uses_rejected = args.loss_type == "mapo" or args.with_prior_preservation
    check_args(parser, args)
    check_folders(parser, args)
    for name, rate in (("learning_rate", 5e-5), ("text_encoder_lr", 5e-6)):
        if getattr(args, name) is None:
            setattr(args, name, 1.0 if args.optimizer == "prodigy" else rate)
    if args.max_train_steps is None and args.num_train_epochs is None:
        args.max_train_steps = 2000
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the run with one line where arguments don't go together."""
    for name in args.changed:
        if getattr(args, name) in ("", [""]):
            parser.error(f"--{name}: is empty")
    together = (("pretrained_model_name_or_path", "instance_data_dir"), ("placeholder_token", "initializer_token"))
    for names in together:
        given = [name for name in names if getattr(args, name) is not None]
        missing = [name for name in names if name not in given]
        if given and missing:
            parser.error(f"--{given[0]} needs --{missing[0]} too")
    for names, flag, given in (
        ("beta_mapo snr_value safeguard refresh_rejected_steps", "--loss_type mapo", args.loss_type == "mapo"),
        ("rejected_data_dir", "--loss_type mapo", args.uses_rejected),
        ("beta_dco", "--loss_type dco", args.loss_type == "dco"),
        ("prior_loss_weight", "--with_prior_preservation", args.with_prior_preservation),
        ("lr_num_cycles", "--lr_scheduler cosine_with_restarts", args.lr_scheduler == "cosine_with_restarts"),
        ("lr_power", "--lr_scheduler polynomial", args.lr_scheduler == "polynomial"),
        ("hub_model_id", "--push_to_hub", args.push_to_hub),
    ):
        for name in set(names.split()) & set(args.changed):
            if not given:  # it would do nothing
                parser.error(f"--{name} needs {flag} too")
    refresh = args.refresh_rejected_steps
    for flags, both in {
        "--use_dora and --output_kohya_format": args.use_dora and args.output_kohya_format,  # no loader reads it
        # The images of the class must show what it was, not what the subject is.
        "--refresh_rejected_steps and --with_prior_preservation": refresh and args.with_prior_preservation,
        # accelerate's configuration of wandb would carry the token to wandb's servers.
        "--hub_token and --report_to wandb": args.hub_token and args.report_to == "wandb",
    }.items():
        if both:
            parser.error(f"{flags} exclude each other")
    for flag in ("optimizer", "report_to"):
        package = PACKAGES.get(getattr(args, flag))
        if package is not None and importlib.util.find_spec(package) is None:
            parser.error(f"--{flag} {getattr(args, flag)} needs a package: pip install {package}")
    if args.resolution % 8:
        parser.error(f"--resolution {args.resolution}: must be a multiple of 8; try {-(-args.resolution // 8) * 8}")
    if args.lr_warmup_steps > (args.max_train_steps or math.inf):
        parser.error(f"--lr_warmup_steps {args.lr_warmup_steps}: more than --max_train_steps {args.max_train_steps}")


def check_folders(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the run with one line where a folder isn't there, or something in it would be overwritten."""
    for name in ("instance_data_dir", "rejected_data_dir"):
        if getattr(args, name) is not None and not Path(getattr(args, name)).exists():
            parser.error(f"--{name} {getattr(args, name)}: no such folder")
    output_dir = Path(args.output_dir).resolve()
    read = (args.pretrained_model_name_or_path, args.instance_data_dir, Path(__file__).parent)
    if output_dir in [Path(source).resolve() for source in read if source is not None]:
        parser.error(f"--output_dir {output_dir}: holds what the run reads; name another folder")
    if args.resume_from_checkpoint is None:  # the demo may be run again
        for result in ("checkpoint-*/state.json", "*.safetensors")[: 1 if args.demo else 2]:
            if found := sorted(output_dir.glob(result)):
                holds = f"holds {found[-1].relative_to(output_dir)} of an earlier run"
                remedy = "go on with --resume_from_checkpoint latest, or name another folder"
                parser.error(f"--output_dir {output_dir}: {holds}; {remedy}")


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


# ---- Models ---------------------------------------------------------------------------------------------------------

# What --mixed_precision computes in; without it, fp32.
HALF_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def check_tokens(photos: list, args: argparse.Namespace) -> None:
    """Ends the run where a new token exists already or an initializer isn't one token; loads the tokenizers only."""
    name, hub = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    with blame("pretrained_model_name_or_path", name):
        diffusers.DiffusionPipeline.load_config(name, **hub)  # a missing model's tokenizers may load, and be empty
        parts = ("tokenizer", "tokenizer_2")
        tokenizers = {part: transformers.CLIPTokenizer.from_pretrained(name, subfolder=part, **hub) for part in parts}
    tokens = args.placeholder_token or []
    for part, tokenizer in tokenizers.items():
        for token in tokens:
            if len(tokenizer.tokenize(token)) == 1:
                fail(f"--placeholder_token {token}: {part} has it already; choose a new one, such as <{token}-1>")
        for word in args.initializer_token or []:
            pieces = tokenizer.tokenize(word)
            if len(pieces) != 1:
                fail(f"--initializer_token {word}: is {len(pieces)} tokens, {' '.join(pieces)}; choose a simpler word")
        tokenizer.add_tokens(tokens)
    for photo in photos:
        length = max(len(tokenizer(photo.caption).input_ids) for tokenizer in tokenizers.values())
        limit = min(tokenizer.model_max_length for tokenizer in tokenizers.values())
        if length > limit:
            logger.warning(f"The caption of {photo.name} has {length - 2} tokens; only the first {limit - 2} count.")


def load_models(args: argparse.Namespace, accelerator: Accelerator) -> tuple:
    """The model with all that is trained, and the noise scheduler, whose prediction type decides what it predicts."""
    options = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
    if (vae_name := args.pretrained_vae_model_name_or_path) is not None:
        with blame("pretrained_vae_model_name_or_path", vae_name):
            fp32 = {"cache_dir": args.cache_dir, "dtype": torch.float32}
            options["vae"] = diffusers.AutoencoderKL.from_pretrained(vae_name, **fp32)
    # The frozen weights may be as short as the computation; not the VAE's, as SDXL's own overflows in fp16.
    options["dtype"] = {"vae": torch.float32, "default": HALF_DTYPES.get(accelerator.mixed_precision, torch.float32)}
    name = args.pretrained_model_name_or_path
    with blame("pretrained_model_name_or_path", name):
        pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(name, add_watermarker=False, **options)
    noise_scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    if noise_scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        fail(f"{name}: it predicts {noise_scheduler.config.prediction_type}; needs epsilon or v_prediction")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(accelerator.device)
    pipeline.vae.to(memory_format=torch.channels_last)  # faster for convolutions of few channels
    model = PersonalizedModel(pipeline, args)
    if args.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        with blame("enable_xformers_memory_efficient_attention", ""):
            model.unet.enable_xformers_memory_efficient_attention()
    if args.compile:
        model.unet.compile_repeated_blocks(fullgraph=True)
    return model.to(accelerator.device).train(), noise_scheduler


class PersonalizedModel(torch.nn.Module):
    """UNet and text encoders as one module, so that one call of accelerate prepares all that is trained.

    Attributes:
        pipeline: shares them and makes the embeddings as at inference. With its `disable_lora` this is the starting
            model, bit for bit, as long as no caption has a new token.
        fingerprint: hash of the weights that generate the rejected images, before anything was added to them.
        adapted: the parts that have a LoRA, by their names in the pipeline.
        tokens: the new rows of both text encoders, or nothing.
    """

    def __init__(self, pipeline, args: argparse.Namespace) -> None:
        super().__init__()
        self.pipeline, self.unet = pipeline, pipeline.unet
        self.text_encoder, self.text_encoder_2 = pipeline.text_encoder, pipeline.text_encoder_2
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
            module.requires_grad_(False).eval()
        generated = args.uses_rejected and args.rejected_data_dir is None
        self.fingerprint = hash_of(self.unet, self.text_encoder, self.text_encoder_2) if generated else None

        add_lora(self.unet, args, target_modules=[layer.strip() for layer in args.lora_layers.split(",")])
        self.adapted = {"unet": self.unet}
        if args.train_text_encoder:
            attention = ["q_proj", "k_proj", "v_proj", "out_proj"]
            # SDXL takes the first encoder's last hidden state but one: its last layer would never have a gradient,
            # and DDP waits for one.
            used = list(range(self.text_encoder.config.num_hidden_layers - 1))
            add_lora(self.text_encoder, args, target_modules=attention, layers_to_transform=used)
            add_lora(self.text_encoder_2, args, target_modules=attention)
            self.adapted |= {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}

        self.tokens = []
        encoders = ((pipeline.tokenizer, self.text_encoder), (pipeline.tokenizer_2, self.text_encoder_2))
        for tokenizer, text_encoder in encoders if args.placeholder_token is not None else ():
            pieces = [tokenizer.tokenize(word)[0] for word in args.initializer_token]
            initializers, first = tokenizer.convert_tokens_to_ids(pieces), len(tokenizer)
            tokenizer.add_tokens(args.placeholder_token)  # as `load_textual_inversion` does
            self.tokens.append(TokenEmbedding(text_encoder.get_input_embeddings(), first, initializers))
            text_encoder.set_input_embeddings(self.tokens[-1])

    def forward(self, noisy_latents, timesteps, captions: list[str], time_ids) -> torch.Tensor:
        """Predictions for B latents and their captions. Shape: (B, C, h, w)"""
        once, device = list(dict.fromkeys(captions)), noisy_latents.device  # winners and losers share theirs
        embeds, _, pooled, _ = self.pipeline.encode_prompt(once, device=device, do_classifier_free_guidance=False)
        if self.pipeline.config.force_zeros_for_empty_prompt:  # as at inference
            kept = torch.tensor([caption != "" for caption in once], device=device)
            embeds, pooled = embeds * kept[:, None, None], pooled * kept[:, None]
        rows = torch.tensor([once.index(caption) for caption in captions], device=device)
        added_cond_kwargs = {"text_embeds": pooled.float()[rows], "time_ids": time_ids}
        return self.unet(noisy_latents, timesteps, embeds.float()[rows], added_cond_kwargs=added_cond_kwargs).sample

    @torch.no_grad()
    def restore_norms(self) -> None:
        """Scales each new row to the norm that it started with, as DCO does after every optimizer step."""
        for tokens in self.tokens:
            tokens.rows.mul_(tokens.norms / tokens.rows.norm(dim=1, keepdim=True))


def add_lora(module, args: argparse.Namespace, target_modules: list[str], **options) -> None:
    """Adds a LoRA in fp32 to layers of the UNet or of a text encoder."""
    with blame("lora_layers", args.lora_layers):
        for layer in target_modules:  # peft passes over a name that fits nothing, where another one fits
            if not any(f".{name}".endswith(f".{layer}") for name, _ in module.named_modules() if layer):
                raise ValueError(f"the UNet has no layer {layer!r}")
        config = LoraConfig(
            r=args.rank,
            lora_alpha=args.lora_alpha or args.rank,
            lora_dropout=args.lora_dropout,
            init_lora_weights="gaussian",
            target_modules=target_modules,
            use_dora=args.use_dora,
            **options,
        )
        module.add_adapter(config)
    diffusers.training_utils.cast_training_params(module, dtype=torch.float32)


class TokenEmbedding(torch.nn.Module):
    """A text encoder's frozen table and, from id `first` on, rows for new tokens: the only parameters that train, in
    fp32. They start as the rows of `initializers`. Shape: (n, D)"""

    def __init__(self, table: torch.nn.Embedding, first: int, initializers: list[int]) -> None:
        super().__init__()
        self.table, self.first = table, first
        self.rows = torch.nn.Parameter(table.weight.detach()[initializers].float())
        self.register_buffer("norms", self.rows.detach().norm(dim=1, keepdim=True), persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        old = self.table(input_ids.clamp(max=self.first - 1))
        new = self.rows[(input_ids - self.first).clamp(min=0)].to(old.dtype)
        return torch.where((input_ids >= self.first)[..., None], new, old)


# ---- Data -----------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


class Photo(NamedTuple):
    name: str
    image: Image.Image
    caption: str  # with the tokens
    base_caption: str  # with their initializers


def load_photos(args: argparse.Namespace) -> list[Photo]:
    """The photos of --instance_data_dir with their captions. The tokens may come from DCO's JSON; fills in
    --validation_prompts, which need them."""
    path = Path(args.instance_data_dir)
    listed = list_config(path, args) if path.is_file() else list_folder(path, args)
    if not listed:
        fail(f"--instance_data_dir {path}: no photo in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
    tokens, words = args.placeholder_token or [], args.initializer_token or []
    if len(tokens) != len(words):
        fail(f"--initializer_token: {len(words)} for {len(tokens)} of --placeholder_token; each token needs one")
    for value in (*tokens, *words):
        if not re.fullmatch(r"\S+", value):
            fail(f"--placeholder_token, --initializer_token: {value!r} must be one word")
    for token in tokens:
        if [other for other in tokens if token in other] != [token]:
            fail(f"--placeholder_token {token}: stands twice, or is part of another; name them apart")
    if args.validation_prompts is None:
        places = ("a photo of {} on a beach", "{} in the snow", "a watercolor painting of {}", "{} wearing a red hat")
        args.validation_prompts = [place.format(token) for token in tokens[:1] for place in places]
    photos = []
    for file, caption, base_caption in listed:
        if base_caption is None:
            caption, base_caption = with_and_without_token(caption, args)
        if tokens and not any(token in caption for token in tokens):
            fail(f"--instance_data_dir: {file}'s caption, {caption!r}, has none of {', '.join((*tokens, *words))}")
        with blame("instance_data_dir", f"{file} can't be read"):
            photos.append(Photo(file.stem, decode_image(file), caption, base_caption))
    names = [photo.name for photo in photos]
    if twice := [name for name in names if names.count(name) > 1]:
        fail(f"--instance_data_dir {path}: two photos are named {twice[0]}; rename one, as rejected ones go by name")
    return photos


def list_folder(path: Path, args: argparse.Namespace) -> list[tuple]:
    """(file, caption, None) of each photo in a folder."""
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    known = {*IMAGE_SUFFIXES, ".txt", ".jsonl"}
    others = [p.name for p in path.iterdir() if p.suffix.lower() not in known and p.is_file() and p.name[0] != "."]
    if others:  # a phone's .heic
        logger.warning(f"{path}: not read as photos: {', '.join(sorted(others))}")
    if args.instance_prompt is not None:
        captions = dict.fromkeys(files, args.instance_prompt)
    elif (path / "metadata.jsonl").is_file():
        captions = {}
        for i, line in enumerate((path / "metadata.jsonl").read_text(encoding="utf-8-sig").splitlines(), 1):
            if line.strip():
                with blame("instance_data_dir", f"{path}/metadata.jsonl, line {i}: needs file_name and text"):
                    row = json.loads(line)
                    captions[path / row["file_name"]] = row["text"]
        files = list(captions)
    else:
        captions = {file: file.with_suffix(".txt") for file in files if file.with_suffix(".txt").is_file()}
        captions = {file: text.read_text(encoding="utf-8-sig") for file, text in captions.items()}
    for file in files:
        if not isinstance(captions.get(file), str) or not captions[file].strip():
            fail(f"--instance_data_dir: {file} has no caption in metadata.jsonl, {file.stem}.txt or --instance_prompt")
    return [(file, captions[file].strip(), None) for file in files]


def list_config(path: Path, args: argparse.Namespace) -> list[tuple]:
    """(file, caption, base caption or None) of each photo in DCO's JSON, which may name the tokens too."""
    with blame("instance_data_dir", f"{path}: no JSON with the lists images and prompts, see --config_name"):
        config = json.loads(path.read_text(encoding="utf-8-sig"))
        if args.config_name is not None:
            config = config[args.config_name]
        elif "images" not in config and len(config) == 1:
            (config,) = config.values()
        images, prompts = list(map(str, config["images"])), list(map(str, config["prompts"]))
    bases = config.get("base_prompts") or [None] * len(images)
    if not len(images) == len(prompts) == len(bases):
        counts = f"{len(images)} images, {len(prompts)} prompts, {len(bases)} base_prompts"
        fail(f"--instance_data_dir {path}: {counts}; must be as many")
    if args.placeholder_token is None and config.get("inserting_tokens"):
        args.placeholder_token, args.initializer_token = config["inserting_tokens"], config.get("initializer_tokens")
    files = [Path(image) if Path(image).is_file() else path.parent / image for image in images]
    return list(zip(files, prompts, bases))


def with_and_without_token(caption: str, args: argparse.Namespace) -> tuple[str, str]:
    """The caption with the tokens and the one with their initializers, from either; twice the same from neither."""
    if args.placeholder_token is None:
        return caption, caption
    words = dict(zip(args.placeholder_token, args.initializer_token))
    if any(token in caption for token in words):
        base_caption = caption
        for token, word in words.items():
            base_caption = base_caption.replace(token, word)
        return caption, base_caption
    tokens = {word.lower(): token for token, word in reversed(words.items())}
    pattern = "|".join(re.escape(word) for word in tokens)
    return re.sub(rf"\b({pattern})\b", lambda m: tokens[m[0].lower()], caption, flags=re.IGNORECASE), caption


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


def prepare_image(image: Image.Image, resolution: int) -> tuple[torch.Tensor, list[int]]:
    """Resizes the shorter side to `resolution` and crops the centre. Returns the pixels, uint8, Shape: (3, R, R), and
    SDXL's micro-conditioning: original size, crop, target size."""
    width, height = image.size
    side, scale = min(width, height), resolution / min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # Only the crop is resized: a thin image would take all memory.
    box = (left, top, left + side, top + side)
    cropped = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box)
    pixels = torch.from_numpy(np.asarray(cropped).copy()).permute(2, 0, 1)
    return pixels, [height, width, int(top * scale), int(left * scale), resolution, resolution]


def save_aside(path: Path, save) -> None:  # twin
    """`save(path)` under another name first: a kill leaves no half file, and two runs may save the same at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"tmp-{uuid.uuid4().hex}-{path.name}")
    save(aside)
    os.replace(aside, path)


def find_rejected(photos: list[Photo], args: argparse.Namespace) -> list[list[Image.Image]]:
    """As many of the images in --rejected_data_dir for each photo as --num_rejected_per_image asks for."""
    folder, needed, found = Path(args.rejected_data_dir), args.num_rejected_per_image, []
    for photo in photos:
        pattern = re.compile(re.escape(photo.name) + r"-\d+")
        files = sorted(p for p in folder.iterdir() if pattern.fullmatch(p.stem) and p.suffix.lower() in IMAGE_SUFFIXES)
        if len(files) < needed:
            short = f"{len(files)} images {photo.name}-NUMBER for photo {photo.name}, needs {needed}"
            fail(f"--rejected_data_dir {folder}: {short}; add some, or lower --num_rejected_per_image")
        with blame("rejected_data_dir", f"{folder}, images of {photo.name}"):
            found.append([decode_image(file) for file in files[:needed]])
    return found


def generate_rejected(step: int, photos: list[Photo], model, args, accelerator: Accelerator) -> list[list]:
    """The rejected images of each photo: at first what the starting model generates for the base captions, kept in the
    cache, later what the tuned model generates for the captions. From fixed seeds, where the folder has none."""
    pipeline = accelerator.unwrap_model(model).pipeline
    if step == 0:
        captions = [photo.base_caption for photo in photos]
        made_by = (accelerator.unwrap_model(model).fingerprint, dict(pipeline.scheduler.config))
        made_by += (accelerator.mixed_precision, args.pretrained_vae_model_name_or_path, args.resolution)
        made_by += (args.guidance_scale, args.num_inference_steps, args.seed)
        name = hash_of(*made_by, [photo.name for photo in photos], captions)
        folder = cached_assets_path("mapo", f"rejected-{name}", assets_dir=args.cache_dir)
        pipeline.disable_lora()
    else:
        captions, folder = [photo.caption for photo in photos], Path(args.output_dir) / "rejected" / str(step)
        if accelerator.is_main_process:  # a run that was killed may have left images of this step
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        accelerator.wait_for_everyone()
    files = [[folder / f"{photo.name}-{j}.png" for j in range(args.num_rejected_per_image)] for photo in photos]
    missing = [(i, j) for i, row in enumerate(files) for j, file in enumerate(row) if not file.exists()]
    accelerator.wait_for_everyone()  # all have looked before any writes
    size = args.sample_batch_size * accelerator.num_processes
    hidden = not missing or not accelerator.is_main_process
    for start in tqdm(range(0, len(missing), size), desc="Rejected images", leave=False, disable=hidden):
        chunk = missing[start : start + size]
        seeds = [int(np.random.SeedSequence((args.seed, step, i, j)).generate_state(1)[0]) for i, j in chunk]
        images = generate_images(model, [captions[i] for i, _ in chunk], seeds, args, accelerator)
        for (i, j), image in zip(chunk, images):
            if accelerator.is_main_process:
                save_aside(files[i][j], image.save)
    pipeline.enable_lora()
    accelerator.wait_for_everyone()
    return [[decode_image(file) for file in row] for row in files]


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


class PhotoSet(torch.nn.Module):
    """What training steps take, by position in the run; photos are shuffled anew in each epoch, by seed. A module, so
    that checkpoints keep its buffer: the rejected images change with --refresh_rejected_steps.

    Attributes:
        latents: Shape: (N, C, h, w), fp32, on the CPU
        rejected: latents of R rejected images per photo. Shape: (N, R, C, h, w), R may be 0
        time_ids: SDXL's micro-conditioning of each photo, also for its rejected images. Shape: (N, 6)
    """

    def __init__(self, photos: list[Photo], args: argparse.Namespace) -> None:
        super().__init__()
        self.photos, self.seed, self.resolution = photos, args.seed, args.resolution
        self.register_buffer("rejected", torch.empty(len(photos), 0))

    @torch.no_grad()
    def encode(self, rejected: list[list[Image.Image]], vae, device: torch.device) -> None:
        """Photos and rejected images to latents; the VAE is not on the device while training."""
        vae.to(device)
        images = [photo.image for photo in self.photos] + sum(rejected, [])
        prepared = [prepare_image(image, self.resolution) for image in images]
        latents = encode_pixels(torch.stack([pixels for pixels, _ in prepared]), vae).cpu()
        vae.to("cpu")
        n = len(self.photos)
        self.latents, self.time_ids = latents[:n], torch.tensor([ids for _, ids in prepared[:n]], dtype=torch.float32)
        if rejected:
            self.rejected = latents[n:].unflatten(0, (n, -1))

    def batch(self, positions: range) -> dict:
        """What `training_step` takes: B photos, each with one of its rejected images at random."""
        rows = []
        for position in positions:
            epoch, i = divmod(position, len(self.photos))
            rows.append(np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.photos))[i])
        batch = {"latents": self.latents[rows], "time_ids": self.time_ids[rows], "position": torch.tensor(positions)}
        batch["captions"] = [self.photos[i].caption for i in rows]
        batch["base_captions"] = [self.photos[i].base_caption for i in rows]
        if (count := self.rejected.shape[1]) > 0:
            batch["rejected"] = self.rejected[
                rows, [np.random.default_rng((self.seed, 3, position)).integers(count) for position in positions]
            ]
        return batch


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


def training_step(model, batch: dict, noise_scheduler, args: argparse.Namespace, accelerator: Accelerator) -> tuple:
    """Loss of a batch of B photos, and its metrics, which stay on the device."""
    num_timesteps, device = noise_scheduler.config.num_train_timesteps, accelerator.device
    latents, captions = batch["latents"].to(device), batch["captions"]
    b, shape = len(captions), latents.shape[1:]
    if args.loss_type == "mapo":  # winners, then losers with the winners' captions
        latents, captions = torch.cat([latents, batch["rejected"].to(device)]), captions + captions
    if args.with_prior_preservation:  # last, the images of the class
        latents, captions = torch.cat([latents, batch["rejected"].to(device)]), captions + batch["base_captions"]
    # All samples of a photo share noise, timestep and micro-conditioning.
    repeats = len(latents) // b
    noise, timesteps = sample_noise(batch["position"], shape, num_timesteps, args.noise_offset, args.seed, device)
    noise, timesteps = noise.repeat(repeats, 1, 1, 1), timesteps.repeat(repeats)
    time_ids = batch["time_ids"].to(device).repeat(repeats, 1)

    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    model_pred = model(noisy_latents, timesteps, captions, time_ids)  # (b, 2b or 3b, C, h, w)
    if noise_scheduler.config.prediction_type == "epsilon":
        target = noise
    else:
        target = noise_scheduler.get_velocity(latents, noise, timesteps)

    mse = (model_pred.float() - target.float()).square().flatten(1).mean(1)  # (b, 2b or 3b,)
    if args.loss_type == "mapo":
        options = (args.beta_mapo, args.snr_value, num_timesteps, args.safeguard)
        result = mapo_loss(model_pred[: 2 * b], target[: 2 * b], *options)._asdict()
    elif args.loss_type == "dco":
        pipeline = accelerator.unwrap_model(model).pipeline
        pipeline.disable_lora()
        with torch.no_grad():
            ref_pred = model(noisy_latents[:b], timesteps[:b], batch["base_captions"], time_ids[:b])
        pipeline.enable_lora()
        mse_ref = (ref_pred.float() - target[:b].float()).square().flatten(1).mean(1)  # (b,)
        margin = mse_ref - mse[:b]
        loss = -F.logsigmoid(args.beta_dco * margin).mean()
        result = {"loss": loss, "mse_w": mse[:b], "mse_ref": mse_ref, "margin": margin, "accuracy": margin > 0}
    else:
        result = {"loss": mse[:b].mean(), "mse_w": mse[:b]}
    if args.with_prior_preservation:
        result["mse_prior"] = mse[-b:]
        result["loss"] = result["loss"] + args.prior_loss_weight * mse[-b:].mean()
    return result["loss"], {name: value.detach().float().mean() for name, value in result.items()}


def accumulate_gradients(
    step: int, photos_per_step: int, model, dataset: PhotoSet, noise_scheduler, args, accelerator: Accelerator
) -> dict[str, torch.Tensor]:
    """Gradients and metrics, means over the photos of a step, in passes of --train_batch_size. Which photos are those
    of the step does not depend on the number of processes, nor on that of passes."""
    first = ((step - 1) * accelerator.num_processes + accelerator.process_index) * photos_per_step
    positions = range(first, first + photos_per_step)
    batches = [positions[i : i + args.train_batch_size] for i in range(0, photos_per_step, args.train_batch_size)]
    means = {}
    for batch in batches:
        with contextlib.nullcontext() if batch is batches[-1] else accelerator.no_sync(model):
            loss, metrics = training_step(model, dataset.batch(batch), noise_scheduler, args, accelerator)
            weight = len(batch) / photos_per_step  # the last may be smaller
            accelerator.backward(weight * loss)
        means = {name: means.get(name, 0) + weight * value for name, value in metrics.items()}
    return means


def make_optimizer(model: PersonalizedModel, scale: float, args: argparse.Namespace) -> torch.optim.Optimizer:
    encoders = torch.nn.ModuleList([model.text_encoder, model.text_encoder_2])
    groups = ((model.unet, args.learning_rate), (encoders, args.text_encoder_lr))
    groups = [{"params": [p for p in m.parameters() if p.requires_grad], "lr": scale * rate} for m, rate in groups]
    groups = [group for group in groups if group["params"]]
    decay = {"lr": args.learning_rate, "weight_decay": args.adam_weight_decay}
    options = decay | {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optimizer == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **options)
    if args.optimizer == "adafactor":
        return transformers.Adafactor(groups, **decay, scale_parameter=False, relative_step=False)
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(groups, **options, safeguard_warmup=True, use_bias_correction=True)
    return torch.optim.AdamW(groups, **options, fused=True)


# ---- Checkpoints ----------------------------------------------------------------------------------------------------
def list_checkpoints(output_dir: Path) -> list[Path]:  # twin
    """Oldest first. `state.json` is written last and deleted first: a folder with it is whole."""
    found = output_dir.glob("checkpoint-*/state.json")
    return [file.parent for file in sorted(found, key=lambda file: json.loads(file.read_text())["step"])]


# What may change when a run is resumed. The photos may move, but must be the same.
FREE_SETTINGS = frozenset(
    "output_dir cache_dir logging_dir instance_data_dir config_name rejected_data_dir demo changed max_train_steps "
    "num_train_epochs max_nonfinite_steps train_batch_size gradient_accumulation_steps gradient_checkpointing compile "
    "allow_tf32 enable_xformers_memory_efficient_attention output_kohya_format checkpointing_steps "
    "checkpoints_total_limit resume_from_checkpoint validation_prompts validation_steps skip_final_inference "
    "sample_batch_size report_to push_to_hub hub_model_id hub_token".split()
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
    """Writes what is measured to metrics.jsonl, the trackers and the progress bar. `history` has one record per step,
    those before a resumption too."""

    def __init__(self, state: dict, args: argparse.Namespace, accelerator: Accelerator) -> None:
        self.accelerator, self.path = accelerator, Path(args.output_dir) / "metrics.jsonl"
        self.history, self.skipped_in_a_row = state["history"], 0
        if accelerator.is_main_process:
            self.path.write_text("".join(f"{json.dumps(record)}\n" for record in self.history))
        hidden = not accelerator.is_main_process
        self.bar = tqdm(total=args.max_train_steps, initial=state["step"], desc="Training", disable=hidden)
        self.clock = time.perf_counter()

    def end_step(self, step: int, metrics: dict, learning_rate: float, photos: int, stop: bool) -> bool:
        """Writes the means over processes; returns whether any process wants to stop."""
        flag = torch.tensor(float(stop), device=self.accelerator.device)
        values = torch.stack([value.float() for value in (*metrics.values(), flag)])
        *values, stop = self.accelerator.reduce(values, "mean").tolist()
        record, now = {"step": step, **dict(zip(metrics, values)), "learning_rate": learning_rate}, time.perf_counter()
        skipped = not math.isfinite(record["grad_norm"])
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if skipped:
            logger.info(f"Step {step} is skipped: its loss or gradient isn't finite.")
        record |= {"skipped": int(skipped), "photos_per_second": photos / (now - self.clock)}
        if self.accelerator.device.type == "cuda":
            record["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.clock = now
        # JSON has no NaN and no infinity: null.
        self.history.append({name: value if math.isfinite(value) else None for name, value in record.items()})
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(f"{json.dumps(self.history[-1])}\n")
        numbers = {name: value for name, value in self.history[-1].items() if value is not None}
        self.accelerator.log({name: value for name, value in numbers.items() if name != "step"}, step=step)
        names = ("loss", "mse_w", "margin", "accuracy", "margin_weight", "photos_per_second")
        self.bar.set_postfix({name: f"{numbers[name]:.3g}" for name in names if name in numbers}, refresh=False)
        self.bar.update()
        return stop > 0


def plot_curves(history: list[dict], path: Path) -> None:
    """What the loss is made of, over the steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = ("loss", "mse_w", "mse_l", "mse_ref", "mse_prior", "margin", "margin_weight", "accuracy", "grad_norm")
    names = [name for name in names if name in history[0]][:8]
    figure = Figure(figsize=(18, 6), layout="constrained")
    figure.suptitle("Strong: running mean of 5 % of the points.", fontsize=10)
    for i, name in enumerate(names, 1):
        axis = figure.add_subplot(2, 4, i, title=name, xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        steps, values = np.array([(r["step"], r[name]) for r in history if r[name] is not None] or [(0, 0)]).T
        window = max(1, len(steps) // 20)
        axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
        axis.plot(steps[window - 1 :], np.convolve(values, np.ones(window) / window, "valid"), color="tab:blue")
    figure.savefig(path, dpi=100)


# ---- Validation -----------------------------------------------------------------------------------------------------
@torch.no_grad()
def generate_images(model, prompts: list[str], seeds: list[int], args, accelerator: Accelerator) -> list[Image.Image]:
    """One image per prompt and seed, by the model as it is now; split over processes."""
    model, count, images = accelerator.unwrap_model(model), len(prompts), []
    pipeline = model.pipeline
    model.eval()
    pipeline.vae.to(accelerator.device)
    mine = range(accelerator.process_index, count, accelerator.num_processes)
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
        images += list(zip(chunk, pipeline.image_processor.postprocess(decoded)))
    pipeline.vae.to("cpu")
    model.train()
    return [image for _, image in sorted(gather_object(images), key=lambda pair: pair[0])]


def make_grid(rows: list[tuple[str, list[str], list[Image.Image]]]) -> Image.Image:
    """Rows of images, each with a title on the left and its captions above the images; at most 6 in a row."""
    from matplotlib import font_manager

    file = font_manager.findfont("DejaVu Sans")  # PIL's own font has no accents
    small, large = ImageFont.truetype(file, 11), ImageFont.truetype(file, 13)
    side = max(128, min(384, max(image.width for _, _, images in rows for image in images)))
    left, head = 110, 40
    columns = min(6, max(len(images) for _, _, images in rows))
    grid = Image.new("RGB", (left + columns * (side + 8), len(rows) * (side + head)), "white")
    pen = ImageDraw.Draw(grid)
    for row, (title, captions, images) in enumerate(rows):
        y = row * (side + head)
        pen.multiline_text((6, y + head + side // 3), "\n".join(textwrap.wrap(title, 13)), "black", large)
        for column, (caption, image) in enumerate(zip(captions[:columns], images)):
            x = left + column * (side + 8)
            pen.multiline_text((x, y + 8), "\n".join(textwrap.wrap(caption, side // 7)[:2]), "grey", small)
            grid.paste(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS), (x, y + head))
    return grid


def log_validation(
    step: int, model, photos: list[Photo], rejected: list[list], before: list, args, accelerator: Accelerator
) -> list[Image.Image]:
    """A grid of photos, rejected images, and images of the photos' captions and of --validation_prompts before and
    after training, in the output folder and in the trackers; returns the last row, the new contexts. `before` is
    filled when first shown: with the LoRA disabled, for captions without tokens."""
    shown = photos[:6]
    captions = [(photo.caption, photo.base_caption) for photo in shown]
    captions += [with_and_without_token(prompt, args) for prompt in args.validation_prompts]
    prompts, base_prompts = map(list, zip(*captions))
    n, seeds = len(shown), list(range(len(prompts)))
    if not before:
        pipeline = accelerator.unwrap_model(model).pipeline
        pipeline.disable_lora()
        before += generate_images(model, base_prompts, seeds, args, accelerator)
        pipeline.enable_lora()
    after = generate_images(model, prompts, seeds, args, accelerator)
    if not accelerator.is_main_process:
        return []
    rows = [("photos", prompts, [photo.image for photo in shown])]
    if rejected:
        rows.append(("rejected", base_prompts, [row[0] for row in rejected[:n]]))
    rows += [("before", base_prompts, before[:n]), ("after", prompts, after[:n])]
    if args.validation_prompts:
        rows.append(("new contexts, before", base_prompts[n:], before[n:]))
        rows.append(("new contexts, after", prompts[n:], after[n:]))
    grid, done = make_grid(rows), step == args.max_train_steps
    path = Path(args.output_dir) / ("before_after.png" if done else f"validation/{step}.png")
    path.parent.mkdir(exist_ok=True)
    grid.save(path)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"before_after": np.array(grid)[None]}, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"before_after": [grid]}, step)
    return after[n:]


# ---- Results --------------------------------------------------------------------------------------------------------
def save_weights(model, args: argparse.Namespace) -> None:
    """LoRA and rows of tokens, in the files that diffusers' loaders read."""
    output_dir, layers = Path(args.output_dir), {}
    for part, module in model.adapted.items():
        # transformers dropped the first encoder's `text_model.`, which other loaders ask for and diffusers' accepts.
        prefix = "text_model." if part == "text_encoder" and not hasattr(module, "text_model") else ""
        layers[part] = {f"{prefix}{name}": layer for name, layer in get_peft_model_state_dict(module).items()}
    # PEFT's names: diffusers' older ones do not exist for all layers, and its loader drops one kind of a mixed file.
    options = {f"{part}_lora_layers": named for part, named in layers.items()}
    options |= diffusers.training_utils._collate_lora_metadata(model.adapted)
    write = partial(diffusers.StableDiffusionXLPipeline.save_lora_weights, output_dir, **options)
    save_aside(output_dir / "pytorch_lora_weights.safetensors", lambda path: write(weight_name=path.name))
    if args.output_kohya_format:
        named = {f"{part}.{name}": layer for part, found in layers.items() for name, layer in found.items()}
        kohya = diffusers.utils.convert_state_dict_to_kohya(named)
        alpha = float(args.lora_alpha or args.rank)  # diffusers writes the rank
        kohya = {name: torch.tensor(alpha) if name.endswith(".alpha") else t for name, t in kohya.items()}
        save_aside(output_dir / "pytorch_lora_weights_kohya.safetensors", partial(save_file, kohya))
    if model.tokens:
        rows = {key: tokens.rows.detach().cpu() for key, tokens in zip(("clip_l", "clip_g"), model.tokens)}
        save_aside(output_dir / "learned_embeds.safetensors", partial(save_file, rows))


def save_model_card(prompt: str, images: list[Image.Image], report: str, args: argparse.Namespace) -> str:
    """README.md, with the images of the new contexts for the hub's gallery; returns its code, which loads the results
    and generates an image of the prompt."""
    base, output_dir, tokens = args.pretrained_model_name_or_path, Path(args.output_dir), args.placeholder_token
    where = args.hub_model_id or args.output_dir
    usage = ["import torch", "from diffusers import StableDiffusionXLPipeline"]
    usage += ["from huggingface_hub import hf_hub_download"] if tokens and args.hub_model_id else []
    usage += ["from safetensors.torch import load_file"] if tokens else []
    usage += ["", f"pipeline = StableDiffusionXLPipeline.from_pretrained({base!r}, dtype=torch.float16).to('cuda')"]
    usage += [f"pipeline.load_lora_weights({where!r})"]
    if tokens:
        file = f"{f'{where}/learned_embeds.safetensors'!r}"
        file = f"hf_hub_download({where!r}, 'learned_embeds.safetensors')" if args.hub_model_id else file
        usage += [f"embeds = load_file({file})"]
        for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
            parts = f"text_encoder=pipeline.text_encoder{suffix}, tokenizer=pipeline.tokenizer{suffix}"
            usage += [f"pipeline.load_textual_inversion(list(embeds['{key}']), token={tokens}, {parts})"]
    usage += [f"image = pipeline({prompt!r}, height={args.resolution}, width={args.resolution}).images[0]"]
    usage = "\n".join(usage)

    named = {"loss_type", "learning_rate", "rank", *args.changed} | ({f"beta_{args.loss_type}"} & vars(args).keys())
    named -= set("output_dir cache_dir logging_dir resume_from_checkpoint report_to push_to_hub hub_token".split())
    settings = json.dumps({name: getattr(args, name) for name in sorted(named)}, indent=2, ensure_ascii=False)
    fence = "`" * 12  # longer than any that a prompt may have
    report = report and f"{fence}\n{report}\n{fence}\n"
    card = ModelCard(f"""---
{{}}
---
# {Path(args.hub_model_id or args.output_dir).resolve().name}

A LoRA of SDXL{" and a new token" if tokens else ""}, trained on a few photos.

{"" if args.skip_final_inference else "![before and after](before_after.png)"} ![curves](curves.png)

{fence}python
{usage}
{fence}

{report}
Settings that are not the defaults, and some that matter:

{fence}json
{settings}
{fence}
""")
    for i, image in enumerate(images):
        image.save(output_dir / f"image_{i}.png")
    shown = zip(args.validation_prompts, range(len(images)))
    card.data = ModelCardData(
        base_model=None if Path(base).exists() else base,  # the hub refuses a local path
        license="openrail++" if base.startswith("stabilityai/stable-diffusion-xl") else None,
        pipeline_tag="text-to-image",
        instance_prompt=prompt,
        widget=[{"text": text, "output": {"url": f"image_{i}.png"}} for text, i in shown] or None,
    )
    tags = ["stable-diffusion-xl", "text-to-image", "diffusers", "mapo", "lora", "dreambooth"]
    diffusers.utils.hub_utils.populate_model_card(card, [*tags, "textual-inversion"] if tokens else tags)
    card.save(output_dir / "README.md")
    return usage


def save_results(model, history: list[dict], photos: list[Photo], rejected, before, args, accelerator) -> None:
    """Weights, images, curves and card; and what was asked for beside them."""
    if accelerator.is_main_process:
        save_weights(model, args)
    images = []
    if not args.skip_final_inference:
        images = log_validation(args.max_train_steps, model, photos, rejected, before, args, accelerator)
    if not accelerator.is_main_process:
        return
    report = ""
    if args.demo and not args.skip_final_inference:
        from demo.report import subject_report

        with accelerator.autocast():
            report = subject_report(model.eval().pipeline.to(accelerator.device), args.placeholder_token[0])
    if history:
        plot_curves(history, Path(args.output_dir) / "curves.png")
    prompt = (args.validation_prompts or [photos[0].caption])[-1]
    usage = save_model_card(prompt, images, report, args)
    if args.push_to_hub:
        left_out = ["checkpoint-*", f"{args.logging_dir}/*", "tmp-*"]
        options = {"folder_path": args.output_dir, "token": args.hub_token, "ignore_patterns": left_out}
        upload_folder(repo_id=args.hub_model_id, **options)
    print(*filter(None, (report, usage)), sep="\n\n")


# ---- Main -----------------------------------------------------------------------------------------------------------
def prepare_run(args: argparse.Namespace) -> Accelerator:
    """The accelerator, writable folders, and a quiet console: from libraries only errors, and bars of downloads."""
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, args.logging_dir)),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),  # one process may generate for longer than another
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # else a second copy of the gradients
            AutocastKwargs(cache_enabled=False),  # else half copies of all weights stay through a forward pass
        ],
    )
    diffusers.utils.check_min_version("0.42.0")
    console = logging.StreamHandler()  # above a progress bar
    console.emit = lambda record: tqdm.write(console.format(record).removeprefix("[RANK 0] "), file=sys.stderr)
    logging.basicConfig(format="%(message)s", level=logging.ERROR, handlers=[console])
    logger.setLevel(logging.INFO)
    logging.getLogger("xformers").setLevel(logging.ERROR)  # where it is installed for another torch
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # which the line above switches off: downloads are to be seen

    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:  # each would train alone, into the same folder
        fail(f"{launched} processes were launched but don't find one another; on CPUs set ACCELERATE_USE_CPU=true")
    if accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
        fail(f"{accelerator.distributed_type.value}: a LoRA needs no sharding; take configs/ddp.yaml")
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
    if args.push_to_hub and accelerator.is_main_process:  # so that a wrong name or token shows now
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        with blame("push_to_hub", name):
            args.hub_model_id = create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    accelerator.wait_for_everyone()
    return accelerator


# UNet samples at 1024 px in one pass that a LoRA with --gradient_checkpointing trains on 16 GB.
SAMPLES_PER_PASS = 8


def split_photos(count: int, args: argparse.Namespace, accelerator: Accelerator) -> int:
    """Photos per step in this process. Fills in --train_batch_size, photos per pass: by default the whole set is one
    step, in passes that a GPU of 16 GB has room for."""
    if args.train_batch_size is not None:
        return args.train_batch_size * args.gradient_accumulation_steps
    photos_per_step = -(-count // accelerator.num_processes)
    samples = 1 + (args.loss_type == "mapo") + args.with_prior_preservation  # of one photo
    room = max(1, int(SAMPLES_PER_PASS * (1024 / args.resolution) ** 2) // samples)
    args.train_batch_size = min(room, -(-photos_per_step // args.gradient_accumulation_steps))
    return photos_per_step


def watch_signals() -> list[str]:  # twin
    """Names of the signals SIGTERM and SIGINT that came since; a second one ends the process as ever."""
    came = []

    def note(number, frame) -> None:
        came.append(signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return came


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
    started = time.perf_counter()
    if args.demo and os.environ.get("RANK", "0") == "0":
        from demo.settings import SUBJECT_NOTE

        print(SUBJECT_NOTE)
    accelerator = prepare_run(args)
    photos = load_photos(args)
    rejected = find_rejected(photos, args) if args.rejected_data_dir else []
    check_tokens(photos, args)
    photos_per_step = split_photos(len(photos), args, accelerator)
    photos_in_all = photos_per_step * accelerator.num_processes
    if args.max_train_steps is None:
        args.max_train_steps = -(-args.num_train_epochs * len(photos) // photos_in_all)
    run = {f"--{name}": value for name, value in sorted(vars(args).items()) if name not in FREE_SETTINGS}
    hashed = [hash_of(p.name, p.caption, p.base_caption, p.image.tobytes()) for p in photos]
    run |= {"photos in a step": photos_in_all, "photos and captions of --instance_data_dir": hash_of(hashed)}
    checkpoint, state = find_checkpoint(args, run)
    first_step = state["step"]
    if first_step > args.max_train_steps:
        fail(f"--max_train_steps {args.max_train_steps}: {checkpoint.name} is beyond it; name more steps")

    model, noise_scheduler = load_models(args, accelerator)
    if args.uses_rejected and not rejected:
        rejected = generate_rejected(0, photos, model, args, accelerator)
    if rejected and accelerator.is_main_process:
        rows = [(p.name, [p.caption] + [p.base_caption] * len(r), [p.image, *r]) for p, r in zip(photos, rejected)]
        make_grid(rows).save(Path(args.output_dir) / "chosen_rejected.png")
    dataset = PhotoSet(photos, args)
    vae = model.pipeline.vae
    dataset.encode(rejected, vae, accelerator.device)
    optimizer = make_optimizer(model, photos_in_all if args.scale_lr else 1, args)
    lr_scheduler = diffusers.optimization.get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    trained = torch.nn.ParameterList(p for p in model.parameters() if p.requires_grad)
    model, optimizer = accelerator.prepare(model, optimizer)
    # Checkpoints hold only what is trained. The schedule isn't prepared: accelerate would step it once per process.
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
    accelerator.register_for_checkpointing(trained, lr_scheduler, dataset)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        logger.info(f"Resumed from {checkpoint}.")
    accelerator.init_trackers("mapo", config={k: str(v) for k, v in vars(args).items() if k != "hub_token"})

    logger.info(f"First step after {time.perf_counter() - started:.1f} s.")
    log, signals, before = MetricsLog(state, args, accelerator), watch_signals(), []
    patience = args.max_nonfinite_steps + (20 if accelerator.scaler else 0)  # fp16 finds its scale by such steps
    stop = False
    for step in range(first_step + 1, args.max_train_steps + 1):
        metrics = accumulate_gradients(step, photos_per_step, model, dataset, noise_scheduler, args, accelerator)
        metrics["grad_norm"] = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        if accelerator.scaler is not None or metrics["grad_norm"].isfinite():  # fp16's scaler skips a step by itself
            optimizer.step()
            accelerator.unwrap_model(model).restore_norms()
        optimizer.zero_grad()
        lr_scheduler.step()
        stop = log.end_step(step, metrics, lr_scheduler.get_last_lr()[0], photos_in_all, bool(signals))
        if args.refresh_rejected_steps and step % args.refresh_rejected_steps == 0 and step < args.max_train_steps:
            rejected = generate_rejected(step, photos, model, args, accelerator)
            dataset.encode(rejected, vae, accelerator.device)
        diverged = log.skipped_in_a_row >= patience
        if step % args.checkpointing_steps == 0 or stop or diverged:
            saved = save_checkpoint(step, run, log.history, args, accelerator)
        if diverged:
            what = f"{log.skipped_in_a_row} steps in a row had a loss or gradient that isn't finite"
            fail(f"{what}; {saved} has the weights as they were. Try a lower --learning_rate, or bf16 instead of fp16")
        if stop:
            log.bar.close()
            logger.info(f"{' '.join(signals)}: {saved} is written; go on with --resume_from_checkpoint latest")
            break
        if args.validation_steps and step % args.validation_steps == 0 and step < args.max_train_steps:
            log_validation(step, model, photos, rejected, before, args, accelerator)
    log.bar.close()

    model = accelerator.unwrap_model(model)
    if not stop:
        save_results(model, log.history, photos, rejected, before, args, accelerator)
        accelerator.print(f"Done in {time.perf_counter() - started:.0f} s. Results: {args.output_dir}")
    accelerator.free_memory()  # DDP before its process group: freed after it, it can wait for gloo's threads forever
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())

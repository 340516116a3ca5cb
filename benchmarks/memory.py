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
Count how much GPU memory training SDXL takes, without a GPU.

    python benchmarks/memory.py

Each phase of a run (encoding, training, preview images) is carried out on the meta device, whose tensors have shapes
but no data. Every storage is added up for as long as it lives, in blocks of 512 bytes as in CUDA's allocator, and the
highest sum is the peak. Mixed precision and attention follow CUDA's rules (`CudaRules`).

Not counted: the CUDA context and libraries, the workspaces of convolutions, and fragmentation. The last column of the
table leaves 1 GB for these.
"""

import argparse
import contextlib
import gc
import json
import os
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import diffusers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel, cast_training_params


BENCHMARKS = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCHMARKS.parent))
from train_diffusion_mapo_sdxl import compute_loss  # noqa: E402


SDXL = BENCHMARKS / "sdxl"
RESULTS = BENCHMARKS / "results" / "memory.json"
CARDS = (12, 16, 24, 40, 80)  # GB
NOT_COUNTED = 1.0  # GB
CAPTIONS_AT_ONCE = 16  # as in `encode_pairs` of the script


@dataclass(frozen=True)
class Settings:
    """One row of the table.

    Args:
        method: "LoRA" of rank 32 on the attention layers, or "full" for all weights of the UNet.
        pairs: pairs in a batch.
        optimizer: "AdamW" or "8-bit AdamW".
        ddp: whether gradients live in the buckets of `DistributedDataParallel`.
    """

    method: str
    pairs: int
    optimizer: str = "AdamW"
    checkpointing: bool = True
    ema: bool = False
    ddp: bool = False


ROWS = {
    "LoRA, 1 pair": Settings("LoRA", 1),
    "LoRA, 4 pairs": Settings("LoRA", 4),
    "LoRA, 4 pairs, no checkpointing": Settings("LoRA", 4, checkpointing=False),
    "full, 8-bit AdamW, 1 pair": Settings("full", 1, "8-bit AdamW"),
    "full, 8-bit AdamW, 4 pairs": Settings("full", 4, "8-bit AdamW"),
    "full, 8-bit AdamW, 4 pairs, several GPUs": Settings("full", 4, "8-bit AdamW", ddp=True),
    "full, 8-bit AdamW, 4 pairs, EMA": Settings("full", 4, "8-bit AdamW", ema=True),
    "full, AdamW, 1 pair": Settings("full", 1),
    "full, AdamW, 4 pairs": Settings("full", 4),
}


# ---- How memory is counted ------------------------------------------------------------------------------------------
class MemoryCounter(TorchDispatchMode):
    """Count the bytes of the storages that are alive on the meta device, and the highest count so far."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.peak = 0
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, result)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = -(-storage.nbytes() // 512) * 512
        if key not in self.storages:
            self.storages[key] = weakref.ref(storage, lambda _: self.release(key, size))
            self.held += size
            self.peak = max(self.peak, self.held)

    def release(self, key: int, size: int) -> None:
        del self.storages[key]
        self.held -= size

    def reset_peak(self) -> None:
        gc.collect()
        self.peak = self.held


class CudaRules(TorchFunctionMode):
    """Make the meta device compute attention and mixed precision as CUDA does, for the functions that SDXL calls.

    Args:
        autocast: whether linear layers and convolutions run in bf16, and normalizations in fp32.
    """

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self.autocast = autocast

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.__bool__ and args[0].device.type == "meta":
            return True  # the result of a check of values, which a meta tensor doesn't have
        if function is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if self.autocast and function in (F.linear, F.conv2d):
            args = cast(args, torch.bfloat16)
        if self.autocast and function in (F.group_norm, F.layer_norm):
            args = cast(args, torch.float32)
        return function(*args, **kwargs)

    def attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        """Compute attention with the flash kernel, or in fp32 and with a mask with the memory-efficient one."""
        if self.autocast:
            query, key, value = cast((query, key, value), torch.bfloat16)
        if attn_mask is None and query.dtype == torch.bfloat16:
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]
        needs_grad = torch.is_grad_enabled()
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, needs_grad)[0]


def cast(tensors: tuple, dtype: torch.dtype) -> tuple:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(dtype), tensors)


class MetaAdamW8bit(bitsandbytes.optim.AdamW8bit):
    """Make the states of 8-bit AdamW, but don't update them: the meta device lacks the kernel, which is in place."""

    def update_step(self, *args) -> None:
        pass


# ---- Phases of a run ------------------------------------------------------------------------------------------------
def load_vae() -> AutoencoderKL:
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(json.loads((SDXL / "vae" / "config.json").read_text()))
    return vae.requires_grad_(False)


def load_unet(settings: Settings) -> UNet2DConditionModel:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((SDXL / "unet" / "config.json").read_text()))
    if settings.method == "LoRA":
        unet.to(dtype=torch.bfloat16).requires_grad_(False)
        unet.add_adapter(LoraConfig(r=32, lora_alpha=32, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
        cast_training_params(unet, dtype=torch.float32)
    if settings.checkpointing:
        unet.enable_gradient_checkpointing(checkpoint_as_cuda)
    return unet.train()


def checkpoint_as_cuda(block: torch.nn.Module, *args):
    """Checkpoint as diffusers does; `CudaRules` also hold where the backward pass computes the block again."""
    contexts = (contextlib.nullcontext(), CudaRules(autocast=True))
    return checkpoint(block.__call__, *args, use_reentrant=False, context_fn=lambda: contexts)


def make_batch(pairs: int, resolution: int) -> dict[str, torch.Tensor]:
    side = resolution // 8
    return {
        "latents_w": torch.empty(pairs, 4, side, side, device="meta"),
        "latents_l": torch.empty(pairs, 4, side, side, device="meta"),
        "prompt_embeds": torch.empty(pairs, 77, 2048, device="meta"),
        "pooled_prompt_embeds": torch.empty(pairs, 1280, device="meta"),
        "time_ids": torch.empty(pairs, 6, device="meta"),
    }


@torch.no_grad()
def count_encoding(settings: Settings, resolution: int) -> float:
    """Return the peak in GB of encoding images one by one and captions in batches, without the UNet on the device."""
    dtype = torch.bfloat16 if settings.method == "LoRA" else torch.float32
    with MemoryCounter() as memory, CudaRules(autocast=False):
        vae = load_vae()
        with torch.device("meta"):
            text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(SDXL / "text_encoder"))
            text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(SDXL / "text_encoder_2"))
        text_encoder.to(dtype)
        text_encoder_2.to(dtype)
        memory.reset_peak()
        vae.encode(torch.empty(1, 3, resolution, resolution, device="meta"))
        tokens = torch.zeros(CAPTIONS_AT_ONCE, 77, dtype=torch.long, device="meta")
        text_encoder(tokens, output_hidden_states=True)
        text_encoder_2(tokens, output_hidden_states=True)
    return memory.peak / 1e9


def count_training(settings: Settings, resolution: int) -> dict[str, float]:
    """Return the peaks in GB of training and of the previews after it, and what stays between steps."""
    noise_scheduler = DDPMScheduler.from_pretrained(SDXL, subfolder="scheduler")
    side = resolution // 8
    counted = {}
    with MemoryCounter() as memory:
        unet = load_unet(settings)
        parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        if settings.optimizer == "8-bit AdamW":
            optimizer = MetaAdamW8bit(parameters)
        else:
            optimizer = torch.optim.AdamW(parameters)
        if settings.ema:
            ema = EMAModel(parameters)
        if settings.ddp:  # the gradients are views of buckets that stay
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        memory.reset_peak()

        for _ in range(2):  # the optimizer makes its states at the end of the first step
            batch = make_batch(settings.pairs, resolution)
            noise = torch.empty(settings.pairs, 4, side, side, device="meta")
            timesteps = torch.zeros(settings.pairs, dtype=torch.long, device="meta")
            with CudaRules(autocast=True):
                result = compute_loss(unet, batch, noise_scheduler, noise, timesteps, 8.0, 0.5, None)
            result.loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            with CudaRules(autocast=False):
                optimizer.step()
            optimizer.zero_grad(set_to_none=not settings.ddp)
            if settings.ema:
                ema.step(parameters)
            del result, batch, noise, timesteps
        counted["training"] = memory.peak / 1e9
        counted["between steps"] = memory.held / 1e9

        memory.reset_peak()
        generate_previews(unet.eval(), settings.pairs, resolution)
        counted["previews"] = memory.peak / 1e9
    return counted


@torch.no_grad()
def generate_previews(unet: UNet2DConditionModel, count: int, resolution: int) -> None:
    """Do what the script's `generate_images` does for one batch of prompts; one denoising step stands for all."""
    batch = make_batch(2 * count, resolution)  # with guidance, each prompt takes two samples
    conditions = {"text_embeds": batch["pooled_prompt_embeds"], "time_ids": batch["time_ids"]}
    timestep = torch.tensor(1, device="meta")
    with CudaRules(autocast=True):
        latents = unet(batch["latents_w"], timestep, batch["prompt_embeds"], added_cond_kwargs=conditions).sample
    with CudaRules(autocast=False):
        vae = load_vae()
        vae.enable_slicing()
        vae.tile_sample_min_size = 512
        vae.tile_latent_min_size = 64
        vae.enable_tiling()
        vae.decode(latents[:count].float())


def count_run(settings: Settings, resolution: int) -> dict[str, float]:
    """Return the peaks in GB of all phases, and of the run as a whole."""
    counted = {"encoding": count_encoding(settings, resolution), **count_training(settings, resolution)}
    counted["whole run"] = max(counted["encoding"], counted["training"], counted["previews"])
    return counted


# ---- Command --------------------------------------------------------------------------------------------------------
def make_table(rows: dict[str, dict[str, float]]) -> str:
    lines = [
        "| GB | encoding | training | between steps | previews | whole run | card |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        cards = [card for card in CARDS if row["whole run"] + NOT_COUNTED <= card]
        card = f"{cards[0]} GB" if cards else "more"
        lines.append(
            f"| {name} | {row['encoding']:.1f} | {row['training']:.1f} | {row['between steps']:.1f} "
            f"| {row['previews']:.1f} | {row['whole run']:.1f} | {card} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=1024, help="Side of the images, a multiple of 64.")
    parser.add_argument("--output", type=Path, default=None, help="Also write the figures to this JSON file.")
    args = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    if args.resolution % 64 != 0:
        parser.error(f"--resolution {args.resolution} is not a multiple of 64")
    rows = {}
    for name, settings in tqdm(ROWS.items()):
        rows[name] = count_run(settings, args.resolution)
    print(make_table(rows))
    if args.output is not None:
        temporary = args.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(rows, indent=1) + "\n")
        os.replace(temporary, args.output)


if __name__ == "__main__":
    main()

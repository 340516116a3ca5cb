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
Counts what training SDXL takes of a GPU's memory, without a GPU:

    python benchmarks/memory.py                    # the table; some 4 minutes of an idle core
    python benchmarks/memory.py --resolution 512 --only LoRA

The script's own functions run on the meta device, whose tensors have shapes but no data. Every storage that they make
is added up for as long as it lives, in blocks of 512 bytes as the GPU's allocator has them; the highest sum is the
peak. What mixed precision computes in which precision follows torch's list for CUDA (`kernels`), attention is the
flash kernel. Not counted: CUDA's context and libraries, workspaces of convolutions and fragmentation. For these
`ROOM` is left where the table says what fits a card.
"""

import argparse
import contextlib
import gc
import json
import sys
import tempfile
import weakref
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from step_variant import CASES, HERE, load_config, make_meta_batch, no_noise, random_weights, script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


SDXL = CASES["sdxl-1024"]["folder"]
META = torch.device("meta")
CARDS = (16, 24, 40, 80)  # GB
ROOM = 1.0  # GB
RESULTS = HERE / "results" / "memory.json"
CHECKPOINTING, LORA, FULL_8BIT = "--gradient_checkpointing", "--use_lora", "--use_8bit_adam"
DDP = "DDP"  # no flag of the script: several processes
ROWS = {
    "LoRA, 1 pair": (LORA, CHECKPOINTING, "--train_batch_size=1"),
    "LoRA, 4 pairs": (LORA, CHECKPOINTING, "--train_batch_size=4"),
    "LoRA, 4 pairs, no checkpointing": (LORA, "--train_batch_size=4"),
    "adamw_bf16, 1 pair": ("--optimizer=adamw_bf16", CHECKPOINTING, "--train_batch_size=1"),
    "adamw_bf16, 4 pairs": ("--optimizer=adamw_bf16", CHECKPOINTING, "--train_batch_size=4"),
    "8-bit AdamW, 1 pair": (FULL_8BIT, CHECKPOINTING, "--train_batch_size=1"),
    "8-bit AdamW, 4 pairs": (FULL_8BIT, CHECKPOINTING, "--train_batch_size=4"),
    "8-bit AdamW, 4 pairs, several GPUs (DDP)": (FULL_8BIT, CHECKPOINTING, "--train_batch_size=4", DDP),
    "8-bit AdamW, 4 pairs, EMA": (FULL_8BIT, CHECKPOINTING, "--train_batch_size=4", "--use_ema"),
    "8-bit AdamW, 4 pairs, EMA offloaded": (
        FULL_8BIT, CHECKPOINTING, "--train_batch_size=4", "--use_ema", "--offload_ema",
    ),
    "AdamW, 1 pair": (CHECKPOINTING, "--train_batch_size=1"),
    "AdamW, 4 pairs": (CHECKPOINTING, "--train_batch_size=4"),
}  # fmt: skip


class Memory(TorchDispatchMode):
    """Bytes of the living storages on the meta device, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, result)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key not in self.seen:
            self.seen[key] = weakref.ref(storage, lambda _: self.release(key, size))
            self.held += size
            self.peak = max(self.peak, self.held)

    def release(self, key: int, size: int) -> None:
        del self.seen[key]
        self.held -= size


@contextlib.contextmanager
def kernels(autocast: bool = False):
    """CUDA's attention kernels and, with `autocast`, its rules for bf16, for what SDXL calls: meta has neither."""

    def cast(function, dtype):
        def call(*args, **kwargs):
            floats = lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor  # noqa: E731
            return function(*tree_map_only(torch.Tensor, floats, args), **kwargs)

        return mock.patch.object(F, function.__name__, call)

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options) -> torch.Tensor:
        if autocast:
            query, key, value = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
        if attn_mask is None and query.dtype == torch.bfloat16:
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]
        with_grad = torch.is_grad_enabled()
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, with_grad)[0]

    truth = torch.Tensor.__bool__
    with contextlib.ExitStack() as stack:
        if autocast:
            for function in (F.linear, F.conv2d):
                stack.enter_context(cast(function, torch.bfloat16))
            for function in (F.group_norm, F.layer_norm):
                stack.enter_context(cast(function, torch.float32))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attend))
        # A check of values, which meta has not.
        known = lambda tensor: tensor.device.type == "meta" or truth(tensor)  # noqa: E731
        stack.enter_context(mock.patch.object(torch.Tensor, "__bool__", known))
        yield


def make_accelerator():
    """What the script asks of an `Accelerator`, for one GPU and bf16."""
    return SimpleNamespace(
        device=META, mixed_precision="bf16", distributed_type="NO", num_processes=1, process_index=0, scaler=None,
        autocast=lambda: kernels(autocast=True),
        prepare=lambda *objects: objects,
        register_for_checkpointing=lambda *objects: None,
        register_save_state_pre_hook=lambda hook: None,
        register_load_state_pre_hook=lambda hook: None,
        unwrap_model=lambda model: model,
        clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
    )  # fmt: skip


def move_ema(self, device, dtype=None) -> None:
    """In place of `EMAModel.to`: what goes to the CPU leaves the meta device, and comes back as empty tensors."""
    if torch.device(device).type == "cpu":
        self.away = [parameter.shape for parameter in self.shadow_params]
        self.shadow_params = []
    elif not self.shadow_params:
        self.shadow_params = [torch.empty(shape, device=device) for shape in self.away]


@contextlib.contextmanager
def on_meta():
    import bitsandbytes

    from diffusers.training_utils import EMAModel

    with contextlib.ExitStack() as stack:
        stack.enter_context(random_weights(SDXL, META))
        stack.enter_context(no_noise())
        stack.enter_context(mock.patch.object(EMAModel, "to", move_ema))
        # Changes in place what `init_state` has made.
        stack.enter_context(mock.patch.object(bitsandbytes.optim.AdamW8bit, "update_step", lambda *inputs: None))
        devices = "torch.optim.optimizer._get_fused_kernels_supported_devices"
        stack.enter_context(mock.patch(devices, lambda: ["meta"]))
        yield


def parse(flags: tuple[str, ...], resolution: int, folder: str):
    own = [f"--pretrained_model_name_or_path={SDXL}", "--dataset_name=none", "--mixed_precision=bf16"]
    own += [f"--output_dir={folder}", f"--resolution={resolution}"]
    return script.parse_args([*own, *(flag for flag in flags if flag != DDP)])


def count_encoding(resolution: int) -> dict[str, float]:
    """Peaks in GB of encoding a pair of images and 64 captions, each with nothing else on the device."""
    peaks = {}
    with on_meta(), tempfile.TemporaryDirectory() as folder, torch.no_grad():
        args = parse((), resolution, folder)
        for name, kept in (("images", ("vae",)), ("captions", ("text_encoder", "text_encoder_2"))):
            with Memory() as memory, kernels():
                pipeline = script.load_pipeline(args, torch.bfloat16)
                for model in {"vae", "text_encoder", "text_encoder_2"} - set(kept):
                    setattr(pipeline, model, None)
                gc.collect()
                memory.peak = memory.held
                if name == "images":
                    script.encode_pixels(torch.zeros(2, 3, resolution, resolution, dtype=torch.uint8), pipeline.vae)
                else:
                    pipeline.encode_prompt(["a fox"] * 64, device=META, do_classifier_free_guidance=False)
                peaks[name] = memory.peak / 1e9
                del pipeline
    return peaks


def count_training(flags: tuple[str, ...], resolution: int) -> dict[str, float]:
    """Peaks in GB of a training step, the EMA's update and the optimizer's included, and of generating images after
    training, when for a full fine-tune the base model is loaded a second time."""
    accelerator, peaks = make_accelerator(), {}
    with on_meta(), tempfile.TemporaryDirectory() as folder, Memory() as memory:
        args = parse(flags, resolution, folder)
        unet, noise_scheduler = script.load_unet(args, accelerator)
        training = script.prepare_training(unet, None, args, accelerator)
        if DDP in flags:  # its buckets, of which the gradients are views, stay
            for parameter in training.parameters:
                parameter.grad = torch.zeros_like(parameter)
        memory.peak = memory.held  # what building it took is no matter: the script loads on the CPU
        for _ in range(2):  # the optimizer's state is there from the end of the first on
            batch = make_meta_batch(SDXL, resolution, args.train_batch_size)
            with kernels(autocast=True):  # in the backward pass for what checkpointing computes again
                loss, metrics = script.training_step(unet, batch, noise_scheduler, args, META)
                loss.backward()
            accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
            training.optimizer.step()
            training.optimizer.zero_grad(set_to_none=DDP not in flags)
            if training.ema is not None:
                training.ema.to(META)
                training.ema.step(training.parameters)
                training.ema.to("cpu" if args.offload_ema else META)
            del loss, metrics, batch
        peaks["training"], memory.peak = memory.peak / 1e9, memory.held
        peaks["kept"] = memory.held / 1e9
        generate(unet, args, accelerator)
        peaks["images"] = memory.peak / 1e9
    return peaks


def generate(unet, args, accelerator) -> None:
    """Images of the base model, as the script's `show_images` has them; one denoising step stands for all."""
    from diffusers import AutoencoderKL

    base = unet if args.use_lora else script.load_unet(args, accelerator)[0]
    with META:
        vae = AutoencoderKL.from_config(load_config(SDXL / "vae")).requires_grad_(False)
    vae.to = lambda device: vae  # the script sends it to the CPU afterwards

    class Pipeline(SimpleNamespace):
        def __call__(self, prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, height, width, **options):
            samples = 2 * len(prompt_embeds)  # with guidance
            latents = torch.empty(samples, 4, height // 8, width // 8, device=META)
            conditions = {"text_embeds": pooled_prompt_embeds.repeat(2, 1), "time_ids": torch.empty(samples, 6)}
            text, timestep = torch.cat([negative_prompt_embeds, prompt_embeds]), torch.tensor(1, device=META)
            conditions["time_ids"] = conditions["time_ids"].to(META)
            self.unet(latents, timestep, text, added_cond_kwargs=conditions)
            return SimpleNamespace(images=latents[: len(prompt_embeds)])

    batch = make_meta_batch(SDXL, args.resolution, args.train_batch_size + 1)  # the last one is the empty prompt
    embeddings = {name: batch[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    processor = SimpleNamespace(postprocess=lambda decoded: [None] * len(decoded))
    with kernels():
        script.generate_images(base, Pipeline(vae=vae, image_processor=processor), embeddings, args, accelerator)


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def count(names: list[str], resolution: int) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Peaks of encoding, and of each row."""
    encoding, rows = count_encoding(resolution), {}
    for name in names:
        rows[name] = count_training(ROWS[name], resolution)
        rows[name]["peak"] = max(*encoding.values(), rows[name]["training"], rows[name]["images"])
        print(f"{name}: {rows[name]['peak']:.1f} GB", file=sys.stderr, flush=True)
    return encoding, rows


def make_table(encoding: dict[str, float], rows: dict[str, dict[str, float]]) -> str:
    head = ["GB, counted", "encoding", "training", "between steps", "images after training", "peak", "card"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, row in rows.items():
        card = next((f"{card} GB" for card in CARDS if row["peak"] + ROOM <= card), "more")
        figures = (max(encoding.values()), row["training"], row["kept"], row["images"], row["peak"])
        lines.append([name, *(f"{figure:.1f}" for figure in figures), card])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--only", nargs="+", help="Rows by a part of the name.")
    parser.add_argument("--save", action="store_true", help="Into results/memory.json, which gpu_acceptance.py reads.")
    args = parser.parse_args(input_args)
    if args.save and (args.only or args.resolution != 1024):
        parser.error("--save is for the whole table at 1024 px")
    if args.resolution < 8 or args.resolution % 8:
        parser.error(f"--resolution {args.resolution}: must be a multiple of 8")
    args.rows = [name for name in ROWS if args.only is None or any(part in name for part in args.only)]
    if not args.rows:
        parser.error(f"--only {' '.join(args.only)}: no such row; the rows are: {'; '.join(ROWS)}")
    return args


def main(args: argparse.Namespace) -> None:
    encoding, rows = count(args.rows, args.resolution)
    print(make_table(encoding, rows))
    if args.save:
        RESULTS.write_text(json.dumps({"encoding": encoding, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(parse_args())

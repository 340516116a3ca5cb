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
"""
Write an SDXL model in diffusers' format as one .safetensors file, which ComfyUI and A1111 read:

    python inference/export_single_file.py --pretrained_model_name_or_path diffusion-mapo-sdxl \\
        --output ComfyUI/models/checkpoints/my_model.safetensors

The file has the names that Stability AI's own checkpoint has. A model that predicts v gets the key `v_pred`, one with
zero terminal SNR the key `ztsnr`; ComfyUI and the training scripts look for them.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_diffusion_mapo_sdxl import load_pipeline, move_into_place  # noqa: E402


UNET_LAYERS = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
UNET_RESNET_LAYERS = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
VAE_LAYERS = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "conv_norm_out.": "norm_out.",
}
VAE_ATTENTION_LAYERS = {
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}
TEXT_ENCODER_2_LAYERS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "self_attn.": "attn.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}


def rename_prefix(name: str, prefixes: dict[str, str]) -> str:
    """Replace the prefix of a name that `prefixes` has. No two prefixes fit the same name."""
    for prefix, original in prefixes.items():
        if name.startswith(prefix):
            return original + name.removeprefix(prefix)
    return name


def convert_unet(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the UNet's weights by their original names, in which blocks are counted through all levels."""
    prefixes = dict(UNET_LAYERS)
    index = 1  # input block 0 is conv_in
    for level, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            prefixes[f"down_blocks.{level}.resnets.{layer}."] = f"input_blocks.{index}.0."
            prefixes[f"down_blocks.{level}.attentions.{layer}."] = f"input_blocks.{index}.1."
            index += 1
        if block.downsamplers is not None:
            prefixes[f"down_blocks.{level}.downsamplers.0.conv."] = f"input_blocks.{index}.0.op."
            index += 1
    index = 0
    for level, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            prefixes[f"up_blocks.{level}.resnets.{layer}."] = f"output_blocks.{index}.0."
            prefixes[f"up_blocks.{level}.attentions.{layer}."] = f"output_blocks.{index}.1."
            index += 1
        place = 2 if hasattr(block, "attentions") else 1  # in the level's last block, after its attention
        prefixes[f"up_blocks.{level}.upsamplers.0."] = f"output_blocks.{index - 1}.{place}."

    converted = {}
    for name, tensor in unet.state_dict().items():
        block, resnets, layer = name.partition(".resnets.")
        if resnets:
            number, _, layer = layer.partition(".")
            name = f"{block}.resnets.{number}.{rename_prefix(layer, UNET_RESNET_LAYERS)}"
        converted["model.diffusion_model." + rename_prefix(name, prefixes)] = tensor
    return converted


def convert_vae(vae: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the VAE's weights by their original names, in which the decoder's levels are counted from the image."""
    prefixes = {}
    for half in ("encoder.", "decoder."):
        for prefix, original in VAE_LAYERS.items():
            prefixes[half + prefix] = half + original
    levels = len(vae.config.block_out_channels)
    for level in range(levels):
        prefixes[f"encoder.down_blocks.{level}.resnets."] = f"encoder.down.{level}.block."
        prefixes[f"encoder.down_blocks.{level}.downsamplers.0."] = f"encoder.down.{level}.downsample."
        prefixes[f"decoder.up_blocks.{level}.resnets."] = f"decoder.up.{levels - 1 - level}.block."
        prefixes[f"decoder.up_blocks.{level}.upsamplers.0."] = f"decoder.up.{levels - 1 - level}.upsample."

    converted = {}
    for name, tensor in vae.state_dict().items():
        block, attention, layer = name.partition(".attentions.0.")
        if attention:
            name = block + attention + rename_prefix(layer, VAE_ATTENTION_LAYERS)
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]  # the original has convolutions there
        name = rename_prefix(name, prefixes).replace("conv_shortcut.", "nin_shortcut.")
        converted["first_stage_model." + name] = tensor
    return converted


def convert_text_encoder(text_encoder: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the first text encoder's weights by their original names."""
    converted = {}
    for name, tensor in text_encoder.state_dict().items():
        name = name.removeprefix("text_model.")  # transformers 5.6 has dropped it from this model's names
        converted["conditioner.embedders.0.transformer.text_model." + name] = tensor
    return converted


def convert_text_encoder_2(text_encoder_2: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the second text encoder's weights by OpenCLIP's names. It keeps q, k and v of a layer in one tensor."""
    weights = {}
    for name, tensor in text_encoder_2.state_dict().items():
        weights[name.removeprefix("text_model.")] = tensor
    converted = {}
    for name, tensor in weights.items():
        if name.endswith((".k_proj.weight", ".k_proj.bias", ".v_proj.weight", ".v_proj.bias")):
            continue
        if name == "text_projection.weight":
            name = "text_projection"
            tensor = tensor.T
        elif ".q_proj." in name:
            parts = [weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            name = name.replace(".q_proj.", ".in_proj_")
            tensor = torch.cat(parts)
        for layer, original in TEXT_ENCODER_2_LAYERS.items():
            name = name.replace(layer, original)
        converted["conditioner.embedders.1.model." + name] = tensor
    return converted


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--pretrained_model_name_or_path",
        type=str,
        required=True,
        help="The SDXL model: the --output_dir of a full fine-tune, another folder or a repository on the hub.",
    )
    parser.add_argument("--output", type=str, required=True, help="The .safetensors file to write.")
    parser.add_argument(
        "--dtype", type=str, default="fp16", choices=["fp32", "fp16", "bf16"], help="Precision of the weights."
    )
    args = parser.parse_args(input_args)
    if Path(args.output).suffix != ".safetensors":
        parser.error(f"--output {args.output}: must end in .safetensors")
    return args


def main(args: argparse.Namespace) -> None:
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
    pipeline = load_pipeline(args.pretrained_model_name_or_path, dtype=dtype)
    converted = {
        **convert_unet(pipeline.unet),
        **convert_vae(pipeline.vae),
        **convert_text_encoder(pipeline.text_encoder),
        **convert_text_encoder_2(pipeline.text_encoder_2),
    }
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in converted.items()}
    if pipeline.scheduler.config.prediction_type == "v_prediction":
        weights["v_pred"] = torch.empty(0)
    if pipeline.scheduler.config.get("rescale_betas_zero_snr"):
        weights["ztsnr"] = torch.empty(0)

    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"tmp-{output.name}")
    save_file(weights, temporary, metadata={"format": "pt"})
    move_into_place(temporary, output)
    print(f"{output} has {output.stat().st_size / 1e9:.2f} GB.")


if __name__ == "__main__":
    main(parse_args())

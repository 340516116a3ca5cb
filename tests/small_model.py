"""A model and pairs so small that a run takes seconds."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch


DEMO = Path(__file__).resolve().parents[1] / "demo"
MODEL, PAIRS = DEMO / "sdxl-tiny-emoji", DEMO / "pairs"


def write_model(folder: Path) -> Path:
    """The demo's model with a UNet of 0.2 M random weights."""
    from diffusers import UNet2DConditionModel

    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    config |= {"block_out_channels": [8, 8, 16], "norm_num_groups": 4, "attention_head_dim": [1, 1, 2]}
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return folder


def write_pairs(path: Path, **changes) -> Path:
    """The first 8 of the demo's pairs as one parquet file, with some columns changed or (None) dropped."""
    columns = pq.read_table(PAIRS / "train.parquet").slice(0, 8).to_pydict() | changes
    pq.write_table(pa.table({name: values for name, values in columns.items() if values is not None}), path)
    return path


def write_three_level_model(folder: Path, **scheduler_settings) -> Path:
    """A random model with SDXL's own structure, which a single file needs: three levels in the UNet and four in the VAE.

    No two of its tensors are equal. The tokenizers are the demo's. `scheduler_settings` change the scheduler's config.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 1, 2),
        norm_num_groups=4,
        cross_attention_dim=16 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.13025,
    )
    encoder_config = json.loads((MODEL / "text_encoder" / "config.json").read_text())
    encoder_config |= {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    text_encoder = CLIPTextModel(CLIPTextConfig(**encoder_config | {"hidden_size": 16, "projection_dim": 16}))
    text_encoder_2 = CLIPTextModelWithProjection(
        CLIPTextConfig(**encoder_config | {"hidden_size": 24, "projection_dim": 24, "hidden_act": "gelu"})
    )
    models = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    for name, model in models.items():
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
    scheduler = EulerDiscreteScheduler.from_pretrained(MODEL, subfolder="scheduler", **scheduler_settings)
    scheduler.save_pretrained(folder / "scheduler")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(MODEL / name, folder / name)
    shutil.copy(MODEL / "model_index.json", folder)
    return folder

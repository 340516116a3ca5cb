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

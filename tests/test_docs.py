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
"""The code of the documentation runs."""

import re
from pathlib import Path

import torch


REPO = Path(__file__).resolve().parents[1]


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (REPO / page).read_text(), re.S)


def test_loop_for_a_flow_matching_transformer_learns_the_preference():
    from diffusers import SD3Transformer2DModel

    namespace = {}
    (code,) = code_blocks("docs/flow_matching.md", "python")
    exec(code, namespace)
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=8,
    )
    # Winners and losers that an error can tell apart: each of one sign.
    batch = {
        "latents_w": torch.full((4, 4, 8, 8), 1.0),
        "latents_l": torch.full((4, 4, 8, 8), -1.0),
        "prompt_embeds": torch.randn(4, 7, 32),
        "pooled_prompt_embeds": torch.randn(4, 64),
    }
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    logs = list(namespace["train"](transformer, [batch] * 60, beta=1.0, learning_rate=1e-3, safeguard=0.5))
    first, last = ({name: sum(log[name] for log in part) / 10 for name in logs[0]} for part in (logs[:10], logs[-10:]))
    assert any(not torch.equal(value, before[name]) for name, value in transformer.state_dict().items())
    assert last["mse_w"] < 0.8 * first["mse_w"]
    assert last["margin"] > first["margin"] + 0.05
    assert last["accuracy"] == 1


def test_the_demos_model_generates_as_it_is_loaded_by_default():
    """In one type, although its files are fp16: transformers follows its config, diffusers takes fp32."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(REPO / "demo" / "sdxl-tiny-emoji")
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("fox", height=64, width=64, num_inference_steps=2).images
    assert image.size == (64, 64)

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
"""The reward guidance of docs/personalization.md, run on the demo's model."""

import re

import numpy as np
import pytest
import torch
from conftest import REPO
from peft import LoraConfig

from diffusers import StableDiffusionXLPipeline


MODEL = REPO / "demo" / "sdxl-tiny-emoji"
PAGE = REPO / "docs" / "personalization.md"


def new_pipeline() -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline() -> StableDiffusionXLPipeline:
    """A pipeline with a random LoRA on the UNet and both text encoders."""
    pipeline = new_pipeline()
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        encoder.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    return pipeline


@pytest.fixture
def generate_with_reward_guidance():
    namespace = {}
    (code,) = re.findall(r"```python\n(import torch\n\n\n@torch.no_grad.*?)```", PAGE.read_text(), re.DOTALL)
    exec(code, namespace)
    return namespace["generate_with_reward_guidance"]


def to_array(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_each_end_of_reward_guidance_is_an_image_of_the_plain_pipeline(pipeline, generate_with_reward_guidance):
    def guided(**scales) -> np.ndarray:
        generator = torch.Generator("cpu").manual_seed(3)
        image = generate_with_reward_guidance(
            pipeline, "weary fox", "weary cat", num_inference_steps=3, generator=generator, **scales
        )
        return to_array(image)

    def plain(pipeline, prompt: str, guidance_scale: float) -> np.ndarray:
        generator = torch.Generator("cpu").manual_seed(3)
        call = pipeline(prompt, num_inference_steps=3, guidance_scale=guidance_scale, generator=generator)
        return to_array(call.images[0])

    base = plain(new_pipeline(), "weary cat", 4.0)
    tuned = plain(pipeline, "weary fox", 1.0)
    assert base.shape == (64, 64, 3)
    assert np.abs(guided(guidance_scale=4.0, reward_scale=0.0) - base).max() <= 2
    assert np.abs(guided(guidance_scale=1.0001, reward_scale=1.0001) - tuned).max() <= 2
    assert np.abs(guided(guidance_scale=4.0, reward_scale=3.0) - base).max() > 20
    # The pipeline is what it was before.
    assert np.array_equal(plain(pipeline, "weary fox", 1.0), tuned)

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
"""What the two training scripts train with when neither model nor data are named, and what they say then."""

from pathlib import Path


DEMO = Path(__file__).resolve().parent
SDXL = "--pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --mixed_precision bf16"

PAIRS = {
    "pretrained_model_name_or_path": str(DEMO / "sdxl-tiny-emoji"),
    "dataset_name": str(DEMO / "pairs"),
    "validation_split_name": "test",
    "num_validation_pairs": 49,
    "safeguard": 0.9,
    "validation_steps": 25,
    "validation_guidance_scale": 2.0,
    "output_dir": "mapo-demo",
    "resolution": 64,
    "train_batch_size": 16,
    "learning_rate": 1.5e-5,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 10,
    "max_train_steps": 150,
}
PAIRS_NOTE = (
    "Neither --pretrained_model_name_or_path nor --dataset_name is given: training the demo. It keeps the winner by a "
    "safeguard that the paper doesn't have; --safeguard off is the paper's loss. For SDXL: accelerate launch "
    f"train_diffusion_mapo_sdxl.py --dataset_name YOUR_PAIRS {SDXL} --gradient_checkpointing --use_8bit_adam"
)

SUBJECT = {
    "pretrained_model_name_or_path": str(DEMO / "sdxl-tiny-emoji"),
    "instance_data_dir": str(DEMO / "subject"),
    "placeholder_token": ["<cat>"],
    "initializer_token": ["cat"],
    "output_dir": "mapo-demo-subject",
    "resolution": 64,
    "learning_rate": 1e-3,
    "text_encoder_lr": 1e-3,
    "max_train_steps": 300,
    "sample_batch_size": 16,
    "guidance_scale": 2.0,
    "validation_prompts": [  # expressions that no photo of subject/ has
        "<cat> face with tears of joy",
        "<cat> face with wry smile",
        "kissing <cat> face with closed eyes",
        "weary <cat> face",
        "black <cat>",
    ],
}
SUBJECT_NOTE = (
    "Neither --pretrained_model_name_or_path nor --instance_data_dir is given: training the demo. For SDXL: "
    "accelerate launch train_dreambooth_lora_mapo_sdxl.py --instance_data_dir YOUR_PHOTOS --placeholder_token '<dog>' "
    f"--initializer_token dog {SDXL} --gradient_checkpointing"
)

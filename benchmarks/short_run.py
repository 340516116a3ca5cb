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
What a short run costs in whole: 42 steps of 4 pairs on the demo, from the start of Python to the saved weights.

    python benchmarks/short_run.py

CPU seconds of one thread, each row a process of its own with an empty cache. The authors' way (8-bit AdamW, gradient
checkpointing, images and captions encoded in every step) is the training script's own step with these settings and a
UNet saved at the end, without the rest of their script.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path


HERE = Path(__file__).resolve().parent
STEPS, BATCH = 42, 4
SHORT = [f"--train_batch_size={BATCH}", "--skip_final_inference", "--num_validation_pairs=1"]
AUTHORS = f"import short_run; short_run.authors_way({BATCH})"


def authors_way(batch: int) -> None:
    import step_cost
    from step_variant import Variant, start

    with start(Variant("", "demo", flags=step_cost.AUTHORS, batch=batch, **step_cost.ENCODING), "cpu") as training:
        for _ in range(int(os.environ["STEPS"])):
            training.step()
        with tempfile.TemporaryDirectory() as folder:
            training.unet.save_pretrained(folder)


def cpu_seconds(command: list[str], steps: int) -> float:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "STEPS": str(steps)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=HERE, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"| CPU seconds | a run of 1 step | of {STEPS} steps |\n|---|---:|---:|")
    rows = {"this script, " + " ".join(SHORT[1:]): SHORT, "this script, with images and held-out pairs": SHORT[:1]}
    for name, flags in (rows | {"the authors' way": None}).items():
        seconds = []
        for steps in (1, STEPS):
            with tempfile.TemporaryDirectory() as folder:
                command = [HERE.parent / "train_diffusion_mapo_sdxl.py", *(flags or ()), f"--max_train_steps={steps}"]
                command += [f"--output_dir={folder}/out", f"--cache_dir={folder}/cache"]
                seconds.append(cpu_seconds(["-c", AUTHORS] if flags is None else command, steps))
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in seconds) + " |", flush=True)

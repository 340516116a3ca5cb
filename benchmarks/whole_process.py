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
Where the time of a whole run goes, from the user's command to its end: `step_cost.py --profile` calls this.

    python benchmarks/whole_process.py --script PATH --save FILE.json FLAGS_OF_THE_SCRIPT

The script runs as it does for a user, by accelerate's launcher; its functions are only timed. Each second counts
once, for the innermost of the functions that are timed.
"""

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path


HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "train_diffusion_mapo_sdxl.py"
START = "STEP_COST_STARTED"  # time.time() of the command
# Functions and methods of the training script, by what they are for.
PHASES = {
    "imports and accelerator": ["prepare_run"],
    "data": ["open_source", "make_batches", "EncodedPairs.__getitem__"],
    "models": ["load_pipeline", "load_unet", "prepare_training"],
    "encode": ["encode_data"],
    "images": ["generate_images", "measure_held_out"],
    "forward": ["training_step"],
    "backward": ["Accelerator.backward"],
    "optimizer": ["Accelerator.clip_grad_norm_", "AcceleratedOptimizer.step", "AcceleratedOptimizer.zero_grad"],
    "log": ["MetricsLog.end_step", "MetricsLog.write"],
    "save": ["save_weights", "save_checkpoint", "plot_curves", "save_model_card"],
}


class Stopwatch:
    """Seconds spent in each phase, without those of the phases within it, and when the first step ended."""

    def __init__(self) -> None:
        self.spent, self.inner, self.first_step = {}, [], None

    def wrap(self, owner, name: str, phase: str) -> None:
        function = getattr(owner, name, None)
        if function is None:  # a version of the script that doesn't have it
            return

        @functools.wraps(function)
        def timed(*args, **kwargs):
            before = time.perf_counter()
            self.inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - before
                self.spent[phase] = self.spent.get(phase, 0.0) + took - self.inner.pop()
                if self.inner:
                    self.inner[-1] += took
                if name == "step" and self.first_step is None:
                    self.first_step = time.time() - float(os.environ[START])

        setattr(owner, name, timed)


def run_timed(path: Path, save: Path, flags: list[str]) -> None:
    """In the process that the launcher started: the script's main, timed."""
    started, entered = float(os.environ[START]), time.time()
    sys.path.insert(0, str(path.parent))
    before = time.perf_counter()
    script = importlib.import_module(path.stem)
    from accelerate.optimizer import AcceleratedOptimizer

    watch = Stopwatch()
    watch.spent = {"launcher": entered - started, "imports and accelerator": time.perf_counter() - before}
    owners = {name: getattr(script, name, None) for name in ("EncodedPairs", "Accelerator", "MetricsLog")}
    owners["AcceleratedOptimizer"] = AcceleratedOptimizer
    for phase, names in PHASES.items():
        for name in names:
            *owner, function = name.split(".")
            watch.wrap(owners[owner[0]] if owner else script, function, phase)
    args = script.parse_args(flags)
    script.main(args)
    total = time.time() - started
    watch.spent["other"] = total - sum(watch.spent.values())
    steps = watch_steps(Path(args.output_dir) / "metrics.jsonl")
    result = {"total_s": total, "first_step_s": watch.first_step, "phases": watch.spent, "steps": steps}
    pairs = steps * args.train_batch_size * args.gradient_accumulation_steps
    save.write_text(json.dumps(result | {"pairs": pairs, "pairs_per_second": pairs / total}))


def watch_steps(metrics: Path) -> int:
    return sum("loss" in json.loads(line) for line in metrics.read_text().splitlines())


def profile(path: Path, folder: Path, flags: list[str]) -> dict:
    """Runs the script at `path` in a process of its own, by accelerate's launcher, with its output in `folder`."""
    save = folder / "profile.json"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", str(HERE / "whole_process.py")]
    command = [*launcher, f"--script={path}", f"--save={save}", f"--output_dir={folder / 'out'}", *flags]
    environment = os.environ | {START: str(time.time()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{path} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return json.loads(save.read_text())


def make_table(results: dict[str, dict]) -> str:
    """Seconds by phase, one column per run."""
    phases = ["launcher", *PHASES, "other"]
    rows = [["seconds", *results], ["---"] * (len(results) + 1)]
    for phase in phases:
        rows.append([phase, *(f"{r['phases'].get(phase, 0):.1f}" for r in results.values())])
    rows.append(["**to the end of the first step**", *(f"{r['first_step_s']:.1f}" for r in results.values())])
    rows.append(["**whole run**", *(f"{r['total_s']:.1f}" for r in results.values())])
    rows.append(["pairs/s of the whole run", *(f"{r['pairs_per_second']:.1f}" for r in results.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, default=SCRIPT)
    parser.add_argument("--save", type=Path, required=True)
    known, rest = parser.parse_known_args()
    run_timed(known.script.resolve(), known.save, rest)

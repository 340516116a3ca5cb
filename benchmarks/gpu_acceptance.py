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
Run both training scripts as a user would, on SDXL in full size with random weights and on random images of 1024 px.

    python benchmarks/gpu_acceptance.py              # on a GPU
    python benchmarks/gpu_acceptance.py --dry_run    # on the CPU in fp32 with the demo's model, 10 minutes

The most valuable checks come first. Each result is a JSON line in `--output_dir`, and the table is printed as Markdown.
A call ends after `--budget_s` seconds. The next one runs what is missing: checks that there was no time for, and those
whose script, packages or device have changed.
"""

import argparse
import datetime
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file


BENCHMARKS = Path(__file__).resolve().parent
REPOSITORY = BENCHMARKS.parent
SDXL = BENCHMARKS / "sdxl"
DEMO = REPOSITORY / "demo" / "sdxl-tiny-emoji"
COUNTED = BENCHMARKS / "results" / "memory.json"
NOT_COUNTED_GB = 1.0  # see memory.py
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "bitsandbytes")
PAIRS = "train_diffusion_mapo_sdxl.py"
PHOTOS = "train_dreambooth_lora_mapo_sdxl.py"

# Starts a script like `python SCRIPT FLAGS`, with deterministic algorithms if it is to be repeated bit for bit, and
# with a limit on the GPU's memory. At the end, it writes the peak of the memory that torch allocated.
WRAPPER = """
import pathlib, runpy, sys, torch
peak_file, deterministic, limit_gb = sys.argv[1:4]
sys.argv = sys.argv[4:]
torch.use_deterministic_algorithms(deterministic == "True")
if torch.cuda.is_available() and limit_gb != "None":
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(float(limit_gb) * 1e9 / total)
runpy.run_path(sys.argv[0], run_name="__main__")
if torch.cuda.is_available():
    pathlib.Path(peak_file).write_text(str(torch.cuda.max_memory_allocated() / 1e9))
"""


@dataclass(frozen=True)
class Check:
    """A run of a script, and what it must fulfil besides ending well."""

    name: str
    script: str
    flags: list[str]
    steps: int = 4
    resumed: bool = False  # a second run is killed and resumed, and must end with the same bits
    counted: str | None = None  # the row of results/memory.json that the peak of its memory must keep to
    limit_gb: float | None = None  # memory that it may allocate


BF16 = ["--mixed_precision=bf16"]
FP16 = ["--mixed_precision=fp16", "--gradient_checkpointing"]
CHECKPOINTING = ["--gradient_checkpointing"]
LORA = ["--use_lora"]
FULL = ["--use_8bit_adam", "--save_dtype=fp16"]
ONE = ["--train_batch_size=1"]
FOUR = ["--train_batch_size=4"]
PREVIEWS = ["--validation_prompts", "a red fox", "a boat at sea"]
NONE = ["--skip_final_inference"]

CHECKS = [
    Check("LoRA, previews", PAIRS, LORA + BF16 + CHECKPOINTING + FOUR + PREVIEWS, counted="LoRA, 4 pairs"),
    Check(
        "full, previews", PAIRS, FULL + BF16 + CHECKPOINTING + FOUR + PREVIEWS, counted="full, 8-bit AdamW, 4 pairs"
    ),
    Check("photos, previews", PHOTOS, BF16 + CHECKPOINTING),
    # A card of 12 GB leaves 11 beside the CUDA context.
    Check("LoRA, 12 GB", PAIRS, LORA + BF16 + CHECKPOINTING + ONE + PREVIEWS, counted="LoRA, 1 pair", limit_gb=11),
    Check("LoRA, resumed", PAIRS, LORA + BF16 + CHECKPOINTING + ONE + NONE, steps=6, resumed=True),
    Check("LoRA, fp16", PAIRS, LORA + FP16 + ONE + NONE, steps=8),
    Check("LoRA, buckets", PAIRS, LORA + BF16 + CHECKPOINTING + FOUR + NONE + ["--use_aspect_ratio_buckets"]),
    Check("LoRA, compiled", PAIRS, LORA + BF16 + ONE + NONE + ["--compile"]),
    Check("photos, resumed", PHOTOS, BF16 + CHECKPOINTING + NONE, steps=6, resumed=True),
    Check("full, EMA", PAIRS, FULL + BF16 + CHECKPOINTING + FOUR + NONE + ["--use_ema"]),
    Check("photos, fp16", PHOTOS, FP16 + NONE, steps=8),
    Check("full, fp16", PAIRS, FULL + FP16 + ONE + NONE, steps=8),
    Check("full, resumed", PAIRS, FULL + BF16 + CHECKPOINTING + ONE + NONE, steps=6, resumed=True),
    Check("LoRA, no checkpointing", PAIRS, LORA + BF16 + FOUR + NONE, counted="LoRA, 4 pairs, no checkpointing"),
]


class CheckFailed(Exception):
    pass


# ---- Model and data -------------------------------------------------------------------------------------------------
def write_model(folder: str) -> None:
    """Write an SDXL pipeline with random weights, in fp16, with the demo's tokenizers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        pipeline = StableDiffusionXLPipeline(
            unet=UNet2DConditionModel.from_config(json.loads((SDXL / "unet" / "config.json").read_text())),
            vae=AutoencoderKL.from_config(json.loads((SDXL / "vae" / "config.json").read_text())),
            text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(SDXL / "text_encoder")),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(SDXL / "text_encoder_2")),
            tokenizer=CLIPTokenizer.from_pretrained(DEMO / "tokenizer", model_max_length=77),
            tokenizer_2=CLIPTokenizer.from_pretrained(DEMO / "tokenizer_2", model_max_length=77),
            scheduler=EulerDiscreteScheduler.from_pretrained(SDXL, subfolder="scheduler"),
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder + ".tmp")
    os.replace(folder + ".tmp", folder)


def write_data(folder: Path, resolution: int) -> None:
    """Write 16 pairs in Pick-a-Pic's columns and 4 photos with captions: squares, portraits and landscapes."""
    random = np.random.default_rng(0)
    long_side = resolution * 3 // 2
    sizes = [(resolution, resolution), (resolution, long_side), (long_side, resolution)]

    def draw_image(size: tuple[int, int]) -> bytes:
        coarse = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG")
        return file.getvalue()

    rows = []
    for i in range(16):
        size = sizes[i % 3]
        row = {"caption": f"a red fox, number {i}", "jpg_0": draw_image(size), "jpg_1": draw_image(size)}
        rows.append({**row, "label_0": float(i % 2)})
    (folder / "pairs").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs" / "train.parquet")
    (folder / "photos").mkdir(exist_ok=True)
    for i in range(4):
        (folder / "photos" / f"{i}.jpg").write_bytes(draw_image(sizes[0]))
        (folder / "photos" / f"{i}.txt").write_text("a photo of a <cat> in the snow")


# ---- Checks ---------------------------------------------------------------------------------------------------------
def make_command(check: Check, model: Path, work_dir: Path, dry_run: bool, out: Path) -> list[str]:
    flags = [
        f"--pretrained_model_name_or_path={model}",
        f"--output_dir={out}",
        f"--cache_dir={work_dir / 'cache'}",
        f"--resolution={64 if dry_run else 1024}",
        f"--max_train_steps={check.steps}",
        "--learning_rate=1e-5",
        "--num_inference_steps=4",
        *check.flags,
    ]
    if check.script == PAIRS:
        flags.append(f"--dataset_name={work_dir / 'pairs'}")
    else:
        flags.append(f"--instance_data_dir={work_dir / 'photos'}")
        flags.extend(["--placeholder_token=<cat>", "--initializer_token=cat", "--num_rejected_per_image=1"])
    if dry_run:
        flags.append("--mixed_precision=no")  # the last one counts
    script = REPOSITORY / check.script
    return [sys.executable, "-c", WRAPPER, f"{out}.peak", str(check.resumed), str(check.limit_gb), str(script), *flags]


def run(command: list[str], out: Path, deadline: float, kill_at_step: int | None = None) -> None:
    """Run a command to its end, or until metrics.jsonl has a step. Its output goes to a file beside its folder.

    Raises:
        CheckFailed: if it ends with an error.
        TimeoutError: at the deadline.
    """
    log = Path(f"{out}.log")
    with open(log, "a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=REPOSITORY)
    try:
        while process.poll() is None:
            if time.time() > deadline:
                raise TimeoutError
            if kill_at_step is not None and len(read_steps(out)) >= kill_at_step:
                return
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        last_line = log.read_text().strip().splitlines()[-1:]
        raise CheckFailed(f"ended with {process.returncode}: {' '.join(last_line)}"[:300])


def read_steps(out: Path) -> list[dict]:
    """Read the records of training steps from metrics.jsonl. A line that is being written is left out."""
    if not (out / "metrics.jsonl").exists():
        return []
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if "loss" in record]


def read_weights(out: Path) -> dict[str, torch.Tensor]:
    weights = {}
    for file in sorted(out.glob("*.safetensors")) + sorted(out.glob("unet/*.safetensors")):
        for name, tensor in load_file(file).items():
            weights[f"{file.name}: {name}"] = tensor
    return weights


def verify(check: Check, out: Path) -> dict[str, float]:
    """Check what a run has left behind, and return its figures."""
    steps = read_steps(out)
    if len(steps) != check.steps:
        raise CheckFailed(f"metrics.jsonl has {len(steps)} steps, not {check.steps}")
    if any(step["loss"] is None for step in steps) or all(step["grad_norm"] is None for step in steps):
        raise CheckFailed("a loss or all gradients aren't finite")
    weights = read_weights(out)
    if not weights or not all(tensor.isfinite().all() for tensor in weights.values()):
        raise CheckFailed("there are no saved weights, or they aren't finite")
    if "--skip_final_inference" not in check.flags:
        pixels = np.asarray(Image.open(out / "before_after.png").convert("L"))
        if np.mean(pixels == 0) > 0.2:
            raise CheckFailed("before_after.png is black, as images are that hold NaN")
    speed = "pairs_per_second" if check.script == PAIRS else "photos_per_second"
    figures = {"per_second": steps[-1][speed]}
    peak_file = Path(f"{out}.peak")
    if peak_file.exists():
        figures["peak_gb"] = float(peak_file.read_text())
        if check.counted is not None:
            figures["counted_gb"] = json.loads(COUNTED.read_text())[check.counted]["whole run"]
            if figures["peak_gb"] > figures["counted_gb"] + NOT_COUNTED_GB:
                raise CheckFailed(f"{figures['peak_gb']:.1f} GB were allocated, {figures['counted_gb']:.1f} counted")
    return figures


def run_check(check: Check, model: Path, work_dir: Path, dry_run: bool, folder: Path, deadline: float) -> dict:
    """Run a check in an empty folder and return its figures. Raises CheckFailed or TimeoutError."""
    whole = folder / "whole"
    run(make_command(check, model, work_dir, dry_run, whole), whole, deadline)
    figures = verify(check, whole)
    if check.resumed:
        broken = folder / "broken"
        command = make_command(check, model, work_dir, dry_run, broken)
        command.extend(["--checkpointing_steps=2", "--checkpoints_total_limit=1"])
        run(command, broken, deadline, kill_at_step=3)
        run([*command, "--resume_from_checkpoint=latest"], broken, deadline)
        if "Resumed from" not in Path(f"{broken}.log").read_text():
            raise CheckFailed("the run wasn't killed and resumed")
        verify(check, broken)
        compare_weights(whole, broken)
    return figures


def compare_weights(whole: Path, broken: Path) -> None:
    expected = read_weights(whole)
    found = read_weights(broken)
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    if different:
        raise CheckFailed(f"{len(different)} of {len(expected)} tensors differ from those of the unbroken run")


# ---- Command --------------------------------------------------------------------------------------------------------
def describe(check: Check, device: str) -> dict:
    """Return everything that the result of a check depends on."""
    sources = [REPOSITORY / check.script, REPOSITORY / "mapo_loss.py", COUNTED]
    return {
        "check": check.name,
        "flags": check.flags,
        "sources": hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest(),
        "device": device,
        "versions": {package: version(package) for package in PACKAGES},
    }


def make_table(results: list[dict]) -> str:
    setup = results[0]["setup"]
    versions = ", ".join(f"{package} {number}" for package, number in setup["versions"].items())
    lines = [
        f"{results[0]['date']}, {setup['device']}; {versions}.",
        "",
        "| check | result | s | peak GB | counted | pairs or photos/s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for result in results:
        cells = [result["setup"]["check"], result["result"].replace("|", "/")]
        for name in ("seconds", "peak_gb", "counted_gb", "per_second"):
            cells.append(f"{result[name]:.3g}" if name in result else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("gpu_acceptance"), help="Folder of results and logs.")
    parser.add_argument(
        "--work_dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "gpu_acceptance",
        help="Folder of the model (7 GB), its data and the runs' files (up to 40 GB).",
    )
    parser.add_argument("--budget_s", type=float, default=540, help="Seconds after which a call ends.")
    parser.add_argument("--only", nargs="+", help="Names of the checks to run, whether or not there is a result.")
    parser.add_argument("--dry_run", action="store_true", help="Use the demo's model and the CPU.")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry_run uses the demo's model and the CPU")
    names = [check.name for check in CHECKS]
    for name in args.only or []:
        if name not in names:
            parser.error(f"--only {name!r}: the checks are {names}")

    deadline = time.time() + args.budget_s
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for deterministic algorithms
    args.output_dir.mkdir(parents=True, exist_ok=True)
    work_dir = args.work_dir.resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    device = "CPU, dry run"
    model = DEMO
    if not args.dry_run:
        device = torch.cuda.get_device_name()
        configs = sorted(SDXL.rglob("*.json")) + sorted(DEMO.glob("tokenizer*/*"))
        model = work_dir / hashlib.sha256(b"".join(config.read_bytes() for config in configs)).hexdigest()
        if not model.exists():  # written by another process, so that no memory of the GPU stays in use
            code = f"import gpu_acceptance; gpu_acceptance.write_model({str(model)!r})"
            subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, check=True)
    write_data(work_dir, 64 if args.dry_run else 1024)
    results_file = args.output_dir / "acceptance.jsonl"
    results = []
    if results_file.exists():
        results = [json.loads(line) for line in results_file.read_text().splitlines()]

    for check in CHECKS:
        setup = describe(check, device)
        if args.only is None and any(result["setup"] == setup for result in results):
            continue
        if args.only is not None and check.name not in args.only:
            continue
        began = time.time()
        result = {"setup": setup, "date": str(datetime.date.today()), "result": "pass"}
        with tempfile.TemporaryDirectory(dir=work_dir) as folder:
            try:
                result.update(run_check(check, model, work_dir, args.dry_run, Path(folder), deadline))
            except CheckFailed as error:
                result["result"] = f"FAIL: {error}"
                for log in Path(folder).glob("*.log"):
                    shutil.copy(log, args.output_dir / f"{check.name.replace(', ', '-').replace(' ', '-')}-{log.name}")
            except TimeoutError:
                print(f"The time of --budget_s was used up during {check.name!r}. Call again for the missing checks.")
                break
        result["seconds"] = time.time() - began
        print(f"{check.name}: {result['result']}", flush=True)
        results = [known for known in results if known["setup"] != setup] + [result]
        temporary = results_file.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in results))
        os.replace(temporary, results_file)

    setups = [describe(check, device) for check in CHECKS]
    current = [result for result in results if result["setup"] in setups]
    if current:
        print(make_table(current))
    if any(result["result"] != "pass" for result in current):
        sys.exit(1)


if __name__ == "__main__":
    main()

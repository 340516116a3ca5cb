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
What only a GPU can show, in one command:

    python benchmarks/gpu_acceptance.py             # at most --budget_s (540) seconds; called again, it goes on
    python benchmarks/gpu_acceptance.py --dry_run   # every line that a CPU can do, with the demo's model

Both training scripts run as users run them, on SDXL of full size with random weights and on random images of 1024 px.
The most valuable lines come first. Each is held to what it must leave behind, to the memory that memory.py counted and
to the targets for a step's cost. After each, acceptance.json and acceptance.md are written to --output_dir.
"""

import argparse
import contextlib
import datetime
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from step_report import save_aside


HERE = Path(__file__).resolve().parent
REPO = HERE.parent
PAIRS, PHOTOS = "train_diffusion_mapo_sdxl.py", "train_dreambooth_lora_mapo_sdxl.py"
CHECKPOINTING, LORA, EIGHT_BIT = "--gradient_checkpointing", "--use_lora", "--use_8bit_adam"
ONE, FOUR, BF16, FP16 = (
    "--train_batch_size=1", "--train_batch_size=4", "--mixed_precision=bf16", "--mixed_precision=fp16",
)  # fmt: skip
IMAGES = ("--validation_prompts", "a red fox", "a boat at sea")
NO_IMAGES = "--skip_final_inference"
# A script in deterministic mode, for which it has no flag.
DETERMINISTIC = (
    "import runpy, sys, torch; torch.use_deterministic_algorithms(True); sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
# Targets for full fine-tuning at 1024 px: rows of step_cost.py and what they are held to.
STEP_ROWS = ("MaPO, checkpointing", "MaPO, the authors' way", "Diffusion-DPO as commonly run", "MaPO, compiled")


def line(name: str, *flags: str, script: str = PAIRS, **options) -> dict:
    """One line of the table.

    Args:
        memory: the row of memory.py that counts it.
        needs_gpu: a CPU can't do it.
        kind: run, or resume: the run twice, once killed and resumed.
        steps: updates of the run.
    """
    return {"name": name, "flags": list(flags), "script": script, "kind": "run", "steps": 4, **options}


def list_lines() -> list[dict]:
    full = (BF16, CHECKPOINTING, EIGHT_BIT)
    return [
        line("LoRA, bf16, 4 pairs, with images", LORA, BF16, CHECKPOINTING, FOUR, *IMAGES, memory="LoRA, 4 pairs"),
        line("full, 8-bit AdamW, bf16, 4 pairs, with images", *full, FOUR, *IMAGES, memory="8-bit AdamW, 4 pairs"),
        line("LoRA and token from photos, bf16", BF16, CHECKPOINTING, script=PHOTOS),
        line("LoRA killed and resumed, deterministic", LORA, BF16, CHECKPOINTING, ONE, NO_IMAGES, kind="resume"),
        {"name": "cost of a step", "kind": "step_cost", "needs_gpu": True},
        line("full, adamw_bf16, 1 pair", "--optimizer=adamw_bf16", CHECKPOINTING, ONE, NO_IMAGES,
             memory="adamw_bf16, 1 pair"),
        line("LoRA, fp16 with its scaler", LORA, FP16, CHECKPOINTING, ONE, NO_IMAGES, needs_gpu=True, steps=8),
        line("full, 8-bit AdamW, EMA offloaded", *full, FOUR, "--use_ema", "--offload_ema", NO_IMAGES,
             memory="8-bit AdamW, 4 pairs, EMA offloaded"),
        line("LoRA, compiled, half of the activations", LORA, BF16, ONE, "--compile", "--activation_memory_budget=0.5",
             NO_IMAGES),
        line("LoRA from photos killed and resumed, deterministic", BF16, CHECKPOINTING, NO_IMAGES, script=PHOTOS,
             kind="resume"),
        line("LoRA, xformers", LORA, BF16, CHECKPOINTING, ONE, "--enable_xformers_memory_efficient_attention",
             NO_IMAGES, needs_gpu=True),
        line("full, 8-bit AdamW, fp16 with its scaler", FP16, CHECKPOINTING, EIGHT_BIT, ONE, NO_IMAGES, steps=8,
             needs_gpu=True),
        line("full, AdamW, 4 pairs", BF16, CHECKPOINTING, FOUR, NO_IMAGES, memory="AdamW, 4 pairs"),
        line("full, 8-bit AdamW, EMA", *full, FOUR, "--use_ema", NO_IMAGES, memory="8-bit AdamW, 4 pairs, EMA"),
        line("full, 8-bit AdamW, killed and resumed, deterministic", *full, ONE, NO_IMAGES, kind="resume"),
        line("LoRA, 4 pairs, no checkpointing", LORA, BF16, FOUR, NO_IMAGES,
             memory="LoRA, 4 pairs, no checkpointing"),
        line("LoRA from photos, fp16 with its scaler", FP16, CHECKPOINTING, NO_IMAGES, script=PHOTOS, steps=8,
             needs_gpu=True),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What the scripts are run on
# ---------------------------------------------------------------------------------------------------------------------


def build_model(folder: Path, device: str) -> None:
    """SDXL of full size with random weights, in fp16 to be read fast."""
    import torch
    from step_variant import load_config, make_encoders

    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with torch.device(device):
        models = {
            "unet": UNet2DConditionModel.from_config(load_config(HERE / "sdxl" / "unet")),
            "vae": AutoencoderKL.from_config(load_config(HERE / "sdxl" / "vae")),
        }
    models |= make_encoders(HERE / "sdxl", torch.device(device), torch.float16)
    torch.set_default_dtype(torch.float32)
    pipeline = StableDiffusionXLPipeline(**models, add_watermarker=False)
    pipeline.save_pretrained(folder)


def build_data(folder: Path, side: int) -> None:
    """16 pairs as Pick-a-Pic has them, and 4 photos with captions."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    random = np.random.default_rng(0)

    def image() -> bytes:
        coarse = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG")
        return file.getvalue()

    rows = [
        {"caption": f"a red fox, number {i}", "jpg_0": image(), "jpg_1": image(), "label_0": float(i % 2)}
        for i in range(16)
    ]
    (folder / "pairs").mkdir(parents=True, exist_ok=True)
    (folder / "photos").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs" / "train.parquet")
    for i in range(4):
        (folder / "photos" / f"{i}.jpg").write_bytes(image())
        (folder / "photos" / f"{i}.txt").write_text("a photo of a <cat> in the snow")


def prepare(args: argparse.Namespace) -> None:
    """The model and the data, unless an earlier call has made them."""
    from step_variant import CASES

    args.model = args.work_dir / "sdxl" if args.device == "cuda" else CASES["demo"]["folder"]
    args.resolution = 1024 if args.device == "cuda" else 64
    ready = args.work_dir / "ready"
    if ready.exists():
        return
    began = time.time()
    if args.device == "cuda":
        # A process of its own gives the GPU's memory back.
        code = f"import gpu_acceptance as g; g.build_model(g.Path({str(args.model)!r}), 'cuda')"
        subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)
    build_data(args.work_dir, args.resolution)
    ready.touch()
    print(f"model and data: {time.time() - began:.0f} s", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Lines
# ---------------------------------------------------------------------------------------------------------------------


class Failure(Exception):
    """Why a line isn't passed."""


def make_command(entry: dict, out: Path, args: argparse.Namespace, *more: str) -> list[str]:
    flags = [f"--pretrained_model_name_or_path={args.model}", f"--output_dir={out}", f"--seed={args.seed}"]
    flags += [f"--cache_dir={args.work_dir / 'cache'}", f"--resolution={args.resolution}"]
    flags += [f"--max_train_steps={entry['steps']}", "--learning_rate=1e-5"]
    if entry["script"] == PAIRS:
        flags += [f"--dataset_name={args.work_dir / 'pairs'}", "--validation_num_inference_steps=4"]
        flags += [] if LORA in entry["flags"] else ["--save_dtype=fp16"]
    else:
        flags += [f"--instance_data_dir={args.work_dir / 'photos'}", "--placeholder_token=<cat>"]
        flags += ["--initializer_token=cat", "--num_rejected_per_image=1", "--num_inference_steps=4"]
    start = ["-c", DETERMINISTIC] if entry["kind"] == "resume" else []
    return [sys.executable, *start, str(REPO / entry["script"]), *flags, *entry["flags"], *more]


class Run:
    """A training script in a process group of its own, whose console output goes to a file."""

    def __init__(self, command: list[str], out: Path, deadline: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]),
        }
        self.out, self.deadline, self.log = out, deadline, out.with_suffix(".log")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=out
            )

    def finish(self) -> None:
        try:
            code = self.process.wait(max(1.0, self.deadline - time.time()))
        finally:
            self.kill()  # with its workers, also where this process is told to stop
        if code != 0:
            lines = self.log.read_text(errors="replace").strip().splitlines()
            raise Failure(f"ended with {code}: {lines[-1] if lines else ''}"[:300])

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def kill_at(self, step: int) -> None:
        """As soon as this step is in metrics.jsonl."""
        while not any(record["step"] >= step for record in read_metrics(self.out)):
            if self.process.poll() is not None:
                raise Failure(f"ended before step {step}")
            if time.time() > self.deadline:
                self.kill()
                raise subprocess.TimeoutExpired("", 0)
            time.sleep(0.02)
        self.kill()


def read_metrics(out: Path) -> list[dict]:
    """Records of steps, oldest first; a line that is being written is passed over."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(text) for text in lines if text.endswith("\n")]
    return [record for record in records if "loss" in record]


def read_result(entry: dict, out: Path) -> dict:
    """All trained weights. Raises Failure where one isn't finite."""
    import torch
    from safetensors.torch import load_file

    name = "pytorch_lora_weights.safetensors"
    full = entry["script"] == PAIRS and LORA not in entry["flags"]
    files = sorted((out / "unet").glob("*.safetensors")) if full else [out / name]
    if not files or not files[0].exists():
        raise Failure("no weights were saved")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise Failure("weights that aren't finite were saved")
    return tensors


def check_run(entry: dict, out: Path, args: argparse.Namespace) -> dict:
    """What the line measured. Raises Failure where it isn't as it must be."""
    records = read_metrics(out)
    done = [record for record in records if not record.get("skipped")]
    if len(records) != entry["steps"]:
        raise Failure(f"{len(records)} of {entry['steps']} steps are in metrics.jsonl")
    if not done or any(record["loss"] is None or not math.isfinite(record["loss"]) for record in done):
        raise Failure("no step, or one that isn't finite, was taken")
    read_result(entry, out)
    if NO_IMAGES not in entry["flags"]:
        from PIL import Image

        found = sorted(out.glob("*before_after*.png"))
        if not found:
            raise Failure("no images were generated")
        if max(Image.open(found[0]).convert("L").getextrema()) == 0:
            raise Failure("the generated images are black")
    measured = {"peak_gb": records[-1].get("peak_memory_gb"), "skipped": len(records) - len(done)}
    if "pairs_per_second" in records[-1]:
        measured["pairs_per_second"] = records[-1]["pairs_per_second"]
    if entry.get("memory") and args.device == "cuda":
        row = args.counted["rows"][entry["memory"]]
        measured["counted_gb"] = max(*args.counted["encoding"].values(), row["training"])
        if measured["peak_gb"] > measured["counted_gb"] + 1:
            raise Failure(f"{measured['peak_gb']:.1f} GB, counted {measured['counted_gb']:.1f}")
    return measured


def do_run(entry: dict, folder: Path, args: argparse.Namespace, deadline: float) -> dict:
    out = folder / "out"
    Run(make_command(entry, out, args), out, deadline).finish()
    return check_run(entry, out, args)


def do_resume(entry: dict, folder: Path, args: argparse.Namespace, deadline: float) -> dict:
    """An unbroken run, and one that is killed after its checkpoint of step 2: both must end with the same bits."""
    entry = entry | {"steps": 6}
    saving = ("--checkpointing_steps=2", "--checkpoints_total_limit=1")
    whole, broken = folder / "whole", folder / "broken"
    Run(make_command(entry, whole, args), whole, deadline).finish()
    Run(make_command(entry, broken, args, *saving), broken, deadline).kill_at(3)
    Run(make_command(entry, broken, args, *saving, "--resume_from_checkpoint=latest"), broken, deadline).finish()
    expected, found = read_result(entry, whole), read_result(entry, broken)
    different = [name for name in expected if not expected[name].equal(found[name])]
    if different or expected.keys() != found.keys():
        raise Failure(f"{len(different)} of {len(expected)} tensors differ from the unbroken run's")
    return check_run(entry, broken, args)


def do_step_cost(entry: dict, folder: Path, args: argparse.Namespace, deadline: float) -> dict:
    """Targets: 2 x the authors' way, 2.5 x Diffusion-DPO, half of the matmul peak, memory."""
    from step_report import add_shares

    budget = min(240.0, deadline - time.time() - 10)
    command = [sys.executable, str(HERE / "step_cost.py"), "--cases=sdxl-1024", f"--budget_s={budget:.0f}"]
    command += [f"--output_dir={args.output_dir / 'step_cost'}", "--exactly", *STEP_ROWS]
    Run(command, folder / "out", deadline).finish()
    results = json.loads((args.output_dir / "step_cost" / "step_cost.json").read_text())
    rows = {row["name"]: add_shares(row, results) for row in results["rows"]}
    if missing := [name for name in STEP_ROWS[:3] if rows[name]["status"] != "ok"]:
        raise Failure(f"{missing[0]}: {rows[missing[0]]['status']}")
    best, authors, dpo = rows[STEP_ROWS[0]], rows[STEP_ROWS[1]], rows[STEP_ROWS[2]]
    ways = [row for row in (best, rows[STEP_ROWS[3]]) if row["status"] == "ok"]
    fast = max(ways, key=lambda row: row["pairs_per_second"])
    speed = fast["pairs_per_second"]
    measured = {
        "against the authors' way (2)": speed / authors["pairs_per_second"],
        "against Diffusion-DPO (2.5)": speed / dpo["pairs_per_second"],
        "matmul peak (0.5)": fast["peak_share"],
        "memory saved (0.25)": 1 - best["peak_gb"] / dpo["peak_gb"],
        "batch (4)": best["largest_batch"][0] / dpo["largest_batch"][0],
    }
    text = ", ".join(f"{name}: {value:.2f}" for name, value in measured.items())
    targets = (2, 2.5, 0.5, 0.25, 4)
    if any(value < target for value, target in zip(measured.values(), targets)):
        raise Failure(text)
    return {"note": text}


KINDS = {"run": do_run, "resume": do_resume, "step_cost": do_step_cost}


def do_line(entry: dict, args: argparse.Namespace, deadline: float) -> dict:
    """The line with its status: pass, FAIL: why, or not run: why."""
    if args.device == "cpu" and entry.get("needs_gpu"):
        return entry | {"status": "not run: needs a GPU"}
    began = time.time()
    with tempfile.TemporaryDirectory(dir=args.work_dir, prefix="run-") as folder:
        try:
            entry = entry | KINDS[entry["kind"]](entry, Path(folder), args, deadline) | {"status": "pass"}
        except Failure as error:
            entry = entry | {"status": f"FAIL: {error}"}
        except subprocess.TimeoutExpired:
            entry = entry | {"status": "not run: the time was used up"}
        if not entry["status"].startswith("pass"):
            for log in Path(folder).glob("*.log"):
                shutil.copy(log, args.output_dir / f"{args.number}-{log.name}")
    return entry | {"seconds": time.time() - began}


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def make_table(results: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    counts = Counter(re.match("pass|FAIL|not run", entry["status"])[0] for entry in results["lines"])
    verdict = ", ".join(f"{counts[status]} {status}" for status in ("pass", "FAIL", "not run"))
    text = [f"{results['date']}, {results['machine']}; {versions}. {verdict}.", ""]
    text += ["| line | result | s | peak GB | counted | pairs/s |", "|---|---|---:|---:|---:|---:|"]
    for entry in results["lines"]:
        cells = [entry["name"], entry["status"].replace("|", "/") + (f": {entry['note']}" if "note" in entry else "")]
        for name in ("seconds", "peak_gb", "counted_gb", "pairs_per_second"):
            value = entry.get(name)
            cells.append("" if value is None else f"{value:.0f}" if name == "seconds" else f"{value:.3g}")
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, ""])


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget_s", type=float, default=540, help="Ends within so many seconds.")
    parser.add_argument("--output_dir", type=Path, default=HERE / "results" / "gpu")
    parser.add_argument("--work_dir", type=Path, default=Path(tempfile.gettempdir()) / "gpu_acceptance",
                        help="For the model (7 GB), its data and the runs' files (some 40 GB).")  # fmt: skip
    parser.add_argument("--only", nargs="+", help="Lines by number, from 0, or by a part of the name; done anew.")
    parser.add_argument("--dry_run", action="store_true", help="On the CPU, with the demo's model.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(input_args)
    if not args.budget_s > 0:
        parser.error(f"--budget_s {args.budget_s:g}: must be positive")
    if not args.dry_run and not list(Path("/dev").glob("nvidia[0-9]*")):
        parser.error("this machine has no NVIDIA GPU; see --dry_run")
    args.device = "cpu" if args.dry_run else "cuda"
    args.lines = [
        entry for i, entry in enumerate(list_lines())
        if args.only is None or any(part == str(i) or part in entry["name"] for part in args.only)
    ]  # fmt: skip
    if not args.lines:
        parser.error(f"--only {' '.join(args.only)}: no such line; see `list_lines`")
    args.output_dir, args.work_dir = args.output_dir.resolve(), args.work_dir.resolve()
    args.counted = json.loads((HERE / "results" / "memory.json").read_text()) if args.device == "cuda" else None
    return args


def main(args: argparse.Namespace) -> None:
    end = time.time() + args.budget_s
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that no process is left behind
    for folder in (args.output_dir, args.work_dir):
        folder.mkdir(parents=True, exist_ok=True)
    prepare(args)
    path = args.output_dir / "acceptance.json"
    known = json.loads(path.read_text())["lines"] if path.exists() else []
    anew = [entry["name"] for entry in args.lines] if args.only is not None else []
    done = {
        entry["name"]: entry
        for entry in known
        if entry["name"] not in anew and not entry["status"].startswith("not run: the time")
    }
    from step_variant import describe_machine

    results = {"date": str(datetime.date.today()), **describe_machine(args.device)}
    for args.number, entry in enumerate(args.lines):
        if entry["name"] not in done:
            if end - time.time() > 25:
                done[entry["name"]] = do_line(entry, args, end - 5)
            else:
                done[entry["name"]] = entry | {"status": "not run: the time was used up"}
            print(f"{entry['name']}: {done[entry['name']]['status']}", flush=True)
        results["lines"] = [done[e["name"]] for e in list_lines() if e["name"] in done]
        text = json.dumps(results, indent=1) + "\n"
        save_aside(path, lambda aside: aside.write_text(text))
        save_aside(args.output_dir / "acceptance.md", lambda aside: aside.write_text(make_table(results)))
    print(make_table(results))
    sys.exit(any(entry["status"].startswith("FAIL") for entry in results["lines"]))


if __name__ == "__main__":
    main(parse_args())

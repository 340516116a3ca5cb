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
What a training step costs: the paper's Table 4 for this project, measured in one run on one machine.

    python benchmarks/step_cost.py                       # SDXL on a GPU, the demo model where there is none
    python benchmarks/step_cost.py --device cpu --dry_run
    python benchmarks/step_cost.py --profile             # where the time of the demo's whole run goes

Each row is measured in a process of its own (step_variant.py), the most important first, until `--budget_s` is used
up. A row that fails or finds no memory says so and the run goes on; after each row the results are written.
"""

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from step_report import make_plot, make_report, save_aside
from whole_process import SCRIPT, make_table, profile


HERE = Path(__file__).resolve().parent
# As the authors' script is run for the paper: 8-bit AdamW, checkpointing, everything encoded in every step, eager.
AUTHORS = ("--use_8bit_adam", "--gradient_checkpointing")
ENCODING = {"encode_images": True, "encode_captions": True}
CHECKPOINTING, LORA, EIGHT_BIT = "--gradient_checkpointing", "--use_lora", "--use_8bit_adam"


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


def row(name: str, *flags: str, **options) -> dict:
    return {"name": name, "flags": list(flags), **options}


def list_cpu_rows() -> list[dict]:
    """For the demo model; every branch that needs no GPU."""
    return [
        row("MaPO"),
        row("MaPO, the authors' way", *AUTHORS, **ENCODING),
        row("MaPO, the authors' way, 1 thread (accelerate's launcher)", *AUTHORS, **ENCODING, threads=1),
        row("MaPO, encoding each step, AdamW, no checkpointing", **ENCODING),
        row("Diffusion-DPO", method="dpo"),
        row("Diffusion-DPO as commonly run", *AUTHORS, **ENCODING, method="dpo"),
        row("SFT", method="sft"),
        row("MaPO LoRA", LORA),
        row("Diffusion-DPO LoRA", LORA, method="dpo"),
        row("SFT LoRA", LORA, method="sft"),
        row("MaPO, images not cached", encode_images=True),
        row("MaPO, checkpointing", CHECKPOINTING),
        row("MaPO, channels last", channels_last=True),
        row("MaPO, text keys once per pair", keys_once=True),
        row("MaPO, no check for finite gradients", finite_check=False),
        row("MaPO, plain attention", attention="math"),
        row("MaPO, 8-bit AdamW", EIGHT_BIT),
        row("MaPO, Adafactor", "--optimizer=adafactor"),
        row("MaPO, bf16 autocast", "--mixed_precision=bf16"),
        row("MaPO, bf16 weights, Kahan AdamW", "--optimizer=adamw_bf16", "--mixed_precision=bf16"),
        row("MaPO, compiled", "--compile"),
        row("MaPO, compiled, half of the activations", "--compile", "--activation_memory_budget=0.5"),
    ]


def list_gpu_rows() -> list[dict]:
    """For SDXL. Where images are encoded in the step, 8 workers decode them: that is not what is compared."""
    authors = (*AUTHORS, "--dataloader_num_workers=8")
    most = {"largest_batch": True}
    return [
        row("MaPO, checkpointing", CHECKPOINTING, **most),
        row("MaPO, the authors' way", *authors, **ENCODING, **most),
        row("Diffusion-DPO as commonly run", *authors, **ENCODING, method="dpo", **most),
        row("MaPO"),
        row("MaPO, compiled", "--compile"),
        row("MaPO, compiled, half of the activations", "--compile", "--activation_memory_budget=0.5", EIGHT_BIT),
        row("Diffusion-DPO, checkpointing", CHECKPOINTING, method="dpo", **most),
        row("MaPO LoRA, checkpointing", LORA, CHECKPOINTING, **most),
        row("MaPO LoRA", LORA),
        row("MaPO, bf16 weights, Kahan AdamW, checkpointing", "--optimizer=adamw_bf16", CHECKPOINTING, **most),
        row("SFT, checkpointing", CHECKPOINTING, method="sft"),
        row("MaPO, checkpointing, 8-bit AdamW", CHECKPOINTING, EIGHT_BIT, **most),
        row("MaPO, channels last, checkpointing", CHECKPOINTING, channels_last=True),
        row("MaPO, compiled, checkpointing", "--compile", CHECKPOINTING),
        row("Diffusion-DPO LoRA, checkpointing", LORA, CHECKPOINTING, method="dpo"),
        row("SFT LoRA, checkpointing", LORA, CHECKPOINTING, method="sft"),
        row("MaPO LoRA, compiled", LORA, "--compile"),
        row("MaPO, checkpointing, text keys once per pair", CHECKPOINTING, keys_once=True),
        row("MaPO, checkpointing, no check for finite gradients", CHECKPOINTING, finite_check=False),
        row("MaPO, checkpointing, cuDNN attention", CHECKPOINTING, attention="cudnn"),
        row("MaPO, checkpointing, flash attention", CHECKPOINTING, attention="flash"),
        row("MaPO, checkpointing, xformers", CHECKPOINTING, "--enable_xformers_memory_efficient_attention"),
        row("MaPO, checkpointing, images not cached", CHECKPOINTING, *authors[2:], encode_images=True),
        row("MaPO, checkpointing, fp16", CHECKPOINTING, "--mixed_precision=fp16"),
        row("MaPO, checkpointing, TF32", CHECKPOINTING, "--mixed_precision=no", "--allow_tf32"),
        row("MaPO, checkpointing, Adafactor", CHECKPOINTING, "--optimizer=adafactor"),
        row("MaPO LoRA, 1 pair, checkpointing", LORA, CHECKPOINTING, EIGHT_BIT, batch=1),
        row("MaPO, 1 pair, bf16 weights, checkpointing", "--optimizer=adamw_bf16", CHECKPOINTING, batch=1),
    ]


def list_rows(cases: list[str], device: str) -> list[dict]:
    """The first rows of each case before the last ones of any, so that a small budget leaves a table for each."""
    rows = list_cpu_rows() if device == "cpu" else list_gpu_rows()
    ranked = [(i + (0 if case == cases[0] else 8), case, r) for case in cases for i, r in enumerate(rows)]
    return [{"method": "mapo", **r, "case": case} for _, case, r in sorted(ranked, key=lambda entry: entry[0])]


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


class Child:
    """A process that measures one row. It imports and counts FLOP at once, and measures when told to.

    Args:
        variant: fields of step_variant.Variant; None: the machine's matmul peak.
    """

    def __init__(self, variant: dict | None, args: argparse.Namespace) -> None:
        self.log = tempfile.TemporaryFile("w+")
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if args.memory_gb is not None:
            environment["STEP_COST_MEMORY_GB"] = str(args.memory_gb)
        # Only what the row holds: the allocator's own reserve would count against the largest batch.
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "step_variant.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        task = {"variant": variant, "device": args.device, "seconds": args.seconds}
        self.tell(json.dumps(task))

    def tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # its exit status will say more
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def measure(self, deadline: float) -> dict:
        """What step_variant.measure returns, and `status`: ok, or why there is nothing."""
        self.tell(str(deadline - 5))  # time to stop looking for the largest batch
        try:
            answer, _ = self.process.communicate(timeout=max(1.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            self.stop()
            return {"status": "stopped: the time was used up"}
        lines = answer.splitlines()
        if self.process.returncode == 0 and lines:
            return json.loads(lines[-1])
        self.log.seek(0)
        last = (self.log.read().strip().splitlines() or [""])[-1]
        return {"status": f"ended with {self.process.returncode}: {last}"[:300]}

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)  # with its workers; it leads a group of its own
        self.process.wait()


def measure_rows(rows: list[dict], args: argparse.Namespace, results: dict, save) -> None:
    """Fills `results` row by row. On a GPU machine the next process gets ready while one measures; on a CPU that
    would disturb the measurement."""
    end = time.time() + args.budget_s
    child = Child(None, args)
    results |= child.measure(end)
    if results.pop("status") != "ok":
        sys.exit(f"{Path(__file__).name}: error: --device {args.device}: the matmul peak can't be measured")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that no process is left behind
    waiting = None
    try:
        for i, variant in enumerate(rows):
            left = end - time.time()
            if left < args.least_s:
                results["rows"].append(variant | {"status": "not run: --budget_s was used up"})
                continue
            child = waiting or Child(variant, args)
            waiting = Child(rows[i + 1], args) if args.device == "cuda" and i + 1 < len(rows) else None
            limit = min(end, time.time() + args.row_limit_s)
            results["rows"].append(variant | child.measure(limit))
            done = results["rows"][-1]
            speed = f"{done['pairs_per_second']:.3g} pairs/s" if done["status"] == "ok" else done["status"]
            print(f"[{args.budget_s - (end - time.time()):.0f} s] {done['case']}, {done['name']}: {speed}", flush=True)
            save()
    finally:
        for process in (child, waiting):
            if process is not None:
                process.stop()
        save()


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = ["demo", "sdxl-512", "sdxl-1024"]
    parser.add_argument("--device", choices=["cpu", "cuda"], help="Default: cuda, where there is one.")
    parser.add_argument("--cases", nargs="+", choices=cases, help="Default: SDXL on a GPU, else the demo model.")
    parser.add_argument("--only", nargs="+", help="Rows by number, from 0, or by a part of the name.")
    parser.add_argument("--exactly", nargs="+", help="Rows by their whole names, in this order.")
    parser.add_argument("--seconds", type=float, help="Steps of each row are timed for so long; default 8, GPU: 4.")
    parser.add_argument("--budget_s", type=float, default=510, help="No row is begun that can't end by then.")
    parser.add_argument("--row_limit_s", type=float, default=120, help="The longest that one row may take.")
    parser.add_argument("--memory_gb", type=float, help="Use the GPU as if it had no more, to see what would fit.")
    parser.add_argument("--output_dir", type=Path, help="Default: benchmarks/results/DATE-DEVICE.")
    parser.add_argument("--dry_run", action="store_true", help="Every row, one timed step each.")
    parser.add_argument("--profile", action="store_true", help="Time the demo's whole run instead, first and later.")
    parser.add_argument("--script", type=Path, default=SCRIPT, help="With --profile: another version of the script.")
    args = parser.parse_args(input_args)
    for name in ("seconds", "budget_s", "row_limit_s", "memory_gb"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} {value}: must be positive")
    if not args.script.is_file():
        parser.error(f"--script {args.script}: no such file")
    has_gpu = len(list(Path("/dev").glob("nvidia[0-9]*"))) > 0
    if args.device == "cuda" and not has_gpu:
        parser.error("--device cuda: this machine has no NVIDIA GPU; try --device cpu")
    args.device = args.device or ("cuda" if has_gpu else "cpu")
    args.cases = args.cases or (["sdxl-1024", "sdxl-512"] if args.device == "cuda" else ["demo"])
    if args.memory_gb is not None and args.device == "cpu":
        parser.error(f"--memory_gb {args.memory_gb:g} needs a GPU")
    args.seconds = 0 if args.dry_run else args.seconds or (8 if args.device == "cpu" else 4)
    args.least_s = 15 if args.device == "cuda" else 5
    args.rows = choose_rows(parser, args)
    if args.output_dir is None:
        args.output_dir = HERE / "results" / f"{datetime.date.today()}-{args.device}"
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir}: is a file; name a folder")
    return args


def choose_rows(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[dict]:
    rows = list_rows(args.cases, args.device)
    if args.exactly is not None:
        if unknown := set(args.exactly) - {r["name"] for r in rows}:
            parser.error(f"--exactly {unknown.pop()}: no such row")
        return sorted((r for r in rows if r["name"] in args.exactly), key=lambda r: args.exactly.index(r["name"]))
    if args.only is None:
        return rows
    chosen = [r for i, r in enumerate(rows) if any(o == str(i) or o in r["name"] for o in args.only)]
    if not chosen:
        parser.error(f"--only {' '.join(args.only)}: no such row; the rows are: {'; '.join(r['name'] for r in rows)}")
    return chosen


def run_profile(args: argparse.Namespace) -> None:
    """The demo as a newcomer runs it, on an empty cache, then once more."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first run", "later run"):
            out = Path(folder) / name.split()[0]
            out.mkdir()
            short = ["--max_train_steps=2", "--validation_num_inference_steps=1"] if args.dry_run else []
            flags = [f"--cache_dir={folder}/cache", "--beta_mapo=8", *short]
            results[name] = profile(args.script.resolve(), out, flags)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    record = {"date": str(datetime.date.today()), "script": args.script.name, "runs": results}
    save_aside(args.output_dir / "profile.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    save_aside(args.output_dir / "profile.md", lambda path: path.write_text(make_table(results) + "\n"))
    print(make_table(results))


def main(args: argparse.Namespace) -> None:
    if args.profile:
        run_profile(args)
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = {"date": str(datetime.date.today()), "device": args.device, "seconds_timed": args.seconds}
    results |= {"memory_gb": args.memory_gb, "rows": []}

    def save() -> None:
        text = json.dumps(results, indent=1) + "\n"
        save_aside(args.output_dir / "step_cost.json", lambda path: path.write_text(text))
        save_aside(args.output_dir / "step_cost.md", lambda path: path.write_text(make_report(results)))

    measure_rows(args.rows, args, results, save)
    make_plot(results, args.output_dir / "step_cost.png")
    print(make_report(results))


if __name__ == "__main__":
    main(parse_args())

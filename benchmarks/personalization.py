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
MaPO, DCO and DreamBooth on the demo's subject: the same photos, seeds, steps and rates, another loss.

    python benchmarks/personalization.py            # writes benchmarks/results/personalization.json and .md

Each loss is one run of train_dreambooth_lora_mapo_sdxl.py, as a user starts it; the figures are those that it prints.
Flags that this script doesn't know go to every run.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path


REPO = Path(__file__).resolve().parents[1]
LOSSES = {
    "MaPO": ["--loss_type=mapo"],
    "MaPO, prior preservation": ["--with_prior_preservation", "--prior_loss_weight=1"],
    "DCO": ["--loss_type=dco"],
    "DreamBooth": ["--loss_type=dreambooth"],
    "DreamBooth, prior preservation": ["--loss_type=dreambooth", "--with_prior_preservation"],
}
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
ROW = re.compile(r"^(.+): nearest (\d+)% before, (\d+)% after; palette (\S+) before, (\S+) after$", re.MULTILINE)
OTHERS = re.compile(r"(\d+)% -> +(\d+)%  nearest, in pixels, to a drawing of their caption")


def run(flags: list[str], output_dir: Path, cache_dir: Path) -> dict:
    """One training; returns its figures and the CPU seconds that it took, drawing included."""
    command = [sys.executable, str(REPO / "train_dreambooth_lora_mapo_sdxl.py"), *flags]
    command += [f"--output_dir={output_dir}", f"--cache_dir={cache_dir}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {"cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)}
    for title, *values in ROW.findall(said):
        names = ("nearest_before", "nearest_after", "palette_before", "palette_after")
        figures[title] = dict(zip(names, map(float, values)))
    figures["others_kept"] = dict(zip(("before", "after"), map(float, OTHERS.search(said).groups())))
    return figures


def write_table(results: dict) -> str:
    """The figures as Markdown; shares in percent."""
    captions, contexts, unnamed = "captions of the photos", "new contexts", "both without the token"
    head = ["loss", "photos' captions: subject", "palette", "new contexts: subject", "palette"]
    lines = [head + ["no token: subject", "palette", "other captions kept", "CPU s"], ["---"] * 9]
    first = next(iter(results["runs"].values()))

    def cells(figures: dict, when: str) -> list[str]:
        parts = [figures[name] for name in (captions, contexts, unnamed)]
        found = [text for p in parts for text in (f"{p['nearest_' + when]:.0f}%", f"{p['palette_' + when]:.2f}")]
        return [*found, f"{figures['others_kept'][when]:.0f}%"]

    lines.append(["starting model", *cells(first, "before"), ""])
    lines += [
        [name, *cells(figures, "after"), str(figures["cpu_seconds"])] for name, figures in results["runs"].items()
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main(args: argparse.Namespace, flags: list[str]) -> None:
    versions = {name: version(name) for name in PACKAGES}
    results = {"date": date.today().isoformat(), "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}"}
    base = hashlib.sha256((REPO / "demo/sdxl-tiny-emoji/unet/diffusion_pytorch_model.safetensors").read_bytes())
    results |= {"versions": versions, "base": base.hexdigest(), "flags": flags, "runs": {}}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    file = args.output_dir / "personalization.json"
    with tempfile.TemporaryDirectory() as folder:
        for name, loss in LOSSES.items():
            if args.losses is None or name in args.losses:
                out = (args.keep or Path(folder)) / loss[-1].removeprefix("--").replace("=", "-")
                found = run([*loss, *flags], out, args.cache_dir or Path(folder) / "cache")
                print(name, found, flush=True)
                earlier = json.loads(file.read_text()) if file.exists() else {}
                if all(earlier.get(key) == results[key] for key in ("flags", "versions", "base")):  # runs add up
                    results["runs"] |= earlier["runs"]
                results["runs"][name] = found
                file.write_text(json.dumps(results, indent=2) + "\n")
    results["runs"] = {name: results["runs"][name] for name in LOSSES if name in results["runs"]}
    about = f"{results['date']}, {results['machine']}, " + ", ".join(f"{k} {v}" for k, v in versions.items())
    (args.output_dir / "personalization.md").write_text(f"{write_table(results)}\n{about}\n")
    print(write_table(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=REPO / "benchmarks" / "results")
    parser.add_argument("--cache_dir", type=Path, help="Default: a new one, so that the first run draws the losers.")
    parser.add_argument("--keep", type=Path, help="Folder to keep the runs' output in.")
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), help="Default: all.")
    main(*parser.parse_known_args())

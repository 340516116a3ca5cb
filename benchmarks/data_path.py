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
How fast the pairs' script gets a data set of real size ready, with nothing in the VAE's place:

    python benchmarks/data_path.py --rows 20000

Makes a table of 1024 px JPEGs as large as Pick-a-Pic's, some 175 kB each, and runs the script on it up to its first
step: a run that needs few of the pairs, one that needs all, and that one again. Rates are per second of CPU time, so
per core; what a VAE would add isn't in them. The growth of memory is that of the process's own pages (`RssAnon`)
between a quarter and the end of the images.
"""

import argparse
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace


HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "train_diffusion_mapo_sdxl.py"
SIDE = 1024


def make_table(folder: Path, rows: int) -> None:
    """Parquet files of 500 rows. No two images have the same bytes: behind a JPEG's end anything may follow."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    random, files = np.random.default_rng(0), []
    for _ in range(16):
        coarse = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = (pixels + random.integers(-9, 10, pixels.shape)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=80)
        files.append(file.getvalue())
    print(f"{rows} rows, images of {sum(map(len, files)) / len(files) / 1000:.0f} kB", flush=True)
    folder.mkdir(parents=True)
    for first in range(0, rows, 500):
        numbers = range(first, min(first + 500, rows))
        table = {"caption": [f"a fox, number {i % 64}" for i in numbers]}
        for side in (0, 1):
            table[f"jpg_{side}"] = [files[(i + 5 * side) % 16] + f"{i}-{side}".encode() for i in numbers]
        table["label_0"] = [float(i % 2) for i in numbers]
        pq.write_table(pa.table(table), folder / f"train-{first:06}.parquet", row_group_size=100)


def make_model(folder: Path) -> None:
    """The demo's, with a VAE that is small but shrinks as SDXL's does: latents have their real size."""
    from diffusers import AutoencoderKL

    sys.path.insert(0, str(HERE.parent))
    from demo.settings import PAIRS

    shutil.copytree(PAIRS["pretrained_model_name_or_path"], folder)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    shutil.rmtree(folder / "vae")
    AutoencoderKL(block_out_channels=[8] * 4, norm_num_groups=8, **kinds).save_pretrained(folder / "vae")


def own_pages() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def run_to_first_step(path: Path, flags: list[str]) -> dict:
    """In a process of its own: the script's main, which ends where the first step would begin."""
    import torch

    from diffusers import AutoencoderKL

    sys.path.insert(0, str(path.parent))
    script = importlib.import_module(path.stem)
    samples = []

    def encode(self, pixels):
        samples.append((samples[-1][0] + len(pixels) if samples else len(pixels), own_pages()))
        latents = torch.zeros(len(pixels), 4, SIDE // 8, SIDE // 8)
        distribution = SimpleNamespace(mode=lambda: latents, mean=latents)
        return SimpleNamespace(latent_dist=distribution)

    class Done(BaseException):
        pass

    def stop(*inputs):
        raise Done

    AutoencoderKL.encode, script.training_step = encode, stop
    args = script.parse_args(flags)
    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        script.main(args)
    except Done:
        pass
    images = samples[-1][0] if samples else 0
    result = {"images": images, "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    if images:
        early = next(sample for sample in samples if sample[0] >= images / 4)
        growth = (samples[-1][1] - early[1]) / max(1, (images - early[0]) / 2)
        result |= {"images_per_cpu_s": images / result["cpu_s"], "growth_bytes_per_row": growth}
    return result


def start(path: Path, folder: Path, name: str, steps: int) -> dict:
    out = folder / name.replace(" ", "-")
    flags = [f"--pretrained_model_name_or_path={folder / 'model'}", f"--dataset_name={folder / 'table'}"]
    flags += [f"--output_dir={out}", f"--cache_dir={folder / 'cache'}", f"--resolution={SIDE}"]
    flags += ["--train_batch_size=4", f"--max_train_steps={steps}"]
    command = [sys.executable, __file__, "--script", str(path), "--save", str(out) + ".json", *flags]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{path} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    result = json.loads(Path(f"{out}.json").read_text())
    figures = ", ".join(f"{what} {value:,.1f}" for what, value in result.items())
    print(f"{name}: {figures}", flush=True)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--script", type=Path, default=SCRIPT, help="Another version of the script.")
    parser.add_argument("--work_dir", help="For 0.5 MB a row. Default: the system's folder for temporary files.")
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)  # within the process that is measured
    args, rest = parser.parse_known_args()
    if args.save is not None:
        args.save.write_text(json.dumps(run_to_first_step(args.script.resolve(), rest)))
    else:
        if rest or args.rows < 8:
            parser.error(f"{' '.join(rest) or '--rows: at least 8'}")
        with tempfile.TemporaryDirectory(dir=args.work_dir) as made:
            made = Path(made)
            make_table(made / "table", args.rows)
            make_model(made / "model")
            script = args.script.resolve()
            start(script, made, "a run that needs one pair in twenty", max(1, args.rows // 80))
            start(script, made, "a run that needs all", args.rows // 4)
            start(script, made, "the same again", args.rows // 4)

"""train_diffusion_mapo_sdxl.py when it is killed, stopped, out of room, or given what it can't use."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import REPO, read_weights


DEMO = REPO / "demo"
MODEL, PAIRS = DEMO / "sdxl-tiny-twemoji", DEMO / "pairs"


class Run:
    """A run of the script in a fork of the server (fork_server.py)."""

    def __init__(self, server: subprocess.Popen, log: Path, flags: list[str], file_limit: int | None = None) -> None:
        self.server, self.log = server, log
        job = {"flags": [str(flag) for flag in flags], "log": str(log), "file_limit": file_limit}
        server.stdin.write(json.dumps(job).encode() + b"\n")
        self.pid = int(server.stdout.readline())

    def wait(self, seconds: float = 600) -> int | None:
        """Exit code, negative after a signal; None where the run goes on after so many seconds."""
        if not select.select([self.server.stdout], [], [], seconds)[0]:
            return None
        return int(self.server.stdout.readline())

    def said(self) -> str:
        return self.log.read_text(errors="replace")


@pytest.fixture(scope="module")
def server(hub_cache):
    command = [sys.executable, str(REPO / "tests" / "fork_server.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def start(server, tmp_path):
    return lambda *flags, file_limit=None: Run(server, tmp_path / "log", list(flags), file_limit)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> Path:
    """The demo's model with a UNet of 0.2 M random weights, so that a run takes seconds."""
    from diffusers import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    config |= {"block_out_channels": [8, 8, 16], "norm_num_groups": 4, "attention_head_dim": [1, 1, 2]}
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def short_run(small_model, tmp_path_factory) -> list[str]:
    """Flags of a run of 12 steps, which a checkpoint may end every 2."""
    pairs = write_pairs(tmp_path_factory.mktemp("pairs") / "p.parquet")
    flags = f"--pretrained_model_name_or_path={small_model} --dataset_name={pairs} --resolution=32 --use_ema "
    flags += "--max_train_steps=12 --train_batch_size=1 --gradient_accumulation_steps=2 --checkpointing_steps=2 "
    flags += "--checkpoints_total_limit=2 --random_flip --proportion_empty_prompts=0.3 --learning_rate=1e-3 "
    flags += "--validation_inference_steps=1 --validation_prompts=rocket --resume_from_checkpoint=latest"
    return flags.split()


def write_pairs(path: Path, **changes) -> Path:
    """The first 8 of the demo's pairs as one parquet file, with some columns changed or (None) dropped."""
    columns = pq.read_table(PAIRS / "train.parquet").slice(0, 8).to_pydict() | changes
    pq.write_table(pa.table({name: values for name, values in columns.items() if values is not None}), path)
    return path


def same_weights(a: Path, b: Path) -> bool:
    first, second = read_weights(a), read_weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def unbroken(server, short_run, tmp_path_factory) -> Path:
    """Output folder of the run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("unbroken")
    run = Run(
        server, folder / "log", [*short_run, f"--output_dir={folder / 'out'}", f"--cache_dir={folder / 'cache'}"]
    )
    assert run.wait() == 0, run.said()
    return folder / "out"


# ---------------------------------------------------------------------------------------------------------------------
# Kills and signals
# ---------------------------------------------------------------------------------------------------------------------


def test_twenty_kills_at_random_moments_change_no_bit_of_the_result(start, short_run, unbroken, tmp_path):
    draw = np.random.default_rng(0)
    begin = time.monotonic()
    assert (
        start(*short_run, f"--output_dir={tmp_path / 'timed'}", f"--cache_dir={tmp_path / 'timed-cache'}").wait() == 0
    )
    life = time.monotonic() - begin
    killed, finished, in_a_row = 0, 0, 0
    while killed < 20 or in_a_row:
        out = tmp_path / str(finished)
        run = start(*short_run, f"--output_dir={out}", f"--cache_dir={out}-cache")
        code = run.wait(draw.uniform(0, life) if killed < 20 else 600)
        if code is None:
            os.kill(run.pid, signal.SIGKILL)
            code = run.wait()
        if code == -signal.SIGKILL:
            killed, in_a_row = killed + 1, in_a_row + 1
            continue
        assert code == 0, run.said()
        assert same_weights(out, unbroken), f"after {in_a_row} kills"
        steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()]
        assert steps == list(range(1, 13))
        assert not list(out.glob("tmp-*"))
        finished, in_a_row = finished + 1, 0
        shutil.rmtree(out)
    assert killed == 20 and finished > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_in_a_checkpoint_from_which_the_run_goes_on(number, start, short_run, unbroken, tmp_path):
    out = tmp_path / "out"
    flags = [*short_run, "--checkpointing_steps=100", "--logging_steps=1", f"--output_dir={out}"]
    run = start(*flags)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
        assert run.wait(0.01) is None, run.said()
    os.kill(run.pid, number)
    assert run.wait() == 0, run.said()
    (checkpoint,) = out.glob("checkpoint-*")
    assert f"{number.name}: {checkpoint} is written; go on with --resume_from_checkpoint latest" in run.said()
    assert not (out / "unet").exists()

    run = start(*flags)
    assert run.wait() == 0, run.said()
    assert f"Resumed from {checkpoint}" in run.said() and same_weights(out, unbroken)


# ---------------------------------------------------------------------------------------------------------------------
# A full disk
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(size, largest)` -> a tmpfs of so many bytes and no limit; where mounting isn't allowed, a folder and
    the size of the largest file that a run may write."""
    mounted = []

    def make(size: int, largest: int) -> tuple[Path, int | None]:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            return folder, largest
        mounted.append(folder)
        return folder, None

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def last_line(run: Run) -> str:
    return run.said().strip().splitlines()[-1]


def make_room(folder: Path) -> None:
    if os.path.ismount(folder):
        subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_cache_that_is_full_ends_the_run_before_anything_is_encoded(
    start, short_run, unbroken, tmp_path, small_disk
):
    disk, limit = small_disk(200_000, 10_000)
    flags = [*short_run, f"--output_dir={tmp_path / 'out'}", f"--cache_dir={disk}"]
    run = start(*flags, file_limit=limit)
    assert run.wait() == 1
    assert "error: --" in last_line(run) and "--cache_dir" in last_line(run) and "room" in last_line(run)
    assert "Traceback" not in run.said() and "Pictures" not in run.said()
    make_room(disk)
    run = start(*flags)
    assert run.wait() == 0, run.said()
    assert same_weights(tmp_path / "out", unbroken)


@pytest.mark.parametrize("where", ["checkpoint", "result"])
def test_where_the_output_is_full_earlier_checkpoints_stay_and_the_run_goes_on(
    where, start, short_run, unbroken, tmp_path, small_disk
):
    size = folder_size(unbroken / "checkpoint-12")
    largest = (unbroken / "checkpoint-12" / "optimizer.bin").stat().st_size
    if where == "checkpoint":
        disk, limit = small_disk(int(1.7 * size), largest - 1)
    else:
        disk, limit = small_disk(int(3.1 * size), largest + 100_000)
    cache = unbroken.parent / "cache"
    flags = [*short_run, f"--output_dir={disk}", f"--cache_dir={cache}"]
    run = start(*flags, file_limit=limit)
    assert run.wait() == 1, run.said()
    line = last_line(run)
    assert "error: --output_dir" in line and "make room" in line and "--resume_from_checkpoint latest" in line
    assert "Traceback" not in run.said()
    import train_diffusion_mapo_sdxl as script

    left = [checkpoint.name for checkpoint in script.list_checkpoints(disk)]
    if limit is None:
        assert left == (["checkpoint-2"] if where == "checkpoint" else ["checkpoint-10", "checkpoint-12"])
    make_room(disk)
    run = start(*flags)
    assert run.wait() == 0, run.said()
    assert same_weights(disk, unbroken) and (not left or f"{left[-1]}." in run.said())

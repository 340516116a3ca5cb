"""train_diffusion_mapo_sdxl.py in two processes on CPUs (gloo), against one process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import REPO, image_bytes, read_weights, rows_of
from fork_server import ForkServer
from PIL import Image
from small_model import write_model, write_pairs


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> list[str]:
    """Flags of a run of 4 steps with 4 pairs each."""
    folder = tmp_path_factory.mktemp("base")
    model = write_model(folder / "model")
    pairs = write_pairs(folder / "pairs.parquet")
    flags = f"--pretrained_model_name_or_path={model} --dataset_name={pairs} --resolution=32 --max_train_steps=4 "
    flags += "--learning_rate=1e-4 --random_flip --num_validation_pairs=5 --validation_steps=2 "
    flags += f"--checkpointing_steps=2 --num_inference_steps=2 --cache_dir={folder / 'cache'} "
    flags += "--validation_prompts rocket fox camera"
    return flags.split()


@pytest.fixture(scope="module")
def train(hub_cache, base):
    with ForkServer(base) as server:
        yield server.run


def difference(a: Path, b: Path) -> float:
    first = read_weights(a)
    second = read_weights(b)
    return max((first[name] - second[name]).abs().max().item() for name in first)


def encoded_pairs(cache: Path) -> dict[str, datasets.Dataset]:
    """The encoded pairs in a cache, by file."""
    files = sorted(cache.glob("mapo/**/*.arrow"))
    return {str(file.relative_to(cache)): datasets.Dataset.from_file(str(file)) for file in files}


def test_two_processes_do_what_one_does(train, base, tmp_path):
    """With accumulation, held-out pairs, images and the cache. When they are killed or stopped, they resume to the bit."""
    one = tmp_path / "one"
    two = tmp_path / "two"
    cache = tmp_path / "cache"
    train(one, "--train_batch_size=4", f"--cache_dir={tmp_path / 'cache-of-one'}")
    in_two = ["--train_batch_size=1", "--gradient_accumulation_steps=2", f"--cache_dir={cache}"]
    train(two, *in_two, codes=[0, 0])

    model = Path(base[0].split("=")[1])
    assert difference(one, two) < 1e-5 < 2e-4 < difference(model, two)
    records = rows_of(two / "metrics.jsonl")
    assert [record["step"] for record in records if "val_mse_w" in record] == [0, 2, 4]
    for record, other in zip(records, rows_of(one / "metrics.jsonl"), strict=True):
        record.pop("pairs_per_second", None)
        assert record == {name: pytest.approx(other[name], rel=1e-3, abs=1e-5) for name in record}
    grids = [np.asarray(Image.open(out / "before_after.png")).astype(int) for out in (one, two)]
    assert np.abs(grids[0] - grids[1]).max() <= 2

    files = encoded_pairs(cache)
    assert sorted(len(encoded) for encoded in files.values()) == [2, 3, 3]
    assert files.keys() == encoded_pairs(tmp_path / "cache-of-one").keys()
    for file, other in encoded_pairs(tmp_path / "cache-of-one").items():
        for column in ("latents_w", "latents_l", "prompt_embeds"):
            assert np.abs(np.array(files[file][column]) - np.array(other[column])).max() < 4e-3

    again = tmp_path / "again"
    flags = [*in_two, "--resume_from_checkpoint=latest"]
    compute_loss = "train_diffusion_mapo_sdxl.compute_loss"
    train(again, *flags, signal_at=[compute_loss, 10, signal.SIGKILL], signal_to=1, codes=[1, -signal.SIGKILL])
    assert [path.name for path in again.glob("checkpoint-*")] == ["checkpoint-2"]
    printed = train(again, *flags, signal_at=[compute_loss, 2, signal.SIGTERM], signal_to=1, codes=[0, 0])
    checkpoint = again / "checkpoint-3"
    assert printed.count(f"{checkpoint} is written") == 1
    assert {path.name for path in checkpoint.glob("random_states*")} == {"random_states_0.pkl", "random_states_1.pkl"}
    train(again, *flags, codes=[0, 0])
    weights = read_weights(two)
    assert all(torch.equal(weight, weights[name]) for name, weight in read_weights(again).items())


def test_batches_of_several_shapes_are_those_of_one_process(train, base, tmp_path):
    shapes = [(40, 24), (24, 40), (40, 24), (32, 32), (32, 32), (24, 40), (40, 24), (32, 32)]
    images = [image_bytes(Image.linear_gradient("L").resize(shape)) for shape in shapes]
    pairs = write_pairs(tmp_path / "pairs.parquet", jpg_0=images)
    flags = [f"--dataset_name={pairs}", "--use_aspect_ratio_buckets", "--aspect_ratio_buckets=32,32;24,40;40,24"]
    flags += ["--train_batch_size=2", "--skip_final_inference", "--num_validation_pairs=0"]
    one = tmp_path / "one"
    two = tmp_path / "two"
    train(one, *flags, "--gradient_accumulation_steps=2")
    assert train(two, *flags, codes=[0, 0]).count("Bucket") == 3
    assert difference(one, two) < 1e-5 < 2e-4 < difference(Path(base[0].split("=")[1]), two)


def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_both(train, tmp_path):
    cache = tmp_path / "cache"
    flags = ["--skip_final_inference", "--num_validation_pairs=0", f"--cache_dir={cache}"]
    train(tmp_path / "encoded", *flags, "--train_batch_size=4", "--max_train_steps=2")
    (file,) = [file for file, encoded in encoded_pairs(cache).items() if len(encoded) == 2]
    encoded = datasets.Dataset.from_file(str(cache / file))
    rows = encoded.to_dict()
    rows["latents_w"][0] = [float("nan")] * len(rows["latents_w"][0])
    (cache / file).unlink()
    datasets.Dataset.from_dict(rows, encoded.features).map(cache_file_name=str(cache / file))

    one = tmp_path / "one"
    two = tmp_path / "two"
    train(one, *flags, "--train_batch_size=4")
    printed = train(two, *flags, "--train_batch_size=2", codes=[0, 0])
    for out in (one, two):
        skipped = [record["step"] for record in rows_of(out / "metrics.jsonl") if record["grad_norm"] is None]
        assert len(skipped) == 2  # 4 steps draw every pair twice
        assert all(f"Step {step} is skipped" in printed for step in skipped)
    assert difference(one, two) < 1e-5


def test_torchrun_and_its_processes_are_all_terminated_and_leave_one_checkpoint(base, tmp_path):
    """And DDP is gone at the end of both: otherwise a process sometimes waits for gloo's threads forever."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += [str(REPO / "tests" / "count_ddp.py"), *base, f"--output_dir={out}"]
    command += ["--max_train_steps=5000", "--checkpointing_steps=5000", "--validation_steps=5000"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while not (out / "metrics.jsonl").exists() or len(rows_of(out / "metrics.jsonl")) < 2:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in [*children, process.pid]:
            os.kill(int(pid), signal.SIGTERM)
        printed = process.communicate(timeout=300)[0]
    (checkpoint,) = out.glob("checkpoint-*")
    assert f"SIGTERM: {checkpoint} is written" in printed
    assert printed.count("DDP: 0") == 2


def test_processes_that_do_not_find_one_another_are_refused(train, tmp_path):
    """WORLD_SIZE is all that is left when accelerate doesn't know the launcher."""
    printed = train(tmp_path / "out", env={"WORLD_SIZE": "2"}, codes=[1])
    assert "ValueError: 2 processes were launched, but this one sees 1" in printed


@pytest.mark.parametrize("name", ["ddp", "zero2"])
def test_accelerate_reads_the_configs(name):
    path = REPO / "configs" / f"{name}.yaml"
    config = load_config_from_file(str(path))  # raises an error for unknown keys
    parser = launch_command_parser()
    flags = [f"--config_file={path}", "--num_machines=2", "--num_processes=16", "--main_process_ip=10.0.0.1", "x.py"]
    args, *_ = _validate_launch_command(parser.parse_args(flags))
    assert (args.multi_gpu, args.use_deepspeed) == (name == "ddp", name == "zero2")
    assert (args.num_machines, args.num_processes, args.mixed_precision) == (2, 16, "bf16")
    assert set(config.deepspeed_config) <= set(vars(args))

"""train_diffusion_mapo_sdxl.py in two processes on CPUs (gloo), against one process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import train_diffusion_mapo_sdxl as script
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from conftest import REPO, read_weights
from PIL import Image
from safetensors.torch import load_file, save_file
from small_model import write_model, write_pairs


SCRIPT = str(REPO / "train_diffusion_mapo_sdxl.py")
# The script, and at its end what is left of DDP: if anything, then now and then a process waits for gloo's threads
# forever after "Done".
COUNT_DDP = str(REPO / "tests" / "count_ddp.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", COUNT_DDP]
FSDP2 = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={REPO / 'configs' / 'fsdp2.yaml'}"]
FSDP2 += ["--num_processes=2", "--mixed_precision=no", "--main_process_port=0"]
FSDP2 += [str(REPO / "tests" / "gloo_as_gpu.py"), SCRIPT]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> list[str]:
    """Flags of a run of 4 steps with 4 pairs each. With a large epsilon, updates follow tiny gradients."""
    folder = tmp_path_factory.mktemp("base")
    model, pairs = write_model(folder / "model"), write_pairs(folder / "p.parquet")
    flags = f"--pretrained_model_name_or_path={model} --dataset_name={pairs} --resolution=32 --max_train_steps=4 "
    flags += "--checkpointing_steps=2 --learning_rate=1e-2 --adam_epsilon=1e-2 --random_flip "
    return (flags + "--validation_num_inference_steps=2 --validation_prompts rocket fox camera").split()


def train_alone(base: list[str], out: Path, *flags: str) -> Path:
    """In this process -> output folder, and the cache beside it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = [*base, BATCH_OF_ONE, f"--output_dir={out}", f"--cache_dir={out}-cache", *flags]
    script.main(script.parse_args(flags))
    return out


@pytest.fixture(scope="module")
def one(base, tmp_path_factory) -> Path:
    """Output folder of the run in one process, which no test changes; its cache is beside it."""
    return train_alone(base, tmp_path_factory.mktemp("one") / "out")


@pytest.fixture
def run(base, tmp_path):
    """`run(launcher, *flags)`: in two processes -> output folder, and the cache beside it."""

    def start(launcher: list[str], *flags: str) -> Path:
        out = tmp_path / "two"
        command = [*launcher, *base, f"--output_dir={out}", f"--cache_dir={out}-cache", *flags]
        env = os.environ | {"PYTHONFAULTHANDLER": "1"}
        env |= {"ACCELERATE_USE_CPU": "true"} if launcher == TORCHRUN else {}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes, env=env, preexec_fn=all_cores) as process:
            try:
                said = "".join(process.communicate(timeout=300))
            except subprocess.TimeoutExpired:
                for pid in [*children_of(process), process.pid]:
                    os.kill(pid, signal.SIGABRT)  # each prints where it hangs
                pytest.fail("hangs\n" + "".join(process.communicate()))
        assert process.returncode == 0 and (launcher == FSDP2 or said.count("DDP: 0") == 2), said
        return out

    return start


def children_of(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def all_cores() -> None:
    """Those that pytest's other workers leave free, as these tests are the last ones."""
    os.sched_setaffinity(0, range(os.cpu_count()))


BATCH_OF_ONE, BATCH_OF_TWO = "--train_batch_size=4", "--train_batch_size=2"


def difference(a: Path, b: Path) -> float:
    first, second = read_weights(a), read_weights(b)
    return max((first[name] - second[name]).abs().max().item() for name in first)


def images_in(cache: str) -> dict[str, dict]:
    """Encoded images by their folder and file."""
    return {"/".join(p.parts[-4:]): load_file(p) for p in Path(cache).rglob("images-*/**/*.safetensors")}


def forget_the_end(out: Path) -> None:
    """As a kill after step 2 would leave it."""
    shutil.rmtree(out / "checkpoint-4")
    shutil.rmtree(out / "unet", ignore_errors=True)


def test_two_processes_do_what_one_does_with_accumulation_validation_and_caches(run, one, base):
    two = run(TORCHRUN, "--train_batch_size=1", "--gradient_accumulation_steps=2", "--validation_steps=2")

    assert difference(one, two) < 1e-5 < 1e-3 < difference(Path(base[0].split("=")[1]), two)
    first, second = images_in(f"{one}-cache"), images_in(f"{two}-cache")
    assert first.keys() == second.keys() and len(first) == 16
    for name, a in first.items():
        b = second[name]
        assert a["latents"].shape == (2, 4, 8, 8) and torch.equal(a["time_ids"], b["time_ids"])
        assert (a["latents"].float() - b["latents"].float()).abs().max() < 4e-3
    assert [path.name for path in (two / "validation").iterdir()] == ["2.png"]
    grids = [np.asarray(Image.open(out / "before_after.png")).astype(int) for out in (one, two)]
    assert grids[0].shape == grids[1].shape and np.abs(grids[0] - grids[1]).max() <= 2
    steps = [[json.loads(line) for line in (out / "metrics.jsonl").open()] for out in (one, two)]
    for single, double in zip(*steps, strict=True):
        assert single["loss"] == pytest.approx(double["loss"], rel=1e-3)
        assert single["grad_norm"] == pytest.approx(double["grad_norm"], rel=1e-3)

    weights = read_weights(two)
    forget_the_end(two)
    again = ["--resume_from_checkpoint=latest", "--skip_final_inference"]
    run(TORCHRUN, "--train_batch_size=1", "--gradient_accumulation_steps=2", *again)
    assert all(torch.equal(weights[name], weight) for name, weight in read_weights(two).items())


def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_both(run, one, base, tmp_path):
    shutil.copytree(f"{one}-cache", tmp_path / "one-cache")
    path = sorted((tmp_path / "one-cache").rglob("images-*/**/*.safetensors"))[3]  # of one pair, so of one process
    tensors = load_file(path)
    save_file(tensors | {"latents": tensors["latents"] * torch.nan}, path)
    shutil.copytree(tmp_path / "one-cache", tmp_path / "two-cache")

    skip = "--skip_final_inference"
    one, two = train_alone(base, tmp_path / "one", skip), run(TORCHRUN, BATCH_OF_TWO, skip)
    skipped = [[json.loads(line)["skipped"] for line in (out / "metrics.jsonl").open()] for out in (one, two)]
    assert skipped[0] == skipped[1] and sum(skipped[0]) == 2  # 16 positions are two epochs
    assert difference(one, two) < 1e-5


def test_a_signal_to_one_process_has_both_stop_with_one_checkpoint(base, tmp_path):
    out = tmp_path / "out"
    flags = [*base, "--max_train_steps=5000", "--checkpointing_steps=5000", BATCH_OF_TWO]
    command = [*TORCHRUN, *flags, f"--output_dir={out}", f"--cache_dir={tmp_path / 'cache'}"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, preexec_fn=all_cores
    ) as process:
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        os.kill(children_of(process)[-1], signal.SIGTERM)
        said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and said.count("DDP: 0") == 2, said
    (checkpoint,) = out.glob("checkpoint-*")
    assert f"{checkpoint} is written; go on with --resume_from_checkpoint latest" in said
    assert {path.name for path in checkpoint.glob("random_states*")} == {"random_states_0.pkl", "random_states_1.pkl"}


def test_fsdp2_gives_the_same_weights_and_resumes_to_the_same_bits(run, one):
    two = run(FSDP2, BATCH_OF_TWO)
    assert difference(one, two) < 1e-5

    weights = read_weights(two)
    forget_the_end(two)
    run(FSDP2, BATCH_OF_TWO, "--resume_from_checkpoint=latest", "--skip_final_inference")
    assert all(torch.equal(weights[name], weight) for name, weight in read_weights(two).items())


def test_fsdp2_saves_the_lora_of_one_process(run, base, tmp_path):
    lora = ["--use_lora", "--rank=4"]
    one, two = train_alone(base, tmp_path / "one", *lora), run(FSDP2, BATCH_OF_TWO, *lora)
    a, b = (load_file(out / "pytorch_lora_weights.safetensors") for out in (one, two))
    assert a.keys() == b.keys() and max((a[name] - b[name]).abs().max().item() for name in a) < 1e-5


def test_processes_that_do_not_find_one_another_end_in_one_line(base, tmp_path):
    """WORLD_SIZE is all that is left where accelerate doesn't know the launcher."""
    command = [sys.executable, SCRIPT, *base, f"--output_dir={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"WORLD_SIZE": "2"})
    assert done.returncode == 1
    assert done.stderr.count("error: 2 processes were launched but don't find one another") == 1


@pytest.mark.parametrize("name", ["ddp", "zero2", "fsdp2"])
def test_accelerate_reads_the_configs(name):
    path = REPO / "configs" / f"{name}.yaml"
    config = load_config_from_file(str(path))  # raises where a key is unknown
    assert isinstance(config, ClusterConfig) and config.num_machines == 1 and config.num_processes == 8
    flags = ["--num_machines=2", "--num_processes=16", "--machine_rank=1", "--main_process_ip=10.0.0.1"]
    parser = launch_command_parser()
    args, *_ = _validate_launch_command(parser.parse_args([f"--config_file={path}", *flags, SCRIPT]))
    assert (args.multi_gpu, args.use_deepspeed, args.use_fsdp) == (name == "ddp", name == "zero2", name == "fsdp2")
    assert (args.num_machines, args.num_processes, args.machine_rank, args.mixed_precision) == (2, 16, 1, "bf16")
    nested = {key: value for part in (config.fsdp_config, config.deepspeed_config) for key, value in part.items()}
    assert all(getattr(args, key) == value for key, value in nested.items()), "a key that the launcher doesn't know"
    known = vars(parser.parse_args([SCRIPT]))
    assert set(nested) <= set(known), set(nested) - set(known)

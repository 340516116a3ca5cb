"""train_diffusion_mapo_sdxl.py when it is killed, stopped or out of room, and what a resumed run may and may not do."""

import hashlib
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO, rows_of
from fork_server import ForkServer
from safetensors.torch import load_file, save_file
from small_model import write_model, write_pairs


KINDS = {"full": ["--use_ema"], "lora": ["--use_lora", "--rank=4", "--lora_dropout=0.2"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with the model, the pairs and the cache of all runs."""
    folder = tmp_path_factory.mktemp("base")
    write_model(folder / "model")
    write_pairs(folder / "pairs.parquet")
    return folder


@pytest.fixture(scope="module")
def flags(base) -> list[str]:
    """Flags of a run of 6 steps, which writes a checkpoint every 2."""
    flags = f"--pretrained_model_name_or_path={base / 'model'} --dataset_name={base / 'pairs.parquet'} "
    flags += f"--cache_dir={base / 'cache'} --resolution=32 --max_train_steps=6 --train_batch_size=1 "
    flags += "--gradient_accumulation_steps=2 --learning_rate=1e-3 --lr_scheduler=constant --random_flip "
    flags += "--proportion_empty_prompts=0.3 --checkpointing_steps=2 --checkpoints_total_limit=3 "
    flags += "--num_validation_pairs=2 --validation_steps=3 --num_inference_steps=1 --validation_prompts=rocket"
    return flags.split()


@pytest.fixture(scope="module")
def train(hub_cache, flags):
    with ForkServer(flags) as server:
        yield server.run


@pytest.fixture(scope="module")
def unbroken(train, tmp_path_factory) -> dict[str, Path]:
    """The output folders of runs that nothing disturbs. No test changes them."""
    folder = tmp_path_factory.mktemp("unbroken")
    for kind, flags in KINDS.items():
        train(folder / kind, *flags)
    return {kind: folder / kind for kind in KINDS}


def copy_of(run: Path, out: Path, *steps: int) -> Path:
    """Copy a run's folder as it was when it had the checkpoints of these steps and no result."""
    shutil.copytree(run / "validation", out / "validation")
    for step in steps:
        shutil.copytree(run / f"checkpoint-{step}", out / f"checkpoint-{step}")
    return out


def files_in(folder: Path) -> dict[str, str]:
    """The hashes of all files by their paths."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def result_of(out: Path) -> dict:
    """The weights, images and metrics of a run, without how long its steps took."""
    files = files_in(out)
    result = {name: files[name] for name in files if re.match(r"(?!checkpoint).*\.(safetensors|png)$", name)}
    result["metrics.jsonl"] = rows_of(out / "metrics.jsonl")
    for record in result["metrics.jsonl"]:
        record.pop("pairs_per_second", None)
    return result


def left_in(out: Path) -> list[str]:
    """What is left of checkpoints, finished or not, and of results that are being written."""
    return sorted(path.name for path in [*out.glob("checkpoint-*"), *out.glob("tmp-*")])


# ---- Kills and signals ----------------------------------------------------------------------------------------------
SCRIPT = "train_diffusion_mapo_sdxl"
# Which call of which function is the last, and what is left of checkpoints then. Each run resumes the one before.
KILLS = {
    "full": [
        (f"{SCRIPT}.encode_image", 10, []),
        (f"{SCRIPT}.compute_loss", 6, []),  # in step 2, after two calls for held-out pairs
        ("accelerate.checkpointing.save", 2, ["tmp-checkpoint-2"]),
        (f"{SCRIPT}.move_into_place", 1, ["tmp-checkpoint-2"]),
        (f"{SCRIPT}.list_checkpoints", 2, ["checkpoint-2"]),
        (f"{SCRIPT}.compute_loss", 3, ["checkpoint-2"]),
        ("shutil.rmtree", 1, ["checkpoint-4", "tmp-checkpoint-2"]),
        (f"{SCRIPT}.move_into_place", 8, ["checkpoint-6", "tmp-pipeline"]),
        (f"{SCRIPT}.save_model_card", 1, ["checkpoint-6"]),
    ],
    "lora": [
        ("accelerate.checkpointing.save", 2, ["tmp-checkpoint-2"]),
        (f"{SCRIPT}.compute_loss", 12, ["checkpoint-2"]),
        (f"{SCRIPT}.move_into_place", 3, ["checkpoint-6", "tmp-lora.safetensors"]),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_after_kills_at_any_moment_a_resumed_run_gives_the_same_bits(kind, train, unbroken, tmp_path):
    out = tmp_path / "out"
    flags = [*KINDS[kind], "--resume_from_checkpoint=latest", "--checkpoints_total_limit=1"]
    if kind == "full":
        flags.append(f"--cache_dir={tmp_path / 'cache'}")
    for function, call, left in KILLS[kind]:
        train(out, *flags, signal_at=[function, call, signal.SIGKILL], codes=[-signal.SIGKILL])
        assert left_in(out) == left, function
    train(out, *flags)
    assert result_of(out) == result_of(unbroken[kind])
    assert left_in(out) == ["checkpoint-6"]


@pytest.mark.parametrize("kind,number", [("full", signal.SIGTERM), ("lora", signal.SIGINT)])
def test_a_signal_ends_the_run_with_a_checkpoint_that_resumes(kind, number, train, unbroken, tmp_path):
    """It may come twice, as torchrun passes on what Slurm has sent to all processes already."""
    out = tmp_path / "out"
    flags = [*KINDS[kind], "--checkpointing_steps=100", "--resume_from_checkpoint=latest"]
    printed = train(out, *flags, signal_at=[f"{SCRIPT}.compute_loss", 13, number])
    assert "Traceback" not in printed
    assert f"{number.name}: {out / 'checkpoint-5'} is written" in printed
    assert left_in(out) == ["checkpoint-5"]
    assert not (out / "curves.png").exists()
    assert f"Resumed from {out / 'checkpoint-5'}" in train(out, *flags)
    assert result_of(out) == result_of(unbroken[kind])


def test_when_accelerate_launch_is_terminated_the_trainer_writes_a_checkpoint(flags, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "accelerate.commands.launch", str(REPO / f"{SCRIPT}.py"), *flags]
    command += ["--max_train_steps=300", "--checkpointing_steps=300", f"--output_dir={out}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        while not out.exists():
            assert launcher.poll() is None, launcher.stdout.read()
            time.sleep(0.05)
        launcher.terminate()
        printed = launcher.communicate(timeout=300)[0]  # ends when the trainer does
    assert "Traceback" not in printed
    assert f"The launcher ended: {out / 'checkpoint-1'} is written" in printed
    assert left_in(out) == ["checkpoint-1"]


def test_a_full_disk_ends_the_run_and_loses_nothing(train, base, unbroken, tmp_path):
    """A limit on the size of a file stands for a full disk, while pairs are encoded, a checkpoint and the result saved."""
    out = copy_of(unbroken["full"], tmp_path / "out", 4)
    shutil.copytree(base / "cache", tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "mapo")  # the encoded pairs
    flags = [*KINDS["full"], "--resume_from_checkpoint=latest", f"--cache_dir={tmp_path / 'cache'}"]
    before = files_in(out)
    largest = max(path.stat().st_size for path in out.glob("checkpoint-4/*"))
    assert "File too large" in train(out, *flags, file_limit=20_000, codes=[1])
    assert not list(tmp_path.glob("cache/mapo/**/*.arrow"))
    train(out, *flags, file_limit=largest - 1, codes=[1])
    assert left_in(out) == ["checkpoint-4", "tmp-checkpoint-6"]
    assert files_in(out).items() > before.items()
    assert "File too large" in train(out, *flags, file_limit=largest + 100_000, codes=[1])
    assert left_in(out) == ["checkpoint-4", "checkpoint-6", "tmp-pipeline"]
    train(out, *flags)
    assert result_of(out) == result_of(unbroken["full"])


# ---- What is in the output folder -----------------------------------------------------------------------------------
def test_what_an_earlier_run_has_left_is_not_replaced(train, unbroken, tmp_path):
    out = copy_of(unbroken["full"], tmp_path / "out", 4, 6)
    before = files_in(out)
    assert "checkpoint-6 of an earlier run" in train(out, *KINDS["full"], codes=[1])
    assert "checkpoint-6 of an earlier run" in train(out, *KINDS["full"], "--overwrite_output_dir", codes=[1])
    older = "--resume_from_checkpoint=checkpoint-4"
    assert "would replace what" in train(out, *KINDS["full"], older, codes=[1])
    foreign = f"--resume_from_checkpoint={unbroken['full'] / 'checkpoint-6'}"
    assert f"what {out} has: checkpoint-4, checkpoint-6." in train(out, *KINDS["full"], foreign, codes=[1])
    assert files_in(out) == before

    out = copy_of(unbroken["lora"], tmp_path / "finished")
    (out / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    before = files_in(out)
    for flag in ("--max_train_steps=6", "--resume_from_checkpoint=latest", foreign):
        assert "pytorch_lora_weights.safetensors" in train(out, *KINDS["lora"], flag, codes=[1])
    assert files_in(out) == before
    train(out, *KINDS["lora"], "--overwrite_output_dir")
    assert result_of(out) == result_of(unbroken["lora"])


def test_only_checkpoints_that_the_run_wrote_are_deleted(train, unbroken, tmp_path):
    out = copy_of(unbroken["full"], tmp_path / "out", 4)
    shutil.copytree(out / "checkpoint-4", out / "checkpoint-4-best")
    shutil.copytree(out / "checkpoint-4", out / "checkpoint-3")
    shutil.copytree(unbroken["lora"] / "checkpoint-2", out / "checkpoint-2")
    flags = ["--resume_from_checkpoint=checkpoint-4", "--checkpoints_total_limit=1"]
    train(out, *KINDS["full"], *flags)
    assert result_of(out) == result_of(unbroken["full"])
    assert left_in(out) == ["checkpoint-2", "checkpoint-3", "checkpoint-4-best", "checkpoint-6"]


def test_a_damaged_checkpoint_is_named_with_the_one_to_go_back_to(train, unbroken, tmp_path):
    out = copy_of(unbroken["full"], tmp_path / "out", 4, 6)
    for name in ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_1.pkl", "state.json"):
        file = out / "checkpoint-6" / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        printed = train(out, *KINDS["full"], "--resume_from_checkpoint=latest", codes=[1])
        assert f"ValueError: {file.parent}: can't be read" in printed, name
        assert "Delete it to resume from checkpoint-4." in printed, name
        file.write_bytes(content)


def test_a_result_is_uploaded_without_the_cache_and_the_token_is_nowhere(train, unbroken, tmp_path):
    from huggingface_hub.utils import filter_repo_objects
    from train_diffusion_mapo_sdxl import RESULT_FILES

    token = "hf_aSecretOfTheUserTheirTokenForTheHub"
    lora = tmp_path / "lora"
    flags = [*KINDS["lora"], "--output_kohya_format", "--report_to=tensorboard", f"--cache_dir={lora / 'cache'}"]
    assert token not in train(lora, *flags, f"--hub_token={token}")
    written = [path for path in lora.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in written)
    assert not any(token.encode() in path.read_bytes() for path in written)

    for out in (lora, unbroken["full"]):
        names = set(files_in(out))
        uploaded = set(filter_repo_objects(names, allow_patterns=RESULT_FILES))
        assert uploaded == {name for name in names if not name.startswith(("checkpoint-", "cache/", "logs/"))}
    assert list(lora.glob("cache/**/*.arrow"))


# ---- Which run may be resumed ---------------------------------------------------------------------------------------
def test_a_run_is_not_resumed_with_other_settings_or_pairs(train, unbroken, tmp_path):
    out = copy_of(unbroken["full"], tmp_path / "out", 4)
    flags = [*KINDS["full"], "--resume_from_checkpoint=latest"]
    changes = {
        "--beta_mapo=9": f"--beta_mapo is 9.0, but {out / 'checkpoint-4'} was trained with 8.0",
        "--seed=1": "--seed is 1, but",
        "--resolution=64": "--resolution is 64, but",
        "--train_batch_size=2": "pairs in a step is 4, but",
        "--max_train_steps=3": "checkpoint-4 is from step 4",
    }
    for change, message in changes.items():
        printed = train(out, *flags, change, codes=[1])
        assert message in printed
        assert "Encoding" not in printed
    swapped = write_pairs(tmp_path / "swapped.parquet", label_0=[0.0] * 8)
    assert "aren't those that" in train(out, *flags, f"--dataset_name={swapped}", codes=[1])
    assert left_in(out) == ["checkpoint-4"]


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_a_lora_is_not_resumed_on_other_weights_at_the_same_path(part, train, base, unbroken, tmp_path):
    (file,) = (base / "model" / part).glob("*.safetensors")
    content = file.read_bytes()
    weights = load_file(file)
    name = max(weights)
    save_file(weights | {name: weights[name] + 0.01}, file, metadata={"format": "pt"})
    printed = train(
        copy_of(unbroken["lora"], tmp_path / "out", 4), *KINDS["lora"], "--resume_from_checkpoint=latest", codes=[1]
    )
    file.write_bytes(content)
    assert "the hash of" in printed


def test_a_run_is_resumed_with_more_steps_other_batches_and_data_elsewhere(train, base, unbroken, tmp_path):
    train(tmp_path / "eight", *KINDS["full"], "--max_train_steps=8")
    shutil.copytree(base / "model", tmp_path / "model")
    shutil.copy(base / "pairs.parquet", tmp_path / "moved.parquet")
    moved = [f"--pretrained_model_name_or_path={tmp_path}/model", f"--dataset_name={tmp_path}/moved.parquet"]
    out = copy_of(unbroken["full"], tmp_path / "out", 6)
    flags = [*KINDS["full"], *moved, "--resume_from_checkpoint=latest", "--max_train_steps=8"]
    train(out, *flags)
    eight = result_of(tmp_path / "eight")
    del eight["validation/6.png"]  # were the last images of the run that is resumed
    assert result_of(out) == eight

    shutil.rmtree(out / "checkpoint-8")
    train(out, *flags, "--train_batch_size=2", "--gradient_accumulation_steps=1")
    for record, other in zip(result_of(out)["metrics.jsonl"], eight["metrics.jsonl"], strict=True):
        assert record == pytest.approx(other, rel=1e-3)

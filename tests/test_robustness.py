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
import pytest
import torch
from conftest import REPO, image_bytes, read_weights
from PIL import Image
from small_model import MODEL, PAIRS, write_pairs


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
def short_run(small_model, tmp_path_factory) -> list[str]:
    """Flags of a run of 12 steps, which a checkpoint may end every 2."""
    pairs = write_pairs(tmp_path_factory.mktemp("pairs") / "p.parquet")
    flags = f"--pretrained_model_name_or_path={small_model} --dataset_name={pairs} --resolution=32 --use_ema "
    flags += "--max_train_steps=12 --train_batch_size=1 --gradient_accumulation_steps=2 --checkpointing_steps=2 "
    flags += "--checkpoints_total_limit=2 --random_flip --proportion_empty_prompts=0.3 --learning_rate=1e-3 "
    flags += "--num_validation_pairs=2 --validation_steps=6 "
    flags += "--validation_num_inference_steps=1 --validation_prompts=rocket --resume_from_checkpoint=latest"
    return flags.split()


def same_weights(a: Path, b: Path) -> bool:
    first, second = read_weights(a), read_weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def losses(out: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return [(record["step"], record.get("loss"), record.get("val_mse_w")) for record in records]


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
        assert losses(out) == losses(unbroken) and len(losses(out)) == 15  # 3 are of held-out pairs
        assert not list(out.glob("tmp-*"))
        finished, in_a_row = finished + 1, 0
        shutil.rmtree(out)
    assert killed == 20 and finished > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_in_a_checkpoint_from_which_the_run_goes_on(number, start, short_run, unbroken, tmp_path):
    out = tmp_path / "out"
    flags = [*short_run, "--checkpointing_steps=100", f"--output_dir={out}"]
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


def test_a_cache_that_is_full_ends_the_run_in_one_line_and_keeps_what_was_encoded(
    start, short_run, unbroken, tmp_path, small_disk
):
    disk, limit = small_disk(100_000, 10_000)
    flags = [*short_run, f"--output_dir={tmp_path / 'out'}", f"--cache_dir={disk}"]
    run = start(*flags, file_limit=limit)
    assert run.wait() == 1
    assert "error: " in last_line(run) and "--cache_dir" in last_line(run) and "make room" in last_line(run)
    assert "Traceback" not in run.said()
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
    assert "error: " in line and "--output_dir" in line and "make room" in line
    assert "--resume_from_checkpoint latest" in line
    assert "Traceback" not in run.said()
    import train_diffusion_mapo_sdxl as script

    left = [checkpoint.name for checkpoint in script.list_checkpoints(disk)]
    if limit is None:
        assert left == (["checkpoint-2"] if where == "checkpoint" else ["checkpoint-10", "checkpoint-12"])
    make_room(disk)
    run = start(*flags)
    assert run.wait() == 0, run.said()
    assert same_weights(disk, unbroken) and (not left or f"{left[-1]}." in run.said())


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: data, files and folders (bad flags are in test_train_diffusion_mapo_sdxl.py)
# ---------------------------------------------------------------------------------------------------------------------

ROW = {"prompt": "fox", "chosen": "a.png", "rejected": "b.png"}


def lines(*rows) -> str:
    """Rows as JSON lines; what is text already stays as it is."""
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"


def jsonl(path: Path, text: str | bytes) -> list[str]:
    """--dataset_name of a JSONL file beside the images a.png, b.png and the broken empty.png, short.png."""
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (64, 64), color).save(path / f"{name}.png")
    (path / "empty.png").write_bytes(b"")
    (path / "short.png").write_bytes(image_bytes(Image.new("RGB", (64, 64)))[:-40])
    (path / "pairs.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    return [f"--dataset_name={path / 'pairs.jsonl'}", f"--image_root={path}"]


def parquet(path: Path, **changes) -> list[str]:
    return [f"--dataset_name={write_pairs(path / 'p.parquet', **changes)}"]


def file(path: Path, name: str, content: bytes) -> str:
    (path / name).write_bytes(content)
    return str(path / name)


def folders(path: Path, **changes: bytes) -> list[str]:
    """--dataset_name of a folder with w/0.png, l/0.png and 0.txt, some of them or others changed."""
    image = image_bytes(Image.new("RGB", (64, 64)))
    files = {"w/0.png": image, "l/0.png": image, "0.txt": b"fox"} | changes
    for name, content in files.items():
        (path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            (path / "data" / name).write_bytes(content)
    return [f"--dataset_name={path / 'data'}"]


def one_image(path: Path, name: str) -> list[str]:
    (path / "data" / name).parent.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(path / "data" / name)
    return [f"--dataset_name={path / 'data'}"]


def model(path: Path, leave_out: str = "", **changes) -> list[str]:
    """--pretrained_model_name_or_path of the demo's model without a file or folder, some JSON files changed."""
    shutil.copytree(MODEL, path / "model")
    if leave_out:
        gone = path / "model" / leave_out
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    for name, values in changes.items():
        target = path / "model" / name
        target.write_text(json.dumps(json.loads(target.read_text()) | values) if values is not None else "{")
    return [f"--pretrained_model_name_or_path={path / 'model'}", f"--dataset_name={PAIRS}"]


SCHEDULER, UNET, INDEX = "scheduler/scheduler_config.json", "unet/config.json", "model_index.json"

# name -> (path -> flags, what the line must hold)
BAD = {
    "JSONL: broken line": (lambda p: jsonl(p, lines(ROW, "{broken")), "pairs.jsonl: JSON parse error"),
    "JSONL: empty": (lambda p: jsonl(p, ""), "--dataset_name"),
    "JSONL: not UTF-8": (lambda p: jsonl(p, lines(ROW).encode() + b"\xff\xfe\n"), "pairs.jsonl: "),
    "JSONL: lists": (lambda p: jsonl(p, lines([1, 2], [3])), "pairs.jsonl: "),
    "image: no such image": (
        lambda p: jsonl(p, lines(ROW | {"chosen": "none.png"})),
        "row 0: chosen is no readable image",
    ),
    "image: image is null": (
        lambda p: jsonl(p, lines(ROW, ROW | {"rejected": None})),
        "row 1: rejected is no readable image",
    ),
    "image: image is a number": (lambda p: jsonl(p, lines(ROW | {"chosen": 3})), "row 0: chosen is no readable image"),
    "image: image is a folder": (
        lambda p: jsonl(p, lines(ROW | {"chosen": "."})),
        "row 0: chosen is no readable image",
    ),
    "image: image is left out": (
        lambda p: jsonl(p, lines(ROW, {"prompt": "x", "chosen": "a.png"})),
        "row 1: rejected is no readable",
    ),
    "image: image of zero bytes": (
        lambda p: jsonl(p, lines(ROW | {"chosen": "empty.png"})),
        "row 0: chosen is no readable image (cannot identify image file)",
    ),
    "image: truncated image": (
        lambda p: jsonl(p, lines(ROW | {"chosen": "short.png"})),
        "row 0: chosen is no readable image",
    ),
    "image: all unreadable": (
        lambda p: [*jsonl(p, lines(ROW | {"chosen": "empty.png"})), "--skip_unreadable"],
        "no row can be used (1 rows, 0 ties, 0 without a label, 1 unreadable",
    ),
    "JSONL: caption is a list": (lambda p: jsonl(p, lines(ROW | {"prompt": ["fox"]})), "row 0: prompt is ['fox']"),
    "JSONL: captions of two kinds": (lambda p: jsonl(p, lines(ROW, ROW | {"prompt": {"a": 1}})), "row 1: prompt is {"),
    "JSONL: no column fits": (lambda p: jsonl(p, lines({"a": 1})), "its columns (a) are those of no known data set"),
    "parquet: not one": (
        lambda p: ["--dataset_name=" + file(p, "x.parquet", b"none" * 9)],
        "x.parquet: Parquet magic",
    ),
    "parquet: zero bytes": (lambda p: ["--dataset_name=" + file(p, "x.parquet", b"")], "x.parquet: Parquet file size"),
    "tar: not one": (lambda p: ["--dataset_name=" + file(p, "x.tar", b"none")], "x.tar: "),
    "CSV: ragged": (lambda p: ["--dataset_name=" + file(p, "x.csv", b"a,b\n1\n1,2,3\n")], "x.csv: "),
    "an empty folder": (lambda p: [f"--dataset_name={p}"], "doesn't contain any data files"),
    "a hub id, offline": (
        lambda p: ["--dataset_name=nobody/nothing"],
        "nobody/nothing, no file or folder here: Couldn't reach",
    ),
    "folder of winners alone": (lambda p: one_image(p, "w/0.png"), "no image l/0 to go with the other one"),
    "folder of images": (lambda p: one_image(p, "0.png"), "a folder of images has w/NAME.png, l/NAME.png, NAME.txt"),
    "no such split": (lambda p: [f"--dataset_name={PAIRS}", "--dataset_split_name=trian"], 'Unknown split "trian"'),
    "one of two splits": (
        lambda p: [f"--dataset_name={PAIRS}", "--dataset_split_name=train+no"],
        'Unknown split "no"',
    ),
    "no such configuration": (lambda p: [f"--dataset_name={PAIRS}", "--dataset_config_name=zig"], "'zig' not found"),
    "labels are words": (
        lambda p: parquet(p, label_0=["yes"] * 8),
        "column label_0: could not convert string to float",
    ),
    "labels are lists": (lambda p: parquet(p, label_0=[[1.0]] * 8), "column label_0: "),
    "labels are missing": (lambda p: parquet(p, label_0=[None] * 8, label_1=None), "no row has a label that decides"),
    "a lone label is a count": (
        lambda p: parquet(p, label_0=[7] * 8),
        "--label_0_column label_0: 7; alone it must be from 0 to 1",
    ),
    "has_label is a word": (lambda p: parquet(p, has_label=["no"] * 8), "column has_label: could not convert"),
    "captions are numbers": (lambda p: parquet(p, caption=list(range(8))), "row 0: caption is 0; a caption must be"),
    "no such caption column": (
        lambda p: [*parquet(p), "--caption_column=text"],
        "no column text among caption, jpg_0",
    ),
    "no such image column": (
        lambda p: [*parquet(p), "--chosen_column=a", "--rejected_column=jpg_1"],
        "no column a among caption, jpg_0",
    ),
    "one column twice": (
        lambda p: [*parquet(p), "--chosen_column=jpg_0", "--rejected_column=jpg_0"],
        "column jpg_0 is named as both images",
    ),
    "a stream of ties": (lambda p: [*parquet(p, label_0=[0.5] * 8), "--streaming"], "no row can be used"),
    "a stream of noise": (lambda p: ["--dataset_name=" + file(p, "x.parquet", b"no"), "--streaming"], "x.parquet: "),
    "folders: empty": (lambda p: folders(p, **{"w/0.png": None, "l/0.png": None}), "data: it has no rows"),
    "folders: caption not UTF-8": (
        lambda p: folders(p, **{"0.txt": b"\xff\xfe"}),
        "data: 'utf-8' codec can't decode",
    ),
    "folders: no caption": (lambda p: folders(p, **{"0.txt": None}), "data/0.txt"),
    "folders: one side": (lambda p: folders(p, **{"l/1.png": b"x"}), "no image w/1 to go with the other one"),
    "model: no such": (lambda p: ["--pretrained_model_name_or_path=/none", f"--dataset_name={PAIRS}"], "/none: "),
    "model: empty folder": (
        lambda p: [f"--pretrained_model_name_or_path={p}", f"--dataset_name={PAIRS}"],
        "no file n",
    ),
    "model: no UNet": (lambda p: model(p, "unet"), "model: Error no file named config.json"),
    "model: no weights": (
        lambda p: model(p, "unet/diffusion_pytorch_model.safetensors"),
        "model: Error no file named diffusion_pytorch_model",
    ),
    "model: no such variant": (
        lambda p: [*model(p), "--variant=fp16"],
        "model: Error no file named diffusion_pytorch_model.fp16",
    ),
    "model: broken index": (lambda p: model(p, **{INDEX: None}), "is not a valid JSON file"),
    "model: predicts the image": (
        lambda p: model(p, **{SCHEDULER: {"prediction_type": "sample"}}),
        "it predicts sample; needs",
    ),
    "model: for inpainting": (lambda p: model(p, **{UNET: {"in_channels": 9}}), "its UNet takes 9 channels"),
    "model: a refiner": (lambda p: model(p, **{INDEX: {"text_encoder": [None, None]}}), "name an SDXL base model"),
    "VAE: no such": (
        lambda p: [*model(p), "--pretrained_vae_model_name_or_path=/none"],
        "--pretrained_vae_model_name_or_path /none: ",
    ),
    "VAE: a whole pipeline": (
        lambda p: [*model(p), f"--pretrained_vae_model_name_or_path={MODEL}"],
        "--pretrained_vae_model_name_or_path",
    ),
    "LoRA: no such layer": (lambda p: ["--use_lora", "--lora_layers=zig"], "--lora_layers zig: the UNet has no layer"),
    "LoRA: no layer": (lambda p: ["--use_lora", "--lora_layers=,"], "--lora_layers ,: "),
    "output: can't be made": (
        lambda p: ["--output_dir=/proc/none"],
        "--output_dir /proc/none: [Errno 2] No such file",
    ),
    "output: under a file": (
        lambda p: [f"--output_dir={file(p, 'f', b'')}/out"],
        "/f/out: [Errno 20] Not a directory",
    ),
    "cache: under a file": (lambda p: [f"--cache_dir={file(p, 'f', b'')}/c"], "/f/c: [Errno 20] Not a directory"),
    "fp16 without a GPU": (lambda p: ["--mixed_precision=fp16"], "--mixed_precision fp16: needs a GPU"),
    "resume: no such": (lambda p: [f"--resume_from_checkpoint={p}/none"], "/none: no whole checkpoint; try `latest`"),
    "hub: a name of three parts": (lambda p: ["--push_to_hub", "--hub_model_id=a/b/c"], "--push_to_hub a/b/c: "),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_ends_in_one_line(fault, hub_cache, tmp_path, monkeypatch, capfd):
    import train_diffusion_mapo_sdxl as script
    from accelerate.state import AcceleratorState

    if not fault.startswith(
        ("image", "a stream of ties", "model", "VAE", "LoRA")
    ):  # the others are met while models are loaded
        for name in ("load_pipeline", "load_unet"):
            monkeypatch.setattr(script, name, lambda *_: pytest.fail("a model was loaded"))
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(tmp_path)
    make, expected = BAD[fault]
    flags = make(tmp_path)
    if any(flag.startswith("--dataset_name=") for flag in flags) and not flags[0].startswith("--pretrained"):
        flags = [f"--pretrained_model_name_or_path={MODEL}", *flags]
    with pytest.raises(SystemExit) as stop:
        script.main(script.parse_args(["--resolution=64", f"--cache_dir={hub_cache}", *flags]))
    said = capfd.readouterr()
    if stop.value.code == 2:  # of argparse
        (line,) = [line for line in said.err.splitlines() if "error: " in line]
    else:
        line = stop.value.code
        assert "Traceback" not in said.err and line.startswith("train_diffusion_mapo_sdxl.py: error: ")
    assert expected in line and "\n" not in line


# ---------------------------------------------------------------------------------------------------------------------
# Other settings than the checkpoint's
# ---------------------------------------------------------------------------------------------------------------------

OTHER = [
    ("--seed=1", "--seed 1: checkpoint-12 was trained with 0"),
    ("--beta_mapo=9", "--beta_mapo 9.0: checkpoint-12 was trained with 8.0"),
    ("--train_batch_size=2", "pairs in a step 4: checkpoint-12 was trained with 2"),
    ("--use_lora", "--use_lora True: checkpoint-12 was trained with False"),
    ("--learning_rate=1", "--learning_rate 1.0: checkpoint-12 was trained with 0.001"),
    ("--optimizer=adafactor", "--optimizer adafactor: checkpoint-12 was trained with adamw"),
    ("--max_train_samples=4", "--max_train_samples 4: checkpoint-12 was trained with None"),
    ("--max_train_steps=8", "--max_train_steps 8: checkpoint-12 is beyond it"),
    ("--dataset_name", "its pairs aren't those that checkpoint-12 was trained with"),
]


@pytest.mark.parametrize("flag,expected", OTHER)
def test_a_run_does_not_go_on_with_other_settings_or_pairs(
    flag, expected, short_run, unbroken, tmp_path, monkeypatch, hub_cache
):
    import train_diffusion_mapo_sdxl as script
    from accelerate.state import AcceleratorState

    if flag != "--dataset_name":  # whose pairs are known when their images were read
        monkeypatch.setattr(script, "load_unet", lambda *_: pytest.fail("a model was loaded"))
    AcceleratorState._reset_state(reset_partial_state=True)
    if flag == "--dataset_name":
        flag = f"--dataset_name={write_pairs(tmp_path / 'p.parquet', label_0=[0.0] * 8)}"
    flags = [*short_run, flag, f"--output_dir={unbroken}", f"--cache_dir={hub_cache}"]
    with pytest.raises(SystemExit) as stop:
        script.main(script.parse_args(flags))
    assert expected in stop.value.code and "\n" not in stop.value.code


def test_a_run_goes_on_to_more_steps_with_data_that_moved_and_the_batch_split_otherwise(
    start, short_run, unbroken, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    moved = write_pairs(tmp_path / "moved.parquet")
    more = [
        f"--dataset_name={moved}",
        "--max_train_steps=13",
        "--train_batch_size=2",
        "--gradient_accumulation_steps=1",
    ]
    run = start(*short_run, *more, f"--output_dir={out}", f"--cache_dir={unbroken.parent / 'cache'}")
    assert run.wait() == 0, run.said()
    assert "checkpoint-12." in run.said()
    assert [step for step, loss, _ in losses(out) if loss is not None] == list(range(1, 14))
    assert not same_weights(out, unbroken)

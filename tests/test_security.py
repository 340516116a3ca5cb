"""Data and models come from strangers: no code of theirs runs, no token leaks, no file takes all memory."""

import importlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, image_bytes
from PIL import Image
from small_model import write_model, write_pairs


SCRIPTS = ("train_diffusion_mapo_sdxl", "train_dreambooth_lora_mapo_sdxl")
SHORT = {
    SCRIPTS[0]: "--resolution=64 --max_train_steps=1 --train_batch_size=2 --validation_num_inference_steps=1",
    SCRIPTS[1]: "--resolution=64 --max_train_steps=1 --num_inference_steps=1 --num_rejected_per_image=1",
}


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def trap(tmp_path):
    """A pickle that shows when it was loaded; afterwards, that none was."""
    sprung = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(sprung)))
    sprung.rmdir()  # it works
    yield Trap(sprung)
    assert not sprung.exists()


@pytest.fixture
def train(hub_cache, tmp_path):
    """`train(script, model, data, *flags)` -> what it said at its end, or None where it ended well."""

    def run(script: str, model: Path, data: Path, *flags: str) -> str | None:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        module, of_data = importlib.import_module(script), "dataset_name"
        if script == SCRIPTS[1]:
            of_data, flags = "instance_data_dir", ("--placeholder_token=<cat>", "--initializer_token=cat", *flags)
        flags = [f"--pretrained_model_name_or_path={model}", f"--{of_data}={data}", *SHORT[script].split(), *flags]
        flags = [f"--output_dir={tmp_path / 'out'}", f"--cache_dir={tmp_path / 'cache'}", *flags]
        try:
            module.main(module.parse_args([*flags, "--validation_prompts", "red fox"]))
        except SystemExit as end:
            return str(end.code)

    return run


def data_of(script: str, folder: Path) -> Path:
    if script == SCRIPTS[0]:
        return write_pairs(folder / "pairs.parquet")
    return Path(shutil.copytree(REPO / "demo" / "subject", folder / "photos"))


def one_line(said: str | None, *words: str) -> None:
    assert said is not None and len(said.splitlines()) == 1 and ": error: " in said, said
    for word in words:
        assert word in said, said


# ---------------------------------------------------------------------------------------------------------------------
# Code in models and data
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder_2"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_models_pickle_is_not_run(script, part, trap, train, tmp_path):
    model = write_model(tmp_path / "model")
    (weights,) = (model / part).glob("*.safetensors")
    weights.unlink()
    name = "pytorch_model.bin" if part == "text_encoder_2" else "diffusion_pytorch_model.bin"
    torch.save({"weight": trap}, model / part / name)
    one_line(train(script, model, data_of(script, tmp_path)), f"--pretrained_model_name_or_path {model}: ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_models_own_code_is_not_run(script, train, tmp_path):
    """Of a pipeline and of a UNet, as the hub's `trust_remote_code` would have it."""
    model, sprung = write_model(tmp_path / "model"), tmp_path / "sprung"
    code = f"import os\nos.mkdir({str(sprung)!r})\nclass Own:\n    pass\n"
    for place in ("pipeline.py", "unet/own.py", "own.py"):
        (model / place).write_text(code)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"_class_name": ["pipeline", "Own"]}))
    config = json.loads((model / "unet" / "config.json").read_text())
    own = {"auto_map": {"AutoModel": "own.Own"}, "_class_name": "Own"}
    (model / "unet" / "config.json").write_text(json.dumps(config | own))
    train(script, model, data_of(script, tmp_path))  # whether it goes on without is up to diffusers
    assert not sprung.exists()


def object_array(trap: Trap) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([trap], dtype=object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("member", ["npy", "npz", "pth", "pickle", "pyd"])
def test_pickles_in_a_tar_of_pairs_are_not_run(member, trap, train, tmp_path):
    image = image_bytes(Image.new("RGB", (64, 64)))
    content = object_array(trap) if member.startswith("np") else pickle.dumps(trap)
    if member == "pth":
        torch.save(trap, tmp_path / "x.pth")
        content = (tmp_path / "x.pth").read_bytes()
    if member == "npz":
        np.savez(tmp_path / "x.npz", x=np.array([trap], dtype=object))
        content = (tmp_path / "x.npz").read_bytes()
    files = {"original_prompt.txt": b"fox", "jpg_0.jpg": image, "jpg_1.jpg": image, "label_0.txt": b"1"}
    files |= {f"more.{member}": content}
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"0.{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    train(SCRIPTS[0], write_model(tmp_path / "model"), tmp_path / "pairs.tar")


def test_a_data_sets_own_code_and_pickled_tables_are_not_run(trap, train, tmp_path):
    data, model = tmp_path / "pairs", write_model(tmp_path / "model")
    data.mkdir()
    code = f"import os\nos.mkdir({trap.folder!r})\n"
    for name in ("pairs.py", "dataset.py", "__init__.py"):
        (data / name).write_text(code)
    (data / "train.pkl").write_bytes(pickle.dumps(trap))
    one_line(train(SCRIPTS[0], model, data), f"--dataset_name {data}: ")
    one_line(train(SCRIPTS[0], model, data / "pairs.py"), f"--dataset_name {data / 'pairs.py'}: not one of .parquet")
    one_line(train(SCRIPTS[0], model, data / "train.pkl"), "train.pkl: not one of .parquet")
    (data / "pairs.py").unlink()  # of the folder's name: `datasets` would have run it once
    write_pairs(data / "train.parquet")  # what else is there stays as it is
    assert train(SCRIPTS[0], model, data) is None


def test_pickled_bytes_as_images_are_not_run(trap, train, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.parquet", jpg_0=[pickle.dumps(trap)] * 8)
    one_line(train(SCRIPTS[0], write_model(tmp_path / "model"), pairs), "is no readable image")


def test_no_source_asks_for_code_of_others():
    for path in [*REPO.glob("*.py"), *REPO.glob("[!.]*/*.py")]:
        if path.parent.name != "tests":
            asked = re.findall(r"trust_remote_code|weights_only=False|allow_pickle=True|\bpickle\b", path.read_text())
            assert set(asked) <= ({"pickle"} if "import pickle" not in path.read_text() else set()), path


# ---------------------------------------------------------------------------------------------------------------------
# The hub's token
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flag", "environment"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_token_is_in_nothing_that_a_run_leaves_or_says(script, how, train, tmp_path, monkeypatch, capfd, caplog):
    token = "hf_" + "aSecretOfTheUser" * 2
    monkeypatch.setenv("HF_TOKEN", token if how == "environment" else "")
    flags = [f"--hub_token={token}"] if how == "flag" else []
    flags += ["--report_to=tensorboard", "--checkpointing_steps=1"]
    model, data = write_model(tmp_path / "model"), data_of(script, tmp_path)
    assert train(script, model, data, *flags) is None
    # The hub is out of reach here: its error is said before training.
    said = train(script, model, data, *flags, "--push_to_hub", f"--output_dir={tmp_path / 'other'}")
    one_line(said, "--push_to_hub other: ")
    out, err = capfd.readouterr()
    assert token not in f"{said}{out}{err}{caplog.text}"
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(model)]
    names = {path.name for path in files}
    assert {"README.md", "metrics.jsonl", "state.json"} <= names and any("tfevents" in name for name in names)
    assert [path for path in files if token.encode() in path.read_bytes()] == []


# ---------------------------------------------------------------------------------------------------------------------
# Decompression bombs
# ---------------------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """A PNG of some 50 kB that is 1.2 GB in RGB: 20,000 x 20,000 black pixels."""
    side, packer = 20_000, zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert len(png) < 100_000
    return png


def test_a_bomb_among_pairs_is_refused(bomb, train, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.parquet", jpg_1=[bomb] * 8)
    said = train(SCRIPTS[0], write_model(tmp_path / "model"), pairs)
    one_line(said, "is no readable image", "decompression bomb")


def test_a_bomb_among_photos_is_refused(bomb, train, tmp_path):
    photos = data_of(SCRIPTS[1], tmp_path)
    (photos / "smiling.png").write_bytes(bomb)
    said = train(SCRIPTS[1], write_model(tmp_path / "model"), photos)
    one_line(said, "smiling.png", "decompression bomb")


def test_bombs_are_refused_by_the_tools(bomb, tmp_path):
    from evaluation import score
    from pairs import build_preference_pairs, vote

    images = tmp_path / "images"
    images.mkdir()
    for i in range(2):
        (images / f"{i}.png").write_bytes(bomb)
        (images / f"{i}.txt").write_text("fox\n")
    table = write_pairs(tmp_path / "pairs.parquet", jpg_1=[bomb] * 8)
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    for script, flags in (
        (vote, [f"--images={images}", f"--output_dir={out}-vote", "--write"]),
        (build_preference_pairs, ["from-images", f"--images={images}", f"--model={model}", f"--output_dir={out}"]),
        (score, [f"--pairs={table}", "--metrics", "style", f"--output={out}.jsonl"]),
    ):
        with pytest.raises(SystemExit) as end:
            script.main(script.parse_args(flags))
        one_line(str(end.value.code), "decompression bomb")

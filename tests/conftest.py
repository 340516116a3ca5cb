"""Run the scripts on tiny models, offline. Everything that they cache goes to a folder of the test session."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path


# With -n 2 (pytest-xdist), each worker gets a core of its own: threads that wait for a busy core spin for minutes.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import pytest  # noqa: E402
import torch  # noqa: E402
from small_model import PAIRS, write_model  # noqa: E402


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("PYTHONWARNINGS", None)  # what the scripts print is judged as users see it
REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))


@pytest.fixture(scope="session", autouse=True)
def hub_cache(tmp_path_factory) -> Path:
    """The folder for everything that `datasets` and the scripts cache, away from the user's own."""
    cache = tmp_path_factory.mktemp("cache")
    os.environ["HF_HOME"] = str(cache)
    return cache


@pytest.fixture(autouse=True)
def subnormal_numbers():
    """The scripts flush subnormal numbers to zero in their process, which is also that of the next test."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def train(hub_cache, small_model, tmp_path):
    """Run the pairs' script in this process: `train("--beta_mapo=8")` returns its output folder.

    It takes 4 steps of 4 pairs on the small model and the demo's pairs, unless flags say otherwise.
    """

    def run(*flags: str, output_dir: str = "out", final_images: bool = False) -> Path:
        import train_diffusion_mapo_sdxl as script
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        out = tmp_path / output_dir
        defaults = [
            f"--pretrained_model_name_or_path={small_model}",
            f"--dataset_name={PAIRS}",
            "--resolution=64",
            "--max_train_steps=4",
            "--train_batch_size=4",
            "--max_train_samples=16",
            "--num_inference_steps=2",
            f"--output_dir={out}",
            f"--cache_dir={hub_cache}",
        ]
        if not final_images:
            defaults.append("--skip_final_inference")
        script.main(script.parse_args([*defaults, *flags]))
        return out

    return run


@pytest.fixture
def launch(hub_cache, tmp_path):
    """Run a script with `accelerate launch`, as users do: `launch(script, "--beta_mapo=8")` returns the process."""

    def run(script: str, *flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "accelerate.commands.launch", str(REPO / script), *flags]
        command.append(f"--cache_dir={hub_cache}")
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


def read_weights(out: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(out / "unet" / "diffusion_pytorch_model.safetensors")


def image_bytes(image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(script: str, *flags, **options) -> subprocess.Popen:
    command = [sys.executable, str(REPO / script), *map(str, flags)]
    options["env"] = os.environ | {"OMP_NUM_THREADS": "1"}  # threads that wait for a busy core spin for minutes
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]

"""Runs the scripts on the demo as a user would, offline; all that they cache goes to a folder of the session."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path


# With -n 2 (pytest-xdist) a core for each worker: threads that wait for a core in use spin for minutes.
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

# A run of seconds; flags of a test come after these and win.
SHORT = (
    "--max_train_steps=4 --train_batch_size=4 --max_train_samples=16 --validation_num_inference_steps=2 "
    "--validation_guidance_scale=2 --num_validation_pairs=4 --validation_prompts rocket"
).split()


# Modules and tests with the mark `fast`.
FAST = {
    "test_mapo_loss",
    "test_both_scripts",
    "test_docs",
    "test_a_bad_flag_ends_in_one_line",
    "test_help_says_what_each_flag_does",
    "test_every_command_has_something_that_runs_it",
    "test_every_flag_and_file_that_a_page_names_is_there",
    "test_diffusers_linter_passes",
    "test_one_pass_over_winners_then_losers_that_share_all_but_the_picture",
    "test_the_loss_is_appendix_a_pair_by_pair_in_float64",
    "test_noise_and_timestep_of_a_pair_depend_on_seed_and_position_alone",
    "test_each_loss_is_its_formula_sample_by_sample_in_float64",
    "test_the_label_decides_which_image_won_and_ties_and_unlabelled_rows_are_left_out",
    "test_every_layout_gives_the_same_winners_and_losers",
    "test_every_form_of_input_gives_the_same_photos",
    "test_image_paths_stay_in_their_root",
    "test_report_by_hand",
    "test_context_of_an_answer",
    "test_rating_of_an_answer",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if {item.path.stem, item.originalname} & FAST:
            item.add_marker("fast")


@pytest.fixture(scope="session", autouse=True)
def hub_cache(tmp_path_factory) -> Path:
    """Everything that `datasets` and the scripts cache, away from the user's."""
    cache = tmp_path_factory.mktemp("cache")
    os.environ["HF_HOME"] = str(cache)
    return cache


@pytest.fixture(autouse=True)
def subnormal_numbers():
    """The scripts flush them to zero in their process, which here is that of the next test too."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def train(hub_cache, small_model, tmp_path):
    """Runs the script in this process: `train("--beta_mapo=8")` -> its output folder. On the small model and the
    demo's pairs, unless flags name others; as the demo with `demo=True`, which takes ten times as long."""

    def run(*flags: str, output_dir: str = "out", demo: bool = False) -> Path:
        import train_diffusion_mapo_sdxl as script
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        named = [f"--pretrained_model_name_or_path={small_model}", f"--dataset_name={PAIRS}", "--resolution=64"]
        named = [] if demo else named
        out = tmp_path / output_dir
        script.main(script.parse_args([*named, *SHORT, f"--output_dir={out}", f"--cache_dir={hub_cache}", *flags]))
        return out

    return run


@pytest.fixture
def launch(hub_cache, tmp_path):
    """`launch(script, "--beta_mapo=8")`: in processes of its own, as users do -> the finished one with its output."""

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


def image_bytes(image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
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

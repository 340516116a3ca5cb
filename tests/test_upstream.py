"""What goes to diffusers works there: six files on their own, laid out by UPSTREAM.md's own commands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, rows_of
from small_model import write_model, write_pairs


FILES = {
    "mapo_loss.py",
    "train_diffusion_mapo_sdxl.py",
    "train_dreambooth_lora_mapo_sdxl.py",
    "test_mapo_loss.py",
    "requirements.txt",
    "README.md",
}
SCRIPTS = {
    "train_diffusion_mapo_sdxl.py": "--dataset_name",
    "train_dreambooth_lora_mapo_sdxl.py": "--instance_data_dir",
}
# diffusers' own settings, and C408, which its reviewers ask for.
DIFFUSERS_SETTINGS = """
[tool.ruff]
line-length = 119

[tool.ruff.lint]
ignore = ["C901", "E501", "E741", "F402", "F823"]
select = ["C", "E", "F", "I", "W"]

[tool.ruff.lint.isort]
lines-after-imports = 2
known-first-party = ["diffusers"]
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("diffusers")
    (block,) = re.findall(r"```bash\n(.*?)```", (REPO / "UPSTREAM.md").read_text(), re.S)
    assert "TO=DIFFUSERS/" in block
    block = block.replace("TO=DIFFUSERS/", f"TO={root}/")
    subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=REPO, check=True)
    (root / "pyproject.toml").write_text(DIFFUSERS_SETTINGS)
    return root


@pytest.fixture
def folder(checkout) -> Path:
    return checkout / "examples" / "research_projects" / "diffusion_mapo"


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess:
    """Run Python with nothing of this repository on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def test_six_text_files_go_up_and_their_links_lead_somewhere(folder):
    assert {path.name for path in folder.iterdir()} == FILES
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}  # a binary fails here
    links = re.findall(r"\]\(([^)]+)\)", texts["README.md"])
    assert len(links) > 10
    for link in links:
        on_github = re.match(r"https://github.com/OWNER/REPOSITORY/(?:blob|raw)/main/([^#]+)", link)
        if on_github:
            assert (REPO / on_github[1]).exists(), link
        elif not re.match(r"https?://|#", link):
            assert (folder / link).exists(), link
    assert "## Try it" not in texts["README.md"] and "## Train SDXL on your pairs" in texts["README.md"]
    assert "diffusers==" in texts["requirements.txt"] and "statsmodels" not in texts["requirements.txt"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_model_and_data_a_script_says_what_to_pass(script, folder, tmp_path):
    done = run([str(folder / script), "--beta_mapo=8"], tmp_path)
    assert done.returncode == 2
    message = done.stderr.splitlines()[-1]
    assert f"{script}: error: " in message
    assert "--pretrained_model_name_or_path" in message and SCRIPTS[script] in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_short_run(script, folder, tmp_path):
    flags = [f"--pretrained_model_name_or_path={write_model(tmp_path / 'model')}", "--resolution=64"]
    flags += ["--max_train_steps=2", "--num_inference_steps=2", "--validation_prompts", "red fox"]
    flags += ["--output_dir=out", "--cache_dir=cache"]
    if script == "train_diffusion_mapo_sdxl.py":
        flags.append(f"--dataset_name={write_pairs(tmp_path / 'pairs.parquet')}")
        weights = "unet/diffusion_pytorch_model.safetensors"
    else:
        shutil.copytree(REPO / "demo" / "subject", tmp_path / "photos")
        flags += ["--instance_data_dir=photos", "--placeholder_token=<cat>", "--initializer_token=cat"]
        flags.append("--num_rejected_per_image=1")
        weights = "pytorch_lora_weights.safetensors"
    done = run([str(folder / script), *flags], tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} >= {"README.md", "before_after.png", "curves.png"}
    assert (out / weights).is_file()
    assert [row["step"] for row in rows_of(out / "metrics.jsonl") if "loss" in row] == [1, 2]


def test_diffusers_linter_passes(checkout):
    for command in ("check", "format --check"):
        done = run(["-m", "ruff", *command.split(), "--no-cache", "."], checkout)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_losss_test_needs_torch_and_pytest_only(folder):
    imported = re.findall(r"^(?:import|from) (\w+)", (folder / "test_mapo_loss.py").read_text(), re.M)
    assert set(imported) - sys.stdlib_module_names == {"torch", "pytest", "mapo_loss"}
    done = run(
        ["-m", "pytest", "-p", "no:cacheprovider", "test_mapo_loss.py", "-k", "by_hand or code_of_2024"], folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[1-9]\d* passed", done.stdout)

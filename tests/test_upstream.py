"""What goes to diffusers' examples works there: the six files alone, laid by UPSTREAM.md's own commands."""

import ast
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
# diffusers' own, and C408, which its reviewers ask for; a target of 3.10 has ruff refuse later syntax.
DIFFUSERS_SETTINGS = """
[tool.ruff]
line-length = 119
target-version = "py310"

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
    """With nothing of this repository on Python's path, and no file of bytecode in the checkout."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment = {n: v for n, v in environment.items() if n != "PYTHONPATH" and not n.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def test_six_text_files_go_up_and_their_links_lead_somewhere(folder):
    assert {path.name for path in folder.iterdir()} == FILES
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}  # a binary fails here
    links = re.findall(r"\]\(([^)]+)\)", texts["README.md"])
    here = [link for link in links if not re.match(r"https://|#", link)]
    assert len(links) > 10 and {link for link in here if not (folder / link).exists()} == set()
    for link in links:
        if match := re.match(r"https://github.com/OWNER/REPOSITORY/(?:blob|raw)/main/([^#]+)", link):
            assert (REPO / match[1]).exists(), link
    assert "Try it" not in texts["README.md"] and "## Choose your task" in texts["README.md"]
    assert "diffusers==" in texts["requirements.txt"] and "hypothesis" not in texts["requirements.txt"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_model_and_data_a_script_says_what_to_pass(script, folder, tmp_path):
    done = run([str(folder / script), "--beta_mapo=8"], tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: error: ")
    assert "--pretrained_model_name_or_path" in line and SCRIPTS[script] in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_short_run(script, folder, tmp_path):
    flags = [f"--pretrained_model_name_or_path={write_model(tmp_path / 'model')}", "--resolution=64", "--seed=1"]
    flags += ["--max_train_steps=3", "--validation_prompts", "red fox", "--output_dir=out", "--cache_dir=cache"]
    if script == "train_diffusion_mapo_sdxl.py":
        flags += [f"--dataset_name={write_pairs(tmp_path / 'pairs.parquet')}", "--validation_num_inference_steps=2"]
        weights = "unet/diffusion_pytorch_model.safetensors"
    else:
        shutil.copytree(REPO / "demo" / "subject", tmp_path / "photos")
        flags += ["--instance_data_dir=photos", "--placeholder_token=<cat>", "--initializer_token=cat"]
        flags += ["--num_rejected_per_image=1", "--num_inference_steps=2"]
        weights = "pytorch_lora_weights.safetensors"
    done = run([str(folder / script), *flags], tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} >= {"README.md", "before_after.png", "curves.png"}
    assert (out / weights).is_file()
    assert [row["step"] for row in rows_of(out / "metrics.jsonl") if "loss" in row] == [1, 2, 3]


def test_diffusers_linter_passes(checkout, folder):
    for command in ("check", "format --check"):
        done = run(["-m", "ruff", *command.split(), "--no-cache", "."], checkout)
        assert done.returncode == 0, done.stdout + done.stderr
    (folder / "wrong.py").write_text("import torch\nfrom diffusers import UNet2DConditionModel\n\n\nx = dict(a=1)\n")
    try:  # these settings do see what they are here for
        done = run(["-m", "ruff", "check", "--no-cache", "--output-format=concise", "."], checkout)
    finally:
        (folder / "wrong.py").unlink()
    assert {"C408", "I001"} <= set(re.findall(r"\b[A-Z]\d{3}\b", done.stdout))


def test_sources_are_python_3_10(folder):
    sources = sorted(folder.glob("*.py"))
    assert len(sources) == 4
    for path in sources:
        ast.parse(path.read_text(), feature_version=(3, 10))


PYTEST_ALONE = """
import os, sys

class Refuse:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "hypothesis":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse)
def environment():  # but for what pytest and torch put there themselves
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TORCHINDUCTOR_"))}

before = environment()
import pytest

code = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", *sys.argv[1:]])
print("environment:", "as it was" if environment() == before else environment())
sys.exit(code)
"""


def test_the_losss_tests_need_torch_and_pytest_only_and_leave_the_environment_as_it_was(folder):
    tree = ast.parse((folder / "test_mapo_loss.py").read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"torch", "pytest", "mapo_loss"}
    # From diffusers' root, as its CI does. The slowest are left to the run at home: they import nothing else.
    script = "examples/research_projects/diffusion_mapo/test_mapo_loss.py"
    done = run(
        ["-c", PYTEST_ALONE, "-k", "not compiles and not exact and not without_float64", script], folder.parents[2]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d{3} passed", done.stdout) and "skipped" not in done.stdout
    assert "environment: as it was" in done.stdout

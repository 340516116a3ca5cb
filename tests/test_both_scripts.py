"""What both training scripts have in common: shared functions, order, flags, lengths, versions."""

import ast
import importlib
import re

import pytest
from conftest import REPO


SCRIPTS = ("train_diffusion_mapo_sdxl", "train_dreambooth_lora_mapo_sdxl")

# Functions and methods that bear the same name in both scripts and differ, and why.
INTENDED_DIFFERENCES = {
    "parse_args": "other flags",
    "check_numbers": "other flags",
    "check_choices": "other flags",
    "embed_captions": "with gradients, which reach the rows of new tokens",
    "training_step": "three losses; captions are embedded in the step",
    "MetricsLog.__init__": "no warning of a beta that is too large: the paper's 1024 is meant",
    "MetricsLog.flush": "the three losses have different metrics",
    "MetricsLog.plot": "the three losses have different metrics",
    "draw_pictures": "draws any prompts and seeds, not only the validation's",
    "draw_grid": "rows of photos, rejected and drawn pictures",
    "judge_demo": "other figures",
    "save_weights": "a LoRA and tokens, no whole pipeline",
    "save_model_card": "another card",
    "prepare_data": "photos, no pairs",
    "prepare_training": "rates by group, no EMA",
    "main": "another run",
}


def definitions(path) -> dict[str, str]:
    """Source of every function, method and class body, by name."""
    source, found = path.read_text(), {}
    for node in ast.parse(source).body:
        parts = [node] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        if isinstance(node, ast.ClassDef):
            parts = [part for part in node.body if isinstance(part, ast.FunctionDef)]
        for part in parts:
            name = part.name if part is node else f"{node.name}.{part.name}"
            decorators = [ast.get_source_segment(source, decorator) for decorator in part.decorator_list]
            found[name] = "\n".join([*decorators, ast.get_source_segment(source, part)])
    return found


def test_functions_of_the_same_name_are_the_same_but_for_the_intended_differences():
    first, second = (definitions(REPO / f"{name}.py") for name in SCRIPTS)
    differing = {name for name in first.keys() & second.keys() if first[name] != second[name]}
    assert differing == set(INTENDED_DIFFERENCES)
    assert len(first.keys() & second.keys()) >= 40


def test_the_banners_are_the_same_in_the_same_order():
    banners = [
        re.findall(r"^# -{100,}\n# (.+)\n# -{100,}$", (REPO / f"{name}.py").read_text(), re.M) for name in SCRIPTS
    ]
    assert banners[0] == banners[1] and len(banners[0]) == 9


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read_and_main_stays_short(name):
    tree = ast.parse((REPO / f"{name}.py").read_text())
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert set(vars(importlib.import_module(name).parse_args([]))) - read == set(), "flags that nothing reads"
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in tree.body if isinstance(n, ast.FunctionDef)}
    assert lengths.pop("main") <= 140
    lengths.pop("parse_args")
    assert max(lengths.values()) <= 60, max(lengths, key=lengths.get)
    loops = [n.end_lineno - n.lineno + 1 for n in ast.walk(tree) if isinstance(n, ast.For | ast.While)]
    assert max(loops) <= 50


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_dependency_block_names_the_versions_of_requirements_txt(name):
    wanted = set((REPO / "requirements.txt").read_text().split())
    block = re.search(r"# /// script\n(.*?)# ///", (REPO / f"{name}.py").read_text(), re.DOTALL)[1]
    named = set(re.findall(r'"([^"]+)"', block))
    assert named and named <= wanted

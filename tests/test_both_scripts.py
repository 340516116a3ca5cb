"""What both training scripts have in common: twins, order, flags, lengths, versions."""

import ast
import importlib
import re

import pytest
import torch
from conftest import REPO


SCRIPTS = ("train_diffusion_mapo_sdxl", "train_dreambooth_lora_mapo_sdxl")


def twins(name: str) -> dict[str, str]:
    """Source of the functions that are marked `# twin`, with their decorators, by name."""
    source, found = (REPO / f"{name}.py").read_text(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and source.splitlines()[node.lineno - 1].endswith("# twin"):
            decorators = [ast.get_source_segment(source, decorator) for decorator in node.decorator_list]
            found[node.name] = "\n".join([*decorators, ast.get_source_segment(source, node)])
    return found


def test_twins_are_equal():
    first, second = map(twins, SCRIPTS)
    assert first.keys() == second.keys() and len(first) >= 13
    assert [name for name in first if first[name] != second[name]] == []


def test_the_banners_are_the_same_in_the_same_order():
    wanted = "Arguments Models Data Encoding Training Checkpoints Validation Results Main".split()
    for name in SCRIPTS:
        source = (REPO / f"{name}.py").read_text()
        assert re.findall(r"^# ---- (\w+) -{90,}$", source, re.M) == wanted


def depth(node: ast.AST) -> int:
    """Of nested blocks; an elif is no deeper than its if."""
    blocks = (ast.If, ast.For, ast.While, ast.With, ast.Try)
    inner = [depth(child) for child in ast.iter_child_nodes(node)]
    chained = isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If)
    deepest = max(inner, default=0)
    return deepest if chained and deepest == depth(node.orelse[0]) else deepest + isinstance(node, blocks)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read_and_functions_stay_short(name):
    tree = ast.parse((REPO / f"{name}.py").read_text())
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    source = (REPO / f"{name}.py").read_text()
    for flag in vars(importlib.import_module(name).parse_args([])):
        assert flag in read or len(re.findall(rf'"{flag}"', source)) > 1, f"nothing reads --{flag}"
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert lengths.pop("main") <= 140
    lengths.pop("parse_args")
    assert max(lengths.values()) <= 60, max(lengths, key=lengths.get)
    loops = [n.end_lineno - n.lineno + 1 for n in ast.walk(tree) if isinstance(n, ast.For | ast.While)]
    assert max(loops) <= 50
    assert max(depth(node) for node in functions) <= 4, max(functions, key=depth).name
    definitions = [*functions, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
    assert len(source.splitlines()) <= 1400 and len(definitions) <= 60


@pytest.mark.parametrize("name", SCRIPTS)
def test_subnormal_gradients_are_flushed_on_a_cpu(name, tmp_path):
    """Those of pairs that are won took a step of the demo from 0.4 to 2 s."""
    from accelerate.state import AcceleratorState

    script, small = importlib.import_module(name), torch.tensor([2.0**-126])
    assert small.mul(0.5).item() > 0
    AcceleratorState._reset_state(reset_partial_state=True)
    script.prepare_run(script.parse_args([f"--output_dir={tmp_path / 'out'}"]))
    assert small.mul(0.5).item() == 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_dependency_block_has_lower_bounds_that_requirements_txt_meets(name):
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (REPO / "requirements.txt").read_text(), re.M))
    source = (REPO / f"{name}.py").read_text()
    block = re.search(r"# /// script\n(.*?)# ///", source, re.DOTALL)[1]
    named = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', block))
    assert len(named) == block.count('"') // 2
    imported = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in imported} & set(pins) <= {
        *named,
        "prodigyopt",
    }  # which --optimizer offers
    for package, least in named.items():
        assert [*map(int, least.split("."))] <= [*map(int, pins[package].split("."))]


def test_requirements_install_where_not_every_package_has_a_wheel():
    """bitsandbytes has none for macOS; xformers none for this torch, and says so in six lines where it is imported."""
    from packaging.requirements import Requirement

    lines = (REPO / "requirements.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    on_mac = {r.name for r in wanted if r.marker is None or r.marker.evaluate({"sys_platform": "darwin"})}
    assert "torch" in on_mac and not {"bitsandbytes", "xformers"} & on_mac

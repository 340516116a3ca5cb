"""What the two training scripts have in common."""

import ast
import re

import pytest
from conftest import REPO


SCRIPTS = ("train_diffusion_mapo_sdxl", "train_dreambooth_lora_mapo_sdxl")


def definitions(name: str) -> dict[str, str]:
    """Return the source of each top-level function and class of a script, by name, with its decorators."""
    source = (REPO / f"{name}.py").read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            decorators = [ast.get_source_segment(source, decorator) for decorator in node.decorator_list]
            found[node.name] = "\n".join([*decorators, ast.get_source_segment(source, node)])
    return found


def test_functions_that_are_copied_are_equal_and_others_have_other_names():
    originals, copies = map(definitions, SCRIPTS)
    source = (REPO / f"{SCRIPTS[1]}.py").read_text()
    marked = re.findall(rf"# Copied from {SCRIPTS[0]}\.(\w+)\n(?:@.*\n)*(?:def|class) (\w+)", source)
    assert len(marked) > 20 and all(original == copy for original, copy in marked)
    names = {name for name, _ in marked}
    assert {name for name in names if originals[name] != copies[name]} == set()
    assert (originals.keys() & copies.keys()) - names == {"parse_args", "check_args", "main"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_own_list_of_dependencies_allows_what_is_tested(name):
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (REPO / "requirements.txt").read_text(), re.M))
    block = re.search(r"# /// script\n(.*?)# ///", (REPO / f"{name}.py").read_text(), re.DOTALL)[1]
    named = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', block))
    assert len(named) == block.count('"') // 2
    for package, least in named.items():
        assert [*map(int, least.split("."))] <= [*map(int, pins[package].split("."))]

"""What reward_guidance.py says to input that can't be: one line, before any weights are loaded."""

import re

import pytest
import torch
from conftest import REPO
from inference import reward_guidance
from safetensors.torch import save_file


MODEL = str(REPO / "demo" / "sdxl-tiny-emoji")


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs the script on a folder of two learned tokens: `refused("--seed=-1")` -> what it says when it ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reward_guidance, "load_personalized_pipeline", lambda *_, **__: pytest.fail("loads weights"))
    for name in ("run", "no-tokens", "torn"):
        (tmp_path / name).mkdir()
        save_file({"a": torch.zeros(1)}, tmp_path / name / "pytorch_lora_weights.safetensors")
    save_file({key: torch.zeros(2, 4) for key in ("clip_l", "clip_g")}, "run/learned_embeds.safetensors")
    (tmp_path / "torn" / "learned_embeds.safetensors").write_bytes(b"torn")
    named = [f"--pretrained_model_name_or_path={MODEL}", "--lora_dir=run", "--prompt=a <cat>", "--resolution=64"]
    named += ["--placeholder_token", "<cat>", "<hat>", "--initializer_token", "cat", "hat"]

    def run(*flags) -> str:
        with pytest.raises(SystemExit) as done:
            reward_guidance.main(reward_guidance.parse_args([*named, *flags]))
        said, errors = capsys.readouterr()
        assert done.value.code == 2 and said == "" and errors.startswith("reward_guidance.py: error: "), errors
        assert errors.count("\n") == 1, errors
        return errors

    return run


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--resolution=-64"], "--resolution -64: must be a positive multiple of 8"),
        (["--resolution=65"], "--resolution 65: must be a positive multiple of 8"),
        (["--num_inference_steps=0"], "--num_inference_steps 0: must be at least 1"),
        (["--seed=-99999999999999999999"], "--seed -99999999999999999999: must be at least 0"),
        (["--seed=99999999999999999999"], "less than 2**64"),
        (["--guidance_scale=nan"], "--guidance_scale nan: must be finite"),
        (["--reward_scale=inf"], "--reward_scale inf: must be finite"),
        (["--resolution=x"], "argument --resolution: invalid int value: 'x'"),
        (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        (["--output=/nope/x.png"], "--output /nope/x.png: no folder /nope; make it first"),
        (["--output=out"], "--output out: must end in .png or"),
        (["--output=run"], "--output run: is a folder; name a file in it, such as run/image.png"),
        (["--pretrained_model_name_or_path=nope"], "--pretrained_model_name_or_path nope: no SDXL pipeline there"),
        (["--lora_dir=nope"], "--lora_dir nope: no pytorch_lora_weights.safetensors in it"),
        (
            ["--lora_dir=no-tokens"],
            "--lora_dir no-tokens: no learned_embeds.safetensors in it; leave out --placeholder_token",
        ),
        (["--lora_dir=torn"], "can't read torn/learned_embeds.safetensors"),
        (["--placeholder_token", "<cat>"], "--initializer_token: 2 for 1 of --placeholder_token"),
        (
            ["--placeholder_token", "<cat>", "--initializer_token", "cat"],
            "--placeholder_token: 1 named, but run/learned_embeds.safetensors",
        ),
        (["--placeholder_token", "<cat>", "<cat>"], "--placeholder_token <cat> <cat>: one is empty or named twice"),
        (["--placeholder_token", "<cat>", ""], "one is empty or named twice"),
        (["--placeholder_token", "<cat>", "cat</w>"], "--placeholder_token cat</w>: the tokenizer has it already"),
        (
            ["--prompt=a cat"],
            "--prompt 'a cat': holds no --placeholder_token; write <cat> or <hat> where the subject is",
        ),
    ],
)
def test_input_that_cannot_be_ends_in_one_line(refused, flags, message):
    assert message in refused(*flags)


def test_a_model_that_does_not_load_ends_in_one_line(refused, monkeypatch):
    def load(*_, **__):
        raise RuntimeError("size mismatch\nfor a\nfor b")

    monkeypatch.setattr(reward_guidance, "load_personalized_pipeline", load)
    assert refused().endswith("with --lora_dir run: size mismatch\n")


def test_every_flag_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        reward_guidance.parse_args(["--help"])
    flags = capsys.readouterr().out.partition("options:")[2]
    assert not re.search(r"^  --\w+ [^a-z\n]*\n(?=  --|\Z)", flags, re.MULTILINE), flags

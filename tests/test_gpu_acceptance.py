"""The acceptance run for a GPU, as far as a CPU can show it: what its checks run, and what they pass and fail."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file, save_file


sys.path.insert(0, str(REPO / "benchmarks"))
import gpu_acceptance as acceptance  # noqa: E402


@pytest.mark.parametrize("check", acceptance.CHECKS, ids=lambda check: check.name)
def test_each_check_has_flags_of_its_script_and_a_row_of_the_counted_table(check, tmp_path):
    (tmp_path / "photos").mkdir()
    command = acceptance.make_command(check, acceptance.DEMO, tmp_path, False, tmp_path / "out")
    script = importlib.import_module(check.script.removesuffix(".py"))
    args = script.parse_args(command[command.index(str(REPO / check.script)) + 1 :])
    assert args.max_train_steps == check.steps
    assert check.counted is None or check.counted in json.loads(acceptance.COUNTED.read_text())


def test_a_run_is_killed_and_resumed_and_a_single_bit_that_differs_is_found(small_model, tmp_path, hub_cache):
    acceptance.write_data(tmp_path, 64)
    check = next(check for check in acceptance.CHECKS if check.name == "LoRA, resumed")
    folder = tmp_path / "folder"
    folder.mkdir()
    figures = acceptance.run_check(check, small_model, tmp_path, True, folder, time.time() + 500)
    assert figures["per_second"] > 0

    file = folder / "broken" / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    tensors[sorted(tensors)[0]].view(torch.int32).flatten()[0] ^= 1
    save_file(tensors, file)
    with pytest.raises(acceptance.CheckFailed, match=r"^1 of \d+ tensors differ"):
        acceptance.compare_weights(folder / "whole", folder / "broken")


@pytest.mark.parametrize(
    "losses, grad_norms, weight, peak_gb, message",
    [
        ([1.0], [1.0], 1.0, 5.0, "1 steps, not 2"),
        ([1.0, None], [1.0, 1.0], 1.0, 5.0, "aren't finite"),
        ([1.0, 1.0], [None, None], 1.0, 5.0, "aren't finite"),
        ([1.0, 1.0], [1.0, 1.0], float("nan"), 5.0, "saved weights"),
        ([1.0, 1.0], [1.0, 1.0], 1.0, 40.0, "40.0 GB were allocated"),
        ([1.0, 1.0], [None, 1.0], 1.0, 5.0, None),  # fp16's scaler skips the first steps
    ],
)
def test_what_a_run_must_leave_behind(losses, grad_norms, weight, peak_gb, message, tmp_path):
    check = acceptance.Check("x", acceptance.PAIRS, acceptance.NONE, steps=2, counted="LoRA, 4 pairs")
    out = tmp_path / "out"
    out.mkdir()
    records = []
    for loss, grad_norm in zip(losses, grad_norms):
        records.append(json.dumps({"step": 1, "loss": loss, "grad_norm": grad_norm, "pairs_per_second": 2.0}))
    (out / "metrics.jsonl").write_text("\n".join(records) + "\n")
    save_file({"a": torch.tensor([weight])}, out / "pytorch_lora_weights.safetensors")
    Path(f"{out}.peak").write_text(str(peak_gb))
    if message is None:
        assert acceptance.verify(check, out)["peak_gb"] == peak_gb
    else:
        with pytest.raises(acceptance.CheckFailed, match=message):
            acceptance.verify(check, out)


def test_a_run_ends_at_the_deadline(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(100)"]
    began = time.time()
    with pytest.raises(TimeoutError):
        acceptance.run(command, tmp_path / "out", began + 1)
    assert time.time() - began < 20


def test_a_failure_is_told_in_the_scripts_own_words_and_is_not_run_again(tmp_path, monkeypatch, capsys):
    broken = acceptance.Check("broken", acceptance.PAIRS, ["--beta_mapo=-1"])
    monkeypatch.setattr(acceptance, "CHECKS", [broken])
    flags = ["gpu_acceptance.py", "--dry_run", f"--output_dir={tmp_path / 'out'}", f"--work_dir={tmp_path / 'work'}"]
    monkeypatch.setattr(sys, "argv", flags)
    with pytest.raises(SystemExit) as ended:
        acceptance.main()
    assert ended.value.code == 1
    first = (tmp_path / "out" / "acceptance.jsonl").read_text()
    assert json.loads(first)["result"].startswith("FAIL: ended with 2: ") and "--beta_mapo -1" in first

    with pytest.raises(SystemExit):
        acceptance.main()
    assert (tmp_path / "out" / "acceptance.jsonl").read_text() == first
    assert "| broken | FAIL: ended with 2:" in capsys.readouterr().out

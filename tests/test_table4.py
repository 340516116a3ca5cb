"""What table4.py measures: the work of a step against its floor, the baseline's loss, and the command."""

import copy
import json
import math
import sys

import pytest
import torch
from conftest import REPO


sys.path.insert(0, str(REPO / "benchmarks"))
import table4  # noqa: E402


def test_a_step_of_sdxl_needs_no_more_work_than_its_floor():
    """SDXL at 1024 px: 20.23 TFLOP for the forward and backward pass over an image, so 40.46 for a pair."""
    floor = table4.count_floor(table4.SDXL)
    assert floor == pytest.approx(40.46e12, rel=0.001)
    settings = table4.Settings("MaPO", checkpointing=False)
    flop = table4.count_flop(settings, table4.SDXL)
    assert flop <= 1.01 * floor

    saved = json.loads(table4.WORK.read_text())  # by `table4.py --count`
    assert saved["floor"] == floor and saved[settings.describe_work()] == flop


def test_what_other_settings_add_to_the_floor():
    work = table4.count_work(table4.DEMO)
    share = {name: flop / work["floor"] for name, flop in work.items()}
    assert share["MaPO, full, no checkpointing, encoded beforehand"] == pytest.approx(1, abs=0.001)
    # the reference model's forward pass
    assert share["Diffusion-DPO, full, no checkpointing, encoded beforehand"] == pytest.approx(4 / 3, abs=0.02)
    lora = share["MaPO, LoRA, checkpointing, encoded beforehand"]
    assert share["Diffusion-DPO, LoRA, checkpointing, encoded beforehand"] == pytest.approx(lora + 1 / 3, abs=0.02)
    assert 1.15 < share["MaPO, full, checkpointing, encoded beforehand"] < 4 / 3
    assert share["MaPO, full, checkpointing, encoded in every step"] > 1.15 + 0.05


def test_diffusion_dpo_is_equation_14_in_float64():
    torch.manual_seed(0)
    training = table4.Training(table4.Settings("Diffusion-DPO", "LoRA", "AdamW"), table4.DEMO, torch.device("cpu"))
    unet = training.unet
    with torch.no_grad():
        for parameter in training.parameters:
            parameter.normal_(std=0.02)  # else the LoRA is zero and the reference the same
    scheduler = training.noise_scheduler
    batch = training.make_batch(2)
    noise = torch.randn_like(batch["latents_w"])
    timesteps = torch.tensor([100, 700])
    loss = table4.dpo_loss(unet, None, batch, scheduler, noise, timesteps)

    @torch.no_grad()
    def mse(latents: torch.Tensor) -> torch.Tensor:
        noisy = scheduler.add_noise(latents, noise, timesteps)
        conditions = {"text_embeds": batch["pooled_prompt_embeds"], "time_ids": batch["time_ids"]}
        pred = unet(noisy, timesteps, batch["prompt_embeds"], added_cond_kwargs=conditions).sample
        return (pred.double() - noise.double()).square().mean(dim=(1, 2, 3))

    lead = mse(batch["latents_w"]) - mse(batch["latents_l"])
    unet.disable_adapters()
    lead_of_reference = mse(batch["latents_w"]) - mse(batch["latents_l"])
    unet.enable_adapters()
    expected = torch.log1p(torch.exp(table4.DPO_BETA / 2 * (lead - lead_of_reference))).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert abs(expected.item() - math.log(2)) > 0.01

    # At the start of a full fine-tune the reference is an equal copy.
    loss = table4.dpo_loss(unet, copy.deepcopy(unet), batch, scheduler, noise, timesteps)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("memory", [40, 79, 141])
def test_the_largest_batch_fits_and_is_found_to_5_percent(memory):
    def peak_of(pairs: int) -> int | None:
        peak = 15.5e9 + 3.1e9 * pairs + 1e6 * pairs**2  # grows a little faster than two small batches let expect
        return int(peak) if peak <= memory * 1e9 else None

    largest = table4.find_largest_batch(peak_of, 4, int(memory * 1e9))
    assert peak_of(largest) is not None
    assert peak_of(math.ceil(largest * 1.05) + 1) is None


def test_a_second_call_measures_only_what_is_missing(tmp_path, monkeypatch, capsys):
    output = tmp_path / "table4.jsonl"
    monkeypatch.setattr(sys, "argv", ["table4.py", "--dry_run", "--seconds=0.1", f"--output={output}"])
    monkeypatch.setattr(table4, "ROWS", table4.ROWS[:1])
    table4.main()
    first = output.read_text()
    assert json.loads(first)["figures"]["pairs_per_second"] > 0
    monkeypatch.setattr(table4, "ROWS", [*table4.ROWS, table4.Settings("Diffusion-DPO", "LoRA")])
    table4.main()
    assert output.read_text().startswith(first) and len(output.read_text().splitlines()) == 2
    assert capsys.readouterr().out.count("| beforehand |") == 3

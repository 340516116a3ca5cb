"""The pairs' script: one training step in float64, and whole runs on a tiny model."""

import logging
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import train_diffusion_mapo_sdxl as script
from accelerate.state import AcceleratorState
from conftest import read_weights, rows_of
from huggingface_hub import ModelCard
from PIL import Image
from small_model import MODEL, PAIRS, write_pairs

from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def base_weights(small_model) -> dict:
    return UNet2DConditionModel.from_pretrained(small_model, subfolder="unet").state_dict()


# ---- One step -------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch() -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "latents_w": torch.randn(3, 4, 8, 12, generator=generator),
        "latents_l": torch.randn(3, 4, 8, 12, generator=generator),
        "prompt_embeds": torch.randn(3, 24, 160, generator=generator),
        "pooled_prompt_embeds": torch.randn(3, 96, generator=generator),
        "time_ids": torch.tensor([[1153, 900, 3, 5, 64, 96], [64, 64, 0, 0, 64, 96], [7, 9, 0, 0, 64, 96]]),
    }


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("safeguard", [None, 0.3])
def test_loss_and_gradient_are_those_of_the_paper_in_float64(prediction_type, safeguard, batch, small_model):
    """Written anew, sample by sample: eq. 5-7 with Appendix A's constants, and Diffusion-SDPO's bound."""
    scheduler = DDPMScheduler.from_pretrained(small_model, subfolder="scheduler", prediction_type=prediction_type)
    unet = UNet2DConditionModel.from_pretrained(small_model, subfolder="unet").double()
    noise, timesteps = script.sample_noise([7, 8, 9], (4, 8, 12), 1000, 0.0, 0, 0, torch.device("cpu"))
    alphas = scheduler.alphas_cumprod.double()
    terms = []
    for i in range(3):
        signal = alphas[timesteps[i]].sqrt()
        sigma = (1 - alphas[timesteps[i]]).sqrt()
        residuals = []
        for latents in (batch["latents_w"][i].double(), batch["latents_l"][i].double()):
            noisy = signal * latents + sigma * noise[i].double()
            target = noise[i].double()
            if prediction_type == "v_prediction":
                target = signal * noise[i].double() - sigma * latents
            conditions = {
                "text_embeds": batch["pooled_prompt_embeds"][i : i + 1].double(),
                "time_ids": batch["time_ids"][i : i + 1].double(),
            }
            embeds = batch["prompt_embeds"][i : i + 1].double()
            predicted = unet(noisy[None], timesteps[i], embeds, added_cond_kwargs=conditions).sample[0]
            residuals.append(predicted - target)
        mse_w, mse_l = residuals[0].square().mean(), residuals[1].square().mean()
        if safeguard is not None:
            product = (residuals[0] * residuals[1]).sum().item()
            bound = (1 - safeguard) * residuals[0].square().sum().item() / product
            factor = min(1.0, bound) if product > 0 else 1.0
            mse_l = factor * mse_l + (1 - factor) * mse_l.detach()
        score_w = (0.5 * mse_w / (torch.exp(0.5 * mse_w) - 1)) ** 8
        score_l = (0.5 * mse_l / (torch.exp(0.5 * mse_l) - 1)) ** 8
        terms.append(mse_w - torch.log(torch.sigmoid(1000 * (score_w - score_l))) / 8)
    expected = torch.stack(terms).mean()
    expected.backward()
    expected_gradients = [parameter.grad.clone() for parameter in unet.parameters()]

    unet.zero_grad()
    calls = []
    unet.float().register_forward_pre_hook(lambda module, args, kwargs: calls.append(args), with_kwargs=True)
    result = script.compute_loss(unet, batch, scheduler, noise, timesteps, 8.0, 0.5, safeguard)
    result.loss.backward()
    assert len(calls) == 1 and calls[0][0].shape == (6, 4, 8, 12), "one pass over winners and losers"
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for parameter, gradient in zip(unet.parameters(), expected_gradients):
        scale = gradient.abs().max().item()
        assert (parameter.grad.double() - gradient).abs().max().item() <= 2e-3 * scale + 1e-7


def test_noise_depends_on_seed_stream_and_position_alone():
    def draw(positions, seed=0, stream=0, offset=0.0):
        return script.sample_noise(positions, (4, 16, 16), 1000, offset, seed, stream, torch.device("cpu"))

    noise, timesteps = draw([5, 6, 7])
    again, _ = draw([7, 5])
    assert torch.equal(again[0], noise[2]) and torch.equal(again[1], noise[0])
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(draw([5], seed=1)[0], noise[:1])
    held_out, _ = draw([5, 6, 7], stream=1)
    assert not any(torch.equal(a, b) for a in noise for b in held_out), "held-out pairs have noise of their own"
    many, timesteps = draw(list(range(2000)))
    assert abs(many.mean().item()) < 2e-3 and many.std().item() == pytest.approx(1, abs=2e-3)
    assert timesteps.min() < 10 and timesteps.max() > 989 and abs(timesteps.float().mean().item() - 499.5) < 25
    shifted = draw([5], offset=0.5)[0] - noise[:1]
    assert shifted.std(dim=(2, 3)).max() < 1e-6 and shifted.abs().max() > 0.1, "an offset is one number a channel"


# ---- Whole runs -----------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_pipeline_a_card_pictures_and_metrics(train, small_model):
    out = train(
        "--beta_mapo=32",
        "--safeguard=0.5",
        "--num_validation_pairs=4",
        "--validation_steps=2",
        "--validation_prompts",
        "a `rocket` | 李雷",
        "fox",
    )

    assert 1e-8 < largest_difference(read_weights(out), base_weights(small_model)) < 1e-5  # 4 steps of 1e-7
    pipeline = StableDiffusionXLPipeline.from_pretrained(out)
    assert pipeline("fox", num_inference_steps=1, height=64, width=64).images[0].size == (64, 64)
    assert oct((out / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mode & 0o777) == "0o644"

    records = rows_of(out / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2, 2, 3, 4, 4]
    for record in [record for record in records if "loss" in record]:
        assert record["margin"] == pytest.approx(record["score_w"] - record["score_l"], abs=1e-6)
        assert 0 < record["score_w"] < 1 and 0 <= record["accuracy"] <= 1 and record["loss"] > record["mse_w"]
        assert record["grad_norm"] > 0 and record["learning_rate"] >= 0 and record["pairs_per_second"] > 0
        assert record["margin_weight"] > 0 and 0 < record["safeguard"] <= 1
    assert min(record.get("safeguard", 1) for record in records) < 1

    card = ModelCard.load(out / "README.md")
    assert "mapo" in card.data.tags and card.data.base_model is None, "the hub refuses a local path"
    assert str(small_model) not in card.content and "| beta_mapo | `32.0` |" in card.content
    code = re.findall(r"```python\n(.*?)```", card.content, re.S)[0]
    compile(code, "card", "exec")
    assert (out / "validation" / "2.png").is_file() and Image.open(out / "curves.png").width > 1000
    assert not list(out.glob("tmp-*"))


def test_before_and_after_are_images_of_the_base_and_of_the_saved_model(train, small_model, monkeypatch):
    drawn = []
    draw_image_rows = script.draw_image_rows
    monkeypatch.setattr(script, "draw_image_rows", lambda rows: drawn.append(rows) or draw_image_rows(rows))
    flags = ["--validation_prompts", "rocket", "fox", "--num_validation_images=2", "--guidance_scale=2"]
    out = train(*flags, "--learning_rate=1e-2", "--max_train_steps=1", final_images=True)

    (rows,) = drawn
    assert [label for label, _, _ in rows] == ["before", "after"] and rows[0][1] == ["rocket", "rocket", "fox", "fox"]
    assert Image.open(out / "before_after.png").width > 500
    for (_, _, images), model in zip(rows, (small_model, out)):
        pipeline = StableDiffusionXLPipeline.from_pretrained(model)
        pipeline.set_progress_bar_config(disable=True)
        for seed, (prompt, image) in enumerate(zip(rows[0][1], images)):
            generator = torch.Generator("cpu").manual_seed(seed)
            options = {"num_inference_steps": 2, "guidance_scale": 2, "height": 64, "width": 64}
            expected = pipeline(prompt, generator=generator, **options).images[0]
            assert np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int)).max() <= 2


def test_the_demo_learns_the_style_and_says_what_it_trains(launch, tmp_path):
    """The README's command, cut to 40 of its 150 steps."""
    done = launch("train_diffusion_mapo_sdxl.py", "--beta_mapo", "8", "--max_train_steps", "40")

    lines = done.stdout.strip().splitlines()
    assert "trains the tiny model in demo/" in lines[0] and "--safeguard 0.9 isn't part of the paper" in lines[0]
    assert lines[-1] == "What has changed? python demo/report.py mapo-demo"
    noise = [
        line for line in done.stderr.splitlines() if re.search(r"Warning|warn|deprecated|kernels|torchvision", line)
    ]
    assert [line for line in noise if "accelerate launch" not in line] == [
        "To avoid this warning pass in values for each of the problematic parameters or run `accelerate config`."
    ]
    records = rows_of(tmp_path / "mapo-demo" / "metrics.jsonl")
    held_out = [record for record in records if "val_accuracy" in record]
    assert held_out[0]["val_accuracy"] < 0.3 and held_out[-1]["val_accuracy"] > held_out[0]["val_accuracy"] + 0.15
    assert held_out[-1]["val_mse_w"] < 1.02 * held_out[0]["val_mse_w"]
    again = launch("train_diffusion_mapo_sdxl.py", "--max_train_steps", "1", "--skip_final_inference")
    assert again.stdout.splitlines()[-1] == lines[-1], "the demo may replace its result"


def test_the_loss_that_is_logged_repeats_and_the_seed_matters(train):
    losses = []
    for i, flags in enumerate([[], [], ["--seed=1"]]):
        out = train(*flags, "--max_train_steps=2", output_dir=str(i))
        losses.append([record["loss"] for record in rows_of(out / "metrics.jsonl")])
    assert losses[0] == losses[1] != losses[2]


def test_accumulation_equals_the_large_batch(train, small_model):
    flags = ["--learning_rate=1e-3", "--max_train_steps=2"]
    whole = read_weights(train(*flags, output_dir="whole"))
    split = ["--train_batch_size=1", "--gradient_accumulation_steps=4"]
    parts = read_weights(train(*flags, *split, output_dir="parts"))
    moved = largest_difference(whole, base_weights(small_model))
    # Adam's first steps magnify the rounding of tiny gradients, so most weights are compared, not the last one.
    differences = torch.cat([(whole[name] - parts[name]).abs().flatten() for name in whole])
    assert differences.quantile(0.99) < 1e-3 * moved


@pytest.mark.parametrize(
    "flags", [["--optimizer=prodigy"], ["--use_8bit_adam"], ["--use_lora", "--optimizer=prodigy"]]
)
def test_every_optimizer_trains(flags, train):
    out = train(*flags, "--learning_rate=1e-2", "--lr_scheduler=constant")
    file = out / "pytorch_lora_weights.safetensors"
    assert file.is_file() if "--use_lora" in flags else read_weights(out)
    losses = [record["grad_norm"] for record in rows_of(out / "metrics.jsonl")]
    assert len(set(losses)) == 4 and all(np.isfinite(losses))


def test_ema_is_the_average_of_the_weights_and_is_what_is_saved(train, small_model):
    flags = ["--learning_rate=1e-3", "--max_train_steps=1", "--lr_scheduler=constant"]
    base = base_weights(small_model)
    last = read_weights(train(*flags, output_dir="last"))
    averaged = read_weights(train(*flags, "--use_ema", "--ema_decay=0.5", output_dir="averaged"))
    # diffusers' warmup: the first update copies the weights.
    assert largest_difference(averaged, last) < 1e-7 < largest_difference(last, base)
    two = ["--learning_rate=1e-3", "--max_train_steps=2", "--lr_scheduler=constant"]
    last = read_weights(train(*two, output_dir="last2"))
    averaged = read_weights(train(*two, "--use_ema", "--ema_decay=0.1", output_dir="averaged2"))
    assert largest_difference(averaged, last) > 1e-5


def test_held_out_pairs_are_measured_with_the_same_noise_each_time(train):
    flags = ["--num_validation_pairs=6", "--validation_steps=2"]
    names = ["val_mse_w", "val_mse_l", "val_margin", "val_accuracy"]
    still = train(*flags, "--learning_rate=1e-12", output_dir="still")
    records = [record for record in rows_of(still / "metrics.jsonl") if "val_mse_w" in record]
    assert [record["step"] for record in records] == [0, 2, 4]
    for name in names:
        assert [record[name] for record in records] == pytest.approx([records[0][name]] * 3, rel=1e-4)
    moved = train(*flags, "--learning_rate=1e-2", output_dir="moved")
    others = [record for record in rows_of(moved / "metrics.jsonl") if "val_mse_w" in record]
    assert others[0]["val_mse_w"] == records[0]["val_mse_w"] != pytest.approx(others[-1]["val_mse_w"], rel=1e-2)


def test_held_out_pairs_are_not_trained_on(train, monkeypatch):
    """Nor are pairs that share an image with them, unless the run says so."""
    hashed = []
    hash_pairs = script.hash_pairs
    monkeypatch.setattr(
        script, "hash_pairs", lambda pairs, accelerator: hashed.append(pairs) or hash_pairs(pairs, accelerator)
    )
    train("--num_validation_pairs=5", "--max_train_samples=20", "--max_train_steps=10", "--num_train_epochs=1")
    trained, held_out = hashed
    assert len(held_out) == 5 and len(trained) == 15
    assert not set(trained["image_w"]) & set(held_out["image_w"])


def test_images_that_training_and_held_out_pairs_share_are_counted(train, tmp_path, caplog):
    columns = pq.read_table(PAIRS / "train.parquet").slice(0, 8).to_pydict()
    (tmp_path / "pairs").mkdir()
    write_pairs(tmp_path / "pairs" / "train.parquet")
    other = pq.read_table(PAIRS / "test.parquet").slice(0, 8).to_pydict()
    write_pairs(
        tmp_path / "pairs" / "test.parquet", jpg_0=columns["jpg_0"][:3] + other["jpg_0"][3:], jpg_1=other["jpg_1"]
    )
    flags = [f"--dataset_name={tmp_path / 'pairs'}", "--validation_split_name=test", "--num_validation_pairs=8"]
    with caplog.at_level(logging.WARNING):
        train(*flags, "--max_train_steps=2")
    assert "3 of 8 held-out pairs share an image with a training pair." in caplog.text


@pytest.mark.parametrize("flags", [["--num_validation_pairs=4", "--validation_steps=5"], []])
def test_errors_that_rise_give_one_warning(flags, train, caplog):
    """On the demo's model, whose errors are small: a learning rate that is far too high."""
    flags = [*flags, f"--pretrained_model_name_or_path={MODEL}", "--use_lora", "--learning_rate=3e-2"]
    flags += ["--lr_scheduler=constant", "--train_batch_size=4", "--max_train_steps=16"]
    with caplog.at_level(logging.WARNING):
        train(*flags)
    said = [record.getMessage() for record in caplog.records if "is getting worse" in record.getMessage()]
    assert len(said) == 1 and "Try a lower --learning_rate" in said[0]
    assert ("held-out" in said[0]) == ("--num_validation_pairs=4" in flags)


def test_a_step_that_is_not_finite_is_skipped(train, small_model, monkeypatch, caplog):
    compute_loss = script.compute_loss

    def break_the_first(unet, batch, *rest):
        result = compute_loss(unet, batch, *rest)
        factor = float("nan") if 0 in batch["position"] else 1.0
        return result._replace(loss=result.loss * factor)

    monkeypatch.setattr(script, "compute_loss", break_the_first)
    out = train("--max_train_steps=1", output_dir="one")
    assert largest_difference(read_weights(out), base_weights(small_model)) == 0
    assert "Step 1 is skipped: its gradient isn't finite." in caplog.text
    assert rows_of(out / "metrics.jsonl")[0]["loss"] is None, "JSON has no NaN"
    out = train("--max_train_steps=2", "--learning_rate=1e-3", output_dir="two")
    assert largest_difference(read_weights(out), base_weights(small_model)) > 1e-4


def test_epochs_a_scaled_rate_and_a_warmup_that_is_too_long(train, caplog):
    with caplog.at_level(logging.WARNING):
        out = train(
            "--max_train_samples=10",
            "--num_train_epochs=2",
            "--scale_lr",
            "--lr_scheduler=constant",
            "--learning_rate=1e-6",
            "--lr_warmup_steps=9",
            "--max_train_steps=5",
        )
    assert "--lr_warmup_steps 9: the learning rate won't reach 1e-06 in 5 steps." in caplog.text
    records = rows_of(out / "metrics.jsonl")
    assert [record["learning_rate"] for record in records] == pytest.approx([4e-6] * 5)


def test_num_train_epochs_gives_the_steps(small_model, hub_cache, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = [f"--pretrained_model_name_or_path={small_model}", f"--dataset_name={PAIRS}", "--max_train_samples=10"]
    flags += ["--num_train_epochs=2", "--train_batch_size=4", "--resolution=64", "--skip_final_inference"]
    script.main(script.parse_args([*flags, f"--output_dir={tmp_path / 'out'}", f"--cache_dir={hub_cache}"]))
    assert len(rows_of(tmp_path / "out" / "metrics.jsonl")) == 5


def test_the_pipeline_is_saved_in_the_precision_asked_for(train):
    out = train("--save_dtype=fp16", "--max_train_steps=1", final_images=True)
    assert {tensor.dtype for tensor in read_weights(out).values()} == {torch.float16}
    assert np.asarray(Image.open(out / "before_after.png")).std() > 10


def test_captions_that_are_cut_are_counted(train, tmp_path, caplog):
    path = write_pairs(tmp_path / "p.parquet", caption=["fox"] * 7 + ["a very long caption " * 30])
    train(f"--dataset_name={path}", "--max_train_steps=2")
    assert re.search(r"1 of 8 captions have more than \d+ tokens and are cut off there.*a very long", caplog.text)


def test_training_on_a_stream(train, tmp_path):
    path = write_pairs(tmp_path / "p.parquet")
    flags = [f"--dataset_name={path}", "--learning_rate=1e-3", "--max_train_steps=2"]
    first = read_weights(train(*flags, "--streaming", output_dir="stream"))
    columns = pq.read_table(path).to_pydict()
    write_pairs(path, jpg_0=columns["jpg_1"], jpg_1=columns["jpg_0"])
    swapped = read_weights(train(*flags, "--streaming", output_dir="swapped"))
    assert largest_difference(first, swapped) > 1e-4, "the file at the same path has other winners"
    assert not list(tmp_path.rglob("*stream-*.arrow"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_name=x"], "pass both --pretrained_model_name_or_path and --dataset_name"),
        (["--beta_mapo=1e-320"], "--beta_mapo 1e-320: must be between 1e-6 and 1e6"),
        (["--safeguard=1"], "--safeguard 1.0: must be at least 0 and below 1"),
        (["--resolution=100"], "--resolution 100: must be a multiple of 8"),
        (["--validation_split_name=train"], "names the split to train on"),
        (["--aspect_ratio_buckets=64,64"], "needs --use_aspect_ratio_buckets"),
        (["--lr_schedul=cosine"], "unrecognized arguments"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(flags)
    assert message in capsys.readouterr().err

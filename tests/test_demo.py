"""demo/: the judge, the reports on finished runs, and the training that builds the demo."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import REPO
from demo import build_demo, report
from demo.style_judge import FOUNDRIES, StyleJudge, palette, to_batch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from diffusers import StableDiffusionXLPipeline


FIGURES = json.loads((REPO / "demo" / "figures.json").read_text())


@pytest.fixture
def fast_report(small_model, monkeypatch):
    """Reports on a few captions with one sampling step, and a small model with random weights instead of the demo's."""
    held_out = report.held_out_captions()[:4]
    validation = report.validation_captions()[:3]
    monkeypatch.setattr(report, "held_out_captions", lambda: held_out)
    monkeypatch.setattr(report, "validation_captions", lambda: validation)
    monkeypatch.setattr(report, "NUM_INFERENCE_STEPS", 1)
    monkeypatch.setattr(report, "BASE", small_model)


def write_lora(folder: Path, model: Path, scale: float) -> None:
    """Write a random LoRA for a model's UNet. A scale of 0 leaves the model as it is."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipeline.unet)
    layers = {name: scale * weight for name, weight in layers.items()}
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def write_metrics(folder: Path) -> None:
    records = [
        {"step": 0, "val_mse_w": 0.1, "val_mse_l": 0.2, "val_margin": -0.1, "val_accuracy": 0.25},
        {"step": 1, "loss": 1.5},
        {"step": 1, "val_mse_w": 0.3, "val_mse_l": 0.4, "val_margin": 0.1, "val_accuracy": 0.75},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def subject_run(small_model, tmp_path) -> Path:
    """The results of a run on the photos, as `train_dreambooth_lora_mapo_sdxl.py` leaves them."""
    write_lora(tmp_path, small_model, scale=20.0)
    embeds = {"clip_l": torch.full((1, 64), 0.5), "clip_g": torch.full((1, 96), -0.5)}
    (tmp_path / "learned_embeds.safetensors").write_bytes(safetensors.torch.save(embeds))
    return tmp_path


def print_report(folder: Path, monkeypatch, capsys) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["report.py", str(folder)])
    report.main()
    return capsys.readouterr().out.splitlines()


# ---- The judge ------------------------------------------------------------------------------------------------------
def test_judge_names_the_foundry_of_drawings_that_it_has_not_seen():
    captions, sheets = report.load_sheets()
    judge = StyleJudge.from_pretrained()
    right = []
    for foundry in FOUNDRIES:
        drawings = [sheets[foundry][captions.index(caption)] for caption in report.held_out_captions()]
        right += [name == foundry for name in judge.name(drawings)]
        preferred = judge.preference(to_batch(drawings)) > 0
        assert preferred.float().mean() > 0.9 if foundry == "openmoji" else preferred.float().mean() < 0.1
    assert np.mean(right) == FIGURES["judge_accuracy_on_held_out_drawings"] == 0.975


def test_palette_by_hand():
    black = Image.new("RGB", (64, 64), "black")
    half = black.copy()
    half.paste("white", (0, 0, 32, 64))
    grey = Image.new("RGB", (64, 64), (8, 8, 8))  # 8 / 255 * 11 bins = 0.345 of the way from bin 0 to bin 1
    palettes = palette(to_batch([black, half, grey]))
    assert palettes.shape == (3, 12**3)
    assert torch.equal(palettes[0], torch.eye(12**3)[0])
    assert torch.equal(palettes[0], palettes[1])  # white doesn't count
    near = 8 / 255 * 11
    assert palettes[2, 0].square().item() == pytest.approx((1 - near) ** 3, rel=1e-4)
    assert palettes[2, 1].square().item() == pytest.approx((1 - near) ** 2 * near, rel=1e-4)  # bin 1 of blue
    assert palettes[2].norm().item() == pytest.approx(1)


# ---- Figures --------------------------------------------------------------------------------------------------------
def test_captions_are_those_of_the_pairs():
    import pyarrow.parquet as pq

    columns = {}
    for split in ("train", "test"):
        columns[split] = pq.read_table(REPO / "demo" / "pairs" / f"{split}.parquet")["caption"].to_pylist()
    assert report.validation_captions() == columns["test"]
    held_out = report.held_out_captions()
    assert len(held_out) == 50 and len(columns["train"]) == 198 and len(columns["test"]) == 49
    assert sorted(columns["train"] + columns["test"] + held_out) == sorted(report.load_sheets()[0])


def test_figures_of_known_images():
    captions, sheets = report.load_sheets()
    drawings = sheets["openmoji"][:8]
    figures = report.measure(drawings, captions[:8])
    assert figures["recognised"] == 1 and figures["distance"] == pytest.approx(0, abs=0.5)
    assert figures["openmoji"] == 1 and figures["noto"] == 0
    assert report.measure(drawings, captions[1:9])["recognised"] == 0

    # 16 grey levels darker, and a black edge of one pixel: 64**2 - 62**2 of the border's 64**2 - 60**2 pixels
    darker = Image.fromarray(np.asarray(drawings[0]).clip(16) - 16)
    assert report.measure([darker], captions[:1])["distance"] == pytest.approx(16, abs=0.5)
    edged = Image.new("RGB", (64, 64), "black")
    edged.paste("white", (1, 1, 63, 63))
    white_border = report.measure([edged], captions[:1])["white_border"]
    assert white_border == pytest.approx(1 - (64**2 - 62**2) / (64**2 - 60**2))


def test_drawings_that_are_left_out_are_not_found():
    captions, sheets = report.load_sheets()
    held_out = report.held_out_captions()
    places = [captions.index(caption) for caption in held_out]
    first = FOUNDRIES.index("openmoji") * len(captions)
    images = [sheets["openmoji"][place] for place in places]
    figures = report.measure(images, held_out, [first + place for place in places])
    assert figures == pytest.approx(FIGURES["unseen_openmoji_drawings"], rel=1e-4)


def test_prompt_i_is_drawn_from_seed_i(fast_report, small_model, monkeypatch):
    pipeline = report.load_pipeline(small_model)
    monkeypatch.setattr(report, "BATCH_SIZE", 2)
    prompts = ["fox face", "rabbit face", "bear face"]
    images = report.generate(pipeline, prompts)
    pipeline.set_progress_bar_config(disable=True)
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        options = {"num_inference_steps": 1, "guidance_scale": report.GUIDANCE_SCALE, "height": 64, "width": 64}
        expected = pipeline(prompts[i], generator=generator, **options).images[0]
        assert np.abs(np.asarray(images[i]).astype(int) - np.asarray(expected)).max() <= 1
    assert np.abs(np.asarray(images[0]).astype(int) - np.asarray(images[1])).mean() > 5


# ---- Reports --------------------------------------------------------------------------------------------------------
def test_report_on_a_pipeline(fast_report, small_model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(small_model, out)
    write_metrics(out)
    lines = print_report(out, monkeypatch, capsys)

    captions = report.held_out_captions()
    after = report.measure(report.generate(report.load_pipeline(small_model), captions), captions)["distance"]
    before = FIGURES["base_on_held_out_captions"]["distance"]
    assert len(lines) == 8
    assert f"{before:.1f} ->   {after:.1f}   (59.9)  distance" in lines[3]
    assert lines[5].startswith("   25% ->    75%  ") and "implicit accuracy" in lines[5]
    assert lines[6].startswith(" 0.100 ->  0.300  ")
    assert lines[7].startswith(" 0.200 ->  0.400  ")


def test_report_on_a_lora_is_about_the_model_with_the_lora(fast_report, small_model, tmp_path, monkeypatch, capsys):
    reports = []
    for scale in (0.0, 20.0):
        write_lora(tmp_path, small_model, scale)
        write_metrics(tmp_path)
        reports.append(print_report(tmp_path, monkeypatch, capsys))
    (tmp_path / "pytorch_lora_weights.safetensors").unlink()
    shutil.copytree(small_model, tmp_path, dirs_exist_ok=True)
    reports.append(print_report(tmp_path, monkeypatch, capsys))
    assert reports[0] == reports[2] != reports[1]


def test_report_on_a_subject(fast_report, small_model, subject_run, monkeypatch, capsys):
    figures = report.measure_subject(subject_run)
    others = report.held_out_captions()
    base = report.load_pipeline(small_model)
    before = report.measure(report.generate(base, others), others)
    assert figures["others_distance_before"] == pytest.approx(before["distance"], rel=1e-5)
    base.load_lora_weights(subject_run)
    after = report.measure(report.generate(base, others), others)
    assert figures["others_distance"] == pytest.approx(after["distance"], rel=1e-5)
    assert abs(figures["others_distance"] / figures["others_distance_before"] - 1) > 1e-4
    assert figures["photos_own_palette"] == pytest.approx(0.95, abs=0.005)

    lines = print_report(subject_run, monkeypatch, capsys)
    assert len(lines) == 9 and "5 photos and 1,188 emoji" in lines[0]
    assert f"palette {figures['contexts_palette_before']:.2f} before, {figures['contexts_palette']:.2f}" in lines[3]


def test_the_subjects_photos_are_nearest_to_themselves(fast_report, subject_run, monkeypatch):
    rows = report.read_json_lines(REPO / "demo" / "subject" / "metadata.jsonl")
    photos = [Image.open(REPO / "demo" / "subject" / row["file_name"]) for row in rows]
    _, sheets = report.load_sheets()

    def photos_for_the_new_word(pipeline, prompts, description=None):
        return [photos[i % 5] if "<cat>" in prompt else sheets["noto"][i] for i, prompt in enumerate(prompts)]

    monkeypatch.setattr(report, "generate", photos_for_the_new_word)
    figures = report.measure_subject(subject_run)
    assert figures["photos_nearest"] == figures["contexts_nearest"] == 1
    assert figures["photos_nearest_before"] == figures["class_nearest_before"] == figures["class_nearest"] == 0
    assert figures["photos_palette"] == pytest.approx(figures["photos_own_palette"])


def test_new_word_is_loaded_into_both_encoders(fast_report, subject_run):
    pipeline = report.load_subject_pipeline(subject_run, "<cat>")
    for tokenizer, encoder, value in [
        (pipeline.tokenizer, pipeline.text_encoder, 0.5),
        (pipeline.tokenizer_2, pipeline.text_encoder_2, -0.5),
    ]:
        (token,) = tokenizer("<cat>", add_special_tokens=False).input_ids
        assert encoder.get_input_embeddings().weight[token].eq(value).all()


@pytest.mark.parametrize("files", [[], ["checkpoint-2", "metrics.jsonl"], ["pytorch_lora_weights.safetensors"]])
def test_a_folder_without_a_finished_run(files, tmp_path, monkeypatch, capsys):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"{tmp_path} holds no finished run of the demo.*accelerate launch"):
        print_report(tmp_path, monkeypatch, capsys)


# ---- Settings and building ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "script"),
    [
        ("train_pairs.json", "train_diffusion_mapo_sdxl.py"),
        ("train_subject.json", "train_dreambooth_lora_mapo_sdxl.py"),
    ],
)
def test_settings_are_flags_and_their_paths_exist(settings, script):
    source = (REPO / script).read_text()
    for name, value in json.loads((REPO / "demo" / settings).read_text()).items():
        assert f'"--{name}"' in source
        if name in ("pretrained_model_name_or_path", "dataset_name", "instance_data_dir"):
            assert (REPO / "demo" / value).is_dir()


def test_interrupted_training_continues_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(build_demo, "SAVE_EVERY_SECONDS", 0)

    def train(work_dir: Path, stop_at: float) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)

        def loss_function(generator, progress):
            if progress >= stop_at:
                raise KeyboardInterrupt
            batch = torch.rand(4, 3, generator=generator)
            return (model(batch) - batch.sum(1, keepdim=True)).square().mean()

        work_dir.mkdir(exist_ok=True)
        build_demo.train("line", model, loss_function, 20, 0.1, work_dir)
        return model.weight.detach()

    unbroken = train(tmp_path / "unbroken", stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", stop_at=0.5)
    assert torch.equal(train(tmp_path / "broken", stop_at=2), unbroken)
    assert torch.equal(train(tmp_path / "broken", stop_at=-1), unbroken)  # finished: nothing is trained again
    assert [path.name for path in (tmp_path / "broken").iterdir()] == ["line.pt"]


def test_pairs_are_openmojis_drawing_over_anothers(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    captions, sheets = report.load_sheets()
    monkeypatch.setattr(build_demo, "DEMO", tmp_path)
    drawings = {foundry: [np.asarray(drawing) for drawing in images] for foundry, images in sheets.items()}
    held_out = report.held_out_captions()
    drawings["captions"] = np.array(captions)
    drawings["held_out"] = np.array([caption in held_out for caption in captions])
    drawings["validation"] = np.array([caption in report.validation_captions() for caption in captions])
    build_demo.write_pairs(drawings)
    for split in ("train", "test"):
        made = pq.read_table(tmp_path / "pairs" / f"{split}.parquet").to_pylist()
        committed = pq.read_table(REPO / "demo" / "pairs" / f"{split}.parquet").to_pylist()
        assert len(made) == len(committed)
        for row, expected in zip(made, committed):
            assert row["caption"] == expected["caption"] and row["label_0"] == expected["label_0"]
        chosen = made[0]["jpg_0"] if made[0]["label_0"] == 1 else made[0]["jpg_1"]
        (tmp_path / "chosen.webp").write_bytes(chosen)
        drawing = drawings["openmoji"][captions.index(made[0]["caption"])]
        assert np.array_equal(np.asarray(Image.open(tmp_path / "chosen.webp")), drawing)

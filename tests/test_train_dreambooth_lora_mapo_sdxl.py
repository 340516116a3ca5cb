"""train_dreambooth_lora_mapo_sdxl.py as a user runs it, on the demo's model and subject; and reward_guidance.py."""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image
from safetensors.torch import load_file


MODEL, SUBJECT = str(REPO / "demo" / "sdxl-tiny-twemoji"), REPO / "demo" / "subject"
SCRIPT = str(REPO / "train_dreambooth_lora_mapo_sdxl.py")
NAMED = [f"--pretrained_model_name_or_path={MODEL}", f"--instance_data_dir={SUBJECT}", "--resolution=64"]
TOKEN = ["--token", "<cat>", "--initializer_token", "cat"]
CONTEXT = "weary <cat> face"
# A run of seconds; flags of a test come after these and win. The rates are high so that three steps show.
SHORT = [
    *"--max_train_steps=3 --num_inference_steps=2 --num_rejected_per_image=1 --rank=4 --logging_steps=1".split(),
    *"--learning_rate=1e-2 --text_encoder_lr=1e-2 --guidance_scale=2 --sample_batch_size=5".split(),
    f"--validation_prompts={CONTEXT}",
]


@pytest.fixture(scope="session")
def script():
    import train_dreambooth_lora_mapo_sdxl

    return train_dreambooth_lora_mapo_sdxl


@pytest.fixture
def train(script, hub_cache, tmp_path, monkeypatch):
    """Runs the script in this process: `train("--beta_mapo=8")` -> its output folder. `train.model` is what it
    trained, `train.drawn` the last pictures that it drew."""
    real_save, real_draw = script.save_weights, script.draw_pictures

    def save(model, args, accelerator):
        run.model = script.unwrap(model, accelerator)
        real_save(model, args, accelerator)

    def draw(*args):
        run.drawn = real_draw(*args)
        return run.drawn

    monkeypatch.setattr(script, "save_weights", save)
    monkeypatch.setattr(script, "draw_pictures", draw)

    def run(*flags, output_dir="out", data=(*NAMED, *TOKEN)):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        out = tmp_path / output_dir
        script.main(script.parse_args([*data, *SHORT, f"--output_dir={out}", f"--cache_dir={hub_cache}", *flags]))
        return out

    return run


def launch_command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch", SCRIPT, *flags]


def load_plain(out, tokens=("<cat>",), weight_name="pytorch_lora_weights.safetensors"):
    """What the snippet of the model card does."""
    from reward_guidance import load_personalized_pipeline

    pipeline = load_personalized_pipeline(MODEL, str(out), list(tokens), dtype=torch.float32)
    if weight_name != "pytorch_lora_weights.safetensors":
        pipeline.unload_lora_weights()
        pipeline.load_lora_weights(out, weight_name=weight_name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompt: str, seed: int, **options) -> np.ndarray:
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 64, "width": 64} | options
    return np.asarray(
        pipeline(prompt, generator=torch.Generator("cpu").manual_seed(seed), **options).images[0]
    ).astype(int)


def read_metrics(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


# ---------------------------------------------------------------------------------------------------------------------
# The demo
# ---------------------------------------------------------------------------------------------------------------------


def test_the_demo_makes_samples_more_like_the_subject_and_says_so(hub_cache, tmp_path):
    short = "--max_train_steps=60 --num_inference_steps=8 --num_rejected_per_image=1".split()
    done = subprocess.run(
        launch_command(*short, f"--cache_dir={hub_cache}"), cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert lines[0].startswith(
        "Neither --pretrained_model_name_or_path nor --instance_data_dir is given: training the"
    )
    assert "accelerate launch train_dreambooth_lora_mapo_sdxl.py --instance_data_dir" in lines[0]
    pattern = r"{}: nearest (\d+)% before, (\d+)% after; palette (0\.\d+) before, (0\.\d+) after"
    for name in ("captions of the photos", "new contexts"):
        figures = list(map(float, re.search(pattern.format(name), done.stdout).groups()))
        assert figures[0] == 0 and figures[1] >= 60 and figures[3] > figures[2]
    kept = re.search(r"64 other captions, nearest to a drawing of theirs: (\d+)% before, (\d+)% after", done.stdout)
    assert int(kept[1]) > 90 and int(kept[2]) > 50
    assert "pipeline.load_textual_inversion(\n    list(embeds[\"clip_l\"]), token=['<cat>']" in done.stdout
    out = tmp_path / "mapo-demo-subject"
    assert {"before_after.png", "winners_losers.png", "curves.png", "metrics.jsonl", "README.md"} <= set(
        os.listdir(out)
    )
    said = done.stdout + done.stderr
    for noise in ("Warning", "warning:", "xformers", "bitsandbytes", "deprecat", "torchvision", "Traceback"):
        assert noise not in said.replace("To avoid this warning pass in values", ""), said  # accelerate's own hint


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", [[], ["--use_dora"], ["--train_text_encoder"]], ids=["lora", "dora", "text encoders too"]
)
def test_the_files_draw_in_a_plain_pipeline_what_the_training_process_drew(flags, train, script):
    kohya = [] if "--use_dora" in flags else ["--output_kohya_format"]
    out = train(*flags, *kohya)

    prompts = [photo.caption for photo in script.load_photos(script.parse_args([*NAMED, *TOKEN]))] + [CONTEXT]
    files = ["pytorch_lora_weights.safetensors"] + ["pytorch_lora_weights_kohya.safetensors"] * len(kohya)
    for name in files:
        pipeline = load_plain(out, weight_name=name)
        for i in (0, 5):  # a photo's caption and the new context
            assert np.abs(draw(pipeline, prompts[i], i) - np.asarray(train.drawn[i]).astype(int)).max() <= 2
    pipeline.disable_lora()
    assert np.abs(draw(pipeline, prompts[5], 5) - np.asarray(train.drawn[5])).max() > 20
    layers = load_file(out / files[0])
    parts = {name.split(".")[0] for name in layers}
    assert parts == ({"unet", "text_encoder", "text_encoder_2"} if "--train_text_encoder" in flags else {"unet"})
    if "--train_text_encoder" in flags:
        for part in ("text_encoder", "text_encoder_2"):
            moved = [v for k, v in layers.items() if k.startswith(f"{part}.") and "lora_B" in k or "lora.up" in k]
            assert moved and all(layer.abs().max() > 0 for layer in moved)


def test_a_run_leaves_card_pictures_curves_and_metrics(train):
    out = train("--validation_steps=2", "--report_to=tensorboard")

    embeds = load_file(out / "learned_embeds.safetensors")
    assert {name: tuple(rows.shape) for name, rows in embeds.items()} == {"clip_l": (1, 64), "clip_g": (1, 96)}
    card = (out / "README.md").read_text()
    assert "instance_prompt: " + CONTEXT in card and "load_textual_inversion" in card and "| `rank` | `4` |" in card
    assert Image.open(out / "before_after.png").width > 5 * 128 and (out / "validation" / "2.png").is_file()
    assert list((out / "logs").rglob("events.out*")) and not list(out.glob("tmp-*"))
    records = read_metrics(out)
    assert [r["step"] for r in records] == [1, 2, 3]
    for record in records:
        assert record["margin"] == pytest.approx(record["score_w"] - record["score_l"], abs=1e-6)
        assert record["grad_norm"] > 0 and record["loss"] > record["mse_w"] and 0.1 < record["peak_memory_gb"] < 24


def test_several_tokens_load_in_their_order(train):
    data = [*NAMED, "--token", "<cat>", "<mug>", "--initializer_token", "cat", "face"]
    out = train(data=data)
    pipeline = load_plain(out, tokens=["<cat>", "<mug>"])
    rows = load_file(out / "learned_embeds.safetensors")
    for tokenizer, encoder, key in (
        (pipeline.tokenizer, pipeline.text_encoder, "clip_l"),
        (pipeline.tokenizer_2, pipeline.text_encoder_2, "clip_g"),
    ):
        ids = tokenizer.convert_tokens_to_ids(["<cat>", "<mug>"])
        assert torch.equal(encoder.get_input_embeddings().weight[ids], rows[key])
    assert np.abs(draw(pipeline, "weary <cat> <mug>", 0)).max() > 0


def test_a_style_is_learnt_without_a_token(train):
    out = train("--instance_prompt=cat face", data=NAMED)
    assert not (out / "learned_embeds.safetensors").exists() and not train.model.tokens
    pictures = [draw(load_plain(out, tokens=()), "cat face", 0), np.asarray(train.drawn[0]).astype(int)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2
    assert "load_textual_inversion" not in (out / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


def test_only_the_new_rows_train_and_they_keep_their_norm(train, script, monkeypatch):
    optimizers, real = [], script.make_optimizer
    monkeypatch.setattr(script, "make_optimizer", lambda *a: optimizers.append(real(*a)) or optimizers[-1])
    out = train()

    (optimizer,) = optimizers
    unet, rows = ([tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups)
    assert rows == [(1, 64), (1, 96)] and all(4 in shape for shape in unet)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-2]
    learned = load_file(out / "learned_embeds.safetensors")
    for tokens, part, key in zip(train.model.tokens, ("text_encoder", "text_encoder_2"), ("clip_l", "clip_g")):
        files = load_file(f"{MODEL}/{part}/model.safetensors")
        (base,) = (weight for name, weight in files.items() if name.endswith("token_embedding.weight"))
        assert torch.equal(tokens.table.weight, base.float())  # bit for bit
        cat = script.word_ids("cat", train.model.pipeline.tokenizer)[0]
        start = base[cat].float()
        assert (learned[key][0] - start).abs().max() > 1e-3
        assert learned[key][0].norm().item() == pytest.approx(start.norm().item(), rel=1e-6)
        assert tokens.rows.dtype == torch.float32
    for part in ("text_encoder", "text_encoder_2"):
        state = getattr(train.model, part).state_dict()
        for name, weight in load_file(f"{MODEL}/{part}/model.safetensors").items():
            name = name if "token_embedding" not in name else name.replace("weight", "table.weight")
            found = [value for key, value in state.items() if key.endswith(name.removeprefix("text_model."))]
            assert len(found) == 1 and torch.equal(found[0], weight.float()), name


def test_pooled_embeddings_agree_with_the_plain_pipeline_and_end_at_the_token(train, script):
    out = train()
    pipeline = load_plain(out)

    def pooled(text, where=pipeline):
        with torch.no_grad():
            return script.embed_captions([text], where, torch.device("cpu"))["pooled_prompt_embeds"]

    trained = train.model.pipeline
    train.model.eval()
    for caption in ("crying <cat> face", "crying cat face", "smiling <cat> face with open mouth"):
        ids = [p.tokenizer_2(caption).input_ids for p in (pipeline, trained)]
        assert ids[0] == ids[1]
        assert torch.equal(pooled(caption), pooled(caption, trained))
    # At the token with the largest id: what stands behind <cat> doesn't reach the pooled embedding.
    assert torch.allclose(pooled("crying <cat> face"), pooled("crying <cat>"), atol=1e-6)
    assert not torch.allclose(pooled("crying cat face"), pooled("crying cat"), atol=1e-2)
    assert not torch.allclose(pooled("crying <cat>"), pooled("weary <cat>"), atol=1e-2)


def test_a_caption_with_the_token_and_its_base_are_made_of_each_other(script):
    args = argparse.Namespace(token=["<cat>", "<hat>"], initializer_token=["cat", "hat"])
    both = ("a <cat> in a <hat>, catwalk", "a cat in a hat, catwalk")
    assert script.with_and_without_token(both[0], args) == both
    assert script.with_and_without_token(both[1], args) == both
    assert script.with_and_without_token("A Cat.", args) == ("A <cat>.", "A Cat.")
    assert script.with_and_without_token("a dog", args) == ("a dog", "a dog")
    assert script.with_and_without_token("a cat", argparse.Namespace(token=None)) == ("a cat", "a cat")


# ---------------------------------------------------------------------------------------------------------------------
# Photos and rejected pictures
# ---------------------------------------------------------------------------------------------------------------------


def copy_subject(path, captions: str = "metadata") -> list[str]:
    """The demo's subject with its captions in another form; returns the flags that name it."""
    rows = [json.loads(line) for line in (SUBJECT / "metadata.jsonl").open()]
    path.mkdir(exist_ok=True)
    for row in rows:
        shutil.copy(SUBJECT / row["file_name"], path)
        if captions == "txt":
            (path / row["file_name"]).with_suffix(".txt").write_text(row["text"].replace("<cat>", "cat") + "\n")
    flags = [f"--instance_data_dir={path}", *TOKEN]
    if captions == "metadata":
        shutil.copy(SUBJECT / "metadata.jsonl", path)
    if captions in ("json", "named json"):
        config = {
            "images": [row["file_name"] for row in rows],
            "prompts": [row["text"] for row in rows],
            "base_prompts": [row["text"].replace("<cat>", "cat") for row in rows],
            "inserting_tokens": ["<cat>"],
            "initializer_tokens": ["cat"],
        }
        (path / "config.json").write_text(json.dumps(config if captions == "json" else {"full_ti": config, "x": {}}))
        flags = [f"--instance_data_dir={path / 'config.json'}"] + ["--config_name=full_ti"] * (captions != "json")
    return [f"--pretrained_model_name_or_path={MODEL}", "--resolution=64", *flags]


@pytest.mark.parametrize("captions", ["txt", "json", "named json"])
def test_every_form_of_input_gives_the_same_photos(captions, script, tmp_path):
    expected = {p.name: p for p in script.load_photos(script.parse_args([*NAMED, *TOKEN]))}
    args = script.parse_args(copy_subject(tmp_path / "photos", captions))
    photos = script.load_photos(args)
    assert len(photos) == 5 and (args.token, args.initializer_token) == (["<cat>"], ["cat"])
    for photo in photos:
        other = expected[photo.name]
        assert photo.picture.tobytes() == other.picture.tobytes()
        assert (photo.caption, photo.base_caption) == (other.caption, other.base_caption)
    assert expected["crying"].caption == "crying <cat> face" and expected["crying"].base_caption == "crying cat face"


def test_one_prompt_for_all_photos(script):
    photos = script.load_photos(script.parse_args([*NAMED, *TOKEN, "--instance_prompt=a cat"]))
    assert {(photo.caption, photo.base_caption) for photo in photos} == {("a <cat>", "a cat")}


def test_rejected_pictures_are_drawn_once_from_fixed_seeds_and_again_when_a_setting_changes(train, tmp_path):
    def files(cache):
        return {p: p.stat().st_mtime_ns for p in cache.rglob("rejected-*/**/*.png")}

    cache = tmp_path / "cache"
    train(f"--cache_dir={cache}", "--max_train_steps=1")
    first = files(cache)
    (manifest,) = cache.rglob("manifest.json")
    said = json.loads(manifest.read_text())
    assert said["captions"]["crying"] == "crying cat face" and said["guidance_scale"] == 2.0 and len(first) == 5

    train(f"--cache_dir={cache}", "--max_train_steps=1", output_dir="second")
    assert files(cache) == first  # found, not drawn
    gone = next(p for p in first if p.name == "crying-0.png")
    before = gone.read_bytes()
    gone.unlink()
    train(f"--cache_dir={cache}", "--max_train_steps=1", "--num_rejected_per_image=2", output_dir="third")
    more = files(cache)
    assert gone.read_bytes() == before and len(more) == 10  # only those missing are drawn, and as they were
    assert {p: t for p, t in more.items() if p in first and p != gone} == {p: t for p, t in first.items() if p != gone}
    train(f"--cache_dir={cache}", "--max_train_steps=1", "--num_inference_steps=3", output_dir="fourth")
    train(f"--cache_dir={cache}", "--max_train_steps=1", "--seed=1", output_dir="fifth")
    assert len(list(cache.rglob("manifest.json"))) == 3 and len(files(cache)) == 20


def test_rejected_pictures_are_what_the_plain_starting_model_draws_for_the_base_caption(train, script, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    train(f"--cache_dir={tmp_path / 'cache'}", "--max_train_steps=1")
    pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    names = [photo.name for photo in script.load_photos(script.parse_args([*NAMED, *TOKEN]))]
    seed = script.rejected_seed(0, names.index("crying"), 0, argparse.Namespace(seed=0))
    (file,) = (tmp_path / "cache").rglob("crying-0.png")
    assert np.abs(draw(pipeline, "crying cat face", seed) - np.asarray(Image.open(file)).astype(int)).max() <= 2


def test_ones_own_rejected_pictures_are_taken(train, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for name in ("smiling", "grinning", "in-love", "crying", "pouting"):
        for j in range(2):
            Image.new("RGB", (80, 70), "green").save(own / f"{name}-{j}.png")
    out = train(f"--rejected_data_dir={own}", "--num_rejected_per_image=2")
    grid = np.asarray(Image.open(out / "winners_losers.png"))
    assert (grid == (0, 128, 0)).all(-1).sum() > 10 * 100 * 100


def test_new_rejected_pictures_come_from_the_model_as_it_is(train, script, monkeypatch):
    seen, real = [], script.PhotoSet.set_rejected
    monkeypatch.setattr(
        script.PhotoSet, "set_rejected", lambda self, rows: (real(self, rows), seen.append(self.rejected.clone()))
    )
    out = train("--refresh_rejected_steps=2", "--max_train_steps=4")
    assert len(seen) == 2 and not torch.equal(*seen) and (out / "rejected" / "2.png").is_file()


def test_a_batch_is_the_whole_set_and_each_photo_keeps_its_own_rejected_ones(script):
    args = script.parse_args([*NAMED, *TOKEN])
    photos = script.load_photos(args)
    pipeline = script.load_frozen_models(args, torch.device("cpu"), torch.float32)
    dataset = script.PhotoSet(photos, [[photo.picture] * 2 for photo in photos], pipeline.vae, args, "cpu")
    dataset.rejected = torch.arange(10).view(5, 2, 1, 1, 1) + torch.zeros(5, 2, 4, 16, 16)
    taken = set()
    for epoch in range(12):
        batch = dataset.batch(range(epoch * 5, epoch * 5 + 5))
        assert sorted(batch["captions"]) == sorted(photo.caption for photo in photos)
        for i, caption in enumerate(batch["captions"]):
            n = [photo.caption for photo in photos].index(caption)
            value = int(batch["rejected"][i].unique().item())
            assert value // 2 == n and torch.equal(batch["latents"][i], dataset.latents[n])
            assert batch["time_ids"][i].tolist() == [64, 64, 0, 0, 64, 64]
            taken.add(value)
    assert taken == set(range(10))


# ---------------------------------------------------------------------------------------------------------------------
# The training step
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(script):
    """The demo's model with a LoRA that isn't 0, and a batch of two photos."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    args = script.parse_args([*NAMED, *TOKEN])
    pipeline = script.load_frozen_models(args, torch.device("cpu"), torch.float32)
    model, noise_scheduler = script.load_model(pipeline, args, Accelerator(cpu=True))
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draws))
    batch = {
        "latents": torch.randn(2, 4, 16, 16, generator=draws),
        "rejected": torch.randn(2, 4, 16, 16, generator=draws),
        "time_ids": torch.tensor([[1153.0, 900, 3, 5, 64, 64], [64.0, 64, 0, 0, 64, 64]]),
        "captions": ["crying <cat> face", "pouting <cat> face"],
        "base_captions": ["crying cat face", "pouting cat face"],
        "position": torch.tensor([7, 8]),
    }
    return argparse.Namespace(model=model, scheduler=noise_scheduler, batch=batch)


def predict(world, script, clean, noise, timestep, caption, time_ids, adapters=True):
    """Squared error of one picture for one caption, in float64, by the parts of the model and not by its forward."""
    a = world.scheduler.alphas_cumprod[timestep]
    noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
    with torch.no_grad():
        embeds = script.embed_captions([caption], world.model.pipeline, torch.device("cpu"))
        conditions = {"text_embeds": embeds["pooled_prompt_embeds"], "time_ids": time_ids[None]}
        if not adapters:
            world.model.unet.disable_adapters()
        prediction = world.model.unet(
            noisy[None], timestep, embeds["prompt_embeds"], added_cond_kwargs=conditions
        ).sample
        if not adapters:
            world.model.unet.enable_adapters()
    return ((prediction[0].double() - noise.double()) ** 2).mean().item()


LOSSES = {
    "mapo": ["--loss_type=mapo", "--beta_mapo=64"],
    "dco": ["--loss_type=dco", "--beta_dco=100"],
    "dreambooth": ["--loss_type=dreambooth"],
    "dreambooth with prior": ["--loss_type=dreambooth", "--with_prior_preservation", "--prior_loss_weight=0.7"],
}


@pytest.mark.parametrize("kind", LOSSES)
def test_each_loss_is_its_formula_sample_by_sample_in_float64(kind, world, script):
    args, batch = script.parse_args([*NAMED, *TOKEN, *LOSSES[kind]]), world.batch
    loss, metrics = script.training_step(world.model, batch, world.scheduler, args, torch.device("cpu"))

    noise, timesteps = script.draw_noise(batch["position"], (4, 16, 16), 1000, 0.0, 0, torch.device("cpu"))
    each = []
    for i in range(2):
        common = (noise[i], timesteps[i])
        w = predict(world, script, batch["latents"][i], *common, batch["captions"][i], batch["time_ids"][i])
        if kind == "mapo":
            loser = predict(world, script, batch["rejected"][i], *common, batch["captions"][i], batch["time_ids"][i])
            phi_w, phi_l = ((0.5 * x / math.expm1(0.5 * x)) ** 64 for x in (w, loser))
            each.append(w + math.log1p(math.exp(-1000 * (phi_w - phi_l))) / 64)
        elif kind == "dco":
            ref = predict(
                world, script, batch["latents"][i], *common, batch["base_captions"][i], batch["time_ids"][i], False
            )
            each.append(math.log1p(math.exp(100 * (w - ref))))
            assert ref != pytest.approx(w, rel=1e-3)
        elif kind == "dreambooth":
            each.append(w)
        else:
            loser = predict(
                world, script, batch["rejected"][i], *common, batch["base_captions"][i], batch["time_ids"][i]
            )
            each.append(w + 0.7 * loser)
    assert loss.item() == pytest.approx(np.mean(each), rel=2e-4)
    assert metrics["loss"].item() == loss.item()


def test_without_adapters_the_model_is_the_starting_one_bit_for_bit(world, script):
    from diffusers import UNet2DConditionModel

    base = UNet2DConditionModel.from_pretrained(MODEL, subfolder="unet", dtype=torch.float32)
    batch, timesteps = world.batch, torch.tensor([10, 900])
    with torch.no_grad():
        embeds = script.embed_captions(batch["base_captions"], world.model.pipeline, torch.device("cpu"))
        conditions = {"text_embeds": embeds["pooled_prompt_embeds"], "time_ids": batch["time_ids"]}
        expected = base(batch["latents"], timesteps, embeds["prompt_embeds"], added_cond_kwargs=conditions).sample
        off = world.model(batch["latents"], timesteps, batch["base_captions"], batch["time_ids"], adapters=False)
        on = world.model(batch["latents"], timesteps, batch["base_captions"], batch["time_ids"])
    assert torch.equal(off, expected) and not torch.allclose(on, expected, atol=1e-2)


def test_the_losses_are_functions_of_numbers(script):
    draws = torch.Generator().manual_seed(0)
    prediction, target, reference = (torch.randn(6, 4, 8, 8, generator=draws, dtype=torch.float64) for _ in range(3))
    w, ref = (((x - target) ** 2).mean((1, 2, 3)).numpy() for x in (prediction, reference))
    dco = script.dco_loss(prediction, target, reference, 3.0)
    assert dco.loss.item() == pytest.approx(np.log1p(np.exp(3 * (w - ref))).mean(), rel=1e-5)
    assert dco.margin.numpy() == pytest.approx(ref - w, abs=1e-5) and not dco.margin.requires_grad
    plain, prior = script.dreambooth_loss(prediction, target, 0), script.dreambooth_loss(prediction, target, 0.5)
    assert plain.loss.item() == pytest.approx(w.mean(), rel=1e-5) and plain.mse_prior.sum() == 0
    assert prior.loss.item() == pytest.approx(w[:3].mean() + 0.5 * w[3:].mean(), rel=1e-5)


@pytest.mark.parametrize("kind", ["dco", "dreambooth", "dreambooth with prior"])
def test_every_loss_trains_to_the_end(kind, train):
    out = train(*LOSSES[kind])
    records = read_metrics(out)
    assert len(records) == 3 and all(record["grad_norm"] > 0 for record in records)
    assert Image.open(out / "curves.png").size == (1650, 660)
    assert (out / "winners_losers.png").exists() == ("prior" in kind)


# ---------------------------------------------------------------------------------------------------------------------
# Precision, accumulation, processes, resumption
# ---------------------------------------------------------------------------------------------------------------------


def test_tokens_and_lora_stay_fp32_in_bf16_and_move(train):
    out = train("--mixed_precision=bf16")
    embeds, layers = load_file(out / "learned_embeds.safetensors"), load_file(out / "pytorch_lora_weights.safetensors")
    assert {t.dtype for t in [*embeds.values(), *layers.values()]} == {torch.float32}
    assert train.model.unet.conv_in.weight.dtype == train.model.tokens[0].table.weight.dtype == torch.bfloat16
    start = train.model.tokens[0].table.weight[train.model.pipeline.tokenizer.convert_tokens_to_ids("cat</w>")]
    assert (embeds["clip_l"][0] - start.float()).abs().max() > 1e-3


@pytest.mark.parametrize("flags", [["--gradient_checkpointing"], ["--optimizer=adafactor"], ["--noise_offset=0.1"]])
def test_other_ways_to_train_run(flags, train):
    records = read_metrics(train(*flags))
    assert len(records) == 3 and all(record["grad_norm"] > 0 for record in records)


def read_results(out) -> dict:
    return load_file(out / "pytorch_lora_weights.safetensors") | load_file(out / "learned_embeds.safetensors")


def test_accumulation_equals_the_big_batch(train):
    smooth = ["--adam_epsilon=1e-2", "--learning_rate=1e-2"]
    big = read_results(train("--train_batch_size=4", *smooth, output_dir="big"))
    small = ["--train_batch_size=2", "--gradient_accumulation_steps=2"]
    small = read_results(train(*small, *smooth, output_dir="small"))
    assert max((big[name] - small[name]).abs().max().item() for name in big) < 1e-5


def test_two_processes_equal_one(train, hub_cache, tmp_path, monkeypatch):
    smooth = ["--adam_epsilon=1e-2", "--train_text_encoder"]
    one = train("--train_batch_size=4", *smooth, output_dir="one")
    # Without MPI, `accelerate launch --cpu` starts one process, whatever --num_processes says.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", SCRIPT]
    flags = [*NAMED, *TOKEN, *SHORT, *smooth, "--train_batch_size=2", "--output_dir=two", "--cache_dir=cache"]
    done = subprocess.run([*command, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Done in") == 1 and len(list((tmp_path / "cache").rglob("rejected-*/*/*.png"))) == 5
    a, b = read_results(one), read_results(tmp_path / "two")
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-5
    for x, y in zip(read_metrics(one), read_metrics(tmp_path / "two"), strict=True):
        assert all(x[name] == pytest.approx(y[name], rel=1e-3, abs=1e-5) for name in ("loss", "mse_l", "grad_norm"))


def test_a_run_killed_and_resumed_ends_with_the_same_bits(train, hub_cache, tmp_path):
    flags = "--max_train_steps=12 --checkpointing_steps=2 --refresh_rejected_steps=3 --lr_scheduler=cosine".split()
    flags += ["--lora_dropout=0.1"]
    unbroken = train(*flags, output_dir="unbroken")
    out = tmp_path / "killed"
    command = launch_command(*NAMED, *TOKEN, *SHORT, *flags, f"--output_dir={out}", f"--cache_dir={hub_cache}")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    while not (out / "checkpoint-4").is_dir():
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "pytorch_lora_weights.safetensors").exists()

    train(*flags, "--resume_from_checkpoint=latest", output_dir="killed")

    a, b = read_results(unbroken), read_results(out)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert [r["loss"] for r in read_metrics(unbroken)] == [r["loss"] for r in read_metrics(out)]
    assert [r["step"] for r in read_metrics(out)] == list(range(1, 13))


def test_sigterm_leaves_a_checkpoint_and_says_how_to_go_on(hub_cache, tmp_path):
    out = tmp_path / "out"
    flags = [*NAMED, *TOKEN, *SHORT, "--max_train_steps=2000", f"--output_dir={out}", f"--cache_dir={hub_cache}"]
    command = [sys.executable, SCRIPT, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    (checkpoint,) = out.glob("checkpoint-*")
    assert process.returncode == 0
    assert f"SIGTERM: {checkpoint} is written; go on with --resume_from_checkpoint latest" in said
    assert checkpoint.name == f"checkpoint-{read_metrics(out)[-1]['step']}"
    held = load_file(checkpoint / "trained.safetensors")
    assert {name for name in held if name.endswith(".rows")} and sum(t.numel() for t in held.values()) < 1e6


# ---------------------------------------------------------------------------------------------------------------------
# Reward guidance
# ---------------------------------------------------------------------------------------------------------------------


def test_reward_guidance_is_the_plain_pipelines_picture_at_its_two_ends(train):
    from diffusers import StableDiffusionXLPipeline

    from reward_guidance import draw_with_reward_guidance

    pipeline = load_plain(train("--train_text_encoder"))

    def guided(**scales):
        options = dict(num_inference_steps=3, height=64, width=64, generator=torch.Generator("cpu").manual_seed(3))
        return np.asarray(
            draw_with_reward_guidance(pipeline, "weary <cat> face", "weary cat face", **options, **scales)
        ).astype(int)

    base = StableDiffusionXLPipeline.from_pretrained(MODEL, dtype=torch.float32)
    base.set_progress_bar_config(disable=True)
    start = draw(base, "weary cat face", 3, num_inference_steps=3, guidance_scale=4.0)
    assert np.abs(guided(guidance_scale=4.0, reward_scale=0.0) - start).max() <= 2
    tuned = draw(pipeline, "weary <cat> face", 3, num_inference_steps=3, guidance_scale=1.0)
    assert np.abs(guided(guidance_scale=1.0, reward_scale=1.0) - tuned).max() <= 2
    assert np.abs(guided(guidance_scale=4.0, reward_scale=1.0) - start).max() > 20


def test_reward_guidance_on_the_command_line(train, tmp_path):
    out = train()
    command = [sys.executable, str(REPO / "reward_guidance.py"), f"--pretrained_model_name_or_path={MODEL}", *TOKEN]
    command += [f"--lora_dir={out}", "--prompt=weary <cat> face", "--resolution=64", "--num_inference_steps=2"]
    done = subprocess.run([*command, "--output=x.png"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "x.png").size == (64, 64)
    done = subprocess.run([*command, "--lora_dir=none"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (
        done.returncode == 2 and "--lora_dir none: no pytorch_lora_weights.safetensors" in done.stderr.splitlines()[-1]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------

BAD_FLAGS = [
    (["--beta_mapo=0"], "--beta_mapo 0.0: must be positive and finite"),
    (["--beta_dco=nan"], "--beta_dco nan: must be positive and finite"),
    (["--snr_value=-1"], "--snr_value -1.0: must be positive and finite"),
    (["--learning_rate=inf"], "--learning_rate inf: must be positive and finite"),
    (["--text_encoder_lr=0"], "--text_encoder_lr 0.0: must be positive and finite"),
    (["--prior_loss_weight=-1"], "--prior_loss_weight -1.0: must be at least 0"),
    (["--num_rejected_per_image=0"], "--num_rejected_per_image 0: must be at least 1"),
    (["--refresh_rejected_steps=0"], "--refresh_rejected_steps 0: must be at least 1"),
    (["--train_batch_size=0"], "--train_batch_size 0: must be at least 1"),
    (["--sample_batch_size=0"], "--sample_batch_size 0: must be at least 1"),
    (["--max_train_steps=0"], "--max_train_steps 0: must be at least 1"),
    (["--rank=0"], "--rank 0: must be at least 1"),
    (["--seed=-1"], "--seed -1: must be at least 0"),
    (["--lora_dropout=2"], "--lora_dropout 2.0: must be between 0 and 1"),
    (["--resolution=63"], "--resolution 63: must be a multiple of 8; try 64"),
    (["--loss_type=dpo"], "--loss_type: invalid choice: 'dpo'"),
    (["--optimizer=lion"], "--optimizer: invalid choice: 'lion'"),
    (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
    (["--with_prior_preservation"], "--with_prior_preservation needs --loss_type dreambooth too"),
    (["--loss_type=dco", "--refresh_rejected_steps=5"], "--refresh_rejected_steps needs --loss_type mapo too"),
    (["--loss_type=dco", f"--rejected_data_dir={SUBJECT}"], "--rejected_data_dir needs --loss_type mapo too"),
    (["--use_dora", "--output_kohya_format"], "--use_dora and --output_kohya_format exclude each other"),
    (["--hub_token=x", "--report_to=wandb"], "--hub_token and --report_to wandb exclude each other"),
    (["--hub_model_id=x"], "--hub_model_id needs --push_to_hub too"),
    (["--report_to=wandb"], "--report_to wandb needs a package: pip install wandb"),
    (["--pretrained_model_name_or_path=x"], "--pretrained_model_name_or_path x needs --instance_data_dir too"),
    (["--instance_data_dir=x"], "--instance_data_dir x needs --pretrained_model_name_or_path too"),
    ([*NAMED, "--instance_data_dir=/none"], "--instance_data_dir /none: no such folder"),
    (["--rejected_data_dir=/none"], "--rejected_data_dir /none: no such folder"),
    ([*NAMED, "--token=<dog>"], "--token needs --initializer_token too"),
    ([*NAMED, "--initializer_token=dog"], "--initializer_token needs --token too"),
    (["--output_dir=/etc/passwd"], "--output_dir /etc/passwd: is a file; name a folder"),
    (["--validation_prompts=none.txt"], "--validation_prompts none.txt: no such file"),
    (["--validation_prompts", "fox", " "], "--validation_prompts: a prompt is empty"),
]


@pytest.mark.parametrize("flags,message", BAD_FLAGS, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_a_bad_flag_ends_in_one_line(flags, message, script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(flags)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message in last


def folder(path, **files) -> list[str]:
    """A folder with the demo's subject, with some files changed: None takes one out."""
    flags = copy_subject(path / "photos")
    for name, content in files.items():
        file = path / "photos" / name.replace("__", ".")
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
    return flags


def captioned(path, text: str) -> list[str]:
    rows = [json.loads(line) | {"text": text} for line in (SUBJECT / "metadata.jsonl").open()]
    return folder(path, metadata__jsonl="\n".join(map(json.dumps, rows)).encode())


def empty(path) -> list[str]:
    (path / "photos").mkdir()
    return [f"--pretrained_model_name_or_path={MODEL}", f"--instance_data_dir={path / 'photos'}", *TOKEN]


def rejected(path) -> list[str]:
    for name in ("crying", "grinning", "in-love", "pouting"):
        shutil.copy(SUBJECT / f"{name}.png", path / f"{name}-0.png")
    return [*folder(path), f"--rejected_data_dir={path}"]


def config(path, **changes) -> list[str]:
    flags = copy_subject(path / "photos", "json")
    file = path / "photos" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return flags


def tokens(token: str, word: str):
    return lambda path: [*NAMED, "--instance_prompt", f"a {token}", "--token", token, "--initializer_token", word]


BAD_DATA = {
    "no photo": (empty, "no photo in it (.bmp, .jpeg"),
    "unreadable photo": (lambda p: folder(p, crying__png=b"no picture"), "crying.png is no readable picture"),
    "cut photo": (
        lambda p: folder(p, crying__png=(SUBJECT / "crying.png").read_bytes()[:500]),
        "crying.png is no readable picture",
    ),
    "missing photo": (lambda p: folder(p, crying__png=None), "metadata.jsonl names crying.png, which isn't there"),
    "no captions": (
        lambda p: folder(p, metadata__jsonl=None),
        "crying.png has no caption; write one to metadata.jsonl",
    ),
    "no JSON lines": (
        lambda p: folder(p, metadata__jsonl=b"a cat"),
        "metadata.jsonl, line 1: needs file_name and text",
    ),
    "no text": (
        lambda p: folder(p, metadata__jsonl=b'{"file_name": "crying.png"}'),
        "metadata.jsonl, line 1: needs file_name and text (KeyError('text'))",
    ),
    "caption without the token": (
        lambda p: captioned(p, "a dog"),
        "smiling.png, 'a dog', has none of <cat>, cat",
    ),
    "empty caption": (lambda p: captioned(p, " "), "smiling.png has no caption"),
    "same name": (
        lambda p: (
            folder(p, crying__jpg=(SUBJECT / "crying.png").read_bytes(), metadata__jsonl=None)
            + ["--instance_prompt=a cat"]
        ),
        "two photos are named crying; rename one",
    ),
    "too few initializers": (
        lambda p: [*NAMED, "--token", "<a>", "<b>", "--initializer_token", "cat"],
        "--initializer_token: 1 for 2 of --token; each token needs one",
    ),
    "same token twice": (
        lambda p: [*NAMED, "--token", "<a>", "<a>", "--initializer_token", "cat", "dog"],
        "--token <a>: stands twice, or is part of another",
    ),
    "token of two words": (tokens("a cat", "cat"), "--token 'a cat': must be one word"),
    "token exists": (
        tokens("dog", "cat"),
        "--token dog: the tokenizer has it already; choose a new one, such as <dog-1>",
    ),
    "initializer of several pieces": (
        tokens("<zebra>", "zebra"),
        "--initializer_token zebra: is 4 tokens, z e br a</w>",
    ),
    "too few rejected": (rejected, "0 pictures smiling-NUMBER for photo smiling, needs 1"),
    "unreadable rejected picture": (
        lambda p: rejected(p) + [(p / "smiling-0.png").write_bytes(b"no picture") and "--num_rejected_per_image=1"],
        "--rejected_data_dir: ",
    ),
    "config of unequal lists": (lambda p: config(p, prompts=["a <cat>"]), "5 images, 1 prompts, 5 base_prompts"),
    "config without images": (lambda p: config(p, images=None) + ["--config_name=x"], "see --config_name"),
    "config without initializer": (
        lambda p: config(p, initializer_tokens=[]),
        "--initializer_token: 0 for 1 of --token",
    ),
    "config with an empty initializer": (
        lambda p: config(p, initializer_tokens=[""]),
        "--initializer_token '': must be one word",
    ),
}


@pytest.mark.parametrize("fault", BAD_DATA)
def test_bad_data_ends_in_one_line_before_a_model_is_loaded(fault, train, script, tmp_path, monkeypatch):
    make, message = BAD_DATA[fault]
    monkeypatch.setattr(script, "load_frozen_models", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        train(data=make(tmp_path))
    assert message in stop.value.code and "\n" not in stop.value.code
    assert stop.value.code.startswith("train_dreambooth_lora_mapo_sdxl.py: error: ")


def test_a_caption_that_is_too_long_is_said(script, caplog):
    args = script.parse_args([*NAMED, *TOKEN, "--instance_prompt", "a cat " * 20])
    with caplog.at_level("INFO", logger="mapo"):
        script.check_tokens(script.load_photos(args), args)
    assert "The caption of crying has 42 tokens; the end is cut off after the first 22." in caplog.text


def test_a_wrong_model_ends_in_one_line(train):
    with pytest.raises(SystemExit) as stop:
        train(data=["--pretrained_model_name_or_path=/none", f"--instance_data_dir={SUBJECT}", *TOKEN])
    assert "error: --pretrained_model_name_or_path /none: " in stop.value.code and "\n" not in stop.value.code


def test_layers_that_are_not_there_end_in_one_line(train):
    with pytest.raises(SystemExit) as stop:
        train("--lora_layers=to_nothing")
    assert "--lora_layers to_nothing: " in stop.value.code and "\n" not in stop.value.code


def test_checkpoints_of_another_run_are_not_run_over(script, train, capsys):
    out = train("--checkpointing_steps=3")
    with pytest.raises(SystemExit):
        script.parse_args([f"--output_dir={out}"])
    assert "holds checkpoint-3 of an earlier run: continue it with --resume" in capsys.readouterr().err

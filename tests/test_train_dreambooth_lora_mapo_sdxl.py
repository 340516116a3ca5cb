"""train_dreambooth_lora_mapo_sdxl.py as a user runs it, on a model of 0.2 M weights and the demo's subject."""

import argparse
import ast
import contextlib
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from benchmarks.personalization import read_figures
from conftest import REPO
from PIL import Image
from safetensors.torch import load_file
from small_model import write_model


MODEL, SUBJECT = f"{tempfile.gettempdir()}/mapo-small-model-{os.getpid()}", REPO / "demo" / "subject"
SCRIPT = str(REPO / "train_dreambooth_lora_mapo_sdxl.py")
NAMED = [f"--pretrained_model_name_or_path={MODEL}", f"--instance_data_dir={SUBJECT}", "--resolution=64"]
TOKEN = ["--placeholder_token", "<cat>", "--initializer_token", "cat"]
CONTEXT = "weary <cat> face"
ENCODERS = ("text_encoder", "text_encoder_2")
# A run of seconds; flags of a test come after these and win. The rates are high so that three steps show.
SHORT = [
    *"--max_train_steps=3 --num_inference_steps=2 --num_rejected_per_image=1 --rank=4".split(),
    *"--learning_rate=1e-2 --text_encoder_lr=1e-2 --guidance_scale=2 --sample_batch_size=5".split(),
    f"--validation_prompts={CONTEXT}",
]


@pytest.fixture(scope="module", autouse=True)
def small_model():
    yield write_model(Path(MODEL))
    shutil.rmtree(MODEL)


@pytest.fixture(scope="session")
def script():
    import train_dreambooth_lora_mapo_sdxl

    return train_dreambooth_lora_mapo_sdxl


@contextlib.contextmanager
def trainer(script, hub_cache: Path, folder: Path):
    """Runs the script in this process: `train("--beta_mapo=8")` -> its output folder. `train.model` is what it
    trained, `train.optimizer` what with, `train.generated` the last images that it generated."""
    save, optimizer, generate = script.save_weights, script.make_optimizer, script.generate_images

    def keep(name: str, value):
        setattr(run, name, value)
        return value

    def run(*flags, output_dir="out", data=(*NAMED, *TOKEN)):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        out = folder / output_dir
        script.main(script.parse_args([*data, *SHORT, f"--output_dir={out}", f"--cache_dir={hub_cache}", *flags]))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "save_weights", lambda model, args: save(keep("model", model), args))
        patch.setattr(script, "make_optimizer", lambda *a: keep("optimizer", optimizer(*a)))
        patch.setattr(script, "generate_images", lambda *a: keep("generated", generate(*a)))
        yield run


@pytest.fixture
def train(script, hub_cache, tmp_path):
    with trainer(script, hub_cache, tmp_path) as train:
        yield train


@pytest.fixture(scope="module")
def runs(script, hub_cache, tmp_path_factory):
    """`runs("--use_dora")` -> a finished run that tests only read: `out`, `model`, `optimizer` and `generated`."""

    @functools.cache
    def run(*flags: str) -> argparse.Namespace:
        with trainer(script, hub_cache, tmp_path_factory.mktemp("run")) as train:
            return argparse.Namespace(out=train(*flags), **vars(train))

    return run


def load_plain(out, tokens=("<cat>",), weight_name="pytorch_lora_weights.safetensors"):
    """What the snippet of the model card does."""
    from inference.reward_guidance import load_personalized_pipeline

    pipeline = load_personalized_pipeline(MODEL, str(out), list(tokens), dtype=torch.float32)
    if weight_name != "pytorch_lora_weights.safetensors":
        pipeline.unload_lora_weights()
        pipeline.load_lora_weights(out, weight_name=weight_name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, prompt: str, seed: int, **options) -> np.ndarray:
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 64, "width": 64} | options
    return np.asarray(
        pipeline(prompt, generator=torch.Generator("cpu").manual_seed(seed), **options).images[0]
    ).astype(int)


def embed_captions(captions: list[str], pipeline) -> dict[str, torch.Tensor]:
    embeds, _, pooled, _ = pipeline.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def read_metrics(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


# ---------------------------------------------------------------------------------------------------------------------
# The demo
# ---------------------------------------------------------------------------------------------------------------------


def test_the_demo_makes_samples_more_like_the_subject_and_says_so(launch, tmp_path):
    short = "--max_train_steps=60 --num_inference_steps=8 --num_rejected_per_image=1".split()
    done = launch("train_dreambooth_lora_mapo_sdxl.py", *short)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert lines[0].startswith(
        "Neither --pretrained_model_name_or_path nor --instance_data_dir is given: training the"
    )
    assert "accelerate launch train_dreambooth_lora_mapo_sdxl.py --instance_data_dir" in lines[0]
    figures = read_figures(done.stdout)
    for place in ("photos", "contexts"):
        assert figures[f"{place}_nearest_before"] == 0 and figures[f"{place}_nearest"] >= 60
        assert figures[f"{place}_palette"] > figures[f"{place}_palette_before"]
    assert figures["class_nearest_before"] == 0 and 0 < figures["others_distance_before"] < figures["others_distance"]
    assert figures["others_nearest_before"] > 70 and figures["others_nearest"] > 40
    assert "pipeline.load_textual_inversion(list(embeds['clip_l']), token=['<cat>']" in done.stdout
    out = tmp_path / "mapo-demo-subject"
    assert {"before_after.png", "chosen_rejected.png", "curves.png", "metrics.jsonl", "README.md"} <= set(
        os.listdir(out)
    )
    said = done.stdout + done.stderr
    for noise in ("Warning", "warning:", "xformers", "bitsandbytes", "deprecat", "torchvision", "Traceback"):
        assert noise not in said.replace("To avoid this warning pass in values", ""), said  # accelerate's own hint


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


CONVOLUTIONS = "--lora_layers=to_k,to_q,to_v,to_out.0,conv1,conv2,conv_shortcut,proj_in,time_emb_proj"
KOHYA = "--output_kohya_format"
KINDS = {
    "attention": [KOHYA],
    "dora": ["--use_dora"],
    "text encoders too": ["--train_text_encoder", KOHYA],
    "convolutions too": [CONVOLUTIONS, KOHYA],
    "alpha": ["--lora_alpha=16", KOHYA],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_give_in_a_plain_pipeline_the_images_of_the_training_process(kind, runs, script):
    run, kohya = runs(*KINDS[kind]), KOHYA in KINDS[kind]
    out = run.out

    prompts = [photo.caption for photo in script.load_photos(script.parse_args([*NAMED, *TOKEN]))] + [CONTEXT]
    layers = load_file(out / "pytorch_lora_weights.safetensors")
    for name in ["pytorch_lora_weights.safetensors"] + ["pytorch_lora_weights_kohya.safetensors"] * kohya:
        pipeline = load_plain(out, weight_name=name)
        loaded = [
            weight
            for part in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
            for key, weight in part.state_dict().items()
            if "lora_" in key
        ]
        assert len(loaded) == len(layers) and all(weight.abs().max() > 0 for weight in loaded)
        for i in (0, 5):  # a photo's caption and the new context
            assert np.abs(generate(pipeline, prompts[i], i) - np.asarray(run.generated[i]).astype(int)).max() <= 2
    pipeline.disable_lora()
    assert np.abs(generate(pipeline, prompts[5], 5) - np.asarray(run.generated[5])).max() > 5
    parts = {name.split(".")[0] for name in layers}
    assert parts == ({"unet", "text_encoder", "text_encoder_2"} if "text" in kind else {"unet"})
    if kohya:
        found = load_file(out / "pytorch_lora_weights_kohya.safetensors")
        assert {v.item() for k, v in found.items() if k.endswith(".alpha")} == {16.0 if kind == "alpha" else 4.0}


def test_the_files_have_the_names_that_other_programs_read(runs):
    """sd-scripts and ComfyUI: lora_unet_, lora_te1_, lora_te2_ and the layer's name in diffusers' UNet and in the text
    encoders of transformers 4, with _ for ., then .lora_down.weight, .lora_up.weight, .alpha. ComfyUI reads text
    encoders' layers under diffusers' names too, there with text_encoder.text_model. before them."""
    out = runs(*KINDS["text encoders too"]).out
    kohya = set(load_file(out / "pytorch_lora_weights_kohya.safetensors"))
    count = {part: json.loads(Path(MODEL, part, "config.json").read_text())["num_hidden_layers"] for part in ENCODERS}
    encoders = [
        (te, part, f"encoder.layers.{i}.self_attn.{name}_proj")
        for te, part in zip(("te1", "te2"), ENCODERS)
        for i in range(count[part] - (te == "te1"))  # SDXL doesn't use the first one's last layer
        for name in ("q", "k", "v", "out")
    ]
    wanted = {f"lora_{te}_text_model_{name.replace('.', '_')}" for te, _, name in encoders}
    unet = {name.split(".")[0] for name in kohya if name.startswith("lora_unet_")}
    assert {name.split(".")[0] for name in kohya} - unet == wanted
    for part in ("attn1", "attn2"):
        for name in ("to_q", "to_k", "to_v", "to_out_0"):
            assert f"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_{part}_{name}" in unet
    ends = ("lora_down.weight", "lora_up.weight", "alpha")
    assert kohya == {f"{name}.{end}" for name in unet | wanted for end in ends}
    named = {n for n in load_file(out / "pytorch_lora_weights.safetensors") if n.startswith("text_encoder")}
    assert named == {f"{part}.text_model.{name}.lora_{x}.weight" for _, part, name in encoders for x in "AB"}


def test_a_run_leaves_card_images_curves_and_metrics(train):
    out = train("--validation_steps=2", "--report_to=tensorboard")

    embeds = load_file(out / "learned_embeds.safetensors")
    assert {name: tuple(rows.shape) for name, rows in embeds.items()} == {"clip_l": (1, 64), "clip_g": (1, 96)}
    card = (out / "README.md").read_text()
    assert "instance_prompt: " + CONTEXT in card and "load_textual_inversion" in card and '"rank": 4' in card
    code = re.search("```python\n(.*?)```", card, re.DOTALL)[1].replace("to('cuda')", "to('cpu')")
    exec(code.replace("float16", "float32").replace("width=64", "width=64, num_inference_steps=1"), ran := {})
    assert ran["image"].size == (64, 64) and "<cat>" in ran["pipeline"].tokenizer.get_vocab()
    assert Image.open(out / "before_after.png").width > 5 * 128 and (out / "validation" / "2.png").is_file()
    assert list((out / "logs").rglob("events.out*")) and not list(out.glob("tmp-*"))
    records = read_metrics(out)
    assert [r["step"] for r in records] == [1, 2, 3]
    for record in records:
        assert record["margin"] == pytest.approx(record["score_w"] - record["score_l"], abs=1e-6)
        assert record["grad_norm"] > 0 and record["loss"] > record["mse_w"] and record["photos_per_second"] > 0


HOSTILE = 'a "red" <cat>\n```\nimport os; os.system("echo")\n| \\'


def test_nothing_in_a_prompt_breaks_the_cards_code_or_its_blocks(train):
    """12.19"""
    out = train("--validation_prompts", HOSTILE)
    card = (out / "README.md").read_text()
    head, text = card.removeprefix("---\n").split("\n---\n", 1)
    data = yaml.safe_load(head)
    assert data["instance_prompt"] == HOSTILE
    assert data["widget"] == [{"text": HOSTILE, "output": {"url": "image_0.png"}}]
    assert "base_model" not in data and "license" not in data  # the hub refuses a path
    assert Image.open(out / "image_0.png").size == (64, 64)
    blocks = re.findall(r"^(`{3,})(\w*)\n(.*?)\n\1$", text, re.MULTILINE | re.DOTALL)
    (code, settings) = blocks
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(code[2])) if isinstance(node, ast.Call)]
    assert code[1] == "python" and "pipeline" in calls and not any("system" in call for call in calls)
    assert HOSTILE in [node.value for node in ast.walk(ast.parse(code[2])) if isinstance(node, ast.Constant)]
    named = json.loads(settings[2])
    assert named["validation_prompts"] == [HOSTILE] and named["beta_mapo"] == 1024
    assert not {"beta_dco", "lr_power", "prior_loss_weight", "hub_token", "output_dir"} & set(named)


def test_a_model_of_the_hub_is_the_cards_base_model(script, tmp_path):
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    args = script.parse_args([*NAMED, *TOKEN, f"--pretrained_model_name_or_path={base}", f"--output_dir={tmp_path}"])
    script.load_photos(args)
    script.save_model_card("a <cat>", [], "", args)
    data = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
    assert data["base_model"] == base and data["license"] == "openrail++" and "widget" not in data


def test_captions_with_accents_are_no_boxes(script):
    """12.21"""
    image, texts = Image.new("RGB", (64, 64)), ("\u00e9", "\u0416", "\U0010fffe")
    grids = [script.make_grid([("", [text], [image])]) for text in texts]
    assert grids[0] != grids[1] != grids[2] != grids[0]


def test_the_curves_of_a_short_run_have_whole_steps_and_no_mean_of_one(script, tmp_path, monkeypatch):
    """12.22"""
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: kept.append(figure) or path.touch())
    script.plot_curves([{"step": i, "loss": 1 / i, "grad_norm": None} for i in (1, 2)], tmp_path / "curves.png")
    axis, norm = kept[0].axes[:2]
    assert axis.get_title() == "loss" and norm.get_title() == "grad_norm" and axis.get_legend() is None
    assert all(tick == int(tick) for tick in axis.get_xticks())
    long = [{"step": i, "loss": 1 / i} for i in range(1, 101)]
    script.plot_curves(long, tmp_path / "curves.png")
    each, mean = (line.get_xydata() for line in kept[1].axes[0].get_lines())
    assert len(each) == 100 and mean[0].tolist() == [5, np.mean([1 / i for i in range(1, 6)])]


def test_final_images_can_be_skipped_and_those_before_training_come_when_first_shown(train, script, monkeypatch):
    """14.10"""
    prompts, generate = [], script.generate_images
    monkeypatch.setattr(script, "generate_images", lambda *a: prompts.append(a[1]) or generate(*a))
    out = train("--loss_type=dreambooth", "--skip_final_inference")
    assert prompts == [] and not (out / "before_after.png").exists()
    assert "before_after" not in (out / "README.md").read_text() and (out / "learned_embeds.safetensors").exists()
    steps, real = [], script.training_step
    monkeypatch.setattr(script, "training_step", lambda *a: steps.append(len(prompts)) or real(*a))
    train("--loss_type=dreambooth", "--validation_steps=2", output_dir="shown")
    assert steps == [0, 0, 2]  # none before the first step; before and after at step 2
    assert len(prompts) == 3 and "<cat>" not in "".join(prompts[0]) and CONTEXT in prompts[1] and CONTEXT in prompts[2]


def test_several_tokens_load_in_their_order(train):
    data = [*NAMED, "--placeholder_token", "<cat>", "<mug>", "--initializer_token", "cat", "face"]
    out = train(data=data)
    pipeline = load_plain(out, tokens=["<cat>", "<mug>"])
    rows = load_file(out / "learned_embeds.safetensors")
    for tokenizer, encoder, key in (
        (pipeline.tokenizer, pipeline.text_encoder, "clip_l"),
        (pipeline.tokenizer_2, pipeline.text_encoder_2, "clip_g"),
    ):
        ids = tokenizer.convert_tokens_to_ids(["<cat>", "<mug>"])
        assert torch.equal(encoder.get_input_embeddings().weight[ids], rows[key])
    assert np.abs(generate(pipeline, "weary <cat> <mug>", 0)).max() > 0


def test_a_style_is_learnt_without_a_token(train):
    out = train("--instance_prompt=cat face", data=NAMED)
    assert not (out / "learned_embeds.safetensors").exists() and not train.model.tokens
    images = [generate(load_plain(out, tokens=()), "cat face", 0), np.asarray(train.generated[0]).astype(int)]
    assert np.abs(images[0] - images[1]).max() <= 2
    assert "load_textual_inversion" not in (out / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


def test_only_the_new_rows_train_and_they_keep_their_norm(runs):
    run = runs(*KINDS["attention"])

    unet, rows = ([tuple(p.shape) for p in group["params"]] for group in run.optimizer.param_groups)
    assert rows == [(1, 64), (1, 96)] and all(4 in shape for shape in unet)
    assert [group["lr"] for group in run.optimizer.param_groups] == [1e-2, 1e-2]
    learned = load_file(run.out / "learned_embeds.safetensors")
    for tokens, part, key in zip(run.model.tokens, ("text_encoder", "text_encoder_2"), ("clip_l", "clip_g")):
        files = load_file(f"{MODEL}/{part}/model.safetensors")
        (base,) = (weight for name, weight in files.items() if name.endswith("token_embedding.weight"))
        assert torch.equal(tokens.table.weight, base.float())  # bit for bit
        cat = run.model.pipeline.tokenizer.convert_tokens_to_ids("cat</w>")
        start = base[cat].float()
        assert (learned[key][0] - start).abs().max() > 1e-3
        assert learned[key][0].norm().item() == pytest.approx(start.norm().item(), rel=1e-6)
        assert tokens.rows.dtype == torch.float32
    for part in ("text_encoder", "text_encoder_2"):
        state = getattr(run.model, part).state_dict()
        for name, weight in load_file(f"{MODEL}/{part}/model.safetensors").items():
            name = name if "token_embedding" not in name else name.replace("weight", "table.weight")
            found = [value for key, value in state.items() if key.endswith(name.removeprefix("text_model."))]
            assert len(found) == 1 and torch.equal(found[0], weight.float()), name


def test_pooled_embeddings_agree_with_the_plain_pipeline_and_end_at_the_token(runs):
    run = runs(*KINDS["attention"])
    pipeline = load_plain(run.out)

    def pooled(text, where=pipeline):
        with torch.no_grad():
            return embed_captions([text], where)["pooled_prompt_embeds"]

    trained = run.model.pipeline
    run.model.eval()
    for caption in ("crying <cat> face", "crying cat face", "smiling <cat> face with open mouth"):
        ids = [p.tokenizer_2(caption).input_ids for p in (pipeline, trained)]
        assert ids[0] == ids[1]
        assert torch.equal(pooled(caption), pooled(caption, trained))
    # At the token with the largest id: what stands behind <cat> doesn't reach the pooled embedding.
    assert torch.allclose(pooled("crying <cat> face"), pooled("crying <cat>"), atol=1e-6)
    assert not torch.allclose(pooled("crying cat face"), pooled("crying cat"), atol=1e-2)
    assert not torch.allclose(pooled("crying <cat>"), pooled("weary <cat>"), atol=1e-2)


def test_a_caption_with_the_token_and_its_base_are_made_of_each_other(script):
    args = argparse.Namespace(placeholder_token=["<cat>", "<hat>"], initializer_token=["cat", "hat"])
    both = ("a <cat> in a <hat>, catwalk", "a cat in a hat, catwalk")
    assert script.with_and_without_token(both[0], args) == both
    assert script.with_and_without_token(both[1], args) == both
    assert script.with_and_without_token("A Cat.", args) == ("A <cat>.", "A Cat.")
    assert script.with_and_without_token("a dog", args) == ("a dog", "a dog")
    assert script.with_and_without_token("a cat", argparse.Namespace(placeholder_token=None)) == ("a cat", "a cat")


# ---------------------------------------------------------------------------------------------------------------------
# Photos and rejected images
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
    assert len(photos) == 5 and (args.placeholder_token, args.initializer_token) == (["<cat>"], ["cat"])
    for photo in photos:
        other = expected[photo.name]
        assert photo.image.tobytes() == other.image.tobytes()
        assert (photo.caption, photo.base_caption) == (other.caption, other.base_caption)
    assert expected["crying"].caption == "crying <cat> face" and expected["crying"].base_caption == "crying cat face"


@pytest.mark.parametrize("captions", ["metadata", "txt", "json"])
def test_a_byte_order_mark_is_not_part_of_a_caption(captions, script, tmp_path):
    """12.6"""
    flags = copy_subject(tmp_path, captions)
    for file in [*tmp_path.glob("*.txt"), *tmp_path.glob("*.json*")]:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert {p.caption for p in script.load_photos(script.parse_args(flags))} == {
        json.loads(r)["text"] for r in (SUBJECT / "metadata.jsonl").open()
    }


def test_a_very_thin_photo_is_cropped_before_it_is_resized(script, monkeypatch):
    """12.9: 2 x 20000 enlarged to 1024 px in whole would take 30 GB"""
    thin = Image.new("RGB", (2, 20000), "red")
    thin.paste("blue", (0, 9990, 2, 10010))
    pixels, time_ids = script.prepare_image(thin, 1024)
    assert pixels.shape == (3, 1024, 1024) and time_ids[:2] == [20000, 2] and time_ids[4:] == [1024, 1024]
    assert abs(time_ids[2] - 9999 * 512) <= 1 and time_ids[3] == 0
    assert (pixels == torch.tensor([0, 0, 255])[:, None, None]).all()


def test_one_prompt_for_all_photos(script):
    photos = script.load_photos(script.parse_args([*NAMED, *TOKEN, "--instance_prompt=a cat"]))
    assert {(photo.caption, photo.base_caption) for photo in photos} == {("a <cat>", "a cat")}


def test_rejected_images_are_drawn_once_from_fixed_seeds_and_again_when_a_setting_changes(train, tmp_path):
    def files(cache):
        return {p: p.stat().st_mtime_ns for p in cache.rglob("rejected-*/**/*.png")}

    cache = tmp_path / "cache"
    flags = [f"--cache_dir={cache}", "--max_train_steps=1", "--skip_final_inference"]
    train(*flags)
    first = files(cache)
    assert len(first) == 5

    train(*flags, output_dir="second")
    assert files(cache) == first  # found, not drawn
    gone = next(p for p in first if p.name == "crying-0.png")
    before = gone.read_bytes()
    gone.unlink()
    train(*flags, "--num_rejected_per_image=2", output_dir="third")
    more = files(cache)
    assert gone.read_bytes() == before and len(more) == 10  # only those missing are drawn, and as they were
    assert {p: t for p, t in more.items() if p in first and p != gone} == {p: t for p, t in first.items() if p != gone}
    train(*flags, "--num_inference_steps=3", output_dir="fourth")
    train(*flags, "--seed=1", output_dir="fifth")
    assert len({file.parent for file in files(cache)}) == 3 and len(files(cache)) == 20


def test_rejected_images_are_what_the_plain_starting_model_draws_for_the_base_caption(train, script, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    train(f"--cache_dir={tmp_path / 'cache'}", "--max_train_steps=1", "--skip_final_inference")
    pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    names = [photo.name for photo in script.load_photos(script.parse_args([*NAMED, *TOKEN]))]
    seed = int(np.random.SeedSequence((0, 0, names.index("crying"), 0)).generate_state(1)[0])
    (file,) = (tmp_path / "cache").rglob("crying-0.png")
    assert np.abs(generate(pipeline, "crying cat face", seed) - np.asarray(Image.open(file)).astype(int)).max() <= 2


def test_ones_own_rejected_images_are_taken(train, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for name in ("smiling", "grinning", "in-love", "crying", "pouting"):
        for j in range(2):
            Image.new("RGB", (80, 70), "green").save(own / f"{name}-{j}.png")
    out = train(f"--rejected_data_dir={own}", "--num_rejected_per_image=2", "--skip_final_inference")
    grid = np.asarray(Image.open(out / "chosen_rejected.png"))
    assert (grid == (0, 128, 0)).all(-1).sum() > 10 * 100 * 100


def test_new_rejected_images_come_from_the_model_as_it_is(train, script, monkeypatch):
    seen, real = [], script.PhotoSet.encode
    monkeypatch.setattr(
        script.PhotoSet, "encode", lambda self, *a: (real(self, *a), seen.append(self.rejected.clone()))
    )
    out = train("--refresh_rejected_steps=2", "--max_train_steps=4", "--skip_final_inference")
    assert len(seen) == 2 and not torch.equal(*seen) and len(list((out / "rejected" / "2").glob("*-0.png"))) == 5


def test_a_batch_is_the_whole_set_and_each_photo_keeps_its_own_rejected_ones(script):
    from diffusers import AutoencoderKL

    args = script.parse_args([*NAMED, *TOKEN])
    photos = script.load_photos(args)
    vae = AutoencoderKL.from_pretrained(MODEL, subfolder="vae")
    dataset = script.PhotoSet(photos, args)
    dataset.encode([[photo.image] * 2 for photo in photos], vae, torch.device("cpu"))
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
    accelerator = Accelerator(cpu=True)
    model, noise_scheduler = script.load_models(args, accelerator)
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
    return argparse.Namespace(model=model, scheduler=noise_scheduler, batch=batch, accelerator=accelerator)


def predict(world, script, clean, noise, timestep, caption, time_ids, adapters=True):
    """Squared error of one image for one caption, in float64, by the parts of the model and not by its forward."""
    a = world.scheduler.alphas_cumprod[timestep]
    noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
    with torch.no_grad():
        embeds = embed_captions([caption], world.model.pipeline)
        conditions = {"text_embeds": embeds["pooled_prompt_embeds"], "time_ids": time_ids[None]}
        if not adapters:
            world.model.pipeline.disable_lora()
        prediction = world.model.unet(
            noisy[None], timestep, embeds["prompt_embeds"], added_cond_kwargs=conditions
        ).sample
        if not adapters:
            world.model.pipeline.enable_lora()
    return ((prediction[0].double() - noise.double()) ** 2).mean().item()


LOSSES = {
    "mapo": ["--loss_type=mapo", "--beta_mapo=64"],
    "dco": ["--loss_type=dco", "--beta_dco=100"],
    "dreambooth": ["--loss_type=dreambooth"],
    "dreambooth with prior": ["--loss_type=dreambooth", "--with_prior_preservation", "--prior_loss_weight=0.7"],
    "mapo with prior": ["--beta_mapo=64", "--with_prior_preservation", "--prior_loss_weight=0.7"],
}


@pytest.mark.parametrize("kind", LOSSES)
def test_each_loss_is_its_formula_sample_by_sample_in_float64(kind, world, script):
    args, batch = script.parse_args([*NAMED, *TOKEN, *LOSSES[kind]]), world.batch
    loss, metrics = script.training_step(world.model, batch, world.scheduler, args, world.accelerator)

    noise, timesteps = script.sample_noise(batch["position"], (4, 16, 16), 1000, 0.0, 0, torch.device("cpu"))
    each = []
    for i in range(2):
        common = (noise[i], timesteps[i])
        w = predict(world, script, batch["latents"][i], *common, batch["captions"][i], batch["time_ids"][i])
        if kind.startswith("mapo"):
            loser = predict(world, script, batch["rejected"][i], *common, batch["captions"][i], batch["time_ids"][i])
            phi_w, phi_l = ((0.5 * x / math.expm1(0.5 * x)) ** 64 for x in (w, loser))
            each.append(w + math.log1p(math.exp(-1000 * (phi_w - phi_l))) / 64)
        elif kind == "dco":
            ref = predict(
                world, script, batch["latents"][i], *common, batch["base_captions"][i], batch["time_ids"][i], False
            )
            each.append(math.log1p(math.exp(100 * (w - ref))))
            assert ref != pytest.approx(w, rel=1e-4)
        else:
            each.append(w)
        if "prior" in kind:
            of_class = predict(
                world, script, batch["rejected"][i], *common, batch["base_captions"][i], batch["time_ids"][i]
            )
            each[-1] += 0.7 * of_class
    assert loss.item() == pytest.approx(np.mean(each), rel=2e-4)
    assert metrics["loss"].item() == loss.item()


def test_the_safeguard_damps_the_losers_gradient_and_no_value(world, script):
    found = {}
    for flags in ([], ["--safeguard=0.9"]):
        args = script.parse_args([*NAMED, *TOKEN, "--beta_mapo=1", *flags])  # errors of 1: a larger one has no margin
        loss, metrics = script.training_step(world.model, world.batch, world.scheduler, args, world.accelerator)
        trained = [p for p in world.model.parameters() if p.requires_grad]
        found[len(flags)] = (loss.item(), metrics["safeguard"].item(), torch.autograd.grad(loss, trained))
    assert found[0][0] == found[1][0] and found[0][1] == 1 and found[1][1] < 0.5
    assert any((a - b).abs().max() > 1e-4 * a.abs().max() > 0 for a, b in zip(found[0][2], found[1][2]))


def test_with_the_lora_disabled_the_model_is_the_starting_one_bit_for_bit(world, script):
    from diffusers import UNet2DConditionModel

    base = UNet2DConditionModel.from_pretrained(MODEL, subfolder="unet", dtype=torch.float32)
    batch, timesteps = world.batch, torch.tensor([10, 900])
    with torch.no_grad():
        embeds = embed_captions(batch["base_captions"], world.model.pipeline)
        conditions = {"text_embeds": embeds["pooled_prompt_embeds"], "time_ids": batch["time_ids"]}
        expected = base(batch["latents"], timesteps, embeds["prompt_embeds"], added_cond_kwargs=conditions).sample
        world.model.pipeline.disable_lora()
        off = world.model(batch["latents"], timesteps, batch["base_captions"], batch["time_ids"])
        world.model.pipeline.enable_lora()
        on = world.model(batch["latents"], timesteps, batch["base_captions"], batch["time_ids"])
    assert torch.equal(off, expected) and not torch.allclose(on, expected, atol=1e-2)


@pytest.mark.parametrize("kind", ["dco", "dreambooth", "dreambooth with prior", "mapo with prior"])
def test_every_loss_trains_to_the_end(kind, train):
    out = train(*LOSSES[kind], "--skip_final_inference")
    records = read_metrics(out)
    assert len(records) == 3 and all(record["grad_norm"] > 0 for record in records)
    assert Image.open(out / "curves.png").size == (1800, 600)
    assert (out / "chosen_rejected.png").exists() == ("prior" in kind)


# ---------------------------------------------------------------------------------------------------------------------
# Precision, accumulation, processes, resumption
# ---------------------------------------------------------------------------------------------------------------------


def test_tokens_and_lora_stay_fp32_in_bf16_and_move(train):
    out = train("--mixed_precision=bf16", "--skip_final_inference")
    embeds, layers = load_file(out / "learned_embeds.safetensors"), load_file(out / "pytorch_lora_weights.safetensors")
    assert {t.dtype for t in [*embeds.values(), *layers.values()]} == {torch.float32}
    assert train.model.unet.conv_in.weight.dtype == train.model.tokens[0].table.weight.dtype == torch.bfloat16
    start = train.model.tokens[0].table.weight[train.model.pipeline.tokenizer.convert_tokens_to_ids("cat</w>")]
    assert (embeds["clip_l"][0] - start.float()).abs().max() > 1e-3


@pytest.mark.parametrize("flags", [["--gradient_checkpointing"], ["--optimizer=adafactor"], ["--noise_offset=0.1"]])
def test_other_ways_to_train_run(flags, train):
    records = read_metrics(train(*flags, "--skip_final_inference"))
    assert len(records) == 3 and all(record["grad_norm"] > 0 for record in records)


def read_results(out) -> dict:
    return load_file(out / "pytorch_lora_weights.safetensors") | load_file(out / "learned_embeds.safetensors")


def test_accumulation_equals_the_big_batch(train):
    smooth = ["--adam_epsilon=1e-2", "--learning_rate=1e-2", "--skip_final_inference"]
    big = read_results(train("--train_batch_size=4", *smooth, output_dir="big"))
    small = ["--train_batch_size=2", "--gradient_accumulation_steps=2"]
    small = read_results(train(*small, *smooth, output_dir="small"))
    assert max((big[name] - small[name]).abs().max().item() for name in big) < 1e-5


def test_the_whole_set_is_one_step_in_as_many_passes_as_the_gpu_has_room_for(train, script, monkeypatch):
    """14.3"""
    smooth = ["--adam_epsilon=1e-2", "--learning_rate=1e-2", "--skip_final_inference"]
    whole = train(*smooth, output_dir="whole")
    sizes, real = [], script.training_step
    monkeypatch.setattr(script, "training_step", lambda *a: sizes.append(len(a[1]["captions"])) or real(*a))
    monkeypatch.setattr(script, "SAMPLES_PER_PASS", 4 / 256)  # of 1024 px, so 4 of 64 px
    split = train(*smooth, output_dir="split")
    assert sizes == [2, 2, 1] * 3
    a, b = read_results(whole), read_results(split)
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-5
    for x, y in zip(read_metrics(whole), read_metrics(split), strict=True):
        assert all(x[name] == pytest.approx(y[name], rel=1e-4, abs=1e-6) for name in ("loss", "mse_l", "grad_norm"))


@pytest.mark.parametrize(
    "flags,expected",
    [
        ([], (20, 4)),  # 8 samples, 11.7 GB with checkpointing
        (["--with_prior_preservation"], (20, 2)),
        (["--loss_type=dreambooth"], (20, 8)),
        (["--resolution=512"], (20, 16)),
        (["--resolution=2048"], (20, 1)),
        (["--gradient_accumulation_steps=10"], (20, 2)),
        (["--train_batch_size=20"], (20, 20)),
        (["--train_batch_size=3", "--gradient_accumulation_steps=2"], (6, 3)),
    ],
)
def test_twenty_photos_fit_16_gb_by_default(flags, expected, script):
    args = script.parse_args([*NAMED, *TOKEN, "--resolution=1024", *flags])
    assert (script.split_photos(20, args, argparse.Namespace(num_processes=1)), args.train_batch_size) == expected


def test_epochs_scaled_rates_and_cycles(train):
    flags = ["--num_train_epochs=2", "--train_batch_size=2", "--gradient_accumulation_steps=2", "--learning_rate=1e-4"]
    flags += ["--scale_lr", "--text_encoder_lr=1e-5", "--lr_scheduler=polynomial", "--lr_power=2"]
    flags += ["--skip_final_inference"]
    records = read_metrics(train(*flags))
    assert len(records) == 3  # 2 x 5 photos, 4 at a time
    assert [group["initial_lr"] for group in train.optimizer.param_groups] == pytest.approx([4e-4, 4e-5])
    assert records[0]["learning_rate"] == pytest.approx(4e-4 * (2 / 3) ** 2, rel=1e-2)


def test_two_processes_equal_one(train, hub_cache, tmp_path, monkeypatch):
    smooth = ["--adam_epsilon=1e-2", "--train_text_encoder", "--skip_final_inference"]
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
    flags += ["--lora_dropout=0.1", "--skip_final_inference"]
    unbroken = train(*flags, output_dir="unbroken")
    out = tmp_path / "killed"
    named = [*NAMED, *TOKEN, *SHORT, f"--output_dir={out}", f"--cache_dir={hub_cache}"]
    command = [sys.executable, SCRIPT, *named, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (out / "checkpoint-4").is_dir():
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (out / "pytorch_lora_weights.safetensors").exists()

    train(*flags, "--resume_from_checkpoint=latest", output_dir="killed")

    a, b = read_results(unbroken), read_results(out)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert [r["loss"] for r in read_metrics(unbroken)] == [r["loss"] for r in read_metrics(out)]
    assert [r["step"] for r in read_metrics(out)] == list(range(1, 13))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_finished_run_is_resumed_without_a_step(elsewhere, train):
    """12.8, as after a crash in the last validation"""
    out = train("--checkpointing_steps=3")
    for name in ("README.md", "curves.png", "before_after.png", "pytorch_lora_weights.safetensors"):
        (out / name).rename(out / f"first-{name}")
    again = train(f"--resume_from_checkpoint={out / 'checkpoint-3'}", output_dir="again" if elsewhere else "out")
    a, b = (
        load_file(x)
        for x in (out / "first-pytorch_lora_weights.safetensors", again / "pytorch_lora_weights.safetensors")
    )
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (again / "README.md").is_file() and (again / "before_after.png").is_file()
    assert (again / "curves.png").is_file() and len(read_metrics(again)) == 3


def test_other_photos_under_the_same_names_are_not_resumed(train, tmp_path):
    """12.3"""
    data = copy_subject(tmp_path / "photos")
    train("--checkpointing_steps=3", "--skip_final_inference", data=data)
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "crying.png")
    with pytest.raises(SystemExit) as stop:
        train("--resume_from_checkpoint=latest", data=data)
    assert "photos and captions of --instance_data_dir " in stop.value.code
    assert "checkpoint-3 was trained with" in stop.value.code and "\n" not in stop.value.code


def test_other_settings_are_not_resumed(train):
    train("--checkpointing_steps=3", "--skip_final_inference")
    for flag, message in (
        ("--rank=8", "--rank 8: checkpoint-3 was trained with 4"),
        ("--train_batch_size=4", "step 4: "),
    ):
        with pytest.raises(SystemExit) as stop:
            train("--resume_from_checkpoint=latest", flag)
        assert message in stop.value.code and "keep it or change --output_dir" in stop.value.code


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
    held = torch.load(checkpoint / "custom_checkpoint_0.pkl")
    assert len(held) > 2 and sum(t.numel() for t in held.values()) < 1e6 and not list(checkpoint.glob("model*"))


# ---------------------------------------------------------------------------------------------------------------------
# Reward guidance
# ---------------------------------------------------------------------------------------------------------------------


def test_reward_guidance_is_the_plain_pipelines_image_at_its_two_ends(runs):
    from inference.reward_guidance import generate_with_reward_guidance

    from diffusers import StableDiffusionXLPipeline

    pipeline = load_plain(runs(*KINDS["text encoders too"]).out)

    def guided(**scales):
        options = dict(num_inference_steps=3, height=64, width=64, generator=torch.Generator("cpu").manual_seed(3))
        return np.asarray(
            generate_with_reward_guidance(pipeline, "weary <cat> face", "weary cat face", **options, **scales)
        ).astype(int)

    base = StableDiffusionXLPipeline.from_pretrained(MODEL, dtype=torch.float32)
    base.set_progress_bar_config(disable=True)
    start = generate(base, "weary cat face", 3, num_inference_steps=3, guidance_scale=4.0)
    assert np.abs(guided(guidance_scale=4.0, reward_scale=0.0) - start).max() <= 2
    tuned = generate(pipeline, "weary <cat> face", 3, num_inference_steps=3, guidance_scale=1.0)
    assert np.abs(guided(guidance_scale=1.0, reward_scale=1.0) - tuned).max() <= 2
    assert np.abs(guided(guidance_scale=4.0, reward_scale=1.0) - start).max() > 20


def test_reward_guidance_on_the_command_line(runs, tmp_path):
    command = [sys.executable, str(REPO / "inference" / "reward_guidance.py"), *TOKEN, "--prompt=weary <cat> face"]
    command += [f"--pretrained_model_name_or_path={MODEL}", f"--lora_dir={runs(*KINDS['attention']).out}"]
    command += ["--resolution=64", "--num_inference_steps=2", "--output=x.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "x.png").size == (64, 64)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------

BAD_FLAGS = [
    (["--beta_mapo=0"], "argument --beta_mapo: 0.0 is not in (0, inf)"),
    (["--beta_dco=nan"], "argument --beta_dco: nan is not in (0, inf)"),
    (["--snr_value=-1"], "argument --snr_value: "),
    (["--learning_rate=inf"], "argument --learning_rate: "),
    (["--text_encoder_lr=0"], "argument --text_encoder_lr: "),
    (["--prior_loss_weight=-1"], "argument --prior_loss_weight: "),
    (["--num_rejected_per_image=0"], "argument --num_rejected_per_image: 0 is not in [1, inf)"),
    (["--refresh_rejected_steps=0"], "argument --refresh_rejected_steps: "),
    (["--train_batch_size=0"], "argument --train_batch_size: "),
    (["--train_batch_size=1.5"], "argument --train_batch_size: "),
    (["--sample_batch_size=0"], "argument --sample_batch_size: "),
    (["--max_train_steps=0"], "argument --max_train_steps: "),
    (["--rank=0"], "argument --rank: "),
    (["--seed=-1"], "argument --seed: "),
    (["--seed=4294967296"], "argument --seed: 4294967296 is not in [0, 4294967295]"),
    (["--adam_beta1=1"], "argument --adam_beta1: 1.0 is not in [0, 1)"),
    (["--adam_beta2=1"], "argument --adam_beta2: "),
    (["--adam_weight_decay=-1"], "argument --adam_weight_decay: "),
    (["--guidance_scale=-1"], "argument --guidance_scale: "),
    (["--lora_dropout=1"], "argument --lora_dropout: "),
    ([*NAMED, "--lr_warmup_steps=6", "--max_train_steps=5"], "--lr_warmup_steps 6: more than --max_train_steps"),
    (["--resolution=63"], "--resolution 63: must be a multiple of 8; try 64"),
    (["--loss_type=dpo"], "--loss_type: invalid choice: 'dpo'"),
    (["--optimizer=lion"], "--optimizer: invalid choice: 'lion'"),
    (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
    (
        ["--with_prior_preservation", "--refresh_rejected_steps=5"],
        "--refresh_rejected_steps and --with_prior_preservation exclude each other",
    ),
    (["--loss_type=dco", "--refresh_rejected_steps=5"], "--refresh_rejected_steps needs --loss_type mapo too"),
    (["--loss_type=dco", f"--rejected_data_dir={SUBJECT}"], "--rejected_data_dir needs --loss_type mapo too"),
    (["--use_dora", "--output_kohya_format"], "--use_dora and --output_kohya_format exclude each other"),
    (["--hub_token=x", "--report_to=wandb"], "--hub_token and --report_to wandb exclude each other"),
    (["--hub_model_id=x"], "--hub_model_id needs --push_to_hub too"),
    (["--pretrained_model_name_or_path=x"], "--pretrained_model_name_or_path needs --instance_data_dir too"),
    (["--instance_data_dir=x"], "--instance_data_dir needs --pretrained_model_name_or_path too"),
    ([*NAMED, "--instance_data_dir=/none"], "--instance_data_dir /none: no such folder"),
    (["--rejected_data_dir=/none"], "--rejected_data_dir /none: no such folder"),
    ([*NAMED, "--placeholder_token=<dog>"], "--placeholder_token needs --initializer_token too"),
    ([*NAMED, "--initializer_token=dog"], "--initializer_token needs --placeholder_token too"),
    (["--report_to=wandb"], "--report_to wandb needs a package: pip install wandb"),
    (["--beta_dco=5"], "--beta_dco needs --loss_type dco too"),
    (["--lr_power=2"], "--lr_power needs --lr_scheduler polynomial too"),
]


@pytest.mark.parametrize(
    "flags,message",
    BAD_FLAGS,
    ids=lambda value: value[0].replace(MODEL, "MODEL") if isinstance(value, list) else "",  # the same in each worker
)
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
    return lambda path: [
        *NAMED,
        "--instance_prompt",
        f"a {token}",
        "--placeholder_token",
        token,
        "--initializer_token",
        word,
    ]


BAD_DATA = {
    "no photo": (empty, "no photo in it (.bmp, .jpeg"),
    "unreadable photo": (lambda p: folder(p, crying__png=b"no image"), "crying.png can't be read: "),
    "cut photo": (
        lambda p: folder(p, crying__png=(SUBJECT / "crying.png").read_bytes()[:500]),
        "crying.png can't be read: ",
    ),
    "missing photo": (
        lambda p: folder(p, crying__png=None),
        "crying.png can't be read: [Errno 2] No such file or directory",
    ),
    "no captions": (
        lambda p: folder(p, metadata__jsonl=None),
        "crying.png has no caption in metadata.jsonl, crying.txt or",
    ),
    "no JSON lines": (
        lambda p: folder(p, metadata__jsonl=b"a cat"),
        "metadata.jsonl, line 1: needs file_name and text",
    ),
    "no text": (
        lambda p: folder(p, metadata__jsonl=b'{"file_name": "crying.png"}'),
        "metadata.jsonl, line 1: needs file_name and text: 'text'",
    ),
    "caption without the token": (
        lambda p: captioned(p, "a dog"),
        "smiling.png's caption, 'a dog', has none of <cat>, cat",
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
        lambda p: [*NAMED, "--placeholder_token", "<a>", "<b>", "--initializer_token", "cat"],
        "--initializer_token: 1 for 2 of --placeholder_token; each token needs one",
    ),
    "same token twice": (
        lambda p: [*NAMED, "--placeholder_token", "<a>", "<a>", "--initializer_token", "cat", "dog"],
        "--placeholder_token <a>: stands twice, or is part of another",
    ),
    "token of two words": (tokens("a cat", "cat"), "'a cat' must be one word"),
    "token exists": (
        tokens("dog", "cat"),
        "--placeholder_token dog: tokenizer has it already; choose a new one, such as <dog-1>",
    ),
    "initializer of several pieces": (
        tokens("<zebra>", "zebra"),
        "--initializer_token zebra: is 2 tokens, zebr a</w>",
    ),
    "too few rejected": (rejected, "0 images smiling-NUMBER for photo smiling, needs 1"),
    "unreadable rejected image": (
        lambda p: rejected(p) + [(p / "smiling-0.png").write_bytes(b"no image") and "--num_rejected_per_image=1"],
        "images of smiling: cannot identify image file",
    ),
    "config of unequal lists": (lambda p: config(p, prompts=["a <cat>"]), "5 images, 1 prompts, 5 base_prompts"),
    "config without images": (lambda p: config(p, images=None) + ["--config_name=x"], "see --config_name"),
    "config without initializer": (
        lambda p: config(p, initializer_tokens=[]),
        "--initializer_token: 0 for 1 of --placeholder_token",
    ),
    "config with an empty initializer": (
        lambda p: config(p, initializer_tokens=[""]),
        "'' must be one word",
    ),
}


@pytest.mark.parametrize("fault", BAD_DATA)
def test_bad_data_ends_in_one_line_before_a_model_is_loaded(fault, train, script, tmp_path, monkeypatch):
    make, message = BAD_DATA[fault]
    monkeypatch.setattr(script, "load_models", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        train(data=make(tmp_path))
    assert message in stop.value.code and "\n" not in stop.value.code
    assert stop.value.code.startswith("train_dreambooth_lora_mapo_sdxl.py: error: ")


def test_a_caption_that_is_too_long_is_said(script, caplog):
    from accelerate import PartialState

    args = script.parse_args([*NAMED, *TOKEN, "--instance_prompt", "a cat " * 20])
    with caplog.at_level("INFO"):
        PartialState()  # which accelerate's logger asks for
        script.check_tokens(script.load_photos(args), args)
    assert "The caption of crying has 40 tokens; only the first 22 count." in caplog.text


def test_photos_in_a_format_that_is_not_read_are_named(script, tmp_path, caplog):
    from accelerate import PartialState

    shutil.copy(SUBJECT / "crying.png", tmp_path / "crying.png")
    for name in ("IMG_1.HEIC", "crying.txt", ".DS_Store", "metadata.jsonl.bak"):
        (tmp_path / name).write_text("a <cat>")
    args = script.parse_args([*NAMED[:1], f"--instance_data_dir={tmp_path}", *TOKEN])
    with caplog.at_level("INFO"):
        PartialState()  # which accelerate's logger asks for
        assert [photo.name for photo in script.load_photos(args)] == ["crying"]
    assert "not read as photos: IMG_1.HEIC, metadata.jsonl.bak" in caplog.text and "DS_Store" not in caplog.text


def test_a_wrong_model_ends_in_one_line(train):
    with pytest.raises(SystemExit) as stop:
        train(data=["--pretrained_model_name_or_path=/none", f"--instance_data_dir={SUBJECT}", *TOKEN])
    assert "error: --pretrained_model_name_or_path /none: " in stop.value.code and "\n" not in stop.value.code


@pytest.mark.parametrize("layers", ["to_nothing", "to_k,to_nothing", "to_k,"])
def test_layers_that_are_not_there_end_in_one_line(layers, train):
    with pytest.raises(SystemExit) as stop:
        train(f"--lora_layers={layers}")
    assert f"--lora_layers {layers}: the UNet has no layer '" in stop.value.code
    assert "\n" not in stop.value.code


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--output_dir=/etc/passwd"], "--output_dir /etc/passwd: [Errno 17] File exists"),
        (["--cache_dir=/proc/nothing"], "--cache_dir /proc/nothing: [Errno 2] No such file or directory"),
    ],
)
def test_what_a_library_says_ends_in_one_line(flags, message, train):
    with pytest.raises(SystemExit) as stop:
        train(*flags)
    assert stop.value.code.startswith("train_dreambooth_lora_mapo_sdxl.py: error: ") and message in stop.value.code
    assert "\n" not in stop.value.code


def test_downloads_keep_their_progress_bar_and_no_call_is_linuxs_own(script, tmp_path, monkeypatch):
    """12.20, 12.12"""
    monkeypatch.delattr(os, "sched_getaffinity")
    from accelerate.state import AcceleratorState
    from huggingface_hub.utils import are_progress_bars_disabled

    AcceleratorState._reset_state(reset_partial_state=True)
    script.prepare_run(script.parse_args([*NAMED, *TOKEN, f"--output_dir={tmp_path}"]))
    assert not are_progress_bars_disabled()


def test_a_finished_run_shorter_than_a_checkpoint_is_not_overwritten(script, runs, capsys):
    """12.23"""
    out = runs(*KINDS["attention"]).out
    with pytest.raises(SystemExit):
        script.parse_args([*NAMED, f"--output_dir={out}"])
    assert "safetensors of an earlier run; go on with --resume_from_checkpoint latest" in capsys.readouterr().err


def test_results_of_an_earlier_run_stay_but_the_demos_without_checkpoints(script, tmp_path, capsys):
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    assert script.parse_args([f"--output_dir={tmp_path}"]).demo
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "state.json").touch()
    for flags in ([], NAMED):
        with pytest.raises(SystemExit):
            script.parse_args([*flags, f"--output_dir={tmp_path}"])
        assert "checkpoint-2/state.json of an earlier run; go on with --resume" in capsys.readouterr().err

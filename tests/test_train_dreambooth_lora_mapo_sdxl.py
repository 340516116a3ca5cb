"""The photos' script: one training step in float64, whole runs on a tiny model, kills, and what it refuses."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import train_dreambooth_lora_mapo_sdxl as script
from accelerate.state import AcceleratorState
from conftest import rows_of
from fork_server import send_signal_at
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from small_model import DEMO, write_three_level_model

from diffusers import DDPMScheduler, StableDiffusionXLPipeline


NAME = "train_dreambooth_lora_mapo_sdxl"
SUBJECT = DEMO / "subject"
CAPTIONS = [row["text"] for row in sorted(rows_of(SUBJECT / "metadata.jsonl"), key=lambda row: row["file_name"])]
BASE_CAPTIONS = [caption.replace("<cat>", "cat") for caption in CAPTIONS]
TOKEN = ["--placeholder_token", "<cat>", "--initializer_token", "cat"]
SAMPLING = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 2.0}
# A run of seconds. The rates are high, so that three steps show.
SHORT = "--resolution=32 --max_train_steps=3 --num_inference_steps=2 --num_rejected_per_image=1 --rank=4 "
SHORT += "--learning_rate=1e-2 --text_encoder_lr=1e-2 --guidance_scale=2 --sample_batch_size=10"
NO_IMAGES = "--skip_final_inference"


class Trainer:
    """Run the script in this process: `trainer.run("--beta_mapo=8")` returns the output folder.

    `pipeline` and `sampled` are the last run's: its pipeline and, for each call of `sample_images`, prompts and images.
    """

    def __init__(self, folder: Path, cache: Path, model: Path) -> None:
        self.folder = folder
        self.flags = [f"--pretrained_model_name_or_path={model}", f"--cache_dir={cache}", *SHORT.split()]
        self.pipeline = None
        self.sampled = []

    def run(self, *flags, output_dir: str = "out", data=(f"--instance_data_dir={SUBJECT}", *TOKEN)) -> Path:
        original = script.sample_images
        self.sampled = []

        def sample_images(pipeline, prompts, *args, **kwargs):
            images = original(pipeline, prompts, *args, **kwargs)
            self.pipeline = pipeline
            self.sampled.append((prompts, [np.array(image).astype(int) for image in images]))
            return images

        AcceleratorState._reset_state(reset_partial_state=True)
        out = self.folder / output_dir
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "sample_images", sample_images)
            script.main(script.parse_args([*data, *self.flags, f"--output_dir={out}", *map(str, flags)]))
        return out


@pytest.fixture
def trainer(tmp_path, hub_cache, small_model) -> Trainer:
    return Trainer(tmp_path, hub_cache, small_model)


def results_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "pytorch_lora_weights.safetensors") | load_file(out / "learned_embeds.safetensors")


def metrics_of(out: Path) -> list[dict]:
    """The records of a run, without how long its steps took."""
    records = rows_of(out / "metrics.jsonl")
    for record in records:
        del record["photos_per_second"]
    return records


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max([(a[name].double() - b[name].double()).abs().max().item() for name in a], default=0)


def load_tokens(pipeline: StableDiffusionXLPipeline, out: Path, tokens: list[str]) -> None:
    embeds = load_file(out / "learned_embeds.safetensors")
    for name, suffix in (("clip_l", ""), ("clip_g", "_2")):
        parts = {part: getattr(pipeline, part + suffix) for part in ("text_encoder", "tokenizer")}
        pipeline.load_textual_inversion(list(embeds[name]), tokens, **parts)


# ---- One step -------------------------------------------------------------------------------------------------------
def load_model(folder: Path, dtype: torch.dtype) -> script.PersonalizedModel:
    """A model with a new token and a LoRA that isn't 0."""
    pipeline = script.load_pipeline(str(folder), dtype=dtype)
    script.add_lora(pipeline.unet, LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_v"]))
    model = script.PersonalizedModel(pipeline, ["<cat>"], ["cat"]).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (0.05 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    return model


@pytest.fixture(scope="module")
def models(small_model) -> tuple:
    """The model, the same in float64, and the starting model in float64."""
    base = script.load_pipeline(str(small_model), dtype=torch.float64)
    return load_model(small_model, torch.float32), load_model(small_model, torch.float64), base


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "loss_type,beta,safeguard,prior",
    [("mapo", 8, None, None), ("mapo", 8, 0.5, 0.7), ("dco", 10, None, None), ("dreambooth", 1, None, 0.7)],
)
def test_loss_and_gradient_are_the_formulas_photo_by_photo_in_float64(
    loss_type, beta, safeguard, prior, prediction_type, models, small_model
):
    model, exact, base = models
    scheduler = DDPMScheduler.from_pretrained(small_model, subfolder="scheduler", prediction_type=prediction_type)
    noise, timesteps = script.sample_noise([7, 8], (4, 8, 12), 1000, 0.0, 0, 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    batch = {
        "captions": ["crying <cat> face", "pouting <cat> face"],
        "base_captions": ["crying cat face", "pouting cat face"],
        "latents_w": torch.randn(2, 4, 8, 12, generator=generator),
        "latents_l": torch.randn(2, 4, 8, 12, generator=generator),
        "time_ids": torch.tensor([[1153, 900, 3, 5, 64, 96], [64, 64, 0, 0, 64, 96]]),
    }

    def residual(pipeline, i, latents, caption):
        signal = scheduler.alphas_cumprod[timesteps[i]].double().sqrt()
        sigma = (1 - scheduler.alphas_cumprod[timesteps[i]].double()).sqrt()
        eps = noise[i].double()
        target = eps if prediction_type == "epsilon" else signal * eps - sigma * latents.double()
        embeds, _, pooled, _ = pipeline.encode_prompt(caption, device="cpu", do_classifier_free_guidance=False)
        conditions = {"text_embeds": pooled, "time_ids": batch["time_ids"][i : i + 1].double()}
        noisy = (signal * latents.double() + sigma * eps)[None]
        return pipeline.unet(noisy, timesteps[i], embeds, added_cond_kwargs=conditions).sample[0] - target

    terms = []
    for i in range(2):
        residual_w = residual(exact.pipeline, i, batch["latents_w"][i], batch["captions"][i])
        mse_w = residual_w.square().mean()
        if loss_type == "mapo":
            residual_l = residual(exact.pipeline, i, batch["latents_l"][i], batch["captions"][i])
            mse_l = residual_l.square().mean()
            if safeguard is not None:
                product = (residual_w * residual_l).sum().item()
                bound = (1 - safeguard) * residual_w.square().sum().item() / product
                factor = min(1.0, bound) if product > 0 else 1.0
                mse_l = factor * mse_l + (1 - factor) * mse_l.detach()
            score_w = (0.5 * mse_w / (torch.exp(0.5 * mse_w) - 1)) ** beta
            score_l = (0.5 * mse_l / (torch.exp(0.5 * mse_l) - 1)) ** beta
            terms.append(mse_w - torch.log(torch.sigmoid(1000 * (score_w - score_l))) / beta)
        elif loss_type == "dco":
            mse_ref = residual(base, i, batch["latents_w"][i], batch["base_captions"][i]).square().mean()
            terms.append(-torch.log(torch.sigmoid(-beta * (mse_w - mse_ref))))
        else:
            terms.append(mse_w)
        if prior is not None:
            of_class = residual(exact.pipeline, i, batch["latents_l"][i], batch["base_captions"][i])
            terms[-1] = terms[-1] + prior * of_class.square().mean()
    expected = torch.stack(terms).mean()
    expected_gradients = torch.autograd.grad(expected, [p for p in exact.parameters() if p.requires_grad])

    result = script.compute_photo_loss(
        model, model.pipeline, batch, scheduler, noise, timesteps, loss_type, beta, 0.5, safeguard, prior
    )
    gradients = torch.autograd.grad(result["loss"], [p for p in model.parameters() if p.requires_grad])
    assert result["loss"].item() == pytest.approx(expected.item(), rel=3e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert (gradient - expected_gradient).norm() < 3e-5 * expected_gradient.norm()


def test_a_batch_has_each_photos_own_rejected_images_and_in_time_all_of_them():
    encoded = script.EncodedPhotos.__new__(script.EncodedPhotos)
    encoded.photos = [script.Photo(f"{i}", f"{i}", "", None, [i] * 6, 0) for i in range(3)]
    encoded.seed = 0
    encoded.latents = [torch.full((1, 1, 1), float(i)) for i in range(3)]
    encoded.rejected_latents = [[torch.full((1, 1, 1), 10.0 * i + j) for j in range(2)] for i in range(3)]
    seen = set()
    for position in range(20):
        batch = encoded.make_batch([(position, 2), (position, 0)])
        assert batch["captions"] == ["2", "0"] and batch["latents_w"].flatten().tolist() == [2, 0]
        assert batch["time_ids"].tolist() == [[2] * 6, [0] * 6]
        seen.update(batch["latents_l"].flatten().tolist())
    assert seen == {20, 21, 0, 1}


@pytest.mark.parametrize("num_photos,batch_size,num_processes", [(5, 3, 2), (5, 1, 2), (1, 4, 3), (7, 2, 3)])
def test_a_step_has_every_photo_once_in_batches_of_one_shape(num_photos, batch_size, num_processes):
    buckets = np.array([i % 2 for i in range(num_photos)])
    per_step = 4 * num_processes
    batches = script.draw_epochs(buckets, batch_size, per_step, seed=0)
    orders = []
    for epoch in range(5):
        step = [next(batches) for _ in range(per_step)]
        draws = sorted(draw for batch in step for draw in batch)
        assert sorted(index for _, index in draws) == list(range(num_photos))
        assert [position for position, _ in draws] == list(range(epoch * num_photos, (epoch + 1) * num_photos))
        assert all(len({buckets[index] for _, index in batch}) <= 1 for batch in step)
        orders.append(tuple(index for _, index in draws))
    assert num_photos == 1 or len(set(orders)) > 1


# ---- Results --------------------------------------------------------------------------------------------------------
def lora_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The LoRA's weights, without the adapter's name."""
    weights = {key: value for key, value in module.state_dict().items() if "lora_" in key}
    return {re.sub(r"(lora_[AB])\.\w+", r"\1", key): value for key, value in weights.items()}


CONVOLUTIONS = "--lora_layers=to_k,to_q,to_v,to_out.0,conv1,conv2,conv_shortcut,proj_in,time_emb_proj"


@pytest.mark.parametrize("flags", [[CONVOLUTIONS, "--lora_alpha=16"], ["--train_text_encoder"]])
def test_the_saved_files_are_the_trained_model(flags, trainer, small_model):
    out = trainer.run(*flags, "--output_kohya_format", "--validation_prompts=weary <cat> face")
    prompts, images = trainer.sampled[-1]
    for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"):
        pipeline = StableDiffusionXLPipeline.from_pretrained(small_model)
        pipeline.load_lora_weights(out, weight_name=name)
        load_tokens(pipeline, out, ["<cat>"])
        for part in ("unet", "text_encoder", "text_encoder_2"):
            trained = lora_of(getattr(trainer.pipeline, part))
            assert bool(trained) == (part == "unet" or "--train_text_encoder" in flags)
            assert all(value.abs().max() > 0 for value in trained.values())
            assert largest_difference(trained, lora_of(getattr(pipeline, part))) == 0
        image = pipeline(prompts[0], generator=torch.Generator().manual_seed(0), **SAMPLING).images[0]
        assert np.abs(np.array(image) - images[0]).max() <= 2
        pipeline.disable_lora()
        plain = pipeline(prompts[0], generator=torch.Generator().manual_seed(0), **SAMPLING).images[0]
        assert np.abs(np.array(plain) - images[0]).max() > 5


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_only_the_lora_and_the_new_rows_train_in_fp32_and_rows_keep_their_norm(precision, trainer, small_model):
    out = trainer.run(f"--mixed_precision={precision}")
    assert {tensor.dtype for tensor in results_of(out).values()} == {torch.float32}
    base = script.load_pipeline(str(small_model), dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        trained = getattr(trainer.pipeline, part).state_dict()
        trained = {re.sub(r"\.(base_layer|table)\.", ".", name): weight for name, weight in trained.items()}
        for name, weight in getattr(base, part).state_dict().items():
            assert torch.equal(trained[name], weight), name
    learned = load_file(out / "learned_embeds.safetensors")
    word = base.tokenizer.convert_tokens_to_ids("cat</w>")
    for encoder, rows in ((base.text_encoder, learned["clip_l"]), (base.text_encoder_2, learned["clip_g"])):
        start = encoder.get_input_embeddings().weight[word].float()
        assert rows.shape == (1, len(start)) and 1e-3 < (rows[0] - start).abs().max() < 0.1
        assert rows.norm().item() == pytest.approx(start.norm().item(), rel=1e-6)


def test_the_pooled_embedding_ends_at_the_new_token_in_training_as_in_a_plain_pipeline(models, small_model, tmp_path):
    trained = models[0].pipeline
    script.save_token_embeddings(models[0].token_embeddings, tmp_path)
    plain = StableDiffusionXLPipeline.from_pretrained(small_model)
    load_tokens(plain, tmp_path, ["<cat>"])

    @torch.no_grad()
    def pooled(pipeline, caption):
        return script.encode_prompts(pipeline, [caption], "cpu")[1]

    for caption in ("crying <cat> face", "crying cat face"):
        assert torch.allclose(pooled(plain, caption), pooled(trained, caption), atol=1e-6)
    assert torch.allclose(pooled(plain, "crying <cat> face"), pooled(plain, "crying <cat>"), atol=1e-5)
    assert not torch.allclose(pooled(plain, "crying cat face"), pooled(plain, "crying cat"), atol=1e-2)


def test_a_run_leaves_its_files_and_a_card_whose_code_loads_them(trainer, small_model, monkeypatch):
    prompt = 'weary <cat>\n```\n"face"'
    out = trainer.run("--validation_prompts", prompt, "a <cat>", "--validation_steps=2", "--report_to=tensorboard")
    expected = "README.md before_after.png chosen_rejected.png curves.png learned_embeds.safetensors logs "
    expected += "metrics.jsonl pytorch_lora_weights.safetensors validation"
    assert sorted(path.name for path in out.iterdir()) == expected.split()
    assert (out / "validation" / "2.png").is_file()
    umask = os.umask(0)
    os.umask(umask)
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~umask for path in out.glob("*.safetensors"))
    assert Image.open(out / "before_after.png").width <= 1200

    card = ModelCard.load(out / "README.md")
    assert card.data.base_model is None and card.data.license is None  # the hub refuses a path
    assert {"lora", "textual_inversion", "mapo"} <= set(card.data.tags)
    code = re.search("```python\n(.*?)```", card.text, re.DOTALL)[1].replace(
        "height=", "num_inference_steps=1, height="
    )
    shutil.copytree(small_model, out.parent / "model")
    monkeypatch.chdir(out.parent)
    names = {}
    exec(code.replace("float16", "float32").replace('"cuda"', '"cpu"'), names)
    assert names["image"].size == (32, 32) and "<cat>" in names["pipeline"].tokenizer.get_vocab()

    records = metrics_of(out)
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        assert record["margin"] == pytest.approx(record["score_w"] - record["score_l"], abs=1e-6)
        assert record["loss"] > record["mse_w"] > 0 and record["grad_norm"] > 0


def test_a_style_has_no_token_and_several_tokens_load_in_their_order(trainer, small_model):
    data = [f"--instance_data_dir={SUBJECT}", "--instance_prompt=cat face"]
    style = trainer.run(data=data, output_dir="style")
    assert not (style / "learned_embeds.safetensors").exists()
    assert "textual" not in (style / "README.md").read_text()

    tokens = ["--placeholder_token", "<cat>", "<mug>", "--initializer_token", "cat", "face"]
    out = trainer.run(NO_IMAGES, data=[*data, *tokens])
    pipeline = StableDiffusionXLPipeline.from_pretrained(small_model)
    load_tokens(pipeline, out, ["<cat>", "<mug>"])
    ids = pipeline.tokenizer_2.convert_tokens_to_ids(["<cat>", "<mug>"])
    rows = load_file(out / "learned_embeds.safetensors")["clip_g"]
    assert torch.equal(pipeline.text_encoder_2.get_input_embeddings().weight[ids], rows)


@pytest.mark.parametrize(
    "flags,metric",
    [
        ("--loss_type=dco", "mse_ref"),
        ("--loss_type=dreambooth --with_prior_preservation", "mse_prior"),
        ("--gradient_checkpointing --noise_offset=0.1 --use_8bit_adam", "mse_l"),
        ("--optimizer=prodigy --learning_rate=1 --text_encoder_lr=1", "mse_l"),
    ],
)
def test_other_ways_to_train_run(flags, metric, trainer):
    records = metrics_of(trainer.run(*flags.split(), NO_IMAGES))
    assert all(record["grad_norm"] > 0 and record[metric] > 0 for record in records)


def test_a_model_with_v_prediction_and_zero_snr_is_trained_and_sampled_as_it_needs(trainer, tmp_path):
    model = write_three_level_model(
        tmp_path / "model", prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="leading"
    )
    out = trainer.run(f"--pretrained_model_name_or_path={model}", NO_IMAGES)
    assert trainer.pipeline.scheduler.config.timestep_spacing == "trailing"
    assert trainer.pipeline.scheduler.config.prediction_type == "v_prediction"
    assert all(record["grad_norm"] > 0 for record in metrics_of(out))


# ---- Batches, processes, resumption ---------------------------------------------------------------------------------
def run_script(flags: list[str], log: Path, environment: dict, signal_at: list | None) -> None:
    """Run the script in this process."""
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    if signal_at is not None:
        send_signal_at(*signal_at)
    script.main(script.parse_args(flags))


def run_processes(trainer: Trainer, out: Path, *flags, signal_at=None, num_processes: int = 1) -> tuple:
    """Run the script in processes of its own, as torchrun starts them. Returns their exit codes and what they print."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([NAME])
    flags = [f"--instance_data_dir={SUBJECT}", *TOKEN, *trainer.flags, f"--output_dir={out}", *flags]
    log = out.with_suffix(".log")
    processes = []
    for rank in range(num_processes):
        environment = {}
        if num_processes > 1:
            environment = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{num_processes}"}
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{29000 + os.getpid() % 1000}"}
            environment["ACCELERATE_USE_CPU"] = "true"
        processes.append(context.Process(target=run_script, args=(flags, log, environment, signal_at)))
        processes[-1].start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes], log.read_text()


SMOOTH = ["--learning_rate=1e-4", "--text_encoder_lr=1e-4", NO_IMAGES]


@pytest.fixture(scope="module")
def in_one_pass(tmp_path_factory, hub_cache, small_model) -> Path:
    """A run in which each step is one forward pass over the five photos."""
    trainer = Trainer(tmp_path_factory.mktemp("pass"), hub_cache, small_model)
    return trainer.run("--train_batch_size=8", *SMOOTH)


def assert_same_training(out: Path, other: Path) -> None:
    for record, expected in zip(metrics_of(out), metrics_of(other), strict=True):
        assert record == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert largest_difference(results_of(out), results_of(other)) < 1e-5


@pytest.mark.parametrize("flags", ["--train_batch_size=2", "--train_batch_size=5 --gradient_accumulation_steps=1"])
def test_a_step_is_the_whole_set_however_many_passes_it_takes(flags, trainer, in_one_pass):
    assert_same_training(trainer.run(*flags.split(), *SMOOTH), in_one_pass)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_two_processes_train_five_photos_as_one_does(batch_size, trainer, in_one_pass, tmp_path):
    """With one photo a pass, one process has three passes and the other has two."""
    out = tmp_path / "two"
    flags = [*SMOOTH, f"--train_batch_size={batch_size}", f"--cache_dir={tmp_path / 'cache'}"]
    codes, printed = run_processes(trainer, out, *flags, num_processes=2)
    assert codes == [0, 0], printed
    assert printed.count("Done in") == 1
    assert len(list((tmp_path / "cache").rglob("*.png"))) == 5
    assert_same_training(out, in_one_pass)


def test_epochs_and_scaled_rates(trainer):
    trainer.flags = [flag for flag in trainer.flags if "max_train_steps" not in flag]
    flags = "--num_train_epochs=2 --train_batch_size=2 --gradient_accumulation_steps=2 --learning_rate=1e-4 --scale_lr"
    records = metrics_of(trainer.run(*flags.split(), NO_IMAGES))
    assert len(records) == 3  # 2 x 5 photos, 4 in a step
    assert records[0]["learning_rate"] == pytest.approx(4e-4)


RESUMABLE = "--max_train_steps=6 --checkpointing_steps=2 --refresh_rejected_steps=3 --lr_scheduler=cosine "
RESUMABLE += "--lora_dropout=0.2 --train_text_encoder --train_batch_size=3 --resume_from_checkpoint=latest"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, hub_cache, small_model) -> Path:
    trainer = Trainer(tmp_path_factory.mktemp("unbroken"), hub_cache, small_model)
    codes, printed = run_processes(trainer, trainer.folder / "out", *RESUMABLE.split())
    assert codes == [0], printed
    return trainer.folder / "out"


def test_after_kills_at_any_moment_a_resumed_run_gives_the_same_bits(trainer, unbroken, tmp_path):
    out = tmp_path / "out"
    flags = [*RESUMABLE.split(), f"--cache_dir={tmp_path / 'cache'}"]
    kills = [
        (f"{NAME}.move_into_place", 3, []),  # while rejected images are cached
        ("accelerate.checkpointing.save", 3, ["tmp-checkpoint-2"]),
        (f"{NAME}.compute_photo_loss", 9, ["checkpoint-2", "checkpoint-4"]),
        (f"{NAME}.move_into_place", 3, ["checkpoint-4", "checkpoint-6", "tmp-embeds.safetensors"]),
    ]
    for function, call, left in kills:
        codes, printed = run_processes(trainer, out, *flags, signal_at=[function, call, signal.SIGKILL])
        assert codes == [-signal.SIGKILL], printed
        assert sorted(path.name for path in [*out.glob("checkpoint-*"), *out.glob("tmp-*")]) == left, function
    codes, printed = run_processes(trainer, out, *flags)
    assert codes == [0], printed
    assert largest_difference(results_of(out), results_of(unbroken)) == 0
    assert metrics_of(out) == metrics_of(unbroken)
    assert (out / "before_after.png").read_bytes() == (unbroken / "before_after.png").read_bytes()


def test_a_signal_ends_the_run_with_a_checkpoint_of_what_is_trained(trainer, tmp_path):
    out = tmp_path / "out"
    signal_at = [f"{NAME}.compute_photo_loss", 6, signal.SIGTERM]
    codes, printed = run_processes(trainer, out, *RESUMABLE.split(), signal_at=signal_at)
    assert codes == [0] and "Traceback" not in printed
    assert f"SIGTERM: {out / 'checkpoint-3'} is written" in printed
    assert not list((out / "checkpoint-3").glob("model*"))


def change_weights(folder: Path, prefix: str = "") -> None:
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    name = next(name for name in sorted(weights) if name.startswith(prefix))
    save_file(weights | {name: weights[name] + 0.1}, file)


def test_only_the_same_run_is_resumed(unbroken, trainer, small_model, tmp_path):
    """The models and the photos may move, but must have the same content."""
    model = shutil.copytree(small_model, tmp_path / "model")
    photos = shutil.copytree(SUBJECT, tmp_path / "photos")
    shutil.copytree(unbroken, tmp_path / "out")
    flags = [*RESUMABLE.split(), f"--pretrained_model_name_or_path={model}", NO_IMAGES]
    data = [f"--instance_data_dir={photos}", *TOKEN]
    trainer.run(*flags, data=data)

    for flag in ("--rank=8", "--seed=1", "--num_inference_steps=3"):
        with pytest.raises(ValueError, match=f"{flag.split('=')[0]} is {flag[-1]}, but .* was trained with"):
            trainer.run(*flags, flag, data=data)
    for part in ("unet", "vae", "text_encoder_2"):
        change_weights(model / part)
        with pytest.raises(ValueError, match="the hash of the base model"):
            trainer.run(*flags, data=data)
        shutil.copytree(small_model / part, model / part, dirs_exist_ok=True)
    Image.new("RGB", (64, 64)).save(photos / "crying.png")
    with pytest.raises(ValueError, match="the hash of the photos and captions"):
        trainer.run(*flags, data=data)


# ---- Rejected images ------------------------------------------------------------------------------------------------
def test_rejected_images_are_those_of_the_plain_model_for_the_base_captions(trainer, small_model, tmp_path):
    trainer.run(NO_IMAGES, f"--cache_dir={tmp_path / 'cache'}", "--max_train_steps=1")
    prompts, images = trainer.sampled[0]
    assert prompts == BASE_CAPTIONS
    pipeline = StableDiffusionXLPipeline.from_pretrained(small_model)
    caption_number = int(script.hashlib.sha256(prompts[3].encode()).hexdigest()[:8], 16)
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence((0, caption_number, 0)).generate_state(1)[0]))
    image = pipeline(prompts[3], generator=generator, **SAMPLING).images[0]
    assert np.abs(np.array(image) - images[3]).max() <= 2


def test_the_cache_of_rejected_images_goes_by_content_and_heals(trainer, small_model, tmp_path):
    model = shutil.copytree(small_model, tmp_path / "model")
    photos = shutil.copytree(SUBJECT, tmp_path / "photos")
    cache = tmp_path / "cache"
    flags = [f"--pretrained_model_name_or_path={model}", f"--cache_dir={cache}", "--max_train_steps=1", NO_IMAGES]
    flags.append("--overwrite_output_dir")

    def generated(*more) -> int:
        """Train, and return how many rejected images are generated for it."""
        trainer.run(*flags, *more, data=[f"--instance_data_dir={photos}", *TOKEN])
        return sum(len(prompts) for prompts, _ in trainer.sampled)

    assert generated() == 5
    pixels = {file: np.array(Image.open(file)).tolist() for file in cache.rglob("*.png")}
    assert len(pixels) == 5
    Image.new("RGB", (64, 64)).save(photos / "crying.png")  # only its caption counts
    assert generated() == 0
    first, second, *_ = pixels
    first.unlink()
    second.write_bytes(second.read_bytes()[:100])
    assert generated() == 2
    assert {file: np.array(Image.open(file)).tolist() for file in cache.rglob("*.png")} == pixels
    assert generated("--num_rejected_per_image=2") == 5
    metadata = photos / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("crying <cat>", "sad <cat>"))
    assert generated() == 1
    for setting in ("--num_inference_steps=1", "--guidance_scale=1", "--seed=1", "--mixed_precision=bf16"):
        assert generated(setting) == 5

    changes = {"vae/config.json": {"act_fn": "gelu"}, "unet/config.json": {"norm_eps": 1e-3}}
    changes["scheduler/scheduler_config.json"] = {"beta_end": 0.013}
    for name, change in changes.items():
        config = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(config | change))
        assert generated() == 5, name
    change_weights(model / "vae", "decoder.conv_out")
    assert generated() == 5


def test_refreshed_images_are_those_of_the_model_in_training(trainer, tmp_path):
    trainer.run("--refresh_rejected_steps=2", NO_IMAGES, f"--cache_dir={tmp_path / 'cache'}")
    (base_captions, before), (captions, after) = trainer.sampled
    assert (base_captions, captions) == (BASE_CAPTIONS, CAPTIONS)
    assert all(np.abs(image - other).max() > 5 for image, other in zip(before, after))


def test_your_own_rejected_images_are_taken_and_resumption_compares_them(trainer, tmp_path):
    for photo in SUBJECT.glob("*.png"):
        for i in (9, 10):
            Image.new("RGB", (80, 70), "green").save(tmp_path / f"{photo.stem}-{i}.png")
    flags = [f"--rejected_data_dir={tmp_path}", "--num_rejected_per_image=2", "--checkpointing_steps=1", NO_IMAGES]
    out = trainer.run(*flags)
    assert trainer.sampled == []
    picture = np.array(Image.open(out / "chosen_rejected.png"))
    assert (picture == (0, 128, 0)).all(axis=-1).sum() > 10 * 100 * 100
    Image.new("RGB", (80, 70), "red").save(tmp_path / "crying-9.png")
    with pytest.raises(ValueError, match="the hash of your own rejected images"):
        trainer.run(*flags, "--resume_from_checkpoint=latest")
    (tmp_path / "crying-9.png").unlink()
    with pytest.raises(ValueError, match="has 1 images crying-NUMBER"):
        trainer.run(*flags, output_dir="other")


# ---- Photos and captions --------------------------------------------------------------------------------------------
def load_photos(folder: Path, prompt: str | None = None) -> list:
    return script.load_photos(*script.list_photos(folder, prompt), None, ["<cat>"], ["cat"], [(32, 32)])


def test_every_form_of_captions_gives_the_same_photos(tmp_path):
    folder = shutil.copytree(SUBJECT, tmp_path / "photos")
    rows = rows_of(folder / "metadata.jsonl")
    expected = load_photos(folder)
    assert [photo.caption for photo in expected] == CAPTIONS
    assert [photo.base_caption for photo in expected] == BASE_CAPTIONS
    (folder / "metadata.jsonl").unlink()
    for row in rows:
        suffix = ".txt" if "crying" in row["text"] else ".caption"
        (folder / row["file_name"]).with_suffix(suffix).write_text(row["text"].replace("<cat>", "cat") + "\n")
    for photo, other in zip(load_photos(folder), expected, strict=True):
        assert photo._replace(pixels=None) == other._replace(pixels=None) and torch.equal(photo.pixels, other.pixels)
    assert {photo.base_caption for photo in load_photos(folder, "a <cat>")} == {"a cat"}


def test_dcos_json_names_photos_captions_and_tokens(trainer, tmp_path):
    folder = shutil.copytree(SUBJECT, tmp_path / "photos")
    config = {"images": ["crying.png", "pouting.png"], "prompts": ["a <cat>", "sad <cat>"]}
    config |= {"base_prompts": ["a kitten", "cat"], "inserting_tokens": ["<cat>"], "initializer_tokens": ["cat"]}
    (folder / "config.json").write_text(json.dumps({"dog": {}, "cat": config}))
    data = [f"--instance_data_dir={folder / 'config.json'}", "--config_name=cat"]
    trainer.run("--max_train_steps=1", f"--cache_dir={tmp_path / 'cache'}", data=data)
    assert trainer.sampled[0][0] == ["a kitten", "cat"]
    assert trainer.sampled[-1][0][-2:] == ["a <cat>", "sad <cat>"]
    assert trainer.sampled[-1][0][:-2] == [context.format("<cat>") for context in script.CONTEXTS]


def test_captions_of_all_kinds_of_files(tmp_path):
    folder = shutil.copytree(SUBJECT, tmp_path / "photos")
    metadata = folder / "metadata.jsonl"
    rows = rows_of(metadata)
    rows[0]["text"] = "a <cat>,\u2028on a sofa\x85"
    metadata.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    captions = {photo.name: photo.caption for photo in load_photos(folder)}
    assert captions["smiling"] == "a <cat>,\u2028on a sofa" and captions["crying"] == "crying <cat> face"
    metadata.write_text(metadata.read_text().replace("crying <cat>", "\\ud83d <cat>"))
    with pytest.raises(ValueError, match="crying.png: its caption"):
        load_photos(folder)

    metadata.unlink()
    for file in folder.glob("*.png"):
        file.with_suffix(".txt").write_text("a <cat>", encoding="utf-16")
    assert {photo.caption for photo in load_photos(folder)} == {"a <cat>"}
    (folder / "crying.txt").write_text("a <cat> in a café", encoding="cp1252")
    with pytest.raises(ValueError, match="crying.txt: isn't UTF-8"):
        load_photos(folder)


def test_a_caption_and_its_base_are_made_of_each_other():
    tokens = (["<cat>", "<hat>"], ["cat", "hat"])
    both = ("a <cat> in a <hat>, catwalk", "a cat in a hat, catwalk")
    assert script.derive_captions(both[0], *tokens) == both
    assert script.derive_captions(both[1], *tokens) == both
    assert script.derive_captions("A Cat.", *tokens) == ("A <cat>.", "A Cat.")
    assert script.derive_captions("puppy, dog", ["<dog>", "<x>"], ["puppy", "dog"])[0] == "<dog>, <x>"
    assert script.derive_captions("a cat", [], []) == ("a cat", "a cat")


def test_what_is_no_photo_is_named_and_long_captions_are_warned_of(trainer, tmp_path, caplog):
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(SUBJECT / "crying.png", folder / "crying.JPG")
    for name in ("IMG_1.HEIC", "crying.txt", ".DS_Store", "notes.md"):
        (folder / name).write_text("a <cat> " * 20)
    (folder / ".ipynb_checkpoints").mkdir()
    with caplog.at_level("INFO"):
        trainer.run("--max_train_steps=1", NO_IMAGES, data=[f"--instance_data_dir={folder}", *TOKEN])
    assert "2 files aren't images that can be read: IMG_1.HEIC, notes.md" in caplog.text
    assert "1 of 1 captions have more than 22 tokens" in caplog.text
    assert "Generating 1 rejected images." in caplog.text


@pytest.mark.parametrize("flags", ["", "--train_batch_size=1 --gradient_accumulation_steps=2"])
def test_photos_of_several_shapes_train_in_buckets(flags, trainer, tmp_path, caplog):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in {"tall": (40, 80), "wide": (90, 45), "square": (50, 52), "panorama": (200, 50)}.items():
        Image.effect_noise(size, 50).save(folder / f"{name}.png")
    buckets = ["--use_aspect_ratio_buckets", "--aspect_ratio_buckets=32,32;64,32;32,64", "--instance_prompt=a <cat>"]
    data = [f"--instance_data_dir={folder}", *TOKEN, f"--cache_dir={tmp_path / 'cache'}"]
    trainer.flags = [flag for flag in trainer.flags if "cache_dir" not in flag]
    with caplog.at_level("INFO"):
        out = trainer.run(*buckets, *flags.split(), data=data)
    assert [image.shape[:2] for image in trainer.sampled[0][1]] == [(32, 64), (32, 32), (64, 32), (32, 64)]
    assert "Bucket 32 x 64: 2 photos" in caplog.text and "Cropping removes 13" in caplog.text
    assert all(record["grad_norm"] > 0 for record in metrics_of(out))


# ---- Refusals -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags,message",
    [
        ("--instance_data_dir=x", "pass both --pretrained_model_name_or_path and --instance_data_dir"),
        ("--pretrained_model_name_or_path=x --instance_data_dir=x --placeholder_token=<a>", "pass both --placeholder"),
        ("--resolution=63", "--resolution 63: must be a multiple of 8"),
        ("--loss_type=dco --refresh_rejected_steps=5", "--loss_type dco has no rejected images"),
        ("--with_prior_preservation --refresh_rejected_steps=5", "would turn the images"),
        ("--num_rejected_per_image=0", "--num_rejected_per_image 0: must be at least 1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(flags.split())
    assert message in capsys.readouterr().err


BAD_TOKENS = {
    "isn't new": (["dog"], ["cat"], "the model has it already"),
    "two tokens": (["<zebra>"], ["zebra"], r"is 2 tokens \(zebr a</w>\)"),
    "two words": (["<a>"], ["a cat"], "must be a single word"),
    "too few": (["<a>", "<b>"], ["cat"], "1 for 2 new tokens"),
    "part of another": (["<a>", "<a>-2"], ["cat", "dog"], "part of another"),
    "not in a caption": (["<mug>"], ["mug"], "has none of the words <mug>, mug"),
}


@pytest.mark.parametrize("fault", BAD_TOKENS)
def test_wrong_tokens_are_refused_before_weights_are_loaded(fault, trainer, monkeypatch):
    tokens, initializers, message = BAD_TOKENS[fault]
    monkeypatch.setattr(script, "load_pipeline", lambda *args, **kwargs: pytest.fail("weights are loaded"))
    data = [f"--instance_data_dir={SUBJECT}", "--placeholder_token", *tokens, "--initializer_token", *initializers]
    if fault in ("isn't new", "two tokens"):
        data.append(f"--instance_prompt=a {tokens[0]}")
    with pytest.raises(ValueError, match=message):
        trainer.run(data=data)


def test_wrong_photos_are_refused_by_name(tmp_path):
    folder = shutil.copytree(SUBJECT, tmp_path / "photos")
    good = (folder / "crying.png").read_bytes()
    (folder / "crying.png").write_bytes(good[:500])
    with pytest.raises(ValueError, match="crying.png: can't be read"):
        load_photos(folder)
    (folder / "crying.png").write_bytes(good)
    (folder / "crying.jpg").write_bytes(good)
    with pytest.raises(ValueError, match="crying.jpg: has no caption"):
        load_photos(folder)
    with pytest.raises(ValueError, match="another photo is named crying"):
        load_photos(folder, "a <cat>")
    (folder / "metadata.jsonl").write_text('{"file_name": "crying.png"}')
    with pytest.raises(ValueError, match="metadata.jsonl, line 1: needs file_name and text"):
        load_photos(folder)
    config = tmp_path / "config.json"
    for text, message in (
        ('{"images": ["a.png"], "prompts": []}', "has 1 images, but 0 prompts"),
        ('{"a": {}, "b": {}}', "--config_name: a, b"),
        ("a cat", "isn't JSON"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            script.read_dco_config(config, None)


def test_another_kind_of_model_is_refused_before_weights_are_loaded(trainer, small_model, tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusionXLPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("is loaded"))
    model = shutil.copytree(small_model, tmp_path / "model")
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"))
    with pytest.raises(ValueError, match="has a FlowMatchEulerDiscreteScheduler"):
        trainer.run(f"--pretrained_model_name_or_path={model}")
    save_file({"a": torch.zeros(1)}, tmp_path / "refiner.safetensors")
    file = f"--pretrained_model_name_or_path={tmp_path / 'refiner.safetensors'}"
    with pytest.raises(ValueError, match="isn't an SDXL base model"):
        trainer.run(file, f"--single_file_config={small_model}")


# ---- The demo -------------------------------------------------------------------------------------------------------
def test_the_demo_trains_and_says_how_to_see_what_has_changed(launch, tmp_path):
    done = launch(f"{NAME}.py", "--max_train_steps=1", "--num_inference_steps=1", "--num_rejected_per_image=1")
    lines = done.stdout.splitlines()
    assert "No model and no photos are named" in lines[0]
    assert lines[-1] == "What has changed? python demo/report.py mapo-demo-subject"
    assert (tmp_path / "mapo-demo-subject" / "learned_embeds.safetensors").is_file()
    for noise in ("Warning", "xformers", "bitsandbytes", "deprecat", "torchvision", "Traceback"):
        assert noise not in (done.stdout + done.stderr).replace("To avoid this warning pass in values", "")

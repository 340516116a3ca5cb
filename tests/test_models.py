"""Models and LoRA files as users have them: one file or a folder, epsilon or v-prediction, from any trainer."""

import json
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file, save_file
from small_model import write_three_level_model


sys.path.insert(0, str(REPO / "inference"))
MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")
FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"
SECOND_ENCODER = "conditioner.embedders.1.model.ln_final.weight"


def export(model: Path, output: Path, *flags: str) -> Path:
    import export_single_file

    command = [f"--pretrained_model_name_or_path={model}", f"--output={output}", *flags]
    export_single_file.main(export_single_file.parse_args(command))
    return output


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_three_level_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def single_file(model) -> Path:
    return export(model, model.parent / "model.safetensors", "--dtype=fp32")


def assert_equal_weights(pipeline, other, names=MODELS, dtype=torch.float32) -> None:
    for name in names:
        weights = getattr(pipeline, name).state_dict()
        expected = getattr(other, name).state_dict()
        assert weights.keys() == expected.keys()
        for key in expected:
            assert torch.equal(weights[key], expected[key].to(dtype).float()), f"{name}.{key}"


def copy_configs(model: Path, folder: Path) -> Path:
    """A model without its weights: loading it fails."""
    return shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))


def change_config(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---- One file as the base -------------------------------------------------------------------------------------------
def test_a_single_file_gives_every_tensor_config_and_token_of_the_folder(model, single_file):
    from train_diffusion_mapo_sdxl import hash_pipeline, load_pipeline

    from_folder = load_pipeline(str(model))
    from_file = load_pipeline(str(single_file), single_file_config=str(model))
    assert_equal_weights(from_file, from_folder)
    assert hash_pipeline(from_file) == hash_pipeline(from_folder)
    assert from_file.tokenizer_2("a red car")["input_ids"] == from_folder.tokenizer_2("a red car")["input_ids"]
    assert from_file.scheduler.config == from_folder.scheduler.config


def test_everything_but_the_vae_is_loaded_in_the_wanted_precision(model, single_file):
    from train_diffusion_mapo_sdxl import load_pipeline

    for path in (model, single_file):
        pipeline = load_pipeline(str(path), dtype=torch.bfloat16, single_file_config=str(model))
        assert pipeline.vae.dtype == torch.float32
        assert [getattr(pipeline, name).dtype for name in MODELS if name != "vae"] == [torch.bfloat16] * 3


def test_a_folder_with_the_names_of_older_transformers_loads_the_same_weights(model, tmp_path):
    """All published SDXL folders have `text_model.` in the first encoder's names."""
    from train_diffusion_mapo_sdxl import load_pipeline

    older = shutil.copytree(model, tmp_path / "older")
    file = older / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    assert_equal_weights(load_pipeline(str(older)), load_pipeline(str(model)))


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_vae_may_come_from_a_file_of_its_own(model, single_file, tmp_path, prefix):
    from train_diffusion_mapo_sdxl import load_pipeline

    vae = {}
    for name, value in load_file(single_file).items():
        if name.startswith("first_stage_model."):
            vae[prefix + name.removeprefix("first_stage_model.")] = value + 1
    save_file(vae, tmp_path / "vae.safetensors")
    expected = load_pipeline(str(model))
    for parameter in expected.vae.parameters():
        parameter += 1
    for path in (single_file, model):
        vae_file = str(tmp_path / "vae.safetensors")
        pipeline = load_pipeline(str(path), vae=vae_file, single_file_config=str(model))
        assert_equal_weights(pipeline, expected)


@pytest.mark.parametrize(
    "weights",
    [
        {FIRST_LAYER: torch.zeros(8, 4, 3, 3), "conditioner.embedders.0.model.ln_final.weight": torch.zeros(8)},
        {FIRST_LAYER: torch.zeros(8, 4, 3, 3), "cond_stage_model.transformer.text_model.x": torch.zeros(8)},
        {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.zeros(4, 8)},
        {FIRST_LAYER: torch.zeros(8, 9, 3, 3), SECOND_ENCODER: torch.zeros(8), "first_stage_model.x": torch.zeros(1)},
        {FIRST_LAYER: torch.zeros(8, 4, 3, 3), SECOND_ENCODER: torch.zeros(8)},
        {FIRST_LAYER: torch.zeros(8, 4, 3, 3), SECOND_ENCODER: torch.zeros(8), "edm_mean": torch.zeros(4)},
        {FIRST_LAYER: torch.zeros(8, 4, 3, 3), SECOND_ENCODER: torch.zeros(8), "edm_vpred.sigma_max": torch.ones(1)},
    ],
    ids=["refiner", "sd15", "lora", "inpainting", "no_vae", "playground", "cosxl"],
)
def test_another_kind_of_file_is_refused_by_its_names(tmp_path, weights):
    from train_diffusion_mapo_sdxl import load_pipeline

    file = tmp_path / "other.safetensors"
    save_file(weights, file)
    with pytest.raises(ValueError, match="other.safetensors"):
        load_pipeline(str(file), single_file_config=str(tmp_path / "is_read_later"))


def test_files_that_can_hold_code_and_half_a_download_are_refused(model, single_file, tmp_path):
    from train_diffusion_mapo_sdxl import load_pipeline

    pickled = tmp_path / "model.ckpt"
    torch.save({"state_dict": load_file(single_file)}, pickled)
    with pytest.raises(ValueError, match="model.ckpt: convert it to .safetensors"):
        load_pipeline(str(pickled), single_file_config=str(model))
    with pytest.raises(ValueError, match="model.ckpt: convert it to .safetensors"):
        load_pipeline(str(model), vae=str(pickled))
    half = tmp_path / "half.safetensors"
    half.write_bytes(single_file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="half.safetensors"):
        load_pipeline(str(half), single_file_config=str(model))
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        load_pipeline("models/nothing.safetensors", single_file_config=str(model))


def test_offline_without_configs_the_error_names_the_flag(single_file, tmp_path):
    from train_diffusion_mapo_sdxl import load_pipeline

    with pytest.raises(FileNotFoundError, match="--single_file_config stabilityai/.*name a folder"):
        load_pipeline(str(single_file), cache_dir=str(tmp_path))


def test_offline_configs_and_models_come_from_the_hubs_cache(model, single_file, tmp_path):
    from train_diffusion_mapo_sdxl import load_pipeline

    expected = load_pipeline(str(model))
    repository = tmp_path / "models--stabilityai--stable-diffusion-xl-base-1.0"
    snapshot = copy_configs(model, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert_equal_weights(load_pipeline(str(single_file), cache_dir=str(tmp_path)), expected)
    shutil.copytree(model, snapshot, dirs_exist_ok=True)
    name = "stabilityai/stable-diffusion-xl-base-1.0"
    assert_equal_weights(load_pipeline(name, cache_dir=str(tmp_path)), expected)


@pytest.mark.parametrize(
    "missing",
    [
        "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.attn1.to_q.weight",
        "first_stage_model.decoder.up.2.upsample.conv.weight",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
        "conditioner.embedders.1.model.text_projection",
    ],
)
def test_a_file_without_one_of_the_tensors_is_refused(model, single_file, tmp_path, missing):
    from train_diffusion_mapo_sdxl import load_pipeline

    weights = load_file(single_file)
    del weights[missing]
    save_file(weights, tmp_path / "incomplete.safetensors")
    with pytest.raises(ValueError, match="incomplete.safetensors.*may be incomplete"):
        load_pipeline(str(tmp_path / "incomplete.safetensors"), single_file_config=str(model))


def test_a_run_from_a_single_file_ends_with_an_ordinary_folder(model, single_file, train):
    from train_diffusion_mapo_sdxl import load_pipeline

    from diffusers import StableDiffusionXLPipeline

    out = train(
        f"--pretrained_model_name_or_path={single_file}",
        f"--single_file_config={model}",
        "--max_train_steps=2",
        "--train_batch_size=2",
        "--learning_rate=1e-3",
    )
    trained = StableDiffusionXLPipeline.from_pretrained(out)
    base = load_pipeline(str(model))
    assert_equal_weights(trained, base, names=("vae", "text_encoder", "text_encoder_2"))
    weights = trained.unet.state_dict()
    changed = [name for name, value in base.unet.state_dict().items() if not torch.equal(value, weights[name])]
    assert len(changed) == len(weights)
    images = trained("a cat", num_inference_steps=2, height=64, width=64, output_type="np").images
    assert images.shape == (1, 64, 64, 3)


# ---- v-prediction and zero terminal SNR -----------------------------------------------------------------------------
V_PREDICTION = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@pytest.fixture(scope="module")
def v_model(tmp_path_factory) -> Path:
    return write_three_level_model(tmp_path_factory.mktemp("models") / "v_model", **V_PREDICTION)


def test_a_file_says_by_its_keys_what_the_model_predicts(model, v_model, tmp_path):
    from train_diffusion_mapo_sdxl import load_pipeline

    file = export(v_model, tmp_path / "v.safetensors")
    assert {"v_pred", "ztsnr"} <= load_file(file).keys()
    scheduler = load_pipeline(str(file), single_file_config=str(model)).scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.rescale_betas_zero_snr
    assert scheduler.config.timestep_spacing == "trailing"
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[0] == 999


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_flags_override_what_the_model_says(model, v_model, single_file, tmp_path, kind):
    from train_diffusion_mapo_sdxl import load_pipeline

    says_epsilon = single_file if kind == "file" else model
    says_v = export(v_model, tmp_path / "v.safetensors") if kind == "file" else v_model
    options = {"single_file_config": str(model)}
    scheduler = load_pipeline(str(says_v), prediction_type="epsilon", **options).scheduler
    assert scheduler.config.prediction_type == "epsilon"
    scheduler = load_pipeline(str(says_epsilon), **V_PREDICTION, **options).scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.alphas_cumprod[-1] < 1e-7
    unchanged = load_pipeline(str(says_epsilon), **options).scheduler
    assert unchanged.config.prediction_type == "epsilon"
    assert unchanged.alphas_cumprod[-1] > 1e-3


def test_at_zero_snr_the_input_is_the_noise_and_the_target_minus_the_image(v_model):
    from train_diffusion_mapo_sdxl import compute_loss, load_pipeline

    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(load_pipeline(str(v_model)).scheduler.config)
    torch.manual_seed(0)
    batch = {
        "latents_w": torch.randn(2, 4, 8, 8),
        "latents_l": torch.randn(2, 4, 8, 8),
        "prompt_embeds": torch.randn(2, 24, 40),
        "pooled_prompt_embeds": torch.randn(2, 24),
        "time_ids": torch.zeros(2, 6),
    }
    noise = torch.randn(2, 4, 8, 8)

    class Prediction:
        sample = -torch.cat([batch["latents_w"], batch["latents_l"]])

    def unet(noisy_latents, timesteps, *conditions, **added):
        assert torch.equal(noisy_latents, torch.cat([noise, noise]))
        return Prediction

    result = compute_loss(unet, batch, scheduler, noise, torch.tensor([999, 999]), beta=8.0)
    assert result.mse_w.tolist() == [0, 0]
    assert result.mse_l.tolist() == [0, 0]


def test_a_saved_model_keeps_its_schedulers_settings(v_model, train):
    from diffusers import StableDiffusionXLPipeline

    flags = [f"--pretrained_model_name_or_path={v_model}", "--max_train_steps=1", "--train_batch_size=2"]
    saved = StableDiffusionXLPipeline.from_pretrained(train(*flags)).scheduler.config
    expected = json.loads((v_model / "scheduler" / "scheduler_config.json").read_text())
    assert expected["timestep_spacing"] == "leading"
    for name, value in expected.items():
        if not name.startswith("_"):
            assert saved[name] == value, name


@pytest.mark.parametrize("zero_snr", [False, True])
def test_previews_are_sampled_as_the_model_needs_it(model, v_model, tmp_path, zero_snr):
    import train_diffusion_mapo_sdxl as script
    from accelerate.state import AcceleratorState

    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    path = v_model if zero_snr else model
    command = [f"--pretrained_model_name_or_path={path}", f"--dataset_name={tmp_path}", f"--output_dir={tmp_path}"]
    args = script.parse_args([*command, "--resolution=64", "--num_inference_steps=4", "--guidance_scale=5"])
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = script.make_accelerator(args)
    pipeline = script.load_pipeline(str(path))
    with torch.no_grad():
        prompts = [script.encode_prompts(pipeline, [prompt], accelerator.device) for prompt in ("a cat", "")]
    prompt_embeds = torch.cat([embeds for embeds, _ in prompts])
    pooled_prompt_embeds = torch.cat([pooled for _, pooled in prompts])
    image = script.generate_images(pipeline, pipeline.unet, prompt_embeds, pooled_prompt_embeds, args, accelerator)[0]

    reference = StableDiffusionXLPipeline.from_pretrained(path)
    if zero_snr:
        config = dict(reference.scheduler.config) | {"timestep_spacing": "trailing"}
        reference.scheduler = EulerDiscreteScheduler.from_config(config)
    expected = reference(
        prompt_embeds=prompt_embeds[:1],
        pooled_prompt_embeds=pooled_prompt_embeds[:1],
        negative_prompt_embeds=prompt_embeds[1:],
        negative_pooled_prompt_embeds=pooled_prompt_embeds[1:],
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=5.0,
        guidance_rescale=0.7 if zero_snr else 0.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert image.tobytes() == expected.tobytes()


# ---- What would be trained wrongly is refused before any weights are loaded -----------------------------------------
@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"_class_name": "EDMEulerScheduler"},
        {"_class_name": "EDMDPMSolverMultistepScheduler"},
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
        {"prediction_type": "sample"},
    ],
    ids=["flow_matching", "edm_euler", "edm_dpm", "flow_sigmas", "sample"],
)
def test_another_noise_schedule_is_refused(model, tmp_path, changes):
    from train_diffusion_mapo_sdxl import load_pipeline

    other = copy_configs(model, tmp_path / "other")
    change_config(other / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(ValueError, match="other: "):
        load_pipeline(str(other))


@pytest.mark.parametrize("kind", ["vae", "vae_of_its_own", "inpainting", "refiner"])
def test_another_architecture_is_refused(model, tmp_path, kind):
    from train_diffusion_mapo_sdxl import load_pipeline

    other = copy_configs(model, tmp_path / "other")
    vae = None
    if kind.startswith("vae"):
        change_config(other / "vae" / "config.json", latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    if kind == "vae_of_its_own":
        vae = str(shutil.move(other / "vae", tmp_path / "other_vae"))
        shutil.copytree(model / "vae", other / "vae")
    if kind == "inpainting":
        change_config(other / "unet" / "config.json", in_channels=9)
    if kind == "refiner":
        change_config(other / "model_index.json", text_encoder=[None, None])
    with pytest.raises(ValueError, match="other_vae: " if vae else "other: "):
        load_pipeline(str(other), vae=vae)


def test_a_folder_with_fp16_files_only_asks_for_the_variant(model, tmp_path):
    from train_diffusion_mapo_sdxl import load_pipeline

    expected = load_pipeline(str(model))
    folder = shutil.copytree(model, tmp_path / "model")
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_name(file.stem + ".fp16.safetensors"))
    with pytest.raises(ValueError, match="--variant fp16"):
        load_pipeline(str(folder))
    assert_equal_weights(load_pipeline(str(folder), variant="fp16"), expected)


# ---- LoRA files -----------------------------------------------------------------------------------------------------
TEXT_ENCODER_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LAYERS = {
    "attention_and_text_encoders": ATTENTION,
    "convolutions": ["to_q", "conv1", "conv_shortcut", "upsamplers.0.conv"],
    "feed_forward": ["ff.net.0.proj", "ff.net.2", "proj_in", "time_emb_proj"],
}


def make_lora(model: Path, layers: list[str], with_text_encoders: bool = False):
    """A pipeline with a random LoRA of rank 4 and alpha 2, and its models that have one."""
    from peft import LoraConfig
    from train_diffusion_mapo_sdxl import add_lora, load_pipeline

    pipeline = load_pipeline(str(model))
    models = {"unet": pipeline.unet}
    add_lora(pipeline.unet, LoraConfig(r=4, lora_alpha=2.0, target_modules=layers))
    if with_text_encoders:
        for name in ("text_encoder", "text_encoder_2"):
            models[name] = getattr(pipeline, name)
            add_lora(models[name], LoraConfig(r=4, lora_alpha=2.0, target_modules=TEXT_ENCODER_LAYERS))
    torch.manual_seed(1)
    for module in models.values():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.data = 0.2 * torch.randn_like(parameter)
    return pipeline, models


def with_original_names(lora_file: Path, model: Path, output: Path) -> Path:
    """A LoRA file by kohya's scripts, which name the UNet's layers as Stability AI does."""
    from export_single_file import convert_unet
    from train_diffusion_mapo_sdxl import load_pipeline

    unet = load_pipeline(str(model)).unet
    renamed = {}
    for name, original in zip(unet.state_dict(), convert_unet(unet)):
        name = name.rpartition(".")[0].replace(".", "_")
        original = original.removeprefix("model.diffusion_model.").rpartition(".")[0].replace(".", "_")
        renamed[f"lora_unet_{name}"] = f"lora_unet_{original}"
    weights = {}
    for key, value in load_file(lora_file).items():
        layer, dot, part = key.partition(".")
        weights[renamed.get(layer, layer) + dot + part] = value
    save_file(weights, output)
    return output


@torch.no_grad()
def outputs(pipeline) -> torch.Tensor:
    """What the text encoders and the UNet return for one prompt and noise."""
    torch.manual_seed(2)
    latents = torch.randn(1, 4, 8, 8, dtype=pipeline.unet.dtype)
    prompt_embeds, _, pooled, _ = pipeline.encode_prompt("a red car", device="cpu", do_classifier_free_guidance=False)
    conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    sample = pipeline.unet(latents, torch.tensor([500]), prompt_embeds, added_cond_kwargs=conditions).sample
    return torch.cat([sample.flatten(), prompt_embeds.flatten(), pooled.flatten()])


@pytest.mark.parametrize("layers", LAYERS)
def test_every_saved_lora_equals_the_adapter_and_can_be_continued(model, tmp_path, layers):
    from train_diffusion_mapo_sdxl import load_lora, load_pipeline, save_lora

    from diffusers import StableDiffusionXLPipeline

    trained, models = make_lora(model, LAYERS[layers], with_text_encoders=layers == "attention_and_text_encoders")
    expected = outputs(trained)
    save_lora(trained, models, tmp_path, True)
    kohya = tmp_path / "pytorch_lora_weights_kohya.safetensors"
    original_names = with_original_names(kohya, model, tmp_path / "by_kohya.safetensors")
    assert not torch.equal(expected, outputs(load_pipeline(str(model))))

    for file in (tmp_path / "pytorch_lora_weights.safetensors", kohya, original_names):
        plain = StableDiffusionXLPipeline.from_pretrained(model)
        plain.load_lora_weights(str(file))
        assert torch.equal(outputs(plain), expected), file.name

        continued = load_pipeline(str(model))
        load_lora(continued, str(file))
        assert torch.equal(outputs(continued), expected), file.name
        trainable = {name for name, value in continued.unet.named_parameters() if value.requires_grad}
        lora = {name for name, _ in trained.unet.named_parameters() if "lora_" in name}
        assert trainable == lora, file.name


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"])
def test_a_lora_is_loaded_in_fp32_into_a_model_in_bf16(model, tmp_path, name):
    """peft rounded it to bf16, and what an earlier run had learned was partly lost."""
    from train_diffusion_mapo_sdxl import load_lora, load_pipeline, save_lora

    trained, models = make_lora(model, ATTENTION)
    save_lora(trained, models, tmp_path, True)
    continued = load_pipeline(str(model), dtype=torch.bfloat16)
    load_lora(continued, str(tmp_path / name))
    expected = dict(trained.unet.named_parameters())
    loaded = {key: value for key, value in continued.unet.named_parameters() if value.requires_grad}
    assert len(loaded) > 0
    for key, value in loaded.items():
        assert torch.equal(value, expected[key]), key


def test_what_is_no_lora_for_the_unet_is_refused(model, single_file, tmp_path):
    from peft import LoraConfig
    from train_diffusion_mapo_sdxl import add_lora, load_lora, load_pipeline, save_lora

    with pytest.raises(FileNotFoundError, match="--lora_weights"):
        load_lora(load_pipeline(str(model)), str(tmp_path))
    with pytest.raises(ValueError, match="LoRA"):
        load_lora(load_pipeline(str(model)), str(single_file))
    trained, models = make_lora(model, ATTENTION, with_text_encoders=True)
    del models["unet"]
    save_lora(trained, models, tmp_path, False)
    with pytest.raises(ValueError, match="--lora_weights"):
        load_lora(load_pipeline(str(model)), str(tmp_path))
    dora = load_pipeline(str(model))
    add_lora(dora.unet, LoraConfig(r=4, target_modules=["to_q"], use_dora=True))
    save_lora(dora, {"unet": dora.unet}, tmp_path, False)
    with pytest.raises(ValueError, match="DoRA"):
        load_lora(load_pipeline(str(model)), str(tmp_path))


def test_a_finished_lora_run_continues_on_other_pairs(model, train):
    """Its rank, alpha and layers come from the file, whatever the flags' defaults are."""
    from small_model import write_pairs

    base = [f"--pretrained_model_name_or_path={model}", "--max_train_steps=2", "--train_batch_size=2"]
    lora = ["--use_lora", "--rank=4", "--lora_alpha=2", "--lora_layers=to_q,conv1", "--learning_rate=1e-2"]
    first = train(*base, *lora, output_dir="first")
    before = load_file(first / "pytorch_lora_weights.safetensors")
    assert all(value.any() for value in before.values())

    pairs = write_pairs(first.parent / "other.parquet")
    other = [f"--lora_weights={first}", f"--dataset_name={pairs}"]
    unchanged = train(*base, *other, "--learning_rate=0", output_dir="unchanged")
    # Tensor by tensor, as safetensors writes a file's header in no fixed order.
    kept = load_file(unchanged / "pytorch_lora_weights.safetensors")
    assert kept.keys() == before.keys() and all(torch.equal(kept[key], before[key]) for key in before)

    second = train(*base, *other, "--learning_rate=1e-2", "--output_kohya_format", output_dir="second")
    after = load_file(second / "pytorch_lora_weights.safetensors")
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in before.items()}
    assert not any(torch.equal(after[key], before[key]) for key in before)
    kohya = load_file(second / "pytorch_lora_weights_kohya.safetensors")
    assert {value.item() for key, value in kohya.items() if key.endswith(".alpha")} == {2.0}


def test_the_text_encoders_layers_of_a_lora_are_used_and_kept(model, train, tmp_path):
    """The captions are encoded with them, and they are in the saved file."""
    from train_diffusion_mapo_sdxl import save_lora

    from diffusers import StableDiffusionXLPipeline

    trained, models = make_lora(model, ATTENTION, with_text_encoders=True)
    save_lora(trained, models, tmp_path, False)
    out = train(
        f"--pretrained_model_name_or_path={model}",
        f"--lora_weights={tmp_path}",
        "--max_train_steps=1",
        "--train_batch_size=2",
        "--learning_rate=0",
    )
    plain = StableDiffusionXLPipeline.from_pretrained(model)
    plain.load_lora_weights(str(out), weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(outputs(plain), outputs(trained))


# ---- Out of diffusers -----------------------------------------------------------------------------------------------
def test_the_export_has_the_names_and_shapes_of_sdxls_own_file():
    """Without weights, on the meta device. diffusers' loader finds each tensor again."""
    from export_single_file import convert_text_encoder, convert_text_encoder_2, convert_unet, convert_vae
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils

    sdxl = REPO / "benchmarks" / "sdxl"
    configs = {name: json.loads((sdxl / name / "config.json").read_text()) for name in MODELS}
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs["unet"])
        vae = AutoencoderKL.from_config(configs["vae"])
        text_encoder = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
        text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder_2"]))
    file = {
        **convert_unet(unet),
        **convert_vae(vae),
        **convert_text_encoder(text_encoder),
        **convert_text_encoder_2(text_encoder_2),
    }
    assert len(file) == 2513  # and logit_scale, which no image depends on
    assert file["model.diffusion_model.input_blocks.0.0.weight"].shape == (320, 4, 3, 3)
    assert file["model.diffusion_model.middle_block.1.transformer_blocks.9.ff.net.2.weight"].shape == (1280, 5120)
    assert file["model.diffusion_model.output_blocks.2.2.conv.weight"].shape == (1280, 1280, 3, 3)
    assert file["model.diffusion_model.label_emb.0.0.weight"].shape == (1280, 2816)
    assert file["first_stage_model.decoder.up.3.upsample.conv.weight"].shape == (512, 512, 3, 3)
    assert file["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    prefix = "conditioner.embedders.0.transformer.text_model."
    assert file[prefix + "encoder.layers.11.mlp.fc1.weight"].shape == (3072, 768)
    prefix = "conditioner.embedders.1.model."
    assert file[prefix + "transformer.resblocks.31.attn.in_proj_weight"].shape == (3840, 1280)
    assert file[prefix + "positional_embedding"].shape == (77, 1280)

    read = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(file, configs["unet"]),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(file, configs["vae"]),
        "text_encoder_2": single_file_utils.convert_open_clip_checkpoint(text_encoder_2, file, prefix),
    }
    for name, module in (("unet", unet), ("vae", vae), ("text_encoder_2", text_encoder_2)):
        shapes = {key: value.shape for key, value in module.state_dict().items()}
        assert {key: value.shape for key, value in read[name].items()} == shapes


def test_an_export_in_fp16_is_the_rounded_model(model, tmp_path):
    from train_diffusion_mapo_sdxl import load_pipeline

    umask = os.umask(0o027)
    output = tmp_path / "new" / "model.safetensors"
    export(model, output)
    export(model, output)  # replaces it
    os.umask(umask)
    assert stat.S_IMODE(output.stat().st_mode) == 0o640
    assert os.listdir(output.parent) == ["model.safetensors"]
    weights = load_file(output)
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert not {"v_pred", "ztsnr"} & weights.keys()
    exported = load_pipeline(str(output), single_file_config=str(model))
    assert_equal_weights(exported, load_pipeline(str(model)), dtype=torch.float16)

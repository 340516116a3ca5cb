"""What the pages say is there: links, flags, commands, and Python code that runs."""

import re
import shlex

import pytest
import torch
from conftest import REPO

from diffusers import DDPMScheduler, SD3Transformer2DModel, UNet2DConditionModel


PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("[!.]*/*.md")])
PAGES = [page for page in PAGES if not page.is_relative_to(REPO / "demo" / "build")]
OTHER_PROGRAMS = set(  # flags of accelerate, torchrun, pip, pytest and Slurm
    "--config_file --num_processes --nproc_per_node --index-url --dist --help --signal --no-deps --platform --target "
    "--python-version --implementation --no-index --only-binary".split()
)


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (REPO / page).read_text(), re.S)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text()), target


def flags_of(source: str) -> set[str]:
    return set(re.findall(r"[\"'](--[A-Za-z_][\w-]*)[\"']", source))


ALL_FLAGS = set()
for path in REPO.glob("**/*.py"):
    if "build" not in path.parts and ".venv" not in path.parts:
        ALL_FLAGS |= flags_of(path.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_flags_and_files_in_commands_exist(page):
    text = page.read_text()
    for flag in re.findall(r"(?<![\w-])(--[a-z][\w-]*)", text):
        assert flag in ALL_FLAGS | OTHER_PROGRAMS, flag
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:python3?|accelerate launch(?: --\w+ \S+)*|uv run) ((?:\w+/)*\w+\.py)(.*)", line)
            if match is None:
                continue
            script, arguments = match.groups()
            assert (REPO / script).is_file(), script
            used = {word.split("=")[0] for word in shlex.split(arguments, comments=True) if word.startswith("--")}
            sources = [path.read_text() for path in (REPO / script).parent.glob("*.py")]
            assert used <= flags_of("".join(sources)) | OTHER_PROGRAMS, (script, used)


def test_the_readmes_loss_runs_in_another_trainer():
    loading, training, velocity = code_blocks("README.md", "python")
    namespace = {}
    exec(training, namespace)
    exec(velocity, namespace)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    latents = torch.randn(2, 4, 8, 8)
    loss, logs = namespace["training_loss"](unet, scheduler, latents, torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8))
    loss.backward()
    assert loss.item() > 0 and 0 <= logs["accuracy"].item() <= 1
    assert all(parameter.grad is not None for parameter in unet.parameters())
    noise, timesteps = torch.randn_like(latents), torch.tensor([10, 900])
    target = namespace["velocity_target"](scheduler, latents, noise, timesteps)
    alphas = scheduler.alphas_cumprod[timesteps].view(2, 1, 1, 1)
    assert torch.allclose(target, alphas.sqrt() * noise - (1 - alphas).sqrt() * latents, atol=1e-5)


def test_the_readmes_way_to_load_a_result(train, small_model, tmp_path, monkeypatch):
    out = train("--use_lora", "--rank=2", "--max_train_steps=1", output_dir="my-lora")
    code = code_blocks("README.md", "python")[0]
    code = code.replace("stabilityai/stable-diffusion-xl-base-1.0", str(small_model))
    code = code.replace('pipeline.to("cuda")', "pipeline.to(torch.float32)")
    code = code.replace('("a red fox in the snow")', '("a red fox", num_inference_steps=1, height=64, width=64)')
    monkeypatch.chdir(out.parent)
    namespace = {}
    exec(code, namespace)
    assert namespace["image"].size == (64, 64) and namespace["pipeline"].get_active_adapters()


def test_loop_for_a_flow_matching_transformer_learns_the_preference():
    namespace = {}
    (code,) = code_blocks("docs/flow_matching.md", "python")
    exec(code, namespace)
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    # An error can tell winners and losers apart: each are of one sign.
    batch = {
        "latents_w": torch.full((4, 4, 8, 8), 1.0),
        "latents_l": torch.full((4, 4, 8, 8), -1.0),
        "prompt_embeds": torch.randn(4, 7, 32),
        "pooled_prompt_embeds": torch.randn(4, 64),
    }
    logs = list(namespace["train"](transformer, [batch] * 60, beta=1.0, learning_rate=1e-3, safeguard=0.5))
    first = {name: sum(log[name] for log in logs[:10]) / 10 for name in logs[0]}
    last = {name: sum(log[name] for log in logs[-10:]) / 10 for name in logs[0]}
    assert last["mse_w"] < 0.8 * first["mse_w"]
    assert last["margin"] > first["margin"] + 0.05
    assert last["accuracy"] == 1

"""train_diffusion_mapo_sdxl.py as a user runs it, on the demo's model and pairs."""

import argparse
import io
import itertools
import json
import re
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import REPO, picture_bytes, read_weights
from PIL import Image


DEMO = REPO / "demo"
MODEL, PAIRS = str(DEMO / "sdxl-tiny-twemoji"), str(DEMO / "pairs")


def write_pairs(path, **changes) -> str:
    """The first 8 of the demo's pairs as one parquet file, with some columns changed or (None) dropped."""
    columns = pq.read_table(DEMO / "pairs" / "train.parquet").slice(0, 8).to_pydict() | changes
    pq.write_table(pa.table({name: values for name, values in columns.items() if values is not None}), path)
    return str(path)


def named(dataset) -> list[str]:
    return [f"--pretrained_model_name_or_path={MODEL}", f"--dataset_name={dataset}", "--resolution=64"]


# ---------------------------------------------------------------------------------------------------------------------
# The demo
# ---------------------------------------------------------------------------------------------------------------------


def test_the_readmes_command_shifts_the_style(launch, tmp_path):
    done = launch("--beta_mapo", "8")

    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert lines[0].startswith(
        "Neither --pretrained_model_name_or_path nor --dataset_name is given: training the demo."
    )
    before, after = map(
        int, re.search(r"preferred style \(Noto's\): (\d+)% before, (\d+)% after", done.stdout).groups()
    )
    assert before < 10 and after > 60
    recognised = re.search(r"nearest to a drawing of their caption: (\d+)% before, (\d+)% after", done.stdout)
    assert int(recognised[2]) >= 90
    said = done.stdout + done.stderr
    for noise in ("Warning", "warning:", "xformers", "bitsandbytes", "deprecat", "torchvision", "Traceback"):
        assert noise not in said.replace("To avoid this warning pass in values", ""), said  # accelerate's own hint
    records = [json.loads(line) for line in (tmp_path / "mapo-demo" / "metrics.jsonl").read_text().splitlines()]
    margins = [record["margin"] for record in records]
    assert np.mean(margins[:20]) < 0 and np.mean(margins[-20:]) > np.mean(margins[:20]) + 0.05


def test_a_run_leaves_weights_card_pictures_curves_and_metrics(train):
    from diffusers import StableDiffusionXLPipeline

    out = train("--learning_rate=1e-3")

    pipeline = StableDiffusionXLPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("rocket", num_inference_steps=2, height=64, width=64, generator=torch.manual_seed(0)).images[0]
    assert drawn.size == (64, 64)
    base = read_weights(DEMO / "sdxl-tiny-twemoji")
    weights = read_weights(out)
    assert weights.keys() == base.keys() and weights["conv_in.weight"].dtype == torch.float32
    assert not torch.equal(weights["conv_in.weight"], base["conv_in.weight"].float())

    card = (out / "README.md").read_text()
    assert "before_after.png" in card and "| `beta_mapo` | `8.0` |" in card and f"base_model: {MODEL}" in card
    grid = np.asarray(Image.open(out / "before_after.png").convert("RGB")).astype(int)
    left, right = grid[62:174, 8:136], grid[62:174, 140:268]
    assert left.std() > 20 and np.abs(left - right).mean() > 1
    assert Image.open(out / "curves.png").size == (1100, 660)

    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    for record in records:
        assert record["margin"] == pytest.approx(record["score_w"] - record["score_l"], abs=1e-6)
        assert 0 < record["score_w"] < 1 and 0 <= record["accuracy"] <= 1 and record["loss"] > record["mse_w"]
        assert record["grad_norm"] > 0 and record["learning_rate"] > 0 and record["pairs_per_second"] > 0
        assert 0.1 < record["peak_memory_gb"] < 24 and record["margin_weight"] > 0
    assert not list(out.glob("tmp-*"))


# ---------------------------------------------------------------------------------------------------------------------
# The training step
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step():
    """`training_step` on two pairs of noise and what the UNet was called with."""
    import train_diffusion_mapo_sdxl as script

    args = script.parse_args([])
    unet, noise_scheduler = script.load_unet(args, single_process())
    draw = torch.Generator().manual_seed(1)
    batch = {
        "latents": torch.randn(2, 2, 4, 16, 16, generator=draw),
        "prompt_embeds": torch.randn(2, 24, 160, generator=draw),
        "pooled_prompt_embeds": torch.randn(2, 96, generator=draw),
        "time_ids": torch.tensor([[1153.0, 900, 3, 5, 64, 64], [64.0, 64, 0, 0, 64, 64]]),
        "position": torch.tensor([7, 8]),
    }
    calls = []
    handle = unet.register_forward_pre_hook(lambda module, a, kw: calls.append((a, kw)), with_kwargs=True)
    loss, metrics = script.training_step(unet, batch, noise_scheduler, args, torch.device("cpu"))
    handle.remove()
    return argparse.Namespace(
        script=script, args=args, unet=unet, noise_scheduler=noise_scheduler, batch=batch, calls=calls, loss=loss,
        metrics=metrics,
    )  # fmt: skip


def test_one_pass_over_winners_then_losers_that_share_all_but_the_picture(step):
    ((noisy, timesteps, embeds),), kwargs = [a for a, _ in step.calls], step.calls[0][1]["added_cond_kwargs"]

    assert noisy.shape == (4, 4, 16, 16)
    assert torch.equal(timesteps[:2], timesteps[2:]) and torch.equal(embeds[:2], embeds[2:])
    assert torch.equal(embeds[:2], step.batch["prompt_embeds"])
    assert torch.equal(kwargs["text_embeds"][:2], kwargs["text_embeds"][2:])
    assert kwargs["time_ids"].dtype == torch.float32
    assert kwargs["time_ids"].tolist() == step.batch["time_ids"].tolist() * 2
    # x_t = a x_0 + b noise: with the same noise, what differs within a pair is a (x_w - x_l).
    a = step.noise_scheduler.alphas_cumprod[timesteps[:2]].sqrt().view(2, 1, 1, 1)
    winners, losers = step.batch["latents"].unbind(1)
    assert torch.allclose(noisy[:2] - noisy[2:], a * (winners - losers), atol=1e-5)


def test_the_loss_is_appendix_a_pair_by_pair_in_float64(step):
    noisy, timesteps, embeds = step.calls[0][0]
    conditions = step.calls[0][1]["added_cond_kwargs"]
    a = step.noise_scheduler.alphas_cumprod.double()[timesteps].view(4, 1, 1, 1)
    clean = step.batch["latents"].transpose(0, 1).flatten(0, 1).double()
    noise = (noisy.double() - a.sqrt() * clean) / (1 - a).sqrt()
    losses = []
    with torch.no_grad():
        for i in range(4):
            row = {name: value[i : i + 1] for name, value in conditions.items()}
            predicted = step.unet(
                noisy[i : i + 1], timesteps[i : i + 1], embeds[i : i + 1], added_cond_kwargs=row
            ).sample
            losses.append(((predicted.double() - noise[i]) ** 2).mean())
    mse_w, mse_l = torch.stack(losses[:2]), torch.stack(losses[2:])
    x_w, x_l = 0.5 * mse_w, 0.5 * mse_l
    score_w, score_l = (x_w / (x_w.exp() - 1)) ** 8, (x_l / (x_l.exp() - 1)) ** 8
    margin = torch.log(torch.sigmoid((score_w - score_l) * 1000))
    expected = mse_w.mean() - (margin / 8).mean()

    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert step.metrics["mse_w"].item() == pytest.approx(mse_w.mean().item(), rel=1e-4)
    assert step.metrics["mse_l"].item() == pytest.approx(mse_l.mean().item(), rel=1e-4)


def test_noise_and_timestep_of_a_pair_depend_on_seed_and_position_alone(step):
    def draw(positions, seed=0):
        return step.script.draw_noise(torch.tensor(positions), (4, 16, 16), 1000, 0.0, seed, torch.device("cpu"))

    noise, timesteps = draw([5, 6, 7])
    again, _ = draw([7, 5])
    assert torch.equal(again[0], noise[2]) and torch.equal(again[1], noise[0])
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(draw([5], seed=1)[0], noise[:1])
    many, timesteps = draw(list(range(2000)))
    assert abs(many.mean().item()) < 2e-3 and many.std().item() == pytest.approx(1, abs=2e-3)
    assert timesteps.min() < 10 and timesteps.max() > 989 and abs(timesteps.float().mean().item() - 499.5) < 25


def test_v_prediction_is_trained_towards_the_velocity(step):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(step.noise_scheduler.config, prediction_type="v_prediction")
    with torch.no_grad():
        loss, metrics = step.script.training_step(step.unet, step.batch, scheduler, step.args, torch.device("cpu"))
        noisy, timesteps, embeds = step.calls[0][0]
        predicted = step.unet(noisy, timesteps, embeds, added_cond_kwargs=step.calls[0][1]["added_cond_kwargs"]).sample
    a = step.noise_scheduler.alphas_cumprod[timesteps].view(4, 1, 1, 1)
    clean = step.batch["latents"].transpose(0, 1).flatten(0, 1)
    noise = (noisy - a.sqrt() * clean) / (1 - a).sqrt()
    velocity = a.sqrt() * noise - (1 - a).sqrt() * clean
    assert metrics["mse_w"].item() == pytest.approx((predicted - velocity)[:2].square().mean().item(), rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Data and encoding
# ---------------------------------------------------------------------------------------------------------------------


def single_process():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


def load(script, dataset, hub_cache, *flags):
    args = script.parse_args([*named(dataset), f"--cache_dir={hub_cache}", *flags])
    return script.load_pairs(args, single_process())


def test_the_label_decides_which_picture_won_and_ties_and_unlabelled_rows_are_left_out(hub_cache, tmp_path):
    import train_diffusion_mapo_sdxl as script

    labels = [1.0, 0.0, 0.5, 1.0, None, 0.0, 1.0, 0.0]
    has_label = [True, True, True, False, True, True, True, True]
    path = write_pairs(tmp_path / "p.parquet", label_0=labels, label_1=None, has_label=has_label)
    source = pq.read_table(path).to_pylist()

    pairs = load(script, path, hub_cache)

    assert pairs.rows.tolist() == [0, 1, 5, 6, 7] and (pairs.tied, pairs.unlabelled) == (1, 2)
    for i, row in enumerate(pairs.rows.tolist()):
        names = ("jpg_0", "jpg_1") if labels[row] == 1.0 else ("jpg_1", "jpg_0")
        for picture, name in zip(pairs.pictures(i), names):
            assert picture.tobytes() == Image.open(io.BytesIO(source[row][name])).convert("RGB").tobytes()
    assert pairs.captions == [source[row]["caption"] for row in pairs.rows]
    assert len(load(script, path, hub_cache, "--max_train_samples=2")) == 2
    assert len(load(script, path, hub_cache, "--max_train_samples=1000")) == 5


def test_each_picture_keeps_its_own_shape_and_both_get_the_winners_conditioning(train, hub_cache, tmp_path):
    import train_diffusion_mapo_sdxl as script

    wide = Image.new("RGB", (256, 64), "white")
    wide.paste("red", (96, 0, 160, 64))  # the centre 64 x 64 of the picture
    small = Image.new("RGB", (32, 40), "blue")
    path = write_pairs(
        tmp_path / "p.parquet",
        jpg_0=[picture_bytes(wide)] * 8, jpg_1=[picture_bytes(small)] * 8, label_0=[1.0, 0.0] * 4,
    )  # fmt: skip
    pairs = load(script, path, hub_cache)
    winner, loser = pairs.pictures(0)

    pixels, time_ids = script.prepare_picture(winner, 64)
    assert time_ids == [64, 256, 0, 96, 64, 64]
    assert torch.equal(
        pixels, torch.tensor([1.0, -1, -1]).view(3, 1, 1).expand(3, 64, 64)
    )  # all red: nothing squeezed
    assert script.prepare_picture(loser, 64)[1] == [40, 32, 8, 0, 64, 64]

    args = script.parse_args([*named(path), f"--cache_dir={hub_cache}"])
    pipeline = script.load_frozen_models(args, torch.device("cpu"), torch.float32)
    encoded = script.encode_pictures(pairs, pipeline.vae, args, single_process())
    assert encoded["time_ids"][0, 0].tolist() == [64, 256, 0, 96, 64, 64]
    assert encoded["time_ids"][1, 0].tolist() == [40, 32, 8, 0, 64, 64]
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels[None]).latent_dist.mode()[0] * pipeline.vae.config.scaling_factor
    assert np.abs(encoded["latents"][0, 0, 0] - expected.numpy()).max() < 4e-3  # fp16 on disk
    assert np.abs(encoded["latents"][1, 0, 1] - expected.numpy()).max() < 4e-3


def test_transparent_rotated_grey_and_cmyk_pictures_are_read_as_shown():
    import train_diffusion_mapo_sdxl as script

    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert script.decode_picture(picture_bytes(clear)).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4)).save(buffer, "JPEG", exif=exif)
    assert script.decode_picture({"bytes": buffer.getvalue(), "path": None}).size == (4, 6)
    assert script.decode_picture(picture_bytes(Image.new("L", (4, 4), 128))).getpixel((0, 0)) == (128,) * 3
    cmyk = script.decode_picture(picture_bytes(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"))
    assert cmyk.mode == "RGB" and cmyk.getpixel((0, 0))[0] > 200 and cmyk.getpixel((0, 0))[1] < 80


def test_pictures_and_captions_are_encoded_once_and_a_kill_loses_none(train, tmp_path):
    cache = tmp_path / "cache"
    train(f"--cache_dir={cache}")
    (pictures,) = (path.parent for path in cache.rglob("latents.npy"))
    latents = np.load(pictures / "latents.npy")
    done = np.load(pictures / "done.npy", mmap_mode="r+")
    assert latents.shape == (16, 1, 2, 4, 16, 16) and done.all()
    assert latents.astype(np.float32).std() == pytest.approx(1, abs=0.35)  # scaled as the UNet was trained

    # As a kill would leave it: two rows are missing. Only these are encoded again; what is there is taken as it is.
    damaged = np.load(pictures / "latents.npy", mmap_mode="r+")
    damaged[3], damaged[4], damaged[5] = 0, 0, 7
    done[[3, 4]] = False
    damaged.flush(), done.flush()
    train(f"--cache_dir={cache}", output_dir="again")
    again = np.load(pictures / "latents.npy")
    assert np.array_equal(again[[3, 4]], latents[[3, 4]]) and (again[5] == 7).all()

    train(f"--cache_dir={cache}", "--resolution=32", output_dir="smaller")
    assert len(list(cache.rglob("latents.npy"))) == 2


def write_folders(path, losers: bool = True) -> str:
    """The demo's first pairs as w/NAME.png, l/NAME.png, NAME.txt."""
    for side in "wl":
        (path / side).mkdir()
    for i, row in enumerate(demo_rows()):
        won = row["label_0"] == 1.0
        for side, data in (("w", row["jpg_0" if won else "jpg_1"]), ("l", row["jpg_1" if won else "jpg_0"])):
            if losers or side == "w":
                (path / side / f"{i}.png").write_bytes(data)
        (path / f"{i}.txt").write_text(row["caption"] + "\n")
    return str(path)


def demo_rows() -> list[dict]:
    return pq.read_table(DEMO / "pairs" / "train.parquet").slice(0, 4).to_pylist()


def make_layout(kind: str, path) -> tuple[str, list[str]]:
    """The same four pairs as another data set would have them; returns --dataset_name and further flags."""
    rows = demo_rows()
    won = [row["label_0"] == 1.0 for row in rows]
    images = {name: [{"bytes": row[name], "path": None} for row in rows] for name in ("jpg_0", "jpg_1")}
    captions = [row["caption"] for row in rows]
    chosen = [row["jpg_0" if w else "jpg_1"] for row, w in zip(rows, won)]
    rejected = [row["jpg_1" if w else "jpg_0"] for row, w in zip(rows, won)]
    if kind == "folders":
        return write_folders(path), []
    if kind == "webdataset":
        with tarfile.open(path / "0.tar", "w") as tar:
            for i, row in enumerate(rows):
                members = {"jpg_0.jpg": row["jpg_0"], "jpg_1.jpg": row["jpg_1"]}
                members |= {
                    "original_prompt.txt": row["caption"].encode(),
                    "label_0.txt": str(row["label_0"]).encode(),
                }
                for name, data in members.items():
                    info = tarfile.TarInfo(f"{i:04d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        return str(path / "0.tar"), []
    if kind == "jsonl":
        (path / "pictures").mkdir()
        lines = []
        for i, (winner, loser) in enumerate(zip(chosen, rejected)):
            (path / "pictures" / f"{i}w.webp").write_bytes(winner)
            (path / "pictures" / f"{i}l.webp").write_bytes(loser)
            lines.append(json.dumps({"prompt": captions[i], "path1": f"{i}w.webp", "path2": f"{i}l.webp"}))
        (path / "pairs.jsonl").write_text("\n".join(lines))
        return str(path / "pairs.jsonl"), [f"--image_root={path / 'pictures'}"]
    tables = {
        "open-image-preferences": {"prompt": captions, "chosen": as_images(chosen), "rejected": as_images(rejected)},
        "Rapidata": {
            "prompt": captions, "image1": images["jpg_0"], "image2": images["jpg_1"],
            "votes_image1": [9 if w else 3 for w in won], "votes_image2": [3 if w else 9 for w in won],
        },
        "integer labels": {
            "caption": captions, "jpg_0": [row["jpg_0"] for row in rows], "jpg_1": [row["jpg_1"] for row in rows],
            "label_0": [int(w) for w in won], "label_1": [int(not w) for w in won],
        },
        "named": {"words": captions, "good": chosen, "bad": rejected},
        "scored": {
            "words": captions, "a": [row["jpg_0"] for row in rows], "b": [row["jpg_1"] for row in rows],
            "score_a": [0.2 if w else -0.3 for w in won], "score_b": [-0.1 if w else 0.4 for w in won],
        },
    }  # fmt: skip
    pq.write_table(pa.table(tables[kind]), path / "p.parquet")
    flags = {
        "named": "--caption_column=words --chosen_column=good --rejected_column=bad",
        "scored": "--caption_column=words --image_0_column=a --image_1_column=b --label_0_column=score_a "
        "--label_1_column=score_b",
    }
    return str(path / "p.parquet"), flags.get(kind, "").split()


def as_images(files: list[bytes]) -> list[dict]:
    return [{"bytes": data, "path": None} for data in files]


LAYOUTS = ["folders", "webdataset", "jsonl", "open-image-preferences", "Rapidata", "integer labels", "named", "scored"]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_gives_the_same_winners_and_losers(kind, hub_cache, tmp_path):
    import train_diffusion_mapo_sdxl as script

    dataset, flags = make_layout(kind, tmp_path)
    pairs = load(script, dataset, hub_cache, *flags)

    assert pairs.captions == [row["caption"] for row in demo_rows()]
    for i, row in enumerate(demo_rows()):
        names = ("jpg_0", "jpg_1") if row["label_0"] == 1.0 else ("jpg_1", "jpg_0")
        for picture, name in zip(pairs.pictures(i), names):
            assert picture.tobytes() == Image.open(io.BytesIO(row[name])).convert("RGB").tobytes()


def test_sixteen_bit_pictures_keep_their_tones():
    import train_diffusion_mapo_sdxl as script

    ramp = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    decoded = script.decode_picture(picture_bytes(ramp))
    assert [decoded.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (100,) * 3, (255,) * 3]


def test_ties_are_decided_by_a_lot_that_the_seed_fixes(hub_cache, tmp_path):
    import train_diffusion_mapo_sdxl as script

    path = write_pairs(tmp_path / "p.parquet", label_0=[0.5] * 8, label_1=[0.5] * 8)
    pairs = load(script, path, hub_cache, "--tie_policy=random")
    assert len(pairs) == 8 and 0 < pairs.winner_first.sum() < 8
    assert np.array_equal(pairs.winner_first, load(script, path, hub_cache, "--tie_policy=random").winner_first)
    other = load(script, path, hub_cache, "--tie_policy=random", "--seed=1")
    assert not np.array_equal(pairs.winner_first, other.winner_first)


def test_label_noise_swaps_the_asked_share_of_pairs(hub_cache):
    import train_diffusion_mapo_sdxl as script

    clean = load(script, DEMO / "pairs", hub_cache, "--max_train_samples=400").winner_first
    noisy = load(script, DEMO / "pairs", hub_cache, "--max_train_samples=400", "--label_noise_prob=0.25").winner_first
    assert abs(np.mean(clean != noisy) - 0.25) < 0.07  # three standard deviations


def test_unreadable_pictures_are_left_out_where_asked(hub_cache, tmp_path, caplog):
    import train_diffusion_mapo_sdxl as script

    pictures = pq.read_table(DEMO / "pairs" / "train.parquet").slice(0, 8)["jpg_1"].to_pylist()
    pictures[2], pictures[5] = b"no picture", pictures[5][:100]
    path = write_pairs(tmp_path / "p.parquet", jpg_1=pictures)
    with pytest.raises(SystemExit) as stop:
        load(script, path, hub_cache)
    assert "row 2: jpg_1 is no readable picture" in stop.value.code and "--skip_unreadable" in stop.value.code
    with caplog.at_level("INFO", logger="mapo"):
        pairs = load(script, path, hub_cache, "--skip_unreadable")
    assert pairs.rows.tolist() == [0, 1, 3, 4, 6, 7]
    assert "8 rows: 0 ties left out, 0 without a label, 2 unreadable." in caplog.text


def test_a_flip_mirrors_both_pictures_and_captions_are_left_out_pair_by_pair(hub_cache):
    import train_diffusion_mapo_sdxl as script

    flags = ["--random_flip", "--proportion_empty_prompts=0.5", "--max_train_samples=4", f"--cache_dir={hub_cache}"]
    args = script.parse_args([*named(DEMO / "pairs"), *flags])
    dataset, pipeline, _, _ = script.prepare_data(args, single_process())
    live, _, _, _ = script.prepare_data(
        script.parse_args([*named(DEMO / "pairs"), *flags, "--no-cache_latents"]), single_process()
    )
    choices = [script.draw_choices(position, args) for position in range(1000)]
    assert all(abs(np.mean(share) - 0.5) < 0.05 for share in zip(*choices))

    seen = set()
    for position in range(24):
        flip, drop = choices[position]
        row, pixels = dataset[position], live[position]["pixels"]
        epoch, i = divmod(position, 4)
        i = int(np.random.default_rng((args.seed, 0, epoch)).permutation(4)[i])
        upright = torch.stack([script.prepare_picture(p, 64)[0] for p in dataset.pairs.pictures(i)])
        assert torch.equal(pixels, upright.flip(3) if flip else upright)
        with torch.no_grad():
            latents = script.encode_pixels(pixels, pipeline.vae)
        assert (row["latents"] - latents).abs().max() < 4e-3
        assert (row["prompt_embeds"] == 0).all() == drop and (row["pooled_prompt_embeds"] == 0).all() == drop
        seen.add((flip, drop))
    assert len(seen) == 4


def test_a_random_crop_takes_place_and_is_what_time_ids_say():
    import train_diffusion_mapo_sdxl as script

    ramp = Image.fromarray(np.tile(np.arange(192, dtype=np.uint8), (64, 1)))
    for flip in (False, True):
        pixels, time_ids = script.prepare_picture(ramp.convert("RGB"), 64, np.array([0.3, 0.75]), flip)
        column = 96 if not flip else 32
        assert time_ids == [64, 192, 0, column, 64, 64]
        values = ((pixels[0, 0] + 1) * 127.5).round().int().tolist()
        assert values == (list(range(96, 160)) if not flip else list(range(159, 95, -1)))


def test_training_on_a_stream_and_without_a_cache_follow_the_pairs(train):
    flags = ["--validation_prompts=rocket", "--max_train_samples=8", *SMOOTH]
    base = {name: weight.float() for name, weight in read_weights(DEMO / "sdxl-tiny-twemoji").items()}
    cached = read_weights(train(*flags, output_dir="cached"))
    live = read_weights(train(*flags, "--no-cache_latents", output_dir="live"))
    stream = read_weights(train(*flags, "--streaming", output_dir="stream"))
    # The cache is fp16, nothing else differs; a stream is shuffled in its own way.
    assert 0 < largest_difference(cached, live) < 0.02 * largest_difference(cached, base)
    assert 0 < largest_difference(stream, base)


# ---------------------------------------------------------------------------------------------------------------------
# LoRA, EMA, optimizers
# ---------------------------------------------------------------------------------------------------------------------


def draw(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=3, height=64, width=64, output_type="np")
    return pipeline("rocket", **options, generator=torch.manual_seed(0)).images[0]


@pytest.mark.parametrize("dora", [[], ["--use_dora"]], ids=["lora", "dora"])
def test_a_lora_loads_from_both_files_and_draws_what_was_trained(dora, train):
    from diffusers import StableDiffusionXLPipeline

    flags = ["--use_lora", "--rank=4", "--learning_rate=1e-2", *(dora or ["--output_kohya_format"])]
    out = train(*flags)

    assert not (out / "unet").exists()
    pictures = [draw(StableDiffusionXLPipeline.from_pretrained(MODEL, dtype=torch.float32))]
    for name in sorted(path.name for path in out.glob("*.safetensors")):
        pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL, dtype=torch.float32)
        pipeline.load_lora_weights(out, weight_name=name)
        pictures.append(draw(pipeline))
    assert np.abs(pictures[0] - pictures[1]).max() > 0.02
    assert len(pictures) == (2 if dora else 3)
    if not dora:
        assert np.abs(pictures[1] - pictures[2]).max() < 1e-3
    assert "load_lora_weights" in (out / "README.md").read_text()


def test_a_lora_is_resumed_where_it_was(train):
    flags = ["--use_lora", "--rank=4", "--learning_rate=1e-2", "--checkpointing_steps=2"]
    unbroken = train(*flags, output_dir="unbroken")
    out = train(*flags, output_dir="broken")
    for path in [*out.glob("pytorch*"), *out.glob("checkpoint-4/**/*")]:
        if path.is_file():
            path.unlink()
    assert (out / "checkpoint-2" / "lora.safetensors").stat().st_size < 1e6
    train(*flags, "--resume_from_checkpoint=latest", output_dir="broken")

    from safetensors.torch import load_file

    a, b = (load_file(path / "pytorch_lora_weights.safetensors") for path in (unbroken, out))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_ema_is_the_running_mean_and_what_is_saved(train):
    plain = read_weights(train(*SMOOTH, output_dir="plain"))
    mean = read_weights(train(*SMOOTH, "--use_ema", "--ema_decay=0.5", output_dir="mean"))
    base = {name: weight.float() for name, weight in read_weights(DEMO / "sdxl-tiny-twemoji").items()}
    assert 0 < largest_difference(plain, mean) < largest_difference(plain, base)


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw_bf16", "prodigy"])
def test_every_optimizer_moves_the_weights(optimizer, train):
    rate = "1" if optimizer == "prodigy" else "1e-3"
    weights = read_weights(train(f"--optimizer={optimizer}", f"--learning_rate={rate}"))
    base = read_weights(DEMO / "sdxl-tiny-twemoji")
    moved = {name: (weights[name].float() - base[name].float()).abs().max().item() for name in base}
    assert sum(0 < distance < 0.1 for distance in moved.values()) > 0.9 * len(base)
    dtype = torch.bfloat16 if optimizer == "adamw_bf16" else torch.float32
    assert weights["conv_in.weight"].dtype == dtype


def test_validation_on_the_way_and_prompts_from_a_file(train, tmp_path):
    (tmp_path / "prompts.txt").write_text("rocket\n\nfox face\n", encoding="utf-8")
    out = train("--validation_steps=2", f"--validation_prompts={tmp_path / 'prompts.txt'}", "--report_to=tensorboard")
    assert [path.name for path in (out / "validation").iterdir()] == ["2.png"]
    assert Image.open(out / "before_after.png").size == (560, 194)
    assert list((out / "logs").rglob("events.out*"))


def test_steps_that_are_not_finite_are_skipped_and_end_the_run(train, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train("--learning_rate=1e30", "--max_train_steps=20", "--max_nonfinite_steps=3", "--mixed_precision=no")
    assert "3 steps in a row had a loss or gradient that isn't finite" in stop.value.code
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert [record["skipped"] for record in records[-3:]] == [1, 1, 1]
    assert (tmp_path / "out" / f"checkpoint-{records[-1]['step']}" / "state.json").is_file()


def test_a_margin_that_has_no_say_gives_one_warning(train, caplog):
    with caplog.at_level("INFO", logger="mapo"):
        train("--beta_mapo=1e9", "--max_train_steps=110", "--train_batch_size=1", "--learning_rate=1e-8")
    warnings = [record.message for record in caplog.records if "plain fine-tuning" in record.message]
    assert len(warnings) == 1 and "--beta_mapo 1e+09" in warnings[0] and "--beta_mapo 1.25e+08" in warnings[0]


# ---------------------------------------------------------------------------------------------------------------------
# Accumulation, processes, resumption
# ---------------------------------------------------------------------------------------------------------------------

# AdamW divides a gradient by its own size, so that rounding decides the sign of an update where the gradient is almost
# 0; with a large epsilon the update follows the gradient there, and equality of runs can be asserted.
SMOOTH = ["--adam_epsilon=1e-2", "--learning_rate=1e-2", "--lr_scheduler=constant", "--lr_warmup_steps=0"]


def largest_difference(a: dict, b: dict) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_a_run_that_goes_on_with_another_accumulation_takes_the_same_batches(train):
    """accelerate's own count of micro-batches is in the checkpoint: at 12, accumulation of 8 would stop after 4."""
    first = ["--checkpointing_steps=3", "--max_train_samples=16", "--lr_scheduler=constant", "--logging_steps=1"]
    two, one = [
        ["--train_batch_size=2", "--gradient_accumulation_steps=4"],
        ["--train_batch_size=1", "--gradient_accumulation_steps=8"],
    ]
    unbroken = train(*first, *two, "--max_train_steps=5", output_dir="unbroken")
    train(*first, *two, "--max_train_steps=3", output_dir="split")
    split = train(*first, *one, "--max_train_steps=5", "--resume_from_checkpoint=latest", output_dir="split")
    losses = [[json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()] for out in (unbroken, split)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and len(losses[1]) == 5


def test_accumulation_equals_the_big_batch(train):
    big = read_weights(train(*SMOOTH, output_dir="big"))
    small = read_weights(train(*SMOOTH, "--train_batch_size=2", "--gradient_accumulation_steps=2", output_dir="small"))
    base = {name: weight.float() for name, weight in read_weights(DEMO / "sdxl-tiny-twemoji").items()}
    assert largest_difference(big, small) < 1e-5 < 1e-3 < largest_difference(big, base)


def test_the_pictures_before_are_the_base_models(train):
    """However it was tuned: by a UNet that is loaded anew, or with the LoRA off, at the end and on the way."""
    full = train("--learning_rate=1e-4", "--validation_steps=2", output_dir="full")
    lora = train("--use_lora", "--learning_rate=1e-2", "--validation_steps=2", output_dir="lora")
    grids = [out / name for out in (full, lora) for name in ("validation/2.png", "before_after.png")]
    before, after = ([np.array(Image.open(g).crop((x, 42, x + 128, 170))) for g in grids] for x in (8, 140))
    assert all((picture == before[0]).all() for picture in before)
    assert all((a != b).any() for a, b in itertools.combinations([before[0], *after], 2))


def test_a_half_written_checkpoint_is_passed_over(train, tmp_path, caplog):
    import train_diffusion_mapo_sdxl as script

    flags = ["--checkpointing_steps=2", "--checkpoints_total_limit=1"]
    out = train(*flags)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-4"]
    (out / "checkpoint-9").mkdir()
    (out / "checkpoint-9" / "model.safetensors").write_bytes(b"half")
    args = script.parse_args([f"--output_dir={out}", "--resume_from_checkpoint=latest"])
    assert script.find_checkpoint(args).name == "checkpoint-4"


def test_a_truncated_checkpoint_is_passed_over_with_a_message(train, caplog):
    import train_diffusion_mapo_sdxl as script

    out = train("--checkpointing_steps=2")
    weights = out / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with caplog.at_level("INFO", logger="mapo"):
        found = script.find_checkpoint(script.parse_args([f"--output_dir={out}", "--resume_from_checkpoint=latest"]))
    assert found.name == "checkpoint-2" and "checkpoint-4 is not a whole checkpoint" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------

BAD_FLAGS = [
    (["--beta_mapo=0"], "--beta_mapo 0.0: must be positive and finite"),
    (["--beta_mapo=nan"], "--beta_mapo nan: must be positive and finite"),
    (["--beta_mapo=much"], "--beta_mapo: invalid float value: 'much'"),
    (["--snr_value=-1"], "--snr_value -1.0: must be positive and finite"),
    (["--learning_rate=inf"], "--learning_rate inf: must be positive and finite"),
    (["--max_grad_norm=0"], "--max_grad_norm 0.0: must be positive and finite"),
    (["--train_batch_size=0"], "--train_batch_size 0: must be at least 1"),
    (["--max_train_steps=0"], "--max_train_steps 0: must be at least 1"),
    (["--max_train_samples=0"], "--max_train_samples 0: must be at least 1"),
    (["--gradient_accumulation_steps=-1"], "--gradient_accumulation_steps -1: must be at least 1"),
    (["--checkpointing_steps=0"], "--checkpointing_steps 0: must be at least 1"),
    (["--seed=-1"], "--seed -1: must be at least 0"),
    (["--resolution=63"], "--resolution 63: must be a multiple of 8; try 64"),
    (["--mixed_precision=fp8"], "--mixed_precision: invalid choice: 'fp8'"),
    (["--lr_scheduler=zigzag"], "--lr_scheduler: invalid choice: 'zigzag'"),
    (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
    (["--chosen_column=a"], "--chosen_column needs --rejected_column too"),
    (["--image_0_column=a", "--image_1_column=b"], "--image_0_column needs --label_0_column too"),
    (["--label_1_column=a"], "--label_1_column needs --label_0_column too"),
    (["--label_noise_prob=1.5"], "--label_noise_prob 1.5: must be between 0 and 1"),
    (["--proportion_empty_prompts=-0.1"], "--proportion_empty_prompts -0.1: must be between 0 and 1"),
    (["--ema_decay=2"], "--ema_decay 2.0: must be between 0 and 1"),
    (["--rank=0"], "--rank 0: must be at least 1"),
    (["--noise_offset=-1"], "--noise_offset -1.0: must be at least 0"),
    (["--validation_steps=0"], "--validation_steps 0: must be at least 1"),
    (["--max_nonfinite_steps=0"], "--max_nonfinite_steps 0: must be at least 1"),
    (["--tie_policy=keep"], "--tie_policy: invalid choice: 'keep'"),
    (["--optimizer=lion"], "--optimizer: invalid choice: 'lion'"),
    (["--use_dora"], "--use_dora needs --use_lora too"),
    (["--output_kohya_format"], "--output_kohya_format needs --use_lora too"),
    (["--activation_memory_budget=0.5"], "--activation_memory_budget needs --compile too"),
    (["--hub_model_id=x"], "--hub_model_id needs --push_to_hub too"),
    (["--streaming", "--cache_latents"], "--streaming and --cache_latents exclude each other"),
    (["--hub_token=x", "--report_to=wandb"], "--hub_token and --report_to wandb exclude each other"),
    (["--use_lora", "--optimizer=adamw_bf16"], "--use_lora and --optimizer adamw_bf16 exclude each other"),
    (
        ["--optimizer=adamw_bf16", "--mixed_precision=no"],
        "--optimizer adamw_bf16 needs --mixed_precision bf16, not no",
    ),
    (["--use_lora", "--use_dora", "--output_kohya_format"], "--use_dora and --output_kohya_format exclude each other"),
    (["--image_root=/none"], "--image_root /none: no such folder"),
    (["--output_dir=/etc/passwd"], "--output_dir /etc/passwd: is a file; name a folder"),
    (["--validation_prompts=none.txt"], "--validation_prompts none.txt: no such file"),
    (["--validation_prompts", "fox", " "], "--validation_prompts: a prompt is empty"),
    (["--report_to=wandb"], "--report_to wandb needs a package: pip install wandb"),
    (["--dataset_name=x"], "--dataset_name x needs --pretrained_model_name_or_path too"),
    (["--pretrained_model_name_or_path=x"], "--pretrained_model_name_or_path x needs --dataset_name too"),
]


@pytest.mark.parametrize("flags,message", BAD_FLAGS, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_a_bad_flag_ends_in_one_line(flags, message, capsys):
    import train_diffusion_mapo_sdxl as script

    with pytest.raises(SystemExit) as stop:
        script.parse_args(flags)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and said.count("\n") == 1


BAD_DATA = {
    "no such data set": (lambda path: str(path / "none"), "--dataset_name"),
    "not a data file": (
        lambda path: str((path / "x.doc").write_text("a") and path / "x.doc"),
        "x.doc: not one of .par",
    ),
    "no caption": (lambda path: write_pairs(path / "p.parquet", caption=None), "name --caption_column and"),
    "no label": (lambda path: write_pairs(path / "p.parquet", label_0=None), "those of no known data set"),
    "label is a word": (lambda path: write_pairs(path / "p.parquet", label_0=["a"] * 8), "labels must be numbers"),
    "caption is empty": (lambda path: write_pairs(path / "p.parquet", caption=[None] * 8), "row 0: caption is None"),
    "folder without a loser": (lambda path: write_folders(path, losers=False), "no l/0 to go with the others"),
    "only ties": (
        lambda path: write_pairs(path / "p.parquet", label_0=[0.5] * 8),
        "no row can be used (8 rows: 8 ties left out, 0 without a label)",
    ),
    "unreadable picture": (
        lambda path: write_pairs(path / "p.parquet", jpg_1=[b"no picture"] * 8),
        "row 0: jpg_1 is no readable picture",
    ),
}


@pytest.mark.parametrize("fault", BAD_DATA)
def test_bad_data_ends_in_one_line_before_a_model_is_loaded(fault, train, tmp_path, monkeypatch):
    import train_diffusion_mapo_sdxl as script

    make, message = BAD_DATA[fault]
    monkeypatch.setattr(script, "load_frozen_models", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        train(*named(make(tmp_path)))
    assert message in stop.value.code and "\n" not in stop.value.code and "error: " in stop.value.code


def test_checkpoints_of_another_run_are_not_run_over(train, capsys):
    import train_diffusion_mapo_sdxl as script

    out = train("--checkpointing_steps=4")
    with pytest.raises(SystemExit):
        script.parse_args([f"--output_dir={out}"])
    assert (
        "holds checkpoint-4 of an earlier run: continue it with --resume_from_checkpoint latest"
        in capsys.readouterr().err
    )


def test_resuming_from_what_is_no_checkpoint_ends_in_one_line(train, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train(f"--resume_from_checkpoint={tmp_path}")
    assert f"--resume_from_checkpoint {tmp_path}: no whole checkpoint" in stop.value.code


def test_results_do_not_run_over_what_they_are_made_from(tmp_path, capsys):
    import train_diffusion_mapo_sdxl as script

    model = str(tmp_path / "model")
    for flags, other in (
        (
            [f"--pretrained_model_name_or_path={model}", "--dataset_name=x", f"--output_dir={tmp_path}/./model"],
            "--pretr",
        ),
        (["--pretrained_model_name_or_path=x", f"--dataset_name={model}", f"--output_dir={model}"], "--dataset_name"),
        ([f"--output_dir={REPO}"], "holds this script"),
    ):
        with pytest.raises(SystemExit) as stop:
            script.parse_args(flags)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and other in said and said.count("\n") == 1


def test_ctrl_c_before_training_ends_in_one_line(train, monkeypatch):
    import train_diffusion_mapo_sdxl as script

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "encode_pictures", interrupt)
    with pytest.raises(SystemExit) as stop:
        train()
    assert "error: interrupted; the same command goes on" in stop.value.code


def test_metrics_are_json_where_a_step_was_not_finite():
    import train_diffusion_mapo_sdxl as script

    line = script.to_line({"step": 3, "loss": float("nan"), "grad_norm": float("inf")})
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 3, "loss": None, "grad_norm": None}
    assert np.isnan(script.from_line(line)["loss"]) and script.from_line(line)["step"] == 3

"""What is encoded, what the cache depends on, and in which order pairs are drawn."""

import itertools
import json
import logging
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import train_diffusion_mapo_sdxl as script
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import image_bytes
from PIL import Image
from safetensors.torch import load_file, save_file
from small_model import write_model


BUCKETS = [(64, 64), (48, 80), (80, 48)]


@pytest.fixture
def encode(small_model, tmp_path):
    """Encode a data set with the small model's VAE and text encoders: `encode(pairs)` returns the encoded rows."""

    def run(pairs, buckets=BUCKETS[:1], random_crop=False, random_flip=False, seed=0, model=small_model):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True)
        pipeline = script.load_pipeline(str(model))
        encoders = [pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2]
        return script.encode_pairs(
            pairs,
            script.hash_pairs(pairs, accelerator),
            pipeline,
            buckets,
            random_crop,
            random_flip,
            seed,
            tmp_path,
            script.hash_components(*encoders, pipeline.tokenizer, pipeline.tokenizer_2),
            accelerator,
        )

    return run


def pairs_of(*images: tuple[Image.Image, Image.Image], captions: list[str] | None = None) -> datasets.Dataset:
    rows = []
    for i, (winner, loser) in enumerate(images):
        caption = captions[i] if captions else f"fox {i}"
        rows.append({"caption": caption, "image_w": image_bytes(winner), "image_l": image_bytes(loser)})
    return datasets.Dataset.from_list(rows)


def dataset_of(encoded: datasets.Dataset, proportion_empty_prompts: float = 0.0) -> script.EncodedPairs:
    return script.EncodedPairs(
        encoded, 4, 4, (torch.zeros(1, 24, 160), torch.zeros(1, 96)), proportion_empty_prompts, 0
    )


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height))


def test_a_row_has_the_vaes_latents_and_the_pipelines_embeddings(encode, small_model):
    """Each image is cropped from its own original; the conditioning is the winner's."""
    wide = Image.new("RGB", (256, 64), "white")
    wide.paste("red", (96, 0, 160, 64))  # the 64 x 64 pixels in the middle
    encoded = encode(pairs_of((wide, noise_image(32, 40)), captions=["a fox"]))
    row = dataset_of(encoded)[(0, 0)]

    assert row["time_ids"].tolist() == [64, 256, 0, 96, 64, 64]
    pipeline = script.load_pipeline(str(small_model))
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    loser = script.resize_and_crop(noise_image(32, 40), 64, 64)[0][None]
    with torch.no_grad():
        for name, pixels in (("latents_w", red), ("latents_l", loser)):
            latents = pipeline.vae.encode(pixels).latent_dist.mode()[0] * pipeline.vae.config.scaling_factor
            assert (row[name] - latents).abs().max() < 4e-3  # fp16 on disk
        embeds, _, pooled, _ = pipeline.encode_prompt(["a fox"], device="cpu", do_classifier_free_guidance=False)
    assert (row["prompt_embeds"] - embeds[0]).abs().max() < 4e-3
    assert (row["pooled_prompt_embeds"] - pooled[0]).abs().max() < 4e-3
    assert encoded["crop_w"][0] == pytest.approx(0.75) and encoded["crop_l"][0] == pytest.approx(0.2)


def test_an_empty_prompt_is_zeros_where_the_pipeline_has_zeros(small_model):
    pipeline = script.load_pipeline(str(small_model))
    embeds, pooled = script.encode_prompts(pipeline, ["fox", ""], torch.device("cpu"))
    assert embeds[0].abs().sum() > 0 and embeds[1].abs().sum() == pooled[1].abs().sum() == 0
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert script.encode_prompts(pipeline, [""], torch.device("cpu"))[0].abs().sum() > 0


def test_both_images_go_to_the_winners_bucket(encode):
    pairs = pairs_of(
        (noise_image(100, 60), noise_image(60, 100)),
        (noise_image(60, 100), noise_image(100, 60)),
        (noise_image(90, 90), noise_image(300, 50)),
    )
    encoded = encode(pairs, BUCKETS)
    assert encoded["bucket"][:] == [1, 2, 0]
    rows = [dataset_of(encoded)[(i, i)] for i in range(3)]
    assert [tuple(row["latents_w"].shape) for row in rows] == [(4, 12, 20), (4, 20, 12), (4, 16, 16)]
    assert [tuple(row["latents_l"].shape) for row in rows] == [(4, 12, 20), (4, 20, 12), (4, 16, 16)]
    assert [row["time_ids"].tolist() for row in rows] == [
        [60, 100, 0, 0, 48, 80],
        [100, 60, 0, 0, 80, 48],
        [90, 90, 0, 0, 64, 64],
    ]
    # The square crop of 300 x 50 keeps 50 x 50 of it; the loser of the first pair keeps 60 x 36 of 60 x 100.
    assert encoded["crop_l"][:] == pytest.approx([0.64, 0.64, 5 / 6])


def test_flips_and_crops_are_a_pairs_own_and_the_same_for_both_images(encode):
    images = [(noise_image(100, 64, i), noise_image(100, 64, i + 100)) for i in range(24)]
    plain = encode(pairs_of(*images))
    flipped = encode(pairs_of(*images), random_flip=True)
    is_flipped = [a != b for a, b in zip(plain["latents_w"], flipped["latents_w"])]
    assert 5 < sum(is_flipped) < 19
    assert is_flipped == [a != b for a, b in zip(plain["latents_l"], flipped["latents_l"])]
    reordered = encode(pairs_of(*images[::-1]), random_flip=True)
    assert reordered["latents_w"][::-1] == flipped["latents_w"][:], "a pair's place doesn't matter"

    cropped = encode(pairs_of(*images), random_crop=True)
    lefts = [time_ids[3] for time_ids in cropped["time_ids"]]
    assert min(lefts) < 8 and max(lefts) > 28
    assert encode(pairs_of(*images), random_crop=True, seed=1)["time_ids"][:] != cropped["time_ids"][:]


def test_captions_are_left_out_by_position(encode):
    dataset = dataset_of(encode(pairs_of((noise_image(64, 64), noise_image(64, 64)))), proportion_empty_prompts=0.25)
    empty = [dataset[(position, 0)]["prompt_embeds"].abs().sum().item() == 0 for position in range(400)]
    assert 70 < sum(empty) < 130
    assert empty == [dataset[(position, 0)]["pooled_prompt_embeds"].abs().sum().item() == 0 for position in range(400)]


# ---- The cache ------------------------------------------------------------------------------------------------------


@pytest.fixture
def count_encoded(monkeypatch):
    """Count the images that the VAE encodes: `count_encoded()` returns the number since it was last asked."""
    counts = []
    encode_image = script.encode_image
    monkeypatch.setattr(script, "encode_image", lambda *args: counts.append(1) or encode_image(*args))

    def count() -> int:
        number = len(counts)
        counts.clear()
        return number

    return count


def test_what_is_encoded_is_not_encoded_again_and_a_changed_image_or_caption_is(encode, count_encoded, monkeypatch):
    monkeypatch.setattr(script, "PAIRS_PER_CACHE_FILE", 2)
    images = [(noise_image(64, 64, i), noise_image(64, 64, i + 100)) for i in range(6)]
    first = encode(pairs_of(*images))
    assert count_encoded() == 12
    again = encode(pairs_of(*images))
    assert count_encoded() == 0 and again[:] == first[:]

    images[3] = (images[3][1], images[3][0])
    swapped = encode(pairs_of(*images))
    assert count_encoded() == 4, "only the cache file with the changed pair"
    assert swapped["latents_w"][3] == first["latents_l"][3] and swapped["latents_w"][:3] == first["latents_w"][:3]
    captions = [f"fox {i}" for i in range(5)] + ["cat"]
    assert encode(pairs_of(*images, captions=captions))["prompt_embeds"][5] != first["prompt_embeds"][5]
    assert count_encoded() == 4
    encode(pairs_of(*images), BUCKETS)
    assert count_encoded() == 12


def change_vae_config(model: Path) -> None:
    """Weights fit as before, but normalization groups are others."""
    change_config(model / "vae", norm_num_groups=4)


def change_vae_activation(model: Path) -> None:
    change_config(model / "vae", act_fn="gelu")


def change_vae_weights(model: Path) -> None:
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["encoder.conv_in.weight"] = weights["encoder.conv_in.weight"] * 1.5
    save_file(weights, path)


def change_text_encoder_config(model: Path) -> None:
    change_config(model / "text_encoder", hidden_act="relu")


def change_second_text_encoder_config(model: Path) -> None:
    change_config(model / "text_encoder_2", hidden_act="relu")


def change_tokenizer(model: Path) -> None:
    """Without its merges it splits every word into letters."""
    path = model / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:20]
    path.write_text(json.dumps(content))


def change_pipeline_config(model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = False
    (model / "model_index.json").write_text(json.dumps(index))


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "change",
    [
        change_vae_config,
        change_vae_activation,
        change_vae_weights,
        change_text_encoder_config,
        change_second_text_encoder_config,
        change_tokenizer,
        change_pipeline_config,
    ],
)
def test_a_changed_model_at_the_same_path_never_meets_what_the_old_one_encoded(change, encode, tmp_path):
    model = write_model(tmp_path / "model")
    pairs = pairs_of((noise_image(64, 64), noise_image(64, 64, 1)), captions=[""])
    pairs = datasets.concatenate_datasets([pairs, pairs_of((noise_image(64, 64), noise_image(64, 64, 1)))])
    old = encode(pairs, model=model)
    change(model)
    new = encode(pairs, model=model)
    for file in tmp_path.glob("*.arrow"):
        file.unlink()
    expected = encode(pairs, model=model)
    assert new[:] == expected[:]
    assert new[:] != old[:]


@pytest.mark.parametrize("damage", ["truncated", "empty", "deleted"])
def test_a_damaged_cache_file_is_encoded_again(damage, encode, tmp_path, caplog):
    pairs = pairs_of((noise_image(64, 64), noise_image(64, 64, 1)))
    whole = encode(pairs)[:]
    (file,) = tmp_path.glob("*.arrow")
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:1000] if damage == "truncated" else b"")
    assert encode(pairs)[:] == whole
    if damage != "deleted":
        assert f"{file}: is damaged" in caplog.text


def test_a_kill_loses_only_the_cache_file_that_was_being_written(encode, count_encoded, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "PAIRS_PER_CACHE_FILE", 2)
    pairs = pairs_of(*[(noise_image(64, 64, i), noise_image(64, 64, i + 100)) for i in range(6)])
    counting = script.encode_image
    monkeypatch.setattr(
        script, "encode_image", lambda *args: counting(*args) if len(list(tmp_path.glob("*.arrow"))) < 2 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        encode(pairs)
    assert count_encoded() == 8 and len(list(tmp_path.glob("*.arrow"))) == 2
    monkeypatch.setattr(script, "encode_image", counting)
    assert len(encode(pairs)) == 6
    assert count_encoded() == 4


def test_images_that_cannot_be_read_are_left_out_and_named(encode, caplog, tmp_path):
    images = [(noise_image(8, 8, i), noise_image(8, 8, i + 500)) for i in range(101)]
    rows = pairs_of(*images).to_list()
    rows[7]["image_l"] = b"no image"
    encoded = encode(datasets.Dataset.from_list(rows))
    assert sum(bucket == 0 for bucket in encoded["bucket"]) == 100 and encoded["bucket"][7] == -1
    assert "The pair with the caption 'fox 7' is left out: UnidentifiedImageError" in caplog.text
    assert "1 of 101 pairs have an image that can't be read; they are left out." in caplog.text
    (tmp_path / "w.png").write_bytes(image_bytes(images[8][0])[:60])
    rows[8]["image_w"] = image_bytes(images[8][0])[:60]
    with pytest.raises(ValueError, match="2 of 101 pairs have an image that can't be read, which is more than 1 %"):
        encode(datasets.Dataset.from_list(rows))


def test_a_missing_file_is_named_and_read_once_it_is_there(encode, tmp_path):
    (tmp_path / "l.png").write_bytes(image_bytes(noise_image(64, 64)))
    row = {"caption": "fox", "image_w": str(tmp_path / "w.png"), "image_l": str(tmp_path / "l.png")}
    with pytest.raises(ValueError, match=r"FileNotFoundError.*w\.png"):
        encode(datasets.Dataset.from_list([row]))
    (tmp_path / "w.png").write_bytes(image_bytes(noise_image(64, 64)))
    assert encode(datasets.Dataset.from_list([row]))["bucket"][:] == [0]


def test_only_the_pairs_that_the_run_draws_are_encoded(train, count_encoded, tmp_path):
    train(f"--cache_dir={tmp_path}", "--train_batch_size=2", "--max_train_steps=3")
    assert count_encoded() == 12
    train(f"--cache_dir={tmp_path}", "--train_batch_size=2", "--max_train_steps=4", output_dir="longer")
    assert count_encoded() == 16


# ---- The order ------------------------------------------------------------------------------------------------------


def draw(count: int, num_pairs: int, batch_size: int, buckets=None, seed=0):
    buckets = np.zeros(num_pairs, dtype=int) if buckets is None else np.array(buckets)
    first_epoch = np.random.default_rng(seed).permutation(num_pairs)
    return list(itertools.islice(script.draw_batches(first_epoch, buckets, batch_size, seed), count))


def test_every_pair_is_drawn_once_in_each_epoch_whatever_the_batch_size():
    fours = list(itertools.chain(*draw(6, 8, 4)))
    twos = list(itertools.chain(*draw(12, 8, 2)))
    assert fours == twos
    assert [position for position, _ in fours] == list(range(24))
    epochs = [[index for _, index in fours[start : start + 8]] for start in (0, 8, 16)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(itertools.chain(*draw(6, 8, 4, seed=1))) != fours


def test_a_batch_is_of_one_bucket_and_no_pair_is_drawn_twice_before_all_were_drawn():
    buckets = [0] * 21 + [1] * 8 + [2] * 3
    batches = draw(60, 32, 4, buckets)
    for batch in batches:
        assert len({buckets[index] for _, index in batch}) == 1
    drawn = Counter(index for batch in batches for _, index in batch)
    assert sum(drawn.values()) == 240
    assert max(drawn.values()) - min(drawn[index] for index in range(32)) <= 2
    positions = [position for batch in batches for position, _ in batch]
    assert len(set(positions)) == 240 and max(positions) < 240 + 3 * 3


def test_pairs_that_cannot_be_read_are_never_drawn():
    batches = draw(20, 8, 4, [0, 0, -1, 0, 0, 0, 0, -1])
    assert {index for batch in batches for _, index in batch} == {0, 1, 3, 4, 5, 6}
    assert [position for batch in batches for position, _ in batch] == list(range(80))


def test_a_run_on_a_folder_of_mixed_shapes(train, tmp_path, caplog, monkeypatch):
    """Portrait, landscape, square and a panorama, in batches of one shape."""
    sizes = [(60, 100)] * 5 + [(100, 60)] * 4 + [(80, 80)] * 6 + [(400, 60)]
    for side in "wl":
        (tmp_path / "pairs" / side).mkdir(parents=True)
    for i, size in enumerate(sizes):
        noise_image(*size, i).save(tmp_path / "pairs" / "w" / f"{i}.png")
        noise_image(*size, i + 100).save(tmp_path / "pairs" / "l" / f"{i}.png")
        (tmp_path / "pairs" / f"{i}.txt").write_text(f"fox {i}")
    shapes = []
    compute_loss = script.compute_loss
    monkeypatch.setattr(
        script,
        "compute_loss",
        lambda unet, batch, *rest: shapes.append(batch["latents_w"].shape) or compute_loss(unet, batch, *rest),
    )
    flags = [f"--dataset_name={tmp_path / 'pairs'}", "--use_aspect_ratio_buckets", "--train_batch_size=2"]
    with caplog.at_level(logging.INFO, logger="train_diffusion_mapo_sdxl"):
        train(*flags, "--max_train_steps=8", "--aspect_ratio_buckets=64,64;48,80;80,48;32,128")
    assert "Bucket 48 x 80: 4 pairs" in caplog.text and "Bucket 80 x 48: 5 pairs" in caplog.text
    assert "Bucket 64 x 64: 6 pairs" in caplog.text and "Bucket 32 x 128: 1 pairs" in caplog.text
    assert "Cropping removes 2.5% of the chosen images and 2.5% of the rejected ones" in caplog.text
    assert set(shapes) <= {(2, 4, 16, 16), (2, 4, 12, 20), (2, 4, 20, 12), (2, 4, 8, 32)} and len(set(shapes)) == 3

"""Preference pairs from every kind of source, and images from every kind of file."""

import io
import json
import os
import tarfile
import tracemalloc

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import image_bytes
from PIL import Image, ImageCms, PngImagePlugin
from small_model import PAIRS, write_pairs
from train_diffusion_mapo_sdxl import load_image, load_pairs, read_text, resize_and_crop


def demo_rows() -> list[dict]:
    return pq.read_table(PAIRS / "train.parquet").slice(0, 4).to_pylist()


def images_of(pairs: datasets.Dataset) -> list[tuple[bytes, bytes]]:
    return [(load_image(row["image_w"]).tobytes(), load_image(row["image_l"]).tobytes()) for row in pairs]


def write_folders(path) -> str:
    """Write the demo's first pairs as w/NAME.png, l/NAME.png and NAME.txt."""
    for side in "wl":
        (path / side).mkdir(parents=True)
    for i, row in enumerate(demo_rows()):
        won, lost = ("jpg_0", "jpg_1") if row["label_0"] == 1.0 else ("jpg_1", "jpg_0")
        (path / "w" / f"{i}.png").write_bytes(row[won])
        (path / "l" / f"{i}.png").write_bytes(row[lost])
        (path / f"{i}.txt").write_text(row["caption"] + "\n")
    return str(path)


def write_webdataset(path) -> str:
    with tarfile.open(path / "0.tar", "w") as tar:
        for i, row in enumerate(demo_rows()):
            members = {
                "jpg_0.jpg": row["jpg_0"],
                "jpg_1.jpg": row["jpg_1"],
                "original_prompt.txt": row["caption"].encode(),
                "label_0.txt": str(row["label_0"]).encode(),
            }
            for name, data in members.items():
                info = tarfile.TarInfo(f"{i:04d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path / "0.tar")


def write_layout(kind: str, path) -> tuple[str, dict]:
    """Write the same four pairs as another data set has them. Returns arguments for `load_pairs`."""
    if kind == "folders":
        return write_folders(path), {}
    if kind == "webdataset":
        return write_webdataset(path), {}
    rows = demo_rows()
    won = [row["label_0"] == 1.0 for row in rows]
    captions = [row["caption"] for row in rows]
    images_0 = [row["jpg_0"] for row in rows]
    images_1 = [row["jpg_1"] for row in rows]
    chosen = [row["jpg_0"] if w else row["jpg_1"] for row, w in zip(rows, won)]
    rejected = [row["jpg_1"] if w else row["jpg_0"] for row, w in zip(rows, won)]
    if kind in ("jsonl", "csv"):
        lines = []
        for i in range(4):
            (path / f"{i}w.webp").write_bytes(chosen[i])
            (path / f"{i}l.webp").write_bytes(rejected[i])
            lines.append({"prompt": captions[i], "path1": f"{i}w.webp", "path2": f"{i}l.webp"})
        if kind == "jsonl":
            (path / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        else:
            text = "\n".join(f'"{line["prompt"]}",{line["path1"]},{line["path2"]}' for line in lines)
            (path / "pairs.csv").write_text("prompt,path1,path2\n" + text)
        return str(path / f"pairs.{kind}"), {}
    if kind == "open-image-preferences":
        table = {
            "prompt": captions,
            "chosen": [{"bytes": data, "path": None} for data in chosen],
            "rejected": [{"bytes": data, "path": None} for data in rejected],
        }
        features = datasets.Features(
            {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
        )
        datasets.Dataset.from_dict(table, features=features).to_parquet(path / "p.parquet")
        return str(path / "p.parquet"), {}
    if kind == "saved to disk":
        table = {"caption": captions, "chosen": chosen, "rejected": rejected}
        datasets.Dataset.from_dict(table).save_to_disk(path / "saved")
        return str(path / "saved"), {}
    options = {}
    if kind == "Rapidata":
        table = {"prompt": captions, "image1": images_0, "image2": images_1}
        table["votes_image1"] = [9 if w else 3 for w in won]
        table["votes_image2"] = [3 if w else 9 for w in won]
    elif kind == "integer labels":
        table = {"caption": captions, "jpg_0": images_0, "jpg_1": images_1}
        table["label_0"] = [int(w) for w in won]
        table["label_1"] = [int(not w) for w in won]
    elif kind == "own columns":
        table = {"words": captions, "good": chosen, "bad": rejected}
        options = {"caption_column": "words", "chosen_column": "good", "rejected_column": "bad"}
    else:
        table = {"words": captions, "a": images_0, "b": images_1}
        table["score_a"] = [0.2 if w else -0.3 for w in won]
        table["score_b"] = [-0.1 if w else 0.4 for w in won]
        options = {"caption_column": "words", "image_0_column": "a", "image_1_column": "b"}
        options |= {"label_0_column": "score_a", "label_1_column": "score_b"}
    pq.write_table(pa.table(table), path / "p.parquet")
    return str(path / "p.parquet"), options


LAYOUTS = [
    "folders",
    "webdataset",
    "jsonl",
    "csv",
    "open-image-preferences",
    "saved to disk",
    "Rapidata",
    "integer labels",
    "own columns",
    "scored",
]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_gives_the_same_winners_and_losers(kind, tmp_path):
    dataset, options = write_layout(kind, tmp_path)

    pairs = load_pairs(dataset, **options)

    assert pairs.column_names == ["caption", "image_w", "image_l"]
    assert pairs["caption"][:] == [row["caption"] for row in demo_rows()]
    for row, images in zip(demo_rows(), images_of(pairs)):
        won, lost = ("jpg_0", "jpg_1") if row["label_0"] == 1.0 else ("jpg_1", "jpg_0")
        assert images == (load_image(row[won]).tobytes(), load_image(row[lost]).tobytes())


@pytest.mark.parametrize("kind", ["Rapidata", "webdataset", "jsonl"])
def test_a_stream_gives_the_pairs_of_the_table(kind, tmp_path):
    dataset, options = write_layout(kind, tmp_path)
    table = load_pairs(dataset, **options)

    stream = load_pairs(dataset, **options, streaming=True, stream_file=tmp_path / "s.arrow", max_pairs=9)
    assert sorted(zip(stream["caption"], images_of(stream))) == sorted(zip(table["caption"], images_of(table)))

    first = load_pairs(dataset, **options, streaming=True, stream_file=tmp_path / "t.arrow", max_pairs=2)
    assert first["caption"][:] == stream["caption"][:2]


def test_labels_decide_and_ties_and_unlabelled_rows_are_left_out(tmp_path):
    labels = [1.0, 0.0, 0.5, 1.0, None, 0.0, 0.7, 0.2]
    has_label = [True, True, True, False, True, True, True, True]
    path = write_pairs(tmp_path / "p.parquet", label_0=labels, label_1=None, has_label=has_label)
    source = pq.read_table(path).to_pylist()

    pairs = load_pairs(str(path))

    kept = [0, 1, 5, 6, 7]
    assert pairs["caption"][:] == [source[i]["caption"] for i in kept]
    assert pairs["image_w"][:] == [source[i]["jpg_0" if labels[i] > 0.5 else "jpg_1"] for i in kept]
    assert pairs["image_l"][:] == [source[i]["jpg_1" if labels[i] > 0.5 else "jpg_0"] for i in kept]


@pytest.mark.parametrize("votes", [(None, 3), (3, None), (None, None)])
def test_a_vote_that_is_missing_on_either_side_is_no_preference(votes, tmp_path):
    labels = {"label_0": [votes[0]] + [5.0] * 7, "label_1": [votes[1]] + [2.0] * 7}
    path = write_pairs(tmp_path / "p.parquet", **labels)
    pairs = load_pairs(
        str(path), image_0_column="jpg_0", image_1_column="jpg_1", label_0_column="label_0", label_1_column="label_1"
    )
    assert len(pairs) == 7


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"caption": None}, {}, "don't match any known data set"),
        ({"label_0": [3.0] * 8}, {}, "label_0: has values outside 0 to 1"),
        ({"label_0": ["left"] * 8}, {}, "'left' isn't a label"),
        ({"label_0": [0.5] * 8}, {}, "no row of 'train' has a label that decides"),
        ({"caption": ["fox"] * 7 + [None]}, {}, "a caption is None, in pair 7"),
        ({}, {"caption_column": "words"}, "has no column 'words'"),
        ({}, {"chosen_column": "jpg_0", "rejected_column": "jpg_0"}, "two different columns"),
        ({}, {"split": "test"}, "has a single split, 'train', and no 'test'"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(changes, options, message, tmp_path):
    path = write_pairs(tmp_path / "p.parquet", **changes)
    with pytest.raises(ValueError, match=message):
        load_pairs(str(path), **options)


def test_a_split_that_a_folder_of_pairs_does_not_have_is_refused(tmp_path):
    folders = write_folders(tmp_path / "pairs")
    assert len(load_pairs(folders)) == 4
    with pytest.raises(ValueError, match="single split"):
        load_pairs(folders, "validation")


def test_a_slice_of_a_single_file(tmp_path):
    path = write_pairs(tmp_path / "p.parquet")
    assert len(load_pairs(str(path), "train[:3]")) == 3


def test_captions_that_look_like_numbers_or_nothing_stay_text(tmp_path):
    captions = ["None", "NA", "0123", "", "a\u2028b\u0085c"]
    lines = ["caption,chosen,rejected"] + [f'"{caption}",w.png,l.png' for caption in captions]
    (tmp_path / "p.csv").write_text("\n".join(lines), encoding="utf-8")
    assert load_pairs(str(tmp_path / "p.csv"))["caption"][:] == captions

    rows = [{"caption": caption, "chosen": "w.png", "rejected": "l.png"} for caption in captions]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert load_pairs(str(tmp_path / "p.jsonl"))["caption"][:] == captions


def test_swapped_labels_under_the_same_fingerprint_are_noticed(tmp_path):
    """`datasets` gives two data sets that one generator has made the same fingerprint."""
    for name in ("w.png", "l.png"):
        (tmp_path / name).write_bytes(b"")
    labels = [1.0, 0.0]

    def generate():
        for label in labels:
            yield {
                "caption": "fox",
                "jpg_0": str(tmp_path / "w.png"),
                "jpg_1": str(tmp_path / "l.png"),
                "label_0": label,
            }

    winners = []
    for name in ("one", "other"):
        made = datasets.Dataset.from_generator(generate, cache_dir=str(tmp_path / name), fingerprint="same")
        made.save_to_disk(tmp_path / "saved")
        winners.append(load_pairs(str(tmp_path / "saved"))["image_w"][:])
        labels.reverse()
    assert winners[0] == winners[1][::-1]


def test_paths_start_at_the_tables_folder_or_at_image_root(tmp_path):
    rows = [{"prompt": "fox", "path1": "a/w.png", "path2": str(tmp_path / "elsewhere" / "l.png")}]
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "p.jsonl").write_text(json.dumps(rows[0]))
    (pair,) = load_pairs(str(tmp_path / "table" / "p.jsonl"))
    assert pair["image_w"] == str(tmp_path / "table" / "a" / "w.png")
    assert pair["image_l"] == str(tmp_path / "elsewhere" / "l.png")
    with pytest.raises(ValueError, match="path outside --image_root"):
        load_pairs(str(tmp_path / "table" / "p.jsonl"), image_root=str(tmp_path / "table"))
    os.symlink(tmp_path / "elsewhere", tmp_path / "table" / "link")  # as in the hub's snapshots
    rows[0]["path2"] = "link/l.png"
    (tmp_path / "table" / "p.jsonl").write_text(json.dumps(rows[0]))
    (pair,) = load_pairs(str(tmp_path / "table" / "p.jsonl"), image_root=str(tmp_path / "table"))
    assert pair["image_l"] == str(tmp_path / "table" / "link" / "l.png")


def test_folders_of_pairs_as_people_have_them(tmp_path, caplog):
    folder = tmp_path / "pairs"
    write_folders(folder)
    (folder / "w" / ".ipynb_checkpoints").mkdir()
    (folder / "w" / "0.png").rename(folder / "w" / "0.JPG")
    (folder / "w" / "Thumbs.db").write_bytes(b"x")
    (folder / "0.txt").rename(folder / "w" / "0.txt")
    (folder / "1.txt").rename(folder / "1.caption")
    (folder / "2.txt").write_bytes("füchse".encode("utf-16"))
    pairs = load_pairs(str(folder))
    assert pairs["caption"][:] == [
        demo_rows()[0]["caption"],
        demo_rows()[1]["caption"],
        "füchse",
        demo_rows()[3]["caption"],
    ]
    assert "1 files aren't images that can be read: w/Thumbs.db" in caplog.text

    (folder / "l" / "3.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="has the same name; delete or rename one of the two"):
        load_pairs(str(folder))
    (folder / "l" / "3.jpg").unlink()
    (folder / "l" / "3.png").unlink()
    with pytest.raises(ValueError, match="1 images have no partner in the other folder: 3"):
        load_pairs(str(folder))
    (folder / "w" / "3.png").unlink()
    (folder / "1.caption").unlink()
    with pytest.raises(FileNotFoundError, match="1 has no caption; write it to"):
        load_pairs(str(folder))


def test_a_caption_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("füchse".encode("cp1252"))
    with pytest.raises(ValueError, match="a.txt: isn't UTF-8.*save it as UTF-8"):
        read_text(tmp_path / "a.txt")


def test_images_are_loaded_as_people_see_them():
    assert load_image(image_bytes(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(image_bytes(Image.new("RGBA", (4, 4), (255, 0, 0, 128)))).getpixel((0, 0)) == (255, 127, 127)
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([0, 0, 0] * 3 + [10, 200, 30])
    assert load_image(image_bytes(palette)).getpixel((0, 0)) == (10, 200, 30)
    palette.info["transparency"] = 3
    assert load_image(image_bytes(palette, "PNG", transparency=3)).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert load_image(image_bytes(Image.new("RGB", (6, 4)), "JPEG", exif=exif)).size == (4, 6)
    assert load_image(image_bytes(Image.new("L", (4, 4), 128))).getpixel((0, 0)) == (128, 128, 128)
    red, green, blue = load_image(image_bytes(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF")).getpixel((0, 0))
    assert red > 200 and green < 80 and blue < 80


def test_sixteen_bit_images_keep_their_tones_and_those_of_32_bits_are_refused():
    tones = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert [load_image(image_bytes(tones)).getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]
    with pytest.raises(ValueError, match="32 bits per channel"):
        load_image(image_bytes(Image.new("F", (2, 2)), "TIFF"))


def display_p3_profile() -> bytes:
    """Make a profile with Display P3's red, green and blue out of sRGB's, which has sRGB's curve already."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.51512, 0.2412, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.1571, 0.06657, 0.78407),
    }
    for tag, xyz in primaries.items():
        entry = profile.index(tag)
        offset = int.from_bytes(profile[entry + 4 : entry + 8], "big") + 8
        for i, value in enumerate(xyz):
            profile[offset + 4 * i : offset + 4 * i + 4] = round(value * 65536).to_bytes(4, "big", signed=True)
    return bytes(profile)


def test_colors_of_a_profile_become_those_of_srgb():
    """A phone's Display P3: the pixel 201,60,50 is 219,41,39 in sRGB."""
    for mode, color in (("RGB", (201, 60, 50)), ("RGBA", (201, 60, 50, 255))):
        data = image_bytes(Image.new(mode, (4, 4), color), icc_profile=display_p3_profile())
        assert np.abs(np.subtract(load_image(data).getpixel((0, 0)), (219, 41, 39))).max() <= 2
    plain = image_bytes(Image.new("RGB", (4, 4), (201, 60, 50)))
    assert load_image(plain).getpixel((0, 0)) == (201, 60, 50)


def test_a_color_profile_that_is_broken_is_passed_over(caplog):
    data = image_bytes(Image.new("RGB", (4, 4), (201, 60, 50)), icc_profile=b"nonsense")
    assert load_image(data).getpixel((0, 0)) == (201, 60, 50)
    assert "color profile that can't be read" in caplog.text


def test_large_texts_and_large_photos_are_no_attack():
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    assert load_image(image_bytes(Image.new("RGB", (2, 2), "red"), pnginfo=text)).size == (2, 2)
    assert Image.MAX_IMAGE_PIXELS > 200_000_000


@pytest.mark.parametrize("size", [(20, 20000), (20000, 2), (7, 5000), (640, 480), (33, 41)])
@pytest.mark.parametrize("bucket", [(64, 64), (48, 80)])
def test_only_the_crop_is_resized(size, bucket):
    """It equals the same crop of the image that is resized as a whole, but a thin image doesn't take all memory."""
    width, height = size
    rows, columns = np.mgrid[:height, :width]
    waves = 127 + 60 * np.sin(rows / 3) + 60 * np.cos(columns / 2)  # stays within what the filter may overshoot
    image = Image.fromarray(waves.astype(np.uint8)).convert("RGB")
    tracemalloc.start()
    pixels, time_ids = resize_and_crop(image, *bucket, crop=(0.3, 0.75))
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()

    top, left = time_ids[2:4]
    assert time_ids == [height, width, top, left, *bucket]
    if max(size) > 5000:
        return
    scale = max(bucket[0] / height, bucket[1] / width)
    whole = image.resize(
        (max(bucket[1], round(width * scale)), max(bucket[0], round(height * scale))), Image.Resampling.LANCZOS
    )
    expected = np.asarray(whole.crop((left, top, left + bucket[1], top + bucket[0]))).astype(float)
    assert np.abs((pixels.permute(1, 2, 0).numpy() + 1) * 127.5 - expected).max() <= 1.1


def test_a_flip_mirrors_the_pixels_and_the_crop():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (40, 100, 3), dtype=np.uint8))
    pixels, time_ids = resize_and_crop(image, 40, 40, crop=(0.5, 0.25))
    flipped, flipped_ids = resize_and_crop(image, 40, 40, crop=(0.5, 0.25), flip=True)
    assert torch.equal(flipped, pixels.flip(2))
    assert time_ids[3] == 15 and flipped_ids[3] == 45  # of the mirrored image

"""Rows of pictures: files that are read, wrong ones, and the message for each before anything heavy is loaded."""

from __future__ import annotations

import json
import struct
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from tiny_pipeline import picture_recipe, pixel_pipeline, write_pictures

from dynlora_cli.commands import preflight
from dynlora_cli.config.load import load_recipe
from dynlora_cli.data.batches import Batches
from dynlora_cli.errors import DataError, MachineError, UsageError
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.pipelines import find
from dynlora_cli.training.setup import read_data


def data_of(folder, source, *overrides):
    recipe = picture_recipe(
        folder, f"dataset.train.0.path={source}", "dataset.val_size=0", "eval.steps=null", *overrides
    )
    return read_data(recipe, BaseFiles.find(recipe.model))


def rows_file(folder, *rows):
    path = folder / "pictures" / "other.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_one_set_in_every_form(tmp_path):
    rows = write_pictures(tmp_path / "pictures", count=3)
    wanted = data_of(tmp_path, rows)
    folder = tmp_path / "folder"
    folder.mkdir()
    stored = []
    for line in map(json.loads, rows.read_text().splitlines()):
        content = (rows.parent / line["image"]).read_bytes()
        (folder / line["image"]).write_bytes(content)
        (folder / line["image"]).with_suffix(".txt").write_text(f"{line['text']}\n")
        stored.append({"image": {"bytes": content, "path": line["image"]}, "caption": line["text"]})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(stored), tmp_path / "rows.parquet")
    as_named = [{"file_name": f"{n}.png", "prompt": row["caption"]} for n, row in enumerate(stored)]
    for source in (folder, tmp_path / "rows.parquet", rows_file(tmp_path, *as_named)):
        found = data_of(tmp_path, source)
        assert [(one.caption, one.picture.digest) for one in found.train] == [
            (one.caption, one.picture.digest) for one in wanted.train
        ]
        assert found.sha256 == wanted.sha256


def test_what_the_model_is_shown(tmp_path):
    """The middle of an upright picture on white, in the size that the model draws."""
    write_pictures(tmp_path / "pictures", count=1)
    pixels = np.zeros((16, 32, 4), np.uint8)
    pixels[:, 8:24] = (200, 100, 50, 255)  # the square in the middle, beside which all is transparent
    Image.fromarray(pixels).save(tmp_path / "pictures" / "wide.png")
    sideways = Image.fromarray(np.full((16, 16, 3), 90, np.uint8))
    sideways.putpixel((0, 0), (255, 0, 0))
    exif = sideways.getexif()
    exif[0x0112] = 3  # upside down
    sideways.save(tmp_path / "pictures" / "turned.png", exif=exif)
    Image.fromarray(np.full((16, 16), 90 * 256, np.uint16)).save(tmp_path / "pictures" / "deep.png")  # 16 bits of grey
    names = ("wide", "turned", "deep")
    rows = rows_file(tmp_path, *({"image": f"{name}.png", "text": name} for name in names))
    data = data_of(tmp_path, rows, "model.flip=true")
    batches = Batches.in_order(data.train, micro_batch_size=3, max_length=64, pad_id=0)
    first, second, third = batches.step(0, 0)[0].extra["latents_BCHW"]
    assert ((first + 1) * 127.5).round()[:, 0, 0].tolist() == [200, 100, 50]
    assert ((second + 1) * 127.5).round()[:, 15, 15].tolist() == [255, 0, 0]
    assert ((third + 1) * 127.5).round().unique().tolist() == [90]


def test_timesteps_follow_from_the_row_and_the_pass(tmp_path):
    data = data_of(tmp_path, write_pictures(tmp_path / "pictures"), "model.flip=true")

    def seen(size, epoch):
        rows = Batches(data.train, micro_batch_size=size, max_length=64, pad_id=0, seed=3)
        batches = [batch for index in range(rows.steps_per_epoch) for batch in rows.step(epoch, index)]
        names = ("timestep_B", "noise_BCHW", "dropped_B", "shown_BCHW")
        return {
            row: [batch.extra[name][at].flatten().tolist() for name in names]
            for batch in batches
            for at, row in enumerate(batch.rows)
        }

    assert seen(2, 0) == seen(5, 0)
    one, two = seen(2, 0), seen(2, 1)
    assert all(one[row][0] != two[row][0] for row in one)


def huge_png():
    """A picture of 1.6 thousand million pixels in a file of a few bytes."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("no.png", "no.png is not there"),
        ("cut.png", "cut.png is damaged"),
        ("text.png", "text.png is no picture in PNG"),
        ("huge.png", "huge.png has more than 134 million pixels"),
        ("../outside.png", "lies outside"),
        ("/etc/hostname", "lies outside"),
        ("link.png", "lies outside"),
        (7, "column 'image' names no picture"),
        ("a\0.png", "is no name of a picture"),
        (1001 * "x", "is no name of a picture"),
        (300 * "x", "cannot be opened: File name too long"),
    ],
)
def test_wrong_pictures_are_named_with_their_row(tmp_path, image, says):
    folder = write_pictures(tmp_path / "pictures", count=2).parent
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:300])
    (folder / "text.png").write_text("hello")
    (folder / "huge.png").write_bytes(huge_png())
    (tmp_path / "outside.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    rows = rows_file(tmp_path, {"image": "0.png", "text": "a"}, {"image": image, "text": "b"})
    with pytest.raises(DataError, match=rf"other\.jsonl:2: .*{says}"):
        data_of(tmp_path, rows)


def test_what_a_folder_lacks_is_said(tmp_path):
    """Pictures without a caption, and captions whose picture is missing or of a kind that is not read."""
    folder = tmp_path / "dog"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.gif"):
        Image.new("RGB", (16, 16)).save(folder / name)
    (folder / "a.txt").write_text("a dog")
    (folder / "c.txt").write_text("a cat")
    notes = data_of(tmp_path, folder, "model.caption=a thing").notes
    assert any("2 pictures, 1 with its caption" in note for note in notes)
    assert any("left out: c.txt, beside which there is no .bmp, .jpeg" in note for note in notes)


def test_a_caption_that_is_a_link_out_of_the_folder_is_not_read(tmp_path):
    folder = tmp_path / "dog"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "a.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(DataError, match=r"a\.txt is a link out of"):
        data_of(tmp_path, folder)


def test_a_row_with_two_captions_is_asked_about(tmp_path):
    write_pictures(tmp_path / "pictures", count=2)
    row = {"image": "0.png", "text": "a box"}
    rows = rows_file(tmp_path, row, {"image": "1.png", "text": "a box", "prompt": "a cat"})
    with pytest.raises(DataError, match=r":2: .*'text', 'prompt' could each be its caption.*ignore: \[prompt\]"):
        data_of(tmp_path, rows)
    same = rows_file(tmp_path, row, {"image": "1.png", "text": "a cat", "prompt": "a cat"})
    assert [one.caption for one in data_of(tmp_path, same).train] == ["a box", "a cat"]


def test_captions_that_are_missing(tmp_path):
    write_pictures(tmp_path / "pictures", count=2)
    rows = rows_file(tmp_path, {"image": "0.png", "text": " "}, {"image": "1.png", "text": "a box"})
    with pytest.raises(DataError, match=r"other\.jsonl:1: the picture has no caption"):
        data_of(tmp_path, rows)
    found = data_of(tmp_path, rows, "model.caption=a photo of sks")
    assert [one.caption for one in found.train] == ["a photo of sks", "a box"]


def test_pipelines_that_are_refused_before_torch(tmp_path, monkeypatch):
    base = pixel_pipeline(tmp_path)
    recipe = picture_recipe(tmp_path)
    index = json.loads((base / "model_index.json").read_text())

    def refused(error, says, **changes):
        (base / "model_index.json").write_text(json.dumps(index | changes))
        with pytest.raises(error, match=says):
            preflight.training(recipe, writes=False)

    refused(UsageError, "the class 'KandinskyPipeline' is not trained here", _class_name="KandinskyPipeline")
    refused(UsageError, "of diffusers or transformers; it was not loaded", vae=["my_code", "Vae"])
    monkeypatch.setattr(find.importlib.util, "find_spec", lambda name: None if name == "diffusers" else object())
    refused(MachineError, "not installed: diffusers")
    monkeypatch.undo()
    with pytest.raises(UsageError, match="holds a pipeline of diffusers"):
        find_as_text(base)
    (base / "model_index.json").unlink()
    with pytest.raises(UsageError, match=r"holds no model_index\.json"):
        preflight.training(recipe, writes=False)


def find_as_text(base):
    path = base.parent / "text.yaml"
    path.write_text(json.dumps({"model": str(base), "dataset": "builtin:stdlib-docs"}))
    preflight.training(load_recipe(path), writes=False)


def test_a_resolution_that_the_layers_cannot_halve(tmp_path):
    rows = write_pictures(tmp_path / "pictures")
    with pytest.raises(UsageError, match="15 is no multiple of 2"):
        data_of(tmp_path, rows, "model.resolution=15")

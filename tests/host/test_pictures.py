"""Picture files of every kind against what they were made of, and against the host's own Load Image."""

import os
import struct
import zlib

import families  # noqa: F401  the host comes first
import folder_paths
import nodes
import numpy
import pytest
import torch
from PIL import Image

from hywu_core.errors import ConfigError
from hywu_core.host import pictures

HEIGHT, WIDTH = 37, 50
RAMP = numpy.linspace(0, 1, WIDTH)[None].repeat(HEIGHT, 0)
RGB = numpy.stack([RAMP, RAMP[:, ::-1], 0 * RAMP + 0.5], -1)
BASE = Image.fromarray((RGB * 255).round().astype(numpy.uint8))
GREY = numpy.stack([RAMP] * 3, -1)
LUMA = RGB @ (0.299, 0.587, 0.114)
EXACT, LOSSY = 0.006, 0.04  # a level of 8 bits and its rounding; what JPEG makes of a ramp
PLACED = {1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.transpose(1, 0, 2), 6: numpy.rot90(RGB, -1),
          7: RGB[::-1, ::-1].transpose(1, 0, 2), 8: numpy.rot90(RGB, 1)}  # fmt: skip


def png16(path, values):
    """Pillow writes 16 bits for grey only."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, {3: 2, 4: 6}[values.shape[2]], 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def saved(path, image, **options):
    image.save(path, **options)


def with_orientation(orientation):
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = orientation
    return {"exif": exif}


KINDS = {
    "8 bit.png": (lambda p: saved(p, BASE), RGB, EXACT),
    "rgb.jpg": (lambda p: saved(p, BASE, quality=95), RGB, LOSSY),
    "progressive.jpg": (lambda p: saved(p, BASE, progressive=True, quality=95), RGB, LOSSY),
    "lossless.webp": (lambda p: saved(p, BASE, lossless=True), RGB, EXACT),
    "lossy.webp": (lambda p: saved(p, BASE, quality=95), RGB, LOSSY),
    "rgb.bmp": (lambda p: saved(p, BASE), RGB, EXACT),
    "rgb.tif": (lambda p: saved(p, BASE), RGB, EXACT),
    "16 bit.png": (lambda p: png16(p, RGB * 65535), RGB, 6e-4),
    "16 bit grey.png": (lambda p: saved(p, Image.fromarray((RAMP * 65535).astype(numpy.uint16))), GREY, 1e-4),
    "16 bit grey.tif": (lambda p: saved(p, Image.fromarray((RAMP * 65535).astype(numpy.uint16))), GREY, 1e-4),
    "32 bit.tif": (lambda p: saved(p, Image.fromarray((RAMP * 65535).astype(numpy.int32))), GREY, 1e-4),
    "float.tif": (lambda p: saved(p, Image.fromarray(RAMP.astype(numpy.float32))), GREY, 1e-6),
    "cmyk.jpg": (lambda p: saved(p, BASE.convert("CMYK"), quality=95), RGB, LOSSY),
    "cmyk.tif": (lambda p: saved(p, BASE.convert("CMYK")), RGB, 0.012),
    "palette.png": (lambda p: saved(p, BASE.quantize(256)), RGB, EXACT),
    "one.gif": (lambda p: saved(p, BASE.quantize(256)), RGB, EXACT),
    "grey.png": (lambda p: saved(p, BASE.convert("L")), LUMA[..., None].repeat(3, -1), EXACT),
    "grey.jpg": (lambda p: saved(p, BASE.convert("L"), quality=95), LUMA[..., None].repeat(3, -1), LOSSY),
    "bits.png": (lambda p: saved(p, Image.fromarray(RAMP > 0.5)), (GREY > 0.5).astype(float), EXACT),
}
NOT_BY_THE_HOST = {"32 bit.tif", "float.tif"}  # Load Image shows them as white


@pytest.mark.parametrize("name", KINDS)
def test_a_picture_is_what_it_was_made_of_and_what_load_image_shows(tmp_path, monkeypatch, name):
    write, expected, tolerance = KINDS[name]
    write(tmp_path / name)
    facts, found = pictures.look(tmp_path / name), pictures.read(tmp_path / name)
    assert (facts.width, facts.height, facts.transparent) == (WIDTH, HEIGHT, False)
    assert found.dtype == torch.float32 and found.shape == (1, HEIGHT, WIDTH, 3)
    assert float((found[0] - torch.tensor(expected.copy()).float()).abs().max()) <= tolerance
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    shown, _ = nodes.LoadImage().load_image(name)
    assert torch.equal(shown, found) == (name not in NOT_BY_THE_HOST)


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", PLACED)
def test_every_orientation_of_exif(tmp_path, ending, orientation):
    path = tmp_path / f"turned.{ending}"
    options = {"quality": 100, "subsampling": 0} if ending == "jpg" else {"lossless": True} if ending == "webp" else {}
    BASE.save(path, **options, **with_orientation(orientation))
    expected = torch.tensor(PLACED[orientation].copy()).float()
    facts, found = pictures.look(path), pictures.read(path)[0]
    assert (facts.height, facts.width) == expected.shape[:2]
    assert float((found - expected).abs().max()) <= (LOSSY if ending == "jpg" else EXACT)


def with_alpha():
    alpha = numpy.full((HEIGHT, WIDTH, 1), 255, numpy.uint8)
    alpha[:10], alpha[10:20] = 0, 128
    return numpy.concatenate([numpy.asarray(BASE), alpha], -1)


@pytest.mark.parametrize("name", ["rgba.png", "rgba.webp", "rgba.tif", "rgba16.png"])
@pytest.mark.parametrize(("background", "under"), [("white", (1, 1, 1)), ("#204060", (32 / 255, 64 / 255, 96 / 255))])
def test_what_is_transparent_shows_the_background(tmp_path, name, background, under):
    path, pixels = tmp_path / name, with_alpha()
    if "16" in name:
        png16(path, pixels / 255 * 65535)
    else:
        Image.fromarray(pixels).save(path, **({"lossless": True} if name.endswith("webp") else {}))
    share = torch.tensor(pixels[..., 3:]).float() / 255
    expected = torch.tensor(RGB.copy()).float() * share + torch.tensor(under) * (1 - share)
    assert pictures.look(path).transparent
    assert float((pictures.read(path, background=background)[0] - expected).abs().max()) <= 0.009


def test_transparent_colours_of_palettes_and_greys(tmp_path):
    palette = Image.fromarray(numpy.array([[0, 1]], numpy.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "p.png", transparency=0)
    Image.fromarray(numpy.array([[[9, 0], [200, 255]]], numpy.uint8), "LA").save(tmp_path / "la.png")
    assert pictures.read(tmp_path / "p.png")[0].tolist() == [[[1, 1, 1], [0, 1, 0]]]
    found = pictures.read(tmp_path / "la.png", background="black")[0]
    torch.testing.assert_close(found, torch.tensor([[[0.0] * 3, [200 / 255] * 3]]))


def test_a_square_is_cut_around_the_centre(tmp_path):
    wide = numpy.zeros((10, 30, 3), numpy.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert pictures.read(tmp_path / "wide.png", 5).shape == (1, 5, 5, 3)
    assert float(pictures.read(tmp_path / "wide.png", 5).min()) == 1


def two_frames(path, **options):
    BASE.save(path, save_all=True, append_images=[BASE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)], **options)


def cut_off(path):
    BASE.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


SPOILED = {
    "text.png": (lambda p: p.write_text("hello"), "cannot be read as a picture"),
    "empty.png": (lambda p: p.write_bytes(b""), "cannot be read as a picture"),
    "cut.png": (cut_off, "cannot be read as a picture"),
    "cut.jpg": (cut_off, "cannot be read as a picture"),
    "cut.webp": (cut_off, "cannot be read as a picture"),
    "absent.png": (lambda p: None, "No such file"),
    "moving.gif": (lambda p: two_frames(p), "holds 2 pictures"),
    "moving.webp": (lambda p: two_frames(p), "holds 2 pictures"),
    "moving.png": (lambda p: two_frames(p), "holds 2 pictures"),
    "pages.tif": (lambda p: two_frames(p), "holds 2 pictures"),
    "bright.tif": (lambda p: saved(p, Image.fromarray((RAMP * 255).astype(numpy.float32))), "numbers from 0 to 255"),
    "nan.tif": (lambda p: saved(p, Image.fromarray(numpy.full((4, 4), numpy.nan, numpy.float32))), "numbers from nan"),
    "deep.tif": (lambda p: saved(p, Image.fromarray((RAMP * 1e9).astype(numpy.int32))), "numbers from 0 to 1e\\+09"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_cannot_be_used_is_named_by_looking_and_by_reading(tmp_path, name):
    spoil, said = SPOILED[name]
    spoil(tmp_path / name)
    for use in (pictures.look, pictures.read):
        with pytest.raises(pictures.PictureError, match=said) as told:
            use(tmp_path / name)
        assert name in str(told.value)


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "nul\0.png"])
def test_names_that_no_file_has(tmp_path, name):
    with pytest.raises(pictures.PictureError, match="cannot be read as a picture"):
        pictures.look(tmp_path / name)


def test_several_views_of_one_picture_are_one_picture(tmp_path):
    two_frames(tmp_path / "phone.mpo", quality=95)
    os.rename(tmp_path / "phone.mpo", tmp_path / "phone.jpg")
    assert Image.open(tmp_path / "phone.jpg").format == "MPO"
    found = pictures.read(tmp_path / "phone.jpg")
    assert float((found[0] - torch.tensor(RGB.copy()).float()).abs().max()) <= LOSSY


def test_a_picture_is_known_by_its_content(tmp_path):
    for name, image in (("a.png", BASE), ("b.png", BASE), ("c.png", BASE.convert("L"))):
        image.save(tmp_path / name)
    a, b, c = (pictures.look(tmp_path / name).digest for name in ("a.png", "b.png", "c.png"))
    assert a == b != c


def test_a_background_that_is_no_colour(tmp_path):
    with pytest.raises(ConfigError, match="no colour 'bright'"):
        pictures.colour("bright")

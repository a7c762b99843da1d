"""Pictures from files, as the host's Load Image sees them, for everything here that reads one.

What Load Image gets wrong without a word, which would train on something else than what was meant, is mended (integers and
floats beyond 8 bits, mirrored EXIF orientations) or refused by name (several frames, cut-off files, values beyond the range).
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import NamedTuple

import comfy.utils
import numpy
import torch
from comfy_api.latest import InputImpl
from PIL import Image, ImageColor, ImageOps
from torch import Tensor

from ..errors import ConfigError, HywuError

BACKGROUND = "white"  # what shows through transparent pixels
ORIENTATION = 0x0112  # EXIF tag
MIRRORED = (2, 4, 5, 7)  # orientations of which the host's decoder does only the rotation
TURNED = 5  # from this orientation on, width and height are swapped
PNG_EXIF = (b"eXIf", b"Raw profile type")  # what a PNG with an orientation has in it
WIDE = ("I", "F")  # modes whose values Pillow cuts at 255 instead of scaling them
SEVERAL_VIEWS = ("MPO",)  # formats whose further frames are other views of the one picture
DEEP = 65535


class PictureError(HywuError):
    """A picture is missing, cannot be read, or is not one picture."""


class Facts(NamedTuple):
    """What is known of a picture file without keeping its pixels."""

    width: int  # as it is shown, turned as its EXIF says
    height: int
    transparent: bool  # whether it has an alpha channel or a transparent colour
    digest: str  # of the file's bytes


def look(path: Path) -> Facts:
    """Read a picture to its end and tell what it is.

    Raises:
        PictureError: if it cannot be used.
    """
    data = _bytes(path)
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_frames(path, image)
            size, transparent = image.size, image.has_transparency_data
            if image.mode in WIDE:
                _by_pillow(path, image)
            elif image.format == "PNG" and not any(mark in data for mark in PNG_EXIF):
                # its checksums tell as much as its pixels, and sooner
                image.verify()
                return Facts(*size, transparent, _digest(data))
            else:
                # a JPEG is read whole, but only a small picture made of it
                image.draft("RGB", (1, 1))
                image.load()
            width, height = _shown(size, image)
    except PictureError:
        raise
    except Exception as error:  # whatever a decoder makes of foreign bytes
        raise _unreadable(path, error) from None
    return Facts(width, height, transparent, _digest(data))


def read(path: Path, size: int | tuple[int, int] = 0, background: str = BACKGROUND) -> Tensor:
    """A picture as the host's IMAGE: (1, H, W, 3), float32 in [0, 1].

    Args:
        size: (width, height) of what is cut around the centre and resized, or the side of a square; 0: as it is.
        background: colour under transparent pixels, see `colour`.
    Raises:
        PictureError: if it cannot be used.
    """
    try:
        with Image.open(io.BytesIO(_bytes(path))) as image:
            _check_frames(path, image)
            mirrored = _orientation(image) in MIRRORED
            image.load()
            pixels = None if mirrored or image.mode in WIDE else _by_host(path, image)
            pixels = _by_pillow(path, image) if pixels is None else pixels
    except PictureError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from None
    pixels = _laid_over(pixels, colour(background)).unsqueeze(0)
    if size:
        channels_first = pixels.movedim(-1, 1)
        width, height = size if isinstance(size, tuple) else (size, size)
        pixels = comfy.utils.common_upscale(channels_first, width, height, "lanczos", "center").movedim(1, -1)
    return pixels.contiguous()


def colour(name: str) -> tuple[float, ...]:
    """A colour by its name or as #rrggbb: red, green and blue in [0, 1].

    Raises:
        ConfigError: if there is no such colour.
    """
    try:
        return tuple(value / 255 for value in ImageColor.getrgb(name)[:3])
    except ValueError:
        raise ConfigError(f"There is no colour {name!r}. Give a name such as white or grey, or #rrggbb.") from None


def _bytes(path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise _unreadable(path, error) from None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _unreadable(path: Path, error: Exception) -> PictureError:
    reason = getattr(error, "strerror", None) or str(error).replace("\n", " ") or type(error).__name__
    return PictureError(f"{path} cannot be read as a picture ({reason}). Save it again as PNG, or remove it.")


def _check_frames(path: Path, image: Image.Image) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in SEVERAL_VIEWS:
        raise PictureError(
            f"{path} holds {frames} pictures (animation or pages). Save the one that is meant as a file."
        )


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ORIENTATION, 1)


def _shown(size: tuple[int, int], loaded: Image.Image) -> tuple[int, int]:
    """The size turned as EXIF says, if Pillow did not do so while it loaded the picture, as it does for TIFF."""
    return size[::-1] if _orientation(loaded) >= TURNED else size


def _by_host(path: Path, image: Image.Image) -> Tensor | None:
    """(H, W, 3) or, with alpha, (H, W, 4) by the decoder that Load Image asks first; None where that fails."""
    try:
        found = InputImpl.VideoFromFile(str(path)).get_components()
    except Exception:  # Load Image goes on to Pillow as well
        return None
    if tuple(found.images.shape[1:3]) != _shown(image.size, image)[::-1]:
        return None
    transparent = image.has_transparency_data and found.alpha is not None
    return torch.cat([found.images[0], found.alpha[0]] if transparent else [found.images[0]], dim=-1).float()


def _by_pillow(path: Path, image: Image.Image) -> Tensor:
    """(H, W, 3) or, with alpha, (H, W, 4)."""
    image = ImageOps.exif_transpose(image)
    if image.mode in WIDE or image.mode.startswith("I;16"):
        grey, top = numpy.asarray(image).astype(numpy.float32), 1 if image.mode == "F" else DEEP
        low, high = float(grey.min()), float(grey.max())
        if not (low >= 0 and high <= top):  # also for NaN
            raise PictureError(
                f"{path} holds numbers from {low:g} to {high:g}; pictures hold floats from 0 to 1 or integers up to {DEEP}. "
                "Save it with 8 or 16 bits."
            )
        return torch.from_numpy(grey / top).unsqueeze(-1).repeat(1, 1, 3)
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return torch.from_numpy(numpy.array(image)).float() / 255


def _laid_over(pixels: Tensor, under: tuple[float, ...]) -> Tensor:
    if pixels.shape[-1] == 3:
        return pixels
    alpha = pixels[..., 3:]
    return pixels[..., :3] * alpha + pixels.new_tensor(under) * (1 - alpha)

"""Generated digits as pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .data import LEVELS, SIDE

PAPER = (255, 255, 255)
TILE = (246, 244, 239)  # behind a digit
INK = (28, 30, 38)
GIVEN = (206, 224, 244)  # behind pixels that were given, not generated


def draw_images(
    images: Tensor,
    path: str | Path,
    *,
    given: int = 0,
    originals: Tensor | None = None,
    columns: int = 10,
    scale: int = 12,
) -> None:
    """Write a grid of digits as a PNG.

    Args:
        images: (n, 64) with levels 0..16.
        path: of the file.
        given: how many pixels of each image were given; they are tinted.
        originals: (n, 64); shown as a row of their own under each row of images.
        columns: images in a row.
        scale: side of a pixel, in pixels of the file.

    Raises:
        ValueError: for images that are no (n, 64), n > 0.
        OSError: if the file cannot be written.
    """
    if images.ndim != 2 or images.shape[1] != SIDE * SIDE or not len(images):
        raise ValueError(f"images must be (n, {SIDE * SIDE}), got {tuple(images.shape)}")
    columns = min(columns, len(images))
    rows = []
    for part in range(0, len(images), columns):
        rows.append(_row(paint(images[part : part + columns], given), columns))
        if originals is not None:
            rows.append(_row(paint(originals[part : part + columns]), columns))
    grid = torch.nn.functional.pad(torch.cat(rows), (0, 0, 0, 0, 1, 0))  # left margin is a gap's
    grid = torch.where(grid.any(-1, keepdim=True), grid, torch.tensor(PAPER))
    big = grid.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    Image.fromarray(big.to(torch.uint8).numpy()).save(path, format="PNG")


def paint(images: Tensor, given: int = 0) -> Tensor:
    """Levels (n, 64) as colours (n, 8, 8, 3) from 0 to 255, the first ``given`` pixels tinted."""
    ink = (images.clamp(0, LEVELS - 1).float() / (LEVELS - 1))[..., None]
    behind = torch.tensor(TILE).float().repeat(SIDE * SIDE, 1)
    behind[:given] = torch.tensor(GIVEN).float()
    colours = behind * (1 - ink) + torch.tensor(INK).float() * ink
    return colours.round().long().unflatten(1, (SIDE, SIDE))


def _row(tiles: Tensor, columns: int) -> Tensor:
    """Tiles (n, 8, 8, 3) side by side, a gap of 0 right of and below each, and one at the left."""
    missing = columns - len(tiles)
    tiles = torch.nn.functional.pad(tiles, (0, 0, 0, 1, 0, 1, 0, missing))
    return torch.nn.functional.pad(tiles.transpose(0, 1).flatten(1, 2), (0, 0, 1, 0))

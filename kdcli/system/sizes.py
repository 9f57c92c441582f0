"""Image sizes: (height, width) in pixels everywhere; one number in a recipe, a card or a flag means a square."""

from collections.abc import Sequence

Size = tuple[int, int]
"""(height, width) in pixels."""


def pair(size: int | Sequence[int]) -> Size:
    """`32` or `[256, 192]` as (height, width)."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def plain(size: int | Sequence[int]) -> int | list[int]:
    """A size as files and JSON hold it: one number for a square, else [height, width]."""
    height, width = pair(size)
    return height if height == width else [height, width]


def text(size: int | Sequence[int]) -> str:
    """A size for people: `32`, or `256x192` (height first)."""
    height, width = pair(size)
    return str(height) if height == width else f"{height}x{width}"

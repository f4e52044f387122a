"""Masks at the video's size, cut into tiles of one shape, so that no size of video compiles anything new.

Axes: T frames, O expressions, H, W the video's size, L mask side, K TILE.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.ops.resize import resize_matrix

TILE = 256  # rows and columns of a tile


class MaskTiles:
    """The matrices that resize masks of side L to one video's size, tile by tile.

    Args:
      size: height and width of the video.
      side: L.

    Attributes:
      matrices: for every row of tiles and every tile in it float32[K, L] for rows and for columns; 0 beyond the edge.
    """

    def __init__(self, size: tuple[int, int], side: int):
        self.size = size
        rows, columns = (_pieces(resize_matrix(side, length, "bilinear")) for length in size)
        self.matrices = [[(row, column) for column in columns] for row in rows]

    def join(self, tiles: Sequence[Sequence[jax.Array | np.ndarray]]) -> np.ndarray:
        """Packed tiles uint8[T, O, K, K / 8], laid out as `matrices` -> bool[T, O, H, W]."""
        rows = [np.concatenate([np.asarray(tile) for tile in row], axis=-1) for row in tiles]
        packed = np.concatenate(rows, axis=-2)[..., : self.size[0], :]
        return np.unpackbits(packed, axis=-1, count=self.size[1]).view(bool)

    def join_soft(self, tiles: Sequence[Sequence[jax.Array | np.ndarray]]) -> np.ndarray:
        """Tiles uint8[T, O, K, K], laid out as `matrices` -> uint8[T, O, H, W]."""
        rows = [np.concatenate([np.asarray(tile) for tile in row], axis=-1) for row in tiles]
        joined: np.ndarray = np.concatenate(rows, axis=-2)[..., : self.size[0], : self.size[1]]
        return joined


def _pieces(matrix: np.ndarray) -> list[jax.Array]:
    pieces = (matrix[i : i + TILE] for i in range(0, len(matrix), TILE))
    return [jnp.asarray(np.pad(piece, ((0, TILE - len(piece)), (0, 0)))) for piece in pieces]

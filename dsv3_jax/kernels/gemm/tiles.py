"""Which tile a Hopper GEMM uses: the least of a time model whose numbers were measured.

A tile's time is its steps of 128 of K at so many nanoseconds each, plus so many for its start and
its stores. Blocks are persistent, so a product takes its number of rounds (tiles over blocks,
rounded up) times that. The model meets the measured times of the shapes in benchmarks/shapes.py
within 5 % where arithmetic is the limit. benchmarks/sweep_gemm.py measures
every tile and prints the table anew.
"""

from typing import NamedTuple

from dsv3_jax.kernels.gemm.hopper_matmul import Tile


class Cost(NamedTuple):
    """Measured nanoseconds of one tile."""

    step: float  # for each 128 of K
    tile: float  # once


# Random normal data; the two largest on one H100 80GB, which such data hold at 1.58 GHz, the others
# on one H200. Large tiles read each operand less often, small ones fill the last round better, and
# below 128 rows only the columns are left to spread over 132 blocks.
COSTS: dict[Tile, Cost] = {
    Tile(waves=2, cluster=2): Cost(712, 1480),
    Tile(warpgroups=3, cluster=2, store_buffers=2): Cost(548, 960),
    Tile(stages=6): Cost(462, 680),
    Tile(columns=64, stages=4, slabs=2): Cost(285, 700),
    Tile(columns=32, stages=4, slabs=2): Cost(225, 600),
    Tile(warpgroups=1, columns=64, stages=3, slabs=4): Cost(260, 600),
    Tile(warpgroups=1, columns=32, stages=4, slabs=4): Cost(175, 500),
    Tile(warpgroups=1, columns=16, stages=4, slabs=4): Cost(150, 450),
}

GROUPED_COSTS: dict[Tile, Cost] = {
    Tile(waves=2, cluster=2, rows_first=True): Cost(712, 1480),
    Tile(warpgroups=3, cluster=2, store_buffers=2): Cost(548, 960),
    Tile(stages=6, rows_first=True): Cost(462, 680),
}

# The fastest of the sweep in every shape, so that there is nothing to choose; WGRAD is
# within 1 % of it.
WGRAD = Tile(warpgroups=3, store_buffers=2, band=16)
BF16 = Tile(columns=256, rows_first=True)
BF16_WGRAD = Tile(columns=256)
MASKED = Tile(parts=2, cluster=2)
MASKED_64 = Tile(warpgroups=1, stages=8)  # buffers of 64 rows


def dense(m: int, n: int, k: int, blocks: int) -> Tile:
    """The tile of an FP8 product [m, k] by [n, k] on so many multiprocessors."""
    return min(COSTS, key=lambda tile: nanoseconds(tile, COSTS[tile], m, n, k, 1, blocks))


def grouped(rows: int, experts: int, n: int, k: int, blocks: int) -> Tile:
    """The tile of an FP8 grouped product, taking all groups to be of one size."""
    m = -(-rows // experts)
    costs = GROUPED_COSTS
    return min(costs, key=lambda tile: nanoseconds(tile, costs[tile], m, n, k, experts, blocks))


def nanoseconds(
    tile: Tile, cost: Cost, m: int, n: int, k: int, groups: int = 1, blocks: int = 132
) -> float:
    """Time of `groups` products [m, k] by [n, k], by the model."""
    across, down = (tile.cluster, 1) if tile.shared == "a" else (1, tile.cluster)
    clusters = groups * -(-m // (tile.m * down)) * -(-n // (tile.n * across))
    rounds = -(-clusters // (blocks // tile.cluster))
    return rounds * (k / 128 * cost.step + cost.tile)

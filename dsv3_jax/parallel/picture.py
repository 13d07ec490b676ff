"""Text pictures of which devices hold which part of an array."""

from jax.sharding import Sharding


def draw(sharding: Sharding, shape: tuple[int, ...], max_cells: int = 8) -> list[str]:
    """A box for each part of an array, with the devices that hold it, over its two dims most cut.

    In the way of `jax.debug.visualize_array_sharding`, for any number of dims and of devices; rows
    and columns beyond max_cells are left out, with a mark.
    """
    parts = sharding.devices_indices_map(shape)
    starts = {device.id: [s.start or 0 for s in index] for device, index in parts.items()}
    cuts = [sorted({start[dim] for start in starts.values()}) for dim in range(len(shape))]
    most_cut = sorted(range(len(shape)), key=lambda dim: -len(cuts[dim]))[:2]
    down, across = min(most_cut), max(most_cut)

    def holders(y: int, x: int) -> str:
        return ranges([i for i, start in starts.items() if (start[down], start[across]) == (y, x)])

    cells = [[holders(y, x) for x in cuts[across][:max_cells]] for y in cuts[down][:max_cells]]
    width = max(len(cell) for row in cells for cell in row)
    more = " ..." if len(cuts[across]) > max_cells else ""
    rule = "+" + "+".join(["-" * (width + 2)] * len(cells[0])) + "+"
    lines = [rule]
    for row in cells:
        lines += ["|" + "|".join(f" {cell:<{width}} " for cell in row) + "|" + more, rule]
    return lines + ["..."] * (len(cuts[down]) > max_cells)


def ranges(numbers: list[int]) -> str:
    """Whole numbers in short: 0-3,8 for 0, 1, 2, 3 and 8."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)

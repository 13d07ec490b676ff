"""Sizes and prices of network topologies: two- and three-layer fat trees, Slim Fly, Dragonfly.

Closed forms that give the ISCA paper's table 3 exactly. `links` counts cables between switches;
each endpoint adds one more. The paper names no prices, so the default book is a fit to its totals
and says so: give your own in JSON.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from dsv3_jax.analysis.hardware import nearest
from dsv3_jax.config import UserError
from dsv3_jax.config.files import read_json

_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Topology:
    """A network at full size: endpoints it connects, switches, and cables between switches."""

    name: str
    endpoints: int
    switches: int
    links: int


def fat_tree_2(radix: int = 64) -> Topology:
    """Leaves and spines: every leaf has radix/2 endpoints and a cable to each of radix/2 spines."""
    _check_radix(radix)
    return Topology("FT2", radix**2 // 2, 3 * radix // 2, radix**2 // 2)


def multi_plane_fat_tree(radix: int = 64, planes: int = 8) -> Topology:
    """`planes` two-layer fat trees side by side; NIC i of every node is on plane i."""
    if planes < 1:
        raise UserError(f"{planes=} must be positive")
    plane = fat_tree_2(radix)
    return Topology("MPFT", planes * plane.endpoints, planes * plane.switches, planes * plane.links)


def fat_tree_3(radix: int = 64) -> Topology:
    """Three layers: radix pods of radix/2 leaves and radix/2 aggregation switches, and a core."""
    _check_radix(radix)
    return Topology("FT3", radix**3 // 4, 5 * radix**2 // 4, radix**3 // 2)


def slim_fly(q: int = 28) -> Topology:
    """Slim Fly (Besta and Hoefler, SC'14) of 2q^2 switches with (3q - d)/2 cables each, q = 4w + d.

    The paper's row is q=28, radix 63. A real graph of this family needs a prime power q, which 28
    is not: the row is the formula's.
    """
    delta = {0: 0, 1: 1, 3: -1}.get(q % 4)
    if delta is None or q < 3:
        raise UserError(f"{q=}: Slim Fly needs q of 4w-1, 4w or 4w+1: use {max(q + 1, 3)}")
    degree = (3 * q - delta) // 2
    return Topology("SF", 2 * q * q * math.ceil(degree / 2), 2 * q * q, q * q * degree)


def dragonfly(p: int = 16, a: int = 32, h: int = 16, groups: int | None = None) -> Topology:
    """Dragonfly: groups of `a` switches, all linked, each with `p` endpoints and `h` global cables.

    The full network has a*h + 1 groups (513 for radix 64); the paper's row has 511.
    """
    full = a * h + 1
    groups = full if groups is None else groups
    if min(p, a, h) < 1 or not 2 <= groups <= full:
        raise UserError(f"{p=}, {a=}, {h=} must be positive and 2 <= {groups=} <= a*h + 1 = {full}")
    if groups * a * h % 2:
        raise UserError(
            f"{groups=}: {a=} times {h=} times groups must be even, as cables have 2 ends"
        )
    links = groups * a * (a - 1) // 2 + groups * a * h // 2
    return Topology("DF", groups * a * p, groups * a, links)


def fitted_fat_tree_2(endpoints: int, radix: int = 64, planes: int = 1) -> Topology:
    """The smallest two-layer fat tree (a plane) without oversubscription for so many endpoints.

    Spines are shared by trunking several cables from a leaf: 32 leaves of 64 ports need 16 spines.
    """
    _check_radix(radix)
    if endpoints < 1 or planes < 1 or endpoints % planes:
        raise UserError(f"{endpoints=} must be a positive multiple of {planes=}")
    down = radix // 2
    per_plane = endpoints // planes
    leaves = math.ceil(per_plane / down)
    if leaves > radix:
        most = planes * radix * down
        raise UserError(f"{endpoints=} exceeds two layers of radix {radix}: at most {most}")
    spines = 0 if leaves == 1 else math.ceil(leaves * down / radix)
    links = 0 if leaves == 1 else leaves * down
    return Topology(f"FT2 x{planes}", endpoints, planes * (leaves + spines), planes * links)


@dataclass(frozen=True)
class PriceBook:
    """US dollars of a switch, a cable between switches and a cable to an endpoint."""

    switch: float
    link: float
    endpoint_link: float
    source: str

    def __post_init__(self) -> None:
        for name in ("switch", "link", "endpoint_link"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise UserError(
                    f"price book: {name}={value!r} must be a number of dollars, 0 or more"
                )


FITTED_PRICES = PriceBook(
    switch=35_000,
    link=1_972,
    endpoint_link=769,
    source=(
        "a fit to the ISCA paper's table 3 (worst error 0.9 %), not a price list: any switch price "
        "from 0 to 40,000 fits as well"
    ),
)


def load_price_book(path: str | Path) -> PriceBook:
    """The PriceBook in a JSON file with the fields switch, link, endpoint_link and source."""
    try:
        values = read_json(Path(path), _MAX_FILE_BYTES)
    except (OSError, UserError) as error:
        raise UserError(f"price book {error}") from error
    fields = [f.name for f in dataclasses.fields(PriceBook)]
    for unknown in sorted(set(values) - set(fields)):
        raise UserError(f"price book {path}: no field {unknown!r}: {nearest(unknown, fields)}")
    if missing := [f for f in fields if f not in values]:
        raise UserError(f"price book {path}: missing {', '.join(missing)}")
    return PriceBook(**values)


def cost(topology: Topology, prices: PriceBook = FITTED_PRICES) -> float:
    """Dollars of all switches and cables of `topology`; NICs are not counted."""
    cables = topology.links * prices.link + topology.endpoints * prices.endpoint_link
    return topology.switches * prices.switch + cables


def _check_radix(radix: int) -> None:
    if radix < 2 or radix % 2:
        raise UserError(
            f"{radix=}: a fat tree needs an even number of ports: use {max(radix + 1, 2)}"
        )

"""Arithmetic on a thread's 32-bit integers, for code that is written as MLIR operations."""

import functools
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith


def constant(x: int) -> Any:
    """The number, in a register."""
    return utils.c(x, ir.IntegerType.get_signless(32))


def plus(*terms: Any) -> Any:
    """The sum of all terms."""
    return functools.reduce(arith.addi, terms)


def times(x: Any, factor: int) -> Any:
    """x times a number that is known."""
    return arith.muli(x, constant(factor))


def quotient(x: Any, divisor: int) -> Any:
    """x over a number that is known, rounded down; x is not negative."""
    return arith.divui(x, constant(divisor))


def remainder(x: Any, divisor: int) -> Any:
    """What is left of x over a number that is known; x is not negative."""
    return arith.remui(x, constant(divisor))


def index(x: Any) -> Any:
    """The same number as an index of arrays."""
    return arith.index_cast(ir.IndexType.get(), x)

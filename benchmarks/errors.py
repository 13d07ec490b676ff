"""How far a result lies from the right one: the one measure of all benchmarks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def relative_error(got: Any, want: Any) -> jax.Array | np.ndarray:
    """Norm of the difference over that of `want`, over all numbers; inf where one is not finite.

    In the dtype of `want`, float32 at least. NumPy's arrays are compared by NumPy, so that float64
    stays it; others may be traced.
    """
    numpy: Any = np if isinstance(want, np.ndarray) else jnp
    dtype = np.promote_types(want.dtype, np.float32)
    got, want = (numpy.asarray(x).astype(dtype).ravel() for x in (got, want))
    error = numpy.linalg.norm(got - want) / numpy.linalg.norm(want)
    return numpy.where(numpy.isfinite(error), error, numpy.inf)

"""Fresh weights by `init_variables` alone: one program, and the numbers that a run begins with."""

import jax
import numpy as np
import pytest

from dsv3_jax.config import Config
from dsv3_jax.model.transformer import init_variables
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import make_layout
from dsv3_jax.training.state import abstract_state, create_state
from tests.helpers import tiny_model


@pytest.mark.slow
def test_init_is_one_program_with_the_numbers_of_a_run(caplog):
    config = Config(model=tiny_model(num_hidden_layers=2), seed=3)
    key = jax.random.key(config.seed)
    with jax.log_compiles():
        variables = init_variables(key, config.model)
    compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]
    assert len(compiled) == 1, compiled  # some 500 when called operation by operation
    assert init_variables(key, config.model)["params"].keys() == variables["params"].keys()
    layout = make_layout(make_mesh(config.mesh), config.sharding, config.expert_parallel)
    state = create_state(config, abstract_state(config, layout))
    of_run = {"params": state.params, "router": state.router}
    jax.tree.map(np.testing.assert_array_equal, variables, of_run)

"""What XLA:CPU makes of a step of the default model: nothing is copied, and one thread runs it."""

import jax
import numpy as np
import pytest

from dsv3_jax.analysis import hlo
from dsv3_jax.config import load_config
from dsv3_jax.inference.acts import advance_of
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.kv_cache import NO_PAGE
from dsv3_jax.inference.options import EngineOptions
from dsv3_jax.model.transformer import abstract_variables
from tests.cases import in_every_run

MODEL = load_config("tiny").model
# XLA's executor gives half of what is ready to another thread when there is more than this.
READY = 8
NOT_RUN = ("parameter", "constant", "bitcast", "get-tuple-element", "tuple")


@pytest.fixture(scope="module")
def variables():
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_variables(MODEL))


@pytest.mark.parametrize("drafts", in_every_run([0, 1, 2], 1))
def test_a_step_of_one_sequence_is_short_work_for_one_thread(variables, drafts):
    options = EngineOptions(slots=1, max_length=96, chunks=(64,), drafts=drafts, paged=False)
    engine = Engine(variables, MODEL, options)
    program, table = engine._programs[False], np.full((1, 1), NO_PAGE, np.int32)
    step = advance_of(program).lower(engine.variables, engine._slots, table, program).compile()
    text = step.as_text()
    parsed = hlo.parse(text)
    entry = {each.name: each for each in parsed.computations[parsed.entry]}

    def is_there(name):
        """Whether nothing has to run before this can be read."""
        each = entry[name]
        return each.op in NOT_RUN and all(map(is_there, each.operands))

    run = [each for each in entry.values() if each.op not in NOT_RUN]
    assert len(run) > 100
    ready = [each.name for each in run if all(map(is_there, each.operands))]
    assert len(ready) <= READY, ready
    rows = options.max_length + options.beyond
    assert not [each for each in run if each.op == "copy" and f"[1,{rows}," in each.type]
    assert 'outer_dimension_partitions":["' not in text

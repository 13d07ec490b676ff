"""A model as EleutherAI's lm-evaluation-harness asks for one (the extra `lm-eval`).

    from lm_eval import simple_evaluate
    from dsv3_jax.harness import HarnessModel
    simple_evaluate(HarnessModel("runs/tiny"), tasks=["hellaswag"])

Log-likelihoods are of whole rows in one pass, filled up to a few lengths, so that few programs are
compiled; texts are written by `generate`. With the module imported, the harness knows it by name
too: model="dsv3_jax", model_args="checkpoint=runs/tiny".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from dsv3_jax.config import UserError
from dsv3_jax.data.supervised import find_template
from dsv3_jax.inference.generate import generate
from dsv3_jax.inference.streaming import TextStream
from dsv3_jax.loading import Model, find_tokenizer, load
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.transformer import forward

SHORTEST = 64  # rows are filled up to a power of two of tokens, from here on


@register_model("dsv3_jax")
class HarnessModel(TemplateLM):
    """A run, an import or a Hugging Face folder; UserError where that cannot be loaded.

    max_length: of a row, by default the model's positions; what is longer loses its beginning.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        tokenizer: str | None = None,
        step: str | int = "auto",
        batch_size: str | int = 4,
        max_length: int | None = None,
        **ignored: Any,
    ):
        super().__init__()
        del ignored  # the harness's own: device, max_batch_size
        if not str(batch_size).isdecimal() or int(batch_size) <= 0:
            raise UserError(f"{batch_size=} must be a positive number")
        self._folder, self._batch_size = Path(checkpoint), int(batch_size)
        self._reader = find_tokenizer(self._folder, tokenizer)
        self._model: Model = load(checkpoint, step=str(step))
        self._max_length = int(max_length or self._model.config.model.max_position_embeddings)
        self._score = jax.jit(self._of_rows)

    @property
    def eot_token_id(self) -> int:
        """What ends a document."""
        return self._reader.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        return self._reader.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """What tells cached requests apart."""
        return self._reader.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """A text's ids, behind what the tokenizer begins prompts with."""
        del kwargs
        ids = self._reader.encode(string).tolist()
        return ids if add_special_tokens is False else [*self._reader.prompt_prefix, *ids]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The folder's own, or DeepSeek-V3's form; None where none is asked for."""
        return self._template().source if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, up to where the assistant is to answer."""
        return self._template().render(chat_history, add_generation_prompt=add_generation_prompt)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in rows of which each token is predicted once."""
        windows = []
        for number, request in enumerate(requests):
            rows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length,
                context_len=1,
            )
            windows += [(number, *make_disjoint_window(row)) for row in rows]
        pairs = [(("", ""), list(context), list(rest)) for _, context, rest in windows]
        found = [0.0] * len(requests)
        for (number, *_), (value, _) in zip(windows, self._loglikelihood_tokens(pairs)):
            found[number] += value
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to one of its `until`."""
        return [self._written(*request.args) for request in requests]

    def _template(self):
        return find_template(None, self._folder, self._reader)

    def _written(self, context: str, how: dict[str, Any]) -> str:
        stops = how.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        count = int(how.get("max_gen_toks", 256))
        config = self._model.config.model
        prompt = self.tok_encode(context)[-max(self._max_length - count, 1) :]
        sampled = how.get("do_sample", float(how.get("temperature", 0)) > 0)
        stream, text = TextStream(self._reader, config.eos_token_ids, stops), ""
        for (token,) in generate(
            self._model.variables,
            [prompt],
            config,
            max_new_tokens=count,
            temperature=float(how.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(how.get("top_p", 1.0)),
            layout=self._model.layout,
        ):
            text += stream.push(int(token))
            if stream.stopped:
                break
        return text + stream.flush()

    def _loglikelihood_tokens(self, requests, **kwargs: Any) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding says it) of each continuation."""
        del kwargs
        rows = [self._cut(context, rest) for _, context, rest in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        for start in range(0, len(order), self._batch_size):
            some = order[start : start + self._batch_size]
            read = len(rows[some[0]][0]) - 1  # the longest row's tokens but the last
            length = max(SHORTEST, 1 << (read - 1).bit_length())
            tokens = np.full((self._batch_size, length + 1), self.eot_token_id, np.int32)
            counted = np.zeros((self._batch_size, length + 1), bool)
            for place, i in enumerate(some):
                ids, predicted = rows[i]
                tokens[place, : len(ids)] = ids
                counted[place, len(ids) - predicted : len(ids)] = True
            values, greedy = self._score(self._model.variables, tokens, counted)
            for i, value, said in zip(some, np.asarray(values), np.asarray(greedy)):
                found[i] = float(value), bool(said)
        return found

    def _cut(self, context: Sequence[int], rest: Sequence[int]) -> tuple[list[int], int]:
        """A row's last max_length + 1 tokens, and how many of its end are predicted."""
        ids = [*context, *rest][-(self._max_length + 1) :]
        return ids, min(len(rest), len(ids) - 1)

    def _of_rows(
        self, variables: Any, tokens: Int32[Array, "B T1"], counted: Bool[Array, "B T1"]
    ) -> tuple[Float32[Array, " B"], Bool[Array, " B"]]:
        layout = self._model.layout
        real = jnp.cumsum(counted[:, ::-1], axis=1)[:, ::-1] > 0  # no filling behind the last
        how = Pass(self._model.config.model, layout=layout)
        logits = forward(variables, tokens[:, :-1], how, counted=real[:, 1:]).logits
        logits = layout.in_natural_order(logits)
        targets, counts = tokens[:, 1:], counted[:, 1:]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        greedy = (logits.argmax(-1) == targets) | ~counts
        return jnp.where(counts, chosen, 0.0).sum(1), greedy.all(1)

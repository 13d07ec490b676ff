"""Our model in lm-evaluation-harness: two questions of a local file, without a network."""

import dataclasses
import json

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs the lm-eval extra: pip install '.[lm-eval]'")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from dsv3_jax import loading
from dsv3_jax.config import UserError
from dsv3_jax.data.tokenizer import load_tokenizer, train_tokenizer
from dsv3_jax.harness import HarnessModel
from dsv3_jax.model.transformer import forward
from tests.fixtures.interop.tiny import TINY, hf_tensors, write_hf

MODEL = dataclasses.replace(
    TINY, vocab_size=320, num_hidden_layers=2, bos_token_id=0, eos_token_id=1
)
QUESTIONS = [
    {"question": "one two three", "choices": [" four", " two"], "answer": 0},
    {"question": "a talk of one", "choices": [" and", " three of a"], "answer": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_hf(tmp_path_factory.mktemp("hf") / "m", MODEL, hf_tensors(MODEL, "bf16"))
    train_tokenizer(["one two three four of a talk and more " * 9], 300, folder / "tokenizer.json")
    return folder


def in_f32(model: loading.Model) -> loading.Model:
    """Published weights are loaded in BF16, whose sums depend on what fills a row up."""
    config = dataclasses.replace(model.config.model, dtype="float32")
    variables = jax.tree.map(lambda x: x.astype("float32"), model.variables)
    return model._replace(
        config=dataclasses.replace(model.config, model=config), variables=variables
    )


def made(folder, **options) -> HarnessModel:
    model = HarnessModel(folder, batch_size=2, **options)
    model._model = in_f32(model._model)
    return model


@pytest.fixture(scope="module")
def model(folder):
    return made(folder)


@pytest.fixture(scope="module")
def score(folder):
    """score(context, continuation) -> (log-likelihood, greedy), a row at a time by `forward`."""
    model, tokenizer = in_f32(loading.load(folder)), load_tokenizer(folder)
    logits = jax.jit(lambda ids: forward(model.variables, ids, model.config.model).logits)

    def of_ids(context, rest):
        ids = np.array([[*context, *rest]], np.int32)
        logp = np.asarray(jax.nn.log_softmax(logits(ids[:, :-1])))[0, len(context) - 1 :]
        said = [row[i] for row, i in zip(logp, rest, strict=True)]
        return float(np.sum(said)), bool((logp.argmax(-1) == rest).all())

    def score(context, continuation):
        whole, before = (
            [*tokenizer.prompt_prefix, *tokenizer.encode(text).tolist()]
            for text in (context + continuation, context)
        )
        return of_ids(before, whole[len(before) :])

    score.of_ids, score.tokenizer = of_ids, tokenizer
    return score


def test_two_questions_of_a_file(model, score, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)))
    task = ConfigurableTask(
        config={
            "task": "two_questions",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    )
    found = simple_evaluate(model, tasks=[task], bootstrap_iters=0)
    right = [
        int(np.argmax([score(q["question"], c)[0] for c in q["choices"]]) == q["answer"])
        for q in QUESTIONS
    ]
    assert found["results"]["two_questions"]["acc,none"] == np.mean(right)
    for sample, question in zip(found["samples"]["two_questions"], QUESTIONS, strict=True):
        for (value, greedy), choice in zip(sample["filtered_resps"], question["choices"]):
            want = score(question["question"], choice)
            assert float(value) == pytest.approx(want[0], rel=1e-5) and greedy == want[1]


def instance(kind: str, *arguments) -> Instance:
    return Instance(kind, {}, arguments, 0)


def test_a_text_longer_than_a_row_is_predicted_once_a_token(folder, score):
    short = made(folder, max_length=8)
    text = "one two three four of a talk and more of one"
    ids = score.tokenizer.encode(text).tolist()
    (found,) = short.loglikelihood_rolling([instance("loglikelihood_rolling", text)])
    bos, want = score.tokenizer.bos_token_id, 0.0
    for start in range(0, len(ids), 8):
        # A row has 8 tokens before the last: a last row that is not full has more to read.
        end = min(start + 8, len(ids))
        context = ids[max(end - 9, 0) : start] if start else [bos]
        want += score.of_ids(context, ids[start : start + 8])[0]
    assert len(ids) > 8 and found == pytest.approx(want, rel=1e-5)


def test_texts_are_written_up_to_a_stop(model, score):
    how = {"until": [], "max_gen_toks": 6, "temperature": 0}
    (whole,) = model.generate_until([instance("generate_until", "one two", how)])
    assert whole
    stop = whole[1:3]
    (cut,) = model.generate_until([instance("generate_until", "one two", how | {"until": [stop]})])
    assert cut == whole[: whole.index(stop)]
    said = score.tokenizer.encode(whole).tolist()
    assert len(said) >= 1


def test_what_is_no_batch_is_refused(folder):
    with pytest.raises(UserError, match="batch_size='auto'"):
        HarnessModel(folder, batch_size="auto")

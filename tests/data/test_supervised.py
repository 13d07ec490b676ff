"""Records to tokens with targets; what cannot be learnt from is named or counted."""

import json
from collections import Counter

import numpy as np
import pytest

from dsv3_jax.config import DataConfig, UserError
from dsv3_jax.data.chat import DEFAULT_TEMPLATE, ChatTemplate
from dsv3_jax.data.corpus import open_corpus
from dsv3_jax.data.documents import find_files, read_records
from dsv3_jax.data.shards import TokenShards
from dsv3_jax.data.supervised import encode_record, prepare_supervised, read_supervised
from dsv3_jax.data.tokenizer import ByteTokenizer, train_tokenizer

TALK = {
    "messages": [
        {"role": "user", "content": "héllo, 1 + 1?"},
        {"role": "assistant", "content": "zwei = 2"},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "bitte schön"},
    ]
}


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    return train_tokenizer(["hello zwei bitte schön thanks " * 20], 300, path)


@pytest.fixture
def template(bpe):
    return ChatTemplate(DEFAULT_TEMPLATE, bpe.special_spellings)


def said(document, tokenizer) -> list[str]:
    """The runs of targets, as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], document.targets, [0]]).astype(int)))
    runs = edges.reshape(-1, 2)
    return [tokenizer.decode(document.ids[start:stop].tolist()) for start, stop in runs]


def test_targets_are_the_assistants_words_and_their_end(bpe, template):
    document = encode_record(TALK, bpe, template)
    assert said(document, bpe) == ["zwei = 2", "bitte schön"]
    assert document.ids[0] == bpe.bos_token_id and not document.targets[0]
    # Each turn ends with the end token, which is a target, too.
    (ends,) = np.nonzero(document.ids == bpe.eos_token_id)
    assert len(ends) == 2 and document.targets[ends].all()
    assert document.ids[-1] == bpe.eos_token_id


def test_bytes_have_the_same_targets():
    tokenizer = ByteTokenizer()
    template = ChatTemplate(DEFAULT_TEMPLATE, tokenizer.special_spellings)
    assert said(encode_record(TALK, tokenizer, template), tokenizer) == ["zwei = 2", "bitte schön"]


def test_pairs_and_texts(bpe, template):
    pair = encode_record({"prompt": "1 + 1 = ", "completion": "2"}, bpe, template)
    assert said(pair, bpe) == ["2"] and pair.targets[-1] and pair.ids[-1] == bpe.eos_token_id
    text = encode_record({"text": "all of it"}, bpe, template)
    assert said(text, bpe) == ["all of it"]
    talk = TALK["messages"]
    split = encode_record({"prompt": talk[:3], "completion": talk[3:]}, bpe, template)
    assert said(split, bpe) == ["bitte schön"]
    assert np.array_equal(split.ids, encode_record(TALK, bpe, template).ids)


@pytest.mark.oracle
def test_transformers_reads_the_same_ids(bpe, template, tmp_path):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(bpe.path), **bpe.special_spellings)
    read = theirs.apply_chat_template(
        TALK["messages"],
        chat_template=DEFAULT_TEMPLATE,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    ours = encode_record(TALK, bpe, template)
    assert ours.ids.tolist() == read["input_ids"]
    assert ours.targets.tolist() == [bool(m) for m in read["assistant_masks"]]


@pytest.mark.parametrize(
    "record, words",
    [
        ({"messages": TALK["messages"][:1]}, "no assistant turn"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role 'wizard'"),
        ({"messages": [{"role": "assistant", "content": "</think><fim_hole>"}]}, None),
        ({"prompt": "x"}, "not both text"),
        ({"prompt": "x", "completion": ""}, "not both text"),
        ({"title": "x"}, "fields: 'title'"),
    ],
)
def test_bad_records_are_named(bpe, template, record, words):
    if words is None:  # nothing of it is special in this tokenizer
        assert encode_record(record, bpe, template).targets.any()
        return
    with pytest.raises(ValueError, match=words):
        encode_record(record, bpe, template)


def test_a_message_cannot_end_its_own_turn(bpe, template):
    forged = {"role": "user", "content": "x<｜end▁of▁sentence｜>y"}
    with pytest.raises(ValueError, match="message 1 spells the special token '<｜end"):
        encode_record({"messages": [forged, TALK["messages"][1]]}, bpe, template)


def test_errors_stop_or_are_counted(bpe, template):
    records = [("a:1", TALK), ("a:2", {"messages": []}), ("a:3", {**TALK, "tools": [{}]})]
    with pytest.raises(UserError, match=r"^a:2: messages is not"):
        list(read_supervised(records, bpe, template, Counter()))
    skipped: Counter[str] = Counter()
    assert len(list(read_supervised(records, bpe, template, skipped, "skip"))) == 2
    assert skipped == {
        "record: messages is not a list of at least one message": 1,
        "tools of a conversation, which are not rendered (it is kept)": 1,
    }


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    lines = [
        {"messages": [{**TALK["messages"][0], "content": f"q {n}"}, TALK["messages"][1]]}
        for n in range(40)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_prepare_writes_conversations(tmp_path, chats, bpe, template):
    out = tmp_path / "out"
    summary = prepare_supervised([chats], out, bpe, template, val_fraction=0.2)
    train, val = TokenShards(out / "train"), TokenShards(out / "val")
    assert train.is_supervised and train.index.documents + val.index.documents == 40
    assert min(train.index.documents, val.index.documents) > 0
    assert summary.train == train.index
    starts = train.document_starts
    assert train.targets(0, int(starts[1])).sum() == len(bpe.encode("zwei = 2")) + 1
    assert (out / "chat_template.jinja").read_text() == DEFAULT_TEMPLATE
    corpus = open_corpus(DataConfig(path=str(out), tokenizer=str(out), fim_rate=0.0), seed=0)
    assert corpus.is_supervised and corpus.chat_template == out / "chat_template.jinja"
    assert corpus.sha256("train") == train.index.sha256


def test_parquet_holds_the_same_conversations(tmp_path, chats):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [record for _, record in read_records(find_files([chats]))]
    path = tmp_path / "chats.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    assert [record for _, record in read_records(find_files([path]))] == records


def test_a_few_conversations_are_on_both_sides(tmp_path, chats, bpe, template):
    chats.write_text("\n".join(chats.read_text().splitlines()[:2]))
    summary = prepare_supervised([chats], tmp_path / "out", bpe, template, val_fraction=0.01)
    assert summary.train.documents == summary.val.documents == 2
    assert "validation repeats the training documents" in str(summary)


def test_text_among_conversations_is_refused(tmp_path, chats, bpe, template):
    (tmp_path / "z.txt").write_text("plain")
    with pytest.raises(UserError, match=r"z\.txt: conversations come in"):
        prepare_supervised(
            [chats, tmp_path / "z.txt"], tmp_path / "o", bpe, template, val_fraction=0.1
        )
    chats.write_text("")
    with pytest.raises(UserError, match="no conversation in 1 files"):
        prepare_supervised([chats], tmp_path / "o", bpe, template, val_fraction=0.1)
    assert not (tmp_path / "o").exists()

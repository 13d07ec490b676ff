"""Tokens are bytes: round trips, streaming, counts, and what is refused."""

import json
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import UserError
from dsv3_jax.data import tokenizer as tokenizer_module
from dsv3_jax.data import tokens as tokens_module
from dsv3_jax.data.tokenizer import (
    SPECIAL_NAMES,
    ByteTokenizer,
    HFTokenizer,
    load_tokenizer,
    train_tokenizer,
)
from dsv3_jax.data.tokens import StreamDecoder

TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)
SAMPLE = ["def route(x):\n    return x @ w  # größer, 日本語, 🙂\n" * 3, "  the end</s>\n\n\t" * 5]
# A sentencepiece-like vocabulary: metaspace pieces, then single bytes for everything else.
METASPACE = {
    "version": "1.0",
    "added_tokens": [
        {"id": i, "content": c, "special": True, "single_word": False}
        | {"lstrip": False, "rstrip": False, "normalized": False}
        for i, c in enumerate(["<unk>", "<s>", "</s>"])
    ],
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
    "model": {
        "type": "BPE",
        "byte_fallback": True,
        "fuse_unk": True,
        "unk_token": "<unk>",
        "vocab": {t: i for i, t in enumerate(["<unk>", "<s>", "</s>"])}
        | {f"<0x{b:02X}>": 3 + b for b in range(256)}
        | {"▁": 259, "a": 260, "b": 261, "▁a": 262},
        "merges": ["▁ a"],
    },
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    return train_tokenizer(SAMPLE, 300, path)


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "tokenizer.json"
    path.write_text(json.dumps(METASPACE))
    return load_tokenizer(path)


@pytest.fixture(params=["byte", "trained", "metaspace"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "byte" else request.getfixturevalue(request.param)


def write(path, values):
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def test_decode_undoes_encode(tokenizer):
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(TEXTS)
    def check(text):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]) == text
        added = tokenizer.adds_space and text != ""
        assert tokenizer.count_bytes(ids) == len(text.encode()) + added

    check()


def test_streamed_text_equals_the_whole_and_never_splits_a_character(tokenizer):
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40), TEXTS)
    def check(noise, text):
        for ids in (noise, tokenizer.encode(text).tolist()):
            decoder = StreamDecoder(tokenizer)
            pushes = [decoder.push(i) for i in ids]
            assert "".join(pushes) + decoder.flush() == tokenizer.decode(ids)
        assert "\ufffd" in text or not any("\ufffd" in push for push in pushes)

    check()


def test_decoding_agrees_with_the_library(trained, metaspace):
    for ours in (trained, metaspace):
        for text in [*SAMPLE, "a  b ab aba", "é a"]:
            ids = ours.encode(text)
            assert ours.decode(ids) == ours._tokenizer.decode(ids.tolist()) == text


def test_a_stream_that_continues_a_prompt_keeps_the_first_space(metaspace):
    ids = metaspace.encode("a")
    assert StreamDecoder(metaspace).push(ids[0]) == "a"
    assert StreamDecoder(metaspace, continues=True).push(ids[0]) == " a"


def test_invalid_utf8_becomes_the_replacement_character():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([0x61, 0xFF, 0x62, 0xE2, 0x82]) == "a\ufffdb\ufffd"


def test_special_tokens_are_where_the_layout_says(trained):
    byte = ByteTokenizer()
    names = ["bos_token_id", "eos_token_id", "fim_begin_id", "fim_hole_id", "fim_end_id"]
    assert [getattr(byte, n) for n in names] == [256, 257, 258, 259, 260]
    assert byte.vocab_size == 261
    assert [getattr(trained, n) for n in names] == [0, 1, 2, 3, 4]
    assert trained.vocab_size == 300
    assert byte.count_bytes([256, 257, 258, 259, 260, 7]) == 1


def test_special_tokens_spelt_in_a_text_stay_text(trained):
    for name in (names[0] for names in SPECIAL_NAMES.values()):
        ids = trained.encode(f"a{name}b")
        assert ids.min() >= 5
        assert trained.decode(ids) == f"a{name}b"


def test_training_is_deterministic_and_a_saved_tokenizer_loads_the_same(trained, tmp_path):
    again = train_tokenizer(SAMPLE, 300, tmp_path / "tokenizer.json")
    assert again.fingerprint == trained.fingerprint
    loaded = load_tokenizer(str(tmp_path))  # the folder stands for its tokenizer.json
    assert loaded.fingerprint == trained.fingerprint
    np.testing.assert_array_equal(loaded.encode(SAMPLE[0]), trained.encode(SAMPLE[0]))
    assert len(trained.encode(SAMPLE[0])) < len(SAMPLE[0].encode()) / 1.5


def test_plain_names_and_a_missing_bos(trained, tmp_path):
    spec = json.loads(trained.path.read_text())
    spec["added_tokens"] = [spec["added_tokens"][1] | {"content": "<|endoftext|>"}]
    spec["model"]["vocab"] = {
        {"<｜end▁of▁sentence｜>": "<|endoftext|>"}.get(t, t): i
        for t, i in spec["model"]["vocab"].items()
    }
    plain = HFTokenizer(write(tmp_path / "t.json", spec))
    assert plain.bos_token_id == plain.eos_token_id == 1  # as in GPT-2
    assert plain.fim_begin_id is None


def test_fim_tokens_that_the_file_does_not_mark_special_are_left_out_of_text(trained, tmp_path):
    spec = json.loads(trained.path.read_text())
    for token in spec["added_tokens"]:
        token["special"] = False  # DeepSeek-V3's file has its FIM tokens so
    unmarked = HFTokenizer(write(tmp_path / "t.json", spec))
    assert unmarked.decode([2, 3, 4]) == ""
    assert unmarked.encode("<｜fim▁hole｜>").min() >= 5


def test_a_panic_of_the_library_is_an_error_and_a_signal_is_not(trained, monkeypatch):
    """pyo3's PanicException is no Exception."""
    panic = type("PanicException", (BaseException,), {})
    for raised, seen in ((panic("range end"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)):

        def from_str(_: str, raised: BaseException = raised):
            raise raised

        fake = types.SimpleNamespace(Tokenizer=types.SimpleNamespace(from_str=from_str))
        monkeypatch.setattr(tokenizer_module, "_tokenizers_library", lambda fake=fake: fake)
        with pytest.raises(seen):
            HFTokenizer(trained.path)


def damaged(spec, **changes):
    return {**json.loads(json.dumps(spec)), **changes}


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not a usable tokenizer.json"),
        ("[1]", "not a usable tokenizer.json"),
        ("[" * 100_000, "not a usable tokenizer.json"),
        (damaged(METASPACE, model={"type": "BPE"}), "not a usable tokenizer.json"),
        (damaged(METASPACE, added_tokens=[]), "no end-of-document token.*</s>"),
        (
            damaged(METASPACE, decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
            "WordPiece.*exact text",
        ),
        (damaged(METASPACE, decoder=None), "exact text"),
        (
            damaged(METASPACE, model=METASPACE["model"] | {"continuing_subword_prefix": "##"}),
            "continuing_subword_prefix='##' is not supported",
        ),
    ],
)
def test_a_bad_tokenizer_file_is_refused_by_name(tmp_path, content, message):
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(UserError, match=rf"(?s)bad\.json.*{message}"):
        load_tokenizer(path)


def test_an_oversized_file_is_refused_without_parsing(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "MAX_FILE_BYTES", 100)
    with pytest.raises(UserError, match="larger than 100 bytes"):
        load_tokenizer(write(tmp_path / "t.json", METASPACE))


def test_a_missing_file_and_too_small_a_vocabulary_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json.*no such file"):
        load_tokenizer(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="at least 261"):
        train_tokenizer(SAMPLE, 260, tmp_path / "t.json")
    with pytest.raises(UserError, match="at most 4194304 ids, not 1000000000"):
        train_tokenizer(SAMPLE, 10**9, tmp_path / "t.json")
    with pytest.raises(UserError, match="cannot write"):
        train_tokenizer(SAMPLE, 261, tmp_path / "missing" / "t.json")


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'dsv3_jax\[tokenizers\]'"):
        load_tokenizer(write(tmp_path / "t.json", METASPACE))


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}


@pytest.mark.parametrize(
    "template, config, prefix",
    [
        (None, None, (1,)),  # nothing is said: bos, as in training here
        (None, {}, ()),  # transformers' AutoTokenizer adds nothing then
        (None, {"add_bos_token": True}, (1,)),
        (None, {"add_bos_token": False}, ()),
        (TEMPLATE, {}, (1,)),
        (TEMPLATE, None, (1,)),
    ],
)
def test_a_prompt_begins_with_what_its_files_say(tmp_path, template, config, prefix):
    path = write(tmp_path / "tokenizer.json", METASPACE | {"post_processor": template})
    if config is not None:
        write(tmp_path / "tokenizer_config.json", config)
    assert load_tokenizer(path).prompt_prefix == prefix


@pytest.mark.parametrize("token_id", [1 << 22, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32])
def test_ids_beyond_any_vocabulary_are_refused(trained, tmp_path, token_id):
    """A table of them would take 16 GB, and int32 cannot hold them."""
    spec = json.loads(trained.path.read_text())
    spec["model"]["vocab"]["far away"] = token_id
    with pytest.raises(
        UserError, match=r"t\.json: .*(exceeds the 4194304 allowed|usable)"
    ) as error:
        load_tokenizer(write(tmp_path / "t.json", spec))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("token_id", [7, 1 << 31])
def test_an_added_token_with_another_id_than_the_vocabulary_s_is_refused(
    trained, tmp_path, token_id
):
    spec = json.loads(trained.path.read_text())
    spec["added_tokens"][2]["id"] = token_id
    with pytest.raises(UserError, match=rf"has the id {token_id}, but the vocabulary gives it 2"):
        load_tokenizer(write(tmp_path / "t.json", spec))


def test_a_configuration_beside_a_tokenizer_is_bounded(trained, tmp_path):
    path = write(tmp_path / "tokenizer.json", json.loads(trained.path.read_text()))
    for raw in (b"[" * 100_000, b'{"a":[' + b"[]," * (1 << 20) + b"[]]}", b"[]", b"\xff"):
        (tmp_path / "tokenizer_config.json").write_bytes(raw)
        with pytest.raises(UserError, match=r"tokenizer_config\.json: "):
            load_tokenizer(path)

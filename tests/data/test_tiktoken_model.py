"""tiktoken.model in the published form: ids of the library's own Encoding, and what is refused."""

import base64
import json

import numpy as np
import pytest

from dsv3_jax.config import UserError
from dsv3_jax.data import tiktoken_model
from dsv3_jax.data.tokenizer import load_tokenizer

tiktoken = pytest.importorskip("tiktoken")

# As the publisher's class has it, in one line: tokenization_moonshot.py, pat_str.
PAT_STR = r"""[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""  # noqa: E501
MERGES = [
    "he",
    "ll",
    "hell",
    "hello",
    " w",
    "or",
    " wor",
    "ld",
    " world",
    "12",
    "123",
    "  ",
    "\n\n",
]
MERGES += ["'s", "中", "文", "中文", "한", "def", "    ", "HT", "ML"]
TEXTS = [
    "hello world",
    "Hello WORLD's HTMLParser isn't 12345 -- x=3.14;\r\n\r\n  \tend   ",
    "混合 English 中文 text한국어 ก็ éÅ ǅ",
    "def f(x):\n    return x  # comment\n\n\n",
    "<|im_end|>[EOS] are text here",
    "🙂👍🏽 \u00a0\u2003x",
    "",
]


def ranks():
    tokens = [bytes([255 - i]) for i in range(256)]
    tokens += [text.encode() for text in MERGES if len(text.encode()) > 1]
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


def added(num):
    named = {num: "[BOS]", num + 1: "[EOS]", num + 2: "<|im_end|>", num + 254: "[UNK]"}
    made = {str(i): {"content": name, "special": True} for i, name in named.items()}
    return made | {str(num + 9): {"content": "<|tool|>", "special": False}}


def write(folder, table=None, **changes):
    """A folder in the published form; a change of None leaves the key out."""
    table = ranks() if table is None else table
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in table.items()]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    config = {
        "added_tokens_decoder": added(len(table)),
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "eos_token": {"content": "[EOS]", "lstrip": False},
        "tokenizer_class": "TikTokenTokenizer",
    } | changes
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def published_encoding(table):
    """What the publisher's class makes, by the library: all ids past the merges are special."""
    num = len(table)
    names = {int(i): entry["content"] for i, entry in added(num).items()}
    special = {names.get(i, f"<|reserved_token_{i}|>"): i for i in range(num, num + 258)}
    return tiktoken.Encoding("kimi", pat_str=PAT_STR, mergeable_ranks=table, special_tokens=special)


def test_the_pattern_is_the_published_one():
    assert "|".join(tiktoken_model.PATTERNS) == PAT_STR


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_published_tokenizer(tmp_path, text):
    tokenizer = load_tokenizer(write(tmp_path))
    expected = published_encoding(ranks()).encode(text, disallowed_special=())
    found = tokenizer.encode(text)
    assert found.dtype == np.int32 and found.tolist() == expected
    assert tokenizer.decode(found) == text
    assert tokenizer.count_bytes(found) == len(text.encode())


def test_merges_and_specials_are_where_the_files_say(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path) / "tiktoken.model")
    num = len(ranks())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (num, num + 1)
    assert tokenizer.vocab_size == num + 256  # Kimi's vocab_size of 163840 is 163584 and 256
    assert tokenizer.decode([num, *tokenizer.encode("hello"), num + 9, num + 2]) == "hello<|tool|>"
    assert tokenizer.prompt_prefix == ()  # the published class puts nothing before a text
    assert len(tokenizer.encode("hello world")) == 2


def cut_one_by_one(text, longest):
    """The published rule, a character at a time."""
    if not text:
        return [""]
    pieces, begin, length, space = [], 0, 0, text[0].isspace()
    for i, character in enumerate(text):
        if character.isspace() != space:
            length, space = 1, character.isspace()
            continue
        length += 1
        if length > longest:
            pieces.append(text[begin:i])
            begin, length = i, 1
    return [*pieces, text[begin:]]


def test_long_texts_are_cut_where_the_published_class_cuts(monkeypatch):
    monkeypatch.setattr(tiktoken_model, "MAX_RUN", 3)
    monkeypatch.setattr(tiktoken_model, "MAX_CHARACTERS", 20)
    rng = np.random.default_rng(0)
    for length in (1, 3, 4, 17, 20, 21, 60):
        for _ in range(20):
            text = "".join(rng.choice(list("aé \n\u2003"), length, p=[0.4, 0.3, 0.1, 0.1, 0.1]))
            expected = [
                piece
                for start in range(0, length, 20)
                for piece in cut_one_by_one(text[start : start + 20], 3)
            ]
            assert list(tiktoken_model.cut_text(text)) == expected


def test_a_long_run_gets_the_ids_of_its_pieces(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path))
    text = "l" * 25_001 + " hello"
    encoding = published_encoding(ranks())
    pieces = cut_one_by_one(text, 25_000)
    expected = [i for piece in pieces for i in encoding.encode_ordinary(piece)]
    assert len(pieces) == 2 and tokenizer.encode(text).tolist() == expected


def python_class(patterns):
    lines = "\n".join(f'            r"""{pattern}""",' for pattern in patterns)
    return (
        f'class TikTokenTokenizer:\n    pat_str = "|".join(\n        [\n{lines}\n        ]\n    )\n'
    )


def test_the_publishers_class_may_lie_beside_and_must_have_the_known_pattern(tmp_path):
    folder = write(tmp_path, auto_map=None)
    with pytest.raises(UserError, match=r"pattern .* is not known"):
        load_tokenizer(folder)
    code = folder / "tokenization_moonshot.py"
    code.write_text("raise SystemExit('executed')\n" + python_class(tiktoken_model.PATTERNS))
    assert load_tokenizer(folder).decode([255]) == "\0"
    other = list(tiktoken_model.PATTERNS)
    other[3] = r"\p{N}"
    code.write_text(python_class(other))
    with pytest.raises(UserError, match="its pat_str is not the one known"):
        load_tokenizer(folder)


REFUSED = {
    "another class": ({"tokenizer_class": "LlamaTokenizer"}, "do not name TikTokenTokenizer"),
    "another file": (
        {"auto_map": {"AutoTokenizer": ["tokenization_x.TikTokenTokenizer", None]}},
        "do not name TikTokenTokenizer",
    ),
    "no specials": ({"added_tokens_decoder": None}, "has no added_tokens_decoder"),
    "specials among the merges": (
        {"added_tokens_decoder": {"7": {"content": "[BOS]"}}},
        "must have content and an id from",
    ),
    "an id that is no number": (
        {"added_tokens_decoder": {"x": {"content": "[BOS]"}}},
        "must have content and an id from",
    ),
    "no bos": ({"bos_token": None}, "bos_token='None' is none of"),
    "an eos without an id": ({"eos_token": "<|end|>"}, "eos_token='<|end|>' is none of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_do_not_say_everything_are_refused(tmp_path, case):
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        load_tokenizer(write(tmp_path, **changes))


@pytest.mark.parametrize(
    "text, message",
    [
        ("aGVsbG8= 0\n", "255 of the 256 bytes|are no token"),
        ("aGVsbG8 0\n", "line 1 is not a new token"),
        ("aGVsbG8= 5\n", "line 1 is not a new token in base64 and the rank 0"),
        ("AA== 0\nAA== 1\n", "line 2 is not a new token"),
        ("\u00e9", "line 1 is not a new token"),
        ("", "256 of the 256 bytes"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "Git LFS pointer"),
    ],
)
def test_damaged_merges_are_refused(tmp_path, text, message):
    folder = write(tmp_path)
    (folder / "tiktoken.model").write_text(text)
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder)

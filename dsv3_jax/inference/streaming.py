"""Shows tokens as they come: as text, or as ids."""

from collections.abc import Iterable

from dsv3_jax.data.tokenizer import StreamDecoder, Tokenizer


def print_ids(tokens: Iterable[int], eos: int) -> None:
    """Prints ids with commas between, up to and with the end of the text."""
    separator = ""
    for token in tokens:
        print(f"{separator}{token}", end="", flush=True)
        separator = ","
        if token == eos:
            break
    print()


def print_text(prompt: str, tokens: Iterable[int], tokenizer: Tokenizer, eos: int) -> None:
    """Prints a prompt and its continuation, up to the end of the text."""
    decoder = StreamDecoder(tokenizer, continues=True)
    print(prompt, end="", flush=True)
    for token in tokens:
        if token == eos:
            break
        print(decoder.push(token), end="", flush=True)
    print(decoder.flush())

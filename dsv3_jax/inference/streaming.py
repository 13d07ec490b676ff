"""Shows tokens as they come: as text, or as ids."""

from collections.abc import Container, Iterable

from dsv3_jax.data.tokens import StreamDecoder, Tokenizer


def print_ids(tokens: Iterable[int], ends: Container[int]) -> None:
    """Prints ids with commas between, up to and with the first that ends the text."""
    separator = ""
    for token in tokens:
        print(f"{separator}{token}", end="", flush=True)
        separator = ","
        if token in ends:
            break
    print()


def print_text(
    prompt: str, tokens: Iterable[int], tokenizer: Tokenizer, ends: Container[int]
) -> None:
    """Prints a prompt and its continuation, up to what ends the text."""
    decoder = StreamDecoder(tokenizer, continues=True)
    print(prompt, end="", flush=True)
    for token in tokens:
        if token in ends:
            break
        print(decoder.push(token), end="", flush=True)
    print(decoder.flush())

"""Files of the folder `kernels` beside JAX's compiled programs: each is its own proof."""

import hashlib
import json
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import jax


def folder() -> Path | None:
    """`kernels` in the folder of compiled programs; None where JAX keeps none on this machine."""
    config: Any = jax.config  # its options are attributes that types do not know
    beside = config.jax_compilation_cache_dir
    if not beside or "://" in str(beside) or not config.jax_enable_compilation_cache:
        return None
    return Path(beside) / "kernels"


def place(folder: Path, name: str) -> Path:
    """The file in the folder of what has this name."""
    return folder / hashlib.sha256(name.encode()).hexdigest()


def sealed(head: Any, body: bytes) -> bytes:
    """A file's content, which begins with the digest of the rest. head: anything for JSON."""
    rest = json.dumps(head).encode() + b"\n" + body
    return hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest


def opened(content: bytes) -> tuple[Any, bytes]:
    """The head and the body of what was sealed; ValueError where it is damaged."""
    digest, _, rest = content.partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != digest:
        raise ValueError("its content does not have the digest that it begins with")
    head, _, body = rest.partition(b"\n")
    return json.loads(head), body


def write(file: Path, content: bytes) -> None:
    """Whole or not at all, whoever else writes it; a folder that refuses keeps nothing."""
    part = file.with_name(f"{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(file)
    except OSError as error:
        warnings.warn(f"a kernel is not kept: {error}", stacklevel=5)

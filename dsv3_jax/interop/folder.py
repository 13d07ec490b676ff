"""What lies in a folder whose weights are not where they are looked for, in one message."""

from __future__ import annotations

from pathlib import Path

from dsv3_jax.config import UserError
from dsv3_jax.config.files import read_config

_OTHER_FORMS = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".npz",
    ".onnx",
)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_ADAPTER = "adapter_config.json"
_SHOWN = 4


def other_weights(folder: Path) -> list[str]:
    """Names of files that seem to hold weights in a form that is not read, or are not indexed."""
    ends = (*_OTHER_FORMS, *(f"{form}.index.json" for form in _OTHER_FORMS), ".safetensors")
    names = (p.name for p in folder.iterdir() if not p.name.startswith("."))
    return sorted(name for name in names if name.endswith(ends) and name != "training_args.bin")


def describes_a_model(folder: Path) -> bool:
    """Whether the folder has a config.json of the Hugging Face form, or weights of another form."""
    try:
        values = read_config(folder) if (folder / "config.json").is_file() else {}
    except (UserError, OSError):
        return True  # reading it as one says what is wrong with it
    return "model_type" in values or bool(other_weights(folder)) or (folder / _ADAPTER).exists()


def refuse_adapter(folder: Path) -> None:
    """Raises UserError for a folder of PEFT's that holds an adapter alone."""
    if (folder / _ADAPTER).exists() and not (folder / "config.json").exists():
        raise UserError(
            f"{folder} holds an adapter ({_ADAPTER}), not a model: merge it into its base (with "
            "peft: merge_and_unload) and give the folder of the merged weights"
        )


def check_apart(src: Path, dst: Path) -> None:
    """Raises UserError where writing `dst` over what is there would remove `src`."""
    if src.resolve().is_relative_to(dst.resolve()):
        raise UserError(f"{dst} is, or holds, what is read ({src}): choose another folder to write")


def no_weights(folder: Path, index: str, single: str) -> UserError:
    """The error for a folder without `index` and `single`, saying what is there instead."""
    names = other_weights(folder)
    if not names:
        return UserError(f"{folder / single}: no such file, and no {index}: no weights are here")
    for name in names:
        if (folder / name).is_symlink() and not (folder / name).exists():
            return UserError(
                f"{folder / name} is a link to nowhere, as an interrupted download leaves it: "
                "fetch it again"
            )
    listed = ", ".join(names[:_SHOWN])
    listed += f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    if any(name.endswith(".safetensors") for name in names):
        return UserError(
            f"{folder}: found {listed}, but neither {index}, which says what is in which file, nor "
            f"{single}: fetch the index, or rename a single file to that"
        )
    pickled = any(name.endswith(_PICKLED) for name in names)
    return UserError(
        f"{folder}: only safetensors are read, found {listed}"
        + (": pickled files (.bin, .pt) can run code when read" if pickled else "")
        + ". Look for a safetensors form of this checkpoint, or convert it (with transformers: "
        "from_pretrained(...).save_pretrained(...))"
    )

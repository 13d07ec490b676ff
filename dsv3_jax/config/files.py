"""Files that are not what their name says: Git LFS pointers in the place of large files."""

from __future__ import annotations

import re
from pathlib import Path

from dsv3_jax.config.rules import UserError

LFS_START = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(start: bytes, path: Path) -> None:
    """Raises UserError when a file begins as a Git LFS pointer does (github.com/git-lfs/git-lfs,
    docs/spec.md): some 130 bytes of text in the place of the file itself."""
    if not start.startswith(LFS_START):
        return
    size = re.search(rb"\nsize (\d{1,15})\n?", start)
    of = f" of {int(size[1]):,} bytes" if size else ""
    raise UserError(
        f"{path}: is a Git LFS pointer, not the file{of} that it stands for: fetch it "
        "(`git lfs pull`, or download it again)"
    )

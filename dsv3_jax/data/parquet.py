"""Rows of parquet files, in memory that their sizes on the disk bound.

A parquet file of some kilobytes can stand for terabytes: pages compress a thousandfold, and a text
in a dictionary may be repeated by every row for two bytes. So columns that would swell are refused
before they are read, dictionaries stay dictionaries, and a row is looked at before it is expanded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import UserError

MAX_ROW_BYTES = 64 << 20
# Text compresses to a tenth or so; what stands for more than that many times its bytes, and for
# more than that much memory, is not text.
_MAX_RATIO, _MAX_SWOLLEN_BYTES = 200, 128 << 20
# Of the file's metadata: a schema of its own can claim any size.
_MAX_THRIFT_BYTES, _MAX_THRIFT_ITEMS = 64 << 20, 1 << 20


def parquet_columns(path: Path) -> list[str]:
    """The names of a file's columns; UserError as below."""
    with _opened(path) as file:
        return file.schema_arrow.names


def parquet_rows(path: Path, column: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file: row N", row) with one column, or with all of them.

    UserError for a file that is none, that would swell, or a row of more than 64 MiB.
    """
    with _opened(path) as file:
        _refuse_swelling(file.metadata, path)
        columns = None if column is None else [column]
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            batch.validate(full=True)  # dictionaries' indices and UTF-8 among it
            sizes = sum((_row_bytes(array) for array in batch.columns), np.zeros(len(batch)))
            together = float(sizes.sum()) <= MAX_ROW_BYTES
            rows = batch.to_pylist() if together else None
            for i in range(len(batch)):
                number += 1
                place = f"{path}: row {number}"
                if sizes[i] > MAX_ROW_BYTES:
                    raise UserError(f"{place}: more than {MAX_ROW_BYTES:,} bytes")
                yield place, rows[i] if rows else batch.slice(i, 1).to_pylist()[0]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{path}: .parquet needs pyarrow: pip install 'dsv3_jax[parquet]'"
        ) from error
    limits: dict[str, Any] = {
        "thrift_string_size_limit": _MAX_THRIFT_BYTES,
        "thrift_container_size_limit": _MAX_THRIFT_ITEMS,
    }
    try:
        with pyarrow.parquet.ParquetFile(path, **limits) as file:
            texts = _text_columns(file.metadata.schema)
        with pyarrow.parquet.ParquetFile(
            # Read as it comes, not a whole column at once.
            path,
            read_dictionary=texts,
            buffer_size=1 << 20,
            **limits,
        ) as file:
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # names of columns too
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error).splitlines() or [""])[0][:300]
        raise UserError(f"{path}: not a readable parquet file: {reason}") from error


def _text_columns(schema: Any) -> list[str]:
    columns = [schema.column(i) for i in range(len(schema))]
    return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def _refuse_swelling(metadata: Any, path: Path) -> None:
    # Not column by column: Arrow ends the process for statistics of a column that do not fit.
    stored = path.stat().st_size
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).total_byte_size
        if size > max(_MAX_SWOLLEN_BYTES, _MAX_RATIO * stored):
            raise UserError(
                f"{path}: row group {group} would swell from {stored:,} bytes at most to {size:,}: "
                "not read"
            )


def _row_bytes(array: Any) -> np.ndarray:
    """About how many bytes each row of an Arrow array takes once it is expanded."""
    import pyarrow.compute
    import pyarrow.types as types

    compute: Any = pyarrow.compute  # its functions are made when it is imported
    kind = array.type
    if types.is_dictionary(kind):
        if not len(array.dictionary):
            return np.zeros(len(array))
        lengths = _row_bytes(array.dictionary)
        indices = compute.fill_null(array.indices, 0)
        return lengths[np.asarray(indices)]
    if types.is_list(kind) or types.is_large_list(kind):
        starts = np.asarray(array.offsets).astype(np.int64)
        inner = _row_bytes(array.values)
        total = np.concatenate([[0.0], np.cumsum(inner)])
        return total[starts[1:]] - total[starts[:-1]] + 64
    if types.is_struct(kind):
        fields = [_row_bytes(array.field(i)) for i in range(kind.num_fields)]
        return sum(fields, np.full(len(array), 64.0))
    if types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind):
        lengths = compute.fill_null(compute.binary_length(array), 0)
        return np.asarray(lengths) + 64.0
    return np.full(len(array), 64.0)

"""From the records of a finished run to the file that was asked for.

Every writer reads the records a block at a time, so none needs memory for all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .streams import naming
from .work import Work

SUFFIXES = (".npy", ".parquet", ".safetensors", ".jsonl")

_BLOCK = 1024
_SAFETENSORS = {"float32": "F32", "int8": "I8", "uint8": "U8"}


@dataclass(frozen=True)
class Layout:
    """One record: a vector and, for ``int8`` and ``uint8`` vectors, its scale.

    Attributes:
        width: values of a stored vector.
        dtype: of them, as numpy writes it.
        scaled: whether there is a scale.
        floats: values of the vector before it was converted; eight times the bytes of bits.
    """

    width: int
    dtype: str
    scaled: bool
    floats: int

    @property
    def record(self) -> np.dtype[Any]:
        fields: list[Any] = [("vector", self.dtype, (self.width,))]
        if self.scaled:
            fields.append(("scale", "<f4"))
        return np.dtype(fields)

    def records(self, vectors: NDArray[Any], scales: NDArray[np.float32] | None) -> bytes:
        """``[N, width]`` vectors and ``[N]`` scales as bytes."""
        out = np.empty(len(vectors), self.record)
        out["vector"] = vectors
        if scales is not None:
            out["scale"] = scales
        return out.tobytes()


def check_suffix(output: Path) -> None:
    """Say early what could not be written at the end.

    Raises:
        ValueError: an unknown ending, or no pyarrow for ``.parquet``.
    """
    if output.name in SUFFIXES:
        raise ValueError(f"{output} is an ending without a name: name the output out{output.name}")
    if output.suffix not in SUFFIXES:
        raise ValueError(f"{output} ends in none of {', '.join(SUFFIXES)}: name the output so")
    if output.suffix == ".parquet":
        try:
            import pyarrow.parquet  # type: ignore[import-not-found,import-untyped]  # noqa: F401
        except ImportError:
            raise ValueError(
                "writing .parquet needs pyarrow: pip install pyarrow, or choose another ending"
            ) from None


def side_files(output: Path) -> dict[str, Path]:
    """What a run may make beside an output: ``errors``, and by its format ``ids``, ``scales``."""
    names = {"errors": "errors.jsonl"}
    if output.suffix in (".npy", ".safetensors"):
        names["ids"] = "ids.jsonl"
    if output.suffix == ".npy":
        names["scales"] = "scales.npy"
    return {kind: output.with_name(f"{output.name}.{name}") for kind, name in names.items()}


def finish(work: Work, layout: Layout) -> None:
    """Write the output and its side files; the output itself appears last, whole."""
    output, beside = work.output, side_files(work.output)
    write = {
        ".npy": _write_npy,
        ".safetensors": _write_safetensors,
        ".parquet": _write_parquet,
        ".jsonl": _write_jsonl,
    }[output.suffix]
    with _replacing(output, work.path("output.tmp")) as temporary:
        write(temporary, work, layout)
        wanted = {"errors": work.state.failed > 0, "ids": True, "scales": layout.scaled}
        for kind, path in beside.items():
            if not wanted[kind]:
                path.unlink(missing_ok=True)  # of an earlier run
                continue
            with _replacing(path, work.path(f"{kind}.tmp")) as beside_temporary:
                if kind == "scales":
                    _write_scales(beside_temporary, work, layout)
                else:
                    _copy(work.path(f"{kind}.jsonl"), beside_temporary)
    work.remove()


@contextlib.contextmanager
def _replacing(path: Path, temporary: Path) -> Iterator[Path]:
    """A name to write to; what is there in the end is synced and becomes ``path`` at once."""
    try:
        with naming(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as given, target.open("wb") as taken:
        shutil.copyfileobj(given, taken)


def _blocks(work: Work, layout: Layout) -> Iterator[NDArray[Any]]:
    with work.path("rows.raw").open("rb") as file:
        while len(block := np.fromfile(file, layout.record, _BLOCK)):
            yield block


def _write_header(file: BinaryIO, shape: tuple[int, ...], dtype: str) -> None:
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _write_npy(path: Path, work: Work, layout: Layout) -> None:
    with path.open("wb") as file:
        _write_header(file, (work.state.done, layout.width), layout.dtype)
        for block in _blocks(work, layout):
            file.write(block["vector"].tobytes())


def _write_scales(path: Path, work: Work, layout: Layout) -> None:
    with path.open("wb") as file:
        _write_header(file, (work.state.done,), "<f4")
        for block in _blocks(work, layout):
            file.write(block["scale"].tobytes())


def _write_safetensors(path: Path, work: Work, layout: Layout) -> None:
    """The format by hand, since its library wants all values in memory."""
    count, dtype = work.state.done, np.dtype(layout.dtype)
    size = count * layout.width * dtype.itemsize
    tensors: dict[str, Any] = {}
    start = 0
    if layout.scaled:  # first, where its four bytes a value are aligned
        tensors["scales"] = {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}
        start = 4 * count
    tensors["vectors"] = {
        "dtype": _SAFETENSORS[dtype.name],
        "shape": [count, layout.width],
        "data_offsets": [start, start + size],
    }
    header = json.dumps({"__metadata__": {"format": "qvlfast"}, **tensors}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for field in ("scale", "vector") if layout.scaled else ("vector",):
            for block in _blocks(work, layout):
                file.write(block[field].tobytes())


def _with_ids(
    work: Work, layout: Layout
) -> Iterator[tuple[NDArray[Any], list[Any], list[dict[str, Any] | None]]]:
    """Blocks of records with the id and the error, if any, of each."""
    ids, errors = work.lines("ids.jsonl"), work.lines("errors.jsonl")
    error = next(errors, None)
    for block in _blocks(work, layout):
        names: list[Any] = []
        failures: list[dict[str, Any] | None] = []
        for _ in range(len(block)):
            entry = next(ids)
            names.append(entry["id"])
            failed = error is not None and error["index"] == entry["index"]
            failures.append(error if failed else None)
            error = next(errors, None) if failed else error
        yield block, names, failures


def _write_jsonl(path: Path, work: Work, layout: Layout) -> None:
    """Failed items are left out. Nine digits give a float32 back exactly."""
    number = "%.9g" if layout.dtype == "<f4" else "%d"
    vector_format = ", ".join([number] * layout.width)
    index = 0
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for block, names, failures in _with_ids(work, layout):
            for record, name, failure in zip(block, names, failures, strict=True):
                if failure is None:
                    numbers = vector_format % tuple(record["vector"].tolist())
                    scale = f', "scale": {record["scale"]:.9g}' if layout.scaled else ""
                    label = json.dumps(name, ensure_ascii=False)
                    file.write(f'{{"index": {index}, "id": {label}, "embedding": [{numbers}]')
                    file.write(f"{scale}}}\n")
                index += 1


def _write_parquet(path: Path, work: Work, layout: Layout) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    value = pa.from_numpy_dtype(np.dtype(layout.dtype))
    fields = [("id", pa.string()), ("embedding", pa.list_(value, layout.width))]
    if layout.scaled:
        fields.append(("scale", pa.float32()))
    schema = pa.schema([*fields, ("error", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for block, names, failures in _with_ids(work, layout):
            flat = pa.array(np.ascontiguousarray(block["vector"]).reshape(-1))
            columns = [
                pa.array([_text(name) for name in names], pa.string()),
                pa.FixedSizeListArray.from_arrays(flat, layout.width),
            ]
            if layout.scaled:
                columns.append(pa.array(np.ascontiguousarray(block["scale"])))
            codes = [failure and failure["code"] for failure in failures]
            columns.append(pa.array(codes, pa.string()))
            writer.write_table(pa.table(columns, schema=schema))


def _text(name: Any) -> str:
    """An id as a string of real Unicode."""
    return str(name).encode("utf-8", "replace").decode("utf-8")

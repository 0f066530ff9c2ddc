"""Find a checkpoint, map its safetensors files, and account for every tensor in them."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError

WEIGHT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors"]
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Expected:
    """What one tensor of a checkpoint must be.

    Attributes:
        shape: of it.
        dtypes: any of these, as safetensors names them.
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = tuple(WEIGHT_DTYPES)


def named_kind(name: str) -> str | None:
    """``embedder`` or ``reranker``, as a name says; their files are of the same form."""
    name = name.lower()
    return "reranker" if "rerank" in name else "embedder" if "embed" in name else None


def warn_of_another_kind(model: str | os.PathLike[str], kind: str) -> None:
    """What a model of the other kind answers looks like vectors, or scores; only names tell.

    Args:
        kind: what it is loaded as.
    """
    found = named_kind(Path(model).name)
    if found is not None and found != kind:
        warnings.warn(
            f"{os.fspath(model)} is loaded by qvlfast.{kind.capitalize()}, and by its name it is "
            f"of the other kind, whose answers mean nothing: use qvlfast.{found.capitalize()}",
            stacklevel=4,
        )


def locate(
    model: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """Return the local folder of ``model``: a folder, or a hub id such as ``org/name``.

    A hub id is looked up in the Hugging Face cache and downloaded if it is not there
    (``HF_HUB_OFFLINE=1`` or ``local_files_only`` forbids the download).

    Raises:
        CheckpointError: neither a folder nor a reachable hub id.
    """
    name = os.fspath(model)
    if not name:
        raise CheckpointError("the name of the model is empty: give a folder or a hub id")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{name} is a file: give the folder that holds config.json")
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{name} does not exist: give a checkpoint folder or a hub id such as "
            "Qwen/Qwen3-VL-Embedding-2B"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=_HUB_FILES,
                local_files_only=local_files_only,
            )
        )
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{name} is no folder here, is not in the Hugging Face cache, and the hub cannot be "
            f"reached: check the spelling, or run `hf download {name}` where there is a network"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is no folder here and could not be downloaded ({type(error).__name__}: "
            f"{str(error).splitlines()[0]})"
        ) from None


class Checkpoint:
    """The tensors of a checkpoint folder, memory-mapped: reading one copies nothing.

    Args:
        folder: holds ``model.safetensors``, or shards with their index.

    Raises:
        CheckpointError: no weights, a missing shard, a truncated or corrupt file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, safe_open] = {}
        self._owner: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        indexed = self._read_index()
        for path in sorted(set(indexed.values())) if indexed else [self._single_file()]:
            self._open(path)
        wrong = [n for n, path in indexed.items() if self._owner.get(n) != path]
        if wrong:
            raise CheckpointError(
                f"{folder / INDEX_NAME} places {wrong[0]} in {indexed[wrong[0]].name}, which does "
                f"not hold it ({len(wrong)} such entries): the shards are of different downloads"
            )

    def _read_index(self) -> dict[str, Path]:
        path = self.folder / INDEX_NAME
        if not path.exists():
            return {}
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            index = {str(name): self.folder / Path(file).name for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is damaged ({type(error).__name__}): download it again"
            ) from None
        missing = sorted({p.name for p in index.values() if not p.exists()})
        if missing:
            raise CheckpointError(
                f"{self.folder} lacks {', '.join(missing)}, which {INDEX_NAME} names: "
                "the download is incomplete"
            )
        return index

    def _single_file(self) -> Path:
        path = self.folder / "model.safetensors"
        if path.exists():
            return path
        others = sorted(self.folder.glob("*.safetensors"))
        if len(others) == 1:
            return others[0]
        found = "several safetensors files but no index" if others else "no safetensors file"
        hint = ""
        if any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt*")):
            hint = " (pickled .bin weights are not read: convert them to safetensors)"
        raise CheckpointError(f"{self.folder} holds {found}{hint}")

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
            names = list(file.keys())
            slices = {name: file.get_slice(name) for name in names}
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size if path.exists() else 0
            raise CheckpointError(
                f"{path} ({size:,} bytes) is truncated or corrupt: {error}; download it again"
            ) from None
        self._files[path] = file
        for name, view in slices.items():
            if name in self._owner:
                raise CheckpointError(
                    f"{name} is in both {self._owner[name].name} and {path.name}: "
                    "remove the shards that do not belong here"
                )
            self._owner[name] = path
            self.shapes[name] = tuple(view.get_shape())
            self.dtypes[name] = view.get_dtype()

    def check(self, parts: Mapping[str, Expected]) -> None:
        """Check that the files hold these ``parts`` of a quantised weight, before they are read.

        Raises:
            CheckpointError: names the first that is missing, misshapen or of another dtype.
        """
        for name, want in parts.items():
            if name not in self.shapes:
                beside = next((f" beside {other}" for other in parts if other in self.shapes), "")
                raise CheckpointError(
                    f"{name} is missing{beside}: the file is incomplete, download it again"
                )
            if self.dtypes[name] not in want.dtypes:
                raise CheckpointError(
                    f"{name} is {self.dtypes[name]}, expected {_one_of(want.dtypes)}: download it "
                    "again, or take the original checkpoint with quantization='int8'"
                )
            if self.shapes[name] != want.shape:
                raise CheckpointError(
                    f"{name} is {list(self.shapes[name])}, expected {list(want.shape)}: download "
                    "it again"
                )

    def require(self, expected: Mapping[str, Expected], optional: frozenset[str]) -> None:
        """Check that the files hold exactly the ``expected`` tensors.

        Args:
            optional: names that may be absent.

        Raises:
            CheckpointError: names every kind of mismatch: missing, left over, misshapen, of
                another dtype.
        """
        missing = [n for n in expected if n not in self.shapes and n not in optional]
        left_over = [n for n in self.shapes if n not in expected]
        misshapen = [
            f"{n} is {list(self.shapes[n])}, expected {list(want.shape)}"
            for n, want in expected.items()
            if n in self.shapes and self.shapes[n] != want.shape
        ]
        wrong_type = [
            f"{n} is {self.dtypes[n]}, expected {_one_of(want.dtypes)}"
            for n, want in expected.items()
            if n in self.dtypes and self.dtypes[n] not in want.dtypes
        ]
        problems = {
            "missing": missing,
            "left over": left_over,
            "of another shape": misshapen,
            "of a type this package does not load": wrong_type,
        }
        lines = []
        for what, names in problems.items():
            if names:
                more = f" … and {len(names) - 5} more" if len(names) > 5 else ""
                lines.append(f"{len(names)} {what}: {'; '.join(names[:5])}{more}")
        if lines:
            raise CheckpointError(
                f"{self.folder}: the weights do not fit config.json\n  " + "\n  ".join(lines)
            )

    def file_of(self, name: str) -> Path:
        """The file that holds ``name``."""
        return self._owner[name]

    def dtype(self, name: str) -> torch.dtype:
        """The torch dtype that ``name`` is stored in."""
        return WEIGHT_DTYPES[self.dtypes[name]]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, backed by the mapped file."""
        value: torch.Tensor = self._files[self._owner[name]].get_tensor(name)
        return value

    def scales(self, name: str) -> torch.Tensor:
        """A tensor that many others are multiplied with, in float32.

        Raises:
            CheckpointError: one of its values is NaN or infinite; no request would have an answer.
        """
        values = self.tensor(name).float()
        if wrong := values.numel() - int(values.isfinite().sum()):
            raise CheckpointError(
                f"{name}: {wrong} of {values.numel()} values are NaN or infinite: the file is "
                "damaged, download it or quantise it again"
            )
        return values


def _one_of(dtypes: tuple[str, ...]) -> str:
    return dtypes[0] if len(dtypes) == 1 else f"one of {', '.join(dtypes)}"

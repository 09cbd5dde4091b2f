"""A model's weight files: what lies in them, read one tensor at a time, and written one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankwise.errors import RankwiseError
from rankwise.export.reader import read_tensors

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""torch's dtypes by safetensors' names. Tensors of other dtypes are copied byte by byte."""
SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""The same the other way round."""
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
"""The dtypes that a weight may have for an update to be added to it."""
FILES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
"""Where transformers and diffusers look for weights, in this order: such a file, or an index of several."""
INDEX = ".index.json"
"""The ending of an index."""


class Stored(NamedTuple):
    """A tensor as it lies in a file, or as it shall lie in one."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name of it."""
    at: int = 0
    """Its first byte in a safetensors file."""
    size: int = 0
    """How many bytes it takes there."""


@dataclass(frozen=True)
class Checkpoint:
    """The weight files of a model, of which nothing but names, shapes and dtypes is in memory."""

    folder: Path
    stored: dict[str, Stored]
    """Every tensor by its name in the files."""
    kind: str
    """Which of `FILES` it is, or has an index of."""
    index: dict[str, Any] | None
    """The index of several files; None for a single one."""
    mapped: dict[str, Tensor]
    """The tensors of pickled files, which the operating system fetches from the disk when they are used."""

    def read(self, key: str) -> Tensor:
        """One tensor; where torch has no dtype for it, its bytes."""
        if key in self.mapped:
            return self.mapped[key]
        stored = self.stored[key]
        dtype = DTYPES.get(stored.dtype)
        if stored.size == 0:
            return torch.empty(stored.shape, dtype=dtype)
        content = bytearray(stored.size)
        with (self.folder / stored.file).open("rb") as file:
            file.seek(stored.at)
            file.readinto(content)
        return torch.frombuffer(content, dtype=dtype or torch.uint8).view(stored.shape if dtype else -1)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The weight files of a model's folder.

    Raises:
        RankwiseError: there are none, or one is missing, broken, or a pickle that holds more than tensors.
    """
    try:
        return _opened(folder)
    except RankwiseError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, AttributeError, RecursionError) as error:
        raise RankwiseError(f"{folder} holds no whole model in its weight files ({type(error).__name__})") from error


def _opened(folder: Path) -> Checkpoint:
    index = None
    for kind in FILES:
        files = [kind]
        if (folder / kind).is_file():
            break
        if (folder / (kind + INDEX)).is_file():
            index = dict(json.loads((folder / (kind + INDEX)).read_text(encoding="utf-8")))
            files = sorted(set(index["weight_map"].values()))
            break
    else:
        raise RankwiseError(f"{folder} holds none of {', '.join(FILES)}, nor an index of one")
    stored: dict[str, Stored] = {}
    mapped: dict[str, Tensor] = {}
    for name in files:
        if Path(name).name != name:
            raise RankwiseError(f"an index in {folder} names a file outside its folder: {name!r}")
        if not (folder / name).is_file():
            raise RankwiseError(f"{folder} holds no {name}, which its index names")
        if name.endswith(".bin"):
            found = pickled_tensors(folder / name)
            mapped |= found
            stored |= {key: Stored(name, tuple(t.shape), SAFETENSORS_NAMES[t.dtype]) for key, t in found.items()}
        else:
            stored |= _read_header(folder / name)
    return Checkpoint(folder, stored, kind, index, mapped)


def _read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file."""
    read_tensors(path, only_header=True)  # the library checks what is about to be believed
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for key, told in header.items():
        first, behind = told["data_offsets"]
        found[key] = Stored(path.name, tuple(told["shape"]), told["dtype"], 8 + length + first, behind - first)
    return found


def pickled_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file, without running what it may hold beside them.

    Files in the form that torch wrote before version 1.6 cannot be mapped; they are read as a whole.

    Raises:
        RankwiseError: it is broken, or holds anything but tensors under their names.
    """
    try:
        try:
            found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise RankwiseError(f"{path} holds no tensors that torch reads with weights_only=True") from error
    if not isinstance(found, Mapping):
        raise RankwiseError(f"{path} must hold tensors under their names; found a {type(found).__name__}")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise RankwiseError(f"{path} must hold tensors under their names; found {key!r}, a {type(value).__name__}")
    return dict(found)


class Shards:
    """Safetensors files in a folder, in which every tensor has its place before any is written.

    safetensors' own writer takes a whole file's tensors at once, and a file may be as large as memory.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Stored]) -> None:
        self._folder = folder
        self._placed: dict[str, Stored] = {}
        for file in sorted({stored.file for stored in tensors.values()}):
            self._lay_out({key: stored for key, stored in tensors.items() if stored.file == file}, folder / file)

    def _lay_out(self, tensors: Mapping[str, Stored], path: Path) -> None:
        """Write a file's header, and make room for its tensors: wide dtypes first, which keeps each one aligned."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        sizes = {key: _size(stored) for key, stored in tensors.items()}
        widths = {key: sizes[key] // max(math.prod(stored.shape), 1) for key, stored in tensors.items()}
        end = 0
        for key in sorted(tensors, key=lambda key: (-widths[key], key)):
            stored = tensors[key]
            offsets = [end, end + sizes[key]]
            header[key] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": offsets}
            end = offsets[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        for key, stored in tensors.items():
            first = header[key]["data_offsets"][0]
            self._placed[key] = stored._replace(at=8 + len(text) + first, size=sizes[key])

    def write(self, key: str, tensor: Tensor) -> None:
        """Put a tensor in its place, in the dtype that it shall have there.

        Raises:
            RankwiseError: it would hold NaN or infinity there, or its place is for another shape.
        """
        stored = self._placed[key]
        if stored.dtype in DTYPES:
            if tuple(tensor.shape) != stored.shape:
                raise RankwiseError(f"{key!r} would be {tuple(tensor.shape)}, and its place is for {stored.shape}")
            tensor = tensor.to(DTYPES[stored.dtype])
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise RankwiseError(f"{key!r} would hold NaN or infinity in {tensor.dtype}")
        content = tensor.detach().contiguous().flatten().view(torch.uint8)
        with (self._folder / stored.file).open("r+b") as file:
            file.seek(stored.at)
            file.write(content.numpy().data)

    @property
    def files(self) -> dict[str, str]:
        """The file of every tensor."""
        return {key: stored.file for key, stored in self._placed.items()}

    @property
    def size(self) -> int:
        """How many bytes all tensors take."""
        return sum(stored.size for stored in self._placed.values())


def _is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity, told without another tensor of its size."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def _size(stored: Stored) -> int:
    """How many bytes a tensor takes."""
    if stored.dtype not in DTYPES:
        return stored.size
    return math.prod(stored.shape) * DTYPES[stored.dtype].itemsize

"""Cached outputs of frozen encoders: computed once, read in every epoch without augmentation.

    DIR/<hash>/          hash of the encoders, the precision and this format
      <name>/            one part, complete or absent
        outputs.bin      (T / 4, C) for each cut in turn; C is the sum of the encoders' channels
        index.npy        position of each cut, by the fingerprint of its input

A changed encoder or cut is not found in the cache and is encoded again.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from functools import cache
from itertools import chain, islice
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor, nn

from speechllm.errors import InputError
from speechllm.io import atomic_directory, check_space
from speechllm.models.zipformer.encoder import ZipformerEncoder, encoder_out_lens
from speechllm.precision import autocast

FORMAT = 1  # increase when the content changes for the same encoders and cuts
OUTPUTS, INDEX = "outputs.bin", "index.npy"
ENTRY = np.dtype([("key", "u8"), ("row", "u8"), ("frames", "u4")])  # row of the first output
FRAMES_PER_SECOND = 25  # encoder output
BATCHES_IN_PART = 500  # at most these are lost when filling is interrupted


def fingerprint(cut: Cut, on_the_fly_feats: bool = False) -> int:
    """Return a 64-bit hash of a cut's id, its features or audio, and its supervision times.

    Files are identified by path, size and modification time.
    """
    source = cut.drop_supervisions().to_dict()
    unused = "features" if on_the_fly_feats else "recording"
    files: list[str] = []
    for part in (source, *(track["cut"] for track in source.get("tracks", ()))):
        for name in ("custom", unused):  # custom fields do not affect the audio
            part.pop(name, None)
        files += [part["features"]["storage_path"]] if "features" in part else []
        files += [item["source"] for item in part.get("recording", {}).get("sources", ())]
    spoken = [(supervision.start, supervision.duration) for supervision in cut.supervisions]
    text = json.dumps([source, spoken, [*map(_size_and_time, files)]], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@cache
def _size_and_time(path: str) -> tuple[int, int] | None:
    """Return a file's size and modification time; None for URLs etc."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def hash_of_encoders(encoders: Iterable[ZipformerEncoder], *options) -> str:
    """Return 16 hexadecimal digits for the encoders' configs and parameters, except CTC heads."""
    digest = hashlib.sha256(repr(options).encode())
    for encoder in encoders:
        digest.update(f"{encoder.config!r}{encoder.chunkings[-1]}".encode())
        for name, value in encoder.state_dict().items():
            if not name.startswith("ctc_output."):
                digest.update(name.encode())
                digest.update(_as_bytes(value.cpu()))
    return digest.hexdigest()[:16]


def _as_bytes(value: Tensor) -> np.ndarray:
    return value.contiguous().flatten().view(torch.uint8).numpy()


class EncoderCache:
    """On-disk cache of encoder outputs in `dtype`, read by dataloader workers."""

    def __init__(
        self,
        directory: Path,
        encoders: Iterable[ZipformerEncoder],
        dtype: torch.dtype = torch.float32,
        on_the_fly_feats: bool = False,
    ):
        """
        Raises:
          InputError: a part in the directory is damaged.
        """
        encoders = list(encoders)
        self.folder = directory / hash_of_encoders(encoders, FORMAT, dtype)
        self.dims = [encoder.output_dim for encoder in encoders]
        self.dtype, self.on_the_fly_feats = dtype, on_the_fly_feats
        self.frame_bytes = sum(self.dims) * dtype.itemsize
        self.refresh()

    def refresh(self) -> None:
        """Read the indices of all complete parts."""
        self.parts = sorted(self.folder.glob("[!.]*"))  # parts being written begin with a dot
        indices = [self._index_of(part) for part in self.parts]
        index = np.concatenate([np.empty(0, ENTRY), *indices])
        order = index["key"].argsort()
        self.keys = index["key"][order]
        self.rows, self.frames = index["row"][order], index["frames"][order]
        self.part_numbers = np.repeat(np.arange(len(indices)), list(map(len, indices)))[order]

    def _index_of(self, part: Path) -> np.ndarray:
        try:
            index = np.load(part / INDEX)
        except Exception as error:  # numpy raises different exceptions
            raise InputError(f"{part / INDEX} cannot be read: {error}: remove {part}") from None
        size = int(encoder_out_lens(index["frames"].astype(int)).sum()) * self.frame_bytes
        if (there := (part / OUTPUTS).stat().st_size) != size:
            raise InputError(f"{part / OUTPUTS} has {there} bytes, not {size}: remove {part}")
        return index

    @property
    def gigabytes(self) -> float:
        return sum((part / OUTPUTS).stat().st_size for part in self.parts) / 1e9

    def with_fingerprint(self, cut: Cut) -> Cut:
        """Return the cut with its fingerprint as id."""
        return cut.with_id(str(fingerprint(cut, self.on_the_fly_feats)))

    def is_missing(self, cut: Cut) -> bool:
        return self._position(cut) is None

    def read(self, cut: Cut) -> tuple[Tensor, int]:
        """Return the encoders' concatenated outputs (T / 4, C) and the number of feature frames T.

        Raises:
          KeyError: the cut is missing.
        """
        if (position := self._position(cut)) is None:
            raise KeyError(cut.id)
        frames, row = int(self.frames[position]), int(self.rows[position])
        path = self.parts[self.part_numbers[position]] / OUTPUTS
        size, offset = encoder_out_lens(frames) * self.frame_bytes, row * self.frame_bytes
        data = torch.from_numpy(np.fromfile(path, np.uint8, size, offset=offset))
        return data.view(self.dtype).view(-1, sum(self.dims)), frames

    def _position(self, cut: Cut) -> int | None:
        key = np.uint64(fingerprint(cut, self.on_the_fly_feats))
        position = int(np.searchsorted(self.keys, key))
        return position if key in self.keys[position : position + 1] else None

    def check_space(self, seconds: float) -> None:
        """Check that the outputs for `seconds` of audio fit on the disk.

        Raises:
          InputError: disk space is insufficient.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = seconds * FRAMES_PER_SECOND * self.frame_bytes
        check_space(self.folder, needed, "the outputs of the encoders")

    def fill(
        self, encoders: Iterable[ZipformerEncoder], batches: Iterable[dict], device: torch.device
    ) -> None:
        """Encode and store batches of cuts `with_fingerprint`; call `refresh` to read them."""
        encoders, batches = list(encoders), iter(batches)
        for first in batches:
            part = chain([first], islice(batches, BATCHES_IN_PART - 1))
            with atomic_directory(self.folder / uuid4().hex) as folder:
                self._write_part(folder, encoders, part, device)

    def _write_part(self, folder: Path, encoders, batches: Iterable[dict], device) -> None:
        entries, row = [], 0
        with open(folder / OUTPUTS, "wb") as file:
            for batch in batches:
                outputs = encode_batch(encoders, batch, device, self.dtype)
                for cut_id, output, frames in zip(
                    batch["cut_ids"], outputs, batch["feature_lens"].tolist()
                ):
                    count = encoder_out_lens(frames)
                    file.write(_as_bytes(output[:count]))
                    entries.append((int(cut_id), row, frames))
                    row += count
        np.save(folder / INDEX, np.array(entries, ENTRY))

    def cached_encoders(self, encoders: Iterable[ZipformerEncoder]) -> nn.ModuleList:
        """Return modules that replace the encoders in a SpeechLLM, with their CTC heads."""
        ends = np.cumsum(self.dims).tolist()
        parts = zip(self.dims, ends, encoders)
        return nn.ModuleList(_CachedEncoder(end - dim, end, e.ctc_output) for dim, end, e in parts)


class _CachedEncoder(nn.Module):
    """Selects one encoder's output, channels `start` to `end` of the cached outputs."""

    frozen = True

    def __init__(self, start: int, end: int, ctc_output: nn.Module | None):
        super().__init__()
        self.start, self.end, self.ctc_output = start, end, ctc_output

    def compile_layers(self) -> None:
        """Do nothing: the outputs are cached."""

    def sample_chunking(self) -> None:
        """Return None: the chunking was fixed when the cache was filled."""

    def forward(
        self, outputs: Tensor, feature_lens: Tensor, feature_mask: bool, chunking: None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (B, T / 4, end - start) and lengths (B,) for cached outputs (B, T / 4, C)."""
        return outputs[..., self.start : self.end], encoder_out_lens(feature_lens)


@torch.no_grad()
def encode_batch(
    encoders: Iterable[ZipformerEncoder], batch: dict, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return all encoders' concatenated outputs (B, T / 4, C) in `dtype`, on the CPU."""
    features = batch["features"].to(device, non_blocking=True)
    with autocast(device, dtype):
        outputs = [encoder(features, batch["feature_lens"])[0] for encoder in encoders]
    return torch.cat([output.to(dtype) for output in outputs], dim=-1).cpu()

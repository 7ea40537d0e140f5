"""What frozen encoders make of cuts, computed once: epochs without augmentation read it again.

    DIR/<hash>/          of the encoders, the precision and this format
      <name>/            a part, complete or absent
        outputs.bin      (T / 4, C) of one cut after the other, C the channels of all encoders
        index.npy        where each cut is, under the hash of what is heard of it

So an encoder or a cut that changed finds nothing, and is heard anew; the rest is found.
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
from speechllm.whole_file import check_space, whole_directory
from speechllm.zipformer.encoder import ZipformerEncoder, encoder_out_lens

FORMAT = 1  # another number wherever the same encoders and cuts give another content
OUTPUTS, INDEX = "outputs.bin", "index.npy"
ENTRY = np.dtype([("key", "u8"), ("row", "u8"), ("frames", "u4")])  # row of the first output
FRAMES_PER_SECOND = 25  # of outputs
BATCHES_IN_PART = 500  # as many are lost when filling is interrupted


def fingerprint(cut: Cut, on_the_fly_feats: bool = False) -> int:
    """64 bits of what is heard of a cut: its id, its features or audio, where in it speech is.

    Of files this is where they are, their size, and when they were changed last.
    """
    heard = cut.drop_supervisions().to_dict()
    unheard = "features" if on_the_fly_feats else "recording"
    files = []
    for part in (heard, *(track["cut"] for track in heard.get("tracks", ()))):
        for name in ("custom", unheard):  # custom is what programs note for themselves
            part.pop(name, None)
        files += [part["features"]["storage_path"]] if "features" in part else []
        files += [source["source"] for source in part.get("recording", {}).get("sources", ())]
    spoken = [(supervision.start, supervision.duration) for supervision in cut.supervisions]
    text = json.dumps([heard, spoken, [*map(_size_and_time, files)]], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@cache
def _size_and_time(path: str) -> tuple[int, int] | None:
    """None of what is no file here, such as a URL."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def hash_of_encoders(encoders: Iterable[ZipformerEncoder], *options) -> str:
    """16 hexadecimal digits of sizes and parameters, without the CTC heads."""
    digest = hashlib.sha256(repr(options).encode())
    for encoder in encoders:
        digest.update(repr(encoder.config).encode())
        for name, value in encoder.state_dict().items():
            if not name.startswith("ctc_output."):
                digest.update(name.encode())
                digest.update(_as_bytes(value.cpu()))
    return digest.hexdigest()[:16]


def _as_bytes(value: Tensor) -> np.ndarray:
    return value.contiguous().flatten().view(torch.uint8).numpy()


class EncoderCache:
    """The outputs of some encoders, in `dtype`; loader processes read from it."""

    def __init__(
        self,
        directory: Path,
        encoders: Iterable[ZipformerEncoder],
        dtype: torch.dtype = torch.float32,
        on_the_fly_feats: bool = False,
    ):
        """Finds what is there.

        Raises:
          ValueError: naming a part that is damaged.
        """
        encoders = list(encoders)
        self.folder = directory / hash_of_encoders(encoders, FORMAT, dtype)
        self.dims = [encoder.output_dim for encoder in encoders]
        self.dtype, self.on_the_fly_feats = dtype, on_the_fly_feats
        self.frame_bytes = sum(self.dims) * dtype.itemsize
        self.look()

    def look(self) -> None:
        """Find the parts that are there by now."""
        self.parts = sorted(self.folder.glob("[!.]*"))  # those being written begin with a dot
        indices = [self._index_of(part) for part in self.parts]
        index = np.concatenate([np.empty(0, ENTRY), *indices])
        order = index["key"].argsort()
        self.keys = index["key"][order]
        self.rows, self.frames = index["row"][order], index["frames"][order]
        self.part_numbers = np.repeat(np.arange(len(indices)), list(map(len, indices)))[order]

    def _index_of(self, part: Path) -> np.ndarray:
        try:
            index = np.load(part / INDEX)
        except Exception as error:  # numpy's are of several kinds
            raise InputError(f"{part / INDEX} cannot be read: {error}: remove {part}") from None
        size = int(encoder_out_lens(index["frames"].astype(int)).sum()) * self.frame_bytes
        if (there := (part / OUTPUTS).stat().st_size) != size:
            raise InputError(f"{part / OUTPUTS} has {there} bytes, not {size}: remove {part}")
        return index

    @property
    def gigabytes(self) -> float:
        return sum((part / OUTPUTS).stat().st_size for part in self.parts) / 1e9

    def named(self, cut: Cut) -> Cut:
        """The cut with its fingerprint as its id."""
        return cut.with_id(str(fingerprint(cut, self.on_the_fly_feats)))

    def lacks(self, cut: Cut) -> bool:
        return self._place(cut) is None

    def read(self, cut: Cut) -> tuple[Tensor, int]:
        """The encoders' outputs side by side, (T / 4, C), and the feature frames T.

        Raises:
          KeyError: with the id of a cut that is not there.
        """
        place = self._place(cut)
        if place is None:
            raise KeyError(cut.id)
        frames = int(self.frames[place])
        data = np.fromfile(
            self.parts[self.part_numbers[place]] / OUTPUTS,
            np.uint8,
            encoder_out_lens(frames) * self.frame_bytes,
            offset=int(self.rows[place]) * self.frame_bytes,
        )
        return torch.from_numpy(data).view(self.dtype).view(-1, sum(self.dims)), frames

    def _place(self, cut: Cut) -> int | None:
        key = np.uint64(fingerprint(cut, self.on_the_fly_feats))
        place = int(np.searchsorted(self.keys, key))
        return place if place < len(self.keys) and self.keys[place] == key else None

    def check_space(self, seconds: float) -> None:
        """Whether the outputs for so much audio fit on the disk.

        Raises:
          ValueError: with both sizes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = seconds * FRAMES_PER_SECOND * self.frame_bytes
        check_space(self.folder, needed, "the outputs of the encoders")

    def fill(
        self, encoders: Iterable[ZipformerEncoder], batches: Iterable[dict], device: torch.device
    ) -> None:
        """Hear batches of cuts that are `named`; afterwards `look` finds them."""
        encoders, batches = list(encoders), iter(batches)
        for first in batches:
            self._write_part(encoders, chain([first], islice(batches, BATCHES_IN_PART - 1)), device)

    def _write_part(self, encoders, batches: Iterable[dict], device: torch.device) -> None:
        entries, row = [], 0
        with whole_directory(self.folder / uuid4().hex) as part:
            with open(part / OUTPUTS, "wb") as file:
                for batch in batches:
                    heard = outputs_of(encoders, batch, device, self.dtype)
                    counts = encoder_out_lens(batch["feature_lens"]).tolist()
                    frames = batch["feature_lens"].tolist()
                    for key, output, count, length in zip(batch["ids"], heard, counts, frames):
                        file.write(_as_bytes(output[:count]))
                        entries.append((int(key), row, length))
                        row += count
            np.save(part / INDEX, np.array(entries, ENTRY))

    def stand_ins(self) -> nn.ModuleList:
        """In place of the encoders, for what is read here in place of features."""
        ends = np.cumsum(self.dims).tolist()
        return nn.ModuleList(_HeardBefore(end - dim, end) for dim, end in zip(self.dims, ends))


class _HeardBefore(nn.Module):
    """An encoder whose output is given, among the channels `start` to `end` of all encoders."""

    frozen = True

    def __init__(self, start: int, end: int):
        super().__init__()
        self.start, self.end = start, end

    def compile_layers(self) -> None:
        """There are none."""

    def forward(
        self, outputs: Tensor, feature_lens: Tensor, feature_mask: bool
    ) -> tuple[Tensor, Tensor]:
        """outputs (B, T / 4, C), feature_lens (B,) -> (B, T / 4, end - start), lengths (B,)."""
        return outputs[..., self.start : self.end], encoder_out_lens(feature_lens)


@torch.no_grad()
def outputs_of(
    encoders: Iterable[ZipformerEncoder], batch: dict, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """What all encoders make of a batch, side by side in `dtype`: (B, T / 4, C), on the CPU."""
    features = batch["features"].to(device, non_blocking=True)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        outputs = [encoder(features, batch["feature_lens"])[0] for encoder in encoders]
    return torch.cat([output.to(dtype) for output in outputs], dim=-1).cpu()

"""Cached outputs of frozen encoders, computed once and read in every epoch (no augmentation).

    DIR/<hash>/     hash of an encoder, the precision and this format
      <xx>/<fingerprint of a cut's input>.safetensors
                    outputs (T / 4, C); metadata: T

Cuts are encoded again if they or the encoder have changed. Models with different sets of encoders
share the outputs.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from lhotse.cut import Cut
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from speechllm.errors import InputError
from speechllm.io import check_space, disk_full_as_input_error
from speechllm.models.zipformer.encoder import ZipformerEncoder, encoder_out_lens
from speechllm.precision import autocast

FORMAT = 2  # increase when the content changes for the same encoders and cuts
FRAMES_PER_SECOND = 25  # encoder output


def fingerprint(cut: Cut, on_the_fly_feats: bool = False) -> str:
    """Hash a cut's id, its features or audio, and its supervision times to 16 hexadecimal digits.

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
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@cache
def _size_and_time(path: str) -> tuple[int, int] | None:
    """Return a file's size and modification time; None for URLs and missing files."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def hash_of_encoder(encoder: ZipformerEncoder, *options) -> str:
    """Return 16 hexadecimal digits for an encoder's config and parameters, except its CTC head."""
    digest = hashlib.sha256(repr(options).encode())
    digest.update(f"{encoder.config!r}{encoder.chunkings[-1]}".encode())
    for name, value in encoder.state_dict().items():
        if not name.startswith("ctc_output."):
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class EncoderCache:
    """On-disk cache of encoder outputs in `dtype`, read by dataloader workers.

    Attributes:
      folders: one per encoder.
    """

    def __init__(
        self,
        directory: Path,
        encoders: Iterable[ZipformerEncoder],
        dtype: torch.dtype = torch.float32,
        on_the_fly_feats: bool = False,
    ):
        encoders = list(encoders)
        self.directory = directory
        self.folders = [directory / hash_of_encoder(one, FORMAT, dtype) for one in encoders]
        self.dims = [encoder.output_dim for encoder in encoders]
        self.dtype, self.on_the_fly_feats = dtype, on_the_fly_feats
        self.refresh()

    def refresh(self) -> None:
        """List the fingerprints of the cuts in the cache."""
        self._stored = [
            frozenset(path.stem for path in folder.glob("*/*.safetensors"))
            for folder in self.folders
        ]

    @property
    def keys(self) -> frozenset[str]:
        """Fingerprints of the cuts that all encoders have encoded."""
        return frozenset.intersection(*self._stored)

    def with_fingerprint(self, cut: Cut) -> Cut:
        """Return the cut with its fingerprint as id."""
        return cut.with_id(fingerprint(cut, self.on_the_fly_feats))

    def is_missing(self, cut: Cut) -> bool:
        """Return true if the cut was not in the cache when it was last listed."""
        key = fingerprint(cut, self.on_the_fly_feats)
        return any(key not in stored for stored in self._stored)

    def paths_of(self, key: str) -> list[Path]:
        """Return the file of each encoder."""
        return [folder / key[:2] / f"{key}.safetensors" for folder in self.folders]

    def read(self, cut: Cut) -> tuple[Tensor, int]:
        """Return all encoders' outputs (T / 4, C), concatenated, and the feature frames T.

        An incomplete cache raises InputError.
        """
        outputs = []
        for path in self.paths_of(fingerprint(cut, self.on_the_fly_feats)):
            try:
                with safe_open(path, "pt") as file:
                    outputs.append(file.get_tensor("outputs"))
                    frames = int(file.metadata()["frames"])
            except FileNotFoundError:
                raise InputError(f"the encoder cache has no outputs for cut {cut.id}") from None
            except SafetensorError as error:
                raise InputError(f"{path} is damaged ({error}): remove it") from None
        return torch.cat(outputs, dim=-1), frames

    def check_space(self, seconds: float) -> None:
        """Raise InputError if the outputs for `seconds` of audio do not fit on the disk."""
        self.directory.mkdir(parents=True, exist_ok=True)
        values = seconds * FRAMES_PER_SECOND * sum(self.dims)
        check_space(self.directory, values * self.dtype.itemsize, "the outputs of the encoders")

    def fill(
        self, encoders: Iterable[ZipformerEncoder], batches: Iterable[dict], device: torch.device
    ) -> None:
        """Encode and store batches of cuts `with_fingerprint`; call `refresh` to list them.

        Encoders that have encoded all cuts of a batch skip it.
        """
        encoders = list(encoders)
        with disk_full_as_input_error(self.directory):
            for batch in batches:
                paths = zip(*map(self.paths_of, batch["cut_ids"]), strict=True)
                for encoder, stored, own in zip(encoders, self._stored, paths, strict=True):
                    if not stored.issuperset(batch["cut_ids"]):
                        _write(own, encode_batch(encoder, batch, device, self.dtype), batch)

    def cached_encoders(self, encoders: Iterable[ZipformerEncoder]) -> nn.ModuleList:
        """Return modules that replace the encoders in a SpeechLLM, with their CTC heads."""
        ends = np.cumsum(self.dims).tolist()
        parts = zip(self.dims, ends, encoders)
        return nn.ModuleList(_CachedEncoder(end - dim, end, e.ctc_output) for dim, end, e in parts)


def _write(paths: Iterable[Path], outputs: Iterable[Tensor], batch: dict) -> None:
    for path, output, frames in zip(paths, outputs, batch["feature_lens"].tolist(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".part-{os.getpid()}")  # complete when it is renamed
        output = output[: encoder_out_lens(frames)].contiguous()
        partial.write_bytes(save({"outputs": output}, {"frames": str(frames)}))
        os.replace(partial, path)


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
    encoder: ZipformerEncoder, batch: dict, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return an encoder's outputs (B, T / 4, C) in `dtype`, on the CPU."""
    features = batch["features"].to(device, non_blocking=True)
    with autocast(device, dtype):
        return encoder(features, batch["feature_lens"])[0].to(dtype).cpu()

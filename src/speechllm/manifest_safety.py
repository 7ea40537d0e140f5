"""Manifests may come from anybody: reading what they name must not run anything.

lhotse would take audio from a shell command, open names with "pipe:" in a shell, give names of
SPHERE (and Opus) files to one, and unpickle what is stored as memory_raw. Files anywhere, and
addresses of the stores that shards may be in, are read.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from lhotse import CutSet
from lhotse.cut import Cut

from speechllm.errors import InputError

AUDIO = ("file", "url", "memory", "shar")
STORAGES = (
    "lilcom_chunky", "lilcom_files", "lilcom_url", "lilcom_hdf5", "chunked_lilcom_hdf5",
    "numpy_files", "numpy_hdf5", "memory_lilcom", "memory_npy", "shar",
)  # fmt: skip
SCHEMES = ("http", "https", "s3", "gs", "azure")  # hdfs starts a program, ssh shows one's keys
NAMES = ("source", "storage_path", "storage_key")
GIVEN_TO_A_SHELL = (".sph", ".opus")
LEAVES = (str, int, float, bool, bytes, type(None))  # most of a cut: they hold nothing


def read_lazily(path: Path | str) -> CutSet:
    """The cuts of a file; one that is not safe raises ValueError when it is reached."""
    return safe_cuts(CutSet.from_jsonl_lazy(path))


def safe_cuts(cuts: CutSet) -> CutSet:
    """The same cuts, read lazily; one that is not safe raises ValueError when it is reached."""
    return cuts.map(safe_cut, apply_fn=None)


def safe_cut(cut: Cut) -> Cut:
    """The cut itself, if reading it runs nothing.

    Raises:
      ValueError: naming the cut and what it would do.
    """
    for fields in _fields_within(cut):
        if danger := _danger(fields):
            raise InputError(f"cut {cut.id} is refused: {danger}")
    return cut


def _fields_within(value: object) -> Iterator[dict]:
    """Of all objects that something is made of, however deep, what they hold by name."""
    to_do = [value]
    while to_do:
        part = to_do.pop()
        if isinstance(part, (list, tuple)):
            inner = part
        else:
            fields = part if isinstance(part, dict) else getattr(part, "__dict__", {})
            yield fields
            inner = fields.values()
        to_do += [one for one in inner if type(one) not in LEAVES]


def _danger(fields: dict) -> str:
    """What reading an audio source, features or an array would do; empty if nothing."""
    if "source" in fields and "channels" in fields and fields.get("type") not in AUDIO:
        return f"it wants audio from a {fields.get('type')}, {fields['source']!r}"
    if fields.get("storage_type", "shar") not in STORAGES:
        return f"it wants to read what is stored as {fields['storage_type']!r}"
    for name in NAMES:
        if isinstance(fields.get(name), str) and (danger := _danger_of_name(fields[name])):
            return danger
    return ""


def _danger_of_name(name: str) -> str:
    if "pipe:" in name:
        return f"it wants to run {name!r}"
    if name.lower().endswith(GIVEN_TO_A_SHELL) and quote(name) != name:
        return f"a shell would be given the file name {name!r}"
    scheme = re.match(r"\s*([\w+.-]+)://", name)
    if scheme and scheme[1].lower() not in SCHEMES:
        return f"it wants to read from {scheme[1]}://, not {', '.join(SCHEMES)}"
    return ""

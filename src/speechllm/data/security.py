"""Rejection of manifests that would execute code when their cuts are read.

lhotse executes audio sources of type "command", names that contain "pipe:" and, through a shell,
converters for SPHERE and Opus files, and it unpickles arrays stored as memory_raw. Local files and
object store URLs are allowed.
"""

import re
from collections.abc import Iterator
from shlex import quote

from lhotse import CutSet
from lhotse.cut import Cut

from speechllm.errors import InputError

AUDIO = ("file", "url", "memory", "shar")
STORAGES = (
    "lilcom_chunky", "lilcom_files", "lilcom_url", "lilcom_hdf5", "chunked_lilcom_hdf5",
    "numpy_files", "numpy_hdf5", "memory_lilcom", "memory_npy", "shar",
)  # fmt: skip
SCHEMES = ("http", "https", "s3", "gs", "azure")  # hdfs starts a program, ssh uses the user's keys
NAMES = ("source", "storage_path", "storage_key")
GIVEN_TO_A_SHELL = (".sph", ".opus")
LEAVES = (str, int, float, bool, bytes, type(None))  # most of a cut; skipped for speed


def safe_cuts(cuts: CutSet) -> CutSet:
    """Check cuts lazily; iteration raises InputError at an unsafe cut."""
    return cuts.map(check_safe, apply_fn=None)


def check_safe(cut: Cut) -> Cut:
    """Return the cut; raise InputError with id and reason if reading it would execute code."""
    for fields in _fields_within(cut):
        if danger := _danger(fields):
            raise InputError(f"cut {cut.id} is rejected: {danger}")
    return cut


def _fields_within(value: object) -> Iterator[dict]:
    """Yield the fields of `value` and of all objects nested in it."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, (list, tuple)):
            inner = item
        else:
            fields = item if isinstance(item, dict) else getattr(item, "__dict__", {})
            yield fields
            inner = fields.values()
        stack += [one for one in inner if type(one) not in LEAVES]


def _danger(fields: dict) -> str:
    """Return why reading an audio source, features or an array is unsafe; "" if it is safe."""
    if "source" in fields and "channels" in fields and fields.get("type") not in AUDIO:
        return f"its audio comes from a {fields.get('type')}, {fields['source']!r}"
    if fields.get("storage_type", "shar") not in STORAGES:
        return f"its data is stored as {fields['storage_type']!r}"
    for name in NAMES:
        if isinstance(fields.get(name), str) and (danger := _danger_of_name(fields[name])):
            return danger
    return ""


def _danger_of_name(name: str) -> str:
    if "pipe:" in name:
        return f"it would run {name!r}"
    if name.lower().endswith(GIVEN_TO_A_SHELL) and quote(name) != name:
        return f"its file name {name!r} would reach a shell"
    scheme = re.match(r"\s*([\w+.-]+)://", name)
    if scheme and scheme[1].lower() not in SCHEMES:
        return f"it would read from {scheme[1]}://, not {', '.join(SCHEMES)}"
    return ""

"""Values with which every flag has a visible effect."""

import shutil
from dataclasses import dataclass

from safetensors.torch import load_file, save_file


@dataclass
class Change:
    """Another value of a flag, the effect to look at, and flags that the effect needs."""

    value: str
    seen: callable
    context: tuple[str, ...] = ()


def other_models(folder, tiny_encoder_dir, tiny_llm_dir) -> None:
    """Write other files to `folder`: `other.pt`, its `bpe.model`, an LLM `llm`, `hotwords.txt`."""
    (folder / "hotwords.txt").write_text("c a b\n")
    (folder / "other.pt").symlink_to(tiny_encoder_dir / "b.pt")
    (folder / "bpe.model").symlink_to(tiny_encoder_dir / "bpe.model")
    llm = shutil.copytree(tiny_llm_dir, folder / "llm")
    weights = load_file(llm / "model.safetensors")
    weights["model.norm.weight"] *= -1
    save_file(weights, llm / "model.safetensors", metadata={"format": "pt"})

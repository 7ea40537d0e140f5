"""What is changed to see that every flag changes something."""

import shutil
from dataclasses import dataclass

from safetensors.torch import load_file, save_file


@dataclass
class Change:
    """A flag's other value, what is looked at, and flags without which it would change nothing."""

    value: str
    seen: callable
    context: tuple[str, ...] = ()


def other_models(folder, tiny_encoder_dir, tiny_llm_dir) -> None:
    """In `folder`: `other.pt`, another encoder, its `bpe.model`, and `llm`, another LLM."""
    (folder / "other.pt").symlink_to(tiny_encoder_dir / "b.pt")
    (folder / "bpe.model").symlink_to(tiny_encoder_dir / "bpe.model")
    llm = shutil.copytree(tiny_llm_dir, folder / "llm")
    weights = load_file(llm / "model.safetensors")
    weights["model.norm.weight"] *= -1
    save_file(weights, llm / "model.safetensors", metadata={"format": "pt"})

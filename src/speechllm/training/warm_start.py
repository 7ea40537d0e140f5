"""Warm starts: initial parameters from another model's checkpoint, where compatible.

Each projector, each encoder, LoRA and the LLM is loaded as a whole or not at all. Resuming, in
contrast, is strict (see models/state_dict.py).
"""

import logging
import re
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from speechllm.checkpoints import load_checkpoint, state_difference
from speechllm.errors import InputError
from speechllm.models.config import ModelConfig, load_model_config
from speechllm.models.identity import content_hash
from speechllm.models.speech_llm import SpeechLLM
from speechllm.models.state_dict import IGNORED_KEYS, saved_parameters

Parts = dict[str, dict[str, Tensor]]  # by part name, then by key
NUMBERED = re.compile(r"(encoder_projector|encoder)\.(\d+\.)?(?=\D)")


def initialize(model: SpeechLLM, config: ModelConfig, path: Path) -> None:
    """Load the compatible parts of a checkpoint or an exported directory, and log all parts.

    An encoder's projector is loaded for the same encoder in `model`, identified by file content, or
    else for the encoder at the same position.

    Raises:
      InputError: the checkpoint cannot be read, no part is compatible, or a frozen projector
        would not be loaded.
    """
    path, described = _find_checkpoint(path)
    saved = _parts(load_checkpoint(path)["model"])
    own = _parts(saved_parameters(model))
    places = _places(saved, config, described)
    saved = {_moved(part, places): (part, state) for part, state in saved.items()}
    loaded, fresh = [], []
    for part, parameters in own.items():
        origin, state = saved.pop(part, (part, {}))
        reason = state_difference(state, parameters) if state else "not in the checkpoint"
        if part == "LoRA" and described and described.lora_alpha != config.lora_alpha:
            reason = reason or f"trained with --lora-alpha {described.lora_alpha}"
        if not reason:
            loaded.append(part if origin == part else f"{part} (from {origin})")
            with torch.no_grad():
                for key, parameter in parameters.items():
                    parameter.copy_(state[key])
        elif any(p.requires_grad for p in parameters.values()):
            fresh.append(f"{part} ({reason})")
        else:
            raise InputError(
                f"--freeze-projector true: {part} would stay untrained, as "
                f"--pretrained-model-path does not fit it ({reason})"
            )
    unused = [origin for origin, _ in saved.values()]
    if not loaded:
        raise InputError(
            f"--pretrained-model-path {path} does not fit this model: {'; '.join(fresh)}; "
            f"the checkpoint has {', '.join(unused) or 'nothing else'}"
        )
    logging.info(
        f"Initialized from {path}: {', '.join(loaded)}; not loaded: "
        f"{', '.join(fresh) or 'nothing'}; ignored: {', '.join(unused) or 'nothing'}"
    )
    if trained := [part for part in unused if part not in IGNORED_KEYS]:
        logging.warning(
            f"{path} also has {', '.join(trained)}, which this run does not use: export "
            "that model and start from the directory to keep them"
        )


def _find_checkpoint(path: Path) -> tuple[Path, ModelConfig | None]:
    """Return the checkpoint file, and its model's configuration if known."""
    if path.is_dir():
        described = load_model_config(path)
        if described is None or described.checkpoint is None:
            raise InputError(
                f"--pretrained-model-path {path} is not an exported model: name a file in it, such "
                "as epoch-1.pt"
            )
        return path / described.checkpoint, described
    if not path.is_file():  # a later stage in the same --exp-dir may have moved it
        former = path.parent.glob(f"former-*/{path.name}")
        path = max(former, key=lambda one: one.stat().st_mtime, default=path)
    return path, load_model_config(path.parent)


def _parts(state: dict[str, Tensor]) -> Parts:
    """Group a state dict, with or without encoder numbers, into parts such as "projector 1"."""
    parts: Parts = defaultdict(dict)
    for key, value in state.items():
        if key in IGNORED_KEYS and key != "llm.lm_head.weight":
            parts[key][key] = value
        elif match := NUMBERED.match(key):
            number = 1 + int((match[2] or "0.")[:-1])
            kind = "projector" if match[1] == "encoder_projector" else "encoder"
            parts[f"{kind} {number}"][key[match.end() :]] = value
        else:
            parts["LoRA" if ".lora_" in key else "LLM"][key] = value
    return dict(parts)


def _places(saved: Parts, config: ModelConfig, described: ModelConfig | None) -> dict[int, int]:
    """Map each encoder number in the checkpoint to that of the same encoder in the model."""
    numbers = sorted({int(part.split()[1]) for part in saved if part[-1].isdecimal()})
    own = [content_hash(path) for path, _ in config.encoder_files]
    others = [content_hash(path) for path, _ in described.encoder_files] if described else []
    if described and described.encoder_hashes:
        others = described.encoder_hashes.split(",")
    places: dict[int, int] = {}
    for number in numbers:
        content = others[number - 1] if number <= len(others) else None
        same = [k for k, one in enumerate(own, 1) if one == content and k not in places.values()]
        if content and same:
            places[number] = same[0]
    for number in numbers:
        if number not in places and number not in places.values():
            places[number] = number
    return places


def _moved(part: str, places: dict[int, int]) -> str:
    kind, _, number = part.partition(" ")
    if not number:
        return part
    place = places.get(int(number))
    return f"{kind} {place}" if place else f"{part} of the checkpoint"

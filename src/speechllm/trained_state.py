"""What a checkpoint holds of a SpeechLLM: its trained parameters, under the published keys."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from speechllm.checkpoint_file import copy_to_cpu
from speechllm.errors import InputError
from speechllm.model import SpeechLLM

IGNORED_KEYS = (  # in published checkpoints: an inert embedding, and copies of a frozen one
    "prompt_embedding.weight",
    "llm.base_model.model.lm_head.weight",
    "llm.lm_head.weight",
)


def trainable_state(
    model: SpeechLLM,
    value: Callable[[Tensor], Tensor] = copy_to_cpu,
) -> dict[str, Tensor]:
    """The trained parameters, as `value` copies each, under the published names.

    With a single encoder these have no encoder index (`encoder_projector.proj.1.weight`).
    """
    return {
        _published_name(name, len(model.encoder)): value(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load_trainable_state(
    model: SpeechLLM, state: dict[str, Tensor], name: str = "the checkpoint"
) -> list[str]:
    """Load a checkpoint's `model` entry, published or ours, and account for every key.

    `name` is what errors call the checkpoint.

    Returns:
      The keys that were ignored, being known to be of no use.
    Raises:
      ValueError: naming keys that are missing, alien or of another shape.
    """
    n = len(model.encoder)
    parameters = {
        _published_name(name, n): p for name, p in model.named_parameters() if p.requires_grad
    }
    ignored = [
        key
        for key in IGNORED_KEYS
        if key in state
        and key not in parameters
        and ("lm_head" not in key or _is_copy_of_embedding(state[key], model.llm))
    ]
    for what, keys in (
        ("lacks", parameters.keys() - state.keys()),
        ("has the alien", state.keys() - parameters.keys() - set(ignored)),
    ):
        if keys:
            raise InputError(
                f"{name} {what} {min(keys)} and {len(keys) - 1} more: "
                f"it is of another model than this one with {n} encoder{'s' * (n > 1)}"
            )
    for key, parameter in parameters.items():
        if state[key].shape != parameter.shape:
            raise InputError(
                f"{key} is {tuple(state[key].shape)} in {name} "
                f"and {tuple(parameter.shape)} in this model"
            )
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(state[key])
    return ignored


def _is_copy_of_embedding(lm_head: Tensor, llm: nn.Module) -> bool:
    tied = llm.get_output_embeddings().weight is llm.get_input_embeddings().weight
    return tied and lm_head.shape == llm.get_input_embeddings().weight.shape


def _published_name(name: str, num_encoders: int) -> str:
    if num_encoders == 1:
        for part in ("encoder", "encoder_projector"):
            if name.startswith(f"{part}.0."):
                return name.replace(f"{part}.0.", f"{part}.", 1)
    return name

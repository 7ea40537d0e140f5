"""State dict of a SpeechLLM's trainable parameters, with the keys of published checkpoints.

The projectors are always included, even if frozen: no other file written by training has them.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from speechllm.checkpoints import copy_to_cpu, state_difference
from speechllm.errors import InputError
from speechllm.models.speech_encoders import SpeechEncoders

IGNORED_KEYS = (  # of published checkpoints: an unused embedding, copies of the frozen embedding
    "prompt_embedding.weight",
    "llm.base_model.model.lm_head.weight",
    "llm.lm_head.weight",
)


def trainable_state(
    model: SpeechEncoders, value: Callable[[Tensor], Tensor] = copy_to_cpu
) -> dict[str, Tensor]:
    """Return the trainable parameters, each copied by `value`, with their published names.

    With one encoder, names contain no encoder index: `encoder_projector.proj.1.weight`.
    """
    return {name: value(parameter) for name, parameter in _published_parameters(model).items()}


def load_trainable_state(
    model: SpeechEncoders, state: dict[str, Tensor], name: str = "the checkpoint"
) -> list[str]:
    """Load a checkpoint's `model` entry, published or ours; `name` is used in error messages.

    Returns:
      The ignored keys, which are known to be redundant.

    Raises:
      InputError: a key is missing, unexpected or has a different shape.
    """
    n = len(model.encoder)
    parameters = _published_parameters(model)
    ignored = [
        key
        for key in IGNORED_KEYS
        if key in state
        and key not in parameters
        and ("lm_head" not in key or _is_copy_of_embedding(state[key], model.llm))
    ]
    used = {key: value for key, value in state.items() if key not in ignored}
    if difference := state_difference(used, parameters):
        raise InputError(
            f"{name} does not match this model of {n} encoder{'s' * (n > 1)}: {difference}"
        )
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(state[key])
    return ignored


def _is_copy_of_embedding(lm_head: Tensor, llm: nn.Module) -> bool:
    tied = llm.get_output_embeddings().weight is llm.get_input_embeddings().weight
    return tied and lm_head.shape == llm.get_input_embeddings().weight.shape


def saved_parameters(model: SpeechEncoders) -> dict[str, nn.Parameter]:
    """Return the parameters saved in a checkpoint: trainable parameters and projectors."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name.startswith("encoder_projector.")
    }


def _published_parameters(model: SpeechEncoders) -> dict[str, nn.Parameter]:
    parameters = saved_parameters(model)
    if len(model.encoder) > 1:
        return parameters
    index = re.compile(r"^(encoder|encoder_projector)\.0\.")
    return {index.sub(r"\1.", name): parameter for name, parameter in parameters.items()}

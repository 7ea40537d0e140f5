"""Loading of a trained model for decoding: checkpoint or average, model and Recognizer."""

import dataclasses
import logging

import torch
from torch import Tensor

from speechllm.checkpoints import average_checkpoints, average_epochs, load_checkpoint
from speechllm.decoding.config import CheckpointConfig, SearchConfig
from speechllm.decoding.ctc_decoder import find_ctc_decoder
from speechllm.decoding.recognizer import Recognizer
from speechllm.distributed import DistEnv
from speechllm.models.build import BuildOptions, build_model
from speechllm.models.config import ModelConfig
from speechllm.models.packed import pack_linear_layers
from speechllm.models.state_dict import load_trainable_state
from speechllm.precision import autocast_dtype


def default_device() -> torch.device:
    """Return a GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_parameters(
    config: CheckpointConfig, exported: str | None, dist_env: DistEnv = DistEnv()
) -> tuple[dict[str, Tensor], str]:
    """Return the parameters to decode with, and their name for use in result file names.

    Args:
      exported: checkpoint named in model.json, for an exported model.

    Raises:
      FileNotFoundError: a checkpoint is missing; the message lists the existing ones.
      InputError: --epoch or --avg is out of range, or a file cannot be read.
    """
    if checkpoint := config.checkpoint or exported:
        path = config.exp_dir / checkpoint
        return load_checkpoint(path)["model"], path.stem
    parameters, path = None, None
    if dist_env.is_main and config.iter:
        parameters, path = average_checkpoints(config.exp_dir, config.iter, config.avg)
    elif dist_env.is_main:
        parameters, path = average_epochs(config.exp_dir, config.epoch, config.avg)
    path, *_ = dist_env.gather_objects(path)
    if parameters is None:
        parameters = load_checkpoint(path)["model"]
    name = path.stem.replace("checkpoint-", "iter-")
    return parameters, name if "-avg-" in name else f"{name}-avg-1"


class TrainedModel:
    """A trained SpeechLLM with its tokenizer; `recognizer` creates recognizers that share it.

    Attributes:
      parameters_name: name of the checkpoint or average, such as `epoch-10-avg-5`.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: CheckpointConfig,
        dist_env: DistEnv | None = None,
        named_parameters: tuple[dict[str, Tensor], str] | None = None,
    ):
        """Load the model with `named_parameters`, by default those selected by `checkpoint`.

        Raises:
          FileNotFoundError, InputError: a file is missing, damaged or does not match the model.
        """
        dist_env = dist_env or DistEnv(device=default_device())
        self.config, self.checkpoint, self.device = config, checkpoint, dist_env.device
        self.dtype = autocast_dtype(checkpoint.use_fp16, checkpoint.use_bf16)
        parameters, self.parameters_name = named_parameters or read_parameters(
            checkpoint, config.checkpoint, dist_env
        )
        options = BuildOptions(self.dtype, self.dtype, use_flash_attn=checkpoint.use_flash_attn)
        self.model, self.tokenizer = build_model(config, options)
        ignored = load_trainable_state(self.model, parameters, self.parameters_name)
        logging.info(f"Loaded {self.parameters_name}; ignored: {', '.join(ignored) or 'nothing'}")
        self.model.to(self.device).eval()
        if self.device.type == "cpu" and not config.has_lora:
            pack_linear_layers(self.model.llm)

    def recognizer(
        self, search: SearchConfig, use_encoders: str | None = None, default_guard: str = "stop"
    ) -> Recognizer:
        """Return a recognizer; `use_encoders` overrides the checkpoint's config.

        Raises:
          InputError: the options contradict the model.
        """
        checkpoint = self.checkpoint
        if use_encoders is not None:
            checkpoint = dataclasses.replace(checkpoint, use_encoders=use_encoders)
        used = checkpoint.encoder_indices(len(self.model.encoder))
        bpe_paths = self.config.bpe_paths
        if len(bpe_paths) == len(self.model.encoder):
            bpe_paths = [bpe_paths[k] for k in used]
        model = self.model.select_encoders(used)
        ctc = find_ctc_decoder(model, bpe_paths)
        search = search.resolve(ctc is not None, default_guard)
        return Recognizer(model, self.tokenizer, ctc, search, self.device, self.dtype)

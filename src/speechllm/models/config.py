"""ModelConfig: the components of a SpeechLLM, as flags and as `<exp-dir>/model.json`.

Training writes model.json, so that programs using the model need only --exp-dir. In a directory
written by export.py, model.json has a `checkpoint` entry and paths relative to the directory.
"""

import argparse
import dataclasses
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args, get_type_hints

from speechllm.cli import check_range, comma_list, flag_name, from_args, option, spelled
from speechllm.errors import InputError
from speechllm.io import atomic_write
from speechllm.models.identity import content_hashes
from speechllm.models.zipformer.config import AUTO, SIZES, Chunking, parse_chunkings

MODEL_FILE = "model.json"
INDEX_FILE = "model.safetensors.index.json"  # for the LLM's weights in an exported model
VLLM_MODEL = "SpeechLLMForConditionalGeneration"  # the class in speechllm/vllm that vLLM loads
MAX_NEW_TOKENS = 200  # per transcript
REPOSITORY = Path(__file__).resolve().parents[3]
PATHS = ("llm_path", "speech_encoder_path", "speech_encoder_bpe_path")
MAY_CHANGE = (  # when resuming; the encoder types follow from the shapes of the weights
    "speech_encoder_type", "speech_encoder_bpe_path", "language", "command", "checkpoint",
    "llm_hash", "encoder_hashes", "lora_dropout", "longest_utterance",
)  # fmt: skip
HASHES = {"llm_path": "llm_hash", "speech_encoder_path": "encoder_hashes"}
ENCODERS = ("transducer_large", "aed_crctc_large", "crctc_large", "transducer_crctc_large")
LORA_TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
_option = partial(option, group="model")


def _pretrained(encoder: str) -> str:
    return f"models/zipformer/librispeech/{encoder}/pretrained.pt"


@dataclass(frozen=True)
class ModelConfig:
    """Encoders, projectors and LLM; the defaults describe the published one-encoder model."""

    llm_path: str = _option(
        "models/qwen2-1.5b-instruct", "directory or Hugging Face hub name of the LLM"
    )
    speech_encoder_type: str = _option(
        AUTO, f"{AUTO} (from the checkpoint), {', '.join(SIZES)}; comma-separated for several"
    )
    num_heads: str | None = _option(
        None, "with auto: attention heads per stack, such as 4,4,4,8,4,4, if the head "
        "dimensions are not icefall's defaults; + separates encoders",
    )  # fmt: skip
    encoder_unmasked_dim: str | None = _option(
        None, "with auto: channels per stack that are never masked in training, by default the "
        "width of the narrowest stack; + separates encoders",
    )  # fmt: skip
    speech_encoder_path: str = _option(
        _pretrained(ENCODERS[-1]), "pretrained.pt, comma-separated for several encoders"
    )
    speech_encoder_bpe_path: str = _option(
        "models/zipformer/librispeech/bpe.model",
        "bpe.model of each encoder, or one for all encoders; needed for CTC drafts",
    )
    chunk_size: str = _option(
        "-1", "causal encoders: 20 ms frames per chunk, -1 for whole utterances; if "
        "comma-separated, training samples a value per batch, and decoding uses the last",
    )  # fmt: skip
    left_context_frames: str = _option(
        "128", "causal encoders: 20 ms frames of left context per chunk, -1 for all; "
        "comma-separated values work as for --chunk-size",
    )  # fmt: skip
    encoder_projector_ds_rate: int = _option(4, "encoder frames per speech embedding")
    instruction: str = _option(
        "", "instruction to the LLM, after the speech; the published models use none"
    )
    use_context: bool = _option(
        False, "append each utterance's `context` (custom field of the supervision, e.g. "
        "hotwords) to the instruction",
    )  # fmt: skip
    lowercase: bool = _option(
        True, "lower-case the transcripts; false trains a model with cased output"
    )
    use_lora: bool = _option(True, "train LoRA matrices instead of the LLM itself")
    lora_r: int = _option(64, "rank of the LoRA matrices")
    lora_alpha: int = _option(16, "the LoRA update is scaled by alpha / rank")
    lora_dropout: float = _option(0.05, "dropout before the LoRA matrices")
    lora_targets: str = _option(
        LORA_TARGETS, "linear layers with LoRA, comma-separated; layers in the default list that "
        "the LLM lacks are ignored",
    )  # fmt: skip
    unfreeze_llm: bool = _option(True, "false: keep the LLM frozen")
    unfreeze_encoder: bool = _option(False, "also train the encoders")
    language: str | None = _option(None, "language of the transcripts, such as en")
    command: str | None = None  # the training command
    checkpoint: str | None = None  # file name in an exported directory
    llm_hash: str | None = None  # identity of the LLM and the encoders (see identity.py)
    encoder_hashes: str | None = None  # comma-separated
    longest_utterance: float | None = None  # in training, in seconds

    def __post_init__(self):
        paths, sizes = comma_list(self.speech_encoder_path), comma_list(self.speech_encoder_type)
        if not paths:
            raise InputError("--speech-encoder-path is empty")
        if len(sizes) not in (1, len(paths)):
            raise InputError(
                f"--speech-encoder-type names {len(sizes)} encoders, but "
                f"--speech-encoder-path {len(paths)}"
            )
        for size in sizes:
            if size not in (AUTO, *SIZES):
                known = ", ".join((AUTO, *SIZES))
                raise InputError(f"unknown encoder size {size!r}: choose from {known}")
        self._per_encoder("num_heads"), self._per_encoder("encoder_unmasked_dim")
        for name in ("encoder_projector_ds_rate", "lora_r", "lora_alpha"):
            check_range(name, getattr(self, name), 1)
        check_range("lora_dropout", self.lora_dropout, 0, 0.99)
        if not comma_list(self.lora_targets):
            raise InputError("--lora-targets is empty")
        parse_chunkings(self.chunk_size, self.left_context_frames)

    @property
    def chunkings(self) -> tuple[Chunking, ...]:
        """Chunkings of causal encoders to sample from in training; decoding uses the last."""
        return parse_chunkings(self.chunk_size, self.left_context_frames)

    @property
    def encoder_files(self) -> list[tuple[str, str]]:
        """Path and size of each encoder; a single size applies to all encoders."""
        paths, sizes = comma_list(self.speech_encoder_path), comma_list(self.speech_encoder_type)
        return list(zip(paths, sizes * len(paths) if len(sizes) == 1 else sizes))

    @property
    def encoder_shapes(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Heads and unmasked channels of each encoder's stacks; () if not given."""
        return [*zip(self._per_encoder("num_heads"), self._per_encoder("encoder_unmasked_dim"))]

    def _per_encoder(self, name: str) -> list[tuple[int, ...]]:
        given, number = getattr(self, name), len(comma_list(self.speech_encoder_path))
        try:
            values = [tuple(map(int, comma_list(one))) for one in (given or "").split("+")]
        except ValueError:
            raise InputError(f"{flag_name(name)} {given} must be numbers such as 4,4,8") from None
        if len(values) not in (1, number) or any(n < 1 for stacks in values for n in stacks):
            raise InputError(f"{flag_name(name)} {given} must be positive, for {number} encoders")
        return values * number if len(values) == 1 else values

    @property
    def num_encoders(self) -> int:
        return len(self.encoder_files)

    @property
    def bpe_paths(self) -> list[str]:
        """Paths of BPE models: none, one for all encoders, or one per encoder."""
        return comma_list(self.speech_encoder_bpe_path)

    @property
    def trains_llm(self) -> bool:
        """True if the LLM's own weights are trainable."""
        return self.unfreeze_llm and not self.use_lora

    @property
    def has_lora(self) -> bool:
        """True if the LLM has LoRA matrices."""
        return self.unfreeze_llm and self.use_lora


ONE_ENCODER = ModelConfig()
MOSE = ModelConfig(speech_encoder_path=",".join(map(_pretrained, ENCODERS)))


def model_config(
    args: argparse.Namespace, exp_dir: Path, default: ModelConfig = ONE_ENCODER
) -> ModelConfig:
    """Build the config from flags, then `<exp_dir>/model.json`, then `default`."""
    return from_args(load_model_config(exp_dir, default) or default, args)


def load_model_config(exp_dir: Path, default: ModelConfig = ONE_ENCODER) -> ModelConfig | None:
    """Read `<exp_dir>/model.json`, with missing entries from `default`; None without the file.

    An invalid file raises InputError.
    """
    path = exp_dir / MODEL_FILE
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(stored, dict):
        raise InputError(f"{path} is not a JSON object")
    if "prompt" in stored:  # older files call `instruction` this
        stored["instruction"] = stored.pop("prompt")
    hints = get_type_hints(ModelConfig)
    for name, value in stored.items():
        if name not in hints:
            raise InputError(f"{path}: unknown entry {name!r}")
        kinds = get_args(hints[name]) or [hints[name]]
        if type(value) not in kinds:
            raise InputError(f"{path}: {name} is {value!r}, not {kinds[0].__name__}")
    try:
        return dataclasses.replace(default, **stored | _resolve_paths(stored, exp_dir))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def with_exported_parts(path: str | None, default: ModelConfig) -> ModelConfig:
    """Return `default`, with the LLM and encoders in `path` if it is an exported directory."""
    if not path or not Path(path, MODEL_FILE).is_file():
        return default
    exported = load_model_config(Path(path), default)
    trained = {"use_lora", "unfreeze_llm", "unfreeze_encoder", "command", "checkpoint"}
    trained |= {name for name in vars(default) if name.startswith("lora_")}  # merged
    if exported.num_encoders == 1 < default.num_encoders:  # it initializes one of several encoders
        trained |= {"speech_encoder_type", "speech_encoder_path", "speech_encoder_bpe_path"}
    return dataclasses.replace(exported, **{name: getattr(default, name) for name in trained})


def save_model_config(config: ModelConfig, folder: Path) -> None:
    """Write `<folder>/model.json`; entries that are None are omitted."""
    stored = {name: v for name, v in dataclasses.asdict(config).items() if v is not None}
    with atomic_write(folder / MODEL_FILE) as partial:
        partial.write_text(json.dumps(stored, indent=2, ensure_ascii=False) + "\n", "utf-8")


def check_same_model(config: ModelConfig, exp_dir: Path) -> None:
    """Raise InputError if a flag differs from model.json, with which the run was started.

    A missing file without a saved hash gives only a warning.
    """
    before = load_model_config(exp_dir) or config
    for name in _differing(config, before):
        flag, now, then = flag_name(name), getattr(config, name), getattr(before, name)
        raise InputError(
            f"{flag} {spelled(now)}: the run in {exp_dir} was started with "
            f"{flag} {spelled(then)}"
        )
    for name in HASHES:
        if _same_content(name, config, before) is None:
            logging.warning(
                f"{flag_name(name)} {getattr(config, name)} must be the same model as "
                f"{getattr(before, name)}, with which the run in {exp_dir} was started; this "
                "cannot be checked, as the file is missing"
            )


def is_same_model(config: ModelConfig, exp_dir: Path) -> bool:
    """Return true if `<exp_dir>/model.json` describes the same model or does not exist."""
    return not [*_differing(config, load_model_config(exp_dir) or config)]


def with_hashes(config: ModelConfig) -> ModelConfig:
    """Return the config with the hashes of the LLM and the encoders."""
    hashes = {entry: content_hashes(getattr(config, name)) for name, entry in HASHES.items()}
    return dataclasses.replace(config, **hashes)


def _differing(config: ModelConfig, before: ModelConfig) -> Iterator[str]:
    """Yield the fields in which the models differ; files are compared by content, not path."""
    for name, now in dataclasses.asdict(config).items():
        if now == getattr(before, name) or name in MAY_CHANGE:
            continue
        if name not in HASHES or _same_content(name, config, before) is False:
            yield name


def _same_content(name: str, config: ModelConfig, before: ModelConfig) -> bool | None:
    """Return whether the files are identical; None if the earlier content is unknown."""
    now, then = getattr(config, name), getattr(before, name)
    if now == then:
        return True
    saved = getattr(before, HASHES[name]) or content_hashes(then)
    if not saved and len(comma_list(now)) == len(comma_list(then)):
        return None
    return saved == content_hashes(now)


def check_model_files(config: ModelConfig) -> None:
    """Raise FileNotFoundError if a file of the LLM or the encoders is missing."""
    check_llm_path(config.llm_path)
    for path, _ in config.encoder_files:
        if not Path(path).is_file():
            raise FileNotFoundError(f"encoder {path} is missing (see local/download_models.sh)")


def check_llm_path(path: str) -> None:
    """Raise FileNotFoundError if a local path (not a name on Hugging Face's hub) is not an LLM."""
    local = path.startswith((".", "/", "models/", "exp/")) or path.count("/") > 1
    if (local or Path(path).exists()) and not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"LLM directory {path} is missing or has no config.json")


def _resolve_paths(stored: dict, exp_dir: Path) -> dict:
    """Resolve an exported model's paths in its directory, and others in the repository.

    Training stores paths as given. Paths that do not exist relative to the current directory are
    looked up in the repository, from which training is usually started.
    """
    exported = "checkpoint" in stored
    resolved = {}
    for name in stored.keys() & set(PATHS):
        given = [Path(part) for part in comma_list(stored[name])]
        paths = [(exp_dir if exported else REPOSITORY) / path for path in given]
        exist_only_there = all(p.exists() for p in paths) and not any(p.exists() for p in given)
        if exported or exist_only_there:
            resolved[name] = ",".join(map(str, paths))
    return resolved

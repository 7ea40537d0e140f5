#!/usr/bin/env python3
"""A trained model as one directory, which is all that decode.py and others need of it.

    python src/export.py --exp-dir exp/mine --epoch 10 --avg 5 --out exp/mine-model
    python src/export.py ... --int8 true --out exp/mine-for-cpu
    python src/export.py ... --dtype float16 --adapter exp/mine-lora --push-to-hub me/mine
    python src/decode.py --exp-dir exp/mine-model --test-cuts my_cuts_test

The directory, wherever it is moved, without a pickle in it:

    config.json, model.safetensors, tokenizer…  the LLM, LoRA merged: a plain Qwen2 to transformers
    projector.safetensors                       from the encoders to the LLM
    encoders/1/model.safetensors, bpe.model     each encoder with its CTC head
    model.json                                  flags of decode.py
    README.md                                   a model card: data, commands, WER of --exp-dir

With --int8 true, model-int8.safetensors (see speechllm/int8.py) is in place of model.safetensors.
--adapter also writes the LoRA matrices alone, for `PeftModel.from_pretrained(llm, DIR)`.
"""

import argparse
import copy
import logging
import re
import shlex
import shutil
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

import decode
import train
from speechllm.errors import InputError, in_sentences, without_secrets
from speechllm.flags import Parser, comma_list, str2bool
from speechllm.int8 import INT8_FILE, int8_state, is_int8
from speechllm.lora import ADAPTER
from speechllm.model import SpeechLLM
from speechllm.model_flags import (
    build_model,
    check_model_files,
    encoder_files,
    take_model_file,
    write_model_file,
)
from speechllm.prompt import ChatIds
from speechllm.trained_state import load_trainable_state, trainable_state
from speechllm.whole_file import check_space, whole_directory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PLAIN = """
The directory is also a plain Qwen2 for `transformers.AutoModelForCausalLM.from_pretrained`.
"""
PROJECTOR, ENCODER, BPE = "projector.safetensors", "model.safetensors", "bpe.model"


def get_parser(defaults: dict = train.DEFAULTS) -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    decode.add_trained_model_arguments(parser)
    add = parser.add_argument_group("export").add_argument
    add("--out", type=Path, required=True, help="the directory, which must not be there yet")
    add("--dtype", choices=list(DTYPES), default="float32",
        help="of the LLM's weights and of the encoders' linear layers")  # fmt: skip
    add("--int8", type=str2bool, default=False,
        help="the LLM's weights in 8 bits, to decode faster on a CPU; transformers alone cannot "
        "load these")  # fmt: skip
    add("--adapter", type=Path, help="a directory for the LoRA matrices alone, in peft's format")
    add("--push-to-hub", metavar="NAME",
        help="upload --out to the Hugging Face hub, as a private repository if it is new; with "
        "the token of HF_TOKEN or of `hf auth login`")  # fmt: skip
    parser.set_defaults(**defaults)
    return parser


def check_flags(args) -> None:
    """Everything that can be known before the work.

    Raises:
      FileNotFoundError, ValueError: one sentence with the flag and the value.
    """
    check_model_files(args)
    for flag, path in (("--out", args.out), ("--adapter", args.adapter)):
        if path and path.exists():
            raise InputError(f"{flag} {path} is there already")
    if args.adapter and not (args.use_lora and args.unfreeze_llm):
        raise InputError(f"--adapter {args.adapter}: the model was trained without LoRA")
    if args.push_to_hub:
        check_hub(args.push_to_hub)


def check_hub(name: str) -> None:
    """Raises ValueError: what keeps a model from being uploaded under this name."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {name}: {error}") from None
    if get_token() is None:
        raise InputError(f"--push-to-hub {name} needs a token: set HF_TOKEN, or `hf auth login`")


def push(folder: Path, name: str) -> None:
    """Raises ValueError: it could not be uploaded; the directory is as it was."""
    api = HfApi()
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder)  # with the user's name
    except Exception as error:  # the hub's, and those of the connection
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{folder} is whole, but not on the hub as {name}: {reason}") from None


# ---- parts of the directory


def write_adapter(llm: PeftModel, folder: Path) -> None:
    """The LoRA matrices as peft reads them, in float32."""
    config = copy.deepcopy(llm.peft_config[ADAPTER])
    config.inference_mode = True
    config.save_pretrained(folder)
    state = get_peft_model_state_dict(llm, save_embedding_layers=False)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def merge_lora(llm: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A plain LLM in `dtype`; merging is done in the precision of `llm`.

    Raises:
      ValueError: naming a weight that is not finite, or not in `dtype`.
    """
    if hasattr(llm, "peft_config"):
        llm = llm.merge_and_unload()
    llm = llm.to(dtype)
    for name, weight in llm.named_parameters():
        if not weight.isfinite().all():
            raise InputError(f"{name} has values that are no numbers in {dtype}")
    return llm


def write_llm(
    llm: nn.Module, tokenizer: PreTrainedTokenizerBase, chat: ChatIds, int8: bool, folder: Path
) -> None:
    """What `from_pretrained` of transformers reads; the tokenizer knows the speech tokens."""
    llm.generation_config = GenerationConfig(eos_token_id=chat.end, pad_token_id=chat.pad)
    if int8:
        llm.config.save_pretrained(folder)
        save_file(int8_state(llm), folder / INT8_FILE)
    else:
        llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_encoders(model: SpeechLLM, bpe_paths: list[str], folder: Path) -> dict[str, str]:
    """`encoders/<number>/`, and the flags that name them."""
    paths, bpes = [], []
    for k, encoder in enumerate(model.encoder):
        own = folder / "encoders" / str(k + 1)
        own.mkdir(parents=True)
        save_file(encoder.state_dict(), own / ENCODER)
        paths.append(f"encoders/{k + 1}/{ENCODER}")
        bpes.append(f"encoders/{k + 1}/{BPE}")
        if bpe_paths:
            _copy_bpe(Path((bpe_paths * len(model.encoder))[k]), own / BPE)
    there = any((folder / path).exists() for path in bpes)
    return {
        "speech_encoder_path": ",".join(paths),
        "speech_encoder_bpe_path": ",".join(bpes) if there else "",
    }


def _copy_bpe(path: Path, copy: Path) -> None:
    if path.is_file():
        shutil.copyfile(path, copy)
    else:
        logging.warning(f"{path} is missing: decoding will make no use of that encoder's CTC head")


def flags_of_export(args, encoders: dict[str, str]) -> dict:
    """For model.json: nothing of the LLM or the encoders is to be found elsewhere."""
    return {
        **vars(args),
        **encoders,
        "speech_encoder_type": ",".join(size for _, size in encoder_files(args)),
        "llm_path": ".",
        "use_lora": False,
        "unfreeze_llm": False,
        "unfreeze_encoder": False,
        "checkpoint": PROJECTOR,
    }


# ---- model card


def results_of(exp_dir: Path, name: str) -> list[str]:
    """Rows of a table: the error rates that decode.py found with the parameters of this name."""
    rows = []
    for path in sorted((exp_dir / "decode").glob("wer-summary-*.txt")):
        text = path.read_text(encoding="utf-8")
        found = re.search(r"^\[(.+?)\] %([WCM]ER) (\S+)% \[(.*?),", text, re.MULTILINE)
        way = re.search(r"^decoded with: (.*)$", text, re.MULTILINE)
        if found and way and f"-{name}-" in f"{way[1]}-":
            rate, errors = f"{found[2]} {found[3]} %", found[4].strip()
            rows.append(f"| {found[1]} | {rate} | {errors} | {way[1]} |")
    return rows


def model_card(args, name: str) -> str:
    """Markdown with the metadata that the Hugging Face hub reads."""
    language = f"language: {args.language}\n" if getattr(args, "language", "") else ""
    rows = results_of(args.exp_dir, name)
    wer = ["| set | error rate | errors | decoded with |", "|---|---|---|---|", *rows]
    if args.int8:
        wer = ["Measured before the LLM's weights became int8:", "", *wer]
    command = getattr(args, "command", None) or f"unknown: {name} came without a model.json"
    weights = f"{args.dtype}, the LLM's in int8" if args.int8 else args.dtype
    plain = "" if args.int8 else PLAIN
    encoders = "\n".join(f"- {size} encoder: `{path}`" for path, size in encoder_files(args))
    return f"""---
pipeline_tag: automatic-speech-recognition
{language}tags: [zipformer, qwen2]
---
# Speech recognition: Zipformer, projector, Qwen2

Parameters `{name}`, weights in {weights}.

## Use

With the programs of the recipe (`src/export.py` is one of them):

    python src/transcribe.py --exp-dir {args.out} talk.wav
    python src/serve.py --exp-dir {args.out}
    python src/decode.py --exp-dir {args.out} --test-cuts my_cuts_test
{plain}
## Made of

- LLM: `{args.llm_path}`
{encoders}

## Data and training

The flags name the data (`--train-cuts` or `--shar-dir`, `--manifest-dir`):

    {command}
    {without_secrets(shlex.join(sys.argv))}

## Error rates

{chr(10).join(wer) if rows else "None was measured before the export."}

## Licence

The licences of the LLM and the encoders named above, and of the data they and this model were
trained on, apply to these weights. The code of the recipe is under Apache-2.0.
"""


# ---- all of it


def write_directory(
    model: SpeechLLM, tokenizer: PreTrainedTokenizerBase, args, name: str, folder: Path
) -> None:
    """Everything but the adapter; `model` is changed."""
    dtype = DTYPES[args.dtype]
    model.llm = merge_lora(model.llm, dtype).requires_grad_(False)
    for encoder in model.encoder:
        encoder.freeze(dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    check_space(args.out, size, "the model")
    write_llm(model.llm, tokenizer, model.chat, args.int8, folder)
    encoders = write_encoders(model, comma_list(args.speech_encoder_bpe_path or ""), folder)
    save_file(trainable_state(model), folder / PROJECTOR)  # nothing else is trained now
    write_model_file(folder, flags_of_export(args, encoders))
    for licence in Path(args.llm_path).glob("LICENSE*"):
        shutil.copyfile(licence, folder / licence.name)
    card = folder / "README.md"
    card.write_text(model_card(args, name), encoding="utf-8")
    for path in folder.rglob("*.safetensors"):  # they are written for the owner alone
        path.chmod(card.stat().st_mode)


def run(args) -> None:
    check_flags(args)
    parameters, name = decode.read_parameters(args)
    model, tokenizer = build_model(
        args, torch.float32, torch.float32, args.unfreeze_llm, args.unfreeze_encoder
    )
    load_trainable_state(model, parameters, name)
    if is_int8(model.llm):
        raise InputError(f"{args.llm_path} is in int8 already: export what it was made of")
    model.eval()
    if args.adapter:
        with whole_directory(args.adapter) as folder:
            write_adapter(model.llm, folder)
    with whole_directory(args.out) as folder:
        write_directory(model, tokenizer, args, name, folder)
    print(f"{name} is in {args.out}")
    if args.push_to_hub:
        push(args.out, args.push_to_hub)
        print(f"and on the hub as {args.push_to_hub}")


@in_sentences
def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    take_model_file(parser, argv)
    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()

"""README.md for an exported model, with metadata for the Hugging Face hub."""

import re
from pathlib import Path

from speechllm.errors import redact_secrets
from speechllm.models.config import ModelConfig

TRANSFORMERS = """
The directory is also a plain Qwen2 for `transformers.AutoModelForCausalLM.from_pretrained`.
"""
CARD = """---
pipeline_tag: automatic-speech-recognition
{language}tags: [zipformer, qwen2]
---
# Speech recognition: Zipformer, projector, Qwen2

Parameters `{name}`, weights in {weights}.

## Use

    import speechllm

    print(speechllm.load("{out}").transcribe("talk.wav").text)

or with the programs of the recipe (`src/export.py` is one of them):

    python src/transcribe.py --exp-dir {out} talk.wav
    python src/serve.py --exp-dir {out}
    python src/decode.py --exp-dir {out} --test-cuts my_cuts_test
{transformers}
## Components

- LLM: `{llm_path}`
{encoders}

## Data and training

The flags name the data (`--train-cuts` or `--shar-dir`, `--manifest-dir`):

    {command}
    {export_command}

## Error rates

{error_rates}

## License

The licenses of the LLM and the encoders named above, and of the data they and this model were
trained on, apply to these weights. The code of the recipe is licensed under Apache-2.0.
"""


def model_card(
    config: ModelConfig, exp_dir: Path, name: str, out: Path, weights: str, export_command: str
) -> str:
    """Return a Markdown model card for the parameters `name`, such as epoch-10-avg-5.

    Args:
      weights: dtype of the weights, or "int8" followed by the encoders' dtype.
    """
    int8 = weights.startswith("int8")
    rows = error_rates(exp_dir, name)
    table = ["| set | error rate | errors | decoded with |", "|---|---|---|---|", *rows]
    if int8:
        table = ["Measured before quantizing the LLM to int8:", "", *table]
    return CARD.format(
        language=f"language: {config.language}\n" if config.language else "",
        name=name,
        weights=weights,
        out=out,
        transformers="" if int8 else TRANSFORMERS,
        llm_path=config.llm_path,
        encoders="\n".join(f"- {size} encoder: `{path}`" for path, size in config.encoder_files),
        command=config.command or f"unknown: {exp_dir} has no model.json with a command",
        export_command=redact_secrets(export_command),
        error_rates="\n".join(table) if rows else "Not measured before the export.",
    )


def error_rates(exp_dir: Path, name: str) -> list[str]:
    """Return table rows from decode.py's summaries for the parameters `name`."""
    rows = []
    for path in sorted((exp_dir / "decode").glob("wer-summary-*.txt")):
        text = path.read_text(encoding="utf-8")
        result = re.search(r"^\[(.+?)\] %([WCM]ER) (\S+)% \[(.*?),", text, re.MULTILINE)
        options = re.search(r"^decoded with: (.*)$", text, re.MULTILINE)
        if result and options and f"-{name}-" in f"{options[1]}-":
            test_set, kind, rate, errors = result.groups()
            rows.append(f"| {test_set} | {kind} {rate} % | {errors.strip()} | {options[1]} |")
    return rows

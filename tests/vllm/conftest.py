"""Exported models with random weights, which vLLM can load."""

import json

import pytest


@pytest.fixture(scope="session")
def vllm_export(build_once, tiny_tokenizer):
    """A function n -> an exported directory with n encoders, read-only; with 2 it takes contexts.

    The head size, 32, is the smallest of vLLM's attention on CPUs. Answers have 12 tokens.
    """
    return lambda n: build_once(f"vllm_export_{n}", lambda folder: _export(folder, n)) / "model"


def _export(folder, n):
    import make_tiny_llm
    import torch

    tokenizer, encoders = _tokenizer(), [folder / f"{k}.pt" for k in range(n)]
    torch.manual_seed(n)
    sizes = dict(zip(make_tiny_llm.SIZES, (64, 2, 2, 1, 96), strict=True))
    llm = make_tiny_llm.build_model(tokenizer, sizes)
    with torch.no_grad():  # initial weights are near zero: the texts would be the same
        for parameter in llm.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    _write_encoders(encoders, folder / "bpe.model")
    _write_model(folder, encoders, n)
    limits = folder / "model" / "generation_config.json"
    limits.write_text(json.dumps(json.loads(limits.read_text()) | {"max_new_tokens": 12}))


def _tokenizer():
    import make_tiny_llm

    return make_tiny_llm.train_tokenizer(["zero one two three four five six seven"] * 2, 300)


def _write_encoders(paths, bpe):
    from speechllm.models.zipformer.checkpoint import save_encoder
    from speechllm.models.zipformer.config import SIZES
    from speechllm.models.zipformer.encoder import ZipformerEncoder
    from speechllm.training.ctc_training import train_bpe

    for path in paths:
        save_encoder(ZipformerEncoder(SIZES["tiny"], vocab_size=7), path)
    bpe.write_bytes(train_bpe(["A B C", "C A B", "B C A"], 7))


def _write_model(folder, encoders, n):
    import torch

    from speechllm.models.build import build_model
    from speechllm.models.config import ModelConfig
    from speechllm.models.export import write_model

    config = ModelConfig(
        llm_path=str(folder / "llm"), speech_encoder_path=",".join(map(str, encoders)),
        speech_encoder_bpe_path=str(folder / "bpe.model"), use_lora=False, unfreeze_llm=False,
        use_context=n == 2, language="en", longest_utterance=3.0,
    )  # fmt: skip
    model, tokenizer = build_model(config)
    (folder / "model").mkdir()
    write_model(model, tokenizer, config, folder / "model", torch.float32, int8=False)

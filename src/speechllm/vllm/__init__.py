"""vLLM plugin that serves exported models as `SpeechLLMForConditionalGeneration`.

See src/README.md. vLLM finds `register` by the entry point in src/pyproject.toml, and
`CtcDraftProposer` by `--speculative-config`. No other part of speechllm imports vLLM.
"""


def register() -> None:
    """Register the model and its check; vLLM calls this function in each process."""
    from pathlib import Path

    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    from speechllm.models.config import MODEL_FILE, VLLM_MODEL

    class ExportCheck(VerifyAndUpdateConfig):
        """Rejects damaged, int8 and older exports, before vLLM loads anything."""

        @staticmethod
        def verify_and_update_model_config(model_config) -> None:
            if (Path(model_config.model) / MODEL_FILE).is_file():
                from speechllm.vllm.exported import check_encoders  # slow; only for our models

                check_encoders(model_config.model)

    ModelRegistry.register_model(VLLM_MODEL, f"speechllm.vllm.model:{VLLM_MODEL}")
    for name in (VLLM_MODEL, "Qwen2ForCausalLM"):  # the name in older exports
        MODELS_CONFIG_MAP[name] = ExportCheck


def __getattr__(name: str):
    """Import `CtcDraftProposer` on first use: `register` does not need the decoding modules."""
    if name != "CtcDraftProposer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from speechllm.vllm.drafts import CtcDraftProposer

    return CtcDraftProposer

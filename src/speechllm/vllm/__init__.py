"""vLLM plugin: exported models as `SpeechLLMForConditionalGeneration` (see src/README.md).

vLLM finds `register` by the entry point in src/pyproject.toml, and `CtcDraftProposer` by
`--speculative-config`. Nothing else in speechllm imports vLLM.
"""

from speechllm.models.config import VLLM_MODEL


def register() -> None:
    """Register the model with vLLM, which calls this in each of its processes."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(VLLM_MODEL, f"speechllm.vllm.model:{VLLM_MODEL}")


def __getattr__(name: str):
    """Import `CtcDraftProposer` when it is used: `register` runs without the decoding modules."""
    if name != "CtcDraftProposer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from speechllm.vllm.drafts import CtcDraftProposer

    return CtcDraftProposer

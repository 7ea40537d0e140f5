"""vLLM plugin: exported models as `SpeechLLMForConditionalGeneration` (see src/README.md).

vLLM finds `register` by the entry point in src/pyproject.toml. Nothing else in speechllm imports
vLLM.
"""

from speechllm.models.config import VLLM_MODEL


def register() -> None:
    """Register the model with vLLM, which calls this in each of its processes."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(VLLM_MODEL, f"speechllm.vllm.model:{VLLM_MODEL}")

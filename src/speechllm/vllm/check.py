"""Check of exported directories when vLLM reads the configuration, before loading anything."""

from pathlib import Path

from vllm.config import ModelConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from speechllm.models.config import MODEL_FILE


class ExportCheck(VerifyAndUpdateConfig):
    """Rejects damaged, int8 and older exports; other directories are not checked."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Check the encoders of an exported directory.

        Raises:
          FileNotFoundError, InputError: vLLM cannot serve it, see `exported.check_encoders`.
        """
        if (Path(model_config.model) / MODEL_FILE).is_file():
            from speechllm.vllm.exported import check_encoders  # slow; only for our models

            check_encoders(model_config.model)

#!/usr/bin/env python3
"""Decode with a mixture of speech encoders: decode.py with a default of four encoders.

    python src/decode_mose.py --epoch 10 --avg 5 --max-duration 2000 \\
      --manifest-dir data/fbank --exp-dir exp/asr_librispeech_zipformer_mose_qwen2_1.5B
"""

from pathlib import Path

import decode
from speechllm.decoding.config import CheckpointConfig
from speechllm.models.config import MOSE

EXP_DIR = Path("exp/asr_librispeech_zipformer_mose_qwen2_1.5B")


def main(argv: list[str] | None = None) -> None:
    decode.main(argv, MOSE, CheckpointConfig(exp_dir=EXP_DIR), __doc__)


if __name__ == "__main__":
    main()

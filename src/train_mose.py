#!/usr/bin/env python3
"""Train with a mixture of speech encoders: train.py with a default of four encoders.

    python src/train_mose.py --world-size 4 --max-duration 200 --num-epochs 10 \\
      --manifest-dir data/fbank --exp-dir exp/asr_librispeech_zipformer_mose_qwen2_1.5B

In training, each utterance uses a random selection of encoders in random order.
"""

from pathlib import Path

import train
from speechllm.models.config import MOSE

EXP_DIR = Path("exp/asr_librispeech_zipformer_mose_qwen2_1.5B")


def main(argv: list[str] | None = None) -> None:
    train.main(argv, MOSE, EXP_DIR, __doc__)


if __name__ == "__main__":
    main()

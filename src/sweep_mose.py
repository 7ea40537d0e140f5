#!/usr/bin/env python3
"""Sweep over ways of decoding a mixture: sweep.py with train_mose.py's four encoders by default.

    python src/sweep_mose.py --epoch 10 --avg 5 --test-cuts librispeech_cuts_dev-other \\
      --exp-dir exp/asr_librispeech_zipformer_mose_qwen2_1.5B \\
      --over use-encoders 1 1,2 1,2,3 1,2,3,4
"""

import sweep
import train_mose


def main(argv: list[str] | None = None) -> None:
    sweep.main(argv, train_mose.DEFAULTS)


if __name__ == "__main__":
    main()

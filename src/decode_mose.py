#!/usr/bin/env python3
"""Decode with a mixture of speech encoders: decode.py with train_mose.py's four by default.

    python src/decode_mose.py --epoch 10 --avg 5 --max-duration 2000 \\
      --manifest-dir data/fbank --exp-dir exp/asr_librispeech_zipformer_mose_qwen2_1.5B
"""

import decode
import train_mose


def main(argv: list[str] | None = None) -> None:
    decode.main(argv, train_mose.DEFAULTS, __doc__)


if __name__ == "__main__":
    main()

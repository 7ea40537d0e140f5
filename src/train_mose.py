#!/usr/bin/env python3
"""Train with a mixture of speech encoders: train.py with four encoders by default.

    python src/train_mose.py --world-size 4 --max-duration 200 --num-epochs 10 \\
      --manifest-dir data/fbank --exp-dir exp/asr_librispeech_zipformer_mose_qwen2_1.5B

In training each utterance hears a random choice of the encoders, in random order.
"""

import train

ENCODERS = ("transducer_large", "aed_crctc_large", "crctc_large", "transducer_crctc_large")
DEFAULTS = {
    "exp_dir": "exp/asr_librispeech_zipformer_mose_qwen2_1.5B",
    "speech_encoder_type": ",".join(["large"] * len(ENCODERS)),
    "speech_encoder_path": ",".join(
        f"models/zipformer/librispeech/{name}/pretrained.pt" for name in ENCODERS
    ),
    "speech_encoder_bpe_path": "models/zipformer/librispeech/bpe.model",  # of all
}


def main(argv: list[str] | None = None) -> None:
    train.main(argv, DEFAULTS, __doc__)


if __name__ == "__main__":
    main()

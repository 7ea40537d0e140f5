#!/usr/bin/env bash
# Download the LLM, the encoders and the published checkpoints from Hugging Face or a mirror.
#
#   local/download_models.sh llm encoder                                 # to train the baseline
#   local/download_models.sh --mirror https://hf-mirror.com llm encoders # to train MoSE
#   local/download_models.sh all
#
# Groups: llm       Qwen2-1.5B-Instruct        -> models/qwen2-1.5b-instruct/
#         encoder   transducer_crctc_large     -> models/zipformer/librispeech/ (and bpe.model)
#         encoders  all four                   -> the same
#         baseline  published checkpoint       -> exp/asr_librispeech_zipformer_qwen2_1.5B/
#         mose      published checkpoint       -> exp/asr_librispeech_zipformer_mose_qwen2_1.5B/
# The default mirror is HF_ENDPOINT. Interrupted downloads resume; files are checked by hash.

set -eou pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=python3
[[ -x $here/../.venv/bin/python ]] && python=$here/../.venv/bin/python
exec "$python" "$here/fetch.py" "$@"

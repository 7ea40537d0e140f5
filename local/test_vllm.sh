#!/usr/bin/env bash
# Install vLLM for CPUs and the package into .venv-vllm, and run the tests of the vLLM plugin.
#   bash local/test_vllm.sh
#   bash local/test_vllm.sh -k refused      arguments go to pytest
set -eou pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -f .venv-vllm/installed ]; then
  "${PYTHON_BIN:-python3}" -m venv .venv-vllm
  .venv-vllm/bin/python -m pip install --quiet -r local/requirements-vllm.txt ./src
  # The versions on PyPI do not load with torch+cpu, which breaks `import vllm`.
  .venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  touch .venv-vllm/installed
fi
# The installed package provides the entry point; the code is that of the working tree.
export PYTHONPATH=$PWD/src OMP_WAIT_POLICY=passive
# torch.compile and vLLM load the environment's libraries by path, which must not contain spaces.
link=$(mktemp -d)/venv
ln -s "$PWD/.venv-vllm" "$link"
trap 'rm -r "${link%/*}"' EXIT
"$link/bin/python" -m pytest -c tests/pytest.ini --rootdir . -rs --durations 10 tests/vllm "$@"

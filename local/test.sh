#!/usr/bin/env bash
# Install what the tests need into .venv and run them; arguments go to pytest.
#   bash local/test.sh [tests/test_prompt.py -k ids]
set -eou pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source local/venv.sh requirements.txt tests/requirements.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the models of the tests are too small to share out
exec .venv/bin/python -m pytest -rs "${@:-tests}"

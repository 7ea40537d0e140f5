#!/usr/bin/env bash
# Install the tests' requirements into .venv and run the tests with pytest.
#   bash local/test.sh                                all tests, on two workers
#   bash local/test.sh --fast                         only tests of one process, of about 0.3 s or less
#   bash local/test.sh tests/models/zipformer -k ids  arguments go to pytest
set -eou pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

requirements=(requirements.txt tests/requirements.txt)
options=(-rs)
if [ "${1:-}" = --fast ]; then
  shift
  options+=(-m "not slow and not ranks and not browser" --durations 10 --durations-min 1)
else
  requirements+=(tests/requirements-full.txt local/requirements-deepspeed.txt)
fi
if [ $# = 0 ]; then
  options+=(-n 2 --dist worksteal)
fi

source local/venv.sh "${requirements[@]}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the tests' models are too small for several threads
exec .venv/bin/python -m pytest -c tests/pytest.ini --rootdir . "${options[@]}" "$@"

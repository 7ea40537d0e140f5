#!/usr/bin/env bash
# Measure on a GPU in about 8 minutes: the tests that need one, training steps against the published
# computation, decoding against `generate`, in bfloat16 and float16. Writes one JSON object: for each
# command its exit code, seconds and the lines it printed.
#
#     bash tests/gpu/check.sh OUT.json         # 1.5B and Zipformer-large
#     bash tests/gpu/check.sh OUT.json tiny    # tests this script on a CPU, with one dtype
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$1 shape=${2:-1.5B} encoder=large batch=14 rounds=5 seconds=14 dtypes="bfloat16 float16"
limit=200
python=${PYTHON:-python}
if [ "$shape" = tiny ]; then encoder=tiny batch=2 rounds=1 seconds=2 dtypes=bfloat16 limit=900; fi
records=$(mktemp)

record() { # run a command, at most $limit seconds, and append its record
  local start=$SECONDS code=0 printed
  printed=$(timeout "$limit" "$@" 2>&1) || code=$?
  printf '%s' "$printed" | "$python" -c '
import json, sys
code, seconds, *command = sys.argv[1:]
lines = [json.loads(x) if x.startswith("{") else x for x in sys.stdin.read().splitlines()]
kept = lines[-20:] if int(code) else [x for x in lines if isinstance(x, dict)] or lines[-1:]
print(json.dumps({"command": " ".join(command), "code": int(code), "seconds": int(seconds), "lines": kept}))
' "$code" "$((SECONDS - start))" "${@:2}" >>"$records"
}

for dtype in $dtypes; do
  size=(--shape "$shape" --dtype "$dtype" --rounds "$rounds" --batch "$batch" --seconds "$seconds" --json)
  record "$python" tests/benchmarks/train_step.py --encoder "$encoder" "${size[@]}"
  record "$python" tests/benchmarks/speculative_decoding.py "${size[@]}"
done
record "$python" tests/benchmarks/roofline.py --shape "$shape" --encoder "$encoder" --batch "$batch" --json
if [ "$shape" != tiny ]; then
  record "$python" tests/benchmarks/train_step.py --encoder "$encoder" "${size[@]}" --compile
  record "$python" -m pytest -c tests/pytest.ini --rootdir . -q tests/models/zipformer/test_encoder.py tests/models/test_lora.py
fi
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null || echo none)
"$python" -c '
import json, sys
from importlib.metadata import version
records, out, gpu = sys.argv[1:]
runs = [json.loads(line) for line in open(records)]
json.dump({"gpu": gpu, "torch": version("torch"), "runs": runs}, open(out, "w"), indent=1)
' "$records" "$out" "$gpu"
rm "$records"

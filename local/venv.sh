# Sourced by demo.sh and test.sh: creates .venv and installs requirements files into it.
#   source local/venv.sh requirements.txt [more.txt]
# A file is installed again only when it has changed. PYTHON_BIN is the Python that creates .venv.

if [ ! -x .venv/bin/python ]; then
  "${PYTHON_BIN:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "${PYTHON_BIN:-python3} is older than Python 3.11, which is required" >&2
    exit 1
  }
  "${PYTHON_BIN:-python3}" -m venv .venv
fi
for requirements in "$@"; do
  stamp=.venv/installed-$(echo "$requirements" | tr / -)
  if ! cmp -s "$requirements" "$stamp"; then
    echo "Installing $requirements"
    .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check \
      -r "$requirements"
    cp "$requirements" "$stamp"
    installed=true
  fi
done
# In the background: pip would compile all modules before the first program can start.
if [ -n "${installed:-}" ]; then
  (.venv/bin/python -m compileall -q .venv/lib >/dev/null 2>&1 &)
fi
# Idle threads sleep instead of spinning: several runs may share a few cores.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

# Sourced by demo.sh and test.sh: makes and reuses .venv, installs the requirements files given.
#   source local/venv.sh requirements.txt [more.txt]
# A file is installed again only when it changes. PYTHON_BIN chooses the Python that makes .venv.

if [ ! -x .venv/bin/python ]; then
  "${PYTHON_BIN:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed, ${PYTHON_BIN:-python3} is older" >&2
    exit 1
  }
  "${PYTHON_BIN:-python3}" -m venv .venv
fi
for requirements in "$@"; do
  stamp=.venv/installed-$(echo "$requirements" | tr / -)
  if ! cmp -s "$requirements" "$stamp"; then
    echo "Installing $requirements"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    cp "$requirements" "$stamp"
  fi
done
# Threads that wait asleep, not spinning: several trainings may share few cores.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

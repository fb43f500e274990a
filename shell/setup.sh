# Source this: creates .venv, installs the project and `EXTRAS` (default: DALI on a machine with an NVIDIA GPU) and
# activates it. Fast when nothing changed. PYTHON names the interpreter (3.10 to 3.13). A torch and
# torchvision that are in .venv already stay, so CPU-only builds (both) can be put there first.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${EXTRAS+set}" ] && command -v nvidia-smi >/dev/null; then
  EXTRAS=$(nvidia-smi | grep -q 'CUDA Version: 1[3-9]' && echo dali || echo dali-cuda12)
fi
# NEEDED: an extra that the recipe cannot do without.
[[ -z "${NEEDED:-}" || ",${EXTRAS:-}," == *",${NEEDED:-},"* ]] || EXTRAS=${EXTRAS:+$EXTRAS,}$NEEDED
PROJECT=".${EXTRAS:+[$EXTRAS]}" PYTHON=${PYTHON:-python3}
STAMP=".venv/installed-$( (cat requirements.txt setup.py; echo "$PROJECT $PWD") | cksum | cut -d' ' -f1)"
setup_fails() { echo "error: $1" >&2; exit 2; }
check_python() { # PYTHON REMEDY
  "$1" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 10))' 2>/dev/null ||
    setup_fails "$1 is $("$1" --version 2>&1), Python 3.10 or later is needed; $2"
}
[ ! -e .venv ] || check_python .venv/bin/python "remove it (rm -r .venv), set PYTHON if need be, and start again"
if [ ! -e "$STAMP" ]; then
  if [ ! -e .venv ]; then
    check_python "$PYTHON" "set PYTHON to one"
    "$PYTHON" -m venv .venv || # a half-made one would be taken for whole
      { rm -rf .venv; setup_fails "no virtual environment could be made; on Debian: apt-get install python3-venv"; }
  fi
  echo "installing $PROJECT into .venv (some minutes, once) .."
  .venv/bin/python -m pip install --quiet --editable "$PROJECT" ||
    setup_fails "$PROJECT could not be installed (pip says why above); the same command continues"
  touch "$STAMP"
fi
export PATH="$PWD/.venv/bin:$PATH"

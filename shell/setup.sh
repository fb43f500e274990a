# Source this: creates .venv, installs the project and `EXTRAS` (default: DALI on a machine with an NVIDIA GPU) and
# activates it. Fast when nothing changed. PYTHON names the interpreter (3.10 to 3.13). A torch and
# torchvision that are in .venv already stay, so CPU-only builds (both) can be put there first.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${EXTRAS+set}" ] && command -v nvidia-smi >/dev/null; then
  EXTRAS=$(nvidia-smi | grep -q 'CUDA Version: 1[3-9]' && echo dali || echo dali-cuda12)
fi
PROJECT=".${EXTRAS:+[$EXTRAS]}"
STAMP=".venv/installed-$( (cat requirements.txt setup.py; echo "$PROJECT $PWD") | cksum | cut -d' ' -f1)"
if [ ! -e "$STAMP" ]; then
  echo "installing $PROJECT into .venv (some minutes, once) .."
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv ||
    { echo "error: no virtual environment could be made; on Debian: apt-get install python3-venv" >&2; exit 2; }
  .venv/bin/python -m pip install --quiet --editable "$PROJECT"
  touch "$STAMP"
fi
export PATH="$PWD/.venv/bin:$PATH"

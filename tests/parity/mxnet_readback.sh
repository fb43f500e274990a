#!/usr/bin/env bash
# Proves with the real, retired mxnet 1.9.1 that it reads our record files equal and writes the same bytes.
#   PYTHON=.venv/bin/python bash tests/parity/mxnet_readback.sh
# PYTHON: one that has rwkv_clip installed. MXNET_PYTHON (default python3): one that mxnet's wheel imports on, up to
# 3.11; mxnet needs numpy < 1.24 and so an environment of its own, which is made in a temporary folder.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${MXNET_PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'mxnet==1.9.1' 'numpy<1.24' setuptools
"${PYTHON:-python3}" "$here/mxnet_readback.py" write "$work"
"$work/venv/bin/python" "$here/mxnet_readback.py" read "$work"

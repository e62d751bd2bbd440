#!/bin/sh
# Build the wheel, install it alone in a clean environment, and test what was installed rather than the checkout.
set -eu
python=$1
bin=$2
rm -rf .build/wheel
mkdir -p .build/wheel
"$bin/python" -m build --wheel --no-isolation --outdir .build/wheel . >/dev/null
"$python" -m venv .build/wheel/venv
.build/wheel/venv/bin/pip install --quiet --constraint constraints.txt .build/wheel/*.whl
cp tests/wheel/check_wheel.py .build/wheel/
cd .build/wheel
./venv/bin/python -I check_wheel.py

#!/bin/sh
# Says in words what the build needs and this machine lacks, before pip says it in a hundred lines of traceback.
# usage: check-tools.sh PYTHON
set -eu
python=$1

fail() {
  printf '%s\n' "$1" >&2
  exit 1
}

command -v "$python" >/dev/null ||
  fail "$python is not there: Python 3.10 or newer is needed (Debian, Ubuntu: sudo apt install python3)."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$python is $("$python" --version); Python 3.10 or newer is needed. Name another one: make PYTHON=python3.12"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$python cannot make virtual environments (Debian, Ubuntu: sudo apt install python3-venv)."
for compiler in "${CXX:-}" c++ g++ clang++; do
  [ -n "$compiler" ] && command -v "$compiler" >/dev/null && exit 0
done
fail "There is no C++ compiler: gcc 12 or clang 14 or newer is needed (Debian, Ubuntu: sudo apt install g++)."

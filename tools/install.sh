#!/bin/sh
# Builds the C++ extension and installs the package into a virtual environment, editable: the Python files of this folder
# are what runs.
# usage: install.sh VENV
set -eu
venv=$1
include=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')

if [ ! -e "$include/Python.h" ]; then
  # Debian keeps Python.h in a package of its own. Downloading that takes no root, and unpacking it below the virtual
  # environment changes nothing outside.
  package=lib$("$venv/bin/python" -c 'import sys; print("python{}.{}-dev".format(*sys.version_info))')
  echo "$include/Python.h is missing: taking it from the package $package."
  rm -rf "$venv/headers" && mkdir -p "$venv/headers"
  if ! (cd "$venv/headers" && apt-get download "$package" && dpkg-deb -x "$package"_*.deb .); then
    echo "That failed. Install the headers (Debian, Ubuntu: sudo apt install python3-dev; Fedora: python3-devel)" \
      "and run make again." >&2
    exit 1
  fi
  headers=$(cd "$venv/headers/usr/include" && pwd)
  export CPLUS_INCLUDE_PATH="$headers${CPLUS_INCLUDE_PATH:+:$CPLUS_INCLUDE_PATH}"
  export SKBUILD_CMAKE_DEFINE="Python_INCLUDE_DIR=$headers/${include##*/}"
fi

# Without isolation, which compiles every file anew each time.
"$venv/bin/python" -m pip install --quiet scikit-build-core pybind11 cmake ninja
"$venv/bin/python" -m pip install --no-build-isolation --check-build-dependencies --editable .

#!/bin/sh
# What the image needs of Debian and does not have: `system.sh run` Python 3.11+, `system.sh build` a C++ compiler
# and what makes environments, too. A base that brings its own Python (3.11 or newer, first on the path) keeps it.
set -eu

missing=""
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || missing="$missing python3"
if [ "$1" = build ]; then
    python3 -c 'import ensurepip' 2>/dev/null || missing="$missing python3-venv"
    command -v c++ >/dev/null || missing="$missing g++"
fi
if [ -n "$missing" ]; then
    apt-get update -qq
    # shellcheck disable=SC2086  # words
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null
    apt-get clean
    rm -rf /var/lib/apt/lists/* /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log
fi
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "the base image's $(python3 --version) is too old: ddetr needs Python 3.11; take a base of Debian 12, Ubuntu 24.04 or newer" >&2
    exit 1
}

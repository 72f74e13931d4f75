#!/usr/bin/env bash
# Installs what the build and the tests need, from the distribution's packages. Does nothing when all is there.
set -eu

if command -v apt-get >/dev/null; then
  packages="g++ make pkg-config libcli11-dev nlohmann-json3-dev libzip-dev gnuplot-nox catch2 curl ca-certificates bible-kjv"
  missing=""
  for package in $packages; do
    [ "$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null)" = "install ok installed" ] || missing="$missing $package"
  done
  [ -n "$missing" ] || exit 0
  echo "installing:$missing"
  root=""
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "error: run this as root: apt-get install$missing" >&2; exit 1; }
    root=sudo
  fi
  export DEBIAN_FRONTEND=noninteractive
  $root apt-get update -qq
  $root apt-get install -y -qq --no-install-recommends $missing >/dev/null
elif command -v brew >/dev/null; then
  for package in libomp cli11 nlohmann-json libzip gnuplot catch2; do
    brew list "$package" >/dev/null 2>&1 || brew install "$package"
  done
else
  echo "error: neither apt-get nor brew is here. Install by hand: a C++20 compiler with OpenMP, GNU make, CLI11," >&2
  echo "nlohmann-json, libzip, Catch2 (for the tests), gnuplot (for the plot)." >&2
  exit 1
fi

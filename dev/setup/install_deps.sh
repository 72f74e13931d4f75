#!/usr/bin/env bash
# Installs what the build and the tests need, from the distribution's packages. Does nothing when all is there. MPI: not
# empty if programs are to be built with MPI=1. BROWSER: not empty for what tests the page of a run.
set -eu

# Whether the compiler finds the libraries already, whoever installed them.
# shellcheck disable=SC2086  # those are lists of flags
present() {
  printf '#include <omp.h>\n#include <CLI/CLI.hpp>\n#include <nlohmann/json.hpp>\n#include <zip.h>\n' |
    ${CXX:-g++} ${CPPFLAGS:-} ${CXXFLAGS:-} -std=c++20 -fopenmp -x c++ -E - >/dev/null 2>&1
}
unless_present() {  # unless_present REASON: why nothing can be installed
  present && exit 0
  echo "error: $1" >&2
  exit 1
}

case ${CXX:-} in
  "${CONDA_PREFIX:-/no conda}"/*)
    unless_present "conda's compiler sees conda's packages alone: conda install -c conda-forge cli11 nlohmann_json libzip catch2"
    ;;
esac
if command -v apt-get >/dev/null; then
  packages="g++ make pkg-config libcli11-dev nlohmann-json3-dev libzip-dev gnuplot-nox catch2 curl ca-certificates bible-kjv${MPI:+ libopenmpi-dev}${BROWSER:+ chromium chromium-driver python3-selenium nodejs}"
  missing=""
  for package in $packages; do
    [ "$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null)" = "install ok installed" ] || missing="$missing $package"
  done
  [ -n "$missing" ] || exit 0
  root=""
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || unless_present "run this as root: apt-get install$missing"
    root=sudo
  fi
  echo "installing:$missing"
  export DEBIAN_FRONTEND=noninteractive
  $root apt-get update -qq
  $root apt-get install -y -qq --no-install-recommends $missing >/dev/null
elif command -v brew >/dev/null; then
  for package in libomp cli11 nlohmann-json libzip gnuplot catch2 ${MPI:+open-mpi}; do
    brew list "$package" >/dev/null 2>&1 || brew install "$package"
  done
else
  unless_present "neither apt-get nor brew is here. Install by hand: a C++20 compiler with OpenMP, GNU make, pkg-config, CLI11,
nlohmann-json, libzip, Catch2 (for the tests), gnuplot (for the plot)."
fi

#!/bin/sh
# Tries the C++ compiler on a program with OpenMP and the libraries that we need: check_libraries.sh OUT COMMAND...
# COMMAND compiles OUT.cpp, which this script writes, to the program OUT. If that fails, the compiler's message comes
# first, then how to get what is missing. CXX is the compiler's name for the message.
set -eu
out=$1
shift
cat >"$out.cpp" <<'END'
#include <omp.h>
#include <zip.h>
#if !__has_include(<CLI/CLI.hpp>)
#error CLI11 is missing
#endif
#if !__has_include(<nlohmann/json.hpp>)
#error nlohmann-json is missing
#endif
int main() { return omp_get_max_threads() < 1 || !zip_libzip_version(); }
END
"$@" 2>"$out.log" && exit
cat "$out.log"
echo
echo "error: ${CXX:-$1} cannot build a program with OpenMP, CLI11, nlohmann-json and libzip."
# shellcheck disable=SC2016
echo '`make deps` installs what is missing (clang++ needs libomp-dev too; a Mac: brew install libomp).'
exit 1

#include "version.h"

#include "error.h"
#include "ranks.h"

// What git says where the program is built (Makefile). Without a repository: the commit, which git writes here into
// every archive that it makes (.gitattributes), or nothing.
#ifndef MICROGPT_VERSION
#define MICROGPT_VERSION ""
#endif
static const std::string described = MICROGPT_VERSION, archived = "$Format:%h$";

#ifdef __clang__
static const char* const compiler = "clang++ " __clang_version__;
#else
static const char* const compiler = "g++ " __VERSION__;
#endif

std::string commit() {
  if (!described.empty()) return described;
  return archived[0] == '$' ? "of unknown version" : archived;
}

std::string version_text() { return text("microGPT ", commit(), ", by ", compiler, mpi_text(), "\n"); }

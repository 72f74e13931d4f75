// defines: commit, version_text
#pragma once
#include <string>

// Which commit this program was built from.
std::string commit();
// The same, by which compiler, and with which MPI if there is one: what a report of a fault begins with.
std::string version_text();

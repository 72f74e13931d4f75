// What the fuzz targets share. Each target is one function that takes any bytes: it may refuse them with an Error, and
// nothing else may happen. `make fuzz` builds them with libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer.
// defines: fuzz_file, must, refused
#pragma once
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "../../../host/error.h"
#include "../../../host/files.h"

// A folder of this process in memory.
inline const std::string& fuzz_folder() {
  static const std::string& folder = *new std::string([] {  // never destroyed: it is used at exit
    const bool shared_memory = std::filesystem::is_directory("/dev/shm");
    std::string name = std::string(shared_memory ? "/dev/shm" : "/tmp") + "/microgpt_fuzz_" + std::to_string(getpid());
    std::filesystem::create_directory(name);
    std::atexit([] { std::filesystem::remove_all(fuzz_folder()); });
    return name;
  }());
  return folder;
}

// Writes a file of this name with these bytes; returns its path.
inline std::string fuzz_file(const char* name, const uint8_t* data, size_t size) {
  const std::string path = fuzz_folder() + "/" + name;
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
  if (file < 0 || write(file, data, size) != ssize_t(size)) abort();
  close(file);
  return path;
}

// What must hold for inputs that are accepted.
inline void must(bool holds) {
  if (!holds) abort();
}

// Runs body; returns whether it raised an Error.
template <class Body>
bool refused(Body body) {
  try {
    body();
    return false;
  } catch (const Error&) { return true; }
}

// The trainer as tests run it: a small model on a text of two letters, done in a moment.
// defines: train_gpt, small_run, prepared, train, lines_of, check_refused, with_mpi
#pragma once
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "../host/files.h"
#include "../host/machine.h"
#include "test.h"

namespace fs = std::filesystem;

inline const std::string train_gpt = program("train_gpt_cpu");
// The type is named: what --dtype auto measures may change from run to run where sanitizers make both about as fast.
inline const std::string small_run =
    std::string(
        " --preset=lecture --n_layer=1 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4 --max_iters=20 "
        "--eval_interval=10 --eval_iters=2 --log_interval=5 --dropout=0.1 --learning_rate=1e-2 --threads=2") +
    (built_for.avx512_bf16 ? " --dtype=bfloat16" : " --dtype=float32");

// Makes a folder with data/ from `text`, by default "abab..." of 2000 letters, of which 1800 are for training.
inline std::string prepared(const std::string& text = "") {
  const std::string folder = test_folder();
  std::string content = text;
  if (content.empty())
    for (int i = 0; i < 1000; i++) content += "ab";
  write_file(folder + "/input.txt", content);
  const Run r = run(program("data_prep") + " " + folder + "/input.txt --out " + folder + "/data");
  INFO(r.err);
  REQUIRE(r.code == 0);
  return folder;
}

inline Run train(const std::string& folder, const std::string& flags = "", const std::string& out = "/out") {
  return run(train_gpt + small_run + " --data " + folder + "/data --out_dir " + folder + out + " " + flags);
}

inline std::vector<nlohmann::json> lines_of(const std::string& path) {
  std::vector<nlohmann::json> lines;
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) lines.push_back(nlohmann::json::parse(line));
  return lines;
}

// A command that must be refused: exit code 1, one line on stderr that begins with "error: ", and nothing on stdout.
inline void check_refused(const std::string& command, const std::string& part) {
  INFO(command);
  const Run r = run(command);
  INFO(r.err);
  CHECK(r.code == 1);
  CHECK(contains(r.err, "error: "));
  CHECK(contains(r.err, part));
}

// Whether the program was built with MPI=1.
inline bool with_mpi() {
  static const bool with = contains(run(train_gpt + " --version").out, "with MPI");
  return with;
}

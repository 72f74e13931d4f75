// The machine that a program runs on: what of it the program may use, and whether it can run there at all.
// defines: cpu_quota, memory_limit, physical_cores, allowed_processors, usable_cores, use_threads, CpuFeatures, built_for
#pragma once
#include <string>
#include <vector>

// How much the control groups (version 1 or 2) let this process use; a container is limited by them. Infinity if they
// set no limit. root: the folder in which we look for /proc and /sys.
double cpu_quota(const std::string& root = "");     // so many processors' time (docker --cpus)
double memory_limit(const std::string& root = "");  // in bytes (docker --memory)

// How many cores these logical processors belong to; 0 if the system does not tell.
int physical_cores(const std::vector<int>& processors, const std::string& root = "");

// The logical processors that this process may use, by number.
std::vector<int> allowed_processors();

// How many threads these logical processors keep busy: one for each core, within the quota; at least 1.
int usable_cores(const std::vector<int>& processors, const std::string& root = "");

// Makes OpenMP use so many threads. 0 means as many as OMP_NUM_THREADS says, or else one for each physical core that
// this process may use: two threads on one core would share its vector units, which the products keep busy, and the
// system would stop threads that go beyond a container's quota. A slow core (of a hybrid processor) counts like a fast
// one: the tasks of products and attention go to whichever thread is free, and only the other tenth of a step is
// divided evenly.
//
// OMP_NUM_THREADS wins because somebody set it. Often that was a container's image, so if it is not the number of
// cores, a line on stderr says so; say = false keeps that line away. sharing: so many processes, this one included, divide
// the cores among them.
void use_threads(int threads, bool say = true, int sharing = 1);

// Which instruction sets the kernels were built for. This is data, so that asking executes none of them. A processor
// that lacks one of them ends the program with a sentence, before main begins.
struct CpuFeatures {
  bool fma, avx2, avx512, avx512_bf16;
};
extern const CpuFeatures built_for;  // cpu_features.cpp, which is compiled with the kernels' flags

# microGPT. `make deps train_gpt && ./train_gpt` is all that is needed; `make help` lists the rest.

CXX      ?= g++
# Its name, without a `ccache` before it or flags behind it. A compiler that was chosen, and not make's own default, is
# also nvcc's; nvcc has a default of its own, which the system may have set to one that nvcc accepts.
COMPILER := $(lastword $(filter-out -%,$(CXX)))
CCBIN    := $(if $(filter environment command,$(origin CXX)),-ccbin $(COMPILER))
MARCH    ?= native
# The kernels' instruction set. A program runs on machines that have it and says so on others (check_cpu, host/machine.cpp).
ARCH_FLAG := $(if $(filter x86_64 i%86,$(shell uname -m)),-march=$(MARCH),-mcpu=$(MARCH))

# All processors, unless make is told how many, or memory has no room for as many compilers. Where it has room for one
# only, there is one, even with make -j64. Some versions of make do not show the environment's -j in MAKEFLAGS, and let
# ours replace it.
JOBS := $(shell dev/jobs.sh)
ifeq ($(filter -j%,$(MAKEFLAGS) $(shell echo "$$MAKEFLAGS")),)
  MAKEFLAGS += -j$(JOBS)
endif
ifeq ($(JOBS),1)
.NOTPARALLEL:
endif

# -O3 for the kernels' loops; -O2 would not unroll them. No -ffast-math: results would depend on the compiler's mood.
# -fno-math-errno, -fno-trapping-math: sqrt sets no errno and comparisons raise no traps, so that loops with them become
#   vector code. Neither changes a result.
WARNINGS     := -Wall -Wextra -Wshadow
# CPPFLAGS, CXXFLAGS, LDFLAGS of the environment come before ours, which win; MARCH alone says for which processors.
USER_FLAGS   := $(filter-out -march=% -mcpu=% -mtune=%,$(CPPFLAGS) $(CXXFLAGS))
COMMON       := $(USER_FLAGS) -std=c++20 -g $(WARNINGS) -MMD -MP
HOST_FLAGS   := -O2
KERNEL_FLAGS := -O3 $(ARCH_FLAG) -fno-math-errno -fno-trapping-math
ifeq ($(shell uname -s),Darwin)  # Apple's clang has OpenMP, Homebrew has its library
  BREW   := $(firstword $(wildcard /opt/homebrew /usr/local))
  OPENMP := -Xpreprocessor -fopenmp -I$(BREW)/opt/libomp/include
  LIBS   := $(LDFLAGS) -L$(BREW)/opt/libomp/lib -lomp -L$(BREW)/lib -lzip
  COMMON += -I$(BREW)/include
else
  OPENMP := -fopenmp
  # g++'s OpenMP goes into the program where the compiler brings libgomp.a: as a library it would read the environment
  # before host/machine.cpp has completed it. It is looked for when a program is linked: `make deps` may come first.
  LIBGOMP = $(if $(findstring clang,$(shell $(CXX) --version)),,$(wildcard $(shell $(CXX) -print-file-name=libgomp.a)))
  LIBS    = $(LDFLAGS) $(if $(LIBGOMP),$(LIBGOMP) -pthread -ldl,-fopenmp) -lzip
endif

# One folder for each kind of build: `make SANITIZE=address,undefined test` does not touch the program's objects.
# CANARIES leaves gaps between the tensors of a buffer, which are checked after every step.
comma := ,
BUILD := build/$(notdir $(COMPILER))$(if $(filter-out native,$(MARCH)),-$(MARCH))$(if $(SANITIZE),-$(subst $(comma),-,$(SANITIZE)))
ifdef SANITIZE
  COMMON += -fsanitize=$(SANITIZE) -fno-sanitize-recover=undefined -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS
  LIBS   += -fsanitize=$(SANITIZE)
endif

HOST_OBJECTS := $(patsubst host/%.cpp,%.o,$(wildcard host/*.cpp))
TESTS        := $(patsubst test/%.cpp,%.o,$(filter-out test/faults.cpp,$(wildcard test/*.cpp)))
CUDA_TESTS   := $(patsubst test/%.cu,%.o,$(wildcard test/*.cu))

# CUDA. Without nvcc, train_gpt is the CPU program. nvcc is looked for on the path, in the usual folders, and among the
# packages of Python. The code is made for the card at hand; without one, as PTX for two generations, from which the
# driver makes code for any later card when the program is first started.
CUDA_FOLDERS := $(CUDA_HOME) $(CUDA_PATH) /usr/local/cuda /opt/cuda
NVCC      ?= $(or $(shell command -v nvcc 2>/dev/null), \
                  $(firstword $(wildcard $(addsuffix /bin/nvcc,$(CUDA_FOLDERS)))), \
                  $(shell python3 -c "import glob, nvidia as n; print(*sorted(f for p in n.__path__ for f in glob.glob(p + '/cu*/bin/nvcc'))[-1:])" 2>/dev/null))
NVCC      := $(NVCC)
ARCH      ?= $(if $(shell nvidia-smi -L 2>/dev/null | grep GPU),native,ptx)
ARCH      := $(ARCH)
ALL_ARCHS := 75 80 86 89 90 100 120
ifeq ($(ARCH),native)
  GENCODE := -arch=native
else ifeq ($(ARCH),ptx)
  GENCODE := -gencode arch=compute_75,code=compute_75 -gencode arch=compute_80,code=compute_80
else ifeq ($(ARCH),all)
  GENCODE := $(foreach a,$(ALL_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) -gencode arch=compute_120,code=compute_120
else
  GENCODE := -gencode arch=compute_$(ARCH),code=sm_$(ARCH)
endif
# Spills are for make kernel-stats. -lineinfo lets the profiler show source lines. No --use_fast_math: see above.
# clang warns of every function in CUDA's headers that is not called.
NVCC_FLAGS := $(CCBIN) $(filter -I% -isystem=%,$(subst -isystem ,-isystem=,$(USER_FLAGS))) \
              -std=c++20 -O3 -lineinfo -MMD -MP \
              -Xcompiler=-Wall,-Wextra,-fopenmp$(if $(findstring clang,$(CCBIN)),$(comma)-Wno-unused-function)
CUDA_BUILD := $(BUILD)/cuda-$(ARCH)
CUDA_LIBS  := @$(CUDA_BUILD)/libraries -lcudart_static -lpthread -ldl -lrt

# When `deps` is among the goals, nothing is compiled before it is done, not even with -j.
AFTER_DEPS := $(filter deps,$(MAKECMDGOALS))

.PHONY: all deps data test test-race run-shuffled test-memcheck test-threads test-pytorch bench bench-gpu bench-pytorch \
        bench-scaling kernel-stats profile ladder fuzz clean help FORCE
.DELETE_ON_ERROR:

all: train_gpt train_gpt_cpu data_prep

help:
	@echo 'make deps           install the packages (apt or Homebrew); does nothing when all are there'
	@echo 'make train_gpt      the trainer, and the text and its tokens in data/'
	@echo 'make train_gpt_cpu  the CPU trainer alone'
	@echo 'make data_prep      the program that turns a text into tokens'
	@echo 'make data           data/input.txt, and its tokens: the file that is there, or Tiny Shakespeare'
	@echo 'make test           all tests, CUDA kernels on the CPU; SANITIZE=address,undefined checks every access'
	@echo 'make test DEVICE=cuda  the tests of kernels and GPU trainer on a GPU'
	@echo 'make test-race      kernels under ThreadSanitizer, and with their threads in shuffled order'
	@echo 'make test-memcheck  a short run of the CPU programs under Valgrind; make test-threads: under ThreadSanitizer (clang++)'
	@echo 'make test-pytorch   the exported model against PyTorch (PYTHON=python3, which needs torch and numpy)'
	@echo "make bench          each layer's time and share of the peak that the machine sustains"
	@echo 'make bench-scaling  how the CPU step grows with T, C, L, B, V and threads: doc/cpu_scaling.csv and .png (SIZES=T)'
	@echo 'make bench-gpu      the same on a GPU: what it can do, kernel by kernel, and whole steps of every type'
	@echo 'make bench-pytorch  the same step and products by PyTorch, in turn with ours (PYTHON=python3, which needs torch and numpy;'
	@echo '                    DEVICE=cuda: on a GPU, the step)'
	@echo 'make profile        one step under NVIDIA'"'"'s profilers (KERNEL=name, the one shown in detail)'
	@echo 'make kernel-stats   registers, spills and shared memory of every kernel (ARCH=90 or all)'
	@echo 'make ladder         the models before the transformer, all of them and a report (RUNG=wavenet: one; doc/ladder.md)'
	@echo 'make fuzz           every reader of files and flags against bytes of all kinds (clang++; FUZZ_SECONDS=60 each)'
	@echo 'make clean          remove what was built; data/ and out/ stay'
	@echo 'CXX=clang++, MARCH=x86-64-v3: another compiler (for nvcc too), another instruction set'
	@echo 'CPPFLAGS, CXXFLAGS, LDFLAGS: go before our own flags, so -O, -std and -march are ours'
	@echo 'ARCH=90, ARCH=all, NVCC=path (or empty: no CUDA): for which GPUs train_gpt is built; now: $(if $(NVCC),$(ARCH),no nvcc)'

deps:
	@dev/install_deps.sh

# ----------------------------------------------------------------------------------------------------------------------
# Programs

ifneq ($(NVCC),)
train_gpt: $(CUDA_BUILD)/train_gpt data/vocab.json FORCE
	@cmp -s $< $@ || cp -f $< $@
else
train_gpt: $(BUILD)/train_gpt_cpu data/vocab.json FORCE
	@cmp -s $< $@ || cp -f $< $@
	@echo 'train_gpt is the CPU program$(if $(filter command,$(origin NVCC)),,: nvcc was not found)'
endif

# The GPU trainer; the CPU trainer, without its main, is what it falls back to.
$(CUDA_BUILD)/train_gpt: %: %.o $(BUILD)/train_gpt_fallback.o $(addprefix $(BUILD)/host/,$(HOST_OBJECTS))
	$(CXX) $^ $(LIBS) $(CUDA_LIBS) -o $@

$(CUDA_BUILD)/%.o: %.cu $(CUDA_BUILD)/libraries | $(AFTER_DEPS)
	@mkdir -p $(@D)
	"$(NVCC)" $(NVCC_FLAGS) $(GENCODE) -c $< -o $@

# nvcc is tried once, with a message that helps. The file says where the linker finds CUDA's libraries.
$(CUDA_BUILD)/libraries: | $(AFTER_DEPS)
	@mkdir -p $(@D)
	@dev/check_nvcc.sh $@ "$(NVCC)" $(filter-out -M%,$(NVCC_FLAGS)) $(GENCODE)

$(BUILD)/train_gpt_fallback.o: train_gpt_cpu.cpp $(BUILD)/openmp | $(AFTER_DEPS)
	@mkdir -p $(@D)
	$(CXX) $(COMMON) $(KERNEL_FLAGS) $(OPENMP) -DMICROGPT_NO_MAIN -c $< -o $@

# The programs here are those of the last build, whatever compiler it took.
train_gpt_cpu data_prep: %: $(BUILD)/% FORCE
	@cmp -s $< $@ || cp -f $< $@

$(BUILD)/train_gpt_cpu $(BUILD)/data_prep: %: %.o $(addprefix $(BUILD)/host/,$(HOST_OBJECTS))
	$(CXX) $^ $(LIBS) -o $@

# The host's code, and above all machine.cpp, is built for any processor of the family; only code that holds kernels,
# and cpu_features.cpp, which records what they were built for, gets the instruction set.
$(BUILD)/host/%.o: host/%.cpp $(BUILD)/openmp | $(AFTER_DEPS)
	@mkdir -p $(@D)
	$(CXX) $(COMMON) $(HOST_FLAGS) $(OPENMP) -c $< -o $@

$(BUILD)/data_prep.o: data_prep.cpp $(BUILD)/openmp | $(AFTER_DEPS)
	@mkdir -p $(@D)
	$(CXX) $(COMMON) $(HOST_FLAGS) $(OPENMP) -c $< -o $@

$(BUILD)/host/cpu_features.o: HOST_FLAGS := $(KERNEL_FLAGS)

# What --version says. Another commit compiles version.cpp anew, and nothing else.
VERSION := $(if $(wildcard .git),$(shell git describe --tags --always --dirty 2>/dev/null))
$(BUILD)/host/version.o: HOST_FLAGS += -DMICROGPT_VERSION='"$(VERSION)"'
$(BUILD)/host/version.o: $(BUILD)/version
$(BUILD)/version: FORCE
	@mkdir -p $(@D)
	@echo '$(VERSION)' | cmp -s - $@ || echo '$(VERSION)' > $@

$(BUILD)/train_gpt_cpu.o: train_gpt_cpu.cpp $(BUILD)/openmp | $(AFTER_DEPS)
	@mkdir -p $(@D)
	$(CXX) $(COMMON) $(KERNEL_FLAGS) $(OPENMP) -c $< -o $@

# OpenMP and the libraries are looked for once, with a message that helps.
$(BUILD)/openmp: | $(AFTER_DEPS)
	@mkdir -p $(@D)
	@printf '#include <omp.h>\n#include <zip.h>\n#if !__has_include(<CLI/CLI.hpp>)\n#error CLI11 is missing\n#endif\n' > $@.cpp
	@printf '#if !__has_include(<nlohmann/json.hpp>)\n#error nlohmann-json is missing\n#endif\n' >> $@.cpp
	@printf 'int main() { return omp_get_max_threads() < 1 || !zip_libzip_version(); }\n' >> $@.cpp
	@$(CXX) $(filter-out -M%,$(COMMON)) $(OPENMP) $@.cpp $(LIBS) -o $@ 2> $@.log || { cat $@.log; echo; \
	  echo 'error: $(CXX) cannot build a program with OpenMP, CLI11, nlohmann-json and libzip.'; \
	  echo '`make deps` installs what is missing (clang++ needs libomp-dev too; a Mac: brew install libomp).'; exit 1; }

# ----------------------------------------------------------------------------------------------------------------------
# The text. A text that is there is never replaced, and neither are tokens made from another one by ./data_prep.

data: data/vocab.json

ifeq ($(wildcard data/vocab.json),)
data/input.txt: | $(AFTER_DEPS)
	@mkdir -p data
	@dev/get_text.sh $@
data/vocab.json: data/input.txt | data_prep
	./data_prep data/input.txt
else
data/vocab.json: $(wildcard data/input.txt) | data_prep
	$(if $(wildcard data/input.txt),./data_prep data/input.txt)
endif

# ----------------------------------------------------------------------------------------------------------------------
# Tests. Their objects are built with canaries, so they have a folder of their own.

ifeq ($(DEVICE),cuda)
test: $(CUDA_BUILD)/test/run_tests
	$<
else
TEST_PROGRAMS ?= train_gpt_cpu train_gpt_on_cpu data_prep train_gpt_faulty data_prep_faulty ladder/ladder
test: $(BUILD)/test/run_tests $(addprefix $(BUILD)/,$(TEST_PROGRAMS))
	PROGRAMS=$(BUILD) $(BUILD)/test/run_tests
endif

CATCH2_LIBS = $$(pkg-config --libs catch2 2>/dev/null)
TEST_HOST  := $(addprefix $(BUILD)/test/host/,$(HOST_OBJECTS))
$(BUILD)/test/run_tests: $(addprefix $(BUILD)/test/,$(TESTS) $(CUDA_TESTS) cuda_on_cpu.o ladder/rung.o ladder/charts.o) $(TEST_HOST)
	$(CXX) $^ $(LIBS) $(CATCH2_LIBS) -ldl -rdynamic -o $@

# CUDA on the CPU: the kernels' tests, and through them the whole GPU trainer, by the C++ compiler (dev/cuda_on_cpu).
# Kernels read memory as vectors, hence no strict aliasing; -Wa: the assembler dislikes the sections of shared memory.
CUDA_ON_CPU := -Idev/cuda_on_cpu -O2 -fno-strict-aliasing -Wno-unknown-pragmas -Wa,--no-warn
$(BUILD)/test/%.o: test/%.cu $(BUILD)/openmp | $(AFTER_DEPS)
	@mkdir -p $(@D)
	$(CXX) $(COMMON) $(CUDA_ON_CPU) $(OPENMP) -DCANARIES -x c++ -c $< -o $@
$(BUILD)/test/cuda_on_cpu.o: dev/cuda_on_cpu/engine.cpp | $(AFTER_DEPS)
	@mkdir -p $(@D)
	$(CXX) $(filter-out -fsanitize=% -fno-sanitize-recover=%,$(COMMON)) -O2 \
	  $(if $(findstring address,$(SANITIZE)),-DCUDA_ON_CPU_ASAN) $(if $(findstring thread,$(SANITIZE)),-DCUDA_ON_CPU_TSAN) -c $< -o $@

# The kernels' tests alone, with their threads in other orders, and under ThreadSanitizer: what no barrier orders is a
# race. One OpenMP thread, since ThreadSanitizer does not understand the barriers of libgomp.
test-race:
	$(MAKE) run-shuffled
	$(MAKE) SANITIZE=thread run-shuffled SEEDS='0 1'
run-shuffled: $(BUILD)/test/run_cuda_tests
	for seed in $(SEEDS); do echo "seed $$seed"; CUDA_ON_CPU_SEED=$$seed OMP_NUM_THREADS=1 $< || exit 1; done
SEEDS := 1 2 3 4 5
$(BUILD)/test/run_cuda_tests: $(addprefix $(BUILD)/test/,$(CUDA_TESTS) main.o cuda_on_cpu.o) $(TEST_HOST)
	$(CXX) $^ $(LIBS) $(CATCH2_LIBS) -ldl -rdynamic -o $@

# The whole program that way, for tests of its command line: a GPU trainer whose GPU is the CPU.
$(BUILD)/train_gpt_on_cpu: %: %.o $(BUILD)/train_gpt_fallback.o $(BUILD)/test/cuda_on_cpu.o $(addprefix $(BUILD)/host/,$(HOST_OBJECTS))
	$(CXX) $^ $(LIBS) -ldl -rdynamic -o $@
$(BUILD)/train_gpt_on_cpu.o: train_gpt.cu $(BUILD)/openmp | $(AFTER_DEPS)
	@mkdir -p $(@D)
	$(CXX) $(COMMON) $(CUDA_ON_CPU) $(OPENMP) -x c++ -c $< -o $@

# The programs on a system that fails (test/faults.cpp).
$(BUILD)/train_gpt_faulty: $(BUILD)/train_gpt_cpu.o
$(BUILD)/data_prep_faulty: $(BUILD)/data_prep.o
$(BUILD)/train_gpt_faulty $(BUILD)/data_prep_faulty: $(BUILD)/test/faults.o $(addprefix $(BUILD)/host/,$(HOST_OBJECTS))
	$(CXX) $^ $(LIBS) -ldl -rdynamic -o $@
$(BUILD)/test/faults.o: test/faults.cpp | $(AFTER_DEPS)
	@mkdir -p $(@D)
	$(CXX) $(COMMON) -O2 -c $< -o $@

# The same tests on a GPU.
$(CUDA_BUILD)/test/run_tests: $(addprefix $(CUDA_BUILD)/test/,$(CUDA_TESTS)) $(BUILD)/test/main.o $(TEST_HOST)
	$(CXX) $^ $(LIBS) $(CUDA_LIBS) $(CATCH2_LIBS) -o $@
$(CUDA_BUILD)/test/%.o: test/%.cu $(CUDA_BUILD)/libraries | $(AFTER_DEPS)
	@mkdir -p $(@D)
	"$(NVCC)" $(NVCC_FLAGS) $(GENCODE) -DCANARIES -c $< -o $@

$(BUILD)/test/host/%.o: host/%.cpp $(BUILD)/openmp | $(AFTER_DEPS)
	@mkdir -p $(@D)
	$(CXX) $(COMMON) $(HOST_FLAGS) $(OPENMP) -DCANARIES -c $< -o $@

$(BUILD)/test/ladder/%.o: dev/ladder/%.cpp $(BUILD)/openmp | $(AFTER_DEPS)
	@mkdir -p $(@D)
	$(CXX) $(COMMON) $(TEST_FLAGS) $(OPENMP) -DCANARIES -c $< -o $@

$(BUILD)/test/host/cpu_features.o: HOST_FLAGS := $(KERNEL_FLAGS)

$(BUILD)/test/%.o: test/%.cpp $(BUILD)/openmp | $(AFTER_DEPS)
	@mkdir -p $(@D)
	$(CXX) $(COMMON) $(TEST_FLAGS) $(OPENMP) -DCANARIES -c $< -o $@

# Those that call kernels are compiled as the trainers are, the others quickly.
TEST_FLAGS := -O0 -U_FORTIFY_SOURCE
$(addprefix $(BUILD)/test/test_,layers.o model.o fixture.o random.o ladder.o): TEST_FLAGS := $(KERNEL_FLAGS)

# A short run under Valgrind, which also sees what was read before it was written; it knows no AVX-512. And one under
# ThreadSanitizer, of a size that is worth threads: by clang, whose OpenMP tells it of its barriers through Archer.
test-memcheck:
	$(MAKE) MARCH=x86-64-v3 build/$(notdir $(COMPILER))-x86-64-v3/train_gpt_cpu build/$(notdir $(COMPILER))-x86-64-v3/data_prep
	dev/short_run.sh build/$(notdir $(COMPILER))-x86-64-v3 valgrind -q --error-exitcode=9 --leak-check=full \
	  --show-leak-kinds=definite --errors-for-leak-kinds=definite
ARCHER ?= $(firstword $(wildcard /usr/lib/llvm-*/lib/libarcher.so))
test-threads:
	$(MAKE) CXX=clang++ SANITIZE=thread build/clang++-thread/train_gpt_cpu build/clang++-thread/data_prep
	SHAPE='--n_layer=2 --n_head=4 --n_embd=128 --block_size=64 --batch_size=8' OMP_TOOL_LIBRARIES=$(ARCHER) \
	  TSAN_OPTIONS='ignore_noninstrumented_modules=1 exitcode=9' \
	  dev/short_run.sh build/clang++-thread env

PYTHON ?= python3
test-pytorch: train_gpt_cpu data_prep
	$(PYTHON) dev/test_pytorch.py

# ----------------------------------------------------------------------------------------------------------------------

bench: $(BUILD)/bench
	$(BUILD)/bench

BENCH_GPU := $(CUDA_BUILD)/dev/bench_gpu
bench-gpu: $(BENCH_GPU)
	$(BENCH_GPU) ceilings
	$(BENCH_GPU) kernels
	$(BENCH_GPU) step

ifeq ($(DEVICE),cuda)
bench-pytorch: $(BENCH_GPU)
	$(PYTHON) dev/bench_pytorch.py --device cuda $(BENCH_GPU)
else
bench-pytorch: $(BUILD)/bench
	$(PYTHON) dev/bench_pytorch.py $(BUILD)/bench
endif

# SIZES='T V' measures these anew; the other rows of the table stay.
bench-scaling: $(BUILD)/bench
	dev/bench_scaling.sh $(BUILD)/bench $(SIZES)

KERNEL ?= attention_forward_kernel
profile: $(BENCH_GPU)
	dev/profile.sh $(BENCH_GPU) '$(KERNEL)'

$(BENCH_GPU): %: %.o $(addprefix $(BUILD)/host/,$(HOST_OBJECTS))
	$(CXX) $^ $(LIBS) $(CUDA_LIBS) -o $@

kernel-stats:
	NVCC='$(NVCC)' dev/kernel_stats.sh $(if $(filter all,$(ARCH)),$(ALL_ARCHS),$(filter-out native ptx,$(ARCH)))

$(BUILD)/bench: $(BUILD)/bench.o $(addprefix $(BUILD)/host/,$(HOST_OBJECTS))
	$(CXX) $^ $(LIBS) -o $@

$(BUILD)/bench.o: dev/bench.cpp $(BUILD)/openmp | $(AFTER_DEPS)
	@mkdir -p $(@D)
	$(CXX) $(COMMON) $(KERNEL_FLAGS) $(OPENMP) -c $< -o $@

# The ladder: the course's earlier models, dev/ladder. All of them, or RUNG=wavenet alone.
LADDER := $(patsubst dev/ladder/%.cpp,$(BUILD)/ladder/%.o,$(wildcard dev/ladder/*.cpp))
RUNG   ?= all
ladder: $(BUILD)/ladder/ladder train_gpt
	@cmp -s $< $@ || cp -f $< $@
	./$@ $(RUNG)
$(BUILD)/ladder/ladder: $(LADDER) $(addprefix $(BUILD)/host/,$(HOST_OBJECTS))
	$(CXX) $^ $(LIBS) -o $@
$(BUILD)/ladder/%.o: dev/ladder/%.cpp $(BUILD)/openmp | $(AFTER_DEPS)
	@mkdir -p $(@D)
	$(CXX) $(COMMON) $(KERNEL_FLAGS) $(OPENMP) -DMICROGPT_NO_MAIN -c $< -o $@

# Fuzzing with clang's libFuzzer: every target for FUZZ_SECONDS, from seeds that our own writers make; what was found to
# be of interest is kept in build/fuzz/corpus, and an input that fails is left in the folder build/fuzz.
FUZZ_TARGETS := $(filter-out seeds,$(patsubst dev/fuzz/%.cpp,%,$(wildcard dev/fuzz/*.cpp)))
FUZZ_SECONDS ?= 60
FUZZ_FLAGS   := -std=c++20 -g -O2 -MMD -MP $(WARNINGS) -Wno-unknown-pragmas -fsanitize=fuzzer-no-link,address,undefined \
                -fno-sanitize-recover=undefined -D_GLIBCXX_ASSERTIONS
fuzz: $(addprefix run-fuzz-,$(FUZZ_TARGETS))
run-fuzz-%: build/fuzz/% build/fuzz/corpus
	cd build/fuzz && ./$* -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -rss_limit_mb=1024 -malloc_limit_mb=256 \
	  -timeout=10 -print_final_stats=1 -close_fd_mask=1 -artifact_prefix=$*- corpus/$* 2>&1 | tail -n 12
build/fuzz/corpus: build/fuzz/seeds
	$< $@
build/fuzz/seeds: build/fuzz/seeds.o $(addprefix build/fuzz/host/,$(HOST_OBJECTS))
	clang++ -fsanitize=address,undefined -fopenmp $^ -lzip -o $@
$(addprefix build/fuzz/,$(FUZZ_TARGETS)): %: %.o $(addprefix build/fuzz/host/,$(HOST_OBJECTS))
	clang++ -fsanitize=fuzzer,address,undefined -fopenmp $^ -lzip -o $@
build/fuzz/%.o: dev/fuzz/%.cpp
	@mkdir -p $(@D)
	clang++ $(FUZZ_FLAGS) -c $< -o $@
build/fuzz/host/%.o: host/%.cpp
	@mkdir -p $(@D)
	clang++ $(FUZZ_FLAGS) -c $< -o $@

clean:
	rm -rf build train_gpt train_gpt_cpu data_prep ladder

-include $(wildcard $(BUILD)/*.d $(BUILD)/*/*.d $(BUILD)/*/*/*.d build/fuzz/*.d build/fuzz/host/*.d)

# What you measure, check and learn with. The Makefile, which includes this file, has the programs and the tests.

.PHONY: help test-mpi test-page test-race run-shuffled test-memcheck test-threads test-pytorch fuzz coverage run-coverage \
        tidy bench bench-gpu bench-mpi bench-pytorch bench-scaling profile kernel-stats ladder lab

define HELP
run      make deps            install the packages (apt or Homebrew); does nothing when all are there
         make train_gpt       the trainer, and the text and its tokens in data/
         make train_gpt_cpu   the CPU trainer alone
         make data            data/input.txt and its tokens: the file that is there, or Tiny Shakespeare
         make data_prep       the program that turns a text into tokens
         make clean           remove what was built; data/ and out/ stay

test     make test            all tests, CUDA kernels on the CPU; SANITIZE=address,undefined checks every access
         make test TEST=test_layers  the tests of one file of test/
         make test DEVICE=cuda  the tests of the kernels and of the GPU trainer, on a GPU
         make test-mpi MPI=1  runs of several processes, under OpenMPI
         make deps test-page  the page of a run, in a browser (SCREENSHOTS=folder keeps pictures)
         make test-race       kernels under ThreadSanitizer, and with their threads in shuffled order
         make test-memcheck   a short run of the CPU programs under Valgrind
         make test-threads    the same under ThreadSanitizer (clang++)
         make test-pytorch    the exported model against PyTorch (PYTHON=python3, which needs torch and numpy)
         make fuzz            bytes of all kinds for every reader of files and flags (clang++; FUZZ_SECONDS=60 each)
         make coverage        which share of each file's lines and branches the tests run (g++, gcov)
         make tidy            clang-tidy on host/ and kernels/*.h (TIDY_FILES=host/files.cpp: one file)

measure  make bench           each layer's time, as a share of the peak that the machine sustains
         make bench-scaling   how a CPU step grows with T, C, L, B, V, threads: doc/cpu_scaling.csv and .png (SIZES=T)
         make bench-mpi MPI=1  two processes beside one with as many threads, and the parts of a step
         make bench-pytorch   the same step and products by PyTorch, in turn with ours (PYTHON=python3; DEVICE=cuda: the
                              step on a GPU)
         dev/bench/sweep LIST  trains many models, and says how good each has become (--help)
         make bench-gpu       what the GPU can do, kernel by kernel, whole steps and sampling in every type
         make profile         a step under NVIDIA's profilers (KERNEL=name: the one shown in detail)
         make kernel-stats    registers, spills and shared memory of every kernel (ARCH=90 or all)

learn    make ladder          the models before the transformer, and a report (RUNG=wavenet: one of them; doc/ladder.md)
         make lab             the GPU's kernels in versions, from naive to shipped: the list (doc/kernels.md)
         make lab KERNEL=all  checks all versions and, on a GPU, times them (KERNEL=layernorm_forward: of one operation)

variables  MPI=1             programs whose runs may have several processes, also for deps (doc/scale.md)
           CXX=clang++        another compiler, for nvcc too      MARCH=x86-64-v3  another instruction set
           ARCH=90, ARCH=all  for which GPUs; now: $(if $(NVCC),$(ARCH),no nvcc)
           NVCC=path          another nvcc; NVCC= does without CUDA
           CPPFLAGS, CXXFLAGS, LDFLAGS  go before our own flags, so -O, -std and -march are ours
endef
help: ; @: $(info $(HELP))

PYTHON ?= python3

# ----------------------------------------------------------------------------------------------------------------------
# Check

# The kernels' tests alone, with their threads in other orders, and under ThreadSanitizer, to which everything is a race
# that no barrier orders. One OpenMP thread, since ThreadSanitizer does not understand the barriers of libgomp.
SEEDS := 1 2 3 4 5
test-race:
	$(MAKE) run-shuffled
	$(MAKE) SANITIZE=thread run-shuffled SEEDS='0 1'
run-shuffled: $(BUILD)/test/run_cuda_tests
	for seed in $(SEEDS); do echo "seed $$seed"; CUDA_ON_CPU_SEED=$$seed OMP_NUM_THREADS=1 test/run_in_two.sh $< 'attention*' || exit 1; done

# Runs of several processes, with programs that were built with MPI=1 (test/test_ranks.cpp).
test-mpi: | $(AFTER_DEPS)
	$(MAKE) MPI=1 TEST=test_ranks TEST_PROGRAMS='train_gpt_cpu train_gpt_on_cpu train_gpt_faulty data_prep' test

# The page that a run writes, in node and in a browser. With `deps` among the goals these are installed, too.
test-page: | $(AFTER_DEPS)
	$(MAKE) TEST=test_page TEST_PROGRAMS='train_gpt_cpu data_prep' test

# A short run under Valgrind, which also sees reads of unwritten memory; it knows no AVX-512.
MEMCHECK := build/$(notdir $(COMPILER))-x86-64-v3
test-memcheck:
	$(MAKE) MARCH=x86-64-v3 $(MEMCHECK)/train_gpt_cpu $(MEMCHECK)/data_prep
	dev/check/short_run.sh $(MEMCHECK) valgrind -q --error-exitcode=9 --leak-check=full --show-leak-kinds=definite \
	  --errors-for-leak-kinds=definite

# And one under ThreadSanitizer, large enough to use threads. clang's OpenMP tells it of barriers through Archer.
ARCHER ?= $(firstword $(wildcard /usr/lib/llvm-*/lib/libarcher.so))
test-threads:
	$(MAKE) CXX=clang++ SANITIZE=thread build/clang++-thread/train_gpt_cpu build/clang++-thread/data_prep
	SHAPE='--n_layer=2 --n_head=4 --n_embd=128 --block_size=64 --batch_size=8' OMP_TOOL_LIBRARIES=$(ARCHER) \
	  TSAN_OPTIONS='ignore_noninstrumented_modules=1 exitcode=9' \
	  dev/check/short_run.sh build/clang++-thread env

test-pytorch: train_gpt_cpu data_prep
	$(PYTHON) dev/check/test_pytorch.py

# Fuzzing with clang's libFuzzer: every target for FUZZ_SECONDS, from seeds that our own writers make. Inputs of
# interest are kept in build/fuzz/corpus, and an input that fails is left in the folder build/fuzz.
FUZZ_TARGETS := $(filter-out seeds,$(patsubst dev/check/fuzz/%.cpp,%,$(wildcard dev/check/fuzz/*.cpp)))
FUZZ_SECONDS ?= 60
FUZZ_FLAGS   := -std=c++20 -g -O2 -MMD -MP $(WARNINGS) -Wno-unknown-pragmas \
                -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined -D_GLIBCXX_ASSERTIONS
FUZZ_HOST    := $(patsubst %.cpp,build/fuzz/%.o,$(wildcard host/*.cpp))
define compile_fuzz
@mkdir -p $(@D)
clang++ $(FUZZ_FLAGS) -c $< -o $@
endef
fuzz: $(addprefix run-fuzz-,$(FUZZ_TARGETS))
run-fuzz-%: build/fuzz/% build/fuzz/corpus
	cd build/fuzz && ./$* -max_total_time=$(FUZZ_SECONDS) -max_len=$(if $(filter weights,$*),32768,4096) \
	  -rss_limit_mb=1024 -malloc_limit_mb=256 -timeout=10 -print_final_stats=1 -close_fd_mask=1 -artifact_prefix=$*- corpus/$* 2>&1 | tail -n 12
build/fuzz/corpus: build/fuzz/seeds
	$< $@
build/fuzz/seeds: build/fuzz/seeds.o $(FUZZ_HOST)
	clang++ -fsanitize=address,undefined -fopenmp $^ -lzip -o $@
$(addprefix build/fuzz/,$(FUZZ_TARGETS)): %: %.o $(FUZZ_HOST)
	clang++ -fsanitize=fuzzer,address,undefined -fopenmp $^ -lzip -o $@
build/fuzz/%.o: dev/check/fuzz/%.cpp
	$(compile_fuzz)
build/fuzz/host/%.o: host/%.cpp
	$(compile_fuzz)

# Which lines and branches do the tests run? g++ counts in a build of its own. We leave out tests that say nothing of
# our code's lines (the Makefile's, the documentation's, those of CUDA on the CPU), and those that counting disturbs: a
# program that ends by a signal loses its counts, and counting opens and writes files, which the tests of failing system
# calls would number with the program's own.
COVERAGE       := build/coverage
COVERAGE_TESTS ?= ~[.]~[\#test_make]~[\#test_docs]~[cuda_on_cpu]~[reliability]~"data_prep: every call that writes*"$\
                  ~"Inputs: a folder that cannot*"~"Inputs: surroundings*"
coverage:
	$(MAKE) NVCC= BUILD=$(COVERAGE) CXXFLAGS='$(CXXFLAGS) --coverage' LDFLAGS='$(LDFLAGS) --coverage' run-coverage
run-coverage: $(BUILD)/test/run_tests $(addprefix $(BUILD)/,train_gpt_cpu train_gpt_on_cpu data_prep ladder/ladder)
	find $(BUILD) -name '*.gcda' -delete
	-PROGRAMS=$(BUILD) $(BUILD)/test/run_tests -# '$(COVERAGE_TESTS)'
	dev/check/coverage.py $(BUILD)

# clang-tidy, with the checks of .clang-tidy. The CPU trainer includes the kernels' headers.
TIDY       ?= clang-tidy
TIDY_FILES ?= $(wildcard host/*.cpp) data_prep.cpp train_gpt_cpu.cpp
tidy:
	@command -v $(TIDY) >/dev/null || { echo '$(TIDY) was not found'; exit 1; }
	@printf '%s\n' $(TIDY_FILES) | \
	  xargs -P $(JOBS) -I FILE \
	  $(TIDY) --quiet --warnings-as-errors='*' FILE -- -std=c++20 $(ARCH_FLAG) $(OPENMP) 2>/dev/null

# ----------------------------------------------------------------------------------------------------------------------
# Measure

bench: $(BUILD)/bench
	$(BUILD)/bench
$(BUILD)/bench: $(BUILD)/dev/bench/bench.o $(HOST)
	$(CXX) $^ $(LIBS) -o $@
$(BUILD)/dev/bench/bench.o: FLAGS = $(KERNEL_FLAGS)

# SIZES='T V' measures these anew; the other rows of the table stay.
bench-scaling: $(BUILD)/bench
	dev/bench/bench_scaling.sh $(BUILD)/bench $(SIZES)

# One process with two threads and two with one, in turn.
bench-mpi: $(BUILD)/bench_mpi
	for round in 1 2 3 4 5; do $< 2 && mpirun -n 2 $< 1 || exit 1; done
$(BUILD)/bench_mpi: $(BUILD)/dev/bench/bench_mpi.o $(HOST)
	$(CXX) $^ $(LIBS) -o $@
$(BUILD)/dev/bench/bench_mpi.o: FLAGS = $(KERNEL_FLAGS)

BENCH_GPU := $(CUDA_BUILD)/dev/bench/bench_gpu
bench-gpu: $(BENCH_GPU)
	$(BENCH_GPU) ceilings
	$(BENCH_GPU) kernels
	$(BENCH_GPU) step
	$(BENCH_GPU) sample
$(BENCH_GPU): %: %.o $(CUDA_BUILD)/kernels/link.o $(HOST)
	$(CXX) $^ $(LIBS) $(CUDA_LIBS) -o $@

ifeq ($(DEVICE),cuda)
bench-pytorch: $(BENCH_GPU)
	$(PYTHON) dev/bench/bench_pytorch.py --device cuda $(BENCH_GPU)
else
bench-pytorch: $(BUILD)/bench
	$(PYTHON) dev/bench/bench_pytorch.py $(BUILD)/bench
endif

profile: $(BENCH_GPU)
	dev/bench/profile.sh $(BENCH_GPU) '$(or $(KERNEL),attention_forward_kernel)'

kernel-stats:
	NVCC='$(NVCC)' dev/bench/kernel_stats.sh $(if $(filter all,$(ARCH)),$(ALL_ARCHS),$(filter-out native ptx,$(ARCH)))

# ----------------------------------------------------------------------------------------------------------------------
# Learn

# The ladder: the course's earlier models, all of them, or RUNG=wavenet alone.
RUNG ?= all
ladder: $(BUILD)/ladder/ladder train_gpt
	@cmp -s $< $@ || cp -f $< $@
	./$@ $(RUNG)
$(BUILD)/ladder/ladder: $(patsubst %.cpp,$(BUILD)/%.o,$(wildcard dev/ladder/*.cpp)) $(HOST)
	@mkdir -p $(@D)
	$(CXX) $^ $(LIBS) -o $@
$(BUILD)/dev/ladder/%.o: FLAGS = $(KERNEL_FLAGS)
$(BUILD)/dev/ladder/%.o: DEFINES = -DMICROGPT_NO_MAIN

# The kernel lab. On a GPU it also times. Without one, nvcc says what each kernel needs of registers.
LAB_CPU := $(BUILD)/lab
LAB_GPU := $(CUDA_BUILD)/lab
$(LAB_CPU): $(addprefix $(BUILD)/test/,$(LAB) dev/kernels/main.o cuda_on_cpu.o) $(TEST_HOST)
	$(CXX) $^ $(LIBS) -ldl -rdynamic -o $@
$(LAB_GPU): $(addprefix $(CUDA_BUILD)/,$(LAB) dev/kernels/main.o) $(HOST)
	$(CXX) $^ $(LIBS) $(CUDA_LIBS) -o $@
ifneq ($(and $(NVCC),$(filter lab,$(MAKECMDGOALS)),$(shell nvidia-smi -L 2>/dev/null | grep GPU)),)
lab: $(LAB_GPU)
	$< $(KERNEL)
else
lab: $(LAB_CPU)
	$< $(KERNEL)
	$(if $(and $(NVCC),$(filter-out all,$(KERNEL))),NVCC='$(NVCC)' SOURCE=dev/kernels/$(KERNEL).cu \
	  dev/bench/kernel_stats.sh 75 80 90)
endif

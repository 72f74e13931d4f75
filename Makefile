# microGPT. `make deps train_gpt && ./train_gpt` is all that you need; `make help` lists the rest.
#
# This file builds the programs and the tests. It includes two others:
#   dev/setup/compilers.mk   finds the compilers and the libraries on this machine
#   dev/dev.mk               what you measure, check and learn with; make help

all: train_gpt train_gpt_cpu data_prep

include dev/setup/compilers.mk

.PHONY: all deps data test clean FORCE
.DELETE_ON_ERROR:

# What an object is compiled with; FLAGS, below, is one of these.
# -O3 unrolls the kernels' loops; -O2 would not. No -ffast-math: results would depend on the compiler's mood.
# -fno-math-errno, -fno-trapping-math: sqrt sets no errno and comparisons raise no traps, so that loops with them
#   become vector code. Neither changes a result.
# CUDA on the CPU: kernels read memory as vectors, hence no strict aliasing; -Wa: the assembler dislikes the sections of
#   shared memory. The instruction set is that of the CPU's kernels, which such objects call as well: functions of the
#   same name whose vectors differ in length must not meet in a program. No fused multiply-adds: as if the kernels' source
#   were computed line by line.
#   At -O1 they take two thirds of -O2's time to compile, and the tests a sixth longer to run.
# With a sanitizer, which sees as much without optimization, the compiler takes half as long at -O1, and a third of
#   that at -O0.
HOST_FLAGS   := -O2 $(OPENMP)
KERNEL_FLAGS := $(if $(SANITIZE),-O1,-O3) $(ARCH_FLAG) -fno-math-errno -fno-trapping-math $(OPENMP)
TEST_FLAGS   := -O0 -U_FORTIFY_SOURCE $(OPENMP)
CUDA_ON_CPU   = -Idev/cuda_on_cpu $(if $(filter $(BUILD)/test/%,$(if $(SANITIZE),$@)),-O0,-O1) $(ARCH_FLAG) -ffp-contract=off -fno-strict-aliasing -Wno-unknown-pragmas -Wa,--no-warn $(OPENMP) -x c++

# One folder for each kind of build: `make SANITIZE=address,undefined test` does not touch the program's objects.
KIND  := $(if $(filter-out native,$(MARCH)),-$(MARCH))$(if $(SANITIZE),-$(subst $(comma),-,$(SANITIZE)))
BUILD := build/$(notdir $(COMPILER))$(KIND)
ifdef SANITIZE
  COMMON += -fsanitize=$(SANITIZE) -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -D_GLIBCXX_ASSERTIONS
  COMMON += $(if $(findstring clang,$(CXX)),,-Wno-maybe-uninitialized)  # with it g++ takes exception to its own library
  LIBS   += -fsanitize=$(SANITIZE)
endif

CUDA_BUILD := $(BUILD)/cuda-$(ARCH)
CUDA_LIBS  := @$(CUDA_BUILD)/libraries -lcudart_static -lpthread -ldl -lrt

# When `deps` is among the goals, nothing is compiled before it is done, not even with -j.
AFTER_DEPS := $(filter deps,$(MAKECMDGOALS))

deps:
	@MPI='$(MPI)' BROWSER='$(filter test-page,$(MAKECMDGOALS))' dev/setup/install_deps.sh

# ----------------------------------------------------------------------------------------------------------------------
# Compiling: $(BUILD)/X.o comes from X.cpp. Objects for the tests lie in $(BUILD)/test and have canaries between the
# tensors of a buffer, so the host's code is compiled for them a second time. nvcc's objects lie in $(CUDA_BUILD).

define compile
@mkdir -p $(@D)
$(CXX) $(COMMON) $(1) $(DEFINES) -c $< -o $@
endef
define compile_cuda
@mkdir -p $(@D)
"$(NVCC)" $(NVCC_FLAGS) $(GENCODE) $(DEFINES) -c $< -o $@
endef

vpath %.cu test dev/cuda_on_cpu
$(BUILD)/%.o: %.cpp $(BUILD)/openmp | $(AFTER_DEPS)
	$(call compile,$(FLAGS))
$(BUILD)/test/%.o: %.cpp $(BUILD)/openmp | $(AFTER_DEPS)
	$(call compile,$(FLAGS))
$(BUILD)/test/%.o: %.cu $(BUILD)/openmp | $(AFTER_DEPS)
	$(call compile,$(CUDA_ON_CPU))
$(CUDA_BUILD)/%.o: %.cu $(CUDA_BUILD)/libraries | $(AFTER_DEPS)
	$(compile_cuda)
$(CUDA_BUILD)/kernels/%.o: kernels/%.cpp $(CUDA_BUILD)/libraries | $(AFTER_DEPS)
	$(compile_cuda)
$(CUDA_BUILD)/test/%.o: %.cu $(CUDA_BUILD)/libraries | $(AFTER_DEPS)
	$(compile_cuda)

# The host's code, and above all machine.cpp, is built for any processor of the family. Only code that holds kernels
# gets the instruction set, and cpu_features.cpp, which records what they were built for.
FLAGS   = $(HOST_FLAGS)
DEFINES =
$(addprefix $(BUILD)/,train_gpt_cpu.o train_gpt_fallback.o host/cpu_features.o): FLAGS = $(KERNEL_FLAGS)
$(BUILD)/test/%.o: FLAGS = $(TEST_FLAGS)
$(BUILD)/test/%.o $(CUDA_BUILD)/test/%.o: DEFINES = -DCANARIES
$(BUILD)/test/host/%.o: FLAGS = $(HOST_FLAGS)
# Tests that call kernels are compiled as the trainers are, the others quickly. We look which do: kernels whose vectors
# differ in length must not meet in a program, for the linker takes one of two functions of the same name.
KERNEL_TESTS := $(shell grep -lE '"\.\./(kernels/|train_gpt_cpu\.cpp|dev/)' test/*.cpp)
$(addprefix $(BUILD)/,$(KERNEL_TESTS:.cpp=.o) test/host/cpu_features.o): FLAGS = $(KERNEL_FLAGS)

# ----------------------------------------------------------------------------------------------------------------------
# Programs

HOST := $(patsubst %.cpp,$(BUILD)/%.o,$(wildcard host/*.cpp))

ifneq ($(NVCC),)
train_gpt: $(CUDA_BUILD)/train_gpt data/vocab.json FORCE
	@cmp -s $< $@ || cp -f $< $@
else
train_gpt: $(BUILD)/train_gpt_cpu data/vocab.json FORCE
	@cmp -s $< $@ || cp -f $< $@
	@echo 'train_gpt is the CPU program$(if $(filter command,$(origin NVCC)),,: nvcc was not found)'
endif

# The programs here are those of the last build, whatever compiler it took.
train_gpt_cpu data_prep: %: $(BUILD)/% FORCE
	@cmp -s $< $@ || cp -f $< $@

$(BUILD)/train_gpt_cpu $(BUILD)/data_prep: %: %.o $(HOST)
	$(CXX) $^ $(LIBS) -o $@

# The GPU trainer; it falls back to the CPU trainer, of which it contains all but `main`.
$(CUDA_BUILD)/train_gpt: %: %.o $(CUDA_BUILD)/kernels/link.o $(BUILD)/train_gpt_fallback.o $(HOST)
	$(CXX) $^ $(LIBS) $(CUDA_LIBS) -o $@
$(BUILD)/train_gpt_fallback.o: DEFINES = -DMICROGPT_NO_MAIN -DMICROGPT_FALLBACK
$(BUILD)/train_gpt_fallback.o: train_gpt_cpu.cpp $(BUILD)/openmp | $(AFTER_DEPS)
	$(call compile,$(FLAGS))

# The page that a run writes holds the files of host/page/, so the program does.
$(BUILD)/host/page.o $(BUILD)/test/host/page.o build/fuzz/host/page.o: $(wildcard host/page/*)

# What --version says. Another commit compiles version.cpp anew, and nothing else.
VERSION := $(if $(wildcard .git),$(shell git describe --tags --always --dirty 2>/dev/null))
$(BUILD)/host/version.o: DEFINES = -DMICROGPT_VERSION='"$(VERSION)"'
$(BUILD)/host/version.o: $(BUILD)/version
$(BUILD)/version: FORCE
	@mkdir -p $(@D)
	@echo '$(VERSION)' | cmp -s - $@ || echo '$(VERSION)' > $@

# MPI=1: a run may have several processes (host/ranks.h), with the MPI whose mpicc is found.
MPICC     ?= mpicc
MPI_FLAGS  = $(if $(MPI),$(wordlist 2,99,$(shell $(MPICC) -show 2>/dev/null)))
LIBS      += $(filter-out -I%,$(MPI_FLAGS))
$(BUILD)/host/ranks.o $(BUILD)/test/host/ranks.o: $(BUILD)/mpi
$(BUILD)/host/ranks.o $(BUILD)/test/host/ranks.o: DEFINES += $(if $(MPI),-DMICROGPT_MPI $(filter -I%,$(MPI_FLAGS)))
# The GPUs of several processes exchange by NCCL: NVIDIA's or, on the CPU, dev/cuda_on_cpu/nccl.cpp.
NCCL_ON_CPU  := $(BUILD)/kernels/link_on_cpu.o $(if $(MPI),$(BUILD)/dev/cuda_on_cpu/nccl.o)
NCCL_FOLDER   = $(if $(MPI),$(patsubst %/include/nccl.h,%,$(firstword $(wildcard $(addsuffix /include/nccl.h,$(NCCL_FOLDERS))))))
NCCL_LIBS     = $(if $(NCCL_FOLDER),$(addprefix -L,$(wildcard $(NCCL_FOLDER)/lib64 $(NCCL_FOLDER)/lib)) \
                $(addprefix -Wl$(comma)-rpath$(comma),$(wildcard $(NCCL_FOLDER)/lib64 $(NCCL_FOLDER)/lib))) $(if $(MPI),-l:libnccl.so.2)
CUDA_LIBS    += $(NCCL_LIBS)
$(CUDA_BUILD)/kernels/link.o $(NCCL_ON_CPU): $(BUILD)/mpi
$(CUDA_BUILD)/kernels/link.o: DEFINES = $(if $(MPI),-DMICROGPT_MPI $(addprefix -I,$(addsuffix /include,$(NCCL_FOLDER))))
$(NCCL_ON_CPU): DEFINES = $(if $(MPI),-DMICROGPT_MPI $(filter -I%,$(MPI_FLAGS)))
$(BUILD)/kernels/link_on_cpu.o: kernels/link.cpp $(BUILD)/openmp | $(AFTER_DEPS)
	$(call compile,$(CUDA_ON_CPU))
$(BUILD)/dev/cuda_on_cpu/nccl.o: FLAGS = -Idev/cuda_on_cpu -O2

$(BUILD)/mpi: FORCE | $(AFTER_DEPS)
	@mkdir -p $(@D)
	@$(if $(MPI),command -v $(MPICC) >/dev/null || { echo '$(MPICC) was not found: make deps MPI=1 installs OpenMPI'; exit 1; })
	@echo '$(MPI_FLAGS)' | cmp -s - $@ || echo '$(MPI_FLAGS)' > $@

# We look for OpenMP and the libraries once, and for nvcc, with messages that help. What check_nvcc.sh writes tells the
# linker where CUDA's libraries are.
$(BUILD)/openmp: | $(AFTER_DEPS)
	@mkdir -p $(@D)
	@CXX='$(CXX)' dev/setup/check_libraries.sh $@ $(CXX) $(filter-out -M%,$(COMMON)) $(OPENMP) $@.cpp $(LIBS) -o $@
$(CUDA_BUILD)/libraries: | $(AFTER_DEPS)
	@mkdir -p $(@D)
	@dev/setup/check_nvcc.sh $@ "$(NVCC)" $(filter-out -M%,$(NVCC_FLAGS)) $(GENCODE)

# ----------------------------------------------------------------------------------------------------------------------
# The text. A text that is there is never replaced, and neither are tokens made from another one by ./data_prep.

data: data/vocab.json

ifeq ($(wildcard data/vocab.json),)
data/input.txt: | $(AFTER_DEPS)
	@mkdir -p data
	@dev/setup/get_text.sh $@
data/vocab.json: data/input.txt | data_prep
	./data_prep data/input.txt
else
data/vocab.json: $(wildcard data/input.txt) | data_prep
	$(if $(wildcard data/input.txt),./data_prep data/input.txt)
endif

# ----------------------------------------------------------------------------------------------------------------------
# Tests

TESTS       := $(patsubst test/%.cpp,%.o,$(filter-out test/faults.cpp,$(wildcard test/*.cpp)))
CUDA_TESTS  := $(patsubst %.cu,%.o,$(notdir $(wildcard test/*.cu dev/cuda_on_cpu/*.cu)))
TEST_HOST   := $(HOST:$(BUILD)/%=$(BUILD)/test/%)
TEST_LADDER := $(addprefix $(BUILD)/test/dev/ladder/,rung.o charts.o)
LAB         := $(if $(CUDA_TESTS),$(filter-out %/main.o,$(patsubst %.cu,%.o,$(wildcard dev/kernels/*.cu))))
CATCH2_LIBS  = $$(pkg-config --libs catch2 2>/dev/null)

# TEST=test_layers runs the tests of that file alone, and builds no more than they need.
RUN_TESTS := run_$(or $(TEST),tests)
STARTS    := $(if $(TEST),$(shell grep -lsE '"trainer.h"|PROGRAMS' test/$(TEST).cpp),all)
ifeq ($(DEVICE),cuda)
test: $(CUDA_BUILD)/test/$(RUN_TESTS)
	$<
else
TEST_PROGRAMS ?= $(if $(STARTS),train_gpt_cpu train_gpt_on_cpu data_prep train_gpt_faulty data_prep_faulty ladder/ladder)
test: $(BUILD)/test/$(RUN_TESTS) $(addprefix $(BUILD)/,$(TEST_PROGRAMS))
	PROGRAMS=$(BUILD) $(if $(TEST)$(if $(CUDA_TESTS),,none),$<,test/run_in_two.sh $< '[cuda]')
endif

$(BUILD)/test/run_tests: $(addprefix $(BUILD)/test/,$(TESTS) $(CUDA_TESTS) $(LAB) cuda_on_cpu.o) $(NCCL_ON_CPU) $(TEST_LADDER) $(TEST_HOST)
	$(CXX) $^ $(LIBS) $(CATCH2_LIBS) -ldl -rdynamic -o $@

$(BUILD)/test/run_test_%: $(addprefix $(BUILD)/test/,test_%.o main.o cuda_on_cpu.o) $(NCCL_ON_CPU) $(TEST_LADDER) $(TEST_HOST)
	$(CXX) $^ $(LIBS) $(CATCH2_LIBS) -ldl -rdynamic -o $@
$(CUDA_BUILD)/test/run_test_%: $(CUDA_BUILD)/test/test_%.o $(CUDA_BUILD)/kernels/link.o $(BUILD)/test/main.o $(TEST_HOST)
	$(CXX) $^ $(LIBS) $(CUDA_LIBS) $(CATCH2_LIBS) -o $@

$(BUILD)/test/run_test_lab: $(addprefix $(BUILD)/test/,$(LAB))
$(CUDA_BUILD)/test/run_test_lab: $(addprefix $(CUDA_BUILD)/,$(LAB))

# The kernels' tests alone: on the CPU, for make test-race, and on a GPU.
$(BUILD)/test/run_cuda_tests: $(addprefix $(BUILD)/test/,$(CUDA_TESTS) $(LAB) main.o cuda_on_cpu.o) $(NCCL_ON_CPU) $(TEST_HOST)
	$(CXX) $^ $(LIBS) $(CATCH2_LIBS) -ldl -rdynamic -o $@
$(CUDA_BUILD)/test/run_tests: $(addprefix $(CUDA_BUILD)/,$(CUDA_TESTS:%=test/%) $(LAB) kernels/link.o) $(BUILD)/test/main.o $(TEST_HOST)
	$(CXX) $^ $(LIBS) $(CUDA_LIBS) $(CATCH2_LIBS) -o $@

# CUDA on the CPU (dev/cuda_on_cpu) runs the kernels' tests, and the whole GPU trainer in the tests of its command line.
# Sanitizers must not follow its jumps between stacks.
$(BUILD)/test/cuda_on_cpu.o: COMMON := $(filter-out -fsanitize=% -fno-sanitize-recover=%,$(COMMON))
$(BUILD)/test/cuda_on_cpu.o: DEFINES = $(if $(findstring address,$(SANITIZE)),-DCUDA_ON_CPU_ASAN) \
                                       $(if $(findstring thread,$(SANITIZE)),-DCUDA_ON_CPU_TSAN)
$(BUILD)/test/cuda_on_cpu.o: dev/cuda_on_cpu/engine.cpp | $(AFTER_DEPS)
	$(call compile,-O2)
$(BUILD)/train_gpt_on_cpu: %: %.o $(NCCL_ON_CPU) $(BUILD)/train_gpt_fallback.o $(BUILD)/test/cuda_on_cpu.o $(HOST)
	$(CXX) $^ $(LIBS) -ldl -rdynamic -o $@
$(BUILD)/train_gpt_on_cpu.o: train_gpt.cu $(BUILD)/openmp | $(AFTER_DEPS)
	$(call compile,$(CUDA_ON_CPU))

# The programs on a system that fails (test/faults.cpp).
$(BUILD)/train_gpt_faulty: $(BUILD)/train_gpt_cpu.o
$(BUILD)/data_prep_faulty: $(BUILD)/data_prep.o
$(BUILD)/train_gpt_faulty $(BUILD)/data_prep_faulty: $(BUILD)/test/faults.o $(HOST)
	$(CXX) $^ $(LIBS) -ldl -rdynamic -o $@
$(BUILD)/test/faults.o: FLAGS = -O2
$(BUILD)/test/faults.o: DEFINES =

include dev/dev.mk

clean:
	rm -rf build train_gpt train_gpt_cpu data_prep ladder

-include $(wildcard $(BUILD)/*.d $(BUILD)/*/*.d $(BUILD)/*/*/*.d $(BUILD)/*/*/*/*.d build/fuzz/*.d build/fuzz/host/*.d)

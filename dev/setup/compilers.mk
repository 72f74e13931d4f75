# Which compilers build the programs, how many of them run at a time, and the flags that depend on the machine.

comma := ,

CXX      ?= g++
# The compiler's name, without a `ccache` before it or flags behind it. nvcc takes a C++ compiler that you chose; else
# it has a default of its own, which the system may have set to one that nvcc accepts.
COMPILER := $(lastword $(filter-out -%,$(CXX)))
CCBIN    := $(if $(filter environment command,$(origin CXX)),-ccbin $(COMPILER))
MARCH    ?= native
# The kernels' instruction set. On a machine without it a program says so and ends (check_cpu in host/machine.cpp).
ARCH_FLAG := $(if $(filter x86_64 i%86,$(shell uname -m)),-march=$(MARCH),-mcpu=$(MARCH))

# As many compilers at a time as there are processors, or fewer if memory has no room for them. You choose with -j; but
# where memory has room for one compiler only, there is one, even with -j64. Some versions of make do not show the
# environment's -j in MAKEFLAGS and let ours replace it, so we look for it in both places.
JOBS := $(shell dev/setup/jobs.sh)
ifeq ($(filter -j%,$(MAKEFLAGS) $(shell echo "$$MAKEFLAGS")),)
  MAKEFLAGS += -j$(JOBS)
endif
ifeq ($(JOBS),1)
.NOTPARALLEL:
endif

# CPPFLAGS, CXXFLAGS, LDFLAGS of the environment come before ours, which win. MARCH alone chooses the instruction set.
WARNINGS   := -Wall -Wextra -Wshadow
USER_FLAGS := $(filter-out -march=% -mcpu=% -mtune=%,$(CPPFLAGS) $(CXXFLAGS))
COMMON     := $(USER_FLAGS) -std=c++20 -g $(WARNINGS) -MMD -MP
ifeq ($(shell uname -s),Darwin)  # Apple's clang has OpenMP, Homebrew has its library
  BREW   := $(firstword $(wildcard /opt/homebrew /usr/local))
  OPENMP := -Xpreprocessor -fopenmp -I$(BREW)/opt/libomp/include
  LIBS   := $(LDFLAGS) -L$(BREW)/opt/libomp/lib -lomp -L$(BREW)/lib -lzip
  COMMON += -I$(BREW)/include
else
  OPENMP := -fopenmp
  # The program contains g++'s OpenMP if the compiler brings libgomp.a. As a shared library it would read the
  # environment before host/machine.cpp has completed it. We look when a program is linked: `make deps` may come first.
  LIBGOMP = $(if $(findstring clang,$(shell $(CXX) --version)),,$(wildcard $(shell $(CXX) -print-file-name=libgomp.a)))
  LIBS    = $(LDFLAGS) $(if $(LIBGOMP),$(LIBGOMP) -pthread -ldl,-fopenmp) -lzip
endif

# CUDA. Without nvcc, train_gpt is the CPU program. We look for nvcc on the path, in the usual folders, and among the
# packages of Python. nvcc makes code for the card at hand; without one, PTX for two generations, from which the driver
# makes code for any later card when the program is first started.
CUDA_FOLDERS := $(CUDA_HOME) $(CUDA_PATH) /usr/local/cuda /opt/cuda
PIP_NVCCS    := f for p in nvidia.__path__ for f in glob.glob(p + '/cu*/bin/nvcc')
NVCC      ?= $(or $(shell command -v nvcc 2>/dev/null), \
                  $(firstword $(wildcard $(addsuffix /bin/nvcc,$(CUDA_FOLDERS)))), \
                  $(shell python3 -c "import glob, nvidia; print(*sorted($(PIP_NVCCS))[-1:])" 2>/dev/null))
NVCC      := $(NVCC)
ARCH      ?= $(if $(shell nvidia-smi -L 2>/dev/null | grep GPU),native,ptx)
ARCH      := $(ARCH)
ALL_ARCHS := 75 80 86 89 90 100 120
ifeq ($(ARCH),native)
  GENCODE := -arch=native
else ifeq ($(ARCH),ptx)
  GENCODE := -gencode arch=compute_75,code=compute_75 -gencode arch=compute_80,code=compute_80
else ifeq ($(ARCH),all)
  GENCODE := $(foreach a,$(ALL_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) \
             -gencode arch=compute_120,code=compute_120
else
  GENCODE := -gencode arch=compute_$(ARCH),code=sm_$(ARCH)
endif
# Where NCCL may be, for several processes on GPUs (MPI=1). The last of these is Python's package.
NCCL_FOLDERS = $(NCCL_HOME) $(patsubst %/bin/nvcc,%,$(NVCC)) /usr/local /usr \
               $(shell python3 -c "import nvidia.nccl; print(*nvidia.nccl.__path__)" 2>/dev/null)
# -lineinfo lets the profiler show source lines. No --use_fast_math: see above. clang warns of every function in CUDA's
# headers that is not called.
NVCC_FLAGS := $(CCBIN) $(filter -I% -isystem=%,$(subst -isystem ,-isystem=,$(USER_FLAGS))) \
              -std=c++20 -O3 -lineinfo -MMD -MP \
              -Xcompiler=-Wall,-Wextra,-fopenmp$(if $(findstring clang,$(CCBIN)),$(comma)-Wno-unused-function)

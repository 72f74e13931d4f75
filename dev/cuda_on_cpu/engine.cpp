// The engine of CUDA on the CPU; cuda_runtime.h says what it does. It has three parts: the threads of a block, device
// memory, streams.
// Sanitizers must not follow the jumps between stacks, so this file is compiled without them; CUDA_ON_CPU_ASAN and
// CUDA_ON_CPU_TSAN say which of them the rest of the program is built with.
#include "cuda_runtime.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef CUDA_ON_CPU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN(...) __VA_ARGS__
constexpr bool with_asan = true;
#else
#define ASAN(...)
constexpr bool with_asan = false;
#endif
#ifdef CUDA_ON_CPU_TSAN
#define TSAN(...) __VA_ARGS__
constexpr bool with_tsan = true;
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_acquire(void*);
void __tsan_release(void*);
void __tsan_read_range(void*, size_t);
void __tsan_write_range(void*, size_t);
void __tsan_java_init(uintptr_t heap, uintptr_t size);
void __tsan_java_alloc(uintptr_t p, uintptr_t size);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#else
#define TSAN(...)
constexpr bool with_tsan = false;
#endif

// Pushes the registers that a function must preserve, stores the stack pointer in *from and goes on where the fiber of
// the stack `to` stopped. It does not switch floating-point modes, because nothing changes them.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
constexpr int saved_words = 6, return_word = 6;  // on a waiting fiber's stack: the registers, then where to return
#elif defined(__aarch64__)                       // nobody has compiled this yet
asm(R"(
.text
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, %function
cuda_on_cpu_switch:
  sub sp, sp, #160
  stp d8, d9, [sp]
  stp d10, d11, [sp, #16]
  stp d12, d13, [sp, #32]
  stp d14, d15, [sp, #48]
  stp x19, x20, [sp, #64]
  stp x21, x22, [sp, #80]
  stp x23, x24, [sp, #96]
  stp x25, x26, [sp, #112]
  stp x27, x28, [sp, #128]
  stp x29, x30, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp d8, d9, [sp]
  ldp d10, d11, [sp, #16]
  ldp d12, d13, [sp, #32]
  ldp d14, d15, [sp, #48]
  ldp x19, x20, [sp, #64]
  ldp x21, x22, [sp, #80]
  ldp x23, x24, [sp, #96]
  ldp x25, x26, [sp, #112]
  ldp x27, x28, [sp, #128]
  ldp x29, x30, [sp, #144]
  add sp, sp, #160
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
constexpr int saved_words = 20, return_word = 19;
#else
#error "CUDA on the CPU has a switch between stacks for x86-64 and aarch64 only"
#endif

namespace cuda_on_cpu {
namespace {

long long environment(const char* name, long long otherwise) {
  const char* value = getenv(name);
  return value ? atoll(value) : otherwise;
}

// ---------------------------------------------------------------------------------------------------------------------
// Random numbers

uint64_t state_of(int s) { return 0x9e3779b97f4a7c15u * uint64_t(s) ^ 0x2545f4914f6cdd1du; }
int seed = int(environment("CUDA_ON_CPU_SEED", 0));
uint64_t random_state = state_of(seed);

// Draws from 0 ... n - 1; always 0 with seed 0 (Marsaglia, "Xorshift RNGs", 2003).
unsigned draw(unsigned n) {
  if (!seed) return 0;
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return unsigned(random_state >> 33) % n;
}

template <class Element>
void shuffle_order(Element* first, unsigned n) {
  for (unsigned i = n; seed && i > 1; i--) std::swap(first[i - 1], first[draw(i)]);
}

// ---------------------------------------------------------------------------------------------------------------------
// The threads of the block that runs

constexpr int max_threads = 1024;
constexpr size_t default_smem = 48 << 10, max_smem = 227 << 10;
constexpr size_t stack_bytes = (with_asan ? 256 : 64) << 10;  // AddressSanitizer's frames are larger
const size_t page = size_t(sysconf(_SC_PAGESIZE));

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  size_t stack_size = 0;
  void *asan = nullptr, *tsan = nullptr;  // the sanitizer's handles of this stack
  // For ThreadSanitizer another thread, the copier, does the copies in the background. This thread releases `begun` to
  // it, and it releases done[group % 4] to this thread.
  void* copier = nullptr;
  char begun = 0, done[4]{};
};
enum class State { ready, at_barrier, at_collective, returned };
struct Copy {
  void* to;
  const void* from;
  int group;
};
struct Thread : Fiber {
  uint3 index{};
  State state = State::returned;
  Site site{};               // where it waits,
  unsigned mask = 0;         // and for which lanes, in a collective
  std::vector<Copy> copies;  // in the background
  int group = 0;             // the group that the next commit ends
  bool waited = false;       // for the launch before
};

// The lanes that have come to a collective. A lane that comes to another one, or with another mask, does not count and
// waits for ever; we report it when no thread can go on.
struct Warp {
  unsigned exists = 0, arrived = 0, mask = 0;
  Combine combine = nullptr;
  Site site{};
  void* slots[32]{};
  unsigned generation = 0;
};

Thread threads[max_threads], host;  // host: the stack that runs the grid
Warp warps[max_threads / 32];
Thread* current = &host;
int n_threads, n_returned;
int ready[max_threads];  // a ring buffer
unsigned ready_first, n_ready;
struct Barrier {
  int arrived = 0, predicates = 0, result = 0;
  bool same_site = true;
  Site site{};
};
Barrier block_barrier;

// Drawn for each launch. depth_first: the thread that became ready last runs next, instead of any. copy_early:
// background copies are done at once.
bool depth_first, copy_early;

std::string error;  // ends the running kernel
const void* kernel;
const std::function<void()>* thread_function;
bool starts_early;  // it may start before the launch before it has ended
size_t smem_bytes;
alignas(1024) char smem[max_smem + 1024];

// For ThreadSanitizer a barrier is a release and an acquire of an address. Many barriers pass before one uses the same
// address again, so that two barriers do not order accesses by chance.
constexpr unsigned n_addresses = 4096;
unsigned barrier_generation = 0;
[[maybe_unused]] char launch_start, launch_end, launch_before_ended, barrier_addresses[n_addresses],
    warp_addresses[32][n_addresses];

#ifdef CUDA_ON_CPU_TSAN
// The last thread of a collective works for the others and accesses their memory.
bool ignoring_accesses = false;
void ignore_accesses(bool yes) {
  (yes ? AnnotateIgnoreReadsBegin : AnnotateIgnoreReadsEnd)("", 0);
  (yes ? AnnotateIgnoreWritesBegin : AnnotateIgnoreWritesEnd)("", 0);
  ignoring_accesses = yes;
}
#endif

void switch_to(Thread& to) {
  Thread& from = *current;
  if (&to == &from) return;
  current = &to;
  threadIdx = to.index;
  ASAN(__sanitizer_start_switch_fiber(&from.asan, to.stack, to.stack_size);)
  TSAN(__tsan_switch_to_fiber(to.tsan, 1);)  // 1: the switch itself orders no accesses
  cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer);
  ASAN(__sanitizer_finish_switch_fiber(from.asan, nullptr, nullptr);)
}

void make_ready(int thread) {
  threads[thread].state = State::ready;
  ready[(ready_first + n_ready++) % max_threads] = thread;
}

// The thread whose turn it is; the host if no thread can go on.
Thread& next() {
  if (n_ready == 0 || !error.empty()) return host;
  n_ready--;
  int& first = ready[ready_first % max_threads];
  if (depth_first) return threads[ready[(ready_first + n_ready) % max_threads]];
  if (seed) std::swap(first, ready[(ready_first + draw(n_ready + 1)) % max_threads]);
  ready_first++;
  return threads[first];
}

// Does the current thread's background copies of all groups before `end`.
void finish_copies(int end) {
  std::vector<Copy>& copies = current->copies;
  size_t n = 0;
  for (; n < copies.size() && copies[n].group < end; n++) {
    const Copy& c = copies[n];
    TSAN(__tsan_acquire(&current->done[c.group % 4]);)
    if (c.from)
      memcpy(c.to, c.from, 16);
    else
      memset(c.to, 0, 16);
  }
  copies.erase(copies.begin(), copies.begin() + long(n));
}

std::string place();

void fiber_main() {
  ASAN(__sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);)
  for (;;) {  // once for every block
    TSAN(__tsan_acquire(&launch_start);)
    try {
      (*thread_function)();
      if (starts_early && !current->waited)
        error = "a kernel that may start early has ended without cudaGridDependencySynchronize()\n  " + place();
    } catch (const std::exception& e) { error = std::string("exception: ") + e.what() + "\n  " + place(); }
    finish_copies(current->group + 1);
    current->state = State::returned;
    n_returned++;
    TSAN(__tsan_release(&launch_end);)
    switch_to(next());
  }
}

// Makes a stack that looks as if the fiber had stopped just before the first instruction of fiber_main.
void make_fiber(Fiber& f) {
  if (!f.stack) {
    void* memory =
        mmap(nullptr, stack_bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for a thread's stack");
    mprotect(memory, page, PROT_NONE);  // a stack that overflows ends the program
    f.stack = static_cast<char*>(memory);
    f.stack_size = stack_bytes + page;
    TSAN(f.tsan = __tsan_create_fiber(0);)
  }
  void** top = reinterpret_cast<void**>(f.stack + f.stack_size);
  void** left = top - 4 - saved_words;  // aligns the stack as after a call
  std::fill(left, top, nullptr);        // zeros tell a debugger where the stack ends
  left[return_word] = reinterpret_cast<void*>(fiber_main);
  f.stack_pointer = left;
  f.asan = nullptr;
}

// ---------------------------------------------------------------------------------------------------------------------
// Reports

std::string format(const char* text, va_list arguments) {
  char out[1024];
  vsnprintf(out, sizeof out, text, arguments);
  return out;
}
__attribute__((format(printf, 1, 2))) std::string format(const char* text, ...) {
  va_list arguments;
  va_start(arguments, text);
  std::string out = format(text, arguments);
  va_end(arguments);
  return out;
}

std::string in(uint3 i) { return format("(%u,%u,%u)", i.x, i.y, i.z); }
std::string in(dim3 i) { return in(uint3{i.x, i.y, i.z}); }

// The running kernel, if the linker exported its name, and the thread whose turn it is.
std::string place() {
  Dl_info info{};
  std::string name = "?";
  if (dladdr(kernel, &info) && info.dli_saddr == kernel) {
    char* readable = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
    name = readable ? readable : info.dli_sname;
    free(readable);
    name = name.substr(0, name.find('('));
  }
  return "in kernel " + name + ", block " + in(blockIdx) + " of " + in(gridDim) +
         (current == &host ? ", threads " : ", thread " + in(threadIdx) + " of ") + in(blockDim) +
         format(", seed %d", seed);
}
[[maybe_unused]] void print_place() {
  if (kernel) fprintf(stderr, "CUDA on the CPU: %s\n", place().c_str());
}

bool same(const Site& a, const Site& b) { return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file)); }

std::string divergence() {
  const auto doing = [](const Thread& t) {
    if (t.state == State::returned) return std::string("have returned");
    const std::string where = format(" at %s:%d (%s)", t.site.file, t.site.line, t.site.function);
    return t.state == State::at_barrier ? "wait in __syncthreads" + where
                                        : "wait for their warp" + where + format(", mask %08x", t.mask);
  };
  std::map<std::string, std::string> who;
  for (int t = 0, first; t < n_threads;) {
    const std::string what = doing(threads[t]);
    for (first = t; t < n_threads && doing(threads[t]) == what;) t++;
    who[what] += t - first > 1 ? format(" %d-%d", first, t - 1) : format(" %d", first);
  }
  std::string out = "divergence: the threads of a block do not meet";
  for (const auto& [what, whose] : who) out += "\n  threads" + whose + " " + what;
  return out + "\n  " + place();
}

// ---------------------------------------------------------------------------------------------------------------------
// Running a grid

struct Bytes {
  char *first, *end;
};

// The program's shared variables: the sections whose names begin with .noinit.
std::vector<Bytes> find_static_smem() {
  uintptr_t base = 0;  // where the program lies: it is the first object
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* to) { return *static_cast<uintptr_t*>(to) = info->dlpi_addr, 1; }, &base);
  const int file = open("/proc/self/exe", O_RDONLY);
  const size_t size = size_t(lseek(file, 0, SEEK_END));
  void* const memory = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  if (memory == MAP_FAILED) throw std::runtime_error("cannot read /proc/self/exe");
  const char* const program = static_cast<char*>(memory);
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(program);
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(program + header->e_shoff);
  std::vector<Bytes> found;
  for (int i = 0; i < header->e_shnum; i++)
    if (!strncmp(program + sections[header->e_shstrndx].sh_offset + sections[i].sh_name, ".noinit", 7)) {
      char* const first = reinterpret_cast<char*>(base + sections[i].sh_addr);
      found.push_back({first, first + sections[i].sh_size});
    }
  munmap(memory, size);
  return found;
}
const std::vector<Bytes>& static_smem() {
  static const std::vector<Bytes> found = find_static_smem();
#ifdef CUDA_ON_CPU_TSAN
  static const bool announced [[maybe_unused]] = [] {  // the addresses that __tsan_java_alloc will get
    uintptr_t first = uintptr_t(smem), end = uintptr_t(smem + sizeof smem);
    for (const Bytes& b : found) first = std::min(first, uintptr_t(b.first)), end = std::max(end, uintptr_t(b.end));
    __tsan_java_init(first / 8 * 8, (end + 7) / 8 * 8 - first / 8 * 8);
    return true;
  }();
#endif
  return found;
}

// Sets every bit of shared memory to one at the start of a block. AddressSanitizer's memset would stop at the gaps
// between variables.
void fill_with_ones(Bytes bytes) {
  char* p = bytes.first;
  for (; p < bytes.end && uintptr_t(p) % 8; p++) *const_cast<volatile char*>(p) = char(0xff);
  for (; bytes.end - p >= 8; p += 8) *reinterpret_cast<volatile uint64_t*>(p) = ~uint64_t(0);
  for (; p < bytes.end; p++) *const_cast<volatile char*>(p) = char(0xff);
#ifdef CUDA_ON_CPU_TSAN
  // Blocks can race with each other, but not here: each has its own shared memory, which nobody has accessed yet.
  const uintptr_t first = uintptr_t(bytes.first) / 8 * 8, end = (uintptr_t(bytes.end) + 7) / 8 * 8;
  if (end > first) __tsan_java_alloc(first, end - first);
#endif
}

void run_block(uint3 index) {
  blockIdx = index;
  for (const Bytes& bytes : static_smem()) fill_with_ones(bytes);
  fill_with_ones({smem, smem + smem_bytes});
#ifdef CUDA_ON_CPU_TSAN
  // Nor does a thread go on from one of the last block: it gets any stack, and a stack is a thread to the sanitizer.
  const unsigned n_stacks = unsigned(std::min(max_threads, n_threads + 32));
  for (unsigned t = n_stacks; t > 1; t--) {
    static uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    if (!threads[t - 1].stack) make_fiber(threads[t - 1]);
    std::swap<Fiber>(threads[t - 1], threads[(state >> 33) % t]);
  }
#endif
  n_returned = n_ready = ready_first = 0;
  block_barrier = {};
  barrier_generation++;
  for (int t = 0; t < n_threads; t++) {
    threads[t].group = 0;
    threads[t].waited = false;
    make_ready(t);
  }
  for (Warp& w : warps) w.arrived = 0, w.generation++;
  shuffle_order(ready, unsigned(n_threads));
  switch_to(next());  // returns when no thread can go on
  if (error.empty() && n_returned < n_threads) error = divergence();
}

// After an error, the function on this thread's stack never goes on.
void give_up(Thread& t) {
#ifdef CUDA_ON_CPU_TSAN
  __tsan_switch_to_fiber(t.tsan, 1);
  __tsan_release(&launch_end);
  __tsan_switch_to_fiber(host.tsan, 1);
  __tsan_destroy_fiber(t.tsan);
  t.tsan = __tsan_create_fiber(0);
  if (t.copier) __tsan_destroy_fiber(std::exchange(t.copier, nullptr));
#endif
  ASAN(__asan_unpoison_memory_region(t.stack, t.stack_size);)
  t.copies.clear();
  make_fiber(t);
}

// The host has seen what all launches have done so far.
void settle() { TSAN(__tsan_acquire(&launch_end);) }

void run_grid(const cudaLaunchConfig_t& config, bool early, const void* function, const std::function<void()>& thread) {
#ifdef CUDA_ON_CPU_ASAN
  if (!host.stack) {
    pthread_attr_t attributes;
    void* stack;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack, &host.stack_size);
    pthread_attr_destroy(&attributes);
    host.stack = static_cast<char*>(stack);
  }
#endif
  TSAN(host.tsan = __tsan_get_current_fiber();)
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  kernel = function;
  starts_early = early;
  thread_function = &thread;
  smem_bytes = config.dynamicSmemBytes;
  n_threads = int(blockDim.x * blockDim.y * blockDim.z);
  depth_first = draw(2);
  copy_early = !with_tsan && draw(2);
  for (Warp& w : warps) w.exists = 0;
  for (int t = 0; t < n_threads; t++) {
    if (!threads[t].stack) make_fiber(threads[t]);
    warps[t / 32].exists |= 1u << t % 32;
    const unsigned i = unsigned(t);
    threads[t].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  }
  ASAN(__asan_poison_memory_region(smem + smem_bytes, sizeof smem - smem_bytes);)
  // settle() takes in what earlier launches have done. If this kernel starts early, the host releases its start before
  // that, and so the kernel's threads have not seen the launch before until they wait for it.
  if (!starts_early) settle();
  TSAN(__tsan_release(&launch_start);)
  settle();
  TSAN(__tsan_release(&launch_before_ended);)
  std::vector<unsigned> order(size_t(gridDim.x) * gridDim.y * gridDim.z);
  std::iota(order.begin(), order.end(), 0u);
  shuffle_order(order.data(), unsigned(order.size()));
  for (const unsigned b : order) {
    run_block({b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y});
    if (!error.empty()) break;
  }
  ASAN(__asan_unpoison_memory_region(smem, sizeof smem);)
  kernel = nullptr;
  if (error.empty()) return;
  std::for_each(threads, threads + n_threads, give_up);
  settle();  // a thread has written the error
  throw std::runtime_error(std::exchange(error, ""));
}

}  // namespace

int set_seed(int value) {
  random_state = state_of(value);
  return std::exchange(seed, value);
}

void fail(const char* text, ...) {
  {
    va_list arguments;
    va_start(arguments, text);
    const std::string message = format(text, arguments);
    va_end(arguments);
    if (current == &host) throw std::runtime_error(message);
    error = message + "\n  " + place();
  }
  TSAN(if (ignoring_accesses) ignore_accesses(false);)
  switch_to(host);  // never returns: no destructor of this stack will run
  __builtin_unreachable();
}

void wait_for_launch_before() {
  current->waited = true;
  TSAN(__tsan_acquire(&launch_before_ended);)
}

int lane() { return int(current - threads) % 32; }
void* dynamic_smem() { return smem; }

int barrier(bool predicate, Site site) {
  Barrier& b = block_barrier;
  if (b.arrived++ == 0) b.site = site;
  b.same_site &= same(b.site, site);
  b.predicates += predicate;
  current->state = State::at_barrier;
  current->site = site;
  [[maybe_unused]] char* const address = &barrier_addresses[barrier_generation % n_addresses];
  TSAN(__tsan_release(address);)
  if (b.arrived == n_threads && b.same_site) {
    b.result = std::exchange(b.predicates, 0);
    b.arrived = 0;
    barrier_generation++;
    for (int t = 0; t < n_threads; t++) make_ready(t);
  }
  switch_to(next());
  TSAN(__tsan_acquire(address);)
  return b.result;  // still ours: the next barrier needs every thread, so it is not over before all have read this
}

void collective(unsigned mask, void* slot, Combine combine, Site site, [[maybe_unused]] bool orders_memory) {
  const int thread = int(current - threads), l = thread % 32, first = thread - l;
  Warp& w = warps[thread / 32];
  if (!(mask >> l & 1)) fail("%s:%d: lane %d is not in its own mask %08x", site.file, site.line, l, mask);
  if (mask & ~w.exists) fail("%s:%d: mask %08x names lanes that the block does not have", site.file, site.line, mask);
  current->state = State::at_collective;
  current->site = site;
  current->mask = mask;
  [[maybe_unused]] char* const address = &warp_addresses[thread / 32][w.generation % n_addresses];
  TSAN(if (orders_memory) __tsan_release(address);)
  if (!w.arrived) {
    w.mask = mask;
    w.combine = combine;
    w.site = site;
  }
  if (w.mask == mask && w.combine == combine && same(w.site, site)) {
    w.slots[l] = slot;
    w.arrived |= 1u << l;
    if (w.arrived == mask) {
      TSAN(ignore_accesses(true);)
      combine(w.slots, mask);
      TSAN(ignore_accesses(false);)
      w.arrived = 0;
      w.generation++;
      for (int i = 0; i < 32; i++)
        if (mask >> i & 1) make_ready(first + i);
    }
  }
  switch_to(next());
  TSAN(if (orders_memory) __tsan_acquire(address);)
}

void copy_async(void* to, const void* from, Site site) {
  const auto lies_in = [to](const Bytes& b) { return to >= b.first && static_cast<char*>(to) + 16 <= b.end; };
  if (!lies_in({smem, smem + smem_bytes}) && std::none_of(static_smem().begin(), static_smem().end(), lies_in))
    fail("%s:%d: copy_async: %p is not shared memory", site.file, site.line, to);
  if ((uintptr_t(to) | uintptr_t(from)) % 16)
    fail("%s:%d: copy_async: %p or %p is not aligned to 16 bytes", site.file, site.line, to, from);
#ifdef CUDA_ON_CPU_ASAN
  static volatile size_t size = 16;  // volatile keeps the calls to memcpy, which the sanitizer checks
  char bytes[16];
  memcpy(bytes, to, size);
  if (from) memcpy(bytes, from, size);
#endif
#ifdef CUDA_ON_CPU_TSAN
  if (!current->copier) current->copier = __tsan_create_fiber(0);
  __tsan_release(&current->begun);
  __tsan_switch_to_fiber(current->copier, 1);
  __tsan_acquire(&current->begun);
  if (from) __tsan_read_range(const_cast<void*>(from), 16);
  __tsan_write_range(to, 16);
  __tsan_release(&current->done[current->group % 4]);
  __tsan_switch_to_fiber(current->tsan, 1);
#endif
  current->copies.push_back({to, from, current->group});
  if (copy_early) finish_copies(current->group + 1);
}
void copy_async_commit() { current->group++; }
void copy_async_wait(int pending) { finish_copies(current->group - pending); }

// ---------------------------------------------------------------------------------------------------------------------
// Errors

namespace {

cudaError_t last_error = cudaSuccess;
std::string details;                     // of the latest error
std::string failure;                     // of a kernel; every call fails with it until somebody asks for the details
cudaError_t launch_error = cudaSuccess;  // every launch on the card in use ends with it

cudaError_t result(cudaError_t code, const std::string& why = "") {
  if (code == cudaSuccess) return code;
  last_error = code;
  details = why;
  return code;
}
cudaError_t earlier_failure() { return failure.empty() ? cudaSuccess : result(cudaErrorLaunchFailure, failure); }

[[maybe_unused]] const bool at_exit = [] {
  return atexit([] {
           if (failure.empty()) return;
           fprintf(stderr, "CUDA on the CPU: an error that was not asked for: %s\n", failure.c_str());
           _exit(1);
         }) == 0;
}();

// The graph being captured. Calls that would wait or allocate fail meanwhile.
CUgraph_st* capturing = nullptr;
cudaError_t capture_in_progress() { return capturing ? result(cudaErrorStreamCaptureUnsupported) : cudaSuccess; }

// ---------------------------------------------------------------------------------------------------------------------
// Device memory: a range of addresses, which is open only while the device works. An array ends at the end of a page,
// but for less than 256 bytes, its alignment, and the page behind it is never open. Freeing an array gives its pages
// back; its addresses come again only after all others of the range.

constexpr size_t alignment = 256;
const size_t memory_bytes = size_t(environment("CUDA_ON_CPU_MEMORY", 16ll << 30)) / page * page;
const size_t range_bytes = 16 * memory_bytes;  // addresses cost nothing
char* range = nullptr;
size_t position = 0, used = 0;

struct Array {
  char* pages;
  size_t n_bytes, page_bytes;
};
std::map<char*, Array> arrays;  // by their first byte

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

bool on_device(const void* p) { return p >= range && p < range + range_bytes && range; }

// The array that p points into or just behind.
const std::pair<char* const, Array>* array_of(const void* p) {
  auto a = arrays.upper_bound(static_cast<char*>(const_cast<void*>(p)));
  if (a == arrays.begin()) return nullptr;
  --a;
  return p <= a->first + a->second.n_bytes ? &*a : nullptr;
}

bool is_open = false;
void open_memory(bool open) {
  is_open = open;
  for (const auto& [first, a] : arrays) mprotect(a.pages, a.page_bytes, open ? PROT_READ | PROT_WRITE : PROT_NONE);
}

// Says in which kernel the program dies, then lets it die. Test frameworks install handlers of their own for every
// test, so we put ours before theirs at every allocation. Sanitizers have their own way, below.
#if !defined(CUDA_ON_CPU_ASAN) && !defined(CUDA_ON_CPU_TSAN)
constexpr int fatal_signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};
struct sigaction handlers_before[std::size(fatal_signals)];

void on_signal(int signal, siginfo_t* info, void*) {
  print_place();
  if (signal == SIGSEGV && on_device(info->si_addr))
    fprintf(stderr, "CUDA on the CPU: %p is %s\n", info->si_addr,
            is_open ? "outside all arrays of device memory" : "device memory, and host code used it");
  for (size_t i = 0; i < std::size(fatal_signals); i++)
    if (fatal_signals[i] == signal) sigaction(signal, &handlers_before[i], nullptr);
  if (signal == SIGABRT) raise(signal);  // the other signals come again, at the same instruction
}

void watch_signals() {
  struct sigaction now, ours{};
  ours.sa_sigaction = on_signal;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  stack_t stack;
  if (!sigaltstack(nullptr, &stack) && stack.ss_flags & SS_DISABLE) {  // our own may have overflowed
    static char memory[64 << 10];
    stack = {memory, 0, sizeof memory};
    sigaltstack(&stack, nullptr);
  }
  for (size_t i = 0; i < std::size(fatal_signals); i++) {
    sigaction(fatal_signals[i], nullptr, &now);
    if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_signal) continue;
    handlers_before[i] = now;
    sigaction(fatal_signals[i], &ours, nullptr);
  }
}
#else
void watch_signals() {}
#endif

}  // namespace

cudaError_t allocate(void** p, size_t bytes) {
  watch_signals();
  *p = nullptr;
  if (const cudaError_t e = capture_in_progress()) return e;
  if (bytes == 0) return cudaSuccess;
  if (!range) {
    void* memory = mmap(nullptr, range_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return result(cudaErrorMemoryAllocation, "no addresses for device memory (ulimit -v?)");
    range = static_cast<char*>(memory);
  }
  if (bytes > memory_bytes || round_up(bytes, page) > memory_bytes - used)
    return result(cudaErrorMemoryAllocation, format("out of memory: %zu bytes were asked for, %zu of %zu are free",
                                                    bytes, memory_bytes - used, memory_bytes));
  const size_t page_bytes = round_up(bytes, page), with_gap = page_bytes + page;
  // Takes the free addresses that follow its last ones.
  for (bool again = false;;) {
    if (position + with_gap > range_bytes) {
      if (again) return result(cudaErrorMemoryAllocation, "device memory is too fragmented");
      again = true;
      position = 0;
    }
    const auto after = arrays.lower_bound(range + position);
    if (after == arrays.end() || after->second.pages >= range + position + with_gap) break;
    position = size_t(after->second.pages + after->second.page_bytes + page - range);
  }
  Array a{range + position, bytes, page_bytes};
  position += with_gap;
  used += page_bytes;
  char* const first = a.pages + page_bytes - round_up(bytes, alignment);
  if (mprotect(a.pages, page_bytes, PROT_READ | PROT_WRITE)) return result(cudaErrorMemoryAllocation, "mprotect");
  ASAN(__asan_unpoison_memory_region(a.pages, page_bytes);)
  memset(a.pages, 0xff, page_bytes);
  ASAN(__asan_poison_memory_region(a.pages, with_gap); __asan_unpoison_memory_region(first, bytes);)
  if (!is_open) mprotect(a.pages, page_bytes, PROT_NONE);
  arrays[first] = a;
  *p = first;
  return cudaSuccess;
}

cudaError_t allocate_host(void** p, size_t bytes) {
  *p = malloc(bytes);
  if (!*p) return result(cudaErrorMemoryAllocation);
  memset(*p, 0xff, bytes);
  return cudaSuccess;
}

cudaError_t check_argument(const void* p, int index) {
  if (!p || array_of(p)) return cudaSuccess;
  return result(cudaErrorInvalidValue,
                format("kernel argument %d, %p, is %s", index, p,
                       on_device(p) ? "in no array of device memory: freed, or out of bounds" : "not device memory"));
}

// ---------------------------------------------------------------------------------------------------------------------
// Streams: queues of work, which runs when the host waits.

namespace {

struct Work {
  std::function<void()> run;
  CUevent_st* awaited = nullptr;  // waits until this event has been recorded `times` times
  unsigned times = 0;
  uint64_t number = 0;  // in the order of the calls
};

// A graph is made of nodes, which are numbered in the order of the calls.
using NodeNumbers = std::set<size_t>;
struct Node {
  Work work;
  NodeNumbers after;                // it may run when these have run
  std::vector<size_t> followers{};  // those that come after it
};

}  // namespace
}  // namespace cuda_on_cpu

using cuda_on_cpu::Node, cuda_on_cpu::NodeNumbers;
struct CUevent_st {
  unsigned recorded = 0, done = 0;
  uint64_t capture = 0;  // the event was recorded in this one, behind these nodes; 0: in none
  NodeNumbers behind{};
  std::chrono::steady_clock::time_point time{};
};
struct CUgraph_st {
  uint64_t capture;
  std::vector<Node> nodes{};
};
struct CUgraphExec_st {
  std::shared_ptr<const std::vector<Node>> nodes;
};
struct CUstream_st {
  bool blocking;  // it and the default stream wait for each other
  std::deque<cuda_on_cpu::Work> works{};
  CUgraph_st* graph = nullptr;  // the graph that captures this stream
  NodeNumbers tail{};           // what the stream's next node of that graph comes after
};

namespace cuda_on_cpu {
namespace {

CUstream_st default_stream{true};
std::vector<CUstream_st*> streams = {&default_stream};
uint64_t n_works = 0;
const bool at_once = environment("CUDA_LAUNCH_BLOCKING", 0) != 0;
std::map<const void*, size_t> smem_limits;  // of kernels that asked for more than 48 KB

CUstream_st& stream_of(cudaStream_t s) { return s ? *s : default_stream; }

// Does queued work until done(): in the order of the calls, or, drawn by seed, from any stream that can go on. Work that
// waits for another process is tried again and again or, if `once`, cudaErrorNotReady is returned.
template <class Done>
cudaError_t run_until(Done done, bool once = false) {
  if (const cudaError_t e = earlier_failure()) return e;
  if (const cudaError_t e = capture_in_progress()) return e;
  if (done()) return cudaSuccess;
  watch_signals();
  open_memory(true);
  Work last;  // not freed before settle(): until then the kernel's threads count as still reading their arguments
  try {
    while (!done()) {
      std::vector<CUstream_st*> ready_streams;
      for (CUstream_st* s : streams) {
        if (s->works.empty()) continue;
        const Work& w = s->works.front();
        if (!w.awaited || w.awaited->done >= w.times) ready_streams.push_back(s);
      }
      if (ready_streams.empty()) break;
      std::sort(ready_streams.begin(), ready_streams.end(),
                [](auto* a, auto* b) { return a->works.front().number < b->works.front().number; });
      CUstream_st& s = *ready_streams[draw(unsigned(ready_streams.size()))];
      Work w = std::move(s.works.front());
      s.works.pop_front();
      if (!w.run) continue;
      try {
        w.run();
      } catch (const NotYet&) {
        s.works.push_front(std::move(w));
        if (once) {
          settle();
          open_memory(false);
          return cudaErrorNotReady;
        }
        usleep(20);
        continue;
      }
      last = std::move(w);
    }
  } catch (const std::exception& e) {
    for (CUstream_st* s : streams) s->works.clear();
    failure = e.what();
  }
  settle();
  open_memory(false);
  return earlier_failure();
}

cudaError_t run_all() {
  return run_until(
      [] { return std::all_of(streams.begin(), streams.end(), [](auto* s) { return s->works.empty(); }); });
}
cudaError_t run_stream(CUstream_st& stream) {
  return run_until([&] { return stream.works.empty(); });
}

cudaError_t add(cudaStream_t handle, Work work) {
  CUstream_st& s = stream_of(handle);
  if (const cudaError_t e = earlier_failure()) return e;
  if (s.graph) {
    if (work.awaited) return result(cudaErrorStreamCaptureIsolation);
    s.graph->nodes.push_back({std::move(work), s.tail});
    s.tail = {s.graph->nodes.size() - 1};
    return cudaSuccess;
  }
  if (&s == &default_stream && capturing) return result(cudaErrorStreamCaptureImplicit);
  // The default stream's work waits for all earlier work of blocking streams, and their later work waits for it.
  if (&s == &default_stream) {
    const auto idle = [](const CUstream_st* x) { return x == &default_stream || !x->blocking || x->works.empty(); };
    if (const cudaError_t e = run_until([&] { return std::all_of(streams.begin(), streams.end(), idle); })) return e;
  } else if (s.blocking && !default_stream.works.empty()) {
    if (const cudaError_t e = run_stream(default_stream)) return e;
  }
  work.number = n_works++;
  s.works.push_back(std::move(work));
  return at_once && !capturing ? run_all() : cudaSuccess;
}

bool lies_in(const void* p, size_t bytes, bool device) {
  if (!device) return !on_device(p);
  const auto* a = array_of(p);
  return a && static_cast<const char*>(p) + bytes <= a->first + a->second.n_bytes;
}

}  // namespace

cudaError_t enqueue(cudaStream_t stream, std::function<void()> work) {
  return add(stream, {[work = std::move(work)] {
               settle();
               work();
             }});
}

cudaError_t allow_dynamic_smem(const void* function, int bytes) {
  if (bytes < 0 || size_t(bytes) > max_smem)
    return result(cudaErrorInvalidValue, format("%d bytes of dynamic shared memory; there are %zu", bytes, max_smem));
  smem_limits[function] = std::max(size_t(bytes), default_smem);
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& c, const void* function, std::function<void()> thread) {
  if (launch_error) return result(launch_error);
  const size_t n = size_t(c.blockDim.x) * c.blockDim.y * c.blockDim.z;
  if (n == 0 || n > max_threads || c.blockDim.z > 64 || c.gridDim.x == 0 || c.gridDim.x > 0x7fffffff ||
      c.gridDim.y == 0 || c.gridDim.y > 65535 || c.gridDim.z == 0 || c.gridDim.z > 65535)
    return result(cudaErrorInvalidConfiguration, "grid " + in(c.gridDim) + " of blocks " + in(c.blockDim));
  const auto asked = smem_limits.find(function);
  const size_t limit = asked == smem_limits.end() ? default_smem : asked->second;
  if (c.dynamicSmemBytes > limit)
    return result(cudaErrorInvalidValue,
                  format("%zu bytes of dynamic shared memory, without cudaFuncSetAttribute for more than %zu",
                         c.dynamicSmemBytes, limit));
  const bool early = std::any_of(c.attrs, c.attrs + c.numAttrs, [](const cudaLaunchAttribute& a) {
    return a.id == cudaLaunchAttributeProgrammaticStreamSerialization && a.val.programmaticStreamSerializationAllowed;
  });
  return add(c.stream, {[=, thread = std::move(thread)] { run_grid(c, early, function, thread); }});
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

// The sanitizers call these for options and with every report. They handle accesses to closed addresses themselves,
// because a test framework's handler would hang under ThreadSanitizer.
#if defined(CUDA_ON_CPU_ASAN) || defined(CUDA_ON_CPU_TSAN)
extern "C" {
const char* __asan_default_options() { return "allow_user_segv_handler=0"; }
const char* __tsan_default_options() { return "allow_user_segv_handler=0:atexit_sleep_ms=0"; }
void __asan_on_error() { print_place(); }
void __tsan_on_report(void*) { print_place(); }
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The runtime's functions

const char* cudaGetErrorName(cudaError_t error_code) {
  switch (error_code) {
#define CUDA_ON_CPU_ERROR(name, code, text) \
  case name:                                \
    return #name;
    CUDA_ON_CPU_ERRORS(CUDA_ON_CPU_ERROR)
#undef CUDA_ON_CPU_ERROR
  }
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error_code) {
  static std::string shown;
  if (error_code == last_error && !details.empty()) {
    if (error_code == cudaErrorLaunchFailure) failure.clear();
    shown = details;
    return shown.c_str();
  }
  switch (error_code) {
#define CUDA_ON_CPU_ERROR(name, code, text) \
  case name:                                \
    return text;
    CUDA_ON_CPU_ERRORS(CUDA_ON_CPU_ERROR)
#undef CUDA_ON_CPU_ERROR
  }
  return "unrecognized error code";
}
cudaError_t cudaGetLastError() {
  return std::exchange(last_error, failure.empty() ? cudaSuccess : cudaErrorLaunchFailure);
}
cudaError_t cudaPeekAtLastError() { return last_error; }

namespace {

struct Card {
  std::string name;
  int capability;
  cudaError_t error;
  size_t number;  // among all of the machine
};
std::vector<Card> cards() {  // the visible cards
  const char *described = getenv("CUDA_ON_CPU_DEVICES"), *chosen = getenv("CUDA_VISIBLE_DEVICES");
  if (!described) return {{"CUDA on the CPU", 90, cudaSuccess, 0}};
  std::vector<Card> all, visible;
  std::istringstream words(described);
  for (std::string word; words >> word;) {
    int capability = 0, error = 0;
    sscanf(word.c_str(), "%d:%d", &capability, &error);
    if (capability)
      all.push_back({format("card %zu on the CPU", all.size()), capability, cudaError_t(error), all.size()});
  }
  if (!chosen) return all;
  std::istringstream numbers(chosen);  // up to the first number of no card
  for (size_t i; numbers >> i && i < all.size(); numbers.ignore()) visible.push_back(all[i]);
  return visible;
}
constexpr int runtime_version = 13000;
int card_in_use = 0;

}  // namespace

cudaError_t cudaRuntimeGetVersion(int* version) { return *version = runtime_version, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
  return *version = int(environment("CUDA_ON_CPU_DRIVER", runtime_version)), cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  int driver;
  *count = 0;
  if (cudaDriverGetVersion(&driver); driver < runtime_version) return result(cudaErrorInsufficientDriver);
  *count = int(cards().size());
  return *count > 0 ? cudaSuccess : result(cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int* device) { return *device = card_in_use, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  const std::vector<Card> all = cards();
  if (size_t(device) >= all.size()) return result(cudaErrorInvalidDevice);
  const cudaError_t error = all[size_t(device)].error;
  card_in_use = device;
  launch_error = error < 200 ? cudaSuccess : error;
  return error < 200 ? result(error) : cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  const std::vector<Card> all = cards();
  if (size_t(device) >= all.size()) return result(cudaErrorInvalidDevice);
  const Card& card = all[size_t(device)];
  *properties = {"", memory_bytes, default_smem, max_smem, max_smem + 1024, card.capability / 10, card.capability % 10,
                 4,  2048,         50 << 20};
  snprintf(properties->name, sizeof properties->name, "%s", card.name.c_str());
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int bytes, int device) {
  const std::vector<Card> all = cards();
  if (size_t(device) >= all.size()) return result(cudaErrorInvalidDevice);
  snprintf(id, size_t(bytes), "0000:%02zx:00.0", all[size_t(device)].number);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return run_all(); }

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = memory_bytes - used;
  *total = memory_bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  if (!p) return cudaSuccess;
  const auto found = arrays.find(static_cast<char*>(p));
  if (found == arrays.end()) return result(cudaErrorInvalidValue, "cudaFree of what cudaMalloc did not return");
  const cudaError_t waited = run_all();
  if (capturing) return waited;
  const Array a = found->second;
  mmap(a.pages, a.page_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  ASAN(__asan_poison_memory_region(a.pages, a.page_bytes);)
  used -= a.page_bytes;
  arrays.erase(found);
  return waited;
}
cudaError_t cudaFreeHost(void* p) {
  const cudaError_t waited = run_all();
  free(p);
  return waited;
}

namespace {
std::pair<bool, bool> sides(const void* to, const void* from, cudaMemcpyKind kind) {  // whether each is on the device
  if (kind == cudaMemcpyDefault) return {on_device(to), on_device(from)};
  return {kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice,
          kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice};
}
cudaError_t check_copy(const void* to, bool to_device, const void* from, bool from_device, size_t bytes) {
  const auto wrong = [&](const char* word, const void* p, bool device) {
    return result(cudaErrorInvalidValue, format("cudaMemcpy %s %p, which is not %zu bytes of %s memory", word, p, bytes,
                                                device ? "device" : "host"));
  };
  if (!lies_in(to, bytes, to_device)) return wrong("to", to, to_device);
  if (!lies_in(from, bytes, from_device)) return wrong("from", from, from_device);
  return cudaSuccess;
}
}  // namespace

// A copy from or to the host happens when the stream comes to it, not in the call. On a GPU this holds for memory from
// cudaMallocHost.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  const auto [to_device, from_device] = sides(to, from, kind);
  if (const cudaError_t e = check_copy(to, to_device, from, from_device, bytes)) return e;
  return enqueue(stream, [=] { memmove(to, from, bytes); });
}
// To the device from pageable memory, this returns when it has read everything, before all has arrived, as on a GPU.
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const auto [to_device, from_device] = sides(to, from, kind);
  if (!to_device || from_device || bytes == 0) {
    if (const cudaError_t e = cudaMemcpyAsync(to, from, bytes, kind, nullptr)) return e;
    return run_stream(default_stream);
  }
  if (const cudaError_t e = check_copy(to, to_device, from, from_device, bytes)) return e;
  if (const cudaError_t e = run_stream(default_stream)) return e;
  const auto* first = static_cast<const char*>(from);
  return enqueue(nullptr,
                 [to, read = std::vector<char>(first, first + bytes)] { memmove(to, read.data(), read.size()); });
}
cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  if (!lies_in(to, bytes, true))
    return result(cudaErrorInvalidValue,
                  format("cudaMemset of %p, which is not %zu bytes of device memory", to, bytes));
  return enqueue(stream, [=] { memset(to, byte, bytes); });
}
cudaError_t cudaMemset(void* to, int byte, size_t bytes) {  // returns before it is done, as on a GPU
  return cudaMemsetAsync(to, byte, bytes, nullptr);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  streams.push_back(*stream = new CUstream_st{!(flags & cudaStreamNonBlocking)});
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return run_stream(stream_of(stream)); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (cudaGraph_t unfinished; stream->graph && !cudaStreamEndCapture(stream, &unfinished)) delete unfinished;
  const cudaError_t waited = run_stream(*stream);
  std::erase(streams, stream);
  delete stream;
  return waited;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = new CUevent_st, cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const cudaError_t waited = run_all();
  delete event;
  return waited;
}
// In a capture, events are no work: they only say which nodes come after which.
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const CUstream_st& s = stream_of(stream);
  event->capture = s.graph ? s.graph->capture : 0;
  event->behind = s.tail;
  if (s.graph) return cudaSuccess;
  const unsigned n = ++event->recorded;
  return enqueue(stream, [=] {
    event->done = n;
    event->time = std::chrono::steady_clock::now();
  });
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (capturing && event->capture == capturing->capture) {  // the stream joins the capture
    CUstream_st& s = stream_of(stream);
    s.graph = capturing;
    s.tail.insert(event->behind.begin(), event->behind.end());
    return cudaSuccess;
  }
  return add(stream, {nullptr, event, event->recorded});
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return run_until([=] { return event->done >= event->recorded; });
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  return run_until([=] { return event->done >= event->recorded; }, true);
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  if (!start->done || !end->done) return result(cudaErrorInvalidValue, "the event was not recorded");
  if (start->done < start->recorded || end->done < end->recorded) return result(cudaErrorNotReady);
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (!stream) return result(cudaErrorStreamCaptureUnsupported, "the default stream cannot be captured");
  if (capturing) return result(cudaErrorStreamCaptureUnsupported, "a stream is being captured already");
  static uint64_t captures = 0;
  stream->graph = capturing = new CUgraph_st{++captures};
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (!capturing || stream_of(stream).graph != capturing)
    return result(cudaErrorInvalidValue, "the stream is not being captured");
  // All nodes have to lie before the end of this stream. A node's number is higher than those that it comes after.
  NodeNumbers before = stream->tail;
  for (size_t i = capturing->nodes.size(); i-- > 0;)
    if (before.count(i)) before.insert(capturing->nodes[i].after.begin(), capturing->nodes[i].after.end());
  const bool joined = before.size() == capturing->nodes.size();
  *graph = capturing;
  for (CUstream_st* s : streams) s->graph = nullptr, s->tail.clear();
  capturing = nullptr;
  return joined ? cudaSuccess : result(cudaErrorStreamCaptureUnjoined);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  std::vector<Node> nodes = graph->nodes;
  for (size_t i = 0; i < nodes.size(); i++)
    for (const size_t before : nodes[i].after) nodes[before].followers.push_back(i);
  *executable = new CUgraphExec_st{std::make_shared<const std::vector<Node>>(std::move(nodes))};
  return cudaSuccess;
}
// A launch is one piece of work. It runs the nodes that have nothing left to wait for, in the order of the calls or drawn
// by seed. A node that waits for another process lets others go first.
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  struct Progress {
    NodeNumbers ready;
    std::vector<size_t> missing;  // by node: how many nodes have to run before it
  };
  const auto progress = std::make_shared<Progress>();
  for (const Node& node : *executable->nodes) {
    if (node.after.empty()) progress->ready.insert(progress->missing.size());
    progress->missing.push_back(node.after.size());
  }
  return add(stream, {[nodes = executable->nodes, progress] {
               NodeNumbers waiting, &ready = progress->ready;
               while (!ready.empty()) {
                 const auto drawn = std::next(ready.begin(), draw(unsigned(ready.size())));
                 const Node& node = (*nodes)[*drawn];
                 try {
                   node.work.run();
                   for (const size_t follower : node.followers)
                     if (--progress->missing[follower] == 0) ready.insert(follower);
                 } catch (const NotYet&) { waiting.insert(*drawn); }
                 ready.erase(drawn);
               }
               ready = waiting;
               if (!ready.empty()) throw NotYet();
             }});
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return delete executable, cudaSuccess; }

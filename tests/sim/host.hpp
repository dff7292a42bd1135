// CUDA C++ kernels on the processor of the host, for tests: correctness alone, nothing of time or of memory models.
//
// Every thread of a block is a fiber; one block runs at a time. A fiber runs until it meets a barrier or a warp
// collective, then another one is chosen, in an order that the schedule decides: results must not depend on it. Shared
// memory starts as NaN. A barrier that some threads never reach ends the launch with a message.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>
#include <sys/mman.h>

#define LA_HOST 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)

namespace sim {
struct Index {
  unsigned x = 0, y = 0, z = 0;
};
enum class Standing { READY, AT_BARRIER, AT_WARP, DONE };

struct Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  unsigned number = 0;
  Standing standing = Standing::READY;
};
// What the lanes of a warp show one another; two sets, so that a fast lane cannot overwrite what a slow one has to read.
struct Warp {
  alignas(16) unsigned char shown[2][32][64];
  unsigned turn = 0, arrived = 0;
};

inline constexpr size_t STACK = 96 * 1024;
inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Thread* current = nullptr;
inline void* scheduler = nullptr;
inline Index thread_index, block_index, block_size, grid_size;
inline unsigned char* shared = nullptr;
inline std::function<void()> kernel;
inline std::vector<std::function<void()>> at_block_start;
inline std::string fault;
inline unsigned long long conflicts = 0, products = 0;

// Save the registers a callee must keep on this stack, go over to the other one.
extern "C" void sim_go(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.weak sim_go
.type sim_go,@function
sim_go:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size sim_go,.-sim_go
)");
inline void* fresh_stack(char* base, void (*entry)()) {
  void** top = (void**)(((uintptr_t)base + STACK) & ~uintptr_t(15));
  *--top = nullptr;
  *--top = (void*)entry;
  for (int i = 0; i < 6; i++) *--top = nullptr;
  return top;
}
#elif defined(__aarch64__)
asm(R"(
.text
.weak sim_go
.type sim_go,%function
sim_go:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size sim_go,.-sim_go
)");
inline void* fresh_stack(char* base, void (*entry)()) {
  char* top = (char*)(((uintptr_t)base + STACK - 160) & ~uintptr_t(15));
  memset(top, 0, 160);
  ((void**)top)[11] = (void*)entry;  // x30
  return top;
}
#else
#error "the simulator changes stacks on x86-64 and aarch64"
#endif

inline void place(Thread& thread) {
  current = &thread;
  thread_index = {thread.number % block_size.x, thread.number / block_size.x % block_size.y,
                  thread.number / (block_size.x * block_size.y)};
}
inline void pause(Standing standing) {
  Thread* self = current;
  self->standing = standing;
  sim_go(&self->stack_pointer, scheduler);
}
inline void begin() {
  kernel();
  current->standing = Standing::DONE;
  void* nowhere;
  sim_go(&nowhere, scheduler);
  abort();
}
inline unsigned lane() { return current->number % 32; }

// Every lane shows n bytes; when all have, each may read those of all.
inline const unsigned char (*show(const void* what, size_t n))[64] {
  Warp& warp = warps[current->number / 32];
  const unsigned set = warp.turn % 2;
  memcpy(warp.shown[set][lane()], what, n);
  if (++warp.arrived < 32) {
    pause(Standing::AT_WARP);
  } else {
    warp.arrived = 0;
    warp.turn++;
    Thread* first = &threads[current->number / 32 * 32];
    for (int i = 0; i < 32; i++)
      if (first[i].standing == Standing::AT_WARP) first[i].standing = Standing::READY;
  }
  return warp.shown[set];
}

// Schedule 0: in order; 1: all in reverse; others: each round begins with a warp drawn at random.
inline bool run_block(unsigned schedule, size_t shared_bytes) {
  const unsigned n = block_size.x * block_size.y * block_size.z, n_warps = n / 32;
  for (unsigned i = 0; i < n; i++) {
    threads[i].number = i;
    threads[i].standing = Standing::READY;
    threads[i].stack_pointer = fresh_stack(threads[i].stack, begin);
  }
  for (Warp& warp : warps) warp.turn = warp.arrived = 0;
  for (auto& prepare : at_block_start) prepare();
  memset(shared, 0xFF, shared_bytes);  // NaN in every format
  uint64_t random = 0x853C49E6748FEA9Bull + schedule;
  unsigned done = 0;
  while (done < n) {
    bool moved = false;
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    const unsigned begins = schedule < 2 ? 0 : unsigned(random >> 33) % n_warps;
    for (unsigned i = 0; i < n; i++) {
      Thread& thread = threads[schedule == 1 ? n - 1 - i : (i + 32 * begins) % n];
      if (thread.standing != Standing::READY) continue;
      moved = true;
      place(thread);
      sim_go(&scheduler, thread.stack_pointer);
      done += thread.standing == Standing::DONE;
    }
    if (moved) continue;
    unsigned waiting = 0;
    for (unsigned i = 0; i < n; i++) waiting += threads[i].standing == Standing::AT_BARRIER;
    if (waiting < n) {
      fault = std::to_string(waiting) + " of " + std::to_string(n) + " threads wait at a barrier";
      return false;
    }
    for (unsigned i = 0; i < n; i++) threads[i].standing = Standing::READY;
  }
  return true;
}

inline int launch(unsigned grid, unsigned block, size_t shared_bytes, unsigned schedule, std::function<void()> body) {
  grid_size = {grid, 1, 1};
  block_size = {block, 1, 1};
  fault.clear();
  kernel = body;
  while (threads.size() < block) {
    Thread thread;
    thread.stack = (char*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    threads.push_back(thread);
  }
  warps.resize(block / 32);
  shared = (unsigned char*)aligned_alloc(128, (shared_bytes + 255) / 128 * 128);
  bool fine = true;
  for (unsigned i = 0; i < grid && fine; i++) {
    block_index = {schedule == 1 ? grid - 1 - i : i, 0, 0};
    fine = run_block(schedule, shared_bytes);
  }
  free(shared);
  if (!fine) fprintf(stderr, "simulator: %s\n", fault.c_str());
  return fine ? 0 : 1;
}
}  // namespace sim

#define threadIdx sim::thread_index
#define blockIdx sim::block_index
#define blockDim sim::block_size
#define gridDim sim::grid_size

// Indices are looked up anew after a pause: the scheduler has set them for this thread.
inline void __syncthreads() { sim::pause(sim::Standing::AT_BARRIER); }
inline void __syncwarp(unsigned = ~0u) {
  char nothing = 0;
  sim::show(&nothing, 1);
}
template <class T> T from_lane(T x, unsigned lane) {
  auto all = sim::show(&x, sizeof x);
  T theirs;
  memcpy(&theirs, all[lane], sizeof theirs);
  return theirs;
}
template <class T> T __shfl_xor_sync(unsigned, T x, int mask) { return from_lane(x, sim::lane() ^ mask); }
template <class T> T __shfl_sync(unsigned, T x, int lane) { return from_lane(x, lane & 31); }
inline int __any_sync(unsigned, int x) {
  auto all = sim::show(&x, sizeof x);
  int any = 0;
  for (int i = 0; i < 32; i++) {
    int theirs;
    memcpy(&theirs, all[i], sizeof theirs);
    any |= theirs != 0;
  }
  return any;
}

// A GPU for tests: the names of common/device.cuh, and the CUDA C++ the kernels use, on one thread of the CPU.
//
// The threads of a block (whole warps) are fibers. Their order between barriers is random; shuffles and matrix
// instructions wait for the whole warp and fail if its lanes ask for different ones. Shared memory begins as NaN; the
// copies and matrix loads check bounds and alignment; asynchronous copies are carried out when they are waited for.
// A forgotten wait or barrier thus shows as NaN, or as a result that depends on the seed. The matrix instructions are
// written from the PTX manual's figures and share no code with the kernels. Rounding inside a tensor core, and what
// happens between threads that do not wait for one another, are beyond it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct EmulatedIndex {
  unsigned x = 0;
};
inline EmulatedIndex threadIdx, blockIdx;

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801,
  cudaErrorUnknown = 999
};

namespace lpmflow {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

namespace emulated {

inline float to_float(Float16 x) {
  _Float16 value;
  std::memcpy(&value, &x, sizeof value);
  return static_cast<float>(value);
}
inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint16_t round_to(Float16, float x) {
  const _Float16 value = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline uint16_t round_to(BFloat16, float x) {
  if (std::isnan(x)) return 0x7fff;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}

constexpr int kLanes = 32;

// Where threads wait for one another: `size` of them, each with an argument.
struct Meeting {
  int size = 0, arrived = 0;
  uint64_t round = 0;
  const char* operation = nullptr;
  std::vector<void*> arguments;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
};

struct Thread {
  ucontext_t beginning;
  jmp_buf here;
  bool begun = false;
  std::vector<char> stack = std::vector<char>(256 * 1024);
  bool done = false;
  const Meeting* waits = nullptr;
  uint64_t round = 0;
  std::vector<std::vector<Copy>> groups;  // oldest first; the last is not committed
};

class Machine {
 public:
  std::string problem;  // of the last launch; empty when there was none
  std::mt19937_64 random;

  bool run(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
    problem.clear();
    kernel_ = &kernel;
    threads_.resize(threads);
    // Vectors of 16 bytes, for the alignment.
    shared_.assign(shared_bytes / 16 + 1, {});
    shared_bytes_ = shared_bytes;
    for (int64_t block = 0; block < blocks && problem.empty(); ++block) run_block(static_cast<unsigned>(block));
    return problem.empty();
  }

  void* shared() { return shared_.data(); }

  // Returns when all of the group (the warp's or the block's) have called it; the last to come performs `action`.
  template <class Action>
  void meet(bool warp, const char* operation, void* argument, Action action) {
    Meeting& group = warp ? warps_[current_ / kLanes] : block_;
    if (group.arrived > 0 && std::strcmp(group.operation, operation) != 0) {
      fail(std::string(operation) + " meets " + group.operation + " in the same warp or block");
    }
    group.operation = operation;
    group.arguments[warp ? current_ % kLanes : current_] = argument;
    Thread& self = threads_[current_];
    self.waits = &group;
    self.round = group.round;
    if (++group.arrived == group.size) {
      action(group.arguments);
      group.arrived = 0;
      ++group.round;
    } else {
      pause(self);
    }
    self.waits = nullptr;
  }

  void begin_copy(void* to, const void* from, int bytes, bool valid) {
    check_shared(to, bytes, "cp.async");
    if (reinterpret_cast<uintptr_t>(from) % bytes != 0 && valid) fail("cp.async from an address that is not aligned");
    threads_[current_].groups.back().push_back({to, from, bytes, valid});
  }
  void commit_copies() { threads_[current_].groups.emplace_back(); }
  void wait_copies(int pending) {
    auto& groups = threads_[current_].groups;
    const int finished = static_cast<int>(groups.size()) - 1 - pending;
    for (int group = 0; group < finished; ++group) {
      for (const Copy& copy : groups[group]) {
        if (copy.valid) {
          std::memcpy(copy.to, copy.from, copy.bytes);
        } else {
          std::memset(copy.to, 0, copy.bytes);
        }
      }
    }
    if (finished > 0) groups.erase(groups.begin(), groups.begin() + finished);
  }

  void check_shared(const void* address, int bytes, const char* operation) {
    const int64_t offset = static_cast<const char*>(address) - reinterpret_cast<const char*>(shared_.data());
    if (offset < 0 || offset + bytes > shared_bytes_) fail(std::string(operation) + " outside shared memory");
    if (offset % bytes != 0) fail(std::string(operation) + " at a shared address that is not aligned");
  }

  void fail(const std::string& what) {
    problem = what + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(current_) + ")";
    _longjmp(scheduler_, 1);  // the block is abandoned
  }

 private:
  struct alignas(16) Sixteen {
    unsigned char bytes[16];
  };

  void run_block(unsigned block) {
    const int count = static_cast<int>(threads_.size());
    uint16_t* const words = reinterpret_cast<uint16_t*>(shared_.data());
    for (size_t x = 0; x < shared_.size() * 8; ++x) words[x] = 0x7fc1;  // NaN in every type, and as an index enormous
    block_ = {};
    block_.size = count;
    block_.arguments.resize(count);
    warps_.assign(count / kLanes, block_);
    for (Meeting& warp : warps_) warp.size = kLanes;
    for (Thread& thread : threads_) {
      thread.done = thread.begun = false;
      thread.waits = nullptr;
      thread.groups.assign(1, {});
      getcontext(&thread.beginning);
      thread.beginning.uc_stack.ss_sp = thread.stack.data();
      thread.beginning.uc_stack.ss_size = thread.stack.size();
      thread.beginning.uc_link = nullptr;
      makecontext(&thread.beginning, reinterpret_cast<void (*)()>(&Machine::enter), 0);
    }
    // Warp by warp, each as far as it comes or interrupted early: warps drift as far apart as barriers let them.
    const int warps = static_cast<int>(warps_.size());
    for (int left = count; left > 0;) {
      const int first = static_cast<int>(random() % warps);
      const int rounds = random() % 2 == 0 ? 1 << 30 : static_cast<int>(random() % 16) + 1;
      bool moved = false;
      for (int step = 0; step < warps && !moved; ++step) {
        const int warp = (first + step) % warps;
        for (int round = 0; round < rounds && run_warp(warp, block, left); ++round) moved = true;
        if (!problem.empty()) return;
      }
      if (!moved) {
        problem = "threads wait for others that have ended, in block " + std::to_string(block);
        return;
      }
    }
  }

  // Lets every thread of a warp that is not waiting run until it waits or ends; false when there was none.
  bool run_warp(int warp, unsigned block, int& left) {
    bool moved = false;
    const int first = static_cast<int>(random() % kLanes);
    for (int step = 0; step < kLanes; ++step) {
      const int index = warp * kLanes + (first + step) % kLanes;
      Thread& thread = threads_[index];
      if (thread.done || (thread.waits != nullptr && thread.round == thread.waits->round)) continue;
      moved = true;
      current_ = index;
      threadIdx.x = static_cast<unsigned>(index);
      blockIdx.x = block;
      resume(thread);
      if (!problem.empty()) return false;
      left -= thread.done;
    }
    return moved;
  }

  // Between fibers by _setjmp, which unlike swapcontext makes no system call.
  void resume(Thread& thread) {
    if (_setjmp(scheduler_) != 0) return;
    if (thread.begun) _longjmp(thread.here, 1);
    thread.begun = true;
    setcontext(&thread.beginning);
  }
  void pause(Thread& thread) {
    if (_setjmp(thread.here) == 0) _longjmp(scheduler_, 1);
  }
  static void enter();

  const std::function<void()>* kernel_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<Meeting> warps_;
  Meeting block_;
  std::vector<Sixteen> shared_;
  int64_t shared_bytes_ = 0;
  int current_ = 0;
  jmp_buf scheduler_;
};

inline Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

inline void Machine::enter() {
  Machine& m = machine();
  (*m.kernel_)();
  m.threads_[m.current_].done = true;
  _longjmp(m.scheduler_, 1);
}

template <bool kTransposed>
void load_matrices(uint32_t (&registers)[4], const void* row) {
  struct Lane {
    uint32_t* registers;
    const uint16_t* row;
  } mine{registers, static_cast<const uint16_t*>(row)};
  machine().check_shared(row, 16, "ldmatrix");
  machine().meet(true, kTransposed ? "ldmatrix.trans" : "ldmatrix", &mine, [](const std::vector<void*>& lanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t both = 0;
        for (int half = 0; half < 2; ++half) {
          const int line = lane / 4, along = 2 * (lane % 4) + half;
          const int from = kTransposed ? along : line, column = kTransposed ? line : along;
          const uint16_t bits = static_cast<Lane*>(lanes[8 * matrix + from])->row[column];
          both |= static_cast<uint32_t>(bits) << 16 * half;
        }
        static_cast<Lane*>(lanes[lane])->registers[matrix] = both;
      }
    }
  });
}

// mma.m16n8k16. "Matrix Fragments for mma.m16n8k16 with floating point type" of the PTX manual: with
// groupID = lane >> 2 and threadID_in_group = lane % 4, element i of a fragment is at
//   A: row = groupID for 0 <= i < 2 or 4 <= i < 6, else groupID + 8;
//      col = threadID_in_group * 2 + (i & 1), + 8 for i >= 4
//   B: row = threadID_in_group * 2 + (i & 1), + 8 for i >= 2; col = groupID
//   C: row = groupID for i < 2, else groupID + 8; col = threadID_in_group * 2 + (i & 1)
template <class T>
void multiply_add(float* const (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Lane {
    float* const* c;
    const uint32_t *a, *b;
  } mine{c, a, b};
  machine().meet(true, "mma", &mine, [](const std::vector<void*>& lanes) {
    const auto element = [](const uint32_t* registers, int i) {
      return to_float(T{static_cast<uint16_t>(registers[i / 2] >> 16 * (i % 2))});
    };
    float left[16][16], right[16][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      const Lane& from = *static_cast<Lane*>(lanes[lane]);
      const int group = lane >> 2, member = lane % 4;
      for (int i = 0; i < 8; ++i) {
        const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
        left[row][member * 2 + (i & 1) + (i >= 4 ? 8 : 0)] = element(from.a, i);
      }
      for (int i = 0; i < 4; ++i) right[member * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = element(from.b, i);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = (lane >> 2) + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
        float& to = *static_cast<Lane*>(lanes[lane])->c[i];
        for (int k = 0; k < 16; ++k) to += left[row][k] * right[k][column];
      }
    }
  });
}

template <class Source>
float shuffle(const char* operation, float value, Source source) {
  struct Lane {
    float value, result;
    int source;
  } mine{value, 0.0f, source(static_cast<int>(threadIdx.x) % kLanes)};
  machine().meet(true, operation, &mine, [](const std::vector<void*>& lanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      Lane& to = *static_cast<Lane*>(lanes[lane]);
      to.result = static_cast<Lane*>(lanes[to.source])->value;
    }
  });
  return mine.result;
}

}  // namespace emulated

template <class T>
T* shared_memory() {
  return static_cast<T*>(emulated::machine().shared());
}
template <int kBytes>
void copy_async(void* shared, const void* global, bool valid) {
  emulated::machine().begin_copy(shared, global, kBytes, valid);
}
inline void commit_copies() { emulated::machine().commit_copies(); }
template <int kPending>
void wait_copies() {
  emulated::machine().wait_copies(kPending);
}
inline void load_matrices(uint32_t (&registers)[4], const void* row) { emulated::load_matrices<false>(registers, row); }
inline void load_matrices_transposed(uint32_t (&registers)[4], const void* row) {
  emulated::load_matrices<true>(registers, row);
}
template <class T>
void multiply_add(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  float* const c[4] = {&c0, &c1, &c2, &c3};
  const uint32_t b[2] = {b0, b1};
  emulated::multiply_add<T>(c, a, b);
}
template <class T>
uint32_t pack(float low, float high) {
  return emulated::round_to(T{}, low) | static_cast<uint32_t>(emulated::round_to(T{}, high)) << 16;
}
inline float widen(float x) { return x; }
inline float widen(Float16 x) { return emulated::to_float(x); }
inline float widen(BFloat16 x) { return emulated::to_float(x); }
inline float exp2_approximate(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;  // NaN passes
}

struct DeviceScope {
  explicit DeviceScope(int) {}
  cudaError_t status() const { return cudaSuccess; }
};

constexpr int kMostShared = 99 * 1024;

template <auto kKernel, class... Arguments>
cudaError_t launch(int64_t blocks, int threads, int shared_bytes, int, cudaStream_t, const Arguments&... arguments) {
  if (blocks > INT32_MAX || shared_bytes > kMostShared) return cudaErrorInvalidConfiguration;
  return emulated::machine().run(blocks, threads, shared_bytes, [&] { kKernel(arguments...); }) ? cudaSuccess
                                                                                                : cudaErrorUnknown;
}

}  // namespace lpmflow

inline void __syncthreads() {
  lpmflow::emulated::machine().meet(false, "__syncthreads", nullptr, [](const std::vector<void*>&) {});
}
inline void __syncwarp() {
  lpmflow::emulated::machine().meet(true, "__syncwarp", nullptr, [](const std::vector<void*>&) {});
}
inline float __shfl_sync(unsigned, float value, int source) {
  return lpmflow::emulated::shuffle("__shfl_sync", value, [source](int) { return source; });
}
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return lpmflow::emulated::shuffle("__shfl_xor_sync", value, [mask](int lane) { return lane ^ mask; });
}

// What the C++ files of this folder share: vectors, threads, memory, one micro-kernel, activations.
// Not here: any layer.
//
// No allocation, order or split below depends on timing, and none of the results on the number of
// threads: the same bits on every run.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>

// As wide as the compiler may (-march=native); ROWS x 2 vectors of sums fill the registers and hide
// the latency of their additions.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6;
#else
constexpr int LANES = 4, ROWS = 6;
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
constexpr int WIDTH = 2 * LANES;  // columns of a panel: what a micro-kernel makes at a time
constexpr int CHUNK = 16;         // channels are taken so many at a time

static inline vec load(const float* p) { return *reinterpret_cast<const unaligned*>(p); }
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
static inline vec load(const uint16_t* p) {  // bfloat16: the upper half of a float32
  return (vec)(__builtin_convertvector(*reinterpret_cast<const halves*>(p), words) << 16);
}
static inline void store(float* p, vec v) { *reinterpret_cast<unaligned*>(p) = v; }
static inline void store(uint16_t* p, vec v) {  // to the nearest, ties to even; NaN stays NaN
  words bits = (words)v;
  bits = v == v ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : words{} + 0x7FC0;
  *reinterpret_cast<halves*>(p) = __builtin_convertvector(bits, halves);
}
static inline vec all(float value) { return value - vec{}; }
static inline long cdiv(long a, long b) { return (a + b - 1) / b; }

// What a convolution reads, and writes: float32, or bfloat16.
template <class Data, class Wide, class Half> struct Either {
  Data* data;
  bool narrow;
  Wide* wide() const { return static_cast<Wide*>(data); }
  Half* half() const { return static_cast<Half*>(data); }
};
using Operand = Either<const void, const float, const uint16_t>;
using Result = Either<void, float, uint16_t>;

// Threads are those of the OpenMP library that PyTorch has loaded (GNU's, or one that knows GNU's
// calls): a second pool would fight the first for the cores. Without one, there is one thread.
extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));

template <class Task>
static void parallel(int threads, long tasks, const Task& task) {
  struct Job {
    const Task& task;
    long tasks;
    std::atomic<long> next{0};
  } job{task, tasks};
  auto work = [](void* p) {
    Job& job = *static_cast<Job*>(p);
    for (long i; (i = job.next.fetch_add(1)) < job.tasks;) job.task(i);
  };
  if (threads > 1 && tasks > 1 && GOMP_parallel)
    GOMP_parallel(work, &job, std::min<long>(threads, tasks), 0);
  else
    work(&job);
}

// Memory that a thread keeps from call to call: fresh pages would cost more than what they are for.
struct Scratch {
  float* data = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(data); }
  float* get(size_t floats) {
    if (floats > size) {
      std::free(data);
      size = cdiv(floats, 1 << 18) << 18;
      data = static_cast<float*>(std::aligned_alloc(1 << 12, 4 * size));
      if (!data) std::abort();
    }
    return data;
  }
};

// c[R][WIDTH] = a x b. b: [K][WIDTH]; a(r, k) is a[r * row + k / CHUNK * chunk + k % CHUNK].
template <int R>
static inline __attribute__((always_inline)) void product(const float* a, long row, long chunk,
                                                          const float* b, long K, float* c,
                                                          long ldc) {
  vec sum[R][2] = {};
  for (long k0 = 0; k0 < K; k0 += CHUNK, a += chunk)
#pragma GCC unroll 4
    for (int k = 0; k < CHUNK; k++, b += WIDTH) {
      vec b0 = load(b), b1 = load(b + LANES);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        vec left = all(a[r * row + k]);
        sum[r][0] += left * b0;
        sum[r][1] += left * b1;
      }
    }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) store(c + r * ldc, sum[r][0]), store(c + r * ldc + LANES, sum[r][1]);
}

// Leaky ReLU; ReLU with a slope of 0, and nothing at all with 1. NaN stays NaN.
static inline vec activate(vec z, float slope) {
  return z < 0 ? (slope == 0 ? vec{} : z * slope) : z;
}

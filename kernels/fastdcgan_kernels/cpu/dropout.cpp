// Dropout on a CPU: x times 0 or `scale`, by random bits that belong to an element's place. Not here:
// what is drawn from PyTorch's generator (dropout.py).
//
// The bits are Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel Random Numbers: As Easy as
// 1, 2, 3"), keyed by the seed, 16 bits for an element: 16 counters in a row have those of 128
// elements. So any thread makes any part, and backward makes them again rather than keep them.
#include "common.h"

#include <cstdint>
#include <cstring>

constexpr int COUNTERS = 16, WORDS = 4, TILE = COUNTERS * WORDS * 2;
constexpr long PART = 1 << 14;  // elements of a task

// Sixteen lanes on any machine.
typedef uint32_t lanes32 __attribute__((vector_size(4 * COUNTERS)));
typedef uint64_t lanes64 __attribute__((vector_size(4 * COUNTERS)));
typedef float floats __attribute__((vector_size(4 * COUNTERS)));

// The high and the low words of x times a factor: those at even places, and those at odd ones.
static inline void multiply(lanes32 x, uint64_t factor, lanes32& high, lanes32& low) {
  constexpr uint64_t LOW = 0xFFFFFFFF;
  const lanes64 even = ((lanes64)x & LOW) * factor, odd = ((lanes64)x >> 32) * factor;
  low = (lanes32)((even & LOW) | odd << 32);
  high = (lanes32)(even >> 32 | (odd & ~LOW));
}

// The bits of the counters first .. first + COUNTERS, of which the upper half is `top`.
static inline void philox(uint64_t seed, uint32_t first, uint32_t top, lanes32 bits[WORDS]) {
  lanes32 a = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, b{}, c{}, d{};
  lanes32 high0, low0, high1, low1;
  a += first, b += top;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    multiply(a, 0xD2511F53u, high0, low0);
    multiply(c, 0xCD9E8D57u, high1, low1);
    a = high1 ^ b ^ k0, b = low1, c = high0 ^ d ^ k1, d = low0;
  }
  bits[0] = a, bits[1] = b, bits[2] = c, bits[3] = d;
}

template <class T> static inline void times(const T* x, floats factor, T* out) {
  for (int lane = 0; lane < COUNTERS; lane += LANES) {
    vec by;
    std::memcpy(&by, reinterpret_cast<const float*>(&factor) + lane, sizeof by);
    store(out + lane, load(x + lane) * by);
  }
}

template <class T>
static void dropout(const T* x, uint64_t seed, T* out, long count, uint32_t kept, float scale,
                    int threads) {
  const lanes32 by = (lanes32)(floats{} + scale);
  parallel(threads, cdiv(count, PART), [&](long task) {
    const long last = std::min(count, (task + 1) * PART);
    for (long first = task * PART; first < last; first += TILE) {
      lanes32 bits[WORDS];
      const uint64_t counter = uint64_t(first) / TILE * COUNTERS;
      philox(seed, uint32_t(counter), uint32_t(counter >> 32), bits);
      const bool whole = first + TILE <= last;
      T rest[TILE] = {};
      if (!whole) std::memcpy(rest, x + first, (last - first) * sizeof(T));
      const T* from = whole ? x + first : rest;
      T* to = whole ? out + first : rest;
      for (int word = 0; word < WORDS; word++, from += 2 * COUNTERS, to += 2 * COUNTERS) {
        times(from, (floats)((lanes32)((bits[word] & 0xFFFF) < kept) & by), to);
        times(from + COUNTERS, (floats)((lanes32)(bits[word] >> 16 < kept) & by), to + COUNTERS);
      }
      if (!whole) std::memcpy(out + first, rest, (last - first) * sizeof(T));
    }
  });
}

// out = x times `scale` where an element's 16 bits are below `kept`, times 0 elsewhere, in the order
// of memory. x and out are float32, or bfloat16.
extern "C" void fastdcgan_dropout(const void* x, const void* seed, void* out, long count, long kept,
                                  float scale, int is_bfloat16, int threads) {
  uint64_t key;
  std::memcpy(&key, seed, 8);
  if (is_bfloat16)
    dropout(static_cast<const uint16_t*>(x), key, static_cast<uint16_t*>(out), count, kept, scale,
            threads);
  else
    dropout(static_cast<const float*>(x), key, static_cast<float*>(out), count, kept, scale, threads);
}

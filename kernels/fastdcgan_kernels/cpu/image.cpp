// Up to an image of CL = 1 to 4 channels (kernels 3x3, 4x4 and 5x5, any stride and padding, float32,
// NHWC), where Winograd's transforms would cost more than they save: a generator's last layer, a
// discriminator's gradient of its input. Not here: the other direction, which PyTorch's convolution
// does well.
//
// Every small pixel gives K x K taps x CL products, one row of the matrix product
// [pixels, CS] x [CS, K K CL]; the row's K x (K CL) numbers are added to K rows of the image, where
// each is consecutive. An image belongs to one task, and sums in the order of its pixels.
#include "common.h"

#include <cstring>

static thread_local Scratch weights_scratch, row_scratch, pixel_scratch;

namespace {
struct Sides {
  long N, P, Q, CS, H, W, stride, pad, left;
};
}  // namespace

template <int K, int CL>
static void up(const Sides& g, Operand y, const float* w, const float* bias, float* x,
               float slope, int threads) {
  constexpr long COLUMNS = K * K * CL, PANELS = (COLUMNS + WIDTH - 1) / WIDTH;
  constexpr long PITCH = PANELS * WIDTH, PIXELS = 16 * ROWS;  // so many at a time
  const long CS = g.CS, pixels = g.P * g.Q, image = g.H * g.W * CL;
  float* U = weights_scratch.get(CS * PITCH);  // [PANELS][CS][WIDTH], zeros beyond the last column
  for (long s = 0; s < CS; s++)
    for (long k = 0; k < PITCH; k++)
      U[(k / WIDTH * CS + s) * WIDTH + k % WIDTH] = k < COLUMNS ? w[s * COLUMNS + k] : 0;
  parallel(threads, g.N, [&](long n) {
    float* products = row_scratch.get(PIXELS * PITCH);
    float* out = x + n * image;
    std::memset(out, 0, 4 * image);
    for (long first = 0; first < pixels; first += PIXELS) {
      const long count = std::min(PIXELS, pixels - first);
      const long at = (n * pixels + first) * CS;
      const float* in = y.wide() + at;
      if (y.narrow) {
        float* wide = pixel_scratch.get(PIXELS * CS);
        for (long i = 0; i < count * CS; i += LANES) store(wide + i, load(y.half() + at + i));
        in = wide;
      }
      for (long panel = 0; panel < PANELS; panel++) {
        const float* b = U + panel * CS * WIDTH;
        float* c = products + panel * WIDTH;
        long i = 0;
        for (; i + ROWS <= count; i += ROWS)
          product<ROWS>(in + i * CS, CS, CHUNK, b, CS, c + i * PITCH, PITCH);
        for (; i < count; i++) product<1>(in + i * CS, CS, CHUNK, b, CS, c + i * PITCH, PITCH);
      }
      for (long i = 0; i < count; i++) {
        const long h0 = (first + i) / g.Q * g.stride - g.pad;
        const long w0 = (first + i) % g.Q * g.stride - g.left;
        const long begin = std::max(0L, -w0) * CL, end = std::min<long>(K, g.W - w0) * CL;
        for (int kh = 0; kh < K; kh++) {
          if (h0 + kh < 0 || h0 + kh >= g.H) continue;
          float* to = out + ((h0 + kh) * g.W + w0) * CL;
          const float* from = products + i * PITCH + kh * K * CL;
          if (begin == 0 && end == K * CL)
            for (int e = 0; e < K * CL; e++) to[e] += from[e];
          else
            for (long e = begin; e < end; e++) to[e] += from[e];
        }
      }
    }
    if (bias || slope != 1)
      for (long i = 0; i < image; i++) {
        float z = out[i] + (bias ? bias[i % CL] : 0);
        out[i] = z < 0 ? (slope == 0 ? 0 : z * slope) : z;
      }
  });
}

template <int K> static auto up_to(long CL) {
  return CL == 1 ? up<K, 1> : CL == 2 ? up<K, 2> : CL == 3 ? up<K, 3> : up<K, 4>;
}

// x = activate(up(y) + bias); bias may be null; `narrow`: y is bfloat16. CS is a multiple of CHUNK.
extern "C" void fastdcgan_image_up(const void* y, int narrow, const float* w, const float* bias,
                                   float* x, long N, long P, long Q, long CS, long H, long W,
                                   long CL, long kernel, long stride, long pad, long left,
                                   float slope, int threads) {
  auto run = kernel == 3 ? up_to<3>(CL) : kernel == 4 ? up_to<4>(CL) : up_to<5>(CL);
  run({N, P, Q, CS, H, W, stride, pad, left}, {y, narrow != 0}, w, bias, x, slope, threads);
}

// Up to an image of CL = 1 to 4 channels (k4, s2, p1, float32, NHWC), where Winograd's transforms would
// cost more than they save: a generator's last layer, a discriminator's gradient of its input.
// Not here: the other direction, which PyTorch's convolution does well.
//
// Every small pixel gives 16 taps x CL products, one row of the matrix product
// [pixels, CS] x [CS, 16 CL]; the row's 4 x (4 CL) numbers are added to 4 rows of the image, where
// each is consecutive. An image belongs to one task, and sums in the order of its pixels.
#include "common.h"

#include <cstring>

static thread_local Scratch weights_scratch, row_scratch;

template <int CL>
static void up(const float* y, const float* w, const float* bias, float* x, long N, long P, long Q,
               long CS, float slope, int threads) {
  constexpr long COLUMNS = 16 * CL, PANELS = (COLUMNS + WIDTH - 1) / WIDTH, PITCH = PANELS * WIDTH;
  const long W = 2 * Q, image = 4 * P * Q * CL;
  float* U = weights_scratch.get(CS * PITCH);  // [PANELS][CS][WIDTH], zeros beyond the last column
  for (long s = 0; s < CS; s++)
    for (long k = 0; k < PITCH; k++)
      U[(k / WIDTH * CS + s) * WIDTH + k % WIDTH] = k < COLUMNS ? w[s * COLUMNS + k] : 0;
  parallel(threads, N, [&](long n) {
    float* products = row_scratch.get(Q * PITCH);
    float* out = x + n * image;
    std::memset(out, 0, 4 * image);
    for (long p = 0; p < P; p++) {
      const float* in = y + (n * P + p) * Q * CS;
      for (long panel = 0; panel < PANELS; panel++) {
        const float* b = U + panel * CS * WIDTH;
        float* c = products + panel * WIDTH;
        long q = 0;
        for (; q + ROWS <= Q; q += ROWS)
          product<ROWS>(in + q * CS, CS, CHUNK, b, CS, c + q * PITCH, PITCH);
        for (; q < Q; q++) product<1>(in + q * CS, CS, CHUNK, b, CS, c + q * PITCH, PITCH);
      }
      for (long q = 0; q < Q; q++) {
        const int first = q == 0 ? CL : 0, last = q == Q - 1 ? 3 * CL : 4 * CL;
        for (int kh = 0; kh < 4; kh++) {
          const long h = 2 * p - 1 + kh;
          if (h < 0 || h >= 2 * P) continue;
          float* to = out + (h * W + 2 * q - 1) * CL;
          const float* from = products + q * PITCH + kh * 4 * CL;
          if (first == 0 && last == 4 * CL)
            for (int i = 0; i < 4 * CL; i++) to[i] += from[i];
          else
            for (int i = first; i < last; i++) to[i] += from[i];
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

// x = activate(up(y) + bias); bias may be null. CS is a multiple of CHUNK.
extern "C" void fastdcgan_image_up(const float* y, const float* w, const float* bias, float* x,
                                   long N, long P, long Q, long CS, long CL, float slope,
                                   int threads) {
  auto run = CL == 1 ? up<1> : CL == 2 ? up<2> : CL == 3 ? up<3> : up<4>;
  run(y, w, bias, x, N, P, Q, CS, slope, threads);
}

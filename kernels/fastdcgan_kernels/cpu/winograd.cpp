// Convolutions 4x4 of stride 2 and padding 1 in float32 on a CPU, with 9 multiplications for 16:
// down, up and weight gradient. Not here: other layers, and the choice among implementations.
//
// A layer joins a small side [N, P, Q, CS] and a large side [N, 2P, 2Q, CL], both NHWC in memory, by
// a weight [CS, 4, 4, CL]. In one dimension, with the large side's pixel h = 2i + r - 1 called x_r[i]
// (phase r, index i) and the tap k = 2t + r called w_r[t],
//
//     down:  y[p]   = sum over r, t of x_r[p + t] w_r[t]        two taps, stride 1, for each phase
//     up:    x_r[i] = sum over t    of y[i - t]   w_r[t]        its adjoint
//
// A tile is two pixels of the small side (p = 2a, 2a + 1) and three indices of each phase of the
// large side (i = 2a, 2a + 1, 2a + 2). Winograd's F(2, 2) multiplies three times for it, not four
// (Lavin & Gray 2016, arXiv:1509.09308, section 4.1):
//
//     gather  V = (x0 - x1, x1, x2 - x1)    weights  U = (w0, w0 + w1, w1)    M = V U, summed over r
//     down    y = (M0 + M1, M1 + M2)
//     spread  S = (y0, y0 + y1, y1)         up       x += (D0, D1 - D0 - D2, D2)   with D = S U
//     weight gradient    dU = sum over tiles of S V,   dw = (dU0 + dU1, dU1 + dU2)
//
// In two dimensions a tile is 2x2 pixels of the small side, 6x6 of the large, and has 3x3 products,
// here called positions; each position is a matrix product over all tiles:
//
//     down [tiles, 4 CL] x [4 CL, CS]    up [tiles, CS] x [CS, 4 CL]    dU [CS, tiles] x [tiles, 4 CL]
//
// Transformed tiles are made a block at a time, in cache, and never exist whole. Every sum has an
// order that depends on shapes alone: results are the same bits for any number of threads.
#include "common.h"

#include <cstring>

constexpr int POSITIONS = 9;

static thread_local Scratch weights_scratch, block_scratch;

// c[R][WIDTH] += a^T x b over T tiles. a: [T][CHUNK] of which R columns, b0 and b1: [T][CHUNK] each.
template <int R>
static inline void outer(const float* a, const float* b0, const float* b1, long T, float* c,
                         long ldc) {
  vec sum[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) sum[r][0] = load(c + r * ldc), sum[r][1] = load(c + r * ldc + LANES);
#pragma GCC unroll 2
  for (long t = 0; t < T; t++) {
    vec right0 = load(b0 + t * CHUNK), right1 = load(b1 + t * CHUNK);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      vec left = all(a[t * CHUNK + r]);
      sum[r][0] += left * right0;
      sum[r][1] += left * right1;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) store(c + r * ldc, sum[r][0]), store(c + r * ldc + LANES, sum[r][1]);
}

// ---- a layer, its tiles and their transforms

struct Layer {
  long N, P, Q, CS, CL;
  long rows() const { return cdiv(P, 2); }     // of tiles
  long columns() const { return cdiv(Q, 2); }
  long tiles() const { return N * rows() * columns(); }
  struct Tile { long n, a, b; };
  Tile tile(long t) const {
    long each = rows() * columns();
    return {t / each, t % each / columns(), t % columns()};
  }
  // The small side's pixel (i, j) of a tile; nullptr outside the picture.
  template <class F> F* small(F* y, Tile t, int i, int j) const {
    long p = 2 * t.a + i, q = 2 * t.b + j;
    return p < P && q < Q ? y + ((t.n * P + p) * Q + q) * CS : nullptr;
  }
  // The large side's pixel of phase (r, s) and index (i, j) of a tile; nullptr outside the picture.
  template <class F> F* large(F* x, Tile t, int r, int s, int i, int j) const {
    long h = 2 * (2 * t.a + i) + r - 1, w = 2 * (2 * t.b + j) + s - 1;
    bool inside = h >= 0 && h < 2 * P && w >= 0 && w < 2 * Q;
    return inside ? x + ((t.n * 2 * P + h) * 2 * Q + w) * CL : nullptr;
  }
};

// Transformed tiles lie as [POSITIONS][count / group][K / CHUNK][group][CHUNK].
struct Block {
  float* data;
  long count, K, group;
  static size_t size(long count, long K, long group) {
    return POSITIONS * cdiv(count, group) * group * K;
  }
  long position() const { return cdiv(count, group) * group * K; }  // floats from one to the next
  long chunk() const { return group * CHUNK; }
  float* at(long tile) const { return data + tile / group * group * K + tile % group * CHUNK; }
};

alignas(64) static const float zeros[CHUNK] = {};

// V of tiles first.. of the large side's channels c0 .. c0 + C.
static void gather(const Layer& g, const float* x, long first, long c0, long C, const Block& block) {
  for (long t = 0; t < block.count; t++) {
    Layer::Tile tile = g.tile(first + t);
    float* to = block.at(t);
    for (int phase = 0; phase < 4; phase++, to += C / CHUNK * block.chunk()) {
      const float* from[9];
      long step[9];
      for (int e = 0; e < 9; e++) {
        const float* p = g.large(x, tile, phase / 2, phase % 2, e / 3, e % 3);
        from[e] = p ? p + c0 : zeros;
        step[e] = p ? 1 : 0;
      }
      for (long c = 0; c < C; c += CHUNK)
        for (int lane = 0; lane < CHUNK; lane += LANES) {
          vec v[9];
#pragma GCC unroll 9
          for (int e = 0; e < 9; e++) v[e] = load(from[e] + step[e] * c + lane);
#pragma GCC unroll 3
          for (int j = 0; j < 3; j++) v[j] -= v[3 + j], v[6 + j] -= v[3 + j];
#pragma GCC unroll 3
          for (int i = 0; i < 9; i += 3) v[i] -= v[i + 1], v[i + 2] -= v[i + 1];
#pragma GCC unroll 9
          for (int e = 0; e < 9; e++)
            store(to + e * block.position() + c / CHUNK * block.chunk() + lane, v[e]);
        }
    }
  }
}

// S of tiles first.. of the small side's channels c0 .. c0 + C.
static void spread(const Layer& g, const float* y, long first, long c0, long C, const Block& block) {
  for (long t = 0; t < block.count; t++) {
    Layer::Tile tile = g.tile(first + t);
    float* to = block.at(t);
    const float* from[4];
    long step[4];
    for (int e = 0; e < 4; e++) {
      const float* p = g.small(y, tile, e / 2, e % 2);
      from[e] = p ? p + c0 : zeros;
      step[e] = p ? 1 : 0;
    }
    for (long c = 0; c < C; c += CHUNK)
      for (int lane = 0; lane < CHUNK; lane += LANES) {
        vec s[4], m[9];
#pragma GCC unroll 4
        for (int e = 0; e < 4; e++) s[e] = load(from[e] + step[e] * c + lane);
        m[0] = s[0], m[2] = s[1], m[6] = s[2], m[8] = s[3];
        m[1] = m[0] + m[2], m[7] = m[6] + m[8];
#pragma GCC unroll 3
        for (int j = 0; j < 3; j++) m[3 + j] = m[j] + m[6 + j];
#pragma GCC unroll 9
        for (int e = 0; e < 9; e++)
          store(to + e * block.position() + c / CHUNK * block.chunk() + lane, m[e]);
      }
  }
}

// U of one phase from its four taps: out[position * stride].
static inline void transform_taps(const vec w[4], float* out, long stride) {
  vec u[9] = {w[0], w[0] + w[1], w[1], {}, {}, {}, w[2], w[2] + w[3], w[3]};
#pragma GCC unroll 3
  for (int j = 0; j < 3; j++) u[3 + j] = u[j] + u[6 + j];
#pragma GCC unroll 9
  for (int e = 0; e < 9; e++) store(out + e * stride, u[e]);
}

static inline long tap(int phase, int t) {  // of the taps t = 2 * th + tw of a phase
  return (2 * (t / 2) + phase / 2) * 4 + 2 * (t % 2) + phase % 2;
}

// M or D [POSITIONS][tiles][WIDTH] of one panel of columns; `rows` tiles are there, ROWS at a time.
static void multiply(const Block& block, const float* panel, long stride, float* out) {
  long rows = cdiv(block.count, ROWS) * ROWS;
  for (int e = 0; e < POSITIONS; e++)
    for (long t = 0; t < rows; t += ROWS)
      product<ROWS>(block.at(t) + e * block.position(), CHUNK, ROWS * CHUNK, panel + e * stride,
                    block.K, out + (e * rows + t) * WIDTH, WIDTH);
}

constexpr size_t CACHE = 600 << 10;  // bytes of a block of transformed tiles: most of a usual L2

static long tiles_a_block(const Layer& g, long K, int threads) {
  long most = std::max<long>(64, CACHE / (4 * POSITIONS * K));
  return std::min(most, cdiv(cdiv(g.tiles(), threads), ROWS) * ROWS);
}

// ---- the three functions

// y = activate(down(x) + bias); bias may be null.
extern "C" void fastdcgan_down(const float* x, const float* w, const float* bias, float* y, long N,
                               long P, long Q, long CS, long CL, float slope, int threads) {
  Layer g{N, P, Q, CS, CL};
  const long K = 4 * CL, panels = CS / WIDTH, stride = CS * K;
  float* U = weights_scratch.get(POSITIONS * stride);  // [POSITIONS][CS / WIDTH][K][WIDTH]
  parallel(threads, panels * (CL / CHUNK), [&](long task) {
    long panel = task % panels, c0 = task / panels * CHUNK;
    alignas(64) float taps[16][CHUNK][WIDTH];
    for (int s = 0; s < WIDTH; s++)
      for (int k = 0; k < 16; k++)
        for (int c = 0; c < CHUNK; c++)
          taps[k][c][s] = w[((panel * WIDTH + s) * 16 + k) * CL + c0 + c];
    for (int phase = 0; phase < 4; phase++)
      for (int c = 0; c < CHUNK; c++)
        for (int lane = 0; lane < WIDTH; lane += LANES) {
          vec four[4];
          for (int t = 0; t < 4; t++) four[t] = load(taps[tap(phase, t)][c] + lane);
          transform_taps(four, U + (panel * K + phase * CL + c0 + c) * WIDTH + lane, stride);
        }
  });
  const long each = tiles_a_block(g, K, threads);
  parallel(threads, cdiv(g.tiles(), each), [&](long task) {
    long first = task * each, count = std::min(each, g.tiles() - first);
    float* scratch = block_scratch.get(Block::size(each, K, ROWS) + POSITIONS * (each + ROWS) * WIDTH);
    Block V{scratch, count, K, ROWS};
    float* M = scratch + Block::size(each, K, ROWS);
    const long pitch = cdiv(count, ROWS) * ROWS * WIDTH;
    gather(g, x, first, 0, CL, V);
    for (long panel = 0; panel < panels; panel++) {
      multiply(V, U + panel * K * WIDTH, stride, M);
      for (long t = 0; t < count; t++) {
        Layer::Tile tile = g.tile(first + t);
        for (int lane = 0; lane < WIDTH; lane += LANES) {
          const float* m = M + t * WIDTH + lane;
          const long c = panel * WIDTH + lane;
          for (int i = 0; i < 2; i++)
            for (int j = 0; j < 2; j++) {
              const float* corner = m + (3 * i + j) * pitch;
              vec z = (load(corner) + load(corner + pitch)) +
                      (load(corner + 3 * pitch) + load(corner + 4 * pitch));
              if (bias) z += load(bias + c);
              if (float* out = g.small(y, tile, i, j)) store(out + c, activate(z, slope));
            }
        }
      }
    }
  });
}

// x = activate(up(y) + bias); bias may be null.
extern "C" void fastdcgan_up(const float* y, const float* w, const float* bias, float* x, long N,
                             long P, long Q, long CS, long CL, float slope, int threads) {
  Layer g{N, P, Q, CS, CL};
  const long K = CS, panels = 4 * CL / WIDTH, stride = 4 * CL * K;
  float* U = weights_scratch.get(POSITIONS * stride);  // [POSITIONS][4][CL / WIDTH][K][WIDTH]
  parallel(threads, cdiv(CS, 16), [&](long task) {
    for (long s = task * 16; s < std::min(CS, task * 16 + 16); s++)
      for (int phase = 0; phase < 4; phase++)
        for (long c = 0; c < CL; c += LANES) {
          vec four[4];
          for (int t = 0; t < 4; t++) four[t] = load(w + (s * 16 + tap(phase, t)) * CL + c);
          long panel = (phase * CL + c) / WIDTH;
          transform_taps(four, U + (panel * K + s) * WIDTH + c % WIDTH, stride);
        }
  });
  // Neighbouring tiles add to the same pixels: an image belongs to one task.
  const long image = g.rows() * g.columns(), most = tiles_a_block(g, K, threads);
  const long images = std::max<long>(1, most / image), each = std::min(most, images * image);
  parallel(threads, cdiv(N, images), [&](long task) {
    const long last = std::min((task + 1) * images, N) * image;
    float* scratch = block_scratch.get(Block::size(each, K, ROWS) + POSITIONS * (each + ROWS) * WIDTH);
    float* D = scratch + Block::size(each, K, ROWS);
    for (long first = task * images * image; first < last; first += each) {
      Block S{scratch, std::min(each, last - first), K, ROWS};
      const long pitch = cdiv(S.count, ROWS) * ROWS * WIDTH;
      spread(g, y, first, 0, CS, S);
      for (long panel = 0; panel < panels; panel++) {
        multiply(S, U + panel * K * WIDTH, stride, D);
        const int r = panel * WIDTH / CL / 2, s = panel * WIDTH / CL % 2;
        const long c = panel * WIDTH % CL;
        for (long t = 0; t < S.count; t++) {
          Layer::Tile tile = g.tile(first + t);
          float* to[9];
          for (int e = 0; e < 9; e++) to[e] = g.large(x, tile, r, s, e / 3, e % 3);
          for (int lane = 0; lane < WIDTH; lane += LANES) {
            vec d[9];
#pragma GCC unroll 9
            for (int e = 0; e < 9; e++) d[e] = load(D + e * pitch + t * WIDTH + lane);
#pragma GCC unroll 3
            for (int i = 0; i < 9; i += 3) d[i + 1] -= d[i] + d[i + 2];
#pragma GCC unroll 3
            for (int j = 0; j < 3; j++) d[3 + j] -= d[j] + d[6 + j];
#pragma GCC unroll 9
            for (int e = 0; e < 9; e++)
              if (to[e]) {
                bool added = (e / 3 == 0 && tile.a > 0) || (e % 3 == 0 && tile.b > 0);
                float* out = to[e] + c + lane;
                store(out, added ? load(out) + d[e] : d[e]);
              }
          }
        }
      }
    }
    if (bias || slope != 1) {
      float* end = x + (last / image) * 4 * P * Q * CL;
      for (float* p = x + task * images * 4 * P * Q * CL; p < end; p += CL)
        for (long c = 0; c < CL; c += LANES) {
          vec z = load(p + c);
          if (bias) z += load(bias + c);
          store(p + c, activate(z, slope));
        }
    }
  });
}

extern "C" void fastdcgan_weight_gradient(const float* y, const float* x, float* dw, long N, long P,
                                          long Q, long CS, long CL, int threads) {
  Layer g{N, P, Q, CS, CL};
  constexpr long TILES = 64, CHANNELS = std::max(WIDTH, CHUNK);
  const long most = 128, rows = CS % most == 0 ? most : CHUNK;  // of the small side's, a task
  const long columns = 4 * CHANNELS;
  parallel(threads, CL / CHANNELS * (CS / rows), [&](long task) {
    const long c0 = task % (CL / CHANNELS) * CHANNELS, s0 = task / (CL / CHANNELS) * rows;
    const long sums = POSITIONS * rows * columns;
    float* dU = block_scratch.get(sums + Block::size(TILES, columns, TILES) +
                                  Block::size(TILES, rows, TILES));
    float* gathered = dU + sums;
    float* spreaded = gathered + Block::size(TILES, columns, TILES);
    std::memset(dU, 0, 4 * sums);  // [POSITIONS][rows][4][CHANNELS]
    for (long first = 0; first < g.tiles(); first += TILES) {
      const long count = std::min(TILES, g.tiles() - first);
      Block V{gathered, count, columns, TILES}, S{spreaded, count, rows, TILES};
      gather(g, x, first, c0, CHANNELS, V);
      spread(g, y, first, s0, rows, S);
      for (int e = 0; e < POSITIONS; e++)
        for (long column = 0; column < columns; column += WIDTH)
          for (long row = 0; row < rows; row += CHUNK) {
            const float* a = S.data + e * S.position() + row / CHUNK * S.chunk();
            const float* b = V.data + e * V.position();
            const float* b0 = b + column / CHUNK * V.chunk() + column % CHUNK;
            const long next = column + LANES;
            const float* b1 = b + next / CHUNK * V.chunk() + next % CHUNK;
            float* c = dU + (e * rows + row) * columns + column;
            int r = 0;
            for (; r + ROWS <= CHUNK; r += ROWS)
              outer<ROWS>(a + r, b0, b1, count, c + r * columns, columns);
            if (CHUNK % ROWS)
              outer<CHUNK % ROWS + (CHUNK % ROWS == 0)>(a + r, b0, b1, count, c + r * columns, columns);
          }
    }
    for (long s = 0; s < rows; s++)
      for (int phase = 0; phase < 4; phase++)
        for (long c = 0; c < CHANNELS; c += LANES) {
          const float* u = dU + s * columns + phase * CHANNELS + c;
          const long e = rows * columns;
          for (int t = 0; t < 4; t++) {
            const float* corner = u + (3 * (t / 2) + t % 2) * e;
            vec z = (load(corner) + load(corner + e)) + (load(corner + 3 * e) + load(corner + 4 * e));
            store(dw + ((s0 + s) * 16 + tap(phase, t)) * CL + c0 + c, z);
          }
        }
  });
}

// Convolutions 4x4 of stride 2 and padding 1 in float32 on a CPU, with fewer multiplications:
// down, up and weight gradient. Not here: other layers, and the choice among implementations.
//
// A layer joins a small side [N, P, Q, CS] and a large side [N, 2P, 2Q, CL], both NHWC in memory, by
// a weight [CS, 4, 4, CL]. In one dimension, with the large side's pixel h = 2i + r - 1 called x_r[i]
// (phase r, index i) and the tap k = 2t + r called w_r[t],
//
//     down:  y[p]   = sum over r, t of x_r[p + t] w_r[t]        two taps, stride 1, for each phase
//     up:    x_r[i] = sum over t    of y[i - t]   w_r[t]        its adjoint
//
// A tile is M pixels of the small side (p = Ma, Ma + 1, ...) and M + 1 indices of each phase of the
// large side. Winograd's F(M, 2) multiplies M + 1 times for it, not 2M (Lavin & Gray 2016,
// arXiv:1509.09308, section 4.1). With M = 2:
//
//     gather  V = (x0 - x1, x1, x2 - x1)    weights  U = (w0, w0 + w1, w1)    D = V U, summed over r
//     down    y = collect(D) = (D0 + D1, D1 + D2)
//     spread  S = (y0, y0 + y1, y1)         up       x += scatter(S U) = (D0, D1 - D0 - D2, D2)
//     weight gradient    dU = sum over tiles of S V,   dw = (dU0 + dU1, dU1 + dU2)
//
// scatter is gather transposed, spread is collect, and the last is weights. M = 4 does the same at the
// points 0, 1, -1, 2 and infinity: 25 multiplications for 64, and some four times float32's rounding.
//
// In two dimensions a tile is MxM pixels of the small side, and has (M + 1)^2 products, here called
// positions; each position is a matrix product over all tiles:
//
//     down [tiles, 4 CL] x [4 CL, CS]    up [tiles, CS] x [CS, 4 CL]    dU [CS, tiles] x [tiles, 4 CL]
//
// Transformed tiles are made a block at a time, in cache, and never exist whole. Every sum has an
// order that depends on shapes alone: results are the same bits for any number of threads.
#include "common.h"

#include <cstring>

static thread_local Scratch weights_scratch, block_scratch;

// ---- F(M, 2) in one dimension, in place on v[0], v[step], ...; M + 1 points make SIDE values

template <int M> struct Winograd;

template <> struct Winograd<2> {  // points 0, 1, infinity
  static void gather(vec* v, int s) { v[0] -= v[s], v[2 * s] -= v[s]; }
  static void scatter(vec* v, int s) { v[s] -= v[0] + v[2 * s]; }
  static void spread(vec* v, int s) { v[2 * s] = v[s], v[s] += v[0]; }
  static void collect(vec* v, int s) { v[0] += v[s], v[s] += v[2 * s]; }
  static void weights(vec* v, int s) { spread(v, s); }
  static void gradient(vec* v, int s) { collect(v, s); }
};

template <> struct Winograd<4> {  // points 0, 1, -1, 2, infinity
  static void gather(vec* v, int s) {
    vec a = v[s], b = v[2 * s], c = v[3 * s];
    v[0] = 2 * (v[0] - b) + (c - a);
    v[s] = (c - b) - 2 * a;
    v[2 * s] = c + 2 * a - 3 * b;
    v[3 * s] = c - a;
    v[4 * s] += 2 * (a - c) - b;
  }
  static void scatter(vec* v, int s) {
    vec a = v[0], b = v[s], c = v[2 * s], d = v[3 * s], e = v[4 * s];
    v[0] = 2 * a;
    v[s] = 2 * (c - b + e) - (a + d);
    v[2 * s] = -2 * a - b - 3 * c - e;
    v[3 * s] = (a + b) + (c + d) - 2 * e;
  }
  static void spread(vec* v, int s) {
    vec a = v[0], b = v[s], c = v[2 * s], d = v[3 * s];
    v[s] = (a + c) + (b + d);
    v[2 * s] = (a + c) - (b + d);
    v[3 * s] = (a + 4 * c) + 2 * (b + 4 * d);
    v[4 * s] = d;
  }
  static void collect(vec* v, int s) {
    vec sum = v[s] + v[2 * s], apart = v[s] - v[2 * s], d = v[3 * s];
    v[0] += sum + d;
    v[s] = apart + 2 * d;
    v[2 * s] = sum + 4 * d;
    v[3 * s] = apart + 8 * d + v[4 * s];
  }
  static void weights(vec* v, int s) {
    vec a = v[0], b = v[s];
    v[0] = a * 0.5f, v[s] = (a + b) * -0.5f, v[2 * s] = (b - a) * (1 / 6.f);
    v[3 * s] = (a + 2 * b) * (1 / 6.f), v[4 * s] = b;
  }
  static void gradient(vec* v, int s) {
    vec a = v[s] * 0.5f, b = v[2 * s] * (1 / 6.f), c = v[3 * s] * (1 / 6.f);
    v[0] = (v[0] * 0.5f - a) + (c - b);
    v[s] = (b - a) + (2 * c + v[4 * s]);
  }
};

// A line transform of both dimensions of v[SIDE][SIDE]: columns first, of which there are `from`
// before it and `to` after it.
template <int SIDE, class Line>
static inline __attribute__((always_inline)) void both(vec* v, int from, int to, Line line) {
#pragma GCC unroll 5
  for (int j = 0; j < from; j++) line(v + j, SIDE);
#pragma GCC unroll 5
  for (int i = 0; i < to; i++) line(v + i * SIDE, 1);
}

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

template <int M> struct Layer {
  static constexpr int SIDE = M + 1, POSITIONS = SIDE * SIDE;
  long N, P, Q, CS, CL;
  long rows() const { return cdiv(P, M); }  // of tiles
  long columns() const { return cdiv(Q, M); }
  long tiles() const { return N * rows() * columns(); }
  struct Tile { long n, a, b; };
  Tile tile(long t) const {
    long each = rows() * columns();
    return {t / each, t % each / columns(), t % columns()};
  }
  // The small side's pixel (i, j) of a tile; nullptr outside the picture.
  template <class F> F* small(F* y, Tile t, int i, int j) const {
    long p = M * t.a + i, q = M * t.b + j;
    return p < P && q < Q ? y + ((t.n * P + p) * Q + q) * CS : nullptr;
  }
  // The large side's pixel of phase (r, s) and index (i, j) of a tile; nullptr outside the picture.
  template <class F> F* large(F* x, Tile t, int r, int s, int i, int j) const {
    long h = 2 * (M * t.a + i) + r - 1, w = 2 * (M * t.b + j) + s - 1;
    bool inside = h >= 0 && h < 2 * P && w >= 0 && w < 2 * Q;
    return inside ? x + ((t.n * 2 * P + h) * 2 * Q + w) * CL : nullptr;
  }
};

// Tiles' positions and channels would all lie a multiple of 4 KB apart, and fall on the same few lines
// of the first cache: PAD floats keep them apart.
constexpr long PAD = CHUNK;

// Transformed tiles lie as [POSITIONS][count / group][K / CHUNK][group][CHUNK].
struct Block {
  float* data;
  long count, K, group;
  long position() const { return size(count, K, group); }  // floats from one to the next
  static long size(long count, long K, long group) { return cdiv(count, group) * group * K + PAD; }
  long chunk() const { return group * CHUNK; }
  float* at(long tile) const { return data + tile / group * group * K + tile % group * CHUNK; }
};

alignas(64) static const float zeros[CHUNK] = {};

// V of tiles first.. of the large side's channels c0 .. c0 + C.
template <int M>
static void gather(const Layer<M>& g, const float* x, long first, long c0, long C,
                   const Block& block) {
  constexpr int SIDE = M + 1, POSITIONS = SIDE * SIDE;
  for (long t = 0; t < block.count; t++) {
    const auto tile = g.tile(first + t);
    float* to = block.at(t);
    for (int phase = 0; phase < 4; phase++, to += C / CHUNK * block.chunk()) {
      const float* from[POSITIONS];
      long step[POSITIONS];
      for (int e = 0; e < POSITIONS; e++) {
        const float* p = g.large(x, tile, phase / 2, phase % 2, e / SIDE, e % SIDE);
        from[e] = p ? p + c0 : zeros;
        step[e] = p ? 1 : 0;
      }
      for (long c = 0; c < C; c += CHUNK)
        for (int lane = 0; lane < CHUNK; lane += LANES) {
          vec v[POSITIONS];
#pragma GCC unroll 25
          for (int e = 0; e < POSITIONS; e++) v[e] = load(from[e] + step[e] * c + lane);
          both<SIDE>(v, SIDE, SIDE, Winograd<M>::gather);
          float* out = to + c / CHUNK * block.chunk() + lane;
#pragma GCC unroll 25
          for (int e = 0; e < POSITIONS; e++) store(out + e * block.position(), v[e]);
        }
    }
  }
}

// S of tiles first.. of the small side's channels c0 .. c0 + C.
template <int M>
static void spread(const Layer<M>& g, const float* y, long first, long c0, long C,
                   const Block& block) {
  constexpr int SIDE = M + 1, POSITIONS = SIDE * SIDE;
  for (long t = 0; t < block.count; t++) {
    const auto tile = g.tile(first + t);
    const float* from[M * M];
    long step[M * M];
    for (int e = 0; e < M * M; e++) {
      const float* p = g.small(y, tile, e / M, e % M);
      from[e] = p ? p + c0 : zeros;
      step[e] = p ? 1 : 0;
    }
    for (long c = 0; c < C; c += CHUNK)
      for (int lane = 0; lane < CHUNK; lane += LANES) {
        vec v[POSITIONS];
#pragma GCC unroll 16
        for (int e = 0; e < M * M; e++)
          v[e / M * SIDE + e % M] = load(from[e] + step[e] * c + lane);
        both<SIDE>(v, M, SIDE, Winograd<M>::spread);
        float* out = block.at(t) + c / CHUNK * block.chunk() + lane;
#pragma GCC unroll 25
        for (int e = 0; e < POSITIONS; e++) store(out + e * block.position(), v[e]);
      }
  }
}

// U of one phase from its four taps: out[position * stride].
template <int M>
static inline void transform_taps(const vec w[4], float* out, long stride) {
  constexpr int SIDE = M + 1;
  vec u[SIDE * SIDE];
  u[0] = w[0], u[1] = w[1], u[SIDE] = w[2], u[SIDE + 1] = w[3];
  both<SIDE>(u, 2, SIDE, Winograd<M>::weights);
#pragma GCC unroll 25
  for (int e = 0; e < SIDE * SIDE; e++) store(out + e * stride, u[e]);
}

static inline long tap(int phase, int t) {  // of the taps t = 2 * th + tw of a phase
  return (2 * (t / 2) + phase / 2) * 4 + 2 * (t % 2) + phase % 2;
}

// M or D [positions][tiles][WIDTH] of one panel of columns; tiles are taken ROWS at a time.
static void multiply(int positions, const Block& block, const float* panel, long stride,
                     float* out) {
  long rows = cdiv(block.count, ROWS) * ROWS;
  for (int e = 0; e < positions; e++)
    for (long t = 0; t < rows; t += ROWS)
      product<ROWS>(block.at(t) + e * block.position(), CHUNK, ROWS * CHUNK, panel + e * stride,
                    block.K, out + e * (rows * WIDTH + PAD) + t * WIDTH, WIDTH);
}

constexpr long CACHE = 600 << 10;  // bytes of a block of transformed tiles: most of a usual L2
constexpr long LEAST = 64;         // tiles in a block, each of which reads all the weights

// Tiles in a block, a multiple of ROWS.
template <int M> static long tiles_a_block(const Layer<M>& g, long K, int threads) {
  long most = std::max(LEAST, CACHE / (4 * g.POSITIONS * K)) / ROWS * ROWS;
  return std::min(most, cdiv(cdiv(g.tiles(), threads), ROWS) * ROWS);
}

// ---- the three functions

template <int M>
static void down(const Layer<M>& g, const float* x, const float* w, const float* bias, float* y,
                 float slope, int threads) {
  constexpr int SIDE = M + 1, POSITIONS = SIDE * SIDE;
  const long CL = g.CL, K = 4 * CL, panels = g.CS / WIDTH, stride = g.CS * K;
  float* U = weights_scratch.get(POSITIONS * stride);  // [POSITIONS][CS / WIDTH][K][WIDTH]
  parallel(threads, panels * (CL / CHUNK), [&](long task) {
    const long panel = task % panels, c0 = task / panels * CHUNK;
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
          float* out = U + (panel * K + phase * CL + c0 + c) * WIDTH + lane;
          transform_taps<M>(four, out, stride);
        }
  });
  const long each = tiles_a_block(g, K, threads);
  parallel(threads, cdiv(g.tiles(), each), [&](long task) {
    const long first = task * each, count = std::min(each, g.tiles() - first);
    const long pitch = cdiv(count, ROWS) * ROWS * WIDTH + PAD;
    const long size = Block::size(each, K, ROWS);
    float* scratch = block_scratch.get(POSITIONS * (size + each * WIDTH + PAD));
    float* products = scratch + POSITIONS * size;
    Block V{scratch, count, K, ROWS};
    gather(g, x, first, 0, CL, V);
    for (long panel = 0; panel < panels; panel++) {
      multiply(POSITIONS, V, U + panel * K * WIDTH, stride, products);
      for (long t = 0; t < count; t++) {
        const auto tile = g.tile(first + t);
        for (int lane = 0; lane < WIDTH; lane += LANES) {
          vec m[POSITIONS];
#pragma GCC unroll 25
          for (int e = 0; e < POSITIONS; e++) m[e] = load(products + e * pitch + t * WIDTH + lane);
          both<SIDE>(m, SIDE, M, Winograd<M>::collect);
          const long c = panel * WIDTH + lane;
          const vec shift = bias ? load(bias + c) : vec{};
#pragma GCC unroll 16
          for (int e = 0; e < M * M; e++)
            if (float* out = g.small(y, tile, e / M, e % M))
              store(out + c, activate(m[e / M * SIDE + e % M] + shift, slope));
        }
      }
    }
  });
}

template <int M>
static void up(const Layer<M>& g, const float* y, const float* w, const float* bias, float* x,
               float slope, int threads) {
  constexpr int SIDE = M + 1, POSITIONS = SIDE * SIDE;
  const long CL = g.CL, K = g.CS, panels = 4 * CL / WIDTH, stride = 4 * CL * K;
  float* U = weights_scratch.get(POSITIONS * stride);  // [POSITIONS][4][CL / WIDTH][K][WIDTH]
  parallel(threads, K / CHUNK, [&](long task) {
    for (long s = task * CHUNK; s < (task + 1) * CHUNK; s++)
      for (int phase = 0; phase < 4; phase++)
        for (long c = 0; c < CL; c += LANES) {
          vec four[4];
          for (int t = 0; t < 4; t++) four[t] = load(w + (s * 16 + tap(phase, t)) * CL + c);
          const long panel = (phase * CL + c) / WIDTH;
          transform_taps<M>(four, U + (panel * K + s) * WIDTH + c % WIDTH, stride);
        }
  });
  // Neighbouring tiles add to the same pixels: an image belongs to one task.
  const long image = g.rows() * g.columns(), most = tiles_a_block(g, K, threads);
  const long images = std::max<long>(1, most / image);
  const long each = std::min(most, cdiv(images * image, ROWS) * ROWS);
  parallel(threads, cdiv(g.N, images), [&](long task) {
    const long last = std::min((task + 1) * images, g.N) * image;
    const long size = Block::size(each, K, ROWS);
    float* scratch = block_scratch.get(POSITIONS * (size + each * WIDTH + PAD));
    float* products = scratch + POSITIONS * size;
    for (long first = task * images * image; first < last; first += each) {
      Block S{scratch, std::min(each, last - first), K, ROWS};
      const long pitch = cdiv(S.count, ROWS) * ROWS * WIDTH + PAD;
      spread(g, y, first, 0, K, S);
      for (long panel = 0; panel < panels; panel++) {
        multiply(POSITIONS, S, U + panel * K * WIDTH, stride, products);
        const int phase = panel * WIDTH / CL;
        const long c = panel * WIDTH % CL;
        for (long t = 0; t < S.count; t++) {
          const auto tile = g.tile(first + t);
          float* to[POSITIONS];
          for (int e = 0; e < POSITIONS; e++)
            to[e] = g.large(x, tile, phase / 2, phase % 2, e / SIDE, e % SIDE);
          for (int lane = 0; lane < WIDTH; lane += LANES) {
            vec d[POSITIONS];
#pragma GCC unroll 25
            for (int e = 0; e < POSITIONS; e++)
              d[e] = load(products + e * pitch + t * WIDTH + lane);
            both<SIDE>(d, SIDE, SIDE, Winograd<M>::scatter);
#pragma GCC unroll 25
            for (int e = 0; e < POSITIONS; e++)
              if (to[e]) {
                bool more = (e / SIDE == 0 && tile.a > 0) || (e % SIDE == 0 && tile.b > 0);
                float* out = to[e] + c + lane;
                store(out, more ? load(out) + d[e] : d[e]);
              }
          }
        }
      }
    }
    if (bias || slope != 1) {
      const long size = 4 * g.P * g.Q * CL;  // of an image
      for (float* p = x + task * images * size; p < x + last / image * size; p += CL)
        for (long c = 0; c < CL; c += LANES)
          store(p + c, activate(load(p + c) + (bias ? load(bias + c) : vec{}), slope));
    }
  });
}

template <int M>
static void weight_gradient(const Layer<M>& g, const float* y, const float* x, float* dw,
                            int threads) {
  constexpr int SIDE = M + 1, POSITIONS = SIDE * SIDE;
  constexpr long TILES = 64, PITCH = TILES + 1;  // PITCH: as PAD
  constexpr long CHANNELS = std::max(WIDTH, CHUNK), columns = 4 * CHANNELS;
  const long CL = g.CL, rows = g.CS % 128 == 0 ? 128 : CHUNK;  // of the small side's, a task
  parallel(threads, CL / CHANNELS * (g.CS / rows), [&](long task) {
    const long c0 = task % (CL / CHANNELS) * CHANNELS, s0 = task / (CL / CHANNELS) * rows;
    const long sums = rows * columns;  // of a position
    const long V_size = Block::size(TILES, columns, PITCH), S_size = Block::size(TILES, rows, PITCH);
    float* dU = block_scratch.get(POSITIONS * (sums + V_size + S_size));
    float* gathered = dU + POSITIONS * sums;
    float* spreaded = gathered + POSITIONS * V_size;
    std::memset(dU, 0, 4 * POSITIONS * sums);  // [POSITIONS][rows][4][CHANNELS]
    for (long first = 0; first < g.tiles(); first += TILES) {
      const long count = std::min(TILES, g.tiles() - first);
      Block V{gathered, count, columns, PITCH}, S{spreaded, count, rows, PITCH};
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
            float* c = dU + e * sums + row * columns + column;
            constexpr int REST = CHUNK % ROWS;
            int r = 0;
            for (; r + ROWS <= CHUNK; r += ROWS)
              outer<ROWS>(a + r, b0, b1, count, c + r * columns, columns);
            if constexpr (REST > 0) outer<REST>(a + r, b0, b1, count, c + r * columns, columns);
          }
    }
    for (long s = 0; s < rows; s++)
      for (int phase = 0; phase < 4; phase++)
        for (long c = 0; c < CHANNELS; c += LANES) {
          vec u[POSITIONS];
          for (int e = 0; e < POSITIONS; e++)
            u[e] = load(dU + e * sums + s * columns + phase * CHANNELS + c);
          both<SIDE>(u, SIDE, 2, Winograd<M>::gradient);
          for (int t = 0; t < 4; t++)
            store(dw + ((s0 + s) * 16 + tap(phase, t)) * CL + c0 + c, u[t / 2 * SIDE + t % 2]);
        }
  });
}

constexpr long MOST_WEIGHTS = 256 * 128;

// Large tiles where they fit and the weights, 25 matrices of them, are not too many.
static bool large_tiles(long P, long Q, long CS, long CL) {
  return P % 4 == 0 && Q % 4 == 0 && CS * CL <= MOST_WEIGHTS;
}

// y = activate(down(x) + bias); bias may be null.
extern "C" void fastdcgan_down(const float* x, const float* w, const float* bias, float* y, long N,
                               long P, long Q, long CS, long CL, float slope, int threads) {
  if (large_tiles(P, Q, CS, CL))
    down(Layer<4>{N, P, Q, CS, CL}, x, w, bias, y, slope, threads);
  else
    down(Layer<2>{N, P, Q, CS, CL}, x, w, bias, y, slope, threads);
}

// x = activate(up(y) + bias); bias may be null.
extern "C" void fastdcgan_up(const float* y, const float* w, const float* bias, float* x, long N,
                             long P, long Q, long CS, long CL, float slope, int threads) {
  if (large_tiles(P, Q, CS, CL))
    up(Layer<4>{N, P, Q, CS, CL}, y, w, bias, x, slope, threads);
  else
    up(Layer<2>{N, P, Q, CS, CL}, y, w, bias, x, slope, threads);
}

extern "C" void fastdcgan_weight_gradient(const float* y, const float* x, float* dw, long N, long P,
                                          long Q, long CS, long CL, int threads) {
  if (large_tiles(P, Q, CS, CL))
    weight_gradient(Layer<4>{N, P, Q, CS, CL}, y, x, dw, threads);
  else
    weight_gradient(Layer<2>{N, P, Q, CS, CL}, y, x, dw, threads);
}

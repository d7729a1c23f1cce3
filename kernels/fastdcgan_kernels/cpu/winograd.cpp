// Convolutions in float32 on a CPU with fewer multiplications, of kernels 4x4 and 5x5, stride 1 or 2,
// and 3x3, stride 1, any padding: down, up and weight gradient. Not here: other layers, and the choice
// among implementations and tiles.
//
// A layer joins a small side [N, P, Q, CS] and a large side [N, H, W, CL], both NHWC in memory, by a
// weight [CS, K, K, CL]; the small side's pixel p meets the large side's p * stride - pad + k at tap k.
// In one dimension the taps are one piece or two, of two or three taps each: of stride 2 every second
// tap, of stride 1 the first ones and the others. With `first` the first tap of piece r, the tap
// first + stride * t called w_r[t], and the pixel stride * i + first - pad called x_r[i],
//
//     down:  y[p]   = sum over r, t of x_r[p + t] w_r[t]        T taps, stride 1, for each piece
//     up:    x_r[i] = sum over t    of y[i - t]   w_r[t]        its adjoint
//
// Up of stride 1 is down as well, with the taps in reverse, and runs as that.
//
// A tile is M pixels of the small side (p = Ma, Ma + 1, ...) and M + T - 1 indices of each piece of the
// large side. Winograd's F(M, T) multiplies M + T - 1 times for it, not M T times (Lavin & Gray 2016,
// arXiv:1509.09308, section 4.1). With M = 2 and T = 2:
//
//     gather  V = (x0 - x1, x1, x2 - x1)    weights  U = (w0, w0 + w1, w1)    D = V U, summed over r
//     down    y = collect(D) = (D0 + D1, D1 + D2)
//     spread  S = (y0, y0 + y1, y1)         up       x += scatter(S U) = (D0, D1 - D0 - D2, D2)
//     weight gradient    dU = sum over tiles of S V,   dw = (dU0 + dU1, dU1 + dU2)
//
// scatter is gather transposed, spread is collect, and gradient is weights. The products belong to
// points at which polynomials are multiplied: M = 2 has 0, 1 and infinity, M = 4 has 0, 1, -1, 2 and
// infinity, and a third tap adds -1 or -1/2. So collect and spread know M alone, and pieces of two taps
// and of three add up in one D, where the last point has products of some pieces only.
//
// In two dimensions a tile is MxM pixels of the small side, pieces of rows and of columns make phases,
// and the products are here called positions; each is a matrix product over all tiles, with a phase
// for each that has the position:
//
//     down [tiles, phases CL] x [phases CL, CS]    up [tiles, CS] x [CS, phases CL]
//     dU [CS, tiles] x [tiles, phases CL]
//
// Transformed tiles are made a block at a time, in cache, and never exist whole. Every sum has an
// order that depends on shapes alone: results are the same bits for any number of threads.
#include "common.h"

#include <array>
#include <cstring>
#include <type_traits>

static thread_local Scratch weights_scratch, block_scratch, zeros_scratch, image_scratch;

// ---- F(M, T) in one dimension, in place on v[0], v[step], ...

template <int M, int T> struct Winograd;  // between the large side, weights, and the points
template <int M, int T> struct Pixels;    // between the small side and the points

template <> struct Pixels<2, 2> {  // points 0, 1, infinity
  static void spread(vec* v, int s) { v[2 * s] = v[s], v[s] += v[0]; }
  static void collect(vec* v, int s) { v[0] += v[s], v[s] += v[2 * s]; }
};

template <> struct Winograd<2, 2> {
  static void gather(vec* v, int s) { v[0] -= v[s], v[2 * s] -= v[s]; }
  static void scatter(vec* v, int s) { v[s] -= v[0] + v[2 * s]; }
  static void weights(vec* v, int s) { Pixels<2, 2>::spread(v, s); }
  static void gradient(vec* v, int s) { Pixels<2, 2>::collect(v, s); }
};

template <> struct Pixels<2, 3> {  // and -1
  static void spread(vec* v, int s) {
    v[3 * s] = v[0] - v[s];
    Pixels<2, 2>::spread(v, s);
  }
  static void collect(vec* v, int s) {
    Pixels<2, 2>::collect(v, s);
    v[0] += v[3 * s], v[s] -= v[3 * s];
  }
};

template <> struct Winograd<2, 3> {
  static void gather(vec* v, int s) {
    vec a = v[s], b = v[2 * s];
    v[0] -= b, v[s] = a + b, v[2 * s] = v[3 * s] - a, v[3 * s] = b - a;
  }
  static void scatter(vec* v, int s) {
    vec b = v[s], c = v[2 * s], d = v[3 * s];
    v[s] = b - c - d, v[2 * s] = b - v[0] + d, v[3 * s] = c;
  }
  static void weights(vec* v, int s) {
    vec even = (v[0] + v[2 * s]) * 0.5f, odd = v[s] * 0.5f;
    v[s] = even + odd, v[3 * s] = even - odd;
  }
  static void gradient(vec* v, int s) {
    vec even = (v[s] + v[3 * s]) * 0.5f;
    v[s] = (v[s] - v[3 * s]) * 0.5f;
    v[0] += even, v[2 * s] += even;
  }
};

template <> struct Pixels<4, 2> {  // points 0, 1, -1, 2, infinity
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
};

template <> struct Winograd<4, 2> {
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

template <> struct Pixels<4, 3> {  // and -1/2
  static void spread(vec* v, int s) {
    v[5 * s] = (v[0] + 0.25f * v[2 * s]) - 0.5f * (v[s] + 0.25f * v[3 * s]);
    Pixels<4, 2>::spread(v, s);
  }
  static void collect(vec* v, int s) {
    vec f = v[5 * s];
    Pixels<4, 2>::collect(v, s);
    v[0] += f, v[s] -= 0.5f * f, v[2 * s] += 0.25f * f, v[3 * s] -= 0.125f * f;
  }
};

template <> struct Winograd<4, 3> {
  static void gather(vec* v, int s) {
    vec a = v[s], b = v[2 * s], c = v[3 * s], d = v[4 * s], odd = a - c, even = b - d;
    v[0] = 2 * ((v[0] - b) - even) + 3 * odd;
    v[s] = 2 * (a - d) + (5 * b + c);
    v[2 * s] = 2 * (a + d) + (b - 5 * c);
    v[3 * s] = -2 * even - odd;
    v[4 * s] = 2 * ((v[5 * s] - c) + odd) + 3 * even;
    v[5 * s] = even - 2 * odd;
  }
  static void scatter(vec* v, int s) {
    vec a = v[0], b = v[s], c = v[2 * s], d = v[3 * s], e = v[4 * s], f = v[5 * s];
    v[0] = 2 * a;
    v[s] = 3 * a + 2 * ((b + c) + (e - f)) - d;
    v[2 * s] = (5 * b + c) - 4 * a + (3 * e + f) - 2 * d;
    v[3 * s] = (b - 5 * c) - 3 * a + (d + 2 * f) - 4 * e;
    v[4 * s] = 2 * ((a - b) + (c + d)) - 3 * e - f;
    v[5 * s] = 2 * e;
  }
  static void weights(vec* v, int s) {
    vec a = v[0], b = v[s], c = v[2 * s], even = (a + c) * (1 / 6.f), odd = b * (1 / 6.f);
    v[0] = a * 0.5f, v[s] = even + odd, v[2 * s] = even - odd;
    v[3 * s] = (a + 2 * b + 4 * c) * (1 / 30.f);
    v[4 * s] = c * 0.5f;
    v[5 * s] = (4 * a - 2 * b + c) * (4 / 15.f);
  }
  static void gradient(vec* v, int s) {
    vec b = v[s] * (1 / 6.f), c = v[2 * s] * (1 / 6.f), d = v[3 * s] * (1 / 30.f);
    vec f = v[5 * s] * (4 / 15.f);
    v[0] = v[0] * 0.5f + (b + c) + (d + 4 * f);
    v[s] = (b - c) + 2 * (d - f);
    v[2 * s] = v[4 * s] * 0.5f + (b + c) + (4 * d + f);
  }
};

// A line transform of both dimensions of v[..][PITCH]: columns first, of which there are `from`
// before it, then the rows, of which there are `to` after it.
template <int PITCH, class Column, class Row>
static inline __attribute__((always_inline)) void both(vec* v, int from, int to, Column column,
                                                       Row row) {
#pragma GCC unroll 6
  for (int j = 0; j < from; j++) column(v + j, PITCH);
#pragma GCC unroll 6
  for (int i = 0; i < to; i++) row(v + i * PITCH, 1);
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

// Where LINES x COLUMNS pixels are, every `apart`-th from (h, w) on, of an image [H, W, C].
template <int LINES, int COLUMNS, class F>
static inline void window(F* image, long H, long W, long C, long h, long w, long apart, F* outside,
                          F** to) {
  for (int i = 0; i < LINES; i++, h += apart) {
    const bool is_line = h >= 0 && h < H;
    for (int j = 0; j < COLUMNS; j++) {
      const long column = w + j * apart;
      const bool inside = is_line && column >= 0 && column < W;
      *to++ = inside ? image + (h * W + column) * C : outside;
    }
  }
}

// T0 and T1: taps of the pieces of either axis; T1 = 0: there is one piece.
template <int M_, int T0, int T1> struct Layer {
  static constexpr int M = M_, T = T0, PIECES = T1 ? 2 : 1, PHASES = PIECES * PIECES;
  static constexpr int SIDE = M + T0 - 1, POSITIONS = SIDE * SIDE, KERNEL = T0 + T1;
  static_assert(T0 >= T1);  // positions of any phase are among those of the first one
  static constexpr int taps(int piece) { return piece ? T1 : T0; }
  // Of the phases that have a position, those before the given one; of PHASES, all.
  static constexpr int slot(int position, int phase) {
    int found = 0;
    for (int f = 0; f < phase; f++)
      found += position / SIDE < M + taps(f / PIECES) - 1 &&
               position % SIDE < M + taps(f % PIECES) - 1;
    return found;
  }
  static constexpr int products() {
    int sum = 0;
    for (int e = 0; e < POSITIONS; e++) sum += slot(e, PHASES);
    return sum;
  }

  long N, P, Q, CS, H, W, CL, stride, pad, left;
  long rows() const { return cdiv(P, M); }  // of tiles
  long columns() const { return cdiv(Q, M); }
  long tiles() const { return N * rows() * columns(); }
  struct Tile { long n, a, b; };
  Tile tile(long t) const {
    long each = rows() * columns();
    return {t / each, t % each / columns(), t % columns()};
  }
  // The first tap of a piece.
  long first(int piece) const { return piece * (stride == 1 ? T0 : 1); }
  // The tap (i, j) of the phase (r, s).
  long tap(int r, int s, int i, int j) const {
    return (first(r) + stride * i) * KERNEL + first(s) + stride * j;
  }
  // to[i * M + j]: the small side's pixel (i, j) of a tile; `outside` beyond the picture.
  template <class F> void small(F* y, Tile t, F* outside, F** to) const {
    window<M, M>(y + t.n * P * Q * CS, P, Q, CS, M * t.a, M * t.b, 1, outside, to);
  }
  // to[i * COLUMNS + j]: the large side's pixel of the phase (R, S) and the index (i, j) of a tile.
  template <int R, int S, class F> void large(F* x, Tile t, F* outside, F** to) const {
    window<M + taps(R) - 1, M + taps(S) - 1>(
        x + t.n * H * W * CL, H, W, CL, stride * M * t.a + first(R) - pad,
        stride * M * t.b + first(S) - left, stride, outside, to);
  }
  // Whether tiles have every pixel of the large side.
  bool whole() const {
    long last = stride * (M + taps(PIECES - 1) - 2) + first(PIECES - 1);
    return pad >= 0 && left >= 0 && H <= stride * M * (rows() - 1) + last - pad + 1 &&
           W <= stride * M * (columns() - 1) + last - left + 1;
  }
};

// A phase (R, S) of a layer L: its points along each axis, where the positions of all phases have its
// own, and its line transforms.
template <class L, int PHASE> struct Phase {
  static constexpr int R = PHASE / L::PIECES, S = PHASE % L::PIECES;
  static constexpr int TR = L::taps(R), TS = L::taps(S);
  static constexpr int LINES = L::M + TR - 1, COLUMNS = L::M + TS - 1, POSITIONS = LINES * COLUMNS;
  using Column = Winograd<L::M, TR>;
  using Row = Winograd<L::M, TS>;
  static constexpr int position(int e) { return e / COLUMNS * L::SIDE + e % COLUMNS; }
  static constexpr std::array<int, POSITIONS> slots() {
    std::array<int, POSITIONS> found{};
    for (int e = 0; e < POSITIONS; e++) found[e] = L::slot(position(e), PHASE);
    return found;
  }
  static constexpr std::array<int, POSITIONS> SLOT = slots();
};

// f(Phase) for each of a layer's phases.
template <class L, class F> static inline void each_phase(const F& f) {
  f(Phase<L, 0>{});
  if constexpr (L::PHASES == 4) f(Phase<L, 1>{}), f(Phase<L, 2>{}), f(Phase<L, 3>{});
}

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

// The channels of a pixel outside the picture.
template <class T> static const T* no_pixel(long C) {
  return static_cast<T*>(std::memset((void*)zeros_scratch.get(C), 0, 4 * C));
}

// V of tiles first.. of the large side's channels c0 .. c0 + C; at each position, phases that have it.
template <class L, class T>
static void gather_of(const L& g, const T* x, long first, long c0, long C, const Block& block) {
  const long position = block.position(), chunk = block.chunk(), slot = C / CHUNK * chunk;
  const T* zeros = no_pixel<T>(C);
  for (long t = 0; t < block.count; t++) {
    const auto tile = g.tile(first + t);
    float* to = block.at(t);
    each_phase<L>([=, &g](auto phase) {
      using F = decltype(phase);
      const T* from[F::POSITIONS];
      g.template large<F::R, F::S>(x + c0, tile, zeros, from);
      for (long c = 0; c < C; c += CHUNK)
        for (int lane = 0; lane < CHUNK; lane += LANES) {
          vec v[F::POSITIONS];
#pragma GCC unroll 36
          for (int e = 0; e < F::POSITIONS; e++) v[e] = load(from[e] + c + lane);
          both<F::COLUMNS>(v, F::COLUMNS, F::LINES, F::Column::gather, F::Row::gather);
          float* out = to + c / CHUNK * chunk + lane;
#pragma GCC unroll 36
          for (int e = 0; e < F::POSITIONS; e++)
            store(out + F::position(e) * position + F::SLOT[e] * slot, v[e]);
        }
    });
  }
}

template <class L>
static void gather(const L& g, Operand x, long first, long c0, long C, const Block& block) {
  x.narrow ? gather_of(g, x.half(), first, c0, C, block)
           : gather_of(g, x.wide(), first, c0, C, block);
}

// S of tiles first.. of the small side's channels c0 .. c0 + C.
template <class L, class T>
static void spread_of(const L& g, const T* y, long first, long c0, long C, const Block& block) {
  constexpr int M = L::M, SIDE = L::SIDE, POSITIONS = L::POSITIONS;
  const T* zeros = no_pixel<T>(C);
  for (long t = 0; t < block.count; t++) {
    const auto tile = g.tile(first + t);
    const T* from[M * M];
    g.small(y + c0, tile, zeros, from);
    for (long c = 0; c < C; c += CHUNK)
      for (int lane = 0; lane < CHUNK; lane += LANES) {
        vec v[POSITIONS];
#pragma GCC unroll 16
        for (int e = 0; e < M * M; e++)
          v[e / M * SIDE + e % M] = load(from[e] + c + lane);
        constexpr auto line = Pixels<M, L::T>::spread;
        both<SIDE>(v, M, SIDE, line, line);
        float* out = block.at(t) + c / CHUNK * block.chunk() + lane;
#pragma GCC unroll 36
        for (int e = 0; e < POSITIONS; e++) store(out + e * block.position(), v[e]);
      }
  }
}

template <class L>
static void spread(const L& g, Operand y, long first, long c0, long C, const Block& block) {
  y.narrow ? spread_of(g, y.half(), first, c0, C, block)
           : spread_of(g, y.wide(), first, c0, C, block);
}

// U of the phase F: out[position * stride + slot * each], from its taps, of which load(k) is the k-th
// of the kernel.
template <class F, class L, class Load>
static inline void transform_taps(const L& g, const Load& tap, float* out, long stride, long each) {
  vec u[F::POSITIONS];
#pragma GCC unroll 9
  for (int t = 0; t < F::TR * F::TS; t++) {
    const int i = t / F::TS, j = t % F::TS;
    u[i * F::COLUMNS + j] = tap(g.tap(F::R, F::S, i, j));
  }
  both<F::COLUMNS>(u, F::TS, F::LINES, F::Column::weights, F::Row::weights);
#pragma GCC unroll 36
  for (int e = 0; e < F::POSITIONS; e++)
    store(out + F::position(e) * stride + F::SLOT[e] * each, u[e]);
}

// One panel of columns, WIDTH, of a position's matrix product: [tiles, K] x [K, WIDTH].
static inline void multiply(const Block& block, int position, long K, const float* panel,
                            float* out) {
  for (long t = 0; t < block.count; t += ROWS)
    product<ROWS>(block.at(t) + position * block.position(), CHUNK, ROWS * CHUNK, panel, K,
                  out + t * WIDTH, WIDTH);
}

constexpr long CACHE = 600 << 10;  // bytes of a block of transformed tiles: most of a usual L2
constexpr long LEAST = 64;         // tiles in a block, each of which reads all the weights

// Tiles in a block, a multiple of ROWS, of so many floats each.
template <class L> static long tiles_a_block(const L& g, long floats, int threads) {
  long most = std::max(LEAST, CACHE / (4 * floats)) / ROWS * ROWS;
  return std::min(most, cdiv(cdiv(g.tiles(), threads), ROWS) * ROWS);
}

// ---- the three functions
//
// Tasks copy the layer: for all that the compiler knows, a store may change what they refer to.

// With `mirrored` the weight is [CL, K, K, CS], its taps in reverse: down of the transposed layer.
template <class L>
static void down(const L& layer, Operand x, const float* w, const float* bias, Result out,
                 float slope, bool mirrored, int threads) {
  const L g = layer;
  constexpr int M = L::M, SIDE = L::SIDE, POSITIONS = L::POSITIONS, TAPS = L::KERNEL * L::KERNEL;
  const long CL = g.CL, K = L::PHASES * CL, panels = g.CS / WIDTH, stride = g.CS * K;
  float* U = weights_scratch.get(POSITIONS * stride);  // [POSITIONS][CS / WIDTH][K][WIDTH]
  parallel(threads, panels * (CL / CHUNK), [&](long task) {
    const L g = layer;
    const long panel = task % panels, c0 = task / panels * CHUNK;
    alignas(64) float taps[TAPS][CHUNK][WIDTH];
    if (mirrored)
      for (int c = 0; c < CHUNK; c++)
        for (int k = 0; k < TAPS; k++)
          std::memcpy(taps[TAPS - 1 - k][c], w + ((c0 + c) * TAPS + k) * g.CS + panel * WIDTH,
                      4 * WIDTH);
    else
      for (int s = 0; s < WIDTH; s++)
        for (int k = 0; k < TAPS; k++)
          for (int c = 0; c < CHUNK; c++)
            taps[k][c][s] = w[((panel * WIDTH + s) * TAPS + k) * CL + c0 + c];
    each_phase<L>([&](auto phase) {
      for (int c = 0; c < CHUNK; c++)
        for (int lane = 0; lane < WIDTH; lane += LANES)
          transform_taps<decltype(phase)>(
              g, [&](long k) { return load(taps[k][c] + lane); },
              U + (panel * K + c0 + c) * WIDTH + lane, stride, CL * WIDTH);
    });
  });
  const long each = tiles_a_block(g, L::products() * CL, threads);
  parallel(threads, cdiv(g.tiles(), each), [&](long task) {
    const L g = layer;
    const long first = task * each, count = std::min(each, g.tiles() - first);
    const long pitch = cdiv(count, ROWS) * ROWS * WIDTH + PAD;
    const long size = Block::size(each, K, ROWS);
    float* scratch = block_scratch.get(POSITIONS * (size + each * WIDTH + PAD));
    float* products = scratch + POSITIONS * size;
    Block V{scratch, count, K, ROWS};
    gather(g, x, first, 0, CL, V);
    for (long panel = 0; panel < panels; panel++) {
      for (int e = 0; e < POSITIONS; e++)
        multiply(V, e, L::slot(e, L::PHASES) * CL, U + e * stride + panel * K * WIDTH,
                 products + e * pitch);
      auto finish = [&](auto* y, long t) {
        decltype(y) to[M * M];
        g.small(y + panel * WIDTH, g.tile(first + t), decltype(y)(nullptr), to);
        for (int lane = 0; lane < WIDTH; lane += LANES) {
          vec m[POSITIONS];
#pragma GCC unroll 36
          for (int e = 0; e < POSITIONS; e++) m[e] = load(products + e * pitch + t * WIDTH + lane);
          constexpr auto line = Pixels<M, L::T>::collect;
          both<SIDE>(m, SIDE, M, line, line);
          const vec shift = bias ? load(bias + panel * WIDTH + lane) : vec{};
#pragma GCC unroll 16
          for (int e = 0; e < M * M; e++)
            if (to[e]) store(to[e] + lane, activate(m[e / M * SIDE + e % M] + shift, slope));
        }
      };
      for (long t = 0; t < count; t++)
        out.narrow ? finish(out.half(), t) : finish(out.wide(), t);
    }
  });
}

template <class L>
static void up(const L& layer, Operand y, const float* w, const float* bias, Result out,
               float slope, int threads) {
  const L g = layer;
  constexpr int POSITIONS = L::POSITIONS, TAPS = L::KERNEL * L::KERNEL;
  const long CL = g.CL, K = g.CS, stride = L::PHASES * CL * K;
  float* U = weights_scratch.get(POSITIONS * stride);  // [POSITIONS][PHASES][CL / WIDTH][K][WIDTH]
  parallel(threads, K / CHUNK, [&](long task) {
    const L g = layer;
    for (long s = task * CHUNK; s < (task + 1) * CHUNK; s++)
      each_phase<L>([&](auto phase) {
        for (long c = 0; c < CL; c += LANES)
          transform_taps<decltype(phase)>(
              g, [&](long k) { return load(w + (s * TAPS + k) * CL + c); },
              U + (c / WIDTH * K + s) * WIDTH + c % WIDTH, stride, CL * K);
      });
  });
  // Neighbouring tiles add to the same pixels: an image belongs to one task.
  const long image = g.rows() * g.columns(), most = tiles_a_block(g, POSITIONS * K, threads);
  const long images = std::max<long>(1, most / image);
  const long each = std::min(most, cdiv(images * image, ROWS) * ROWS);
  parallel(threads, cdiv(g.N, images), [&](long task) {
    const L g = layer;
    const long last = std::min((task + 1) * images, g.N) * image, values = g.H * g.W * CL;
    // Sums of this task's images, in place or on their way to bfloat16; x is where image 0 would be.
    const long begin = task * images * values, size_of = last / image * values - begin;
    float* sums = out.narrow ? image_scratch.get(size_of) : out.wide() + begin;
    float* x = sums - begin;
    if (!g.whole()) std::fill(sums, sums + size_of, 0.f);
    const long size = Block::size(each, K, ROWS);
    float* scratch = block_scratch.get(POSITIONS * (size + each * WIDTH + PAD));
    float* products = scratch + POSITIONS * size;
    for (long first = task * images * image; first < last; first += each) {
      Block S{scratch, std::min(each, last - first), K, ROWS};
      const long pitch = cdiv(S.count, ROWS) * ROWS * WIDTH + PAD;
      spread(g, y, first, 0, K, S);
      each_phase<L>([&](auto phase) {
        using F = decltype(phase);
        for (long panel = 0; panel < CL; panel += WIDTH) {
          for (int e = 0; e < F::POSITIONS; e++)
            multiply(S, F::position(e), K,
                     U + F::position(e) * stride + (F::SLOT[e] * CL + panel) * K,
                     products + e * pitch);
          for (long t = 0; t < S.count; t++) {
            const auto tile = g.tile(first + t);
            float* to[F::POSITIONS];
            g.template large<F::R, F::S>(x + panel, tile, (float*)nullptr, to);
            for (int lane = 0; lane < WIDTH; lane += LANES) {
              vec d[F::POSITIONS];
#pragma GCC unroll 36
              for (int e = 0; e < F::POSITIONS; e++)
                d[e] = load(products + e * pitch + t * WIDTH + lane);
              both<F::COLUMNS>(d, F::COLUMNS, F::LINES, F::Column::scatter, F::Row::scatter);
#pragma GCC unroll 36
              for (int e = 0; e < F::POSITIONS; e++)
                if (to[e]) {
                  bool more = (e / F::COLUMNS < F::TR - 1 && tile.a > 0) ||
                              (e % F::COLUMNS < F::TS - 1 && tile.b > 0);
                  float* sum = to[e] + lane;
                  store(sum, more ? load(sum) + d[e] : d[e]);
                }
            }
          }
        }
      });
    }
    auto finish = [&](auto* to) {
      for (long i = 0; i < size_of; i += CL)
        for (long c = 0; c < CL; c += LANES)
          store(to + i + c, activate(load(sums + i + c) + (bias ? load(bias + c) : vec{}), slope));
    };
    if (out.narrow)
      finish(out.half() + begin);
    else if (bias || slope != 1)
      finish(sums);
  });
}

// The largest of 128, 64, ... that divides n.
static inline long share(long n) {
  long found = 128;
  while (n % found) found /= 2;
  return found;
}

template <class L>
static void weight_gradient(const L& layer, Operand y, Operand x, float* dw, int threads) {
  const L g = layer;
  constexpr int POSITIONS = L::POSITIONS, TAPS = L::KERNEL * L::KERNEL;
  constexpr long TILES = 64, PITCH = TILES + 1;  // PITCH: as PAD
  constexpr long NARROW = std::max(WIDTH, CHUNK);
  // A task has so many channels of each side. Where that makes few tasks, they have a part of the tiles.
  const long CL = g.CL, rows = share(g.CS), wide = share(CL);
  const long channels = L::PHASES == 1 ? wide : NARROW, columns = L::PHASES * channels;
  const long pairs = CL / channels * (g.CS / rows);
  const long parts = L::PHASES == 1 ? std::max(1L, std::min(16 / pairs, g.tiles() / (4 * TILES))) : 1;
  const long most = cdiv(cdiv(g.tiles(), parts), TILES) * TILES;  // tiles of a part
  const long sums = rows * columns;
  const long V_size = Block::size(TILES, columns, PITCH), S_size = Block::size(TILES, rows, PITCH);
  float* all_sums = parts > 1 ? weights_scratch.get(parts * pairs * POSITIONS * sums) : nullptr;
  // From the sums [POSITIONS][rows][PHASES][channels] of a pair.
  auto finish = [&](long pair, const float* dU) {
    const long c0 = pair % (CL / channels) * channels, s0 = pair / (CL / channels) * rows;
    for (long s = 0; s < rows; s++)
      each_phase<L>([&](auto phase) {
        using F = decltype(phase);
        for (long c = 0; c < channels; c += LANES) {
          vec u[F::POSITIONS];
          for (int e = 0; e < F::POSITIONS; e++)
            u[e] = load(dU + F::position(e) * sums + s * columns + F::SLOT[e] * channels + c);
          both<F::COLUMNS>(u, F::COLUMNS, F::TR, F::Column::gradient, F::Row::gradient);
          for (int i = 0; i < F::TR; i++)
            for (int j = 0; j < F::TS; j++)
              store(dw + ((s0 + s) * TAPS + g.tap(F::R, F::S, i, j)) * CL + c0 + c,
                    u[i * F::COLUMNS + j]);
        }
      });
  };
  parallel(threads, pairs * parts, [&](long task) {
    const L g = layer;
    // A constant with four phases, and to the compiler as well.
    const long channels = L::PHASES == 1 ? wide : NARROW, columns = L::PHASES * channels;
    const long pair = task % pairs, begin = task / pairs * most;
    const long end = std::min(begin + most, g.tiles());
    const long c0 = pair % (CL / channels) * channels, s0 = pair / (CL / channels) * rows;
    float* scratch = block_scratch.get(POSITIONS * (sums + V_size + S_size));
    float* dU = parts > 1 ? all_sums + task * POSITIONS * sums : scratch;
    float* gathered = scratch + POSITIONS * sums;
    float* spreaded = gathered + POSITIONS * V_size;
    std::memset(dU, 0, 4 * POSITIONS * sums);
    for (long first = begin; first < end; first += TILES) {
      const long count = std::min(TILES, end - first);
      Block V{gathered, count, columns, PITCH}, S{spreaded, count, rows, PITCH};
      gather(g, x, first, c0, channels, V);
      spread(g, y, first, s0, rows, S);
      for (int e = 0; e < POSITIONS; e++)
        for (long column = 0; column < L::slot(e, L::PHASES) * channels; column += WIDTH)
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
    if (parts == 1) finish(pair, dU);
  });
  if (parts == 1) return;
  parallel(threads, pairs, [&](long pair) {
    float* dU = all_sums + pair * POSITIONS * sums;
    for (long part = 1; part < parts; part++) {
      const float* more = all_sums + (part * pairs + pair) * POSITIONS * sums;
      for (long i = 0; i < POSITIONS * sums; i += LANES) store(dU + i, load(dU + i) + load(more + i));
    }
    finish(pair, dU);
  });
}

// ---- as called from Python

// f(Layer) of a kernel 3x3, 4x4 or 5x5 in tiles 2x2 or 4x4.
template <class F>
static void with_layer(int tile, long N, long P, long Q, long CS, long H, long W, long CL,
                       long kernel, long stride, long pad, long left, const F& f) {
  auto run = [&](auto two, auto four) {
    if (tile == 2)
      f(decltype(two){N, P, Q, CS, H, W, CL, stride, pad, left});
    else
      f(decltype(four){N, P, Q, CS, H, W, CL, stride, pad, left});
  };
  if (kernel == 3)
    run(Layer<2, 3, 0>{}, Layer<4, 3, 0>{});
  else if (kernel == 4)
    run(Layer<2, 2, 2>{}, Layer<4, 2, 2>{});
  else
    run(Layer<2, 3, 2>{}, Layer<4, 3, 2>{});
}

// y = activate(down(x) + bias); bias may be null. What is narrow is bfloat16, else float32.
extern "C" void fastdcgan_down(const void* x, int x_narrow, const float* w, const float* bias, void* y,
                               int y_narrow, int tile, long N, long P, long Q, long CS, long H, long W,
                               long CL, long kernel, long stride, long pad, long left, float slope,
                               int threads) {
  const Operand from{x, x_narrow != 0};
  const Result to{y, y_narrow != 0};
  with_layer(tile, N, P, Q, CS, H, W, CL, kernel, stride, pad, left,
             [&](const auto& g) { down(g, from, w, bias, to, slope, false, threads); });
}

// x = activate(up(y) + bias), in the same way.
extern "C" void fastdcgan_up(const void* y, int y_narrow, const float* w, const float* bias, void* x,
                             int x_narrow, int tile, long N, long P, long Q, long CS, long H, long W,
                             long CL, long kernel, long stride, long pad, long left, float slope,
                             int threads) {
  const Operand from{y, y_narrow != 0};
  const Result to{x, x_narrow != 0};
  if (stride == 1)
    with_layer(tile, N, H, W, CL, P, Q, CS, kernel, 1, kernel - 1 - pad, kernel - 1 - left,
               [&](const auto& g) { down(g, from, w, bias, to, slope, true, threads); });
  else
    with_layer(tile, N, P, Q, CS, H, W, CL, kernel, stride, pad, left, [&](const auto& g) {
      if constexpr (std::decay_t<decltype(g)>::PIECES == 2)
        up(g, from, w, bias, to, slope, threads);
    });
}

extern "C" void fastdcgan_weight_gradient(const void* y, int y_narrow, const void* x, int x_narrow,
                                          float* dw, int tile, long N, long P, long Q, long CS, long H,
                                          long W, long CL, long kernel, long stride, long pad,
                                          long left, int threads) {
  const Operand small{y, y_narrow != 0}, large{x, x_narrow != 0};
  with_layer(tile, N, P, Q, CS, H, W, CL, kernel, stride, pad, left,
             [&](const auto& g) { weight_gradient(g, small, large, dw, threads); });
}

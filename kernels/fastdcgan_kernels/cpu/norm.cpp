// BatchNorm with the batch's statistics, and activation, over float32 NHWC tensors seen as
// [groups, rows, C]: forward and backward. Not here: convolutions, and tanh.
//
// With rstd = 1 / sqrt(var + eps), z = gamma * rstd * (y - mean) + beta, out = activate(z):
//     dz = g * activate'(z)    dbeta = sum dz    dgamma = rstd * sum dz * (y - mean)
//     dy = gamma * rstd * (dz - dbeta / rows - rstd * dgamma / rows * (y - mean))
// Sums are taken over parts of PART rows, and those are added in their order, in float64.
#include "common.h"

#include <cmath>

constexpr long PART = 128;  // rows; with them a part of 512 channels is 256 KB

static thread_local Scratch parts_scratch, coefficients_scratch;

namespace {
struct Part {
  long group, first, last;  // rows first .. last of the group
};

struct Shape {
  long groups, rows, C;
  long parts() const { return cdiv(rows, PART); }
  Part part(long task) const {
    long first = task % parts() * PART;
    return {task / parts(), first, std::min(rows, first + PART)};
  }
};

// Row `row` of a group's coefficients, [groups, K, C], a vector at c.
template <int K>
inline vec coefficient(const float* table, long group, int row, long C, long c) {
  return load(table + (group * K + row) * C + c);
}
}  // namespace

template <class T>
static void norm(const float* y, const float* gamma, const float* beta, float* mean, float* var,
                 T* out, long groups, long rows, long C, float eps, float slope, int threads) {
  const Shape shape{groups, rows, C};
  float* found = parts_scratch.get(groups * shape.parts() * 2 * C);  // mean, squares about it
  parallel(threads, groups * shape.parts(), [&](long task) {
    const Part part = shape.part(task);
    const float* from = y + (part.group * rows + part.first) * C;
    const long count = part.last - part.first;
    float *own = found + task * 2 * C, *squares = own + C;
    std::fill(own, own + 2 * C, 0.f);
    for (long r = 0; r < count; r++)
      for (long c = 0; c < C; c += LANES) store(own + c, load(own + c) + load(from + r * C + c));
    for (long c = 0; c < C; c += LANES) store(own + c, load(own + c) / all(count));
    for (long r = 0; r < count; r++)
      for (long c = 0; c < C; c += LANES) {
        vec d = load(from + r * C + c) - load(own + c);
        store(squares + c, load(squares + c) + d * d);
      }
  });
  float* table = coefficients_scratch.get(groups * 3 * C);  // [groups, 3, C]: mean, scale, shift
  parallel(threads, groups * (C / CHUNK), [&](long task) {
    const long group = task / (C / CHUNK), c0 = task % (C / CHUNK) * CHUNK;
    double count = 0, middle[CHUNK] = {}, squares[CHUNK] = {};
    for (long p = 0; p < shape.parts(); p++) {  // Chan, Golub and LeVeque 1979
      const float* own = found + (group * shape.parts() + p) * 2 * C + c0;
      const double more = std::min(rows, (p + 1) * PART) - p * PART, share = more / (count + more);
      for (int c = 0; c < CHUNK; c++) {
        const double apart = own[c] - middle[c];
        middle[c] += apart * share;
        squares[c] += own[C + c] + apart * apart * count * share;
      }
      count += more;
    }
    for (int c = 0; c < CHUNK; c++) {
      float* row = table + group * 3 * C + c0 + c;
      row[0] = mean[group * C + c0 + c] = middle[c];
      var[group * C + c0 + c] = squares[c] / count;
      row[C] = (gamma ? gamma[c0 + c] : 1) / std::sqrt(squares[c] / count + eps);
      row[2 * C] = beta ? beta[c0 + c] : 0;
    }
  });
  parallel(threads, groups * shape.parts(), [&](long task) {
    const Part part = shape.part(task);
    for (long r = part.first; r < part.last; r++)
      for (long c = 0; c < C; c += LANES) {
        const long at = (part.group * rows + r) * C + c;
        vec d = load(y + at) - coefficient<3>(table, part.group, 0, C, c);
        vec z = coefficient<3>(table, part.group, 1, C, c) * d +
                coefficient<3>(table, part.group, 2, C, c);
        store(out + at, activate(z, slope));
      }
  });
}

template <class T>
static void norm_gradient(const T* g, const float* y, const float* gamma, const float* beta,
                          const float* mean, const float* var, float* dy, float* dgamma,
                          float* dbeta, long groups, long rows, long C, float eps, float slope,
                          int threads) {
  const Shape shape{groups, rows, C};
  // [groups, 5, C]: mean, scale, shift, and dy = scale * dz + b * (y - mean) + c.
  float* table = coefficients_scratch.get(groups * 5 * C);
  for (long group = 0; group < groups; group++)
    for (long c = 0; c < C; c++) {
      float* row = table + group * 5 * C + c;
      row[0] = mean[group * C + c];
      row[C] = (gamma ? gamma[c] : 1) / std::sqrt(double(var[group * C + c]) + eps);
      row[2 * C] = beta ? beta[c] : 0;
    }
  auto at_row = [&](const Part& part, long r, long c, vec& d) {  // dz, and y - mean
    const long at = (part.group * rows + r) * C + c;
    d = load(y + at) - coefficient<5>(table, part.group, 0, C, c);
    vec z = coefficient<5>(table, part.group, 1, C, c) * d +
            coefficient<5>(table, part.group, 2, C, c);
    vec upstream = load(g + at);
    return z > 0 ? upstream : upstream * slope;
  };
  float* found = parts_scratch.get(groups * shape.parts() * 2 * C);  // sums of dz, dz * (y - mean)
  parallel(threads, groups * shape.parts(), [&](long task) {
    const Part part = shape.part(task);
    float *own = found + task * 2 * C, *second = own + C;
    std::fill(own, own + 2 * C, 0.f);
    for (long r = part.first; r < part.last; r++)
      for (long c = 0; c < C; c += LANES) {
        vec d, dz = at_row(part, r, c, d);
        store(own + c, load(own + c) + dz);
        store(second + c, load(second + c) + dz * d);
      }
  });
  parallel(threads, C / CHUNK, [&](long task) {
    const long c0 = task * CHUNK;
    double all_beta[CHUNK] = {}, all_gamma[CHUNK] = {};
    for (long group = 0; group < groups; group++) {
      double first[CHUNK] = {}, second[CHUNK] = {};
      for (long p = 0; p < shape.parts(); p++) {
        const float* own = found + (group * shape.parts() + p) * 2 * C + c0;
        for (int c = 0; c < CHUNK; c++) first[c] += own[c], second[c] += own[C + c];
      }
      for (int c = 0; c < CHUNK; c++) {
        const double rstd = 1 / std::sqrt(double(var[group * C + c0 + c]) + eps);
        float* row = table + group * 5 * C + c0 + c;
        row[3 * C] = -row[C] * rstd * rstd * second[c] / rows;
        row[4 * C] = -row[C] * first[c] / rows;
        all_beta[c] += first[c], all_gamma[c] += rstd * second[c];
      }
    }
    for (int c = 0; c < CHUNK; c++) {
      if (dbeta) dbeta[c0 + c] = all_beta[c];
      if (dgamma) dgamma[c0 + c] = all_gamma[c];
    }
  });
  parallel(threads, groups * shape.parts(), [&](long task) {
    const Part part = shape.part(task);
    for (long r = part.first; r < part.last; r++)
      for (long c = 0; c < C; c += LANES) {
        vec d, dz = at_row(part, r, c, d);
        store(dy + (part.group * rows + r) * C + c,
              coefficient<5>(table, part.group, 1, C, c) * dz +
                  coefficient<5>(table, part.group, 3, C, c) * d +
                  coefficient<5>(table, part.group, 4, C, c));
      }
  });
}

// mean and var (biased), [groups, C], of y; out = activate(z), bfloat16 where narrow, else float32.
// gamma and beta may be null: 1 and 0.
extern "C" void fastdcgan_norm(const float* y, const float* gamma, const float* beta, float* mean,
                               float* var, void* out, int narrow, long groups, long rows, long C,
                               float eps, float slope, int threads) {
  const Result to{out, narrow != 0};
  auto run = [&](auto* out) {
    norm(y, gamma, beta, mean, var, out, groups, rows, C, eps, slope, threads);
  };
  to.narrow ? run(to.half()) : run(to.wide());
}

// dy, and dgamma and dbeta [C], from g, the gradient of `out`, like it. dgamma and dbeta may be null.
extern "C" void fastdcgan_norm_gradient(const void* g, int narrow, const float* y, const float* gamma,
                                        const float* beta, const float* mean, const float* var,
                                        float* dy, float* dgamma, float* dbeta, long groups,
                                        long rows, long C, float eps, float slope, int threads) {
  const Operand from{g, narrow != 0};
  auto run = [&](const auto* g) {
    norm_gradient(g, y, gamma, beta, mean, var, dy, dgamma, dbeta, groups, rows, C, eps, slope,
                  threads);
  };
  from.narrow ? run(from.half()) : run(from.wide());
}

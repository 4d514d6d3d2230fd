// Noise of members: Philox4x32-10 and Box-Muller, in groups of counters that fill vector registers.
//
// Polynomials take the place of libm's functions, which compilers do not turn into vector code: their arguments are
// small, for the angle is reduced exactly, on its bits.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

const int GROUP = 64;

// Terms suffice for full precision: of the logarithm for |s| < 0.172, of sine and cosine for |t| <= pi / 4.
template <class T> struct Real;
template <> struct Real<float> {
  using Bits = uint32_t;
  static constexpr Bits ROOT_HALF = 0x3f3504f3, MANTISSA = 23;
  static constexpr int LOGARITHM = 5, WAVE = 5;
  static constexpr uint32_t ANGLE = 0xffffff00;
};
template <> struct Real<double> {
  using Bits = uint64_t;
  static constexpr Bits ROOT_HALF = 0x3fe6a09e667f3bcd, MANTISSA = 52;
  static constexpr int LOGARITHM = 11, WAVE = 9;
  static constexpr uint32_t ANGLE = 0xffffffff;
};

// log of x in [2^-32, 1]: x = m 2^e with m in [sqrt(1/2), sqrt(2)), and log m = 2 artanh((m - 1) / (m + 1)).
template <class T> inline T logarithm(T x) {
  using R = Real<T>;
  using Bits = typename R::Bits;
  Bits bits;
  std::memcpy(&bits, &x, sizeof x);
  Bits shifted = (bits - R::ROOT_HALF + (Bits(64) << R::MANTISSA)) >> R::MANTISSA;
  bits -= (shifted - 64) << R::MANTISSA;
  T m;
  std::memcpy(&m, &bits, sizeof m);
  T s = (m - 1) / (m + 1), z = s * s, sum = 0;
#pragma GCC unroll 16
  for (int k = R::LOGARITHM; k >= 0; --k) sum = sum * z + T(1.0 / (2 * k + 1));
  return T(int32_t(shifted) - 64) * T(0.69314718055994530942) + 2 * s * sum;
}

// u of the bits of `a`, the angle of those of `b`, as `philox.normal_pair` takes them.
template <class T> inline void normals(uint32_t a, uint32_t b, T &first, T &second) {
  using R = Real<T>;
  // The halves are exact, so that their sum rounds once, as the whole word would.
  T u = (T(int32_t(a >> 16)) * 65536 + (T(int32_t(a & 0xffff)) + 1)) * T(0x1p-32);
  T radius = std::sqrt(-2 * logarithm(u));
  b &= R::ANGLE;
  uint32_t quarter = (b + (1u << 29)) >> 30;
  T t = T(int32_t(b - (quarter << 30))) * T(1.46291807926715968053e-9);  // 2 pi / 2^32
  T z = t * t, sine = 1, cosine = 1;
#pragma GCC unroll 16
  for (int k = R::WAVE; k > 0; --k) {
    sine = 1 - z * T(1.0 / (2 * k * (2 * k + 1))) * sine;
    cosine = 1 - z * T(1.0 / (2 * k * (2 * k - 1))) * cosine;
  }
  sine *= t;
  T x = quarter & 1 ? sine : cosine, y = quarter & 1 ? cosine : sine;
  first = radius * ((quarter + 1) & 2 ? -x : x);
  second = radius * (quarter & 2 ? -y : y);
}

struct Counters {
  uint32_t c0[GROUP], c1[GROUP], c2[GROUP], c3[GROUP], k0[GROUP], k1[GROUP];
};

inline void encrypt(Counters &c) {
  for (int i = 0; i < GROUP; ++i) {
    uint32_t c0 = c.c0[i], c1 = c.c1[i], c2 = 0, c3 = 0, k0 = c.k0[i], k1 = c.k1[i];
#pragma GCC unroll 10
    for (int turn = 0; turn < 10; ++turn) {
      uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
      c0 = uint32_t(p1 >> 32) ^ c1 ^ k0, c1 = uint32_t(p1);
      c2 = uint32_t(p0 >> 32) ^ c3 ^ k1, c3 = uint32_t(p0);
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    c.c0[i] = c0, c.c1[i] = c1, c.c2[i] = c2, c.c3[i] = c3;
  }
}

template <class T> inline void signs(const uint32_t *word, T *number) {
  for (int i = 0; i < GROUP; ++i) number[i] = T(1 - 2 * int32_t(word[i] >> 31));
}

// Counters begin, ..., end - 1 of all lanes in a row; a lane has `size` numbers, from its counter `offset` on.
template <class T>
void draw(const int64_t *keys, const int64_t *members, int64_t blocks, int64_t offset, int64_t size, int64_t begin,
          int64_t end, int32_t rademacher, T *out) {
  const int64_t width = (size + 3) / 4;
  Counters c;
  T z[4][GROUP];
  std::memset(&c, 0, sizeof c);
  for (int64_t base = begin; base < end; base += GROUP) {
    const int count = int(end - base < GROUP ? end - base : GROUP);
    int64_t lane = base / width, block = base % width;
    for (int i = 0; i < count; ++i) {
      uint64_t counter = uint64_t(members[lane]) * uint64_t(blocks) + uint64_t(offset + block);
      c.c0[i] = uint32_t(counter), c.c1[i] = uint32_t(counter >> 32);
      c.k0[i] = uint32_t(keys[2 * lane]), c.k1[i] = uint32_t(keys[2 * lane + 1]);
      if (++block == width) block = 0, ++lane;
    }
    encrypt(c);
    if (rademacher) {
      signs(c.c0, z[0]), signs(c.c1, z[1]), signs(c.c2, z[2]), signs(c.c3, z[3]);
    } else {
      for (int i = 0; i < GROUP; ++i) normals(c.c0[i], c.c1[i], z[0][i], z[1][i]);
      for (int i = 0; i < GROUP; ++i) normals(c.c2[i], c.c3[i], z[2][i], z[3][i]);
    }
    lane = base / width, block = base % width;
    for (int i = 0; i < count; ++i) {
      T *to = out + lane * size + 4 * block;
      const int64_t left = size - 4 * block;
      if (left >= 4) {
        to[0] = z[0][i], to[1] = z[1][i], to[2] = z[2][i], to[3] = z[3][i];
      } else {
        for (int64_t k = 0; k < left; ++k) to[k] = z[k][i];
      }
      if (++block == width) block = 0, ++lane;
    }
  }
}

}  // namespace

extern "C" {

void draw_float(const int64_t *keys, const int64_t *members, int64_t blocks, int64_t offset, int64_t size,
                int64_t begin, int64_t end, int32_t rademacher, float *out) {
  draw<float>(keys, members, blocks, offset, size, begin, end, rademacher, out);
}

void draw_double(const int64_t *keys, const int64_t *members, int64_t blocks, int64_t offset, int64_t size,
                 int64_t begin, int64_t end, int32_t rademacher, double *out) {
  draw<double>(keys, members, blocks, offset, size, begin, end, rademacher, out);
}

}

// exp(x) for float: x = n ln2 + r, |r| <= ln2 / 2, exp(r) = 1 + r + r^2 p(r). Same steps on every ISA:
//   x = min(max(x, kExpMin), kExpMax); n = rint(x * kLog2e);
//   r = fma(n, -kLn2High, x); r = fma(n, -kLn2Low, r);
//   p = Horner over kExpPoly by fma; y = fma(p, r * r, r) + 1; result = y * 2^n (built from the exponent bits).
// Coefficients are the minimax set of Cephes' expf; relative error below 2 ulp, tested against double precision.
#pragma once

namespace tkt {

constexpr float kExpMin =
    -86.6f;  // exp(-86.6) is a normal float: denormals, and with them flush-to-zero modes, stay out
constexpr float kExpMax = 88.3f;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2High = 0.693359375f;  // 9 significant bits: n * kLn2High is exact
constexpr float kLn2Low = -2.12194440e-4f;
constexpr float kExpPoly[6] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                               4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
constexpr float kSmallestAmax = 1e-30f;  // below it a block of activations counts as zero

}  // namespace tkt

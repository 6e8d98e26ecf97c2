"""A path of tilted Gaussian marginals in one dimension, and exact expectations along its discretised processes.

Plain Python, nothing imported from the package.  Rectified flow, X_t = t X_1 + (1 - t) eps, base N(mu, v), reward
-q (x - c)^2/2, r_t = t r (so lam is in q), constant sigma:

    p_t  = N(t mu, S_t),    S_t = t^2 v + (1 - t)^2
    pi_t = N(n_t, T_t),     1/T_t = 1/S_t + t q,     n_t/T_t = t mu/S_t + t q c

*Exact transport*: the velocity n' + T'/(2T) (x - n) moves pi_t as t goes on; w is this minus the base's.

*Recursion.*  E[exp(sum_k c_k(X_k, X_{k+1}) + r_1(X_K))] for quadratic c_k and affine Gaussian kernels, backwards: with
V_{k+1}(y) = log of what is left of the expectation at y,  V_k(x) = log int N(y; a x + b, s^2) exp(c_k + V_{k+1}) dy.
A quadratic function of (x, y) is a dictionary of the coefficients of x^i y^j.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

Affine = tuple[float, float]  # slope and intercept
Quadratic = dict[tuple[int, int], float]


def square(i: float, x: float, y: float, factor: float) -> Quadratic:
    """factor (i + x X + y Y)^2."""
    return {
        (0, 0): factor * i * i, (1, 0): 2 * factor * i * x, (0, 1): 2 * factor * i * y,
        (2, 0): factor * x * x, (1, 1): 2 * factor * x * y, (0, 2): factor * y * y,
    }  # fmt: skip


def add(*terms: Quadratic) -> Quadratic:
    return {key: sum(t.get(key, 0.0) for t in terms) for key in {key for t in terms for key in t}}


def log_normal(slope: float, intercept: float, s2: float) -> Quadratic:
    """log N(y; slope x + intercept, s2)."""
    return add(square(-intercept, -slope, 1.0, -0.5 / s2), {(0, 0): -0.5 * math.log(2 * math.pi * s2)})


def log_normal_back(slope: float, intercept: float, s2: float) -> Quadratic:
    """log N(x; slope y + intercept, s2)."""
    return add(square(-intercept, 1.0, -slope, -0.5 / s2), {(0, 0): -0.5 * math.log(2 * math.pi * s2)})


def minus(term: Quadratic) -> Quadratic:
    return {key: -value for key, value in term.items()}


def integrate(term: Quadratic) -> Quadratic:
    """log int exp(term) dy, a quadratic in x."""
    p = -2 * term.get((0, 2), 0.0)
    assert p > 0, "the expectation is infinite"
    b0, b1 = term.get((0, 1), 0.0), term.get((1, 1), 0.0)
    rest = {key: value for key, value in term.items() if key[1] == 0}
    return add(rest, square(b0, b1, 0.0, 0.5 / p), {(0, 0): 0.5 * math.log(2 * math.pi / p)})


def in_y(term: Quadratic) -> Quadratic:
    """A quadratic in x, now of y."""
    return {(j, i): value for (i, j), value in term.items()}


@dataclass(frozen=True)
class GaussianPath:
    mu: float = 1.5
    v: float = 0.5
    q: float = 2.5
    c: float = 3.0
    sigma: float = 1.0
    transport: bool = False

    def base(self, t: float) -> Affine:
        """Mean and variance of p_t."""
        return t * self.mu, t * t * self.v + (1 - t) ** 2

    def tilted(self, t: float) -> Affine:
        """Mean and variance of pi_t."""
        m, s = self.base(t)
        var = 1 / (1 / s + t * self.q)
        return var * (m / s + t * self.q * self.c), var

    @property
    def log_z(self) -> float:
        grow = 1 + self.q * self.v
        return -0.5 * math.log(grow) - self.q * (self.mu - self.c) ** 2 / (2 * grow)

    def _moving(self, law: Callable[[float], Affine], t: float) -> Affine:
        """The velocity (slope, intercept) that moves a Gaussian law; its derivatives by central differences."""
        e = 1e-5
        (m1, v1), (m0, v0), (m, v) = law(t + e), law(t - e), law(t)
        slope = (v1 - v0) / (2 * e) / (2 * v)
        return slope, (m1 - m0) / (2 * e) - slope * m

    def velocity(self, t: float) -> Affine:
        return self._moving(self.base, t)

    def score(self, t: float) -> Affine:
        m, s = self.base(t)
        return -1 / s, m / s

    def w(self, t: float) -> Affine:
        if not self.transport:
            return 0.0, 0.0
        (a, b), (a0, b0) = self._moving(self.tilted, t), self.velocity(t)
        return a - a0, b - b0

    def r(self, t: float) -> Quadratic:
        return square(-self.c, 1.0, 0.0, -t * self.q / 2)

    def drift(self, t: float, sign: int, base: bool = False) -> Affine:
        """v + w +- sigma^2/2 (s + grad r_t), or the base's."""
        half = sign * self.sigma**2 / 2
        (va, vb), (sa, sb), (wa, wb) = self.velocity(t), self.score(t), self.w(t)
        if base:
            return va + half * sa, vb + half * sb
        return va + wa + half * (sa - t * self.q), vb + wb + half * (sb + t * self.q * self.c)

    def kernel(self, t: float, s: float, forward: bool, base: bool = False) -> Affine:
        """Slope and intercept of the mean of F (at t, to s) or B (at s, back to t)."""
        h = s - t
        a, b = self.drift(t, 1, base) if forward else self.drift(s, -1, base)
        return (1 + h * a, h * b) if forward else (1 - h * a, -h * b)

    def crooks(self, t: float, s: float) -> Quadratic:
        """-(log F/F0 - log B/B0)."""
        s2 = self.sigma**2 * (s - t)
        F, F0 = (log_normal(*self.kernel(t, s, True, base), s2) for base in (False, True))
        B, B0 = (log_normal_back(*self.kernel(t, s, False, base), s2) for base in (False, True))
        return add(F0, minus(F), B, minus(B0))

    def jarzynski(self, t: float, s: float, middle: bool) -> Quadratic:
        """r_{k+1}(x + h (v + w)) - r_k(x) + h (div w + w.s), at the left point or the midpoint of the transport."""
        h, at = s - t, (t + s) / 2 if middle else t
        x: Affine = (1.0, 0.0)
        if middle:
            (va, vb), (wa, wb) = self.velocity(t), self.w(t)
            x = (1 + h / 2 * (va + wa), h / 2 * (vb + wb))

        def there(f: Affine) -> Affine:
            return f[0] * x[0], f[0] * x[1] + f[1]

        w, score, v = there(self.w(at)), there(self.score(at)), there(self.velocity(at))
        a, b = 1 + h * (v[0] + w[0]), h * (v[1] + w[1])
        moved = square(b - self.c, a, 0.0, -s * self.q / 2)
        product = {(2, 0): h * w[0] * score[0], (1, 0): h * (w[0] * score[1] + w[1] * score[0])}
        constant = {(0, 0): h * (w[1] * score[1] + self.w(at)[0])}
        return add(moved, minus(self.r(t)), product, constant)

    def expected(self, steps: int, kind: str, end: float = 1.0, tilt: float = 0.0) -> float:
        """log E[exp(A_K + tilt X_K)] of the discretised forward process from N(0, 1), kind crooks, left or middle."""
        times = [end * k / steps for k in range(steps + 1)]
        V = {(1, 0): tilt, (0, 0): 0.0}
        if kind == "crooks":
            V = add(V, self.r(end))
        for t, s in reversed(list(pairwise(times))):
            cost = self.crooks(t, s) if kind == "crooks" else self.jarzynski(t, s, kind == "middle")
            F = log_normal(*self.kernel(t, s, True), self.sigma**2 * (s - t))
            V = integrate(add(cost, F, in_y(V)))
        return integrate(add(in_y(V), log_normal(0.0, 0.0, 1.0)))[0, 0]

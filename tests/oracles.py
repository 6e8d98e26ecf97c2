"""Naive float64 oracles of a Gaussian chain in one dimension: plain Python loops, nothing imported from the package.

    X_0 ~ N(m0, v0),   X_{k+1} = A_k X_k + b_k + s_k z_k        (a chain; `d` independent ones make a diagonal problem)
    r(x) = -q (x - c)^2/2 + l x,   tilted by exp(lam r(X_K))

The base of data N(mu, v) predicts the exact posterior mean, an affine function of x, so the DDIM family is affine.

*Value function.*  V_k(x) = log E[exp(lam r(X_K)) | X_k = x] = -P x^2/2 + Q x + R, backwards from lam r.  A step's
kernel N(m, s^2) turns (P, Q) into P/(1 + P s^2), Q/(1 + P s^2) as functions of m, then m = A x + b is put in.

*Tilted kernel*  N(m, s^2) exp(V_{k+1}): variance s^2/(1 + P s^2), mean (m + s^2 Q)/(1 + P s^2).

*Best control with the std held.*  It minimises E[sum u^2/2 - lam r(X_K)] = KL(P_theta | P*) + const.  The cost to go
P y^2/2 - Q y + const obeys the same recursion, and the best mean is that of the tilted kernel; the variance stays s^2.

*Adjoint Matching's fixed point.*  The lean adjoint of a Gaussian chain is a_k = A_k a_{k+1}, a_K = -lam r'(X_K), so
a_{k+1} = D_{k+1} (lam q X_K - lam (q c + l)) with D_{k+1} = A_{k+1} ... A_{K-1}.  The regression of the target gives
u_k(x) = -s_k D_{k+1} (lam q E[X_K | X_k = x] - lam (q c + l)), and under the control itself
E[X_K | X_k = x] = F (A_k x + b_k + s_k u_k(x)) + f, with F y + f the later steps' composed means: one linear equation
for u_k(x), solved backwards in k.  `shift = 1` is the mistake of regressing on a_k, i.e. D_k in place of D_{k+1}.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

Schedule = list[tuple[float, float]]
Affine = tuple[float, float]


@dataclass(frozen=True)
class Chain:
    A: list[float]
    b: list[float]
    s: list[float]
    m0: float = 0.0
    v0: float = 1.0


@dataclass(frozen=True)
class Tilt:
    lam: float
    q: float = 0.0
    c: float = 0.0
    l: float = 0.0  # noqa: E741

    def end(self) -> tuple[float, float, float]:
        """(P, Q, R) of lam r = -P x^2/2 + Q x + R."""
        return self.lam * self.q, self.lam * (self.q * self.c + self.l), -self.lam * self.q * self.c**2 / 2


# Schedules: (alpha, beta) from the noisiest time to the data ---------------------------------------------------------


def sd15_schedule(steps: int, zero_terminal_snr: bool = False) -> Schedule:
    """SD 1.5's betas, nodes of the "trailing" spacing, then clean data."""
    product, root = 1.0, []
    for i in range(1000):
        beta = (math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999) ** 2
        product *= 1 - beta
        root.append(math.sqrt(product))
    if zero_terminal_snr:
        root = [(a - root[-1]) * root[0] / (root[0] - root[-1]) for a in root]
    nodes = [round(1000 * (steps - k) / steps) - 1 for k in range(steps)]
    return [(root[n], math.sqrt(1 - root[n] ** 2)) for n in nodes] + [(1.0, 0.0)]


def flow_schedule(steps: int, shift: float = 1.0) -> Schedule:
    """Rectified flow on SD 3's shifted grid."""
    noise = [1 - k / steps for k in range(steps + 1)]
    noise = [shift * q / (1 + (shift - 1) * q) for q in noise]
    return [(1 - q, q) for q in noise]


# Chains --------------------------------------------------------------------------------------------------------------


def ddim_chain(schedule: Schedule, mu: float, v: float, ddim_eta: float = 1.0) -> Chain:
    """The DDIM family with the exact posterior mean of N(mu, v)."""
    A, b, std = [], [], []
    for (alpha, beta), (alpha_s, beta_s) in pairwise(schedule):
        gain = alpha * v / (alpha**2 * v + beta**2)
        one = (gain, mu - gain * alpha * mu)  # x1_hat = one[0] x + one[1]
        eps = ((1 - alpha * one[0]) / beta, -alpha * one[1] / beta)
        b2 = beta**2 - (alpha / alpha_s) ** 2 * beta_s**2
        s = ddim_eta * math.sqrt(b2) * beta_s / beta
        rest = math.sqrt(max(beta_s**2 - s**2, 0.0))
        A.append(alpha_s * one[0] + rest * eps[0])
        b.append(alpha_s * one[1] + rest * eps[1])
        std.append(s)
    return Chain(A, b, std)


def flow_euler_chain(times: list[float], mu: float, v: float, m0: float, v0: float) -> Chain:
    """Euler-Maruyama of rectified flow with the memoryless noise, from N(m0, v0) at times[0] > 0."""
    A, b, std = [], [], []
    for t, s in pairwise(times):
        var = t**2 * v + (1 - t) ** 2
        gain = t * v / var
        x1 = (gain, mu - gain * t * mu)
        score = (-1 / var, t * mu / var)
        # v = (x1_hat - x)/(1 - t) loses its meaning at t = 1, which no step starts from
        velocity = ((x1[0] - 1) / (1 - t), x1[1] / (1 - t))
        sigma2 = 2 * (1 - t) / t
        A.append(1 + (s - t) * (velocity[0] + sigma2 / 2 * score[0]))
        b.append((s - t) * (velocity[1] + sigma2 / 2 * score[1]))
        std.append(math.sqrt(sigma2 * (s - t)))
    return Chain(A, b, std, m0, v0)


def laws(chain: Chain) -> list[Affine]:
    """(mean, variance) of X_0 .. X_K."""
    out = [(chain.m0, chain.v0)]
    for A, b, s in zip(chain.A, chain.b, chain.s, strict=True):
        m, v = out[-1]
        out.append((A * m + b, A * A * v + s * s))
    return out


def end_correlation(chain: Chain) -> float:
    """corr(X_0, X_K)."""
    return math.prod(chain.A) * math.sqrt(chain.v0 / laws(chain)[-1][1])


def controlled(chain: Chain, control: list[Affine]) -> Chain:
    """The chain with means A x + b + s u(x), u(x) = g x + h."""
    A = [a + s * g for a, s, (g, _) in zip(chain.A, chain.s, control, strict=True)]
    b = [o + s * h for o, s, (_, h) in zip(chain.b, chain.s, control, strict=True)]
    return Chain(A, b, chain.s, chain.m0, chain.v0)


# The tilt ------------------------------------------------------------------------------------------------------------


def _through_noise(value: tuple[float, float, float], s2: float) -> tuple[float, float, float]:
    P, Q, R = value
    grow = 1 + P * s2
    return P / grow, Q / grow, R - math.log(grow) / 2 + Q * Q * s2 / (2 * grow)


def values(chain: Chain, tilt: Tilt) -> list[tuple[float, float, float]]:
    """(P, Q, R) of V_0 .. V_K."""
    out = [tilt.end()]
    for A, b, s in zip(reversed(chain.A), reversed(chain.b), reversed(chain.s), strict=True):
        P, Q, R = _through_noise(out[0], s * s)
        out.insert(0, (P * A * A, A * (Q - P * b), R - P * b * b / 2 + Q * b))
    return out


def log_z(chain: Chain, tilt: Tilt) -> float:
    """log E_chain[exp(lam r(X_K))]."""
    P, Q, R = _through_noise(values(chain, tilt)[0], chain.v0)
    return -P * chain.m0**2 / 2 + Q * chain.m0 + R


def tilted_law(law: Affine, tilt: Tilt) -> Affine:
    """(mean, variance) of N(m, v) exp(lam r), normalised."""
    P, Q, _ = tilt.end()
    v = 1 / (1 / law[1] + P)
    return v * (law[0] / law[1] + Q), v


def tilted_end_law(chain: Chain, tilt: Tilt) -> Affine:
    """(mean, variance) of the chain's own end law, tilted."""
    return tilted_law(laws(chain)[-1], tilt)


def tilted_kernels(chain: Chain, tilt: Tilt) -> Chain:
    """The exactly tilted kernels and the tilted initial law: the chain P* itself."""
    V = values(chain, tilt)
    A, b, std = [], [], []
    for k, s in enumerate(chain.s):
        P, Q, _ = V[k + 1]
        grow = 1 + P * s * s
        A.append(chain.A[k] / grow)
        b.append((chain.b[k] + s * s * Q) / grow)
        std.append(s / math.sqrt(grow))
    P, Q, _ = V[0]
    v0 = 1 / (1 / chain.v0 + P)
    return Chain(A, b, std, v0 * (chain.m0 / chain.v0 + Q), v0)


def best_control(chain: Chain, tilt: Tilt) -> list[Affine]:
    """u_k(x) = g x + h that minimises KL(P_theta | P*) with every std held: (g, h) a step, (0, 0) where s = 0."""
    V = values(chain, tilt)
    out = []
    for k, s in enumerate(chain.s):
        P, Q, _ = V[k + 1]
        grow = 1 + P * s * s
        out.append((-s * P * chain.A[k] / grow, s * (Q - P * chain.b[k]) / grow))
    return out


def control_cost(chain: Chain, control: list[Affine], tilt: Tilt) -> float:
    """E_theta[sum u^2/2 - lam r(X_K)] = KL(P_theta | P*) - log Z, by moments."""
    path = laws(controlled(chain, control))
    cost = 0.0
    for (g, h), (m, v) in zip(control, path, strict=False):
        cost += ((g * m + h) ** 2 + g * g * v) / 2
    P, Q, R = tilt.end()
    m, v = path[-1]
    return cost + P * (m * m + v) / 2 - Q * m - R


def adjoint_matching_fixed_point(chain: Chain, tilt: Tilt, shift: int = 0) -> list[Affine]:
    """The control that reproduces itself when regressed on its own lean adjoints; `shift = 1`: the wrong index."""
    P, Q, _ = tilt.end()
    out: list[Affine] = []
    D, F, f = 1.0, 1.0, 0.0  # of a_{k+1}, and of E[X_K | X_{k+1} = y] = F y + f
    for A, b, s in zip(reversed(chain.A), reversed(chain.b), reversed(chain.s), strict=True):
        d = D * A if shift else D
        # u = -s d (P (F (A x + b + s u) + f) - Q)
        grow = 1 + s * s * d * P * F
        g, h = -s * d * P * F * A / grow, -s * d * (P * (F * b + f) - Q) / grow
        out.insert(0, (g, h))
        F, f = F * (A + s * g), F * (b + s * h) + f
        D *= A
    return out


def adjoint_matching_gradient(chain: Chain, control: list[Affine], tilt: Tilt) -> list[Affine]:
    """E[(u_k + s_k a_{k+1}) (X_k, 1)] on policy: the expected gradient of the loss in (g_k, h_k), by forward moments.

    Independent of the backward solution: it carries the covariance of X_k and X_K along.
    """
    P, Q, _ = tilt.end()
    chain_u = controlled(chain, control)
    path = laws(chain_u)
    out = []
    for k, (g, h) in enumerate(control):
        m, v = path[k]
        covariance = v * math.prod(chain_u.A[k:])
        D = math.prod(chain.A[k + 1 :])
        adjoint_mean = D * (P * path[-1][0] - Q)
        adjoint_x = D * P * covariance + adjoint_mean * m  # E[a_{k+1} X_k]
        s = chain.s[k]
        out.append((g * (v + m * m) + h * m + s * adjoint_x, g * m + h + s * adjoint_mean))
    return out

"""A Gaussian mixture as the base law: everything about it, noised or tilted, is again a Gaussian mixture.

    X_1 ~ sum_i w_i N(m_i, C_i),     X_t = alpha X_1 + beta eps

    X_t             components N(alpha m_i, S_i),   S_i = alpha^2 C_i + beta^2 I
    X_1 | X_t = x   components N(m_i + alpha C_i S_i^-1 (x - alpha m_i),  beta^2 C_i S_i^-1),
                    weights ~ w_i N(x; alpha m_i, S_i)
    score           -sum_i rho_i(x) S_i^-1 (x - m_i),   rho_i the weights of the components given x
    tilt            exp(lam r), r = k + b.x - x'A x/2:  N(m, C) becomes N(m', C'), weight times z, with
                    C' = (C^-1 + lam A)^-1,   m' = m + C' g,   g = lam (b - A m),
                    log z = lam r(m) + g'C'g/2 - log det(I + lam C A)/2
    h_t(x) = E[exp(lam r(X_1)) | X_t = x] = Z p*_t(x)/p_t(x)

A component is kept as mean, principal axes and variances along them, `C = V diag(lambda) V'`.  Noising leaves the axes
alone, so that no time of no sample ever needs a factorisation, and nothing is lost where `S` is nearly singular.
"""

import math

import torch
from torch import Tensor

from lightning_tilt.process import Prediction, Process
from lightning_tilt.rewards.quadratic import ConjugateReward

__all__ = ["GaussianMixture"]


class GaussianMixture:
    """`sum_i w_i N(m_i, C_i)` in d dimensions, or a batch of such mixtures.

    Shapes are those of one mixture; a batch (from `marginal` or `x1_posterior`) has its dimension in front, and its
    methods then take one `x` for each of its mixtures.

    Args:
        weights: (M,), positive; they are normalised.
        means: (M, d).
        covariances: (M, d, d), symmetric, positive definite.

    Raises:
        ValueError: if the shapes disagree, a weight is not positive, or a covariance is no covariance.

    Attributes:
        log_weights: (M,).
        means: (M, d).
        variances: along the principal axes, (M, d).
        axes: principal axes as columns, (M, d, d).
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        m, d = means.shape if means.ndim == 2 else (0, 0)
        if m == 0 or weights.shape != (m,) or covariances.shape != (m, d, d):
            raise ValueError(
                "weights, means and covariances must be (M,), (M, d) and (M, d, d), not "
                f"{tuple(weights.shape)}, {tuple(means.shape)} and {tuple(covariances.shape)}"
            )
        if not bool((weights > 0).all()):
            raise ValueError(f"weights must be positive, not {weights.tolist()}")
        if not torch.allclose(covariances, covariances.mT):
            raise ValueError("covariances must be symmetric")
        variances, axes = torch.linalg.eigh(covariances)
        if not bool((variances > 0).all()):
            raise ValueError(
                f"covariances must be positive definite; the smallest variance is {float(variances.min())}"
            )
        self._set((weights / weights.sum()).log(), means, variances, axes)

    def _set(self, log_weights: Tensor, means: Tensor, variances: Tensor, axes: Tensor) -> "GaussianMixture":
        self.log_weights, self.means, self.variances, self.axes = log_weights, means, variances, axes
        return self

    @classmethod
    def _of(cls, log_weights: Tensor, means: Tensor, variances: Tensor, axes: Tensor) -> "GaussianMixture":
        return cls.__new__(cls)._set(log_weights, means, variances, axes)

    def to(self, like: Tensor) -> "GaussianMixture":
        """The same mixture in the dtype and on the device of `like`."""
        return self._of(self.log_weights.to(like), self.means.to(like), self.variances.to(like), self.axes.to(like))

    @property
    def weights(self) -> Tensor:
        """(M,)."""
        return self.log_weights.exp()

    @property
    def covariances(self) -> Tensor:
        """(M, d, d)."""
        return self.axes @ (self.variances[..., None] * self.axes.mT)

    @property
    def mean(self) -> Tensor:
        """Mean of the whole mixture, (d,)."""
        return (self.weights[..., None] * self.means).sum(-2)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the whole mixture, (d, d)."""
        apart = self.means - self.mean[..., None, :]
        second = self.covariances + apart[..., :, None] * apart[..., None, :]
        return (self.weights[..., None, None] * second).sum(-3)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` independent draws of one mixture, (n, d)."""
        i = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[-1], generator=generator, dtype=self.means.dtype, device=self.means.device)
        return self.means[i] + torch.einsum("nij,nj->ni", self.axes[i], self.variances[i].sqrt() * z)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density at `x` (B, d): (B,)."""
        return self._log_joint(self._whiten(x)).logsumexp(-1)

    def score(self, x: Tensor) -> Tensor:
        """Gradient of `log_prob` at `x` (B, d): (B, d)."""
        y = self._whiten(x)
        rho = self._log_joint(y).softmax(-1)
        return -torch.einsum("...m,mij,...mj->...i", rho, self.axes, y / self.variances)

    def marginal(self, process: Process, t: Tensor) -> "GaussianMixture":
        """The law of `X_t`.

        Args:
            process: the interpolant.
            t: one time (), or a batch of times (B,) for a batch of mixtures.
        """
        alpha, beta = self._coefficients(process, t)
        return self._of(self.log_weights, alpha * self.means, alpha**2 * self.variances + beta**2, self.axes)

    def x1_posterior(self, process: Process, x: Tensor, t: Tensor) -> "GaussianMixture":
        """The law of `X_1` given `X_t = x`: a batch of B mixtures.

        Args:
            process: the interpolant.
            x: (B, d).
            t: () or (B,).
        """
        alpha, beta = self._coefficients(process, t)
        marginal = self.marginal(process, t)
        y = marginal._whiten(x)
        gain = self.variances / marginal.variances
        means = self.means + torch.einsum("mij,...mj->...mi", self.axes, alpha * gain * y)
        return self._of(marginal._log_joint(y).log_softmax(-1), means, beta**2 * gain, self.axes)

    def prediction(self, process: Process, x: Tensor, t: Tensor) -> Prediction:
        """The exact `x1_hat = E[X_1 | X_t = x]` and `eps_hat = -beta score`, (B, d); finite on all of [0, 1]."""
        _, beta = self._coefficients(process, t)
        eps_hat = -beta.reshape(-1, 1) * self.marginal(process, t).score(x)
        return Prediction(self.x1_posterior(process, x, t).mean, eps_hat)

    def velocity(self, process: Process, x: Tensor, t: Tensor) -> Tensor:
        """`v = alpha' x1_hat + beta' eps_hat` at `x` (B, d): (B, d)."""
        return process.velocity(self.prediction(process, x, t), t)

    def tilt(self, reward: ConjugateReward, lam: float) -> tuple["GaussianMixture", Tensor]:
        """The law proportional to `p exp(lam r)`, and `log Z = log E_p[exp(lam r)]` ().

        Raises:
            ValueError: if `exp(lam r)` has no finite mean.
        """
        a, b, k = (lam * c.to(self.means) for c in reward.coefficients())
        root = self.axes * self.variances.sqrt()[:, None, :]  # root root' = C
        inner = torch.eye(len(b)).to(self.means) + root.mT @ a @ root
        factor, failed = torch.linalg.cholesky_ex(inner)
        if bool(failed.any()):
            raise ValueError(f"exp(lam r) has no finite mean at lam = {lam}: C^-1 + lam A must be positive definite")
        half = torch.linalg.solve_triangular(factor, root.mT, upper=False)  # half' half = C'
        g = b - self.means @ a
        lift = torch.einsum("mij,mj->mi", half, g)
        log_z = k + self.means @ b - ((self.means @ a) * self.means).sum(1) / 2 + (lift**2).sum(1) / 2
        log_z = log_z - factor.diagonal(dim1=-2, dim2=-1).log().sum(1)
        joint = self.log_weights + log_z
        variances, axes = torch.linalg.eigh(half.mT @ half)
        means = self.means + torch.einsum("mji,mj->mi", half, lift)
        return self._of(joint.log_softmax(0), means, variances, axes), joint.logsumexp(0)

    def log_h(self, process: Process, reward: ConjugateReward, lam: float, x: Tensor, t: Tensor) -> Tensor:
        """`log E[exp(lam r(X_1)) | X_t = x]` at `x` (B, d), times () or (B,): (B,)."""
        tilted, log_z = self.tilt(reward, lam)
        return log_z + tilted.marginal(process, t).log_prob(x) - self.marginal(process, t).log_prob(x)

    def grad_log_h(self, process: Process, reward: ConjugateReward, lam: float, x: Tensor, t: Tensor) -> Tensor:
        """Gradient of `log_h`, the tilted score minus the base's, (B, d); the optimal control is `sigma` times it."""
        return self.tilted_score(process, reward, lam, x, t) - self.marginal(process, t).score(x)

    def tilted_score(self, process: Process, reward: ConjugateReward, lam: float, x: Tensor, t: Tensor) -> Tensor:
        """Score of the tilted law's marginal at `t`, (B, d)."""
        return self.tilt(reward, lam)[0].marginal(process, t).score(x)

    def _coefficients(self, process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
        """`alpha, beta` of shape () or (B, 1, 1), which multiply means (M, d)."""
        shape = (-1, 1, 1) if t.ndim else ()
        t = t.double()
        return process.alpha(t).to(self.means).reshape(shape), process.beta(t).to(self.means).reshape(shape)

    def _whiten(self, x: Tensor) -> Tensor:
        """`V'(x - m)` for each component, (B, M, d)."""
        return torch.einsum("mji,...mj->...mi", self.axes, x[..., None, :] - self.means)

    def _log_joint(self, y: Tensor) -> Tensor:
        """`log(w_i N(x; m_i, C_i))` from `y = V'(x - m)`, (B, M)."""
        density = (y**2 / self.variances + self.variances.log()).sum(-1) + y.shape[-1] * math.log(2 * math.pi)
        return self.log_weights - density / 2

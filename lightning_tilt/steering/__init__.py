"""Steering without training: sequential Monte Carlo (Feynman-Kac) in the discrete chain of any model.

Particles move by kernels F_k in place of the base's F0_k, and a twist psi_k, any function of the state with

    psi_0 = 0,      psi_K = lam r                 log G_k = psi_{k+1}(x_{k+1}) - psi_k(x_k) + log F0/F (x_{k+1} | x_k)

says early which of them are promising.  The sum of log G over a path telescopes to the control form lam r + log F0/F:
the mean weight is an unbiased estimate of Z = E_base[exp(lam r)] at any number of steps, for any twist, any F, with or
without resampling; the twist decides its variance alone.  Where the ESS of a group of particles falls under a
threshold it is resampled and its log weights all become log mean w (the mean of log w would bias Z).

    twist   x1_hat   psi_k = t_k^power lam r(decode(x1_hat(x, t_k)))        the base's own prediction of the end
            state    psi_k = t_k^power lam r(decode(x))                     costs no gradient of the network when guided
            none     psi_k = 0                                              no resampling: weighted samples of F
    F       mean m + std^2 grad psi  (guided),  m the base's or the tuned model's;  std is the base's

The gradient is that of the twist's reward at x_k with the factor of t_{k+1}.  Steps of std = 0 are the base's.  A twist
that claims more than it knows (x1_hat carries no spread) resamples too early and adds variance where lam is large; a
larger `power` makes it wait.

A log Z with an honest standard error needs independent runs: the particles of a prompt are split into replicates that
never mix, log Z is the log of the mean of their Z, and the jackknife over the replicates is its error.
"""

from lightning_tilt.steering.smc import SMC, Steered
from lightning_tilt.steering.twist import Twist, Twisted

__all__ = ["SMC", "Steered", "Twist", "Twisted"]

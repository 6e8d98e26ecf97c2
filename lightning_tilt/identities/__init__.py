"""Log weights, log Z, effective sample size, expectations under the tilt - each with its standard error.

`estimate` has what a number with a standard error is, `weights` what path weights give, `treatment` what losses make
of them, `bounds` log Z from both sides, `resampling` particles of equal weight, `marginals` the identities of Jarzynski
and Crooks step by step.
"""

from lightning_tilt.identities.bounds import bennett, elbo, eubo
from lightning_tilt.identities.estimate import Estimate, clustered, jackknifed, mean, stratified
from lightning_tilt.identities.marginals import (
    backward_drift,
    crooks_step,
    divergence,
    forward_drift,
    jarzynski_step,
    kernel_log_ratio,
    midpoint,
    rademacher,
    value_and_divergence,
)
from lightning_tilt.identities.resampling import Resampling, resample
from lightning_tilt.identities.treatment import Treatment, treat_weights
from lightning_tilt.identities.weights import ess, ess_rows, expectation, forward_ess, log_partition

__all__ = [
    "Estimate",
    "Resampling",
    "Treatment",
    "backward_drift",
    "bennett",
    "clustered",
    "crooks_step",
    "divergence",
    "elbo",
    "ess",
    "ess_rows",
    "eubo",
    "expectation",
    "forward_drift",
    "forward_ess",
    "jackknifed",
    "jarzynski_step",
    "kernel_log_ratio",
    "log_partition",
    "mean",
    "midpoint",
    "rademacher",
    "resample",
    "stratified",
    "treat_weights",
    "value_and_divergence",
]

"""Log weights, log Z, effective sample size, expectations under the tilt - each with its standard error.

`estimate` has what a number with a standard error is, `weights` what path weights give.
"""

from lightning_tilt.identities.estimate import Estimate, jackknifed, mean, stratified
from lightning_tilt.identities.weights import ess, expectation, log_partition

__all__ = ["Estimate", "ess", "expectation", "jackknifed", "log_partition", "mean", "stratified"]

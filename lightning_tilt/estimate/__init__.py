"""What a run needs, told before it is made: memory by part, network evaluations an update.

lightning-tilt fit --config CONFIG --dry_run memory
"""

from lightning_tilt.estimate.memory import Estimate, estimate
from lightning_tilt.estimate.settings import Settings
from lightning_tilt.estimate.table import table

__all__ = ["Estimate", "Settings", "estimate", "table"]

"""What runs in the next step, decided in plain Python and NumPy. No JAX."""

from jpaged.scheduling.plan import Bucket, StepPlan, Tile, Variant
from jpaged.scheduling.scheduler import Scheduler

__all__ = ["Bucket", "Scheduler", "StepPlan", "Tile", "Variant"]

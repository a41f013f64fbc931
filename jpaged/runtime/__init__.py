"""The device side: the pool, the jitted step, the sampler."""

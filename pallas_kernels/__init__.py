"""Operations on paged memory, one package each: `api` picks the implementation for the platform.

This package imports only JAX, so that it can be used without the engine.
"""

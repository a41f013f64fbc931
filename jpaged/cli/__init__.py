"""The command line: `jpaged generate | chat | bench | collect-env`. Nothing here imports JAX before it must."""

"""The command line: `jpaged generate | chat | bench | collect-env`. JAX is imported when it is needed."""

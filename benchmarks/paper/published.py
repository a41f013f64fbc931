"""What the paper's figures show: labels printed in them, and points read off their curves (arXiv 2309.06180)."""

CAPACITY = {
    # requests/s at which normalized latency crosses 0.5 s/token: read off the curves
    "fig12a": {"ft": 0.23, "orca-max": 0.52, "orca-pow2": 0.77, "orca-oracle": 1.10, "jpaged": 1.93},
    "fig12b": {"ft": 0.10, "orca-max": 0.20, "orca-pow2": 0.27, "orca-oracle": 0.40, "jpaged": 0.94},
    "fig12c": {"ft": 0.11, "orca-max": 0.92, "orca-pow2": 1.28, "orca-oracle": 1.62, "jpaged": 2.38},
    "fig12d": {"ft": 2.53, "orca-max": 3.85, "orca-pow2": 16.11, "orca-oracle": 21.08, "jpaged": 28.05},
    "fig12e": {"ft": 1.26, "orca-max": 1.25, "orca-pow2": 6.29, "orca-oracle": 10.50, "jpaged": 18.71},
    "fig12f": {"ft": 0.87, "orca-max": 5.11, "orca-pow2": 17.11, "orca-oracle": 19.17, "jpaged": 20.17},
    "parallel 2": {"orca-max": 1.52, "orca-pow2": 9.03, "orca-oracle": 12.66, "jpaged": 18.11},
    "parallel 4": {"orca-max": 0.51, "orca-pow2": 4.70, "orca-oracle": 7.01, "jpaged": 10.33},
    "parallel 6": {"orca-max": 0.50, "orca-pow2": 3.03, "orca-oracle": 4.63, "jpaged": 7.11},
    "beam 2": {"orca-max": 1.27, "orca-pow2": 7.02, "orca-oracle": 9.40, "jpaged": 17.01},
    "beam 4": {"orca-max": 0.36, "orca-pow2": 3.25, "orca-oracle": 5.01, "jpaged": 9.59},
    "beam 6": {"orca-max": 0.29, "orca-pow2": 1.91, "orca-oracle": 3.16, "jpaged": 7.02},
    "prefix 80": {"orca-oracle": 30.1, "jpaged": 50.9},
    "prefix 341": {"orca-oracle": 12.05, "jpaged": 42.7},
    "chat": {"orca-max": 0.552, "orca-pow2": 0.566, "orca-oracle": 0.572, "jpaged": 0.853},
}

FIG2 = {
    # % of the pool: token states, reserved, internal fragmentation, external fragmentation and others
    "orca-max": (20.4, 13.3, 57.3, 8.9),
    "orca-pow2": (26.8, 17.9, 13.6, 41.6),
    "orca-oracle": (38.2, 25.2, 0.0, 36.6),
    "jpaged": (96.3, 0.0, 0.0, 3.7),
}

FIG13 = {
    # mean number of batched requests
    "sharegpt": {"orca-max": 7.00, "orca-pow2": 9.81, "orca-oracle": 13.62, "jpaged": 30.42},
    "alpaca": {"orca-max": 7.00, "orca-pow2": 43.24, "orca-oracle": 72.75, "jpaged": 132.44},
}

FIG15 = {
    # % of blocks saved by sharing; ShareGPT stands in the text alone, as a range over n = 2 to 6
    ("alpaca", False): {2: 6.09, 4: 8.53, 6: 9.79},
    ("alpaca", True): {2: 37.56, 4: 53.13, 6: 55.16},
    ("sharegpt", False): {2: 16.2, 6: 30.5},
    ("sharegpt", True): {2: 44.3, 6: 66.3},
}

BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FIG18B = {
    # normalized latency, s/token, by block size
    "sharegpt": (2.30, 1.95, 1.98, 0.57, 0.085, 0.069, 0.086, 0.159, 1.36),
    "alpaca": (3.62, 1.90, 2.12, 0.73, 0.59, 0.53, 1.90, 4.80, 18.2),
}

FIG19A_SWAP = (137, 89, 61, 47, 40.1, 36.6, 34.9, 33.9, 33.4)
"""ms out and in, 256 tokens of OPT-13B, by block size."""
FIG19A_RECOMPUTE = 37.5
"""ms, any block size; the plotted value, which the released script had multiplied by 0.9."""
FIG19B = {16: {"recompute": 0.073, "swap": 0.072}, 256: {"recompute": 1.12, "swap": 0.66}}
"""Normalized latency, s/token."""

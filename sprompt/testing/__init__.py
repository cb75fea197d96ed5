"""Common parts of tests and benchmarks: sample inputs, ground truths, tolerances and benchmark shapes of every op (specs/)."""

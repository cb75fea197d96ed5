"""What tests and benchmarks share: sample inputs, truths, tolerances and benchmark shapes of every op (specs/)."""

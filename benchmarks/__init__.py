"""Benchmarks, and the synthetic checkpoints that they and the tests run on."""

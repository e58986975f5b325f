"""Checkpoints on disk: exact sizes, compact targets, safe replacement, verification, loading."""

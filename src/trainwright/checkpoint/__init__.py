"""Checkpoints: sharded safetensors and a sealed manifest, whole or not there, loaded at any world size.

The format and what it guarantees: docs/checkpoints.md.
"""

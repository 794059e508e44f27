"""`verify` proves a strategy against unsharded training (docs/verify.md)."""

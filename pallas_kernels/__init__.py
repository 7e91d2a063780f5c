"""Fused sequence operations, one package each: usable alone, importing only jax and jaxtyping."""

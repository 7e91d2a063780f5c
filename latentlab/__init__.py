"""Ten papers on sequence models, on one spine of JAX, Flax and Pallas.

Import the subpackage that you need: `from latentlab import ops, sample`.
"""

__version__ = "0.1.0"

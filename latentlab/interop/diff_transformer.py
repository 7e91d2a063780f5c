"""The Differential Transformer's attention by the names of its original release (microsoft/unilm).

`Diff-Transformer/multihead_flashdiff_1.py`; whole models were not published there. Its layout is
that of our default `DiffAttentionConfig`, so that weights carry over as they are.
"""

from latentlab.interop.weights import Entry

ATTENTION = (
  Entry("q_proj.weight", "q_proj/kernel", contracted=1),
  Entry("k_proj.weight", "k_proj/kernel", contracted=1),
  Entry("v_proj.weight", "v_proj/kernel", contracted=1),
  Entry("out_proj.weight", "out_proj/kernel", contracted=2),
  *(Entry(name, name) for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")),
  Entry("subln.weight", "head_norm/scale"),
)
"""Parameters of one `layers.DiffAttention`, for `export_weights` and `import_weights`."""

"""The losses as pure functions of tensors, one file per kind of method; they import nothing of kdcli.

The student comes first, then the mentor [B, K] or the mentors [M, B, K], then the target; hyper-parameters are
keyword-only and have the names of the papers. Everything is computed in float32 and is finite, with a finite gradient,
for logits up to 1e4: probabilities are used only as log-softmax and log-sum-exp.
"""

"""Decoding of test sets: cut files to hypotheses, scores, result files and reports."""

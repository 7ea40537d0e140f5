"""Decoding of test sets, from cut files to scores, result files and reports."""

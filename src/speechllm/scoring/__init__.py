"""Scoring: error rates, result files in icefall's format, bootstrap tests, text normalizers."""

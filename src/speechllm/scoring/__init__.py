"""Scoring: word and character errors, result files in icefall's format, bootstrap, normalizers."""

"""From speech to transcripts: search, CTC drafts, hallucination detection and word times."""

"""HTTP server for OpenAI's transcription API."""

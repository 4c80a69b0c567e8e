"""The server: text, JSON and HTTP around the engine."""

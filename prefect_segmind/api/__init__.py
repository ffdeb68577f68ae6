"""Segmind's endpoint: the request, the sizes, the answer, the client."""

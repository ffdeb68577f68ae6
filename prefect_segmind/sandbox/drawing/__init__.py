"""The pictures that the sandbox draws."""

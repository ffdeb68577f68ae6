"""When the next request may be sent, and what it may cost."""

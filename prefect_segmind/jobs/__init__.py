"""One job: its fields, its mistakes, its identity."""

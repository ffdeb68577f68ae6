"""Many jobs in one file."""

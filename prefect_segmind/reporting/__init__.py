"""What Prefect shows: artifacts, events, pages."""

"""Files that arrive in a folder or a bucket."""

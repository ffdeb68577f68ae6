"""Bytes at an address: a folder, a bucket, http."""

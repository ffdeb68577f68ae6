"""What is kept and what is paid for: records, leases, the outbox."""

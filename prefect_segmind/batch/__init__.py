"""Many jobs in one run: the plan, the totals, the approval."""

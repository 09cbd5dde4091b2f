"""Pure functions on stacks of matrices (…, m, n): no classes, no state, no random numbers without a seed."""

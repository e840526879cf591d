"""Studies of several runs: sweeps over the rows of a table, and reports of their results."""

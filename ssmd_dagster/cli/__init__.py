"""The operator's door, `ssmd`: parsing, printing and exit codes; no rules and no I/O of its own."""

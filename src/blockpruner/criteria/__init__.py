"""The shelf of criteria: one file per method, one line here."""

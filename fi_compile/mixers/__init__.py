"""The table of increments, one file per mixer."""

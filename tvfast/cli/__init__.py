"""The `tvfast` command: parse, call, print."""

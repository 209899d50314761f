"""The tuning methods that ship: one file each, declared as entry points, imported by name only."""

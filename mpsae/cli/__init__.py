"""The command line: `mpsae train`, `mpsae eval` and `mpsae demo`."""

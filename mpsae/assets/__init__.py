"""What ships with the package: the embedded model and the script that made it."""
